"""Row images as relations of a statement, and related tables as they were before a transaction.

Used by every query about rows of the stream. The images are bound as arrays of text forms, which
are cast to the types of the table's columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

from sqlglot import exp

from pgrealtime.catalog.model import Column, Table
from pgrealtime.changes import Row, TableName
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql, TypedSql, all_of, negation, typed_column


def find_columns(table: Table, names: Iterable[str]) -> list[Column]:
    """Return the table's columns of these names, which it must have."""
    columns = map(table.find_column, names)
    return [column for column in columns if column is not None]


def images_table(table: Table, column_names: Collection[str]) -> tuple[Sql, str]:
    """Return the row images as a derived table, and the name of the column that numbers them.

    The others have the names and types of the table's columns.
    """
    raw, ordinal = "k", "ordinal"
    while ordinal in column_names:
        ordinal += "_"
    columns = find_columns(table, column_names)
    names = [f"c{i}" for i in range(len(columns))]
    select = nodes.select(
        [nodes.column(raw, ordinal), *typed_columns(raw, names, columns)],
        unnest_arrays(raw, {"i": "int", **dict.fromkeys(names, "text")}, [ordinal, *names]),
    )
    return exp.Subquery(this=select, alias=nodes.row_alias(ROW_ALIAS)), ordinal


def image_params(rows: Iterable[Sequence[str | None]]) -> dict[str, object]:
    """Return the parameters that hold the row images, numbered from 0."""
    rows = list(rows)
    params: dict[str, object] = {"i": list(range(len(rows)))}
    for i, texts in enumerate(zip(*rows, strict=True)):
        params[f"c{i}"] = list(texts)
    return params


def matching_rows_sql(
    table: Table, column_names: Collection[str], condition: Sql, ctes: Sequence[exp.CTE] = ()
) -> str:
    """Return the statement for the numbers of the row images that meet the condition."""
    rows, ordinal = images_table(table, column_names)
    select = nodes.select([nodes.column(ROW_ALIAS, ordinal)], rows, where=condition)
    return nodes.to_text(select, ctes)


def distinct_values(
    select: exp.Select, limit: Sql, names: Sequence[str], rows: Sql, ordinals: Sequence[Sql] = ()
) -> exp.Select:
    """Return the distinct results that a SELECT has for each row, at most ``limit`` of one row.

    ``names`` are those of its columns; ``ordinals`` are put before them. The SELECT is used up.
    """
    select.set("distinct", exp.Distinct())
    select.set("limit", exp.Limit(expression=limit))
    found = exp.Lateral(this=exp.Subquery(this=select), alias=nodes.row_alias("found", *names))
    columns = [nodes.column("found", name) for name in names]
    return nodes.select([*ordinals, *columns], rows, joins=[exp.Join(this=found, kind="CROSS")])


def unnest_arrays(
    alias: str, element_types: Mapping[str, str], names: Sequence[str] | None = None
) -> Sql:
    """Return ``UNNEST(...)``: the arrays of these placeholders as the columns of a relation.

    The columns have the placeholders' names if they are given no others.
    """
    arrays = [
        nodes.cast(nodes.placeholder(key), f"{type_}[]") for key, type_ in element_types.items()
    ]
    return exp.Unnest(expressions=arrays, alias=nodes.row_alias(alias, *(names or element_types)))


def typed_columns(alias: str, names: Sequence[str], columns: Sequence[Column]) -> list[Sql]:
    """Return a relation's text forms as columns: cast to their types and named like them."""
    return [
        exp.Alias(
            this=nodes.cast_to_type(nodes.column(alias, name), column.type),
            alias=nodes.quoted_name(column.name),
        )
        for name, column in zip(names, columns, strict=True)
    ]


# --- related tables before a transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A related table as it was before a transaction, which rules on deletes are evaluated against.

    The table is read without the rows that the transaction changed, and with their old images.
    """

    table: Table
    old_images: Sequence[Row]
    """The first old image of each row that the transaction updated or deleted, as far as it is
    known; an empty one represents the rows that a TRUNCATE removed."""
    changed_rows: Sequence[Row]
    """Those rows and the inserted ones, with the columns of the primary key at least."""
    _cache: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    """What is computed of the images, once for all batches of the transaction."""

    def has_columns(self, columns: Iterable[str]) -> bool:
        """Return whether every old image has these columns, and every changed row its whole key."""
        keys = self.table.primary_key
        if "keys" not in self._cache:
            self._cache["keys"] = all(key in row for row in self.changed_rows for key in keys)
        for column in columns:
            if ("has", column) not in self._cache:
                self._cache["has", column] = all(column in row for row in self.old_images)
        return bool(self._cache["keys"]) and all(self._cache["has", name] for name in columns)

    @property
    def was_truncated(self) -> bool:
        """Whether the table was truncated, so that not all old rows have images."""
        if "emptied" not in self._cache:
            self._cache["emptied"] = not all(self.old_images)
        return bool(self._cache["emptied"])

    def old_images_by(self, column: str) -> Mapping[str | None, Sequence[Row]]:
        """Return the old images by the text of a column, which all must have."""
        return self._rows_by("old_images", self.old_images, column)

    def changed_rows_by(self, column: str) -> Mapping[str | None, Sequence[Row]]:
        """Return the changed rows by the text of a column of the primary key."""
        return self._rows_by("changed_rows", self.changed_rows, column)

    def _rows_by(
        self, what: str, rows: Sequence[Row], column: str
    ) -> Mapping[str | None, Sequence[Row]]:
        known: dict[str | None, list[Row]] | None = self._cache.get((what, column))
        if known is None:
            known = self._cache[what, column] = {}
            for row in rows:
                known.setdefault(row[column], []).append(row)
        return known


@dataclass(frozen=True, slots=True)
class RowImages:
    """The row images that a statement evaluates, with the columns that it reads of them."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str | None]]


