"""Row images as relations of a statement: the rows that are judged, and related ones as they were.

Used by whatever asks Postgres about rows of the stream. Values are text forms, cast to the types
that the table's columns have.
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
    columns = [table.find_column(name) for name in names]
    return [column for column in columns if column is not None]


def unused_column_name(column_names: Collection[str]) -> str:
    """Return a name for the ordinal that no column has."""
    name = "ordinal"
    while name in column_names:
        name += "_"
    return name


def images_table(columns: Sequence[Column], ordinal: str) -> Sql:
    """Return the row images as a derived table with the names and types of the table's columns."""
    raw = "k"
    names = [f"c{at}" for at in range(len(columns))]
    select = exp.Select(
        expressions=[nodes.column(raw, ordinal), *typed_columns(raw, names, columns)],
        from_=exp.From(
            this=unnest_arrays(raw, [ordinal, *names], [integer_array("i"), *text_arrays(names)])
        ),
    )
    return exp.Subquery(this=select, alias=exp.TableAlias(this=nodes.quoted_name(ROW_ALIAS)))


def unnest_arrays(alias: str, names: Sequence[str], arrays: Sequence[Sql]) -> Sql:
    """Return arrays side by side as the columns of a relation."""
    columns = [nodes.quoted_name(name) for name in names]
    return exp.Unnest(
        expressions=list(arrays),
        alias=exp.TableAlias(this=nodes.quoted_name(alias), columns=columns),
    )


def typed_columns(alias: str, names: Sequence[str], columns: Sequence[Column]) -> list[Sql]:
    """Return texts of a relation as the columns that they are text forms of."""
    return [
        exp.Alias(
            this=nodes.cast_to_type(nodes.column(alias, name), column.type),
            alias=nodes.quoted_name(column.name),
        )
        for name, column in zip(names, columns, strict=True)
    ]


def integer_array(name: str) -> Sql:
    """Return the placeholder of an array of integers."""
    return nodes.cast(nodes.placeholder(name), "int[]")


def text_arrays(names: Sequence[str]) -> list[Sql]:
    """Return the placeholders of arrays of texts."""
    return [nodes.cast(nodes.placeholder(name), "text[]") for name in names]


# --- related tables as they were


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A related table as it was before a transaction: what a delete is judged against."""

    table: Table
    old_images: Sequence[Row]
    """The first old image of each row that the transaction updated or deleted, as far as it is
    known; an empty one stands for the rows that a TRUNCATE took."""
    changed_rows: Sequence[Row]
    """Those rows and the inserted ones, the primary key's columns at least: not to be read live."""
    _cache: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was worked out of the images, once for all batches of the transaction."""

    def has_columns(self, columns: Iterable[str]) -> bool:
        """Whether every old image has these columns, and every key is whole."""
        keys = self.table.primary_key
        if "keys" not in self._cache:
            self._cache["keys"] = all(key in row for row in self.changed_rows for key in keys)
        for column in columns:
            if ("has", column) not in self._cache:
                self._cache["has", column] = all(column in row for row in self.old_images)
        return bool(self._cache["keys"]) and all(self._cache["has", name] for name in columns)

    @property
    def was_truncated(self) -> bool:
        """Whether the table was truncated: rows of which there is no image were there before."""
        if "emptied" not in self._cache:
            self._cache["emptied"] = not all(self.old_images)
        return bool(self._cache["emptied"])

    def old_images_by(self, column: str) -> Mapping[str | None, Sequence[Row]]:
        """Return the old images by the text of a column that all have."""
        return self._rows_by("before", self.old_images, column)

    def changed_rows_by(self, column: str) -> Mapping[str | None, Sequence[Row]]:
        """Return the touched rows by the text of a column of the key."""
        return self._rows_by("touched", self.changed_rows, column)

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
    """The rows that a statement judges, by the columns that it reads of them."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str | None]]


