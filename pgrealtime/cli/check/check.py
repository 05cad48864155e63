"""``pgrealtime check``: everything that would keep the service from running, in one go."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import AsyncConnection

from pgrealtime.auth.authenticator import issuers_of
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.changes import TableName
from pgrealtime.cli.check.indexes import index_warnings
from pgrealtime.cli.check.warnings import collection_warnings, config_warnings
from pgrealtime.collections.build import check_names, examine, quoted, table_names
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.load import Reading
from pgrealtime.config.model import CollectionConfig, Config, DatabaseConfig
from pgrealtime.errors import (
    ConfigError,
    DatabaseUnreachableError,
    PgRealtimeError,
    Problem,
    RuleError,
    SetupError,
    describe,
)
from pgrealtime.postgres.pool import SEES_ALL, QueryPool
from pgrealtime.postgres.url import settings_of
from pgrealtime.rules.language.syntax import parse
from pgrealtime.rules.sql.reference import validate
from pgrealtime.service.streamed_tables import streamed_tables
from pgrealtime.wal.slot import SlotWait
from pgrealtime.wal.stream import rehearse_stream

_CONNECT_SECONDS = 10
_URL = "database.url (DATABASE_URL), or the PG* variables if it is empty"
_SYSTEM = """
SELECT system_identifier::text, pg_catalog.pg_is_in_recovery() FROM pg_catalog.pg_control_system()
"""

_SHORTENING = ("statement_timeout", "transaction_timeout", "idle_in_transaction_session_timeout")
_TIMEOUTS = """
SELECT current_user, name, setting::pg_catalog.int8 FROM pg_catalog.pg_settings
WHERE name = ANY (%(names)s::pg_catalog.text[]) ORDER BY name
"""

_RIGHTS = f"""
SELECT n.nspname, c.relname, current_user,
       pg_catalog.has_schema_privilege(n.oid, 'USAGE')
         AND pg_catalog.has_table_privilege(c.oid, 'SELECT'),
       pg_catalog.row_security_active(c.oid) AND NOT ({SEES_ALL}),
       pg_catalog.row_security_active(c.oid)
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = ANY (%(oids)s::oid[])
ORDER BY n.nspname, c.relname
"""  # noqa: S608 (text of ours)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a check found: errors, or what is there to be served."""

    errors: tuple[PgRealtimeError, ...]
    facts: tuple[str, ...] = ()
    """Lines for people."""
    warnings: tuple[str, ...] = ()
    """What runs, but hardly as it is meant; for people, with what mends it."""


async def check(
    reading: Reading, *, with_database: bool, note: Callable[[str], None] = lambda _: None
) -> Findings:
    """Return everything that is wrong with the configuration, its rules and the database.

    A problem in one place keeps the others from being looked at only where they hang on it.

    Args:
        reading: What the file says.
        with_database: Whether to connect.
        note: Takes a line about what is waited for.
    """
    config = reading.config
    if config is None:
        return Findings(errors=(ConfigError(reading.problems, source=reading.origin.source),))
    is_connectable = not any(path[:1] == ("database",) for path in reading.dropped)
    if with_database and is_connectable:
        problems, errors, facts, warnings = await _check_database(config, reading, note)
    else:
        problems, errors, facts = _without_database(config), (), (_counted(config),)
        warnings = ()
    problems = (*problems, *key_problems(config))
    said = ConfigError((*config_warnings(config), *warnings))
    located = _in_file_order(reading.origin.locate(said).problems)
    lines = tuple(describe(reading.origin.source, warning) for warning in located)
    if reading.problems or problems:
        located = reading.origin.locate(ConfigError(problems)).problems
        all_problems = _in_file_order((*reading.problems, *located))
        errors = (ConfigError(all_problems, source=reading.origin.source), *errors)
    return Findings(errors=errors, facts=facts, warnings=lines)


def _in_file_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda p: (p.line is None, p.line or 0, p.path)))


