"""Row images as relations of a statement: the rows that are judged, and related ones as they were.

Used by whatever asks Postgres about rows of the stream. Values are text forms, cast to the types
that the table's columns have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlglot import exp

from pgrealtime.catalog.model import Column, Table
from pgrealtime.changes import Row, TableName
from pgrealtime.rules import sql
from pgrealtime.rules.lower import ROW
from pgrealtime.rules.sql import Sql, Typed, all_of, negation, typed_column


def columns_of(table: Table, names: Iterable[str]) -> list[Column]:
    """Return the table's columns of these names, which it must have."""
    columns = [table.column(name) for name in names]
    return [column for column in columns if column is not None]


def free_name(taken: Collection[str]) -> str:
    """Return a name for the ordinal that no column has."""
    name = "ordinal"
    while name in taken:
        name += "_"
    return name


def images(columns: Sequence[Column], ordinal: str) -> Sql:
    """Return the row images as a derived table with the names and types of the table's columns."""
    raw = "k"
    names = [f"c{at}" for at in range(len(columns))]
    select = exp.Select(
        expressions=[sql.column(raw, ordinal), *typed(raw, names, columns)],
        from_=exp.From(this=unnested(raw, [ordinal, *names], [numbers("i"), *arrays(names)])),
    )
    return exp.Subquery(this=select, alias=exp.TableAlias(this=sql.name(ROW)))


def unnested(alias: str, names: Sequence[str], given: Sequence[Sql]) -> Sql:
    """Return arrays side by side as the columns of a relation."""
    columns = [sql.name(name) for name in names]
    return exp.Unnest(
        expressions=list(given), alias=exp.TableAlias(this=sql.name(alias), columns=columns)
    )


def typed(raw: str, names: Sequence[str], columns: Sequence[Column]) -> list[Sql]:
    """Return texts of a relation as the columns that they are text forms of."""
    return [
        exp.Alias(this=sql.typed(sql.column(raw, name), column.type), alias=sql.name(column.name))
        for name, column in zip(names, columns, strict=True)
    ]


def numbers(name: str) -> Sql:
    """Return the placeholder of an array of integers."""
    return sql.cast(sql.placeholder(name), "int[]")


def arrays(names: Sequence[str]) -> list[Sql]:
    """Return the placeholders of arrays of texts."""
    return [sql.cast(sql.placeholder(name), "text[]") for name in names]


# --- related tables as they were


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A related table as it was before a transaction: what a delete is judged against."""

    table: Table
    before: Sequence[Row]
    """The first old image of each row that the transaction updated or deleted, whole."""
    touched: Sequence[Row]
    """Those rows and the inserted ones, the primary key's columns at least: not to be read live."""


def before(
    conditions: Sequence[Sql], overlays: Sequence[Overlay], params: dict[str, object]
) -> tuple[list[Sql], list[exp.CTE]] | None:
    """Return the conditions reading related tables as they were, and the relations they read.

    Args:
        conditions: Conditions of one statement.
        overlays: The tables that a transaction touched.
        params: Of the statement; the old images are added.

    Returns:
        None if an old image lacks a column that is read.
    """
    if not all(_covers(overlay, conditions) for overlay in overlays):
        return None
    names: dict[TableName, str] = {}
    views: list[exp.CTE] = []
    for index, overlay in enumerate(overlays):
        if read := _columns_read(conditions, overlay.table):
            names[overlay.table.name] = f"before{index}"
            views.append(_view(f"before{index}", overlay, read, params))
    return [_redirected(condition, names) for condition in conditions], views


def _rows_of(conditions: Sequence[Sql], table: TableName) -> set[str]:
    """Return the aliases under which the conditions read the table."""
    name, schema = sql.name(table.name).name, sql.name(table.schema).name
    return {
        node.alias
        for condition in conditions
        for node in condition.find_all(exp.Table)
        if (node.name, node.db) == (name, schema)
    }


def _columns_read(conditions: Sequence[Sql], table: Table) -> list[Column]:
    """Return the columns of the table that the conditions read."""
    aliases = _rows_of(conditions, table.name)
    read = {
        node.name
        for condition in conditions
        for node in condition.find_all(exp.Column)
        if node.table in aliases
    }
    return [column for column in table.columns if sql.name(column.name).name in read]


def _covers(overlay: Overlay, conditions: Sequence[Sql]) -> bool:
    """Whether the old images hold all that is read, and the keys are known."""
    read = _columns_read(conditions, overlay.table)
    return (bool(overlay.table.primary_key) or not _rows_of(conditions, overlay.table.name)) and (
        all(column.name in row for row in overlay.before for column in read)
        and all(key in row for row in overlay.touched for key in overlay.table.primary_key)
    )


def _redirected(condition: Sql, names: Mapping[TableName, str]) -> Sql:
    """Return the condition reading other relations in place of some tables."""
    copied = condition.copy()
    wanted = {
        (sql.name(table.name).name, sql.name(table.schema).name): name
        for table, name in names.items()
    }
    for node in list(copied.find_all(exp.Table)):
        name = wanted.get((node.name, node.db))
        if name is not None:
            alias = exp.TableAlias(this=sql.name(node.alias))
            node.replace(exp.Table(this=sql.name(name), alias=alias))
    return copied


def _view(
    name: str, overlay: Overlay, columns: Sequence[Column], params: dict[str, object]
) -> exp.CTE:
    """Return the table as it was, and put the old images into the statement's parameters."""
    keys = columns_of(overlay.table, overlay.table.primary_key)
    old_names = [f"{name}_c{at}" for at in range(len(columns))]
    key_names = [f"{name}_k{at}" for at in range(len(keys))]
    for key, column in zip(old_names, columns, strict=True):
        params[key] = [row[column.name] for row in overlay.before]
    for key, column in zip(key_names, keys, strict=True):
        params[key] = [row[column.name] for row in overlay.touched]
    old = exp.Select(
        expressions=typed("k", old_names, columns),
        from_=exp.From(this=unnested("k", old_names, arrays(old_names))),
    )
    is_touched = exp.Select(
        expressions=[sql.number(1)],
        from_=exp.From(this=unnested("g", key_names, arrays(key_names))),
        where=exp.Where(
            this=all_of(
                *(
                    sql.equal_keys(
                        typed_column("t", column),
                        Typed(sql.typed(sql.column("g", key), column.type), column.type),
                    )
                    for key, column in zip(key_names, keys, strict=True)
                )
            )
        ),
    )
    live = exp.Select(
        expressions=[sql.column("t", column.name) for column in columns],
        from_=exp.From(this=sql.table(overlay.table.name, "t")),
        where=exp.Where(this=negation(exp.Exists(this=is_touched))),
    )
    union = exp.Union(this=old, expression=live, distinct=False)
    # Not computed whole, whatever the number of its uses: the indexes of the table serve it.
    return exp.CTE(this=union, alias=exp.TableAlias(this=sql.name(name)), materialized=False)
