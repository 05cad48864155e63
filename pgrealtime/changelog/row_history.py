"""Which changes in the changelog affected a given row after a given transaction.

A row read from the table now may be newer than the event it is read for. ``hub.evaluation``
(columns that the WAL left out), ``hub.state.callers`` (callers' rows) and
``expand.link_history`` (links in junction tables) look up here which changes the row had since, and
use of the live row only what no later change can have altered.

A table is indexed at the first look-up in it, each changelog entry once, so a table without
look-ups costs nothing.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple, TypeAlias

from pgrealtime.changelog.memory import Changelog, Entry, Gap, Watermark
from pgrealtime.changes import (
    Change,
    Insert,
    OversizedTransaction,
    TableName,
    Transaction,
    Truncate,
    Update,
)
from pgrealtime.errors import ChangelogError
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid

_CHANGES_PER_READ = 4000
"""Changes (not entries) indexed before yielding to the event loop. A single transaction that is
larger than this is still read whole."""
_TRIM_SECONDS = 5.0
"""Between two rounds of ``RowHistory.trim_periodically``."""

WaitForLSN: TypeAlias = Callable[[LSN], Awaitable[bool]]
"""``ReplicationReader.wait_for_changelog``: waits until the changelog has every transaction that
commits up to an LSN; returns False if it doesn't have them within a second."""

LookupColumn: TypeAlias = tuple[TableName, str]
"""A table, and the column by whose value its changes are looked up."""


class RowWrite(NamedTuple):
    """A change of a row, or an entry that may hide one (a truncation, missing changes)."""

    end_lsn: LSN
    xid: Xid | None
    """The 32-bit id of its top-level transaction; None for a gap, which may hide several.

    Callers compare it with the ``xmin`` of the live row, to find which transaction wrote that
    version, and with a snapshot, to find whether the live row shows this write at all."""
    change: Change | None
    """None where the changes themselves are missing (a gap, an oversized transaction): any row of
    the table, and any of its columns, may have been written."""


class TableHistory:
    """An index of one table's changes in the changelog, by the value of one column.

    The column is the table's key, or in a junction table the column that refers to the record.
    """

    def __init__(self, changelog: Changelog, table: TableName, column: str) -> None:
        self._changelog = changelog
        self._table = table
        self._column = column
        self._indexed_after = self._indexed_upto = LSN(0)
        """The indexed range: entries that end after the one LSN and up to the other. Both are 0
        until the first ``extend``."""
        self._writes: defaultdict[str, deque[RowWrite]] = defaultdict(deque)
        """By value of the column, oldest first."""
        self._write_order: deque[tuple[LSN, str]] = deque()
        """One entry for each in ``_writes``, oldest first: which values ``trim`` must visit."""
        self._unknown_row_writes: deque[RowWrite] = deque()
        """Writes that may concern any row, oldest first: truncations, missing changes, old images
        without the column."""
        self._extend_lock = asyncio.Lock()
        """Held by ``extend``, which yields between reading entries and advancing the indexed range:
        two at once would index the same entries twice. ``trim`` and ``writes`` don't await, so each
        sees and leaves the fields consistent and needs no lock."""

    def writes(self, value: str, after: LSN) -> list[RowWrite]:
        """Return the writes that may concern a row and are later than ``after``, oldest first.

        Call it after ``extend(after)`` returned True. What the changelog has discarded since then
        is discarded here as well, and is represented by one write of an unknown row: the caller may
        have awaited in between, and must not take a shortened list for a complete one.
        """
        writes = _writes_after(self._writes.get(value, ()), after)
        of_any = _writes_after(self._unknown_row_writes, after)
        if after < self._indexed_after:
            of_any.insert(0, RowWrite(self._indexed_after, None, None))
        if not of_any:
            return writes
        return sorted([*writes, *of_any], key=lambda write: write.end_lsn)

    def has_writes(self, after: LSN) -> bool:
        """Whether a write may end after an LSN: ``writes`` isn't empty for every value.

        Call it as ``writes``.
        """
        last = self._write_order[-1][0] if self._write_order else self._indexed_after
        of_any = (
            self._unknown_row_writes[-1].end_lsn
            if self._unknown_row_writes
            else self._indexed_after
        )
        return max(last, of_any) > after

    async def extend(self, after: LSN) -> bool:
        """Index all entries that end after an LSN, up to the end; False if some were discarded."""
        async with self._extend_lock:
            try:
                self.trim()
                if not self._indexed_upto:
                    self._indexed_after = self._indexed_upto = after
                if after < self._indexed_after:
                    await self._extend_back(after)
                await self._extend_forward()
            except ChangelogError:
                return False
            return self._indexed_after <= after

    async def _extend_forward(self) -> None:
        while entries := self._read(self._indexed_upto, self._changelog.end_cursor):
            for write, values in self._writes_in(entries):
                self._write_order.extend((write.end_lsn, value) for value in values)
                for value in values:
                    self._writes[value].append(write)
                if not values:
                    self._unknown_row_writes.append(write)
            self._indexed_upto = entries[-1].end_lsn
            await asyncio.sleep(0)

    async def _extend_back(self, after: LSN) -> None:
        """Index what ends after ``after``, up to the indexed range."""
        # Stored only when all of it was read: ``ChangelogError`` leaves the index as it was.
        earlier: list[tuple[RowWrite, Sequence[str]]] = []
        position = after
        while entries := self._read(position, Cursor(self._indexed_after, END_ORDINAL)):
            earlier += self._writes_in(entries)
            position = entries[-1].end_lsn
            await asyncio.sleep(0)
        for write, values in reversed(earlier):
            self._write_order.extendleft((write.end_lsn, value) for value in values)
            for value in values:
                self._writes[value].appendleft(write)
            if not values:
                self._unknown_row_writes.appendleft(write)
        self._indexed_after = after

    def _read(self, after: LSN, upto: Cursor) -> Sequence[Entry]:
        return self._changelog.read(Cursor(after, END_ORDINAL), upto, _CHANGES_PER_READ)

    def _writes_in(self, entries: Sequence[Entry]) -> Iterator[tuple[RowWrite, Sequence[str]]]:
        """Yield the table's writes with the values of the column; without, any row may be meant."""
        for entry in entries:
            match entry:
                case Transaction(xid=xid, end_lsn=lsn, changes=changes):
                    for change in changes:
                        if change.table == self._table:
                            yield RowWrite(lsn, xid, change), column_values(change, self._column)
                case OversizedTransaction(xid=xid, end_lsn=lsn, tables=tables):
                    if self._table in tables:
                        yield RowWrite(lsn, xid, None), ()
                case Gap(end_lsn=lsn, tables=tables):
                    if tables is None or self._table in tables:
                        yield RowWrite(lsn, None, None), ()
                case Watermark():
                    pass

    def trim(self) -> None:
        """Discard the writes of entries that the changelog has discarded."""
        floor = self._changelog.floor.lsn
        while self._write_order and self._write_order[0][0] <= floor:
            _, value = self._write_order.popleft()
            writes = self._writes[value]
            writes.popleft()
            if not writes:
                del self._writes[value]
        while self._unknown_row_writes and self._unknown_row_writes[0].end_lsn <= floor:
            self._unknown_row_writes.popleft()
        if self._indexed_upto:
            self._indexed_after = max(self._indexed_after, floor)
            self._indexed_upto = max(self._indexed_upto, floor)


