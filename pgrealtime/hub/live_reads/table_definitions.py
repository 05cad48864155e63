"""What no decoder says of tables: which partitions are still theirs, and what composites are of.

The catalogue is asked before rows of such tables are judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.catalog.model import Type
from pgrealtime.changelog.base import Entry
from pgrealtime.changes import NEVER_DESCRIBED, TableName, Transaction
from pgrealtime.collections.model import Collections


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
