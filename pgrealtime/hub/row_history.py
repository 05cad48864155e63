"""What transactions in the changelog did to rows: by it a row that is read live is dated.

A table's changes are looked through when somebody asks, each once, so that nothing is kept for
tables whose rows never have to be dated.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from pgrealtime.changelog.base import Changelog, Entry, Gap, Mark
from pgrealtime.changes import Change, Insert, Oversized, TableName, Transaction, Truncate, Update
from pgrealtime.errors import ChangelogError
from pgrealtime.hub.event import Event
from pgrealtime.lsn import END, LSN, Cursor, Xid

_AT_ONCE = 4000
"""Changes that are looked through before others of the loop have their turn."""
_TRIM_SECONDS = 5.0
_UNKNOWN = "\0"
"""Stands for a value that isn't known; no text of Postgres has such a character."""

Reach: TypeAlias = Callable[[LSN], Awaitable[bool]]
"""Waits, for a bounded time, until the changelog has all that commits up to a position."""


class Write(NamedTuple):
    """A change of a row, or something that may have been one."""

    lsn: LSN
    """Where its transaction ends."""
    xid: Xid | None
    """None where that isn't known."""
    change: Change | None
    """None where changes are missing: any row may have been written, whatever the columns."""


class TableHistory:
    """The changes of one table in a stretch of the changelog, by what rows have in one column.

    Args:
        changelog: Where they are.
        table: Whose they are.
        column: By which they are found.
    """

    def __init__(self, changelog: Changelog, table: TableName, column: str) -> None:
        self._changelog = changelog
        self._table = table
        self._column = column
        self._since = self._upto = LSN(0)
        """All that ends after the one and up to the other was looked through."""
        self._writes: defaultdict[str, deque[Write]] = defaultdict(deque)
        self._order: deque[tuple[LSN, str]] = deque()
        self._of_any: deque[Write] = deque()
        """Those of rows that can't be told: truncated tables, missing changes."""
        self._turn = asyncio.Lock()

    def writes(self, value: str, after: LSN) -> list[Write]:
        """Return what was done after the end of a transaction to rows with a value, in order."""
        found = [write for write in self._writes.get(value, ()) if write.lsn > after]
        of_any = [write for write in self._of_any if write.lsn > after]
        return sorted([*found, *of_any], key=_lsn_of) if of_any else found

    async def extend(self, after: LSN) -> bool:
        """Look through all that ends after a position; return whether the changelog has it."""
        async with self._turn:
            try:
                self.trim()
                if not self._upto:
                    self._since = self._upto = after
                if after < self._since:
                    await self._extend_back(after)
                await self._extend_forward()
            except ChangelogError:
                return False
            return self._since <= after

    async def _extend_forward(self) -> None:
        while entries := self._read(self._upto, self._changelog.head):
            for write, values in self._found_in(entries):
                self._order.extend((write.lsn, value) for value in values)
                for value in values:
                    self._writes[value].append(write)
                if not values:
                    self._of_any.append(write)
            self._upto = entries[-1].end_lsn
            await asyncio.sleep(0)

    async def _extend_back(self, after: LSN) -> None:
        found: list[tuple[Write, Sequence[str]]] = []
        at = after
        while entries := self._read(at, Cursor(self._since, END)):
            found += self._found_in(entries)
            at = entries[-1].end_lsn
            await asyncio.sleep(0)
        for write, values in reversed(found):
            self._order.extendleft((write.lsn, value) for value in values)
            for value in values:
                self._writes[value].appendleft(write)
            if not values:
                self._of_any.appendleft(write)
        self._since = after

    def _read(self, after: LSN, upto: Cursor) -> Sequence[Entry]:
        return self._changelog.read(Cursor(after, END), upto, _AT_ONCE)

    def _found_in(self, entries: Sequence[Entry]) -> Iterator[tuple[Write, Sequence[str]]]:
        """Yield the writes, each with the values of the rows that it concerns; none is any."""
        for entry in entries:
            match entry:
                case Transaction(xid=xid, end_lsn=lsn, changes=changes):
                    for change in changes:
                        if change.table == self._table:
                            yield Write(lsn, xid, change), values_of(change, self._column)
                case Oversized(xid=xid, end_lsn=lsn, tables=tables):
                    if self._table in tables:
                        yield Write(lsn, xid, None), ()
                case Gap(end_lsn=lsn, tables=tables):
                    if tables is None or self._table in tables:
                        yield Write(lsn, None, None), ()
                case Mark():
                    pass

    def trim(self) -> None:
        """Forget what the changelog has let go of."""
        floor = self._changelog.floor.lsn
        while self._order and self._order[0][0] <= floor:
            _, value = self._order.popleft()
            writes = self._writes[value]
            writes.popleft()
            if not writes:
                del self._writes[value]
        while self._of_any and self._of_any[0].lsn <= floor:
            self._of_any.popleft()
        if self._upto:
            self._since, self._upto = max(self._since, floor), max(self._upto, floor)


