"""Fills in columns that the WAL left out, if the table proves their values at the event.

The WAL doesn't carry an unchanged TOASTed value, nor, with some decoders, a generated column. The
table holds it, perhaps as a later transaction left it, which not every receiver may see. A column
of a live row is what it was at an event if no later change writes it, of all changes that the live
row's snapshot sees. Writers of a row wait for one another, so that its versions follow each other
in stream order. The evaluator completes rows before it evaluates them.

Of a record that was updated by rows of a junction table alone all columns but the key are missing.
If it was written again since, its row is the old image of that write, if the WAL has it.
"""

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from msgspec import Struct

from pgrealtime.caches import WeightedCache
from pgrealtime.changelog.row_history import CACHED_CHANGES, RowHistory, RowWrite, TableHistory
from pgrealtime.changes import Change, Delete, Insert, TableName, Update, WholeRow
from pgrealtime.collections.model import Collection
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN
from pgrealtime.rule_queries.live_rows import LiveRow

_NO_COLUMNS: frozenset[str] = frozenset()


FetchLiveRows: TypeAlias = Callable[
    [Sequence[Event]], Awaitable[tuple[dict[tuple[str, str], LiveRow], frozenset[str]]]
]
"""Reads live rows in snapshots that see the events' transactions (``QueryExecutor``)."""


class CompletionResult(NamedTuple):
    """What completing rows found."""

    unreadable_collections: frozenset[str]
    dropped_columns: Mapping[str, frozenset[str]]
    """By name of the collection, columns that its table no longer has."""

    def is_row_complete(self, event: Event) -> bool:
        """Whether the event's row has all columns that its table has."""
        dropped = self.dropped_columns.get(event.collection.name, _NO_COLUMNS)
        return not event.missing_columns - dropped


class _CompletableEvent(NamedTuple):
    """An event whose row may be completed."""

    event: Event
    provable_columns: frozenset[str]
    """Columns of the live row that the event's own transaction didn't write again."""


class _UndatedLiveRow(Struct):
    """A live row whose last writer isn't an event's own transaction, or is a subtransaction."""

    collection: Collection
    record_id: str
    live_row: LiveRow
    events: list[_CompletableEvent] = []
    """The events that it may complete, in stream order."""

    @property
    def first_commit_lsn(self) -> LSN:
        """Where the transaction of the first event ends."""
        return self.events[0].event.cursor.lsn


class RowCompleter:
    """Completes the rows of events."""

    def __init__(self, fetch_live_rows: FetchLiveRows, row_history: RowHistory) -> None:
        self._fetch_live_rows = fetch_live_rows
        self._row_history = row_history
        self._later_writes = LaterWrites()

    async def complete(self, events: Sequence[Event]) -> CompletionResult:
        """Fill in the columns that can be proved; the others stay missing."""
        live_rows, unreadable = await self._fetch_live_rows(events)
        undated: dict[tuple[str, str], _UndatedLiveRow] = {}
        dropped: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
        for event in events:
            record = event.collection.name, event.record_id
            live_row = live_rows.get(record)
            if live_row is None:
                if event.is_relinked and event.collection.name not in unreadable:
                    event.is_superseded = True
                continue
            missing = event.missing_columns
            dropped[event.collection.name] |= missing.difference(live_row.row)
            columns = missing.intersection(live_row.row)
            columns -= self._later_writes.columns_written_later(event)
            if live_row.writer_xid == event.xid:
                _fill_columns(event, live_row, columns)
            elif columns:
                new = _UndatedLiveRow(event.collection, event.record_id, live_row)
                row = undated.setdefault(record, new)
                row.events.append(_CompletableEvent(event, columns))
        if undated:
            await self._complete_undated(undated.values())
        return CompletionResult(unreadable, dropped)

    async def _complete_undated(self, undated_rows: Iterable[_UndatedLiveRow]) -> None:
        """Fill in rows by what the changelog says of later changes.

        First by what it holds now: if one of its transactions wrote the live row, the changes up to
        that one decide about the events before it. Otherwise the writer may be a subtransaction,
        or its commit isn't in the changelog yet. Once the stream has passed the end of the WAL at
        the time of the live row's snapshot, every change that the snapshot sees is known.
        """
        histories = await self._table_histories(undated_rows)
        waiting: list[_UndatedLiveRow] = []
        timer = YieldTimer()
        for row in undated_rows:
            history = histories.get(row.collection.table.name)
            writes = [] if history is None else history.writes(row.record_id, row.first_commit_lsn)
            written_at = max(
                (write.end_lsn for write in writes if write.xid == row.live_row.writer_xid),
                default=LSN(0),
            )
            earlier = [event for event in row.events if event.event.cursor.lsn < written_at]
            writes = [write for write in writes if write.end_lsn <= written_at]
            await _fill_unwritten_columns(earlier, row.live_row, writes, timer)
            _fill_relinked_rows(earlier, writes)
            row.events = row.events[len(earlier) :]
            if row.events:
                waiting.append(row)
        newest = max((row.live_row.insert_lsn for row in waiting), default=None)
        if newest is not None and await self._row_history.wait_for_lsn(newest):
            histories = await self._table_histories(waiting)
            for row in waiting:
                history = histories.get(row.collection.table.name)
                if history is not None:
                    writes = _visible_writes(history, row)
                    await _fill_unwritten_columns(row.events, row.live_row, writes, timer)
                    _fill_relinked_rows(row.events, writes)

    async def _table_histories(
        self, undated_rows: Iterable[_UndatedLiveRow]
    ) -> Mapping[TableName, TableHistory]:
        """Return the histories of the rows' tables since their first events, as far as known."""
        first: dict[TableName, tuple[Collection, LSN]] = {}
        for row in undated_rows:
            table = row.collection.table.name
            _, lsn = first.get(table, (row.collection, row.first_commit_lsn))
            first[table] = row.collection, min(lsn, row.first_commit_lsn)
        histories = {
            table: await self._row_history.table_history(table, collection.key.name, after)
            for table, (collection, after) in first.items()
        }
        return {table: history for table, history in histories.items() if history is not None}


