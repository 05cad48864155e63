"""Which columns a transaction writes again in a row, after one of the row's versions.

A live row written by an event's own transaction shows its last version. ``toast`` asks here what of
it is that of the event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pgrealtime.caches import WeightedCache
from pgrealtime.changes import Change, Insert, TableName, Update
from pgrealtime.collections.model import Collection
from pgrealtime.hub.events.event import Event

_CACHED_CHANGES = 200_000
"""Changes of the transactions that are kept; the latest transaction counts nothing."""
_NO_COLUMNS: frozenset[str] = frozenset()


class LaterWrites:
    """An index of the latest transactions that were asked about.

    A large transaction comes in many slices, and connections that catch up read different ones by
    turns.
    """

    def __init__(self) -> None:
        self._cache: WeightedCache[int, _LastWrites] = WeightedCache(_CACHED_CHANGES)

    def columns_written_later(self, event: Event) -> frozenset[str]:
        """Return the columns that later changes of the event's transaction write in its row.

        Another row under the same id writes all columns, also those that its image lacks. Generated
        columns are in no image, and count as written by any change of the row.
        """
        changes = event.transaction_changes
        if len(changes) <= event.cursor.ordinal:
            return _NO_COLUMNS
        # The identity is a safe key: the cached value holds the changes.
        last_writes = self._cache.get(id(changes), lambda: (_LastWrites(changes), len(changes)))
        ordinals = last_writes.by_record(event.collection).get(event.record_id, {})
        return frozenset(
            column for column, ordinal in ordinals.items() if ordinal > event.cursor.ordinal
        )


class _LastWrites:
    """One transaction's changes, indexed by table when first asked."""

    __slots__ = ("_by_table", "_changes")

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes
        self._by_table: dict[TableName, Mapping[str, Mapping[str, int]]] = {}

    def by_record(self, collection: Collection) -> Mapping[str, Mapping[str, int]]:
        table = collection.table.name
        if table not in self._by_table:
            self._by_table[table] = _last_writes(self._changes, collection)
        return self._by_table[table]


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
    found: dict[str, dict[str, int]] = {}
    for ordinal, record_id, change in written:
        if counts[record_id] > 1:
            is_same_row = isinstance(change, Update) and change.old.row.get(key) == record_id
            columns = (
                [*change.new, *collection.generated_columns]
                if is_same_row
                else collection.column_names
            )
            found.setdefault(record_id, {}).update(dict.fromkeys(columns, ordinal))
    return found
