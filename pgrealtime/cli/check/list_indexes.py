"""Warnings of ``pgrealtime check`` about lists that no index finds in their order.

A list has the list rule and the default order in one statement. PostgreSQL's plan for it decides
whether some index serves both, whatever its columns are; the statement says which index would.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import sqlglot
from psycopg import AsyncConnection
from sqlglot import exp

from pgrealtime.catalog.model import TableKind, native_key_type
from pgrealtime.changes import quote_identifier, quote_table_name
from pgrealtime.cli.check.rules import sample_principals
from pgrealtime.collections.model import Collection, Collections, OrderColumn
from pgrealtime.errors import ConfigProblem, RuleError
from pgrealtime.reads.compiler import BoundList, ListCompiler
from pgrealtime.rules.language.parameters import RequestValue
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql

_PREFER_ORDER_SQL = """
SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL jit = off; SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off; SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off; SET LOCAL max_parallel_workers_per_gather = 0
"""
"""Makes sorting the planner's last resort, however few rows the table has now. A sort of the few
rows that an index leaves in a tie (Incremental Sort) isn't avoided."""

_PAGE = {"limit": 30, "offset": 0, "max_joined_rows": 1}
"""The first page, which says how a list is read."""

_INDEXABLE_TABLE_KINDS = {TableKind.TABLE, TableKind.PARTITIONED, TableKind.MATERIALIZED_VIEW}

_SCAN_ALIAS = re.compile(rf"{ROW_ALIAS}(_\d+)?")
"""The collection's rows in a plan; those of partitions are numbered."""


@dataclass(frozen=True, slots=True)
class _ListIndex:
    """An index that finds the rows of a list in their order."""

    collection: Collection
    equal_columns: tuple[str, ...]
    """Columns that the list rule compares with one value of the request."""

    @property
    def finds_one_row(self) -> bool:
        """Whether there is nothing to sort, because a key is among the columns."""
        unique_keys = self.collection.table.unique_keys
        return any({*names} <= {*self.equal_columns} for names in unique_keys)

    @property
    def order(self) -> Sequence[OrderColumn]:
        """What an index has to order by besides."""
        order = self.collection.order
        return [one for one in order if one.column.name not in self.equal_columns]

    @property
    def is_present(self) -> bool:
        """Whether there is such an index by its columns, in any of their directions.

        The plan for a table without rows doesn't always use it. Indexes with other places for NULL
        have the same columns, so this holds without NULL only.
        """
        equal, order = {*self.equal_columns}, tuple(one.column.name for one in self.order)
        return all(one.column.not_null for one in self.order) and any(
            {*prefix[: len(equal)]} == equal and prefix[len(equal) :][: len(order)] == order
            for prefix in self.collection.table.index_prefixes
        )

    def __str__(self) -> str:
        columns = [*map(quote_identifier, self.equal_columns), *map(_ordered_text, self.order)]
        table = quote_table_name(self.collection.table.name)
        return f"CREATE INDEX ON {table} ({', '.join(columns)});"


def _ordered_text(ordered: OrderColumn) -> str:
    direction = " DESC" if ordered.is_descending else ""
    # NULL is less than every value in PocketBase, and greater in PostgreSQL.
    nulls = "" if ordered.column.not_null else f" NULLS {'LAST' if direction else 'FIRST'}"
    return f"{quote_identifier(ordered.column.name)}{direction}{nulls}"


async def list_index_warnings(
    connection: AsyncConnection[Any], collections: Collections
) -> AsyncIterator[ConfigProblem]:
    """Yield a warning for each index that a list rule needs together with the default order."""
    compiler = ListCompiler(collections)
    for collection in collections.values():
        if collection.table.kind not in _INDEXABLE_TABLE_KINDS:
            continue
        lacking: dict[str, None] = {}
        async for bound in _bound_lists(compiler, collections, collection):
            index = _ListIndex(collection, tuple(_columns_equal_to_values(bound, collection)))
            if index.finds_one_row or index.is_present:
                continue
            if not await _is_served(connection, bound, index):
                lacking[str(index)] = None
        for sql in lacking:
            message = f'no index of "{collection.table.name}" finds the rows of a list in order'
            yield ConfigProblem(f"collections.{collection.name}.list_rule", message, sql)


