"""What no decoder says of tables: which partitions are still theirs, and what composites are of.

The catalogue is asked before rows of such tables are judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct
from psycopg import sql

from pgrealtime.catalog.model import Type
from pgrealtime.changelog.base import Entry
from pgrealtime.changes import NEVER_DESCRIBED, TableName, Transaction
from pgrealtime.collections.model import Collections

_PARTITION_ROOT = sql.SQL("pg_catalog.pg_partition_root(pg_catalog.to_regclass({leaf}))")
_COMPOSITE_ATTRIBUTES = sql.SQL(
    "SELECT t.oid || ' ' || a.attname"
    " FROM pg_catalog.pg_type t JOIN pg_catalog.pg_attribute a ON a.attrelid = t.typrelid"
    " WHERE t.oid IN ({types}) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY t.oid, a.attnum"
)
_NO_ATTRIBUTES = sql.SQL("SELECT ''::pg_catalog.text WHERE false")


class CatalogAssumptions(Struct, frozen=True):
    """What rows are taken for."""

    partition_roots: Mapping[TableName, int]
    """Partitions, with the oids of their roots."""
    composite_attributes: Mapping[int, tuple[str, ...]]
    """The attributes of composite types, by the types' oids."""

    def statement(self) -> sql.Composed:
        """Return the query whose one row ``is_confirmed_by`` takes.

        It is put once for each batch of rows: all there is to plan is the attributes' part.
        """
        roots = [
            _PARTITION_ROOT.format(leaf=sql.Literal(sql.Identifier(*leaf).as_string()))
            for leaf in self.partition_roots
        ]
        types = sql.SQL(", ").join(map(sql.Literal, sorted(self.composite_attributes)))
        attributes = (
            _COMPOSITE_ATTRIBUTES.format(types=types)
            if self.composite_attributes
            else _NO_ATTRIBUTES
        )
        return sql.SQL("SELECT ARRAY[{}]::pg_catalog.oid[], ARRAY({})").format(
            sql.SQL(", ").join(roots), attributes
        )

    def is_confirmed_by(self, roots: list[int | None], attributes: list[str]) -> bool:
        """Whether the statement's row says the same."""
        told = [
            f"{oid} {name}"
            for oid, names in sorted(self.composite_attributes.items())
            for name in names
        ]
        return roots == [*self.partition_roots.values()] and attributes == told


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
