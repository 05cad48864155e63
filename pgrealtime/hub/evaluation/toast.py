"""Fills in what the WAL left out of rows, where the table shows what it was at that change.

An unchanged TOASTed value, or a generated column that the decoder doesn't send, is in the table
alone, and there perhaps as a later transaction left it, which not everybody may see. A column of a
live row is what it was at a change if no later change of the row brings that column, of all that
the live row's snapshot sees. Writers of a row wait for one another, so its versions follow each
other in the order of the stream.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from pgrealtime.caches import WeightedCache
from pgrealtime.changelog.row_history import RowHistory, RowWrite, TableHistory
from pgrealtime.changes import (
    Change,
    Insert,
    TableName,
    Update,
)
from pgrealtime.collections.model import Collection
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN
from pgrealtime.rule_queries.live_rows import LiveRow


class LiveRowQueries(Protocol):
    """What this needs of ``hub.probe``."""

    async def fetch_live_rows(
        self, events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return what the tables hold now of columns that the events' rows lack.

        Every snapshot sees the events' transactions.

        Returns:
            The rows by collection name and id, and the collections whose rows couldn't be read.
        """
        ...


class CompletionResult(NamedTuple):
    """What became of rows.

    Attributes:
        unreadable_collections: The names of collections whose rows couldn't be read.
        dropped_columns: By collection, columns that the table doesn't have any more.
    """

    unreadable_collections: frozenset[str]
    dropped_columns: Mapping[str, frozenset[str]]

    def is_row_complete(self, event: Event) -> bool:
        """Whether the event's row lacks nothing that its table has."""
        return not event.missing_columns - self.dropped_columns.get(
            event.collection.name, _NO_COLUMNS
        )


_NO_COLUMNS: frozenset[str] = frozenset()
_CACHED_CHANGES = 200_000
"""Changes of the transactions whose last writes are kept; the latest transaction counts nothing."""


class _CompletableEvent(NamedTuple):
    """An event whose row may be completed."""

    event: Event
    provable_columns: frozenset[str]
    """Those of the live row that its own transaction left alone after it."""


class _UndatedLiveRow:
    """A live row that a later transaction wrote, or a subtransaction, and what it may complete."""

    __slots__ = ("collection", "events", "live_row", "record_id")

    def __init__(self, event: Event, live_row: LiveRow) -> None:
        self.collection = event.collection
        self.record_id = event.record_id
        self.live_row = live_row
        self.events: list[_CompletableEvent] = []
        """In the order of the stream."""

    @property
    def first_commit_lsn(self) -> LSN:
        """Where the transaction of the first event ends."""
        return self.events[0].event.cursor.lsn


class RowCompleter:
    """Completes rows.

    Args:
        queries: Reads live rows.
        row_history: Knows what was done to them later.
    """

    def __init__(self, queries: LiveRowQueries, row_history: RowHistory) -> None:
        self._queries = queries
        self._row_history = row_history
        self._later_writes = LaterWrites()

    async def complete(self, events: Sequence[Event]) -> CompletionResult:
        """Fill in the columns that can be proved; the others stay missing."""
        live, unread = await self._queries.fetch_live_rows(events)
        undated: dict[tuple[str, str], _UndatedLiveRow] = {}
        gone: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
        for event in events:
            record = event.collection.name, event.record_id
            found = live.get(record)
            if found is None:
                continue
            gone[event.collection.name] |= event.missing_columns.difference(found.row)
            columns = event.missing_columns.intersection(
                found.row
            ) - self._later_writes.columns_written_later(event)
            if found.xid == event.xid:
                _fill_columns(event, found, columns)
            elif columns:
                version = undated.setdefault(record, _UndatedLiveRow(event, found))
                version.events.append(_CompletableEvent(event, columns))
        if undated:
            await self._complete_undated(undated.values())
        return CompletionResult(unread, gone)

    async def _complete_undated(self, undated_rows: Iterable[_UndatedLiveRow]) -> None:
        """Fill in rows that a later transaction wrote again, or a subtransaction."""
        histories = await self._table_histories(undated_rows)
        waiting: list[_UndatedLiveRow] = []
        turn = YieldTimer()
        for version in undated_rows:
            history, found = histories.get(version.collection.table.name), version.live_row
            writes = (
                []
                if history is None
                else history.writes(version.record_id, version.first_commit_lsn)
            )
            at = max((write.end_lsn for write in writes if write.xid == found.xid), default=LSN(0))
            dated = [kept for kept in version.events if kept.event.cursor.lsn < at]
            await _fill_unwritten_columns(
                dated, found, [write for write in writes if write.end_lsn <= at], turn
            )
            version.events = version.events[len(dated) :]
            if version.events:
                waiting.append(version)
        # The id may be a subtransaction's, or that of a commit that has yet to come. By the time
        # that the stream has passed what the snapshots saw, all that they saw is known.
        if waiting and await self._row_history.wait_for_lsn(
            max(one.live_row.insert_lsn for one in waiting)
        ):
            histories = await self._table_histories(waiting)
            for version in waiting:
                history = histories.get(version.collection.table.name)
                if history is not None:
                    await _fill_unwritten_columns(
                        version.events, version.live_row, _visible_writes(history, version), turn
                    )

    async def _table_histories(
        self, undated_rows: Iterable[_UndatedLiveRow]
    ) -> Mapping[TableName, TableHistory]:
        first: dict[TableName, tuple[Collection, LSN]] = {}
        for version in undated_rows:
            collection, lsn = version.collection, version.first_commit_lsn
            _, known = first.get(collection.table.name, (collection, lsn))
            first[collection.table.name] = collection, min(lsn, known)
        histories: dict[TableName, TableHistory] = {}
        for table, (collection, after) in first.items():
            history = await self._row_history.table_history(table, collection.key.name, after)
            if history is not None:
                histories[table] = history
        return histories


