"""Which tables the stream carries: one list, for ``check``, the service, a reload and the demo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collections
from pgrealtime.errors import ConfigProblem
from pgrealtime.rules.engine.before_state import reachable_tables


def readable_collections(
    collections: Collections, problems: Iterable[ConfigProblem]
) -> Collections:
    """Return the collections whose changes can be read: all but those with an unfit table."""
    unreadable = {collection_name_of(fault) for fault in problems if _is_table_problem(fault)}
    return Collections(tuple(c for c in collections.values() if c.name not in unreadable))


def streamed_tables(
    collections: Collections, problems: Iterable[ConfigProblem] = ()
) -> Mapping[TableName, Table]:
    """Return the tables whose changes are read: the collections' own and their junctions.

    A junction whose rows can't be told apart is left out: decoders lose or refuse its deletes, so
    that a deleted record is judged by the links that are left.

    Args:
        collections: What is to be served.
        problems: What doesn't fit in them.
    """
    readable = readable_collections(collections, problems)
    own = {collection.table.name for collection in readable.values()}
    return {
        name: table
        for name, table in reachable_tables(readable).items()
        if name in own or (table.replica_identity_columns and not table.is_unlogged)
    }


def collection_name_of(problem: ConfigProblem) -> str:
    """Return the name of the collection that a fault's path leads into."""
    _, _, rest = problem.path.partition(".")
    return rest.partition(".")[0]


def _is_table_problem(problem: ConfigProblem) -> bool:
    """Whether the table's changes would not all reach us, or not say of what record."""
    return problem.path.endswith((".table", ".id"))
