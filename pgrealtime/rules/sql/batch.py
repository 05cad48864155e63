"""SQL for many rows and many callers at once: which pairs match, and which keys match.

``rules.engine.batch_query`` calls it and binds the values. The rows are arrays of their columns'
text forms, ``c0``, ``c1`` and so on, and of their numbers, ``i``; what differs per pair is one too.
"""

from __future__ import annotations

from collections.abc import Collection as Sized
from collections.abc import Iterable, Mapping, Sequence

from sqlglot import exp

from pgrealtime.catalog.model import Table
from pgrealtime.rules.language.parameters import Binding, SqlForm
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import SqlPredicate, SqlValues
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql, all_of
from pgrealtime.rules.sql.row_images import (
    find_columns,
    images_table,
    integer_array,
    unnest_arrays,
    unused_column_name,
)

_ARRAY_TYPES = {
    SqlForm.TEXT: "text[]",
    SqlForm.NUMBER: "text[]",
    SqlForm.PATTERN: "text[]",
    SqlForm.UUID: "uuid[]",
    SqlForm.INTEGER: "bigint[]",
    SqlForm.JSON: "text[]",
}


def image_params(rows: Iterable[Sequence[str | None]]) -> dict[str, object]:
    """Return the parameters that hold the row images."""
    rows = list(rows)
    params: dict[str, object] = {"i": list(range(len(rows)))}
    for i, texts in enumerate(zip(*rows, strict=True)):
        params[f"c{i}"] = list(texts)
    return params


def matching_pairs_sql(
    table: Table,
    predicate: SqlPredicate,
    pair_parameters: Sized[str],
    condition: Sql,
    overlay_ctes: Sequence[exp.CTE] = (),
) -> str:
    """Return the statement for the numbers of the pairs of a row and values that match.

    Args:
        table: The rows' table.
        predicate: What must match.
        pair_parameters: Its parameters that differ per pair, given as arrays, as are ``n``, the
            pairs' numbers, and ``at``, the rows' numbers. If there are none, rows are numbered.
        condition: The predicate's, perhaps reading other relations.
        overlay_ctes: These relations.
    """
    rows, ordinal = _row_images(table, predicate.column_names)
    if not pair_parameters:
        rows_only = exp.Select(
            expressions=[nodes.column(ROW_ALIAS, ordinal)],
            from_=exp.From(this=rows),
            where=exp.Where(this=nodes.copy_if_attached(condition)),
        )
        return _to_text(rows_only, overlay_ctes)
    is_row = nodes.binary(exp.EQ, nodes.column(ROW_ALIAS, ordinal), nodes.column("q", "at"))
    select = exp.Select(
        expressions=[nodes.column("q", "n")],
        from_=exp.From(this=_pairs_relation(pair_parameters, predicate.bindings)),
        joins=[exp.Join(this=rows, on=is_row)],
        where=exp.Where(this=_reading_pairs(condition, pair_parameters)),
    )
    return _to_text(select, overlay_ctes)


def _pairs_relation(pair_parameters: Sized[str], bindings: Mapping[str, Binding]) -> Sql:
    """Return the pairs as a relation ``q`` of their numbers, rows and values."""
    arrays = [
        nodes.cast(nodes.placeholder(name), _ARRAY_TYPES[bindings[name].form])
        for name in pair_parameters
    ]
    return unnest_arrays(
        "q", ["n", "at", *pair_parameters], [integer_array("n"), integer_array("at"), *arrays]
    )


def _reading_pairs(condition: Sql, pair_parameters: Sized[str]) -> Sql:
    """Return the condition reading the pair's values in place of parameters."""

    def replaced(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Placeholder) and node.name in pair_parameters:
            return nodes.column("q", node.name)
        return node

    return condition.copy().transform(replaced)


def matching_keys_sql(
    table: Table,
    values: SqlValues,
    select: Sql,
    overlay_ctes: Sequence[exp.CTE] = (),
    *,
    has_wanted_keys: bool,
) -> str:
    """Return the statement for the numbers of rows, and the distinct keys of each.

    Args:
        table: The rows' table.
        values: The keys of one row.
        select: Their SELECT, perhaps reading other relations.
        overlay_ctes: These relations.
        has_wanted_keys: Whether only the keys in the array ``wanted`` are returned. ``limit``
            bounds how many of one row are.
    """
    rows, ordinal = _row_images(table, values.column_names)
    inner = select.copy()
    assert isinstance(inner, exp.Select)
    if has_wanted_keys:
        (text,) = inner.expressions
        wanted = exp.Any(this=exp.Paren(this=nodes.cast(nodes.placeholder("wanted"), "text[]")))
        is_wanted = exp.EQ(this=nodes.collate_c(text), expression=wanted)
        inner.set("where", exp.Where(this=all_of(inner.args["where"].this, is_wanted)))
    inner.set("distinct", exp.Distinct())
    inner.set("limit", exp.Limit(expression=nodes.cast(nodes.placeholder("limit"), nodes.BIGINT)))
    keys = exp.Lateral(
        this=exp.Subquery(this=inner),
        alias=exp.TableAlias(this=nodes.quoted_name("found"), columns=[nodes.quoted_name("value")]),
    )
    outer = exp.Select(
        expressions=[nodes.column(ROW_ALIAS, ordinal), nodes.column("found", "value")],
        from_=exp.From(this=rows),
        joins=[exp.Join(this=keys, kind="CROSS")],
    )
    return _to_text(outer, overlay_ctes)


def _row_images(table: Table, column_names: Sequence[str]) -> tuple[Sql, str]:
    """Return the row images as a relation, and the name of the column that numbers them."""
    ordinal = unused_column_name(column_names)
    return images_table(find_columns(table, column_names), ordinal), ordinal


def _to_text(select: exp.Select, overlay_ctes: Sequence[exp.CTE]) -> str:
    if overlay_ctes:
        select.set("with_", exp.With(expressions=list(overlay_ctes)))
    return select.sql(dialect="postgres", copy=False)