def _lsn_of(write: Write) -> LSN:
    return write.lsn


def values_of(change: Change, column: str) -> Sequence[str]:
    """Return what the rows of a change have in a column, before and after; none if unknown."""
    match change:
        case Truncate():
            return ()
        case Insert(new=new):
            return (new.get(column) or "",)
        case Update(new=new, old=old):
            if column not in old.row:
                return ()
            after, before = new.get(column) or "", old.row[column] or ""
            return (after,) if after == before else (before, after)
        case _:
            return (change.old.row[column] or "",) if column in change.old.row else ()


class Sequels:
    """What a transaction did to other tables after it replaced a version of a row.

    Remembers that of the latest transaction asked about: a large one comes in many slices.
    """

    def __init__(self) -> None:
        self._changes: tuple[Change, ...] = ()
        self._ordinals: dict[tuple[TableName, str], dict[str, list[int]]] = {}

    def after_version(self, event: Event, table: TableName, column: str) -> Sequence[Change] | None:
        """Return the changes of another table's rows that point to the event's row by a column.

        Only those after the next change of the row itself: up to there they belong to the version
        that the event is about. None if that can't be told of all.
        """
        if len(event.changes) <= event.cursor.ordinal:
            return ()
        own = self._places(event, event.collection.table.name, event.collection.key.name)
        later = own.get(event.record_id, ())
        at = bisect_right(later, event.cursor.ordinal)
        if at == len(later):
            return ()
        places = self._places(event, table, column)
        if any(place > later[at] for place in places.get(_UNKNOWN, ())):
            return None
        found = places.get(event.record_id, ())
        return [event.changes[place - 1] for place in found if place > later[at]]

    def _places(self, event: Event, table: TableName, column: str) -> dict[str, list[int]]:
        if self._changes is not event.changes:
            self._changes, self._ordinals = event.changes, {}
        found = self._ordinals.get((table, column))
        if found is None:
            found = self._ordinals[table, column] = {}
            for ordinal, change in enumerate(event.changes, start=1):
                if change.table == table:
                    for value in values_of(change, column) or (_UNKNOWN,):
                        found.setdefault(value, []).append(ordinal)
        return found


class RowHistory:
    """The histories of tables whose rows had to be dated.

    Args:
        changelog: Where changes are.
        reach: Waits until it has what was committed by now; without one, it has what it has.
    """

    def __init__(self, changelog: Changelog, reach: Reach | None = None) -> None:
        self._changelog = changelog
        self._reach = reach
        self._tables: dict[tuple[TableName, str], TableHistory] = {}

    async def of(self, table: TableName, column: str, after: LSN) -> TableHistory | None:
        """Return a table's changes from the end of a transaction on, as far as they came.

        Args:
            table: Whose changes.
            column: What rows are told apart by.
            after: The end of the transaction.

        Returns:
            None if the changelog doesn't reach back so far.
        """
        key = table, column
        if key not in self._tables:
            self._tables[key] = TableHistory(self._changelog, table, column)
        history = self._tables[key]
        return history if await history.extend(after) else None

    async def reaches(self, lsn: LSN) -> bool:
        """Return whether the changelog has all that commits up to there, perhaps after a while."""
        if self._changelog.head.lsn >= lsn:
            return True
        return self._reach is not None and await self._reach(lsn)

    def clear(self) -> None:
        """Forget everything: another history has begun, or other tables are meant."""
        self._tables.clear()

    async def watch(self) -> None:
        """Forget what the changelog has let go of, for ever."""
        while True:
            await asyncio.sleep(_TRIM_SECONDS)
            for history in self._tables.values():
                history.trim()
