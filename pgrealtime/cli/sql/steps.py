"""Finds what a database lacks of what a configuration needs, as statements with their undo.

Everything is read from the catalogue, by any role; nothing is changed. Used by the command ``sql``.
"""

import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection
from psycopg.sql import Literal

from pgrealtime.catalog.model import Catalog, Table, TableKind
from pgrealtime.catalog.record_ids import record_key, with_record_key
from pgrealtime.changes import TableName, quote_identifier, quote_table_name
from pgrealtime.cli.check.indexes import index_warnings
from pgrealtime.cli.check.list_indexes import list_index_warnings
from pgrealtime.cli.check.rules import columns_read, parsed_rules
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import link_columns, streamed_tables
from pgrealtime.errors import ConfigProblem, SetupError
from pgrealtime.wal.provider import MAY_REPLICATE, read_provider
from pgrealtime.wal.publication import check_publication, publication_sql
from pgrealtime.wal.slot import read_publication


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that is lacking; its statements may be run again."""

    reason: str
    apply: str
    undo: str
    """Empty if what was there before can't be told."""
    undo_role: str = ""
    """The role that the undo is about; it is to be skipped if that doesn't exist."""


def role_exists(role: str) -> str:
    """Return the condition that a role exists."""
    return f"EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {_literal(role)})"


def guarded(condition: str, *statements: str) -> str:
    """Return a block that runs the statements if the condition holds."""
    body = "\n".join((f"BEGIN IF {condition} THEN", *(f"  {one}" for one in statements), "END IF;"))
    tag = "$do$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    return f"DO {tag} {body} END {tag};"


def _literal(text: str) -> str:
    return Literal(text).as_string()


# -- roles

_ROLE_QUERY = f"""
SELECT r.rolcanlogin, {MAY_REPLICATE},
       pg_catalog.has_database_privilege(r.oid, pg_catalog.current_database(), 'CONNECT')
FROM pg_catalog.pg_roles r WHERE r.rolname = %s
"""  # noqa: S608 (constant text)


async def role_steps(
    connection: AsyncConnection[Any], stream_role: str, query_role: str
) -> AsyncIterator[Step]:
    """Yield what the logins lack; the roles may be one."""
    provider = await read_provider(connection)
    for role in dict.fromkeys((stream_role, query_role)):
        row = await (await connection.execute(_ROLE_QUERY, (role,))).fetchone()
        can_login, can_replicate, can_connect = row or (False, False, False)
        name = quote_identifier(role)
        if row is None:
            settings = [f"CREATE ROLE {name} LOGIN;"]
            if role != stream_role:
                # A precaution, since SQL can switch it off: grants decide what it may write.
                settings.append(f"ALTER ROLE {name} SET default_transaction_read_only = on;")
            yield Step(
                reason=f'role "{role}" doesn\'t exist; then give it a password: \\password {name}',
                apply=guarded(f"NOT {role_exists(role)}", *settings),
                undo=f"DROP ROLE {name};",
                undo_role=role,
            )
        elif not can_login:
            yield Step(
                reason=f'role "{role}" may not log in',
                apply=f"ALTER ROLE {name} LOGIN;",
                undo=f"ALTER ROLE {name} NOLOGIN;",
            )
        if role == stream_role and not can_replicate:
            yield Step(
                reason=f'role "{role}" may not read the replication stream, which has every change'
                " of every table: protect its login like a superuser's",
                apply=provider.replication.format(role=name)
                if provider
                else f"ALTER ROLE {name} REPLICATION;",
                undo=provider.undo_replication.format(role=name)
                if provider
                else f"ALTER ROLE {name} NOREPLICATION;",
                undo_role=role,
            )
        if not can_connect:
            database = quote_identifier(connection.info.dbname)
            yield Step(
                reason=f'role "{role}" may not connect',
                apply=f"GRANT CONNECT ON DATABASE {database} TO {name};",
                undo=f"REVOKE CONNECT ON DATABASE {database} FROM {name};",
                undo_role=role,
            )


# -- grants

