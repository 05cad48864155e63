"""Warnings of ``pgrealtime check`` about tables that rules read without an index.

Indexes for relations are looked up in the catalogue; for the rest PostgreSQL's plans decide.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import AsyncConnection

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName, quote_identifier, quote_table_name
from pgrealtime.cli.check.rules import parsed_rules, reference_queries, resolved_conditions
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.errors import ConfigProblem
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.sql.reference import ReferenceQuery

_PREFER_INDEXES_SQL = """
SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL enable_seqscan = off;
SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL jit = off
"""
"""Makes a sequential scan the planner's last resort, however few rows the table has now."""


@dataclass(frozen=True, slots=True)
class _NeededIndex:
    table: Table
    column: str
    is_array: bool = False

    @property
    def is_present(self) -> bool:
        return any(index[0] == self.column for index in self.table.index_prefixes)

    def __str__(self) -> str:
        using = "USING gin " if self.is_array else ""
        table, column = quote_table_name(self.table.name), quote_identifier(self.column)
        return f"CREATE INDEX ON {table} {using}({column});"


async def index_warnings(
    connection: AsyncConnection[Any], collections: Collections
) -> AsyncIterator[ConfigProblem]:
    """Yield a warning for each table that evaluating a rule reads in full for every change.

    Relations are followed in both directions, from a row to the callers who may see it and back, so
    that their indexes are needed whatever the plan of one query is. For ``@collection`` the plan
    decides.
    """
    for collection in collections.values():
        if not collection.is_streamed:
            continue  # has no changes
        for field, index in _junction_indexes(collection):
            if not index.is_present:
                path = f"{collection.name}.relations.{field.name}"
                yield _full_scan_warning(path, index.table.name, str(index))
        for key, rule, _ in parsed_rules(collection):
            conditions = list(resolved_conditions(rule, collections, collection))
            lacking = {
                (index.table.name, str(index)): None
                for condition in conditions
                for index in _relation_indexes(condition, collections)
                if not index.is_present
            }
            hints = _index_hints(conditions, collections)
            queries = reference_queries(collections, collection, key)
            for name in await _fully_scanned_tables(connection, queries):
                if all(name != known for known, _ in lacking):
                    lacking[name, hints.get(name, _NO_INDEX_HINT)] = None
            for name, hint in lacking:
                yield _full_scan_warning(f"{collection.name}.{key}", name, hint)


def _full_scan_warning(path: str, table: TableName, fix: str) -> ConfigProblem:
    return ConfigProblem(f"collections.{path}", f'each change reads the whole table "{table}"', fix)


def _junction_indexes(collection: Collection) -> Iterator[tuple[Field, _NeededIndex]]:
    """Yield the index that finds the ids which a record shows, for each junction."""
    for field in collection.fields:
        if field.relation is not None and (junction := field.relation.junction) is not None:
            yield field, _NeededIndex(junction.table, junction.source_column)


def _index_hints(
    conditions: Sequence[predicate.Condition], collections: Collections
) -> Mapping[TableName, str]:
    """Return the SQL of an index that would find rows of ``@collection``, by table without one."""
    indexes = [i for condition in conditions for i in _collection_indexes(condition, collections)]
    served = {index.table.name for index in indexes if index.is_present}
    return {i.table.name: str(i) for i in reversed(indexes) if i.table.name not in served}


_NO_INDEX_HINT = "no index can serve this rule: use a relation instead of @collection"


def _relation_indexes(
    condition: predicate.Condition, collections: Collections
) -> Iterator[_NeededIndex]:
    """Yield the index that each step along a back relation needs.

    Steps to a key have its index; for the other direction of junctions see ``_junction_indexes``.
    """
    for term in predicate.terms(condition):
        row_path = predicate.row_path_of(term)
        for step in () if row_path is None else row_path.steps:
            if isinstance(step, predicate.BackRelation):
                field, table = step.field, collections[step.collection_name].table
                if field.column is not None:
                    yield _NeededIndex(table, field.column.name, is_array=field.is_multiple)
                elif field.relation is not None and (junction := field.relation.junction):
                    yield _NeededIndex(junction.table, junction.target_column)


def _collection_indexes(
    condition: predicate.Condition, collections: Collections
) -> Iterator[_NeededIndex]:
    """Yield the indexes each of which could find rows of ``@collection``.

    Values of two rows are compared as texts, which no index of a column serves.
    """
    for cmp in predicate.comparisons(condition):
        for term, other_term in ((cmp.left, cmp.right), (cmp.right, cmp.left)):
            if (
                cmp.op is Op.EQ
                and isinstance(term, predicate.FieldValue)
                and not isinstance(other_term, predicate.FieldValue)
                and isinstance(term.row_path.root, predicate.CollectionRows)
                and not term.row_path.steps
                and term.field.column is not None
            ):
                table = collections[term.row_path.collection_name].table
                yield _NeededIndex(table, term.field.column.name)


async def _fully_scanned_tables(
    connection: AsyncConnection[Any], predicates: Iterable[ReferenceQuery]
) -> Sequence[TableName]:
    tables: list[TableName] = []
    for reference in predicates:
        row = dict.fromkeys(column.name for column in reference.collection.table.columns)
        query = reference.sql_query([row], datetime.now(UTC))
        statement = f"EXPLAIN (FORMAT JSON, VERBOSE) {query.sql}".encode()
        try:
            async with connection.transaction(force_rollback=True):
                await connection.execute(_PREFER_INDEXES_SQL)
                cursor = await connection.execute(statement, query.params)
                for (plan,) in await cursor.fetchall():
                    tables += _full_scans(plan[0]["Plan"])
        except psycopg.Error:
            continue  # reported as an error of its own
    return list(dict.fromkeys(tables))


def _full_scans(node: dict[str, Any]) -> Iterator[TableName]:
    plans = node.get("Plans", ())
    if "Relation Name" in node:
        # A bitmap's index is a node below.
        scans = plans if node["Node Type"] == "Bitmap Heap Scan" else [node]
        if any(map(_is_full_scan, scans)):
            yield TableName(node["Schema"], node["Relation Name"])
    for below in plans:
        yield from _full_scans(below)


def _is_full_scan(node: Mapping[str, Any]) -> bool:
    """Whether the node reads a whole table, or a whole index."""
    kinds = {"Index Scan", "Index Only Scan", "Bitmap Index Scan"}
    kind = node["Node Type"]
    return kind == "Seq Scan" or (kind in kinds and "Index Cond" not in node)