def _without_database(config: Config) -> tuple[Problem, ...]:
    return (*check_names(config.collections), *syntax_problems(config.collections))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the connection that rules are asked on had to say."""

    collections: Collections
    problems: tuple[Problem, ...]
    errors: tuple[PgRealtimeError, ...]
    warnings: tuple[Problem, ...]
    server: str
    """For people."""
    system_id: str
    is_standby: bool

    @property
    def tables(self) -> list[Table]:
        """The tables that would be streamed."""
        return list(streamed_tables(self.collections, self.problems).values())


async def _check_database(
    config: Config, reading: Reading, note: Callable[[str], None]
) -> tuple[tuple[Problem, ...], tuple[PgRealtimeError, ...], tuple[str, ...], tuple[Problem, ...]]:
    """Return problems, errors, facts and warnings."""
    try:
        asked = await _ask(config, reading)
    except PgRealtimeError as error:
        return _without_database(config), (error,), (), ()
    try:
        system, slot, reason = await rehearse_stream(
            config.database.url,
            config.replication,
            asked.tables,
            on_wait=lambda wait: note(_waiting(wait)),
        )
    except PgRealtimeError as error:
        return asked.problems, (*asked.errors, error), (), asked.warnings
    if system.system_id != asked.system_id:
        return asked.problems, (*asked.errors, _other_server()), (), asked.warnings
    if asked.is_standby:
        return asked.problems, (*asked.errors, _standby()), (), asked.warnings
    facts = (
        _counted_fields(asked.collections),
        f"{asked.server}, {slot.plugin}{f' ({reason})' if reason else ''}",
    )
    return asked.problems, asked.errors, facts, asked.warnings


async def _ask(config: Config, reading: Reading) -> _Asked:
    database = config.database
    key = "database.query_url" if database.query_url else _URL
    async with connected(database.query_url or database.url, key=key) as connection:
        names = table_names(config.collections, database.schemas)
        catalog = await read_catalog(connection, schemas=database.schemas, names=names)
        collections, problems = _collections(config, catalog, reading)
        system_id, is_standby = await _row(connection, _SYSTEM)
        # Where something is wrong, what it means is anybody's guess.
        warnings = [] if problems else list(collection_warnings(collections))
        if not problems:
            warnings += [one async for one in index_warnings(connection, collections)]
        warnings += await _timeout_warnings(connection, database)
        return _Asked(
            collections=collections,
            problems=problems,
            errors=await rule_right_errors(connection, collections),
            warnings=tuple(warnings),
            server=_server(connection),
            system_id=system_id,
            is_standby=is_standby,
        )


async def _timeout_warnings(
    connection: AsyncConnection[Any], database: DatabaseConfig
) -> list[Problem]:
    """Say which time-outs that sessions begin with end what ours would let go on."""
    ours = database.statement_timeout * 1000
    rows = await (await connection.execute(_TIMEOUTS, {"names": list(_SHORTENING)})).fetchall()
    return [
        Problem(
            "database.statement_timeout",
            f'sessions of role "{role}" begin with {name} = {milliseconds} ms, less than this',
            f"ALTER ROLE {quoted(role)} RESET {name}; or the database's, whichever sets it",
        )
        for role, name, milliseconds in rows
        if 0 < milliseconds < ours
    ]


async def _row(connection: AsyncConnection[Any], query: LiteralString) -> tuple[Any, ...]:
    row = await (await connection.execute(query)).fetchone()
    assert row is not None
    return tuple(row)


def _waiting(wait: SlotWait) -> str:
    """Return what the slot's making waits for: every transaction that has written and is open."""
    whose = [f"process {pid}" for pid in wait.pids] or [
        f'prepared "{gid}"' for gid in wait.prepared
    ]
    return f"waiting for the open transaction of {', '.join(whose) or 'somebody'}"


def _other_server() -> SetupError:
    return SetupError(
        "database.url and database.query_url lead to different servers",
        detail="Their system identifiers differ.",
        hint="Both must reach the same primary; query_url may do so through a pooler.",
        code="different_servers",
    )