def with_overlays(
    conditions: Sequence[Sql],
    overlays: Sequence[Overlay],
    params: dict[str, object],
    row_images: RowImages | None = None,
) -> tuple[list[Sql], list[exp.CTE]] | None:
    """Return conditions that read related tables as they were, and the CTEs that they read.

    The old images are added to ``params``; if ``row_images`` are given, only those that they can
    reach. None if an old image lacks a column that is read, or the keys aren't known.
    """
    columns_read = [_columns_read(conditions, overlay.table) for overlay in overlays]
    for overlay, read in zip(overlays, columns_read, strict=True):
        table = overlay.table
        is_keyed = bool(table.primary_key) or not _table_aliases(conditions, table.name)
        if not is_keyed or not overlay.has_columns([column.name for column in read]):
            return None
    reachable = None if row_images is None else _ReachableRows(conditions, overlays, row_images)
    names: dict[TableName, str] = {}
    views: list[exp.CTE] = []
    for index, (overlay, read) in enumerate(zip(overlays, columns_read, strict=True)):
        if read:
            names[overlay.table.name] = f"before{index}"
            restricted = overlay if reachable is None else reachable.restrict(overlay)
            views.append(_overlay_cte(f"before{index}", restricted, read, params))
    return [_redirect_tables(condition, names) for condition in conditions], views


def _table_aliases(conditions: Sequence[Sql], table: TableName) -> set[str]:
    return {
        node.alias
        for condition in conditions
        for node in condition.find_all(exp.Table)
        if nodes.names_table(node, table)
    }


def _name(name: str) -> str:
    """Return a name as nodes have it."""
    return nodes.quoted_name(name).name


def _columns_read(conditions: Sequence[Sql], table: Table) -> list[Column]:
    aliases = _table_aliases(conditions, table.name)
    read = {
        node.name
        for condition in conditions
        for node in condition.find_all(exp.Column)
        if node.table in aliases
    }
    return [column for column in table.columns if _name(column.name) in read]


_TEXT_COMPARABLE_TYPES = (
    frozenset({"int2", "int4", "int8"}),
    frozenset({"text", "varchar"}),
    {"uuid"},
)
"""Types whose values are equal if and only if their text forms are."""


class _ReachableRows:
    """The rows of related tables that the row images can reach over joins by equal ids.

    PostgreSQL scans all old images for each row image. If each batch of a transaction got the old
    images of the whole transaction, a large DELETE would take time by the square of its rows.
    """

    def __init__(
        self, conditions: Sequence[Sql], overlays: Sequence[Overlay], row_images: RowImages
    ) -> None:
        self._row_images = row_images
        self._overlays: dict[str, Overlay] = {}
        self._aliases: dict[TableName, set[str]] = {}
        for overlay in overlays:
            name = overlay.table.name
            self._aliases[name] = _table_aliases(conditions, name)
            self._overlays |= dict.fromkeys(self._aliases[name], overlay)
        self._join_equalities: dict[str, tuple[str, str, str] | None] = {}
        for condition in conditions:
            for node in condition.find_all(exp.Table):
                if node.alias in self._overlays:
                    link = _join_equality(node)
                    known = self._join_equalities.setdefault(node.alias, link)
                    self._join_equalities[node.alias] = link if link == known else None

    def restrict(self, overlay: Overlay) -> Overlay:
        """Return the overlay with the images that can be reached; with all if that isn't known."""
        old_images: dict[int, Row] = {}
        changed_rows: dict[int, Row] | None = {}
        for alias in self._aliases[overlay.table.name]:
            reachable = self._reachable_values(alias)
            if reachable is None:
                return overlay
            column, values = reachable
            old_images |= _rows_of(overlay.old_images_by(column), values)
            if column not in overlay.table.primary_key:
                changed_rows = None  # a live row of any key can have the value by now
            elif changed_rows is not None:
                changed_rows |= _rows_of(overlay.changed_rows_by(column), values)
        images = list(old_images.values())
        changed = overlay.changed_rows if changed_rows is None else list(changed_rows.values())
        return replace(overlay, old_images=images, changed_rows=changed, _cache={})

    def _reachable_values(self, alias: str) -> tuple[str, AbstractSet[str]] | None:
        """Return the column that a table is joined by, and all values that it can have."""
        link = self._join_equalities.get(alias)
        if link is None:
            return None
        own_name, source, source_name = link
        own = _find_column(self._overlays[alias].table.columns, own_name)
        source_values = self._column_values(source, source_name)
        if own is None or source_values is None:
            return None
        column, values = source_values
        return (own.name, values) if _is_equal_by_text(own, column) else None

    def _column_values(self, alias: str, name: str) -> tuple[Column, AbstractSet[str]] | None:
        """Return a column, and all values that it can have in the rows of that alias."""
        if alias == _name(ROW_ALIAS):
            for index, column in enumerate(self._row_images.columns):
                if _name(column.name) == name:
                    cells = (row[index] for row in self._row_images.rows)
                    return column, {text for text in cells if text is not None}
            return None
        overlay = self._overlays.get(alias)
        key_values = None if overlay is None else self._reachable_values(alias)
        if overlay is None or key_values is None:
            return None
        key, values = key_values
        wanted = _find_column(overlay.table.columns, name)
        if wanted is None or overlay.table.primary_key != (key,):
            return None
        if not values <= overlay.changed_rows_by(key).keys():
            return None  # rows that the transaction didn't change are reached too
        rows = _rows_of(overlay.old_images_by(key), values).values()
        return wanted, {text for row in rows if (text := row[wanted.name]) is not None}


