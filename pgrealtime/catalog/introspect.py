"""Reads tables and types from ``pg_catalog`` in one snapshot.

Called at the start, by each schema refresh, and by commands.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from typing import Any, TypeAlias, TypeVar

from psycopg import AsyncConnection
from psycopg.rows import dict_row

from pgrealtime.catalog.model import (
    Catalog,
    Column,
    ForeignKey,
    ReplicaIdentity,
    Table,
    TableKind,
    Type,
    TypeKind,
)
from pgrealtime.changes import TableName

_SNAPSHOT_SQL = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
_SAFE_SEARCH_PATH_SQL = "SET LOCAL search_path = pg_catalog, pg_temp"

_TABLES = """
SELECT c.oid, n.nspname AS schema, c.relname AS name, c.relkind AS kind,
       c.relreplident AS replica_identity, c.relpersistence = 'u' AS is_unlogged,
       root.nspname AS root_schema, root.relname AS root_name,
       leaves.oids AS leaves, coalesce(keys.columns, '{}') AS partition_columns
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL (
  SELECT rn.nspname, r.relname
  FROM pg_class r JOIN pg_namespace rn ON rn.oid = r.relnamespace
  WHERE c.relispartition AND r.oid = pg_partition_root(c.oid)
) root ON true
LEFT JOIN LATERAL (
  SELECT array_agg(t.relid::oid) AS oids
  FROM pg_partition_tree(c.oid) t
  WHERE c.relkind = 'p' AND t.isleaf
) leaves ON true
LEFT JOIN LATERAL (
  SELECT array_agg(DISTINCT a.attname::text) AS columns
  FROM pg_partition_tree(c.oid) t
  JOIN pg_partitioned_table p ON p.partrelid = t.relid
  JOIN pg_attribute a ON a.attrelid = t.relid AND a.attnum = ANY (p.partattrs::int2[])
  WHERE c.relkind = 'p'
) keys ON true
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND (n.nspname = ANY (%(schemas)s)
       OR (n.nspname, c.relname) IN
          (SELECT * FROM unnest(%(name_schemas)s::text[], %(names)s::text[]))
       OR c.oid = ANY (%(oids)s::oid[]))
ORDER BY n.nspname, c.relname
"""

# Names its columns as ``Column`` its fields.
_COLUMNS = """
SELECT a.attrelid AS table, a.attname AS name, a.attnum AS attribute_number, a.atttypid AS type,
       a.atttypmod AS type_modifier, a.attnotnull AS not_null, a.attgenerated <> '' AS is_generated,
       a.attstorage <> 'p' AS is_toastable,
       coalesce(l.collisdeterministic, true) AS is_deterministic
FROM pg_attribute a
LEFT JOIN pg_collation l ON l.oid = a.attcollation
WHERE a.attrelid = ANY (%(oids)s::oid[]) AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attrelid, a.attnum
"""

# Constraints of partitions (conparentid) repeat those of their roots.
_FOREIGN_KEYS = """
SELECT k.conrelid AS table, k.conname AS name, n.nspname AS schema, c.relname AS target,
       k.convalidated AS is_validated,
       (SELECT array_agg(a.attname ORDER BY u.place)
        FROM unnest(k.conkey) WITH ORDINALITY u(number, place)
        JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number) AS columns,
       (SELECT array_agg(a.attname ORDER BY u.place)
        FROM unnest(k.confkey) WITH ORDINALITY u(number, place)
        JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.number) AS target_columns
FROM pg_constraint k
JOIN pg_class c ON c.oid = k.confrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE k.contype = 'f' AND k.conparentid = 0 AND k.conrelid = ANY (%(oids)s::oid[])
ORDER BY k.conrelid, k.conname
"""

# Names its columns as ``_Index`` its fields.
# indkey counts from 0; a 0 in it is an expression; beyond indnkeyatts stand INCLUDEd columns.
_INDEXES = """
SELECT i.indrelid AS table, i.indisprimary AS is_primary, i.indisunique AS is_unique,
       i.indimmediate AS is_immediate, i.indisreplident AS is_identity,
       (SELECT array_agg(a.attname ORDER BY u.place)
        FROM unnest(i.indkey::int2[]) WITH ORDINALITY u(number, place)
        LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.number
        WHERE u.place <= i.indnkeyatts) AS columns
FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = ANY (%(oids)s::oid[]) AND i.indisvalid AND i.indpred IS NULL
ORDER BY i.indrelid, c.relname
"""

_TYPES = """
WITH RECURSIVE used(oid) AS (
  SELECT unnest(%(oids)s::oid[])
  UNION
  SELECT below.oid
  FROM used
  JOIN pg_type t ON t.oid = used.oid
  CROSS JOIN LATERAL (
    SELECT t.typelem AS oid WHERE t.typelem <> 0 AND t.typcategory = 'A'
    UNION ALL
    SELECT t.typbasetype WHERE t.typbasetype <> 0
    UNION ALL
    SELECT a.atttypid FROM pg_attribute a
    WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
  ) below
)
SELECT t.oid, n.nspname AS schema, t.typname AS name, t.typtype AS kind, t.typcategory AS category,
       CASE WHEN t.typcategory = 'A' THEN t.typelem ELSE 0 END AS element,
       t.typbasetype AS domain_of, a.names, a.types, t.typdelim AS delimiter,
       coalesce(e.extname, '') AS extension
FROM used
JOIN pg_type t USING (oid)
JOIN pg_namespace n ON n.oid = t.typnamespace
LEFT JOIN pg_depend d
  ON d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
LEFT JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND e.oid = d.refobjid
LEFT JOIN LATERAL (
  SELECT array_agg(a.attname ORDER BY a.attnum) AS names,
         array_agg(a.atttypid ORDER BY a.attnum) AS types
  FROM pg_attribute a
  WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
) a ON true
"""

_CatalogRow: TypeAlias = dict[str, Any]  # a row of pg_catalog, read once and left behind here
_T = TypeVar("_T")


async def read_catalog(
    connection: AsyncConnection[Any],
    *,
    schemas: Sequence[str] = (),
    names: Iterable[TableName] = (),
) -> Catalog:
    """Return all tables and views of the schemas, and those named, as of one moment.

    Names that don't exist are left out; partitions are read with their roots. The connection must
    have no open transaction.
    """
    named = tuple(names)
    async with connection.transaction():
        await connection.execute(_SNAPSHOT_SQL)
        await connection.execute(_SAFE_SEARCH_PATH_SQL)
        fetch = partial(_fetch, connection)
        tables = await fetch(
            _TABLES,
            schemas=list(schemas),
            name_schemas=[name.schema for name in named],
            names=[name.name for name in named],
            oids=[],
        )
        oids = sorted({oid for row in tables for oid in (row["oid"], *(row["leaves"] or ()))})
        leaves = await fetch(_TABLES, schemas=[], name_schemas=[], names=[], oids=oids)
        columns = await fetch(_COLUMNS, oids=oids)
        foreign_keys = await fetch(_FOREIGN_KEYS, oids=oids)
        indexes = await fetch(_INDEXES, oids=oids)
        types = await fetch(_TYPES, oids=sorted({row["type"] for row in columns}))
    parts = _TableDetails(
        columns=_group_by_table(columns, partial(_column, _type_lookup(types))),
        foreign_keys=_group_by_table(foreign_keys, _foreign_key),
        indexes=_group_by_table(indexes, lambda row: _Index(**row)),
        class_rows={row["oid"]: row for row in (*leaves, *tables)},
    )
    read = (_table(row, parts) for row in tables)
    return Catalog(
        tables={table.name: table for table in read},
        server_version=connection.info.server_version,
        server_encoding=connection.info.parameter_status("server_encoding") or "UTF8",
        schemas=tuple(schemas),
    )


async def _fetch(
    connection: AsyncConnection[Any], query: str, **parameters: object
) -> list[_CatalogRow]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, parameters)
        return await cursor.fetchall()


@dataclass(frozen=True, slots=True)
class _Index:
    columns: list[str | None]
    """None is an expression."""
    is_primary: bool
    is_unique: bool
    is_immediate: bool
    is_identity: bool

    @property
    def plain_columns(self) -> tuple[str, ...]:
        """All columns, if none is an expression; else nothing."""
        return () if None in self.columns else self.leading_columns

    @property
    def leading_columns(self) -> tuple[str, ...]:
        """The columns before the first expression."""
        return tuple(name for name in takewhile(bool, self.columns) if name is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TableDetails:
    """Columns, keys and indexes, by the table's oid."""

    columns: Mapping[int, tuple[Column, ...]]
    foreign_keys: Mapping[int, tuple[ForeignKey, ...]]
    indexes: Mapping[int, tuple[_Index, ...]]
    class_rows: Mapping[int, _CatalogRow]


