"""Changes of the rows that link records through junction tables, later than a record's event."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from pgrealtime.caches import WeightedCache
from pgrealtime.changelog.row_history import column_values
from pgrealtime.changes import (
    Change,
    TableName,
)
from pgrealtime.expand.node import ChangedRecord

_CACHED_CHANGES = 200_000
"""Bounds the index: changes of the transactions that it covers, the latest one not counted."""


class TransactionLinkChanges:
    """Link changes that an event's own transaction made after it changed the event's row again.

    A transaction may write a record, link it in a junction table, then write the record and link it
    once more. The links are read live, so the event of the first version would show the links of
    the second, which its subscribers may not be allowed to see. ``hub.expand`` undoes what
    ``after_next_version`` returns. (Later transactions' changes come from ``TableHistory``.)

    Keeps an index of the latest transactions asked about, because a large transaction is evaluated
    in several slices (runs of changes), each of which asks, and readers at different ones take
    turns.
    """

    def __init__(self) -> None:
        self._ordinals_cache: WeightedCache[int, _ChangeOrdinals] = WeightedCache(_CACHED_CHANGES)

    def after_next_version(
        self, event: ChangedRecord, table: TableName, column: str
    ) -> Sequence[Change] | None:
        """Return the link changes that don't belong to the event's version of its row.

        These are changes of ``table``'s rows that have the event's record id in ``column`` and that
        follow, in the event's transaction, the next change of the event's own row. Those before it
        belong to the event's version: applications write a record first and its links after.

        Returns:
            () if there are none, also if the row isn't changed again in this transaction. None if
            that can't be decided, as the row of a change isn't known (a truncation, an old image
            without the key or the column); the caller then doesn't show the links as the event's.
        """
        if len(event.transaction_changes) <= event.cursor.ordinal:
            return ()  # the event's change is the last one (ordinals count from 1)
        own = self._ordinals(event, event.collection.table.name, event.collection.key.name)
        same_row = _ordinals_after(own.get(event.record_id, ()), event.cursor.ordinal)
        any_row = _ordinals_after(own.get(_UNKNOWN_VALUE, ()), event.cursor.ordinal)
        next_change = min([*same_row[:1], *any_row[:1]], default=None)
        if next_change is None:
            return ()
        links = self._ordinals(event, table, column)
        found = _ordinals_after(links.get(event.record_id, ()), next_change)
        unknown = _ordinals_after(links.get(_UNKNOWN_VALUE, ()), next_change)
        # A truncation of the event's own table counts as a change that may be the row's: links made
        # after it may be those of another row with this id.
        if unknown or (found and next_change in any_row[:1]):
            return None
        return [event.transaction_changes[place - 1] for place in found]

    def _ordinals(
        self, event: ChangedRecord, table: TableName, column: str
    ) -> Mapping[str, Sequence[int]]:
        changes = event.transaction_changes
        kept = self._ordinals_cache.get(
            id(changes), lambda: (_ChangeOrdinals(changes), len(changes))
        )
        return kept.by_value(table, column)


class _ChangeOrdinals:
    """The ordinals, from 1, of a transaction's changes by table and column, then by value.

    Holds the changes, which it is known by the identity of.
    """

    __slots__ = ("_by_column", "_changes")

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes
        self._by_column: dict[tuple[TableName, str], dict[str, list[int]]] = {}

    def by_value(self, table: TableName, column: str) -> Mapping[str, Sequence[int]]:
        found = self._by_column.get((table, column))
        if found is None:
            found = self._by_column[table, column] = {}
            for ordinal, change in enumerate(self._changes, start=1):
                if change.table == table:
                    for value in column_values(change, column) or (_UNKNOWN_VALUE,):
                        found.setdefault(value, []).append(ordinal)
        return found


def _ordinals_after(ordinals: Sequence[int], ordinal: int) -> Sequence[int]:
    return ordinals[bisect_right(ordinals, ordinal) :]


_UNKNOWN_VALUE = "\0"
"""Index key for changes whose row isn't known; a text of Postgres can't contain this character."""
