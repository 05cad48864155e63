"""Says of each list and view rule how right a mirror is kept by it, and the SQL that betters it."""

from collections.abc import Iterable, Iterator, Sequence

from pgrealtime.catalog.model import Column, Table, TypeKind
from pgrealtime.changes import TableName, quote_identifier, quote_table_name
from pgrealtime.cli.check.rules import sample_principals
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.streamed_tables import (
    link_columns,
    reachable_tables,
    streamed_tables,
)
from pgrealtime.collections.tables import alter_leaf_tables
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.formula import tests_of
from pgrealtime.rules.engine.plan import BoundPredicate, Specialization
from pgrealtime.rules.engine.ways import Way, ways_to
from pgrealtime.rules.language.request import RuleRequest

_BOUNDED_TYPES = frozenset({"int2", "int4", "int8", "bool", "uuid", "date", "timestamp"})
_BOUNDED_TYPES |= {"timestamptz", "float4", "float8"}
_MAX_VARCHAR = 200
"""Characters of a varchar that surely fit into an index entry with a few other columns."""


def mirror_lines(collections: Collections) -> Iterator[str]:
    """Yield a line for each rule by which a topic may be a mirror, and lines with SQL."""
    for collection in collections.values():
        if not collection.is_streamed or collection.mirrors == "off":
            continue
        name, rules = collection.name, (collection.list_rule, collection.view_rule)
        topics = [(f"{name}/*", rules[0]), (f"{name}/ID", rules[1])]
        if rules[0] == rules[1]:
            topics = [(f"{name}/* and {name}/ID", rules[0])]
        for topic, rule in topics:
            if rule is not None:
                yield from _topic_lines(topic, rule, collection, collections)


def _topic_lines(
    topic: str, rule: str, collection: Collection, collections: Collections
) -> Iterator[str]:
    specializations = list(_specializations(rule, collection, collections))
    columns = frozenset[str]().union(*(one.column_names for one in specializations))
    missing = columns.difference(collection.table.replica_identity_columns)
    related = _related(specializations, collections)
    if unstreamed := related.keys() - streamed_tables(collections):
        yield f"mirror {topic}: not kept right, nothing tells of changes of {_listed(unstreamed)}"
        return
    reasons = []
    if missing:
        reasons.append(f"it may have lost a row, as {_listed(missing)} isn't logged of old rows")
    if related:
        reasons.append(f"a change of {_listed(related)} concerns its caller")
    said = ["exact"]
    if reasons:
        said.append(f"but loaded anew whenever {', or '.join(reasons)}")
    if any(test.macros for one in specializations for test in tests_of(one.formula)):
        said.append("but rows move only when they are written after a moment of its rule")
    yield f"mirror {topic}: {', '.join(said)}"
    if missing:
        yield from _identity_hints(collection, missing)
    tables = reachable_tables(collections)
    for table_name, wanted in related.items():
        table = tables[table_name]
        if not wanted.issubset(table.replica_identity_columns):
            yield f"  told to fewer: {alter_leaf_tables(table, 'REPLICA IDENTITY FULL')}"


def _specializations(
    rule: str, collection: Collection, collections: Collections
) -> Iterator[Specialization]:
    """Yield what the rule is for a caller of each kind."""
    compiler = RuleCompiler(collections)
    for principal in sample_principals(collections):
        try:
            bound = compiler.bind_caller(collection, rule, RuleRequest(principal=principal))
        except RuleError:
            continue
        if isinstance(bound, BoundPredicate):
            yield bound.specialization


def _related(
    specializations: Sequence[Specialization], collections: Collections
) -> dict[TableName, frozenset[str]]:
    """Return the columns that are read of related rows, by table."""
    found: dict[TableName, frozenset[str]] = {}
    for specialization in specializations:
        for way in ways_to(specialization, collections):
            if _is_told_by_updates(way, collections):
                continue
            found[way.table] = found.get(way.table, frozenset()) | way.column_names
    return found


def _is_told_by_updates(way: Way, collections: Collections) -> bool:
    """Whether rows of a junction table there update the record itself, whichever it is."""
    if not way.source_column or way.source_column not in link_columns(collections, way.table):
        return False
    table = reachable_tables(collections)[way.table]
    return way.column_names.issubset(table.replica_identity_columns)


def _identity_hints(collection: Collection, missing: frozenset[str]) -> Iterator[str]:
    table = collection.table
    yield f"  logs them: {alter_leaf_tables(table, 'REPLICA IDENTITY FULL')}"
    names = [collection.key.name, *sorted(missing - {collection.key.name})]
    columns = [column for name in names if (column := table.find_column(name)) is not None]
    if not table.leaves and all(map(_is_bounded, columns)):
        index = quote_identifier(f"{table.name.name}_mirror")
        listed = ", ".join(quote_identifier(name) for name in names)
        yield (
            f"  or less, only when one changes: CREATE UNIQUE INDEX {index} ON {_sql(table)}"
            f" ({listed}); ALTER TABLE {_sql(table)} REPLICA IDENTITY USING INDEX {index}"
        )


def _is_bounded(column: Column) -> bool:
    """Whether no value is too long for an index: else its writer would fail."""
    base = column.type.base
    is_short = base.name == "varchar" and 0 < column.type_modifier - 4 <= _MAX_VARCHAR
    return column.not_null and (
        base.name in _BOUNDED_TYPES or base.kind is TypeKind.ENUM or is_short
    )


def _sql(table: Table) -> str:
    return quote_table_name(table.name)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, names)))
