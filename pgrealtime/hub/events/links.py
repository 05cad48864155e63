"""Finds the records whose links a transaction changed in junction tables.

A relation through a junction table is a field of the record that shows its ids, as in PocketBase,
though no row of that record's table is written. ``event`` makes an update of the record: one per
transaction and record, none if the transaction writes the record itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeAlias

from pgrealtime.caches import WeightedCache
from pgrealtime.changes import Change, Delete, Insert, Row, TableName, Transaction, Truncate, Update
from pgrealtime.collections.model import Collection, Collections, Junction

_Links: TypeAlias = tuple[Collection, Junction]
"""A relation through a junction table, and the collection whose records show its ids."""
LinkedRecords: TypeAlias = Mapping[int, Sequence[tuple[Collection, str]]]
"""By ordinal of the change, from 1, the collection and key of records that are updated with it."""

_CACHED_CHANGES = 20_000
"""Of the transactions asked for last, which stay in memory for so long. The very last may have
more: it is read in many slices."""


class LinkUpdates:
    """The relations of some collections whose links update their records."""

    def __init__(self, collections: Collections) -> None:
        self._links: dict[TableName, list[_Links]] = {}
        self._collections = collections
        for collection in collections.values():
            for field in collection.fields:
                junction = None if field.relation is None else field.relation.junction
                if junction is not None and junction.updates and collection.is_streamed:
                    self._links.setdefault(junction.table.name, []).append((collection, junction))
        self._records: WeightedCache[int, tuple[Sequence[Change], LinkedRecords]] = WeightedCache(
            _CACHED_CHANGES
        )

    def __bool__(self) -> bool:
        return bool(self._links)

    @property
    def tables(self) -> AbstractSet[TableName]:
        """The junction tables."""
        return self._links.keys()

    def names_pairs_of(self, collection: Collection, change: Change) -> bool:
        """Whether a junction's change updates each of the collection's records that it concerns.

        It does if the WAL has their keys.
        """
        return any(
            one.name == collection.name
            and all(junction.source_column in row for row in row_images_of(change))
            for one, junction in self._links.get(change.table, ())
        )

    def collections_of(self, table: TableName) -> list[Collection]:
        """Return the collections whose records show the links that a junction table holds."""
        return list({c.name: c for c, _ in self._links.get(table, ())}.values())

    def records_of(self, transaction: Transaction) -> LinkedRecords:
        """Return the records that a transaction updates by their links alone."""
        changes = transaction.changes
        # Once, though a large transaction is read in many slices by several readers. The identity
        # is a safe key: the cached value holds the changes.
        _, records = self._records.get(
            id(changes), lambda: ((changes, self._find_records(changes)), len(changes))
        )
        return records

    def _find_records(self, changes: Sequence[Change]) -> LinkedRecords:
        # With the last of its links' changes, so that a reader who stops there has them all.
        ordinals: dict[tuple[str, str], int] = {}
        for ordinal, change in enumerate(changes, start=1):
            for collection, junction in self._links.get(change.table, ()):
                for key in _keys_relinked(change, junction):
                    ordinals[collection.name, key] = ordinal
        names = {name for name, _ in ordinals}
        for change in changes:
            own = self._collections.find_by_table(change.table)
            if own is not None and own.name in names:
                for row in row_images_of(change):
                    ordinals.pop((own.name, row.get(own.key.name) or ""), None)
        records: dict[int, list[tuple[Collection, str]]] = {}
        for (name, key), ordinal in ordinals.items():
            records.setdefault(ordinal, []).append((self._collections[name], key))
        return records


def _keys_relinked(change: Change, junction: Junction) -> Iterator[str]:
    """Yield the keys of the records whose links a change alters, as far as the WAL has them."""
    columns = junction.source_column, junction.target_column
    if isinstance(change, Update) and all(
        name in change.old.row and change.old.row[name] == change.new.get(name) for name in columns
    ):
        return
    for row in row_images_of(change):
        if key := row.get(junction.source_column):
            yield key


def row_images_of(change: Change) -> Iterator[Row]:
    """Yield the old and the new image of the row that was changed, as far as there are any."""
    if isinstance(change, Truncate):
        return
    if not isinstance(change, Insert):
        yield change.old.row
    if not isinstance(change, Delete):
        yield change.new
