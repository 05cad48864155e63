"""Which tables the stream carries: one list, for ``check``, the service, a reload and the demo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collections
from pgrealtime.errors import Problem
from pgrealtime.rules.engine.before_state import tables_of


def shown(collections: Collections, faults: Iterable[Problem]) -> Collections:
    """Return the collections whose changes can be read: all but those with an unfit table."""
    unreadable = {collection_of(fault) for fault in faults if _is_of_table(fault)}
    return Collections(tuple(c for c in collections.values() if c.name not in unreadable))


def streamed_tables(
    collections: Collections, faults: Iterable[Problem] = ()
) -> Mapping[TableName, Table]:
    """Return the tables whose changes are read: the collections' own and their junctions.

    A junction whose rows can't be told apart is left out: decoders lose or refuse its deletes, so
    that a deleted record is judged by the links that are left.

    Args:
        collections: What is to be served.
        faults: What doesn't fit in them.
    """
    readable = shown(collections, faults)
    own = {collection.table.name for collection in readable.values()}
    return {
        name: table
        for name, table in tables_of(readable).items()
        if name in own or (table.identity_columns and not table.is_unlogged)
    }


def collection_of(fault: Problem) -> str:
    """Return the name of the collection that a fault's path leads into."""
    _, _, rest = fault.path.partition(".")
    return rest.partition(".")[0]


def _is_of_table(fault: Problem) -> bool:
    """Whether the table's changes would not all reach us, or not say of what record."""
    return fault.path.endswith((".table", ".id"))
