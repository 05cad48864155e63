"""SQL for many rows and many callers at once: which pairs match, and which keys match.

``rules.engine.batch_query`` calls it and binds the values. The rows are arrays of their columns'
text forms, ``c0``, ``c1`` and so on, and of their numbers, ``i``; what differs per pair is one too.
"""

from __future__ import annotations

from collections.abc import Collection as Sized
from collections.abc import Mapping, Sequence

from sqlglot import exp

from pgrealtime.catalog.model import Table
from pgrealtime.rules.language.parameters import Binding
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import SqlPredicate, SqlValues
from pgrealtime.rules.sql.joins import FORM_TYPES
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql, all_of
from pgrealtime.rules.sql.row_images import (
    images_table,
    integer_array,
    matching_rows_sql,
    unnest_arrays,
)


def matching_pairs_sql(
    table: Table,
    predicate: SqlPredicate,
    pair_parameters: Sized[str],
    condition: Sql,
    overlay_ctes: Sequence[exp.CTE] = (),
) -> str:
    """Return the statement for the numbers of the pairs of a row and values that match.

    ``pair_parameters`` differ per pair and are given as arrays, as are ``n``, the pairs' numbers,
    and ``at``, the rows' numbers; if there are none, rows are numbered. The condition is the
    predicate's, reading ``overlay_ctes`` in place of tables if there are any.
    """
    if not pair_parameters:
        return matching_rows_sql(table, predicate.column_names, condition, overlay_ctes)
    rows, ordinal = images_table(table, predicate.column_names)
    is_row = nodes.binary(exp.EQ, nodes.column(ROW_ALIAS, ordinal), nodes.column("q", "at"))
    select = nodes.select(
        [nodes.column("q", "n")],
        _pairs_relation(pair_parameters, predicate.bindings),
        joins=[exp.Join(this=rows, on=is_row)],
        where=_reading_pairs(condition, pair_parameters),
    )
    return nodes.to_text(select, overlay_ctes)


def _pairs_relation(pair_parameters: Sized[str], bindings: Mapping[str, Binding]) -> Sql:
    """Return the pairs as a relation ``q`` of their numbers, rows and values."""
    arrays = [
        nodes.cast(nodes.placeholder(name), f"{FORM_TYPES[bindings[name].form]}[]")
        for name in pair_parameters
    ]
    return unnest_arrays(
        "q", ["n", "at", *pair_parameters], [integer_array("n"), integer_array("at"), *arrays]
    )


def _reading_pairs(condition: Sql, pair_parameters: Sized[str]) -> Sql:

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

    ``select`` is that of the values, reading ``overlay_ctes`` in place of tables if there are any.
    With ``has_wanted_keys`` only the keys in the array ``wanted`` are returned. ``limit`` bounds
    how many of one row are.
    """
    rows, ordinal = images_table(table, values.column_names)
    inner = select.copy()
    assert isinstance(inner, exp.Select)
    if has_wanted_keys:
        (text,) = inner.expressions
        wanted = exp.Any(this=exp.Paren(this=nodes.cast(nodes.placeholder("wanted"), "text[]")))
        is_wanted = exp.EQ(this=nodes.collate_c(text), expression=wanted)
        inner.set("where", exp.Where(this=all_of(inner.args["where"].this, is_wanted)))
    inner.set("distinct", exp.Distinct())
    inner.set("limit", exp.Limit(expression=nodes.cast(nodes.placeholder("limit"), nodes.BIGINT)))
    keys = exp.Lateral(this=exp.Subquery(this=inner), alias=nodes.row_alias("found", "value"))
    outer = nodes.select(
        [nodes.column(ROW_ALIAS, ordinal), nodes.column("found", "value")],
        rows,
        joins=[exp.Join(this=keys, kind="CROSS")],
    )
    return nodes.to_text(outer, overlay_ctes)