def with_overlays(
    conditions: Sequence[Sql],
    overlays: Sequence[Overlay],
    params: dict[str, object],
    row_images: RowImages | None = None,
) -> tuple[list[Sql], list[exp.CTE]] | None:
    """Return the conditions reading related tables as they were, and the relations they read.

    Args:
        conditions: Conditions of one statement.
        overlays: The tables that a transaction touched.
        params: Of the statement; the old images are added.
        row_images: The rows; only old images that they can reach are added then.

    Returns:
        None if an old image lacks a column that is read.
    """
    if not all(_covers(overlay, conditions) for overlay in overlays):
        return None
    reach = None if row_images is None else _ReachableRows(conditions, overlays, row_images)
    names: dict[TableName, str] = {}
    views: list[exp.CTE] = []
    for index, overlay in enumerate(overlays):
        if read := _columns_read(conditions, overlay.table):
            names[overlay.table.name] = f"before{index}"
            near = overlay if reach is None else reach.restrict(overlay)
            views.append(_overlay_cte(f"before{index}", near, read, params))
    return [_redirect_tables(condition, names) for condition in conditions], views


def _table_aliases(conditions: Sequence[Sql], table: TableName) -> set[str]:
    """Return the aliases under which the conditions read the table."""
    name, schema = nodes.quoted_name(table.name).name, nodes.quoted_name(table.schema).name
    return {
        node.alias
        for condition in conditions
        for node in condition.find_all(exp.Table)
        if (node.name, node.db) == (name, schema)
    }


def _columns_read(conditions: Sequence[Sql], table: Table) -> list[Column]:
    """Return the columns of the table that the conditions read."""
    aliases = _table_aliases(conditions, table.name)
    read = {
        node.name
        for condition in conditions
        for node in condition.find_all(exp.Column)
        if node.table in aliases
    }
    return [column for column in table.columns if nodes.quoted_name(column.name).name in read]


def _covers(overlay: Overlay, conditions: Sequence[Sql]) -> bool:
    """Whether the old images hold all that is read, and the keys are known."""
    read = _columns_read(conditions, overlay.table)
    is_keyed = bool(overlay.table.primary_key) or not _table_aliases(conditions, overlay.table.name)
    return is_keyed and overlay.has_columns([column.name for column in read])


_TEXT_COMPARABLE_TYPES = (
    frozenset({"int2", "int4", "int8"}),
    frozenset({"text", "varchar"}),
    {"uuid"},
)
"""Types whose values are equal exactly if their text forms are."""


class _ReachableRows:
    """Which rows of related tables the judged rows can lead to, by equality of ids.

    Postgres looks through all old images for each judged row. Were those of the whole transaction
    given to each of its batches, a large DELETE would take time by the square of its rows.
    """

    def __init__(
        self, conditions: Sequence[Sql], overlays: Sequence[Overlay], row_images: RowImages
    ) -> None:
        self._row_images = row_images
        self._overlays: dict[str, Overlay] = {}
        self._aliases: dict[TableName, set[str]] = {}
        for overlay in overlays:
            aliases = self._aliases[overlay.table.name] = _table_aliases(
                conditions, overlay.table.name
            )
            self._overlays |= dict.fromkeys(aliases, overlay)
        self._join_equalities: dict[str, tuple[str, str, str] | None] = {}
        for condition in conditions:
            for node in condition.find_all(exp.Table):
                if node.alias in self._overlays:
                    link = _join_equality(node)
                    known = self._join_equalities.setdefault(node.alias, link)
                    self._join_equalities[node.alias] = link if link == known else None

    def restrict(self, overlay: Overlay) -> Overlay:
        """Return the overlay with what can be reached of it; all of it if that can't be told."""
        before: dict[int, Row] = {}
        touched: dict[int, Row] | None = {}
        for alias in self._aliases[overlay.table.name]:
            reached = self._reachable_values(alias)
            if reached is None:
                return overlay
            column, values = reached
            by = overlay.old_images_by(column)
            before |= {id(row): row for value in values for row in by.get(value, ())}
            if column not in overlay.table.primary_key:
                touched = None  # a live row of any key may have the value by now
            elif touched is not None:
                by = overlay.changed_rows_by(column)
                touched |= {id(row): row for value in values for row in by.get(value, ())}
        kept = overlay.changed_rows if touched is None else list(touched.values())
        return replace(overlay, old_images=list(before.values()), changed_rows=kept, _cache={})

    def _reachable_values(self, alias: str) -> tuple[str, AbstractSet[str]] | None:
        """Return a column of the row of that alias and the only values that it can have."""
        link = self._join_equalities.get(alias)
        if link is None:
            return None
        own_name, source, source_name = link
        own = _find_column(self._overlays[alias].table.columns, own_name)
        found = self._column_values(source, source_name)
        if own is None or found is None:
            return None
        column, values = found
        return (own.name, values) if _is_equal_by_text(own, column) else None

    def _column_values(self, alias: str, name: str) -> tuple[Column, AbstractSet[str]] | None:
        """Return the column, and all values that it can have in the rows of that alias."""
        if alias == nodes.quoted_name(ROW_ALIAS).name:
            for at, column in enumerate(self._row_images.columns):
                if nodes.quoted_name(column.name).name == name:
                    cells = (row[at] for row in self._row_images.rows)
                    return column, {text for text in cells if text is not None}
            return None
        overlay = self._overlays.get(alias)
        reached = None if overlay is None else self._reachable_values(alias)
        if overlay is None or reached is None:
            return None
        key, values = reached
        wanted = _find_column(overlay.table.columns, name)
        if wanted is None or overlay.table.primary_key != (key,):
            return None
        if not values <= overlay.changed_rows_by(key).keys():
            return None  # live rows are reached too
        by = overlay.old_images_by(key)
        cells = (row[wanted.name] for value in values for row in by.get(value, ()))
        return wanted, {text for text in cells if text is not None}


