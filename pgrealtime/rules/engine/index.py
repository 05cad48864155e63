"""Finds the members that a row may concern: an index over specializations and callers' values.

The matcher keeps one per collection and searches it with ``RowEvaluation``. A member is a group of
subscriptions with the same ``BoundPredicate``. The index has one writer and no lock: both run in
the event loop, and a search is done before the loop runs anything else.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from pgrealtime.changes import Row
from pgrealtime.rules.engine.formula import Formula
from pgrealtime.rules.engine.index_keys import RemoteKey, RowKeyReader
from pgrealtime.rules.engine.index_paths import IndexPath, LookupKind
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import SqliteValue


class Member(Hashable, Protocol):
    """What an index keeps; compared by identity."""

    @property
    def specialization(self) -> Specialization:
        """What a row must satisfy."""
        ...

    @property
    def values(self) -> tuple[Scalar, ...]:
        """The caller's values for it."""
        ...


M = TypeVar("M", bound=Member)


_NO_KEY = object()
_UNKNOWN_KEY = object()


class KeyEntries(Generic[M]):
    """Members by key. A single one is stored as it is, which saves a dictionary for most keys."""

    __slots__ = ("_by_key",)

    def __init__(self) -> None:
        self._by_key: dict[Hashable, M | dict[M, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._by_key)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._by_key)

    def add(self, key: Hashable, member: M) -> bool:
        """Add a member under a key; return whether the key is new."""
        entry = self._by_key.get(key)
        if entry is None:
            self._by_key[key] = member
        elif isinstance(entry, dict):
            entry[member] = None
        elif entry is not member:
            self._by_key[key] = {entry: None, member: None}
        return entry is None

    def remove(self, key: Hashable, member: M) -> bool:
        """Remove a member; return whether its key is gone."""
        entry = self._by_key.get(key)
        if isinstance(entry, dict):
            entry.pop(member, None)
            if len(entry) == 1:
                (self._by_key[key],) = entry
            return False
        if entry is member:
            del self._by_key[key]
            return True
        return False

    def get(self, key: Hashable) -> Iterable[M]:
        """Return the members under a key."""
        entry = self._by_key.get(key)
        if entry is None:
            return ()
        return entry if isinstance(entry, dict) else (entry,)

    def all(self) -> Iterator[M]:
        """Yield all members."""
        return self.all_except(_NO_KEY)

    def all_except(self, key: Hashable | None) -> Iterator[M]:
        """Yield all members except those under a key."""
        for entry_key, entry in self._by_key.items():
            if entry_key != key:
                if isinstance(entry, dict):
                    yield from entry
                else:
                    yield entry


class RangeEntries(KeyEntries[M]):
    """Members by bound, found by order. The bounds are all texts or all numbers."""

    __slots__ = ("_sorted_bounds",)

    def __init__(self) -> None:
        super().__init__()
        self._sorted_bounds: list[Any] | None = None
        """None until the first search, so that many bounds added at once are sorted once."""

    def add(self, key: Hashable, member: M) -> bool:
        """Add a member under its bound; return whether the bound is new."""
        is_first = super().add(key, member)
        if is_first and self._sorted_bounds is not None:
            insort(self._sorted_bounds, key)
        return is_first

    def remove(self, key: Hashable, member: M) -> bool:
        """Remove a member; return whether its bound is gone."""
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
    if value != value:  # noqa: PLR0124 (NaN: PostgreSQL sorts it above every number)
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


class RemoteEntries(KeyEntries[M]):
    """Members under keys that PostgreSQL names for a row."""

    __slots__ = ("guard_counts",)

    def __init__(self) -> None:
        super().__init__()
        self.guard_counts: Counter[tuple[Formula, ...]] = Counter()
        """The members' guards, counted: PostgreSQL isn't asked about a row that satisfies none."""


_Guards: TypeAlias = tuple[Formula, ...]
_ENTRIES_CLASSES: dict[LookupKind, type[KeyEntries[Any]]] = {
    LookupKind.REMOTE: RemoteEntries,
    LookupKind.RANGE: RangeEntries,
}


