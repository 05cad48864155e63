"""Fills in what the WAL left out of rows, where the table shows what it was at that change.

An unchanged TOASTed value, or a generated column that the decoder doesn't send, is in the table
alone, and there perhaps as a later transaction left it, which not everybody may see. A column of a
live row is what it was at a change if no later change of the row brings that column, of all that
the live row's snapshot sees. Writers of a row wait for one another, so its versions follow each
other in the order of the stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from pgrealtime.changes import TableName, Update
from pgrealtime.collections.model import Collection
from pgrealtime.hub.events.event import Event, Versions
from pgrealtime.hub.live_reads.row_history import RowHistory, TableHistory, Write
from pgrealtime.lsn import LSN
from pgrealtime.rule_queries.executor import LiveRow
from pgrealtime.turns import Turn


class Rows(Protocol):
    """What this needs of ``hub.probe``."""

    async def live_rows(
        self, events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return what the tables hold now of columns that the events' rows lack.

        Every snapshot sees the events' transactions.

        Returns:
            The rows by collection name and id, and the collections whose rows couldn't be read.
        """
        ...


class Completed(NamedTuple):
    """What became of rows.

    Attributes:
        unread: The names of collections whose rows couldn't be read.
        gone: By collection, columns that the table doesn't have any more.
    """

    unread: frozenset[str]
    gone: Mapping[str, frozenset[str]]

    def is_whole(self, event: Event) -> bool:
        """Whether the event's row lacks nothing that its table has."""
        return not event.missing - self.gone.get(event.collection.name, _NONE)


_NONE: frozenset[str] = frozenset()


class _Kept(NamedTuple):
    """An event whose row may be completed."""

    event: Event
    columns: frozenset[str]
    """Those of the live row that its own transaction left alone after it."""


class _Version:
    """A live row that a later transaction wrote, or a subtransaction, and what it may complete."""

    __slots__ = ("collection", "events", "found", "record_id")

    def __init__(self, event: Event, found: LiveRow) -> None:
        self.collection = event.collection
        self.record_id = event.record_id
        self.found = found
        self.events: list[_Kept] = []
        """In the order of the stream."""

    @property
    def first(self) -> LSN:
        """Where the transaction of the first event ends."""
        return self.events[0].event.cursor.lsn


class Completion:
    """Completes rows.

    Args:
        rows: Reads live rows.
        history: Knows what was done to them later.
    """

    def __init__(self, rows: Rows, history: RowHistory) -> None:
        self._rows = rows
        self._history = history
        self._versions = Versions()

    async def complete(self, events: Sequence[Event]) -> Completed:
        """Fill in the columns that can be proved; the others stay missing."""
        live, unread = await self._rows.live_rows(events)
        undated: dict[tuple[str, str], _Version] = {}
        gone: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
        for event in events:
            record = event.collection.name, event.record_id
            found = live.get(record)
            if found is None:
                continue
            gone[event.collection.name] |= event.missing.difference(found.row)
            columns = event.missing.intersection(found.row) - self._versions.written_after(event)
            if found.xid == event.xid:
                _fill(event, found, columns)
            elif columns:
                version = undated.setdefault(record, _Version(event, found))
                version.events.append(_Kept(event, columns))
        if undated:
            await self._date(undated.values())
        return Completed(unread, gone)

    async def _date(self, undated: Iterable[_Version]) -> None:
        """Fill in rows that a later transaction wrote again, or a subtransaction."""
        histories = await self._histories(undated)
        waiting: list[_Version] = []
        turn = Turn()
        for version in undated:
            history, found = histories.get(version.collection.table.name), version.found
            writes = [] if history is None else history.writes(version.record_id, version.first)
            at = max((write.lsn for write in writes if write.xid == found.xid), default=LSN(0))
            dated = [kept for kept in version.events if kept.event.cursor.lsn < at]
            await _fill_all(dated, found, [write for write in writes if write.lsn <= at], turn)
            version.events = version.events[len(dated) :]
            if version.events:
                waiting.append(version)
        # The id may be a subtransaction's, or that of a commit that has yet to come. By the time
        # that the stream has passed what the snapshots saw, all that they saw is known.
        if waiting and await self._history.reaches(max(one.found.reach for one in waiting)):
            histories = await self._histories(waiting)
            for version in waiting:
                history = histories.get(version.collection.table.name)
                if history is not None:
                    await _fill_all(version.events, version.found, _seen(history, version), turn)

    async def _histories(self, versions: Iterable[_Version]) -> Mapping[TableName, TableHistory]:
        first: dict[TableName, tuple[Collection, LSN]] = {}
        for version in versions:
            collection, lsn = version.collection, version.first
            _, known = first.get(collection.table.name, (collection, lsn))
            first[collection.table.name] = collection, min(lsn, known)
        histories: dict[TableName, TableHistory] = {}
        for table, (collection, after) in first.items():
            history = await self._history.of(table, collection.key.name, after)
            if history is not None:
                histories[table] = history
        return histories


async def _fill_all(
    events: Sequence[_Kept], found: LiveRow, later: Sequence[Write], turn: Turn
) -> None:
    """Fill in what no later transaction brought since each event, of one row all together.

    From the last event back: so each write is looked at once, however many events there are. In
    turns with the loop's other users, for of a row that is written again and again there are many.
    """
    rest = list(later)
    open_ = frozenset[str]().union(*(kept.columns for kept in events))
    for event, columns in reversed(events):
        while open_ and rest and rest[-1].lsn > event.cursor.lsn:
            open_ -= brought(rest.pop(), event.collection, open_)
            if turn.is_over():
                await turn.pause()
        _fill(event, found, columns & open_)


def _fill(event: Event, found: LiveRow, columns: frozenset[str]) -> None:
    if columns:
        kept = {name: text for name, text in found.row.items() if name in columns}
        event.row = {**kept, **event.row}


def _seen(history: TableHistory, version: _Version) -> list[Write]:
    """Return what was done to the row later, as far as the live row shows it."""
    return [
        write
        for write in history.writes(version.record_id, version.first)
        if write.xid is None or version.found.snapshot.sees(write.xid)
    ]


def brought(write: Write, collection: Collection, columns: frozenset[str]) -> frozenset[str]:
    """Return which of some columns a change may have given another value."""
    match write.change:
        case Update(new=new, old=old) if old.row.get(collection.key.name) == new.get(
            collection.key.name
        ):
            return columns.intersection(new) | columns.intersection(collection.generated_columns)
        case _:
            return columns  # another row came, or went, or nobody knows
