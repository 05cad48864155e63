"""Compares the ways to a rule with what its SQL reads: the one is made without the other."""

from __future__ import annotations

from collections.abc import Iterator

from sqlglot import exp

from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collections
from pgrealtime.rules.engine.formula import Test, tests_of
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.engine.ways import ways_to
from pgrealtime.rules.language.predicate import Predicate
from pgrealtime.rules.sql.conditions import translate_predicate
from pgrealtime.rules.sql.nodes import ROW_ALIAS


def columns_without_way(
    specialization: Specialization, collections: Collections
) -> set[tuple[TableName, str]]:
    """Return the columns of other rows that the SQL of a rule reads, and no way names."""
    ways = ways_to(specialization, collections)
    named = {(way.table, name) for way in ways for name in way.column_names}
    read = (column for test in tests_of(specialization.formula) for column in _columns(test))
    return set(read) - named


def _columns(test: Test) -> Iterator[tuple[TableName, str]]:
    """Yield the columns of other rows that a test's SQL reads."""
    condition = translate_predicate(
        Predicate(collection_name=test.collection.name, where=test.condition),
        test.collections,
        test.parameter_classes,
        is_caller_row_bound=test.is_caller_row_bound,
    ).condition
    # Subqueries beside each other may have the same alias, for the same table.
    tables: dict[str, TableName] = {}
    for table in condition.find_all(exp.Table):
        name = TableName(table.db, table.name)
        assert tables.setdefault(table.alias, name) == name, "an alias stands for one table"
    for column in condition.find_all(exp.Column):
        if column.table != ROW_ALIAS and column.table in tables:
            yield tables[column.table], column.name
