"""Checks which tables can be streamed, and the publication that pgoutput needs. Pure.

Used by ``wal.slot`` and the command ``check``. A publication can break an application: the server
refuses UPDATE and DELETE on a published table without replica identity. So only checked tables are
published: one by one, without inheritance children, never FOR ALL TABLES.
"""

from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from pgrealtime.catalog.model import ReplicaIdentity, Table, TableKind
from pgrealtime.changes import TableName, quote_identifier, quote_table_name
from pgrealtime.errors import SetupError

GENERATED_COLUMNS_VERSION = 180_000
"""The first server that can publish generated columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A publication of the database."""

    tables: frozenset[TableName]
    """Of partitioned tables the leaves."""
    partial_tables: frozenset[TableName]
    """Those published with a row filter or column list."""
    includes_future_tables: bool
    """FOR ALL TABLES or TABLES IN SCHEMA: tables created later are published unchecked."""
    is_via_root: bool
    publishes_all_actions: bool
    """INSERT, UPDATE, DELETE and TRUNCATE."""
    has_generated_columns: bool
    """publish_generated_columns is ``stored``."""


def publication_sql(name: str, tables: Collection[Table], server_version: int) -> str:
    """Return the SQL that creates the publication of tables checked by ``check_tables``."""
    published = ", ".join(
        # A partitioned table includes its partitions, also later ones. Without ONLY any other
        # includes its inheritance children.
        ("" if table.kind is TableKind.PARTITIONED else "ONLY ") + quote_table_name(table.name)
        for table in sorted(tables, key=lambda table: table.name)
    )
    options = ""
    if server_version >= GENERATED_COLUMNS_VERSION and _has_generated_column(tables):
        options = " WITH (publish_generated_columns = stored)"
    return f"CREATE PUBLICATION {quote_identifier(name)} FOR TABLE {published}{options};"


def _has_generated_column(tables: Iterable[Table]) -> bool:
    return any(column.is_generated for table in tables for column in table.columns)


def check_tables(tables: Collection[Table]) -> None:
    """Check that the WAL has all changes of the tables, with a replica identity.

    Raises:
        SetupError: With all tables that can't be streamed, and SQL to change that.
    """
    streamed = {table.name for table in tables}
    problems = [
        (table, problem) for table in tables if (problem := _streaming_problem(table, streamed))
    ]
    if not problems:
        return
    raise SetupError(
        "some tables can't be streamed",
        detail="\n".join(f'"{table.name}" {problem}' for table, (problem, _) in problems),
        hint="\n".join(sql for _, (_, statements) in problems for sql in statements)
        or "Take them out of the configuration.",
        code="table_not_streamable",
    )


def _streaming_problem(
    table: Table, streamed: AbstractSet[TableName]
) -> tuple[str, tuple[str, ...]] | None:
    if table.partition_of in streamed:
        return f'is a partition of "{table.partition_of}", under whose name its rows come.', ()
    if table.kind not in (TableKind.TABLE, TableKind.PARTITIONED):
        return "is no ordinary or partitioned table: its rows are not in the WAL.", ()
    parts = table.leaves or (table.name,)
    if table.is_unlogged:
        return (
            "is unlogged: its rows are not in the WAL.",
            tuple(f"ALTER TABLE {quote_table_name(part)} SET LOGGED;" for part in parts),
        )
    is_unidentified = (
        table.replica_identity is ReplicaIdentity.NOTHING or not table.replica_identity_columns
    )
    if is_unidentified and not table.has_digest_id:
        return (
            "has no replica identity: updates and deletes of it would be lost.",
            tuple(f"ALTER TABLE {quote_table_name(part)} REPLICA IDENTITY FULL;" for part in parts),
        )
    return None


def check_publication(
    name: str, publication: Publication | None, tables: Collection[Table], server_version: int
) -> None:
    """Check that a publication has exactly these tables and the options that are needed.

    Raises:
        SetupError: With the SQL that creates it anew.
    """
    create = publication_sql(name, tables, server_version)
    if keyless := {table.name: table for table in tables if not table.replica_identity_columns}:
        leaves = [leaf for table in keyless.values() for leaf in table.leaves or (table.name,)]
        alter = (f"ALTER TABLE {quote_table_name(leaf)} REPLICA IDENTITY FULL;" for leaf in leaves)
        raise SetupError(
            f"pgoutput can't send the creates alone of {_quoted_list(keyless)}",
            detail="The server refuses updates and deletes of a published table without a key.",
            hint=" ".join(alter),
            code="table_not_streamable",
        )
    if publication is None:
        raise SetupError(
            f'publication "{name}" does not exist',
            hint=f"Run as the owner of the tables or a superuser: {create}",
            code="publication_missing",
        )
    wanted = frozenset(leaf for table in tables for leaf in (table.leaves or (table.name,)))
    needs_generated = server_version >= GENERATED_COLUMNS_VERSION and _has_generated_column(
        table for table in tables if table.replica_identity is ReplicaIdentity.FULL
    )
    detail = " ".join(_differences(publication, wanted, needs_generated=needs_generated))
    if detail:
        raise SetupError(
            f'publication "{name}" does not match the configured tables',
            detail=detail,
            hint="Run as the owner of the tables or a superuser:"
            f" BEGIN; DROP PUBLICATION {quote_identifier(name)}; {create} COMMIT;",
            code="publication_mismatch",
        )


def tables_not_fully_published(
    publication: Publication | None, tables: Iterable[Table]
) -> frozenset[TableName]:
    """Return the tables of which some changes are not published."""
    if publication is None or publication.is_via_root or not publication.publishes_all_actions:
        return frozenset(table.name for table in tables)
    whole = publication.tables - publication.partial_tables
    return frozenset(
        table.name for table in tables if not whole.issuperset(table.leaves or (table.name,))
    )


def _differences(
    publication: Publication, wanted: frozenset[TableName], *, needs_generated: bool
) -> Iterable[str]:
    if publication.includes_future_tables:
        yield (
            "It is for all tables, or all of a schema: one without a key would have its updates"
            " refused."
        )
    if missing := wanted - publication.tables:
        yield f"It lacks {_quoted_list(missing)}."
    if superfluous := publication.tables - wanted:
        yield f"It has {_quoted_list(superfluous)}, which the configuration doesn't have."
    if narrowed := publication.partial_tables & wanted:
        yield f"It leaves out rows or columns of {_quoted_list(narrowed)}."
    if publication.is_via_root:
        yield "publish_via_partition_root is on, which hides moves between partitions."
    if not publication.publishes_all_actions:
        yield "It doesn't publish all of insert, update, delete, truncate."
    if needs_generated and not publication.has_generated_columns:
        yield "It leaves out generated columns of whole rows: updates of them would be refused."


def _quoted_list(names: Iterable[TableName]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names))
