"""Lists the tables that rules can read, and those of them that the replication stream carries.

The service, a reload, ``check`` and the demo must agree on both.
"""

from collections.abc import Iterable, Mapping

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collections
from pgrealtime.errors import ConfigProblem


def reachable_tables(collections: Collections) -> Mapping[TableName, Table]:
    """Return every table that rules and filters can read, the junctions of relations included.

    Junctions are streamed because a transaction may delete a row together with the rows that link
    it to others; the rule for that row is evaluated with the links from before the transaction.
    """
    tables = {collection.table.name: collection.table for collection in collections.values()}
    for collection in collections.values():
        for field in collection.fields:
            if field.relation is not None and field.relation.junction is not None:
                table = field.relation.junction.table
                tables.setdefault(table.name, table)
    return tables


def streamed_tables(
    collections: Collections, problems: Iterable[ConfigProblem] = ()
) -> Mapping[TableName, Table]:
    """Return the tables that the stream carries: those of readable collections, their junctions.

    A junction without replica identity is left out, because decoders drop or refuse its deletes.
    The rule for a deleted record is then evaluated with the links that are left.
    """
    readable = streamed_collections(collections, problems)
    own = {collection.table.name for collection in readable.values()}
    return {
        name: table
        for name, table in reachable_tables(readable).items()
        if name in own or (table.replica_identity_columns and not table.is_unlogged)
    }


def streamed_collections(
    collections: Collections, problems: Iterable[ConfigProblem]
) -> Collections:
    """Return the collections that are to be streamed, without a problem of their table or key.

    Of the others the stream would lack changes, or changes would not say which record they concern.
    """
    unreadable = {collection_name_of(p) for p in problems if p.path.endswith((".table", ".id"))}
    streamed = (c for c in collections.values() if c.is_streamed)
    return collections.replace_all(tuple(c for c in streamed if c.name not in unreadable))


def link_columns(collections: Collections, table: TableName) -> frozenset[str]:
    """Return the columns of a junction table whose old values say which records it linked.

    Only of relations whose links update their records.
    """
    return frozenset(
        junction.source_column
        for collection in collections.values()
        for field in collection.fields
        if field.relation is not None
        and (junction := field.relation.junction) is not None
        and junction.table.name == table
        and junction.updates
    )


def collection_name_of(problem: ConfigProblem) -> str:
    """Return the name of the collection that a path such as ``collections.posts.id`` is in."""
    return (*problem.path.split("."), "")[1]
