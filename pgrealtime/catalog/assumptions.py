"""What decoding a row assumes of the catalogue, and the query that confirms it.

wal2json names the partition of a row but not its root, from which it may have been detached, and no
decoder describes composite types. ``hub.entry_checks`` has the query run before rows are delivered.
"""

from collections.abc import Mapping

from msgspec import Struct
from psycopg import sql

from pgrealtime.changes import TableName

_PARTITION_ROOT = sql.SQL("pg_catalog.pg_partition_root(pg_catalog.to_regclass({leaf}))")
_COMPOSITE_ATTRIBUTES = sql.SQL(
    "SELECT t.oid || ' ' || a.attname"
    " FROM pg_catalog.pg_type t JOIN pg_catalog.pg_attribute a ON a.attrelid = t.typrelid"
    " WHERE t.oid IN ({types}) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY t.oid, a.attnum"
)
_NO_ATTRIBUTES = sql.SQL("SELECT ''::pg_catalog.text WHERE false")


class CatalogAssumptions(Struct, frozen=True):
    """What is assumed of the tables and types of a batch of rows."""

    partition_roots: Mapping[TableName, int]
    """By partition, the oid of its root."""
    composite_attributes: Mapping[int, tuple[str, ...]]
    """By the oid of a composite type, the names of its attributes in order."""

    def statement(self) -> sql.Composed:
        """Return the query whose single row is given to ``is_confirmed_by``.

        It runs once for each batch of rows, so it is kept cheap to plan: only the part for
        attributes scans tables.
        """
        roots = [
            _PARTITION_ROOT.format(leaf=sql.Literal(sql.Identifier(*leaf).as_string()))
            for leaf in self.partition_roots
        ]
        types = sql.SQL(", ").join(map(sql.Literal, sorted(self.composite_attributes)))
        has_types = bool(self.composite_attributes)
        attributes = _COMPOSITE_ATTRIBUTES.format(types=types) if has_types else _NO_ATTRIBUTES
        return sql.SQL("SELECT ARRAY[{}]::pg_catalog.oid[], ARRAY({})").format(
            sql.SQL(", ").join(roots), attributes
        )

    def is_confirmed_by(self, roots: list[int | None], attributes: list[str]) -> bool:
        """Whether the row that ``statement`` returned equals the assumptions."""
        expected = [
            f"{oid} {name}"
            for oid, names in sorted(self.composite_attributes.items())
            for name in names
        ]
        return roots == [*self.partition_roots.values()] and attributes == expected
