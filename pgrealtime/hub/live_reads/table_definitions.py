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

_ROOT = sql.SQL("pg_catalog.pg_partition_root(pg_catalog.to_regclass({leaf}))")
_ATTRIBUTES = sql.SQL(
    "SELECT t.oid || ' ' || a.attname"
    " FROM pg_catalog.pg_type t JOIN pg_catalog.pg_attribute a ON a.attrelid = t.typrelid"
    " WHERE t.oid IN ({types}) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY t.oid, a.attnum"
)
_NO_ATTRIBUTES = sql.SQL("SELECT ''::pg_catalog.text WHERE false")


class Belief(Struct, frozen=True):
    """What rows are taken for."""

    leaves: Mapping[TableName, int]
    """Partitions, with the oids of their roots."""
    composites: Mapping[int, tuple[str, ...]]
    """The attributes of composite types, by the types' oids."""

    def statement(self) -> sql.Composed:
        """Return the query whose one row ``is_borne_out`` takes.

        It is put once for each batch of rows: all there is to plan is the attributes' part.
        """
        roots = [
            _ROOT.format(leaf=sql.Literal(sql.Identifier(*leaf).as_string()))
            for leaf in self.leaves
        ]
        types = sql.SQL(", ").join(map(sql.Literal, sorted(self.composites)))
        attributes = _ATTRIBUTES.format(types=types) if self.composites else _NO_ATTRIBUTES
        return sql.SQL("SELECT ARRAY[{}]::pg_catalog.oid[], ARRAY({})").format(
            sql.SQL(", ").join(roots), attributes
        )

    def is_borne_out(self, roots: list[int | None], attributes: list[str]) -> bool:
        """Whether the statement's row says the same."""
        told = [f"{oid} {name}" for oid, names in sorted(self.composites.items()) for name in names]
        return roots == [*self.leaves.values()] and attributes == told


class Definitions:
    """What is taken for known of the collections' tables.

    Args:
        collections: Those in force.
    """

    def __init__(self, collections: Collections) -> None:
        tables = [collection.table for collection in collections.values()]
        self._roots = {leaf: table.oid for table in tables for leaf in table.leaves}
        self._composites = {
            table.name: found
            for table in tables
            if (found := dict(_composites(column.type for column in table.columns)))
        }

    def behind(self, entries: Iterable[Entry]) -> Belief | None:
        """Return what must be so for the rows to be what they seem; None if the stream says it."""
        if not (self._roots or self._composites):
            return None
        leaves: dict[TableName, int] = {}
        composites: dict[int, tuple[str, ...]] = {}
        for entry in entries:
            for shape in entry.shapes if isinstance(entry, Transaction) else ():
                leaf = shape.leaf if shape.described == NEVER_DESCRIBED else None
                if leaf in self._roots:
                    leaves[leaf] = self._roots[leaf]
                composites |= self._composites.get(shape.table, {})
        return Belief(leaves, composites) if leaves or composites else None


def _composites(types: Iterable[Type]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the composites among the types, and among what those are made of."""
    for one in types:
        if one.attributes:
            yield one.oid, tuple(name for name, _ in one.attributes)
        inner = (one.element, one.domain_of, *(of for _, of in one.attributes))
        yield from _composites(of for of in inner if of is not None)
