"""Whether the stream's rows have the shapes for which the collections in force were built.

A row may have been written under an earlier or a later definition of its table than the catalogue
had when it was read. ``event`` makes gaps of transactions that don't fit. Before the hub evaluates
those that may not fit, it has the catalogue read again, or queries it.
"""

from collections.abc import Callable, Iterable, Iterator

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.catalog.model import Type
from pgrealtime.changelog.memory import Entry
from pgrealtime.changes import NEVER_DESCRIBED, RowShape, TableName, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import reachable_tables

_MAX_SHAPES = 10_000
"""Shapes that are remembered; beyond, all are forgotten and decided again."""
_REREAD_SECONDS = 5.0
"""Seconds until a catalogue that could not be read is read again. Events wait for that."""


class ShapeChecker:
    """Decides which shapes fit a generation's collections and junction tables, each shape once."""

    def __init__(self, collections: Collections, clock: Callable[[], float]) -> None:
        self._tables = reachable_tables(collections)
        self._fitting_shapes: set[RowShape] = set()
        self._unfit_shapes: set[RowShape] = set()
        self._reread_times: dict[RowShape, float] = {}
        """Shapes that match the catalogue as it was read, which could not be read again: until when
        that is not tried again."""
        self._clock = clock

    def needs_catalog_read(self, transaction: Transaction) -> bool:
        """Whether the catalogue must be read again before the transaction's rows are used."""
        shapes = transaction.row_shapes
        if self._fitting_shapes.issuperset(shapes):
            return False
        return any(self._shape_needs_catalog_read(shape) for shape in shapes)

    def fits(self, transaction: Transaction) -> bool:
        """Whether the transaction's rows can be evaluated and rendered by these collections."""
        shapes = transaction.row_shapes
        return self._fitting_shapes.issuperset(shapes) or all(map(self._shape_fits, shapes))

    def decide_without_waiting(
        self, transaction: Transaction, *, is_catalog_read: bool, is_catalog_stale: bool = False
    ) -> None:
        """Decide about the shapes of a transaction that needs a catalogue read.

        Waiting adds nothing: either the catalogue was read since the transaction became visible, or
        it can't be read. A stale one is known to differ from the collections.
        """
        for shape in transaction.row_shapes:
            is_open = self._shape_needs_catalog_read(shape) or shape in self._reread_times
            if is_open or (is_catalog_stale and not is_catalog_read):
                self._fitting_shapes.discard(shape)
                self._decide_shape(shape, is_catalog_read=is_catalog_read)

    def _decide_shape(self, shape: RowShape, *, is_catalog_read: bool) -> None:
        is_matching = self._matches_catalog(shape)
        self._reread_times.pop(shape, None)
        if is_matching and not is_catalog_read:
            self._clear_if_full()
            self._reread_times[shape] = self._clock() + _REREAD_SECONDS
        else:
            self._store_decision(shape, is_fit=is_matching)

    def _shape_needs_catalog_read(self, shape: RowShape) -> bool:
        if shape in self._fitting_shapes or shape in self._unfit_shapes:
            return False
        if shape in self._reread_times:
            return self._clock() >= self._reread_times[shape]
        return shape.description_count > 0 or not self._shape_fits(shape)

    def _shape_fits(self, shape: RowShape) -> bool:
        if shape in self._fitting_shapes:
            return True
        is_undecided = shape not in self._unfit_shapes and shape not in self._reread_times
        if not (is_undecided and self._matches_catalog(shape)):
            return False
        if shape.description_count <= 0:
            self._store_decision(shape, is_fit=True)
        return True

    def _store_decision(self, shape: RowShape, *, is_fit: bool) -> None:
        self._clear_if_full()
        (self._fitting_shapes if is_fit else self._unfit_shapes).add(shape)

    def _clear_if_full(self) -> None:
        known = self._fitting_shapes, self._unfit_shapes, self._reread_times
        if sum(map(len, known)) >= _MAX_SHAPES:
            for shapes in known:
                shapes.clear()

    def _matches_catalog(self, shape: RowShape) -> bool:
        """Whether the catalogue's table has such rows, but for columns added or columns dropped.

        An unknown column together with a missing one may be a rename: such a shape doesn't match.
        Nor do the rows of a detached partition, which are no longer the table's.
        """
        table = self._tables.get(shape.table)
        if table is None:
            return True
        if shape.leaf is not None and shape.leaf not in table.leaves:
            return False
        types = {column.name: column.type.oid for column in table.columns}
        names = {name for name, _ in shape.columns}
        expected = {column.name for column in table.columns if not column.is_generated}
        if not expected <= names and not names <= types.keys():
            return False
        return all(types.get(name, oid) == oid for name, oid in shape.columns)


class TableDefinitions:
    """What the rows of the collections' tables are taken for without any decoder saying so."""

    def __init__(self, collections: Collections) -> None:
        tables = [collection.table for collection in collections.values()]
        self._partition_roots = {leaf: table.oid for table in tables for leaf in table.leaves}
        self._composite_attributes = {
            table.name: attributes
            for table in tables
            if (attributes := dict(_composite_types(column.type for column in table.columns)))
        }

    def assumptions_for(self, entries: Iterable[Entry]) -> CatalogAssumptions | None:
        """Return what the catalogue must confirm before the entries' rows are used, if anything.

        wal2json doesn't describe tables: it names partitions, which may have been detached. No
        decoder describes composite types.
        """
        if not (self._partition_roots or self._composite_attributes):
            return None
        leaves: dict[TableName, int] = {}
        composites: dict[int, tuple[str, ...]] = {}
        for entry in entries:
            for shape in entry.row_shapes if isinstance(entry, Transaction) else ():
                leaf = shape.leaf if shape.description_count == NEVER_DESCRIBED else None
                if leaf in self._partition_roots:
                    leaves[leaf] = self._partition_roots[leaf]
                composites |= self._composite_attributes.get(shape.table, {})
        return CatalogAssumptions(leaves, composites) if leaves or composites else None


def _composite_types(types: Iterable[Type]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield oid and attribute names of the composite types among these and their parts."""
    for type_ in types:
        if type_.attributes:
            yield type_.oid, tuple(name for name, _ in type_.attributes)
        inner = (type_.element, type_.domain_of, *(part for _, part in type_.attributes))
        yield from _composite_types(part for part in inner if part is not None)