def _writes_after(writes: Sequence[RowWrite], after: LSN) -> list[RowWrite]:
    """Return the writes after an LSN. Searched from the end: most often they are few of many."""
    return [*takewhile(lambda write: write.end_lsn > after, reversed(writes))][::-1]


def column_values(change: Change, column: str) -> Sequence[str]:
    """Return the values of a column in the row that a change wrote, before and after it.

    One value where both are the same; "" for NULL. Empty if the row isn't known: a truncation,
    or an old image without the column.
    """
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


CACHED_CHANGES = 200_000
"""Bounds each index of the changes of transactions, the latest transaction not counted. A large
one is evaluated in many slices, and connections that catch up read different ones by turns."""


class RowHistory:
    """A ``TableHistory`` for each table and column in which rows are looked up.

    ``wait_for_lsn`` waits for the changelog to contain an LSN. Without it nothing is waited for.
    """

    def __init__(self, changelog: Changelog, wait_for_lsn: WaitForLSN | None = None) -> None:
        self._changelog = changelog
        self._wait_for_lsn = wait_for_lsn
        self._tables: dict[LookupColumn, TableHistory] = {}
        self._streamed_since: dict[TableName, LSN] = {}
        """By table that the stream carries, the LSN from which the changelog has its changes."""

    def set_streamed_tables(self, tables: Iterable[TableName]) -> None:
        """Record which tables the stream carries from now on, and discard all indexes.

        Called when a generation comes into force: its tables and key columns may be others.
        """
        before, now = self._streamed_since, self._changelog.end_cursor.lsn
        # The first tables are streamed since the changelog began.
        new = now if before else LSN(0)
        self._streamed_since = {table: before.get(table, new) for table in tables}
        self._tables.clear()

    async def table_history(self, table: TableName, column: str, after: LSN) -> TableHistory | None:
        """Return a table's changes since the transaction that ends at ``after``, up to the head.

        Earlier changes may be absent. None if the changelog has discarded some of these, or the
        stream didn't carry the table yet: nothing read live can be proved to be as old as the
        transaction.
        """
        since = self._streamed_since.get(table) if self._streamed_since else LSN(0)
        if since is None or after < since:
            return None
        key = table, column
        if key not in self._tables:
            self._tables[key] = TableHistory(self._changelog, table, column)
        history = self._tables[key]
        return history if await history.extend(after) else None

    def may_be_written(self, lookup_column: LookupColumn, value: str, after: LSN) -> bool:
        """Whether a row may have been written in commits that end after an LSN.

        Call it after ``table_history`` returned one for the column and that LSN.
        """
        history = self._tables.get(lookup_column)
        return history is None or bool(history.writes(value, after))

    async def wait_for_lsn(self, lsn: LSN) -> bool:
        """Return whether the changelog has every transaction that commits up to an LSN.

        Callers pass where the WAL ended when they read the live rows: after True, the histories
        have every change that those rows can show. After False changes may still be to come, and
        what was read is unproved.
        """
        if self._changelog.end_cursor.lsn >= lsn:
            return True
        return self._wait_for_lsn is not None and await self._wait_for_lsn(lsn)

    def clear(self) -> None:
        """Discard all indexes.

        Called when the changelog was restarted: its LSNs may be used again for other changes.
        """
        self._tables.clear()
        self._streamed_since = dict.fromkeys(self._streamed_since, LSN(0))

    async def trim_periodically(self) -> None:
        """Discard every few seconds what the changelog has discarded; runs until cancelled.

        Without it an index that is no longer used would keep its changes in memory.
        """
        while True:
            await asyncio.sleep(_TRIM_SECONDS)
            for history in self._tables.values():
                history.trim()