def _join_equality(table: exp.Table) -> tuple[str, str, str] | None:
    """Return the column by which a row is joined, and the row and column that it equals."""
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
    return next((column for column in columns if nodes.quoted_name(column.name).name == name), None)


def _is_equal_by_text(one: Column, other: Column) -> bool:
    types = one.type.base, other.type.base
    return (
        one.is_deterministic
        and other.is_deterministic
        and all(of.schema == "pg_catalog" for of in types)
        and any({of.name for of in types} <= family for family in _TEXT_COMPARABLE_TYPES)
    )


def _redirect_tables(condition: Sql, names: Mapping[TableName, str]) -> Sql:
    """Return the condition reading other relations in place of some tables."""
    copied = condition.copy()
    wanted = {
        (nodes.quoted_name(table.name).name, nodes.quoted_name(table.schema).name): name
        for table, name in names.items()
    }
    for node in list(copied.find_all(exp.Table)):
        name = wanted.get((node.name, node.db))
        if name is not None:
            alias = exp.TableAlias(this=nodes.quoted_name(node.alias))
            node.replace(exp.Table(this=nodes.quoted_name(name), alias=alias))
    return copied


def _overlay_cte(
    name: str, overlay: Overlay, columns: Sequence[Column], params: dict[str, object]
) -> exp.CTE:
    """Return the table as it was, and put the old images into the statement's parameters."""
    keys = find_columns(overlay.table, overlay.table.primary_key)
    old_names = [f"{name}_c{at}" for at in range(len(columns))]
    key_names = [f"{name}_k{at}" for at in range(len(keys))]
    for key, column in zip(old_names, columns, strict=True):
        params[key] = [row[column.name] for row in overlay.old_images]
    for key, column in zip(key_names, keys, strict=True):
        params[key] = [row[column.name] for row in overlay.changed_rows]
    old = exp.Select(
        expressions=typed_columns("k", old_names, columns),
        from_=exp.From(this=unnest_arrays("k", old_names, text_arrays(old_names))),
    )
    is_touched = exp.Select(
        expressions=[nodes.number(1)],
        from_=exp.From(this=unnest_arrays("g", key_names, text_arrays(key_names))),
        where=exp.Where(
            this=all_of(
                *(
                    nodes.equal_keys(
                        typed_column("t", column),
                        TypedSql(
                            nodes.cast_to_type(nodes.column("g", key), column.type), column.type
                        ),
                    )
                    for key, column in zip(key_names, keys, strict=True)
                )
            )
        ),
    )
    live = exp.Select(
        expressions=[nodes.column("t", column.name) for column in columns],
        from_=exp.From(this=nodes.table(overlay.table.name, "t")),
        where=exp.Where(this=negation(exp.Exists(this=is_touched))),
    )
    union = exp.Union(this=old, expression=live, distinct=False)
    # Not computed whole, whatever the number of its uses: the indexes of the table serve it.
    return exp.CTE(
        this=union, alias=exp.TableAlias(this=nodes.quoted_name(name)), materialized=False
    )