def _standby() -> SetupError:
    return SetupError(
        "database.query_url leads to a standby",
        detail="Rules would be asked of rows that have yet to come there.",
        hint="Let it lead to the primary, for instance by target_session_attrs=primary over all"
        " hosts.",
        code="standby",
    )


def _collections(
    config: Config, catalog: Catalog, reading: Reading
) -> tuple[Collections, tuple[Problem, ...]]:
    """Return the collections, and what is wrong with them and their rules.

    Where a collection could not be made out, relations and rules may name it: then only the
    syntax of rules is judged.
    """
    if any(path[0] == "collections" and len(path) <= 2 for path in reading.dropped):  # noqa: PLR2004 (collections.NAME)
        return Collections(()), tuple(syntax_problems(config.collections))
    collections, problems = examine(config.collections, catalog)
    if len(collections) < len(config.collections):
        return collections, (*problems, *syntax_problems(config.collections))
    return collections, (*problems, *rule_problems(collections))


def rule_problems(collections: Collections) -> Iterator[Problem]:
    """Yield each rule that can't be used, with the place in its text."""
    for collection in collections.values():
        for key, rule in _rules(collection):
            try:
                validate(collections, collection, rule)
            except RuleError as error:
                yield _rule_problem(f"collections.{collection.name}.{key}", rule, error)


def key_problems(config: Config) -> tuple[Problem, ...]:
    """Return which public keys can't be used."""
    try:
        issuers_of(config.auth)
    except ConfigError as error:
        return error.problems
    return ()


def syntax_problems(configured: Mapping[str, CollectionConfig]) -> Iterator[Problem]:
    """Yield each rule that isn't of the language, whatever the tables are."""
    for name, config in configured.items():
        for key, rule in _rules(config):
            try:
                parse(rule)
            except RuleError as error:
                yield _rule_problem(f"collections.{name}.{key}", rule, error)


def _rules(ruled: Collection | CollectionConfig) -> Iterator[tuple[str, str]]:
    """Yield the rules that have a text: neither everyone's nor nobody's."""
    for key in ("list_rule", "view_rule", "manage_rule", "auth_rule"):
        rule = getattr(ruled, key)
        if rule:
            yield key, rule


def _rule_problem(path: str, rule: str, error: RuleError) -> Problem:
    hint = (error.hint[:1].lower() + error.hint[1:]).removesuffix(".")
    return Problem(path, error.message, hint, excerpt=excerpt(rule, error.start, error.end))


def excerpt(text: str, start: int, end: int) -> str:
    """Return the line of the text that a span begins in, and carets under the span.

    Args:
        text: A rule, maybe of several lines.
        start: Offset in characters.
        end: Offset after the last one; at least one caret is drawn.
    """
    begin = text.rfind("\n", 0, start) + 1
    line = text[begin:].partition("\n")[0].replace("\t", " ")
    before, marked = line[: start - begin], line[start - begin : end - begin]
    return f"    {line}\n    {' ' * _cells(before)}{'^' * max(1, _cells(marked))}"


def _cells(text: str) -> int:
    """Return how wide a terminal shows the text: ideographs take two cells."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@asynccontextmanager
async def connected(url: str, *, key: str = _URL) -> AsyncIterator[AsyncConnection[Any]]:
    """Connect once, in autocommit mode; an empty URL is libpq's PG* variables.

    Args:
        url: Of the database.
        key: Where it is configured, for people.

    Raises:
        DatabaseUnreachableError: Nobody answers, or the login is refused.
        SetupError: Code ``database_url_invalid``.
    """
    settings = settings_of(url) | {
        "connect_timeout": _CONNECT_SECONDS,
        "application_name": "pgrealtime",
        "client_encoding": "utf8",  # in SQL_ASCII, the driver would hand out bytes
    }
    try:
        connection = await AsyncConnection.connect("", autocommit=True, **settings)
        async with connection:
            yield connection
    except psycopg.OperationalError as error:
        raise DatabaseUnreachableError(
            "the database can't be reached",
            detail=str(error).strip(),
            hint=f"Check {key}.",
        ) from error


async def right_errors(
    connection: AsyncConnection[Any], tables: Iterable[Table]
) -> Mapping[TableName, SetupError]:
    """Say which tables rules could not be asked of, or only through somebody's policies."""
    oids = [table.oid for table in tables]
    rows = await (await connection.execute(_RIGHTS, {"oids": oids})).fetchall()
    return {
        (name := TableName(schema, table)): _policy_error(name, role)
        if is_readable
        else _grant_error(name, role)
        for schema, table, role, is_readable, is_filtered, _ in rows
        if is_filtered or not is_readable
    }