async def _bound_lists(
    compiler: ListCompiler, collections: Collections, collection: Collection
) -> AsyncIterator[BoundList]:
    """Yield the list of a caller of each kind; none if only superusers may list."""
    if collection.list_rule is None:
        return
    for principal in sample_principals(collections):
        request = RuleRequest(principal=principal, context="default")
        try:
            yield await compiler.bind(collection, collection.list_rule, request)
        except RuleError:
            continue  # denies these callers


def _columns_equal_to_values(bound: BoundList, collection: Collection) -> Iterator[str]:
    """Yield the columns that must equal a value of the request, as the statement compares them.

    A comparison with a constant of the rule is none of them: an index in the list's order serves
    those as well.
    """
    where = sqlglot.parse_one(bound.sql.page, dialect="postgres").args.get("where")
    found: dict[str, None] = {}
    for equality in () if where is None else _conjuncts(where.this):
        for column, value in _sides(equality):
            if (
                column.table == ROW_ALIAS
                and value.find(exp.Column) is None
                and _is_value_of_request(value, bound)
                and _is_of_key_type(value, column.name, collection)
            ):
                found[column.name] = None
    yield from found


def _conjuncts(condition: Sql) -> Iterator[Sql]:
    condition = condition.unnest()
    if isinstance(condition, exp.And):
        yield from _conjuncts(condition.left)
        yield from _conjuncts(condition.right)
    else:
        yield condition


def _sides(condition: Sql) -> Iterator[tuple[exp.Column, exp.Cast]]:
    """Yield column and value of an equality of the two."""
    if isinstance(condition, exp.EQ):
        left, right = condition.left.unnest(), condition.right.unnest()
        for column, value in ((left, right), (right, left)):
            if isinstance(column, exp.Column) and isinstance(value, exp.Cast):
                yield column, value


def _is_value_of_request(value: exp.Cast, bound: BoundList) -> bool:
    names = [placeholder.name for placeholder in value.find_all(exp.Placeholder)]
    parameters = [bound.sql.bindings[name].parameter for name in names]
    return any(isinstance(parameter, RequestValue) for parameter in parameters)


_KEY_TYPES = {
    **dict.fromkeys(("int2", "int4", "int8"), ("SMALLINT", "INT", "BIGINT")),
    **dict.fromkeys(("text", "varchar"), ("TEXT", "VARCHAR")),
    "uuid": ("UUID",),
}
"""Types of columns, and those of values that an index of such a column finds."""


def _is_of_key_type(value: exp.Cast, column_name: str, collection: Collection) -> bool:
    column = collection.table.find_column(column_name)
    native = None if column is None else native_key_type(column.type)
    return native is not None and value.to.sql("postgres") in _KEY_TYPES.get(native, ())


# -- plans


async def _is_served(connection: AsyncConnection[Any], bound: BoundList, index: _ListIndex) -> bool:
    statement = f"EXPLAIN (FORMAT JSON) {bound.sql.page}".encode()
    try:
        async with connection.transaction(force_rollback=True):
            await connection.execute(_PREFER_ORDER_SQL)
            cursor = await connection.execute(statement, {**bound.params, **_PAGE})
            ((plan,),) = await cursor.fetchall()
    except psycopg.Error:
        return True  # reported as an error of its own
    plan_nodes = list(_plan_nodes(plan[0]["Plan"]))
    scans = [one for one in plan_nodes if _SCAN_ALIAS.fullmatch(one.get("Alias", ""))]
    return all(one["Node Type"] != "Sort" for one in plan_nodes) and all(
        one["Node Type"] in {"Index Scan", "Index Only Scan"}
        and ("Index Cond" in one or not index.equal_columns)
        for one in scans
    )


def _plan_nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the nodes that rows of the list come through, without those of conditions."""
    yield node
    for below in node.get("Plans", ()):
        if below["Parent Relationship"] not in {"SubPlan", "InitPlan"}:
            yield from _plan_nodes(below)
