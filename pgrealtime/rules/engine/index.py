"""From a row to the subscribers that it may concern: one index per collection. After plan.

A *member* is whatever the caller tells apart: all subscribers with the same variant and values. The
index is synchronous and has one writer; a search sees it as it is, and is done before it changes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from enum import Enum, auto
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from pgrealtime.changes import Row
from pgrealtime.rules.engine.batch_query import values_of
from pgrealtime.rules.engine.formula import Facts, Formula
from pgrealtime.rules.engine.index_paths import Kind, Path, RemoteSource, RowSource
from pgrealtime.rules.engine.plan import Variant
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import Comparable, Scalar


class Member(Hashable, Protocol):
    """What an index holds. Compared by identity."""

    @property
    def variant(self) -> Variant:
        """What it asks."""
        ...

    @property
    def values(self) -> tuple[Scalar, ...]:
        """What it asks it with."""
        ...


M = TypeVar("M", bound=Member)


_NO_KEY = object()
_NOT_MADE = object()


class Entries(Generic[M]):
    """Members under keys: one is stored as it is, several as a set that keeps their order."""

    __slots__ = ("_by_key",)

    def __init__(self) -> None:
        self._by_key: dict[Hashable, M | dict[M, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._by_key)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._by_key)

    def add(self, key: Hashable, member: M) -> bool:
        """Put a member under a key; return whether it is the first there."""
        found = self._by_key.get(key)
        if found is None:
            self._by_key[key] = member
        elif isinstance(found, dict):
            found[member] = None
        elif found is not member:
            self._by_key[key] = {found: None, member: None}
        return found is None

    def remove(self, key: Hashable, member: M) -> bool:
        """Take a member out; return whether it was the last there."""
        found = self._by_key.get(key)
        if isinstance(found, dict):
            found.pop(member, None)
            if len(found) == 1:
                (self._by_key[key],) = found
            return False
        if found is member:
            del self._by_key[key]
            return True
        return False

    def get(self, key: Hashable) -> Iterable[M]:
        """Return the members under a key."""
        found = self._by_key.get(key)
        if found is None:
            return ()
        return found if isinstance(found, dict) else (found,)

    def all(self) -> Iterator[M]:
        """Yield all members."""
        return self.but(_NO_KEY)

    def but(self, key: Hashable | None) -> Iterator[M]:
        """Yield all members but those under a key."""
        for other, found in self._by_key.items():
            if other != key:
                if isinstance(found, dict):
                    yield from found
                else:
                    yield found


class Bounds(Entries[M]):
    """Members under bounds of one type, found by order."""

    __slots__ = ("_sorted",)

    def __init__(self) -> None:
        super().__init__()
        self._sorted: list[Any] | None = None
        """None until it is searched: adding many at once sorts them once."""

    def add(self, key: Hashable, member: M) -> bool:
        """Put a member under its bound."""
        is_first = super().add(key, member)
        if is_first and self._sorted is not None:
            insort(self._sorted, key)
        return is_first

    def remove(self, key: Hashable, member: M) -> bool:
        """Take a member out."""
        is_last = super().remove(key, member)
        if is_last and self._sorted is not None:
            del self._sorted[bisect_left(self._sorted, key)]
        return is_last

    def fitting(self, op: Op, value: Comparable) -> Iterator[M]:
        """Yield the members for whose bound ``value op bound`` is true."""
        if value is None:
            return
        if self._sorted is None:
            self._sorted = list(self._by_key)
            self._sorted.sort()
        for bound in self._sorted[_span(self._sorted, op, value)]:
            yield from self.get(bound)


def _span(bounds: list[Any], op: Op, value: Comparable) -> slice:
    if value != value:  # noqa: PLR0124 (NaN, which is above every bound)
        return slice(0, len(bounds) if op in {Op.GT, Op.GE} else 0)
    match op:
        case Op.GT:
            return slice(0, bisect_left(bounds, value))
        case Op.GE:
            return slice(0, bisect_right(bounds, value))
        case Op.LT:
            return slice(bisect_right(bounds, value), None)
        case _:
            return slice(bisect_left(bounds, value), None)


class Asked(Generic[M]):
    """Members whose keys Postgres is asked for."""

    __slots__ = ("entries", "guards")

    def __init__(self) -> None:
        self.entries: Entries[M] = Entries()
        self.guards: Counter[tuple[Formula, ...]] = Counter()
        """How many members have which guards: where none can be true, nothing is asked."""


_Guards: TypeAlias = tuple[Formula, ...]


class Index(Generic[M]):
    """The members of one collection, by what leads from a row to them.

    Attributes:
        free: Those to whom nothing leads, by their guards and whether they are admitted by them.
        asked: Those that Postgres must name, by what it is asked.
    """

    __slots__ = ("_bounds", "_keyed", "_others", "_unkeyed", "asked", "free")

    def __init__(self) -> None:
        self._keyed: dict[tuple[RowSource, ...], Entries[M]] = {}
        self._bounds: dict[tuple[RowSource, Op], Bounds[M]] = {}
        self._others: dict[RowSource, Entries[M]] = {}
        self._unkeyed: dict[M, None] = {}
        """Those of whose values no key can be made: a date 'infinity', a number beyond a double."""
        self.free: dict[tuple[_Guards, bool], dict[M, None]] = {}
        self.asked: dict[RemoteSource, Asked[M]] = {}

    def __bool__(self) -> bool:
        return bool(
            self._keyed or self._bounds or self._others or self._unkeyed or self.free or self.asked
        )

    def add(self, member: M) -> None:
        """Put a member wherever a row may find it."""
        for path in member.variant.paths:
            key = _key_of(path, member)
            if path.kind is Kind.FREE:
                self.free.setdefault((path.guards, path.is_exact), {})[member] = None
            elif key is _NOT_MADE:
                self._unkeyed[member] = None
            elif key is not None or path.kind is Kind.NOT:  # else its value fits nothing
                self._entries(path).add(key, member)
                if path.remote is not None:
                    self.asked[path.remote].guards[path.guards] += 1

    def _entries(self, path: Path) -> Entries[M]:
        match path.kind:
            case Kind.KEY:
                return self._keyed.setdefault(path.sources, Entries())
            case Kind.RANGE:
                assert path.op is not None
                return self._bounds.setdefault((path.sources[0], path.op), Bounds())
            case Kind.REMOTE:
                assert path.remote is not None
                return self.asked.setdefault(path.remote, Asked()).entries
            case _:
                return self._others.setdefault(path.sources[0], Entries())

    def remove(self, member: M) -> None:
        """Take a member out, and whatever was there for it alone."""
        for path in member.variant.paths:
            key = _key_of(path, member)
            if path.kind is Kind.FREE:
                members = self.free.get((path.guards, path.is_exact), {})
                members.pop(member, None)
                if not members:  # or gone already: two paths may lead there
                    self.free.pop((path.guards, path.is_exact), None)
            elif key is _NOT_MADE:
                self._unkeyed.pop(member, None)
            elif key is not None or path.kind is Kind.NOT:
                self._take_out(path, key, member)

    def _take_out(self, path: Path, key: Hashable, member: M) -> None:
        entries = self._entries(path)
        entries.remove(key, member)
        if path.remote is not None:
            guards = self.asked[path.remote].guards
            guards[path.guards] -= 1
            if not guards[path.guards]:
                del guards[path.guards]
        if not entries:
            self._places(path.kind).pop(path.lead, None)

    def _places(self, kind: Kind) -> dict[Any, Any]:
        match kind:
            case Kind.KEY:
                return self._keyed
            case Kind.RANGE:
                return self._bounds
            case Kind.REMOTE:
                return self.asked
            case _:
                return self._others

    def found(self, facts: Facts) -> Iterator[tuple[Hashable | None, Iterable[M]]]:
        """Yield the members to which the row itself leads, with what led there.

        None leads to members of whom only Postgres knows what the row means to them.
        """
        row, missing = facts.row, facts.missing
        if self._unkeyed:
            yield None, self._unkeyed
        for sources, entries in self._keyed.items():
            if not missing or all(missing.isdisjoint(source.columns) for source in sources):
                yield from _under_keys(sources, entries, row)
        for lead, bounds in self._bounds.items():
            source, op = lead
            if missing.isdisjoint(source.columns):
                value = _value(source, row)
                if isinstance(value, _Undecided):
                    yield None, bounds.all()
                else:
                    yield lead, bounds.fitting(op, value)
        for source, entries in self._others.items():
            if missing.isdisjoint(source.columns):
                value = _value(source, row)
                if isinstance(value, _Undecided):
                    yield None, entries.all()
                else:
                    yield source, entries.but(value)

    def unreached(self, missing: frozenset[str]) -> Iterator[Entries[M]]:
        """Yield the members to whom only columns lead that a row lacks."""
        for sources, entries in self._keyed.items():
            if not all(missing.isdisjoint(source.columns) for source in sources):
                yield entries
        for (source, _), bounds in self._bounds.items():
            if not missing.isdisjoint(source.columns):
                yield bounds
        for source, entries in self._others.items():
            if not missing.isdisjoint(source.columns):
                yield entries
        for remote, asked in self.asked.items():
            if not missing.isdisjoint(values_of(remote).columns):
                yield asked.entries


class _Undecided(Enum):
    """Stands for a value that only Postgres knows."""

    IT = auto()


def _key_of(path: Path, member: Member) -> Hashable | None:
    """Return what the member is found by; ``_NOT_MADE`` if that can't be said of its values."""
    try:
        return path.key(member.values)
    except Exception:  # noqa: BLE001 (whatever it is, the member is tried each time)
        return _NOT_MADE


def _value(source: RowSource, row: Row) -> Comparable | _Undecided:
    try:
        (value,) = source.read(row)
    except Exception:  # noqa: BLE001 (whatever it is, members are tried each)
        return _Undecided.IT
    return value


def _under_keys(
    sources: tuple[RowSource, ...], entries: Entries[M], row: Row
) -> Iterator[tuple[Hashable | None, Iterable[M]]]:
    try:
        keys = _keys(sources, row)
    except Exception:  # noqa: BLE001 (likewise)
        yield None, entries.all()
        return
    for key in keys:
        members = entries.get(key)
        if members:
            yield sources, members


def _keys(sources: tuple[RowSource, ...], row: Row) -> Iterable[Hashable]:
    if len(sources) == 1:
        return [value for value in sources[0].read(row) if value is not None]
    values = tuple([source.read(row)[0] for source in sources])
    return () if None in values else (values,)