def _rows_of(
    rows_by_value: Mapping[str | None, Sequence[Row]], values: Iterable[str]
) -> dict[int, Row]:
    """Return the rows that have one of the values, by identity."""
    return {id(row): row for value in values for row in rows_by_value.get(value, ())}


def _join_equality(table: exp.Table) -> tuple[str, str, str] | None:
    """Return the column by which a table is joined, and the alias and column that it equals."""
    join = table.parent
    on = join.args.get("on") if isinstance(join, exp.Join) and join.this is table else None
    equality = None if on is None else on.unnest()
    if not isinstance(equality, exp.EQ):
        return None
    left, right = equality.this.unnest(), equality.expression.unnest()
    if not (isinstance(left, exp.Column) and isinstance(right, exp.Column)):
        return None
    if left.table != table.alias:
        left, right = right, left
    if left.table != table.alias or right.table == table.alias:
        return None
    return left.name, right.table, right.name


def _find_column(columns: Iterable[Column], name: str) -> Column | None:
    return next((column for column in columns if _name(column.name) == name), None)


def _is_equal_by_text(left: Column, right: Column) -> bool:
    types = left.type.base, right.type.base
    return (
        left.is_deterministic
        and right.is_deterministic
        and all(type_.schema == "pg_catalog" for type_ in types)
        and any({type_.name for type_ in types} <= family for family in _TEXT_COMPARABLE_TYPES)
    )


def _redirect_tables(condition: Sql, names: Mapping[TableName, str]) -> Sql:
    copied = condition.copy()
    for node in list(copied.find_all(exp.Table)):
        named = (name for table, name in names.items() if nodes.names_table(node, table))
        if (name := next(named, None)) is not None:
            alias = nodes.row_alias(node.alias)
            node.replace(exp.Table(this=nodes.quoted_name(name), alias=alias))
    return copied


def _overlay_cte(
    name: str, overlay: Overlay, columns: Sequence[Column], params: dict[str, object]
) -> exp.CTE:
    """Return the table as it was, and add the old images to the statement's parameters."""
    column_names = [f"{name}_c{i}" for i in range(len(columns))]
    for key, column in zip(column_names, columns, strict=True):
        params[key] = [row[column.name] for row in overlay.old_images]
    old = nodes.select(
        typed_columns("k", column_names, columns),
        unnest_arrays("k", dict.fromkeys(column_names, "text")),
    )
    unchanged = nodes.select(
        [nodes.column("t", column.name) for column in columns],
        nodes.table(overlay.table, "t"),
        where=negation(_is_changed_row(name, overlay, params)),
    )
    union = exp.Union(this=old, expression=unchanged, distinct=False)
    # Never materialized, so that the indexes of the live table can be used.
    return exp.CTE(this=union, alias=nodes.row_alias(name), materialized=False)


def _is_changed_row(name: str, overlay: Overlay, params: dict[str, object]) -> Sql:
    """Return whether the row ``t`` of the live table is one that the transaction changed."""
    keys = find_columns(overlay.table, overlay.table.primary_key)
    key_names = [f"{name}_k{i}" for i in range(len(keys))]
    equalities: list[Sql] = []
    for key_name, column in zip(key_names, keys, strict=True):
        params[key_name] = [row[column.name] for row in overlay.changed_rows]
        key = TypedSql(nodes.cast_to_type(nodes.column("g", key_name), column.type), column.type)
        equalities.append(nodes.equal_keys(typed_column("t", column), key))
    changed = unnest_arrays("g", dict.fromkeys(key_names, "text"))
    return nodes.exists(changed, all_of(*equalities))
