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
from typing import NamedTuple, Protocol, TypeAlias

from pgrealtime.changes import TableName, Update
from pgrealtime.collections import Collection
from pgrealtime.hub.event import Event, Versions
from pgrealtime.hub.probe import LiveRow
from pgrealtime.hub.row_history import RowHistory, TableHistory, Write
from pgrealtime.lsn import LSN


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

_Found: TypeAlias = tuple[Event, LiveRow]


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
        undated: list[_Found] = []
        gone: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
        for event in events:
            found = live.get((event.collection.name, event.record_id))
            if found is None:
                continue
            gone[event.collection.name] |= event.missing.difference(found.row)
            if found.xid == event.xid:
                self._fill(event, found, ())
            else:
                undated.append((event, found))
        if undated:
            await self._date(undated)
        return Completed(unread, gone)

    async def _date(self, undated: Sequence[_Found]) -> None:
        """Fill in rows that a later transaction wrote again, or a subtransaction."""
        histories = await self._histories(undated)
        waiting: list[_Found] = []
        for event, found in undated:
            history = histories.get(event.collection.table.name)
            later = [] if history is None else history.writes(event.record_id, event.cursor.lsn)
            at = max((write.lsn for write in later if write.xid == found.xid), default=None)
            if at is not None:
                self._fill(event, found, [write for write in later if write.lsn <= at])
            else:
                waiting.append((event, found))
        # The id may be a subtransaction's, or that of a commit that has yet to come. By the time
        # that the stream has passed what the snapshots saw, all that they saw is known.
        if waiting and await self._history.reaches(max(found.reach for _, found in waiting)):
            histories = await self._histories(waiting)
            for event, found in waiting:
                history = histories.get(event.collection.table.name)
                if history is not None:
                    self._fill(event, found, _seen(history, event, found))

    async def _histories(self, found: Iterable[_Found]) -> Mapping[TableName, TableHistory]:
        first: dict[TableName, tuple[Collection, LSN]] = {}
        for event, _ in found:
            collection, lsn = event.collection, event.cursor.lsn
            _, known = first.get(collection.table.name, (collection, lsn))
            first[collection.table.name] = collection, min(lsn, known)
        histories: dict[TableName, TableHistory] = {}
        for table, (collection, after) in first.items():
            history = await self._history.of(table, collection.key.name, after)
            if history is not None:
                histories[table] = history
        return histories

    def _fill(self, event: Event, found: LiveRow, later: Sequence[Write]) -> None:
        """Fill in what neither the event's own transaction nor later ones brought since."""
        proved = event.missing.intersection(found.row) - self._versions.written_after(event)
        for write in later:
            proved -= brought(write, event.collection, proved)
        if proved:
            kept = {name: text for name, text in found.row.items() if name in proved}
            event.row = {**kept, **event.row}


def _seen(history: TableHistory, event: Event, found: LiveRow) -> list[Write]:
    """Return what was done to the event's row later, as far as the live row shows it."""
    return [
        write
        for write in history.writes(event.record_id, event.cursor.lsn)
        if write.xid is None or found.snapshot.sees(write.xid)
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
