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
from pgrealtime.rules.engine.batch_query import sql_values_of
from pgrealtime.rules.engine.formula import Formula
from pgrealtime.rules.engine.index_paths import IndexPath, LookupKind, RemoteKey, RowKeyReader
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import SqliteValue


class Member(Hashable, Protocol):
    """What an index holds. Compared by identity."""

    @property
    def specialization(self) -> Specialization:
        """What it asks."""
        ...

    @property
    def values(self) -> tuple[Scalar, ...]:
        """What it asks it with."""
        ...


M = TypeVar("M", bound=Member)


_NO_KEY = object()
_UNKNOWN_KEY = object()


class KeyEntries(Generic[M]):
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
        return self.all_except(_NO_KEY)

    def all_except(self, key: Hashable | None) -> Iterator[M]:
        """Yield all members but those under a key."""
        for other, found in self._by_key.items():
            if other != key:
                if isinstance(found, dict):
                    yield from found
                else:
                    yield found


class RangeEntries(KeyEntries[M]):
    """Members under bounds of one type, found by order."""

    __slots__ = ("_sorted_bounds",)

    def __init__(self) -> None:
        super().__init__()
        self._sorted_bounds: list[Any] | None = None
        """None until it is searched: adding many at once sorts them once."""

    def add(self, key: Hashable, member: M) -> bool:
        """Put a member under its bound."""
        is_first = super().add(key, member)
        if is_first and self._sorted_bounds is not None:
            insort(self._sorted_bounds, key)
        return is_first

    def remove(self, key: Hashable, member: M) -> bool:
        """Take a member out."""
        is_last = super().remove(key, member)
        if is_last and self._sorted_bounds is not None:
            del self._sorted_bounds[bisect_left(self._sorted_bounds, key)]
        return is_last

    def matching(self, op: Op, value: SqliteValue) -> Iterator[M]:
        """Yield the members for whose bound ``value op bound`` is true."""
        if value is None:
            return
        if self._sorted_bounds is None:
            self._sorted_bounds = list(self._by_key)
            self._sorted_bounds.sort()
        for bound in self._sorted_bounds[_matching_range(self._sorted_bounds, op, value)]:
            yield from self.get(bound)


def _matching_range(bounds: list[Any], op: Op, value: SqliteValue) -> slice:
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


class RemoteEntries(Generic[M]):
    """Members whose keys Postgres is asked for."""

    __slots__ = ("entries", "guard_counts")

    def __init__(self) -> None:
        self.entries: KeyEntries[M] = KeyEntries()
        self.guard_counts: Counter[tuple[Formula, ...]] = Counter()
        """How many members have which guards: where none can be true, nothing is asked."""


_Guards: TypeAlias = tuple[Formula, ...]