async def rely_on_policies(pool: QueryPool, collections: Collections) -> None:
    """Let the pool read tables by policies that show every row, if there are such tables.

    Until that is known, and if there is no answer, each of its transactions asks itself.

    Raises:
        psycopg.Error: There is no answer.
        PoolTimeout: No connection became free in time.
    """
    pool.rely_on_policies(tables_asked(collections))
    oids = [table.oid for table in _read_by_rules(collections)]
    async with pool.connection() as connection:
        cursor = await connection.execute(_RIGHTS, {"oids": oids})
        if not any(row[-1] for row in await cursor.fetchall()):
            pool.rely_on_policies(())


def tables_asked(*those: Collections) -> frozenset[TableName]:
    """Return the tables that are asked about for some collections."""
    return frozenset(table.name for one in those for table in _read_by_rules(one))


async def rule_right_errors(
    connection: AsyncConnection[Any], collections: Collections
) -> tuple[SetupError, ...]:
    """Say of which of the tables that they read rules could not be asked."""
    return tuple((await right_errors(connection, _read_by_rules(collections))).values())


def _read_by_rules(collections: Collections) -> Iterator[Table]:
    for collection in collections.values():
        yield collection.table
        for field in collection.fields:
            if field.relation is not None and field.relation.junction is not None:
                yield field.relation.junction.table


def _grant_error(name: TableName, role: str) -> SetupError:
    schema, table, to = (quoted(part) for part in (name.schema, name.name, role))
    return SetupError(
        f'role "{role}" may not read "{name}"',
        hint=f"GRANT USAGE ON SCHEMA {schema} TO {to}; GRANT SELECT ON {schema}.{table} TO {to};",
        code="select_not_granted",
    )


def _policy_error(name: TableName, role: str) -> SetupError:
    return SetupError(
        f'row security hides rows of "{name}" from role "{role}"',
        detail="Rules would be decided without the rows that its policies hide, so that queries on"
        " the table are refused instead.",
        hint=f"Run as a superuser: ALTER ROLE {quoted(role)} BYPASSRLS; or as the table's owner:"
        f" CREATE POLICY pgrealtime ON {quoted(name.schema)}.{quoted(name.name)} FOR SELECT"
        f" TO {quoted(role)} USING (true);",
        code="row_security",
    )


def _counted_fields(collections: Collections) -> str:
    fields = sum(len(collection.fields) for collection in collections.values())
    rules = _rule_count(collections.values())
    counts = ((len(collections), "collection"), (fields, "field"), (rules, "rule"))
    return ", ".join(_count(count, word) for count, word in counts)


def _counted(config: Config) -> str:
    rules = _rule_count(config.collections.values())
    return f"{_count(len(config.collections), 'collection')}, {_count(rules, 'rule')}"


def _rule_count(ruled: Iterable[Collection | CollectionConfig]) -> int:
    return sum(1 for one in ruled for _ in _rules(one))


def _count(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _server(connection: AsyncConnection[Any]) -> str:
    info = connection.info
    major, minor = divmod(info.server_version, 10_000)
    return f'PostgreSQL {major}.{minor}, database "{info.dbname}"'