async def _fill_unwritten_columns(
    events: Sequence[_CompletableEvent],
    live_row: LiveRow,
    later_writes: Sequence[RowWrite],
    turn: YieldTimer,
) -> None:
    """Fill in what no later transaction brought since each event, of one row all together.

    From the last event back: so each write is looked at once, however many events there are. In
    turns with the loop's other users, for of a row that is written again and again there are many.
    """
    rest = list(later_writes)
    open_ = frozenset[str]().union(*(kept.provable_columns for kept in events))
    for event, columns in reversed(events):
        while open_ and rest and rest[-1].end_lsn > event.cursor.lsn:
            open_ -= columns_written(rest.pop(), event.collection, open_)
            if turn.is_due():
                await turn.pause()
        _fill_columns(event, live_row, columns & open_)


def _fill_columns(event: Event, live_row: LiveRow, columns: frozenset[str]) -> None:
    if columns:
        kept = {name: text for name, text in live_row.row.items() if name in columns}
        event.row = {**kept, **event.row}


def _visible_writes(table_history: TableHistory, undated_row: _UndatedLiveRow) -> list[RowWrite]:
    """Return what was done to the row later, as far as the live row shows it."""
    return [
        write
        for write in table_history.writes(undated_row.record_id, undated_row.first_commit_lsn)
        if write.xid is None or undated_row.live_row.snapshot.sees(write.xid)
    ]


def columns_written(
    write: RowWrite, collection: Collection, columns: frozenset[str]
) -> frozenset[str]:
    """Return which of some columns a change may have given another value."""
    match write.change:
        case Update(new=new, old=old) if old.row.get(collection.key.name) == new.get(
            collection.key.name
        ):
            return columns.intersection(new) | columns.intersection(collection.generated_columns)
        case _:
            return columns  # another row came, or went, or nobody knows


class LaterWrites:
    """Which columns a transaction writes again in a row, after one of the row's versions.

    Remembers that of the latest transactions asked about: a large one comes in many slices, and
    readers at different ones take turns.
    """

    def __init__(self) -> None:
        self._last_writes_cache: WeightedCache[int, _LastWrites] = WeightedCache(_CACHED_CHANGES)

    def columns_written_later(self, event: Event) -> frozenset[str]:
        """Return the columns that a later change of the event's transaction brings.

        Another row under the same id brings all, also those that its image lacks. A generated
        column is in no image, and so counts as written by whatever writes the row.
        """
        if len(event.transaction_changes) <= event.cursor.ordinal:
            return _NO_COLUMNS
        changes = event.transaction_changes
        kept = self._last_writes_cache.get(
            id(changes), lambda: (_LastWrites(changes), len(changes))
        )
        last = kept.by_record(event.collection).get(event.record_id, {})
        return frozenset(name for name, at in last.items() if at > event.cursor.ordinal)


class _LastWrites:
    """Of one transaction's changes, which it holds: they are known by their identity."""

    __slots__ = ("_by_table_and_record", "_changes")

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes
        self._by_table_and_record: dict[TableName, Mapping[str, Mapping[str, int]]] = {}

    def by_record(self, collection: Collection) -> Mapping[str, Mapping[str, int]]:
        table = collection.table.name
        if table not in self._by_table_and_record:
            self._by_table_and_record[table] = _last_writes(self._changes, collection)
        return self._by_table_and_record[table]


def _last_writes(
    changes: Sequence[Change], collection: Collection
) -> Mapping[str, Mapping[str, int]]:
    """Return, of rows that are written several times, which change is the last with a column."""
    key = collection.key.name
    written = [
        (ordinal, change.new.get(key) or "", change)
        for ordinal, change in enumerate(changes, start=1)
        if isinstance(change, (Insert, Update)) and change.table == collection.table.name
    ]
    times = Counter(record_id for _, record_id, _ in written)
    found: dict[str, dict[str, int]] = {}
    for ordinal, record_id, change in written:
        if times[record_id] > 1:
            is_same_row = isinstance(change, Update) and change.old.row.get(key) == record_id
            columns = (
                [*change.new, *collection.generated_columns]
                if is_same_row
                else collection.column_names
            )
            found.setdefault(record_id, {}).update(dict.fromkeys(columns, ordinal))
    return found