class PredicateIndex(Generic[M]):
    """The members of one collection, by what leads from a row to them.

    Attributes:
        unindexed: Those to whom nothing leads, by their guards and whether they are admitted by
            them.
        remote_entries: Those that Postgres must name, by what it is asked.
    """

    __slots__ = (
        "_except_entries",
        "_key_entries",
        "_range_entries",
        "_without_key",
        "remote_entries",
        "unindexed",
    )

    def __init__(self) -> None:
        self._key_entries: dict[tuple[RowKeyReader, ...], KeyEntries[M]] = {}
        self._range_entries: dict[tuple[RowKeyReader, Op], RangeEntries[M]] = {}
        self._except_entries: dict[RowKeyReader, KeyEntries[M]] = {}
        self._without_key: dict[M, None] = {}
        """Those of whose values no key can be made: a date 'infinity', a number beyond a double."""
        self.unindexed: dict[tuple[_Guards, bool], dict[M, None]] = {}
        self.remote_entries: dict[RemoteKey, RemoteEntries[M]] = {}

    def __bool__(self) -> bool:
        return bool(
            self._key_entries
            or self._range_entries
            or self._except_entries
            or self._without_key
            or self.unindexed
            or self.remote_entries
        )

    def add(self, member: M) -> None:
        """Put a member wherever a row may find it."""
        for path in member.specialization.paths:
            key = _member_key(path, member)
            if path.kind is LookupKind.ALL:
                self.unindexed.setdefault((path.guards, path.is_exact), {})[member] = None
            elif key is _UNKNOWN_KEY:
                self._without_key[member] = None
            elif key is not None or path.kind is LookupKind.EXCEPT:  # else its value fits nothing
                self._entries_for(path).add(key, member)
                if path.remote_key is not None:
                    self.remote_entries[path.remote_key].guard_counts[path.guards] += 1

    def _entries_for(self, path: IndexPath) -> KeyEntries[M]:
        match path.kind:
            case LookupKind.KEY:
                return self._key_entries.setdefault(path.row_key_readers, KeyEntries())
            case LookupKind.RANGE:
                assert path.op is not None
                return self._range_entries.setdefault(
                    (path.row_key_readers[0], path.op), RangeEntries()
                )
            case LookupKind.REMOTE:
                assert path.remote_key is not None
                return self.remote_entries.setdefault(path.remote_key, RemoteEntries()).entries
            case _:
                return self._except_entries.setdefault(path.row_key_readers[0], KeyEntries())

    def remove(self, member: M) -> None:
        """Take a member out, and whatever was there for it alone."""
        for path in member.specialization.paths:
            key = _member_key(path, member)
            if path.kind is LookupKind.ALL:
                members = self.unindexed.get((path.guards, path.is_exact), {})
                members.pop(member, None)
                if not members:  # or gone already: two paths may lead there
                    self.unindexed.pop((path.guards, path.is_exact), None)
            elif key is _UNKNOWN_KEY:
                self._without_key.pop(member, None)
            elif key is not None or path.kind is LookupKind.EXCEPT:
                self._remove_entry(path, key, member)

    def _remove_entry(self, path: IndexPath, key: Hashable, member: M) -> None:
        entries = self._entries_for(path)
        entries.remove(key, member)
        if path.remote_key is not None:
            guards = self.remote_entries[path.remote_key].guard_counts
            guards[path.guards] -= 1
            if not guards[path.guards]:
                del guards[path.guards]
        if not entries:
            self._entries_by_key(path.kind).pop(path.entries_key, None)

    def _entries_by_key(self, kind: LookupKind) -> dict[Any, Any]:
        match kind:
            case LookupKind.KEY:
                return self._key_entries
            case LookupKind.RANGE:
                return self._range_entries
            case LookupKind.REMOTE:
                return self.remote_entries
            case _:
                return self._except_entries

    def candidates(
        self, row: Row, missing_columns: frozenset[str]
    ) -> Iterator[tuple[Hashable | None, Iterable[M]]]:
        """Yield the members to which the row itself leads, with what led there.

        None leads to members of whom only Postgres knows what the row means to them.
        """
        missing = missing_columns
        if self._without_key:
            yield None, self._without_key
        for sources, entries in self._key_entries.items():
            if not missing or all(missing.isdisjoint(source.columns) for source in sources):
                yield from _candidates_by_key(sources, entries, row)
        for lead, bounds in self._range_entries.items():
            source, op = lead
            if missing.isdisjoint(source.columns):
                value = _row_key(source, row)
                if isinstance(value, _UndecidedKey):
                    yield None, bounds.all()
                else:
                    yield lead, bounds.matching(op, value)
        for source, entries in self._except_entries.items():
            if missing.isdisjoint(source.columns):
                value = _row_key(source, row)
                if isinstance(value, _UndecidedKey):
                    yield None, entries.all()
                else:
                    yield source, entries.all_except(value)

    def entries_of_missing_columns(
        self, missing_columns: frozenset[str]
    ) -> Iterator[KeyEntries[M]]:
        """Yield the members to whom only columns lead that a row lacks."""
        for sources, entries in self._key_entries.items():
            if not all(missing_columns.isdisjoint(source.columns) for source in sources):
                yield entries
        for (source, _), bounds in self._range_entries.items():
            if not missing_columns.isdisjoint(source.columns):
                yield bounds
        for source, entries in self._except_entries.items():
            if not missing_columns.isdisjoint(source.columns):
                yield entries
        for remote, asked in self.remote_entries.items():
            if not missing_columns.isdisjoint(sql_values_of(remote).columns):
                yield asked.entries


class _UndecidedKey(Enum):
    """Stands for a value that only Postgres knows."""

    VALUE = auto()


def _member_key(path: IndexPath, member: Member) -> Hashable | None:
    """Return what the member is found by; ``_UNKNOWN_KEY`` if that can't be said of its values."""
    try:
        return path.caller_key(member.values)
    except Exception:  # noqa: BLE001 (whatever it is, the member is tried each time)
        return _UNKNOWN_KEY


def _row_key(reader: RowKeyReader, row: Row) -> SqliteValue | _UndecidedKey:
    try:
        (value,) = reader.read_keys(row)
    except Exception:  # noqa: BLE001 (whatever it is, members are tried each)
        return _UndecidedKey.VALUE
    return value


def _candidates_by_key(
    readers: tuple[RowKeyReader, ...], entries: KeyEntries[M], row: Row
) -> Iterator[tuple[Hashable | None, Iterable[M]]]:
    try:
        keys = _row_keys(readers, row)
    except Exception:  # noqa: BLE001 (likewise)
        yield None, entries.all()
        return
    for key in keys:
        members = entries.get(key)
        if members:
            yield readers, members


def _row_keys(readers: tuple[RowKeyReader, ...], row: Row) -> Iterable[Hashable]:
    if len(readers) == 1:
        return [value for value in readers[0].read_keys(row) if value is not None]
    values = tuple([source.read_keys(row)[0] for source in readers])
    return () if None in values else (values,)
