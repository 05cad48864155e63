"""Whether rows are what the catalogue says of their tables.

A row may be of an earlier or a later definition than the one that rules and records are made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.catalog.model import Type
from pgrealtime.changelog.base import Entry
from pgrealtime.changes import NEVER_DESCRIBED, RowShape, TableName, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import reachable_tables

_MAX_SHAPES = 10_000
_REREAD_SECONDS = 5.0
"""A catalogue that could not be read isn't read again before that: events wait for it."""


class ShapeChecker:
    """The shapes that were seen since the collections came into force.

    Args:
        collections: Those in force; rows of the junctions between them count as well.
        clock: Monotonic seconds.
    """

    def __init__(self, collections: Collections, clock: Callable[[], float]) -> None:
        self._tables = reachable_tables(collections)
        self._fitting_shapes: set[RowShape] = set()
        self._unfit_shapes: set[RowShape] = set()
        self._reread_times: dict[RowShape, float] = {}
        """Those that would fit if nothing has changed, and until when nobody asks again."""
        self._clock = clock

    def needs_catalog_read(self, transaction: Transaction) -> bool:
        """Whether the catalogue must be read before anything is made of the transaction's rows."""
        shapes = transaction.row_shapes
        if self._fitting_shapes.issuperset(shapes):
            return False
        return any(self._shape_needs_catalog_read(shape) for shape in shapes)

    def fits(self, transaction: Transaction) -> bool:
        """Whether its rows can be judged and shown by the collections in force."""
        shapes = transaction.row_shapes
        return self._fitting_shapes.issuperset(shapes) or all(map(self._shape_fits, shapes))

    def decide_without_waiting(
        self, transaction: Transaction, *, is_catalog_read: bool, is_catalog_stale: bool = False
    ) -> None:
        """Take note that waiting can't tell more about the transaction's rows.

        Args:
            transaction: One that was doubtful.
            is_catalog_read: Whether the catalogue was read since it became visible.
            is_catalog_stale: Whether it is known to say something else than what is in force.
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
        if (
            shape in self._unfit_shapes
            or shape in self._reread_times
            or not self._matches_catalog(shape)
        ):
            return False
        if shape.description_count <= 0:
            self._store_decision(shape, is_fit=True)
        return True

    def _store_decision(self, shape: RowShape, *, is_fit: bool) -> None:
        self._clear_if_full()
        (self._fitting_shapes if is_fit else self._unfit_shapes).add(shape)

    def _clear_if_full(self) -> None:
        if (
            len(self._fitting_shapes) + len(self._unfit_shapes) + len(self._reread_times)
            >= _MAX_SHAPES
        ):
            self._fitting_shapes.clear()
            self._unfit_shapes.clear()
            self._reread_times.clear()

    def _matches_catalog(self, shape: RowShape) -> bool:
        """Whether the catalogue has such rows, apart from columns only added or only dropped.

        A name that is unknown beside one that is missing may be a column renamed; and a partition
        that isn't there was detached, its rows are no longer the table's.
        """
        table = self._tables.get(shape.table)
        if table is None:
            return True
        if shape.leaf is not None and shape.leaf not in table.leaves:
            return False
        types = {column.name: column.type.oid for column in table.columns}
        names = {name for name, _ in shape.columns}
        is_any_missing = any(
            column.name not in names for column in table.columns if not column.is_generated
        )
        if is_any_missing and not names <= types.keys():
            return False
        return all(types.get(name, oid) == oid for name, oid in shape.columns)


class TableDefinitions:
    """What is taken for known of the collections' tables.

    Args:
        collections: Those in force.
    """

    def __init__(self, collections: Collections) -> None:
        tables = [collection.table for collection in collections.values()]
        self._partition_roots = {leaf: table.oid for table in tables for leaf in table.leaves}
        self._composite_attributes = {
            table.name: found
            for table in tables
            if (found := dict(_composite_types(column.type for column in table.columns)))
        }

    def assumptions_for(self, entries: Iterable[Entry]) -> CatalogAssumptions | None:
        """Return what must be so for the rows to be what they seem; None if the stream says it."""
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
    """Yield the composites among the types, and among what those are made of."""
    for one in types:
        if one.attributes:
            yield one.oid, tuple(name for name, _ in one.attributes)
        inner = (one.element, one.domain_of, *(of for _, of in one.attributes))
        yield from _composite_types(of for of in inner if of is not None)