def _group_by_table(
    rows: list[_CatalogRow], make: Callable[[_CatalogRow], _T]
) -> Mapping[int, tuple[_T, ...]]:
    groups: dict[int, list[_T]] = defaultdict(list)
    for row in rows:
        groups[row.pop("table")].append(make(row))
    return {oid: tuple(members) for oid, members in groups.items()}


def _type_lookup(rows: list[_CatalogRow]) -> Callable[[int], Type]:
    by_oid = {row["oid"]: row for row in rows}

    @cache
    def look_up(oid: int) -> Type:
        row = by_oid[oid]
        is_array = row["element"] != 0
        names, types = row["names"] or (), row["types"] or ()
        return Type(
            oid=oid,
            schema=row["schema"],
            name=row["name"],
            kind=TypeKind.ARRAY if is_array else TypeKind(row["kind"]),
            category=row["category"],
            element=look_up(row["element"]) if is_array else None,
            domain_of=look_up(row["domain_of"]) if row["domain_of"] else None,
            attributes=tuple((name, look_up(t)) for name, t in zip(names, types, strict=True)),
            delimiter=row["delimiter"],
            extension=row["extension"],
        )

    return look_up


def _column(type_of: Callable[[int], Type], row: _CatalogRow) -> Column:
    return Column(**{**row, "type": type_of(row["type"])})


def _foreign_key(row: _CatalogRow) -> ForeignKey:
    return ForeignKey(
        name=row["name"],
        column_names=tuple(row["columns"]),
        target=TableName(row["schema"], row["target"]),
        target_column_names=tuple(row["target_columns"]),
        is_validated=row["is_validated"],
    )


def _table(row: _CatalogRow, details: _TableDetails) -> Table:
    oid: int = row["oid"]
    indexes = details.indexes.get(oid, ())
    leaves = [details.class_rows[leaf] for leaf in row["leaves"] or ()]
    identity, identity_columns = _common_replica_identity(leaves or [row], details)
    return Table(
        oid=oid,
        name=TableName(row["schema"], row["name"]),
        kind=TableKind(row["kind"]),
        columns=details.columns.get(oid, ()),
        primary_key=next((index.plain_columns for index in indexes if index.is_primary), ()),
        foreign_keys=details.foreign_keys.get(oid, ()),
        unique_keys=tuple(
            index.plain_columns
            for index in indexes
            if index.is_unique and index.is_immediate and index.plain_columns
        ),
        index_prefixes=tuple(index.leading_columns for index in indexes if index.leading_columns),
        replica_identity=identity,
        replica_identity_columns=identity_columns,
        is_unlogged=any(part["is_unlogged"] for part in leaves or [row]),
        leaves=tuple(TableName(leaf["schema"], leaf["name"]) for leaf in leaves),
        partition_of=TableName(row["root_schema"], row["root_name"]) if row["root_name"] else None,
        partition_columns=tuple(row["partition_columns"]),
    )


def _common_replica_identity(
    tables: list[_CatalogRow], details: _TableDetails
) -> tuple[ReplicaIdentity, tuple[str, ...]]:
    """Return the replica identity and the columns that all of the tables log.

    Each partition has its own: ALTER TABLE on the root doesn't change it.
    """
    kinds = {ReplicaIdentity(table["replica_identity"]) for table in tables}
    logged = [_logged_columns(table, details) for table in tables]
    shared = tuple(name for name in logged[0] if all(name in columns for columns in logged))
    if ReplicaIdentity.NOTHING in kinds:
        return ReplicaIdentity.NOTHING, ()
    return kinds.pop() if len(kinds) == 1 else ReplicaIdentity.DEFAULT, shared


def _logged_columns(table: _CatalogRow, details: _TableDetails) -> tuple[str, ...]:
    indexes = details.indexes.get(table["oid"], ())
    match ReplicaIdentity(table["replica_identity"]):
        case ReplicaIdentity.NOTHING:
            return ()
        case ReplicaIdentity.FULL:
            return tuple(column.name for column in details.columns.get(table["oid"], ()))
        case ReplicaIdentity.INDEX:
            return next((index.plain_columns for index in indexes if index.is_identity), ())
        case ReplicaIdentity.DEFAULT:
            keys = (index for index in indexes if index.is_primary and index.is_immediate)
            return next((index.plain_columns for index in keys), ())