class PredicateIndex(Generic[M]):
    """Members by the index paths of their specializations.

    Attributes:
        unindexed: Members without a key, by their guards and whether these alone decide.
        remote_entries: Members under keys that PostgreSQL names.
    """

    def __init__(self) -> None:
        self._key_entries: dict[tuple[RowKeyReader, ...], KeyEntries[M]] = {}
        self._range_entries: dict[tuple[RowKeyReader, Op], RangeEntries[M]] = {}
        self._except_entries: dict[RowKeyReader, KeyEntries[M]] = {}
        self._without_key: dict[M, None] = {}
        """Members whose values make no key, such as a date 'infinity': every row tests them."""
        self.unindexed: dict[tuple[_Guards, bool], dict[M, None]] = {}
        self.remote_entries: dict[RemoteKey, RemoteEntries[M]] = {}
        self._entries_of_kind: dict[LookupKind, dict[Any, Any]] = {
            LookupKind.KEY: self._key_entries,
            LookupKind.RANGE: self._range_entries,
            LookupKind.EXCEPT: self._except_entries,
            LookupKind.REMOTE: self.remote_entries,
        }

    def __bool__(self) -> bool:
        return any((*self._entries_of_kind.values(), self._without_key, self.unindexed))

    def add(self, member: M) -> None:
        """Add a member under all its paths."""
        for path in member.specialization.paths:
            key = _member_key(path, member)
            if path.kind is LookupKind.ALL:
                self.unindexed.setdefault((path.guards, path.is_exact), {})[member] = None
            elif key is _UNKNOWN_KEY:
                self._without_key[member] = None
            elif key is not None or path.kind is LookupKind.EXCEPT:  # NULL equals no row's key
                entries = self._entries_for(path)
                entries.add(key, member)
                if isinstance(entries, RemoteEntries):
                    entries.guard_counts[path.guards] += 1

    def remove(self, member: M) -> None:
        """Remove a member, and the entries that it leaves empty."""
        for path in member.specialization.paths:
            key = _member_key(path, member)
            if path.kind is LookupKind.ALL:
                members = self.unindexed.get((path.guards, path.is_exact), {})
                members.pop(member, None)
                if not members:  # maybe gone already: two paths may have the same guards
                    self.unindexed.pop((path.guards, path.is_exact), None)
            elif key is _UNKNOWN_KEY:
                self._without_key.pop(member, None)
            elif key is not None or path.kind is LookupKind.EXCEPT:
                self._remove_entry(path, key, member)

    def _remove_entry(self, path: IndexPath, key: Hashable, member: M) -> None:
        entries = self._entries_for(path)
        entries.remove(key, member)
        if isinstance(entries, RemoteEntries):
            entries.guard_counts[path.guards] -= 1
            if not entries.guard_counts[path.guards]:
                del entries.guard_counts[path.guards]
        if not entries:
            self._entries_of_kind[path.kind].pop(path.entries_key, None)

    def _entries_for(self, path: IndexPath) -> KeyEntries[M]:
        """Return the entries of a path, which are made if there are none."""
        of_kind, entries_key = self._entries_of_kind[path.kind], path.entries_key
        entries: KeyEntries[M] | None = of_kind.get(entries_key)
        if entries is None:
            entries = of_kind[entries_key] = _ENTRIES_CLASSES.get(path.kind, KeyEntries)()
        return entries

    def candidates(
        self, row: Row, missing_columns: frozenset[str]
    ) -> Iterator[tuple[Hashable | None, Iterable[M]]]:
        """Yield the members that a row's own keys find, with the key of the index entries.

        The key is None for members that must be tested as a whole, since the row's keys could not
        be read in the process.
        """
        missing = missing_columns
        if self._without_key:
            yield None, self._without_key
        for readers, entries in self._key_entries.items():
            if not missing or all(missing.isdisjoint(reader.columns) for reader in readers):
                yield from _candidates_by_key(readers, entries, row)
        for (reader, op), bounds in self._range_entries.items():
            if missing.isdisjoint(reader.columns):
                keys = _read_keys(reader, row)
                if keys is None:
                    yield None, bounds.all()
                else:
                    yield (reader, op), bounds.matching(op, keys[0])
        for reader, entries in self._except_entries.items():
            if missing.isdisjoint(reader.columns):
                keys = _read_keys(reader, row)
                if keys is None:
                    yield None, entries.all()
                else:
                    yield reader, entries.all_except(keys[0])

    def entries_of_missing_columns(
        self, missing_columns: frozenset[str]
    ) -> Iterator[KeyEntries[M]]:
        """Yield the entries that can't be searched for a row which lacks these columns."""
        for readers, entries in self._key_entries.items():
            if not all(missing_columns.isdisjoint(reader.columns) for reader in readers):
                yield entries
        columns_read = (
            *((reader.columns, bounds) for (reader, _), bounds in self._range_entries.items()),
            *((reader.columns, entries) for reader, entries in self._except_entries.items()),
            *((key.sql_values.column_names, remote) for key, remote in self.remote_entries.items()),
        )
        for column_names, entries in columns_read:
            if not missing_columns.isdisjoint(column_names):
                yield entries


def _member_key(path: IndexPath, member: Member) -> Hashable | None:
    """Return the key a member is found by; ``_UNKNOWN_KEY`` if its values make none."""
    try:
        return path.caller_key(member.values)
    except Exception:  # noqa: BLE001 (whatever it is, every row tests the member)
        return _UNKNOWN_KEY


def _read_keys(reader: RowKeyReader, row: Row) -> Sequence[SqliteValue] | None:
    """Return the row's keys; None if only PostgreSQL can compute them."""
    try:
        return reader.read_keys(row)
    except Exception:  # noqa: BLE001 (whatever it is, all members are tested)
        return None


def _candidates_by_key(
    readers: tuple[RowKeyReader, ...], entries: KeyEntries[M], row: Row
) -> Iterator[tuple[Hashable | None, Iterable[M]]]:
    try:
        keys = _row_keys(readers, row)
    except Exception:  # noqa: BLE001 (as in _read_keys)
        yield None, entries.all()
        return
    for key in keys:
        members = entries.get(key)
        if members:
            yield readers, members


def _row_keys(readers: tuple[RowKeyReader, ...], row: Row) -> Iterable[Hashable]:
    if len(readers) == 1:
        return [key for key in readers[0].read_keys(row) if key is not None]
    composite = tuple([reader.read_keys(row)[0] for reader in readers])
    # NULL equals no caller's value, and then the conjunction is not true.
    return () if None in composite else (composite,)
