"""Which indexes rules lack: by the catalogue where that is plain, else by Postgres's own plans."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import AsyncConnection

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName
from pgrealtime.cli.check.warnings import parsed_rules, qualified, references
from pgrealtime.collections.build import quoted
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.errors import Problem, RuleError
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.resolve import resolve_rule
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.sql.reference import Reference

_NO_WAY_ROUND = """
SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL enable_seqscan = off;
SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL jit = off
"""
"""Makes reading a whole table the last resort, however few rows it has now."""


@dataclass(frozen=True, slots=True)
class _Index:
    """An index that would serve a rule."""

    table: Table
    column: str
    is_array: bool = False

    @property
    def is_there(self) -> bool:
        return any(index[0] == self.column for index in self.table.indexes)

    def __str__(self) -> str:
        using = "USING gin " if self.is_array else ""
        return f"CREATE INDEX ON {qualified(self.table.name)} {using}({quoted(self.column)});"


async def index_warnings(
    connection: AsyncConnection[Any], collections: Collections
) -> AsyncIterator[Problem]:
    """Yield which tables are read whole for every change that a rule is asked about.

    Relations are followed by index in both directions: from a row to those who may see it as well
    as the other way round, so that theirs must be there whatever the plan of one query. Of
    ``@collection`` the plan decides.
    """
    for collection in collections.values():
        for field, index in _of_junctions(collection):
            if not index.is_there:
                path = f"{collection.name}.relations.{field.name}"
                yield _warning(path, index.table.name, str(index))
        for key, rule, _ in parsed_rules(collection):
            conditions = list(_conditions(rule, collections, collection))
            lacking = {
                (index.table.name, str(index)): None
                for condition in conditions
                for index in _of_relations(condition, collections)
                if not index.is_there
            }
            hints = _hints(conditions, collections)
            for name in await _read_whole(connection, references(collections, collection, key)):
                if all(name != known for known, _ in lacking):
                    lacking[name, hints.get(name, _RELATE)] = None
            for name, hint in lacking:
                yield _warning(f"{collection.name}.{key}", name, hint)


def _warning(path: str, table: TableName, mend: str) -> Problem:
    return Problem(f"collections.{path}", f'all of "{table}" is read for every change', mend)


def _of_junctions(collection: Collection) -> Iterator[tuple[Field, _Index]]:
    """Yield the index by which the ids are found that a record shows."""
    for field in collection.fields:
        junction = None if field.relation is None else field.relation.junction
        if junction is not None:
            yield field, _Index(junction.table, junction.source)


def _hints(
    conditions: Sequence[predicate.Condition], collections: Collections
) -> Mapping[TableName, str]:
    """Return what lets rows of ``@collection`` be found, where no index does so far."""
    found = [index for one in conditions for index in _of_collections(one, collections)]
    served = {index.table.name for index in found if index.is_there}
    return {i.table.name: str(i) for i in reversed(found) if i.table.name not in served}


_RELATE = "no index serves this rule: go by a relation to it instead of @collection"


def _conditions(
    rule: str, collections: Collections, collection: Collection
) -> Iterator[predicate.Condition]:
    """Yield what the rule is to subscribers of each kind."""
    auths = [one for one in collections.values() if one.type == "auth"]
    for auth in (*auths, None):
        try:
            yield resolve_rule(rule, collections, collection, auth).where
        except RuleError:
            continue  # means nothing to them


def _of_relations(condition: predicate.Condition, collections: Collections) -> Iterator[_Index]:
    """Yield the index by which each step along a relation finds its rows.

    Keys have theirs, and of a junction's own direction ``_of_junctions`` tells.
    """
    for term in predicate.terms(condition):
        place = predicate.place_of(term)
        for step in () if place is None else place.steps:
            match step:
                case predicate.Back(collection=name, field=field):
                    yield _backwards(field, collections[name].table)
                case predicate.ToOne() | predicate.ToItem() | predicate.Items():
                    continue


def _backwards(field: Field, table: Table) -> _Index:
    if field.column is not None:
        return _Index(table, field.column.name, is_array=field.is_multiple)
    assert field.relation is not None
    assert field.relation.junction is not None
    return _Index(field.relation.junction.table, field.relation.junction.target)


def _of_collections(condition: predicate.Condition, collections: Collections) -> Iterator[_Index]:
    """Yield the indexes by any of which rows of ``@collection`` could be found.

    Two rows' values are compared as texts, of which an index knows nothing.
    """
    for cmp in predicate.comparisons(condition):
        for term, other in ((cmp.left, cmp.right), (cmp.right, cmp.left)):
            if cmp.op is not Op.EQ or not isinstance(term, predicate.FieldValue):
                continue
            if isinstance(other, predicate.FieldValue):
                continue
            place, column = term.place, term.field.column
            if (
                isinstance(place.origin, predicate.AllRows)
                and not place.steps
                and column is not None
            ):
                yield _Index(collections[place.collection].table, column.name)


async def _read_whole(
    connection: AsyncConnection[Any], predicates: Iterable[Reference]
) -> Sequence[TableName]:
    found: list[TableName] = []
    for one in predicates:
        row = dict.fromkeys(column.name for column in one.collection.table.columns)
        asked = one.question([row], datetime.now(UTC))
        statement = f"EXPLAIN (FORMAT JSON, VERBOSE) {asked.sql}".encode()
        try:
            async with connection.transaction(force_rollback=True):
                await connection.execute(_NO_WAY_ROUND)
                cursor = await connection.execute(statement, asked.params)
                for (plan,) in await cursor.fetchall():
                    found += _whole_scans(plan[0]["Plan"])
        except psycopg.Error:
            continue  # why it can't be asked is said elsewhere
    return list(dict.fromkeys(found))


def _whole_scans(node: dict[str, Any]) -> Iterator[TableName]:
    plans = node.get("Plans", ())
    if "Relation Name" in node:
        # A bitmap's index is a node below.
        ways = plans if node["Node Type"] == "Bitmap Heap Scan" else [node]
        if any(map(_is_of_all, ways)):
            yield TableName(node["Schema"], node["Relation Name"])
    for below in plans:
        yield from _whole_scans(below)


def _is_of_all(node: Mapping[str, Any]) -> bool:
    """Whether a table, or an index, is read from its beginning to its end."""
    kinds = {"Index Scan", "Index Only Scan", "Bitmap Index Scan"}
    kind = node["Node Type"]
    return kind == "Seq Scan" or (kind in kinds and "Index Cond" not in node)
