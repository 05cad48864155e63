"""Changes of the rows that link records through junction tables, later than a record's event.

Links are read live, so an event would show links that were made after it, which its subscribers may
not be allowed to see. ``expand.batch`` undoes what ``LinkHistory`` returns.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from pgrealtime.caches import WeightedCache
from pgrealtime.changelog.row_history import CACHED_CHANGES, RowHistory, TableHistory, column_values
from pgrealtime.changes import Change, TableName, Truncate
from pgrealtime.collections.model import unpadded_id
from pgrealtime.expand.node import ChangedRecord, LaterLinkChanges
from pgrealtime.expand.plan import JunctionHops, RelationHop, RelationKey
from pgrealtime.expand.relation_sql import relation_query
from pgrealtime.fairness import YieldTimer
from pgrealtime.lsn import LSN
from pgrealtime.rule_queries.session import ReadSession
from pgrealtime.snapshot import Snapshot

_UNKNOWN_VALUE = "\0"
"""Index key for changes whose row isn't known; a PostgreSQL text can't contain this character."""

_ChangeOrdinals: TypeAlias = tuple[
    Sequence[Change], dict[tuple[TableName, str], dict[str, list[int]]]
]
"""A transaction's changes, and by table and column, then value, the ordinals of some of them."""


class LinkHistory:
    """Which link changes must be undone for events' records."""

    def __init__(self, row_history: RowHistory, junction_hops: JunctionHops) -> None:
        self._row_history = row_history
        self._junction_hops = junction_hops
        self._own_changes = TransactionLinkChanges()

    async def later_changes(
        self, session: ReadSession, records: Mapping[int, ChangedRecord]
    ) -> dict[int, LaterLinkChanges]:
        """Return, for records by event index, the later changes of their links that a session sees.

        A record is shown with the links that it had when its transaction was over or, if that
        changed the record once more, right before. What follows belongs to another version of it.
        """
        if not records:
            return {}
        is_complete = await self._row_history.wait_for_lsn(session.insert_lsn)
        first = LSN(min(record.cursor.lsn for record in records.values()))
        later: dict[int, LaterLinkChanges] = {}
        yield_timer = YieldTimer()
        for index, record in records.items():
            if yield_timer.is_due():
                await yield_timer.pause()
            by_relation: dict[RelationKey, Sequence[Change] | None] = {}
            for hop in self._junction_hops[record.collection.name]:
                changes = None
                if is_complete:
                    changes = await self._changes_of_hop(hop, record, first, session.snapshot)
                if changes is None or changes:
                    by_relation[hop.relation_key] = changes
            if by_relation:
                later[index] = by_relation
        return later

    async def _changes_of_hop(
        self, hop: RelationHop, record: ChangedRecord, first: LSN, snapshot: Snapshot
    ) -> Sequence[Change] | None:
        """Return the changes of a record's links by one relation; None if some aren't known."""
        query = relation_query(hop)
        table, column = query.table.name, query.match_column.name
        own: Sequence[Change] | None = ()
        if record.action != "delete":  # its before state undoes these anyway
            own = self._own_changes.after_next_version(record, table, column)
        history = await self._row_history.table_history(table, column, first)
        later = None if history is None else _visible_changes(history, record, snapshot)
        return None if own is None or later is None else [*own, *later]


def _visible_changes(
    table_history: TableHistory, record: ChangedRecord, snapshot: Snapshot
) -> list[Change] | None:
    """Return later transactions' changes of the links; None if some aren't known."""
    changes: list[Change] = []
    ids = {record.record_id, unpadded_id(record.collection, record.record_id)}
    for write in (w for id_ in ids for w in table_history.writes(id_, record.cursor.lsn)):
        if write.xid is not None and not snapshot.sees(write.xid):
            continue
        if write.change is None or isinstance(write.change, Truncate):
            return None
        changes.append(write.change)
    return changes


class TransactionLinkChanges:
    """Link changes that an event's own transaction made after it changed the event's row again.

    A transaction may write a record, link it in a junction table, then write the record and link it
    once more. The event of the first version must not show the links of the second.

    Keeps an index of the latest transactions asked about, because a large transaction is evaluated
    in several slices (runs of changes), each of which asks, and readers at different ones take
    turns.
    """

    def __init__(self) -> None:
        self._ordinals_cache: WeightedCache[int, _ChangeOrdinals] = WeightedCache(CACHED_CHANGES)

    def after_next_version(
        self, record: ChangedRecord, table: TableName, column: str
    ) -> Sequence[Change] | None:
        """Return the link changes that don't belong to the event's version of its row.

        These are changes of ``table``'s rows that have the event's record id in ``column`` and that
        follow, in the event's transaction, the next change of the event's own row. Those before it
        belong to the event's version: applications write a record first and its links after.

        None if that can't be decided, as the row of a change isn't known (a truncation, an old
        image without the key or the column); the links are then not shown as the event's.
        """
        if len(record.transaction_changes) <= record.cursor.ordinal:
            return ()  # the event's change is the last one (ordinals count from 1)
        collection = record.collection
        own = self._ordinals(record, collection.table.name, collection.key.name)
        same_row = _ordinals_after(own.get(record.record_id, ()), record.cursor.ordinal)
        any_row = _ordinals_after(own.get(_UNKNOWN_VALUE, ()), record.cursor.ordinal)
        next_change = min([*same_row[:1], *any_row[:1]], default=None)
        if next_change is None:
            return ()
        links = self._ordinals(record, table, column)
        ordinals = _ordinals_after(links.get(record.record_id, ()), next_change)
        unknown = _ordinals_after(links.get(_UNKNOWN_VALUE, ()), next_change)
        # A truncation of the event's own table counts as a change that may be the row's: links made
        # after it may be those of another row with this id.
        if unknown or (ordinals and next_change in any_row[:1]):
            return None
        return [record.transaction_changes[ordinal - 1] for ordinal in ordinals]

    def _ordinals(
        self, record: ChangedRecord, table: TableName, column: str
    ) -> Mapping[str, Sequence[int]]:
        """Return ordinals, from 1, of the changes of a table, by value of a column."""
        changes = record.transaction_changes
        # The entry refers to the changes, because the cache knows them by their identity.
        _, by_column = self._ordinals_cache.get(id(changes), lambda: ((changes, {}), len(changes)))
        ordinals = by_column.get((table, column))
        if ordinals is None:
            ordinals = by_column[table, column] = {}
            for ordinal, change in enumerate(changes, start=1):
                if change.table == table:
                    for value in column_values(change, column) or (_UNKNOWN_VALUE,):
                        ordinals.setdefault(value, []).append(ordinal)
        return ordinals


def _ordinals_after(ordinals: Sequence[int], ordinal: int) -> Sequence[int]:
    return ordinals[bisect_right(ordinals, ordinal) :]
