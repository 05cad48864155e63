"""Finds the table and the key column of each configured collection, and reports what is wrong.

The first step of ``build``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pgrealtime.catalog.model import Catalog, Column, ReplicaIdentity, Table, TableKind
from pgrealtime.catalog.record_ids import with_digest_id, with_joined_id
from pgrealtime.changes import (
    DIGEST,
    RECORD_ID_COLUMN,
    TableName,
    quote_identifier,
    quote_table_name,
)
from pgrealtime.collections.names import candidate_tables, is_table_name
from pgrealtime.config.model import CollectionConfig
from pgrealtime.errors import ConfigProblem
from pgrealtime.spelling import did_you_mean

_UNSTREAMED_TABLE_KINDS = {
    TableKind.VIEW: "a view",
    TableKind.MATERIALIZED_VIEW: "a materialized view",
    TableKind.FOREIGN: "a foreign table",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedTable:
    """A configured collection whose table and key are known."""

    name: str
    config: CollectionConfig
    table: Table
    key: Column
    """The column shown as ``id``."""

    @property
    def is_auth(self) -> bool:
        """Whether its records are accounts."""
        return self.config.type == "auth"

    def problem(self, key: str, message: str, hint: str = "") -> ConfigProblem:
        """Return a problem of one of the collection's keys, such as ``fields.hide``."""
        return ConfigProblem(f"collections.{self.name}.{key}", message, hint)

    def is_included(self, column: Column) -> bool:
        """Whether the column is a field."""
        include = self.config.fields.include
        return "*" in include or column.name in include or column == self.key

    @property
    def key_relation_name(self) -> str | None:
        """The name under which the key is a relation, if it is one; None if it has none.

        That of its column, which may be renamed: the field ``id`` is a text.
        """
        column, fields = self.key, self.config.fields
        name = fields.rename.get(column.name, column.name)
        is_shown = "*" in fields.include or column.name in fields.include
        return name if is_shown and name != "id" and not column.id_sources else None

    def field_name(self, column: Column) -> str:
        """Return the name of the column's field."""
        if column == self.key:
            return "id"
        name = column.name
        has_own_column = self.table.find_column("emailVisibility") is not None
        if self.is_auth and name == "email_visibility" and not has_own_column:
            name = "emailVisibility"
        return self.config.fields.rename.get(column.name, name)


def resolve_tables(
    configured: Mapping[str, CollectionConfig], catalog: Catalog, problems: list[ConfigProblem]
) -> Mapping[str, ResolvedTable]:
    """Return the collections whose table and key are found; append every problem to the list."""
    tables = {
        name: resolved
        for name, config in configured.items()
        if (resolved := _resolve_table(name, config, catalog, problems)) is not None
    }
    problems += _duplicate_table_problems(tables.values())
    return tables


def _resolve_table(
    name: str, config: CollectionConfig, catalog: Catalog, problems: list[ConfigProblem]
) -> ResolvedTable | None:
    path = f"collections.{name}"
    table = find_table(config.table, catalog)
    if isinstance(table, ConfigProblem):
        if is_table_name(config.table):  # otherwise check_names reports it
            problems.append(replace(table, path=f"{path}.table"))
        return None
    table_problems = list(_table_problems(table, config, path)) if config.stream else []
    table, key = _find_key(table, config, path)
    if isinstance(key, Column):
        find_key_problems = _key_problems if config.stream else _read_key_problems
        problems += table_problems or find_key_problems(table, key, path)
        return ResolvedTable(name=name, config=config, table=table, key=key)
    problems += table_problems or [key]
    return None


def find_table(text: str, catalog: Catalog) -> Table | ConfigProblem:
    """Return the table that a text names, or a problem without path."""
    schemas = catalog.schemas or tuple(dict.fromkeys(name.schema for name in catalog.tables))
    candidates = candidate_tables(text, schemas)
    for name in candidates:
        if name in catalog.tables:
            return catalog.tables[name]
    known = {table.name: str(table) for table in catalog.tables}
    hint = did_you_mean(text, known.values())
    if not hint and candidates:
        hint = did_you_mean(candidates[0].name, known)
    return ConfigProblem("", f'there is no table "{text}"', hint)


def unknown_column_problem(path: str, table: Table, name: str) -> ConfigProblem:
    """Return the problem that a table lacks a column, with the nearest name as hint."""
    hint = did_you_mean(name, (column.name for column in table.columns))
    return ConfigProblem(path, f'there is no column "{name}" in "{table.name}"', hint)


def _table_problems(table: Table, config: CollectionConfig, path: str) -> Iterator[ConfigProblem]:
    """Yield why the stream would lack changes of the table, with the SQL that fixes it."""
    name, path = table.name, f"{path}.table"
    if table.kind in _UNSTREAMED_TABLE_KINDS:
        kind = _UNSTREAMED_TABLE_KINDS[table.kind]
        hint = "set stream: false to read it only"
        yield ConfigProblem(path, f'"{name}" is {kind}: it sends no changes', hint)
        return
    if table.partition_of is not None:
        root = table.partition_of
        yield ConfigProblem(path, f'"{name}" is a partition of "{root}"', f"set table: {root}")
        return
    if table.is_unlogged:
        hint = alter_leaf_tables(table, "SET LOGGED")
        yield ConfigProblem(path, f'"{name}" is unlogged: it sends no changes', hint)
    if table.replica_identity is ReplicaIdentity.NOTHING and config.id != DIGEST:
        message = f'"{name}" has REPLICA IDENTITY NOTHING: its updates and deletes name no row'
        yield ConfigProblem(path, message, alter_leaf_tables(table, "REPLICA IDENTITY DEFAULT"))