_GRANTS_QUERY = """
SELECT n.nspname, c.relname,
       coalesce(pg_catalog.has_schema_privilege(r.oid, n.oid, 'USAGE'), false),
       coalesce(pg_catalog.has_table_privilege(r.oid, c.oid, 'SELECT'), false),
       c.relrowsecurity AND NOT coalesce(
         r.rolsuper OR r.rolbypassrls
         OR (NOT c.relforcerowsecurity AND pg_catalog.pg_has_role(r.oid, c.relowner, 'USAGE')),
         false),
       EXISTS (SELECT FROM pg_catalog.pg_policy p
               WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('r', '*')
                 AND pg_catalog.pg_get_expr(p.polqual, p.polrelid) = 'true'
                 AND EXISTS (SELECT FROM pg_catalog.unnest(p.polroles) o
                             WHERE o = 0 OR pg_catalog.pg_has_role(r.oid, o, 'USAGE'))),
       EXISTS (SELECT FROM pg_catalog.pg_policy p
               WHERE p.polrelid = c.oid AND NOT p.polpermissive AND p.polcmd IN ('r', '*')
                 AND EXISTS (SELECT FROM pg_catalog.unnest(p.polroles) o
                             WHERE o = 0 OR pg_catalog.pg_has_role(r.oid, o, 'USAGE')))
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_roles r ON r.rolname = %(role)s
WHERE c.oid = ANY (%(oids)s::pg_catalog.oid[])
ORDER BY n.nspname, c.relname
"""


async def grant_steps(
    connection: AsyncConnection[Any], tables: Iterable[Table], role: str
) -> AsyncIterator[Step]:
    """Yield what the role lacks to read every row of the tables."""
    oids = [table.oid for table in tables]
    cursor = await connection.execute(_GRANTS_QUERY, {"oids": oids, "role": role})
    rows = await cursor.fetchall()
    name = quote_identifier(role)
    for schema in dict.fromkeys(row[0] for row in rows if not row[2]):
        quoted = quote_identifier(schema)
        yield Step(
            reason=f'role "{role}" may not use schema "{schema}"',
            apply=f"GRANT USAGE ON SCHEMA {quoted} TO {name};",
            undo=f"REVOKE USAGE ON SCHEMA {quoted} FROM {name};",
            undo_role=role,
        )
    for schema, table, _, is_readable, *_ in rows:
        if not is_readable:
            quoted = quote_table_name(TableName(schema, table))
            yield Step(
                reason=f'role "{role}" may not read "{schema}.{table}"',
                apply=f"GRANT SELECT ON {quoted} TO {name};",
                undo=f"REVOKE SELECT ON {quoted} FROM {name};",  # noqa: S608 (printed)
                undo_role=role,
            )
    for schema, table, _, _, is_filtered, shows_all, is_restricted in rows:
        if is_filtered and is_restricted:
            yield Step(
                reason=f'a restrictive policy hides rows of "{schema}.{table}" from role "{role}"',
                apply=f"ALTER ROLE {name} BYPASSRLS;",
                undo=f"ALTER ROLE {name} NOBYPASSRLS;",
                undo_role=role,
            )
        elif is_filtered and not shows_all:
            yield _policy_step(TableName(schema, table), role)


def _policy_step(name: TableName, role: str) -> Step:
    table = quote_table_name(name)
    known = (
        "EXISTS (SELECT FROM pg_catalog.pg_policy WHERE polname = 'pgrealtime'"
        f" AND polrelid = {_literal(table)}::pg_catalog.regclass)"
    )
    policy = f"FOR SELECT TO {quote_identifier(role)} USING (true)"
    return Step(
        reason=f'row security hides rows of "{name}" from role "{role}"',
        apply=guarded(f"NOT {known}", f"CREATE POLICY pgrealtime ON {table} {policy};"),
        undo=f"DROP POLICY IF EXISTS pgrealtime ON {table};",
    )


# -- replica identities

_IDENTITY_QUERY = """
SELECT c.relreplident::text, (
  SELECT index.relname FROM pg_catalog.pg_index i
  JOIN pg_catalog.pg_class index ON index.oid = i.indexrelid
  WHERE i.indrelid = c.oid AND i.indisreplident)
FROM pg_catalog.pg_class c WHERE c.oid = %s::pg_catalog.regclass
"""
_IDENTITIES = {"d": "DEFAULT", "n": "NOTHING"}