async def _fill_unwritten_columns(
    events: Sequence[_CompletableEvent],
    live_row: LiveRow,
    later_writes: Sequence[RowWrite],
    timer: YieldTimer,
) -> None:
    """Fill in, for all events of one row, the columns that no later transaction writes.

    The events are in stream order, the writes oldest first.
    """
    # From the last event back, so that each write is looked at once however many events there are.
    # The timer yields the loop, as a row may be written any number of times.
    writes = list(later_writes)
    unwritten = frozenset[str]().union(*(row_event.provable_columns for row_event in events))
    for event, columns in reversed(events):
        while unwritten and writes and writes[-1].end_lsn > event.cursor.lsn:
            unwritten -= columns_written(writes.pop(), event.collection, unwritten)
            if timer.is_due():
                await timer.pause()
        _fill_columns(event, live_row, columns & unwritten)


def _fill_relinked_rows(
    events: Sequence[_CompletableEvent], later_writes: Sequence[RowWrite]
) -> None:
    """Take rows that were written again from the old images of those writes; all are known.

    Where an image has the key alone, the event is superseded by the write.
    """
    for event in (one.event for one in events if one.event.is_relinked):
        if not event.missing_columns:
            continue
        next_write = next((w for w in later_writes if w.end_lsn > event.cursor.lsn), None)
        match None if next_write is None else next_write.change:
            case Update(old=WholeRow(row=old)) | Delete(old=WholeRow(row=old)) if (
                old.get(event.collection.key.name) == event.record_id
            ):
                event.row = {**event.row, **old}
        event.is_superseded = next_write is not None and bool(event.missing_columns)


def _fill_columns(event: Event, live_row: LiveRow, columns: frozenset[str]) -> None:
    if columns:
        filled = {name: text for name, text in live_row.row.items() if name in columns}
        event.row = {**filled, **event.row}


def _visible_writes(table_history: TableHistory, undated_row: _UndatedLiveRow) -> list[RowWrite]:
    """Return the later writes of the row that its snapshot sees, or may see."""
    sees = undated_row.live_row.snapshot.sees
    writes = table_history.writes(undated_row.record_id, undated_row.first_commit_lsn)
    return [write for write in writes if write.xid is None or sees(write.xid)]


def columns_written(
    write: RowWrite, collection: Collection, columns: frozenset[str]
) -> frozenset[str]:
    """Return those of the columns that a write may have given another value."""
    match write.change:
        case Update(new=new, old=old) if old.row.get(collection.key.name) == new.get(
            collection.key.name
        ):
            return columns.intersection(new) | columns.intersection(collection.generated_columns)
        case _:
            return columns  # another row under this id, or the change isn't known


_IndexedChanges: TypeAlias = tuple[
    Sequence[Change], dict[TableName, Mapping[str, Mapping[str, int]]]
]
"""A transaction's changes; by table, filled when first asked, the result of ``_last_writes``."""


class LaterWrites:
    """An index of the latest transactions that were asked about."""

    def __init__(self) -> None:
        self._cache: WeightedCache[int, _IndexedChanges] = WeightedCache(CACHED_CHANGES)

    def columns_written_later(self, event: Event) -> frozenset[str]:
        """Return the columns that later changes of the event's transaction write in its row."""
        changes = event.transaction_changes
        if len(changes) <= event.cursor.ordinal:
            return _NO_COLUMNS
        # The identity is a safe key: the cached value holds the changes.
        _, by_table = self._cache.get(id(changes), lambda: ((changes, {}), len(changes)))
        table = event.collection.table.name
        if table not in by_table:
            by_table[table] = _last_writes(changes, event.collection)
        ordinals = by_table[table].get(event.record_id, {})
        return frozenset(
            column for column, ordinal in ordinals.items() if ordinal > event.cursor.ordinal
        )


def _last_writes(
    changes: Sequence[Change], collection: Collection
) -> Mapping[str, Mapping[str, int]]:
    """Return the ordinal of the last change of each column, for records written several times."""
    key = collection.key.name
    written = [
        (ordinal, change.new.get(key) or "", change)
        for ordinal, change in enumerate(changes, start=1)
        if isinstance(change, (Insert, Update)) and change.table == collection.table.name
    ]
    counts = Counter(record_id for _, record_id, _ in written)
    last_writes: dict[str, dict[str, int]] = {}
    for ordinal, record_id, change in written:
        if counts[record_id] > 1:
            # Another row under the same id writes all columns, also those that its image lacks.
            # Generated columns are in no image, and count as written by any change of the row.
            is_same_row = isinstance(change, Update) and change.old.row.get(key) == record_id
            written_columns = [*change.new, *collection.generated_columns]
            columns = written_columns if is_same_row else collection.column_names
            last_writes.setdefault(record_id, {}).update(dict.fromkeys(columns, ordinal))
    return last_writes