def alter_leaf_tables(table: Table, action: str) -> str:
    """Return the SQL that alters every table that holds the rows."""
    names = table.leaves or [table.name]
    return " ".join(f"ALTER TABLE {quote_table_name(name)} {action};" for name in names)


def _find_key(
    table: Table, config: CollectionConfig, path: str
) -> tuple[Table, Column | ConfigProblem]:
    """Return the column shown as ``id``: the configured one, or the primary key.

    Of a primary key of several columns the id is computed, as one more column of the table.
    """
    if config.id == DIGEST:
        if table.primary_key:
            message = f'"{table.name}" has a primary key'
            return table, ConfigProblem(f"{path}.id", message, "leave id empty")
        if not (shown := _shown_columns(table, config)):
            message = "it is made of the columns that are shown, and there are none"
            return table, ConfigProblem(f"{path}.id", message)
        table = with_digest_id(table, shown)
        assert table.id_column is not None
        return table, table.id_column
    if config.id:
        column = table.find_column(config.id)
        return table, column or unknown_column_problem(f"{path}.id", table, config.id)
    names = table.primary_key
    if len(names) == 1 and (column := table.find_column(names[0])) is not None:
        return table, column
    if table.kind in _UNSTREAMED_TABLE_KINDS:
        message = f'"{table.name}" is {_UNSTREAMED_TABLE_KINDS[table.kind]}, which has no key'
        return table, ConfigProblem(f"{path}.id", message, "set id to a column that is unique")
    if names and table.find_column(RECORD_ID_COLUMN) is None:
        table = with_joined_id(table, names)
        assert table.id_column is not None
        return table, table.id_column
    if names:
        message = f'its column "{RECORD_ID_COLUMN}" has the name of the id of several columns'
        return table, ConfigProblem(f"{path}.id", message, "set id to a column, or rename that one")
    message = (
        f'"{table.name}" has no primary key: its updates and deletes name no row'
        ' (id: "*" sends its creates alone)'
    )
    alter = f"ALTER TABLE {quote_table_name(table.name)} {_key_to_add(table)};"
    return table, ConfigProblem(f"{path}.table", message, alter)


def _shown_columns(table: Table, config: CollectionConfig) -> list[str]:
    """Return the columns that everybody sees of a record, without generated ones.

    A digest of hidden values, which everybody sees, would let one try which they are.
    """
    fields = config.fields
    return [
        column.name
        for column in table.columns
        if not column.is_generated
        and ("*" in fields.include or column.name in fields.include)
        and fields.rename.get(column.name, column.name) not in fields.hide
    ]


def _key_to_add(table: Table) -> str:
    unique = next((names[0] for names in table.unique_keys if len(names) == 1), None)
    if unique is not None or table.find_column("id") is not None:
        return f"ADD PRIMARY KEY ({quote_identifier(unique or 'id')})"
    return 'ADD COLUMN "id" bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY'


def _key_problems(table: Table, key: Column, path: str) -> list[ConfigProblem]:
    """Return why the key doesn't identify one row, or isn't logged of a deleted one."""
    path = f"{path}.id"
    if key.id_sources:
        if key.is_digest or key.name in table.replica_identity_columns:
            return []
        names = ", ".join(key.id_sources)
        message = f'the replica identity of "{table.name}" lacks a part of its key: {names}'
        hint = alter_leaf_tables(table, "REPLICA IDENTITY FULL")
        return [ConfigProblem(path, f"{message}: deletes would not identify the record", hint)]
    alter, column = f"ALTER TABLE {quote_table_name(table.name)}", quote_identifier(key.name)
    if (key.name,) not in table.unique_keys and not table.is_unique_but_for_partitions(key.name):
        message = f'column "{key.name}" is not unique by itself'
        return [ConfigProblem(path, message, f"{alter} ADD UNIQUE ({column});")]
    if not key.not_null:
        hint = f"{alter} ALTER COLUMN {column} SET NOT NULL;"
        return [ConfigProblem(path, f'column "{key.name}" may be NULL', hint)]
    if key.name not in table.replica_identity_columns:
        message = f'the replica identity of "{table.name}" lacks "{key.name}"'
        hint = alter_leaf_tables(table, "REPLICA IDENTITY FULL")
        return [ConfigProblem(path, f"{message}: deletes would not identify the record", hint)]
    return []


def _read_key_problems(table: Table, key: Column, path: str) -> list[ConfigProblem]:
    """Return why the key doesn't identify one row of a collection that is read only.

    A view has no constraints, so its key is taken on trust.
    """
    if table.kind in _UNSTREAMED_TABLE_KINDS or key.id_sources or (key.name,) in table.unique_keys:
        return []
    is_partitioned = table.kind is TableKind.PARTITIONED
    if is_partitioned and any(key.name in names for names in table.unique_keys):
        return []  # unique in fact: PostgreSQL forces the partition key into the constraint
    message = f'column "{key.name}" is not unique by itself'
    hint = f"ALTER TABLE {quote_table_name(table.name)} ADD UNIQUE ({quote_identifier(key.name)});"
    return [ConfigProblem(f"{path}.id", message, hint)]


def _duplicate_table_problems(resolved_tables: Iterable[ResolvedTable]) -> Iterator[ConfigProblem]:
    first: dict[TableName, str] = {}
    for resolved in resolved_tables:
        name = resolved.table.name
        if name in first:
            yield resolved.problem("table", f'collection "{first[name]}" shows "{name}" already')
        first.setdefault(name, resolved.name)