def tables_to_log_whole(catalog: Catalog, collections: Collections) -> Iterator[tuple[Table, str]]:
    """Yield each table whose deletes don't log what is needed of the old row, and why."""
    for name in streamed_tables(collections):
        owner = next((one for one in collections.values() if one.table.name == name), None)
        # The collections are built for tables that log whole rows; the catalogue's may not.
        table = catalog.tables[name]
        if owner is not None:
            table = with_record_key(table, record_key(owner.key))
        logged = {*table.replica_identity_columns}
        if not logged:
            yield table, f'deletes of "{name}" don\'t say which row they concern'
            continue
        needed = {*link_columns(collections, name)}
        if owner is not None:
            needed.add(owner.key.name)
            for key, _, _ in parsed_rules(owner):
                needed |= columns_read(collections, owner, key)
        lacking = [c.name for c in table.columns if c.name in needed - logged]
        if lacking:
            columns = ", ".join(f'"{column}"' for column in lacking)
            yield table, f'deletes of "{name}" don\'t have {columns} of the old row'


async def identity_steps(
    connection: AsyncConnection[Any], tables: Iterable[tuple[Table, str]]
) -> AsyncIterator[Step]:
    """Yield the statement for every table that holds rows."""
    for table, reason in tables:
        for leaf in table.leaves or (table.name,):
            quoted = quote_table_name(leaf)
            row = await (await connection.execute(_IDENTITY_QUERY, (quoted,))).fetchone()
            if row is None or row[0] == "f":
                continue
            before = _IDENTITIES.get(row[0]) or f"USING INDEX {quote_identifier(row[1])}"
            yield Step(
                reason=reason,
                apply=f"ALTER TABLE {quoted} REPLICA IDENTITY FULL;",
                undo=f"ALTER TABLE {quoted} REPLICA IDENTITY {before};",
            )


# -- publication


async def publication_steps(
    connection: AsyncConnection[Any], name: str, tables: Sequence[Table]
) -> AsyncIterator[Step]:
    """Yield the publication, if it is missing or hasn't exactly these tables."""
    publication = await read_publication(connection, name)
    version = connection.info.server_version
    try:
        check_publication(name, publication, tables, version)
    except SetupError as error:
        drop = f"DROP PUBLICATION IF EXISTS {quote_identifier(name)};"
        yield Step(
            reason=" ".join(filter(None, (error.message, error.detail))),
            apply=f"BEGIN; {drop}\n{publication_sql(name, tables, version)} COMMIT;",
            undo=drop if publication is None else "",
        )


# -- indexes

_INVALID_INDEX_QUERY = """
SELECT FROM pg_catalog.pg_index WHERE indexrelid = pg_catalog.to_regclass(%s) AND NOT indisvalid
"""
_CREATE_INDEX = "CREATE INDEX "


async def index_steps(
    connection: AsyncConnection[Any],
    collections: Collections,
    tables: Mapping[TableName, Table],
    *,
    with_lists: bool,
) -> AsyncIterator[Step]:
    """Yield the indexes that ``check`` misses, under names of their own."""
    warnings: list[ConfigProblem] = [one async for one in index_warnings(connection, collections)]
    if with_lists:
        warnings += [one async for one in list_index_warnings(connection, collections)]
    reasons = {w.hint: w.message for w in warnings if w.hint.startswith(_CREATE_INDEX)}
    for statement, reason in reasons.items():
        definition = statement.removeprefix(_CREATE_INDEX)
        table = next(
            table
            for table in tables.values()
            if definition.startswith(f"ON {quote_table_name(table.name)} ")
        )
        digest = hashlib.sha256(definition.encode()).hexdigest()[:12]
        name = f"pgrealtime_{digest}"
        qualified = quote_table_name(TableName(table.name.schema, name))
        # An index of a partitioned table can't be created concurrently.
        how = "" if table.kind is TableKind.PARTITIONED else "CONCURRENTLY "
        drop = f"DROP INDEX {how}IF EXISTS {qualified};"
        apply = f"{_CREATE_INDEX}{how}IF NOT EXISTS {name} {definition}"
        cursor = await connection.execute(_INVALID_INDEX_QUERY, (qualified,))
        if await cursor.fetchone() is not None:
            apply = f"{drop}  -- left by an attempt that failed\n{apply}"
        yield Step(reason=reason, apply=apply, undo=drop)
