"""``pgrealtime check``: everything that would keep the service from running, in one go."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import AsyncConnection

from pgrealtime.auth.authenticator import key_sources_of
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.catalog.naming import quote_identifier
from pgrealtime.changes import TableName
from pgrealtime.cli.check.indexes import index_warnings
from pgrealtime.cli.check.warnings import collection_warnings, config_warnings
from pgrealtime.collections.build import (
    build_with_problems,
    check_names,
    configured_table_names,
)
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.load import ParsedConfig
from pgrealtime.config.model import CollectionConfig, Config, DatabaseConfig
from pgrealtime.errors import (
    ConfigError,
    ConfigProblem,
    DatabaseUnreachableError,
    PgRealtimeError,
    RuleError,
    SetupError,
    describe_problem,
)
from pgrealtime.postgres.pool import POLICIES_SHOW_ALL_ROWS, QueryPool
from pgrealtime.postgres.url import parse_database_url
from pgrealtime.rules.language.syntax import parse_expression
from pgrealtime.rules.sql.reference import check_rule
from pgrealtime.service.streamed_tables import streamed_tables
from pgrealtime.wal.slot import SlotWait
from pgrealtime.wal.stream import dry_run_stream

_CONNECT_SECONDS = 10
_URL_SETTING = "database.url (DATABASE_URL), or the PG* variables if it is empty"
_SYSTEM_QUERY = """
SELECT system_identifier::text, pg_catalog.pg_is_in_recovery() FROM pg_catalog.pg_control_system()
"""

_TIMEOUT_SETTINGS = (
    "statement_timeout",
    "transaction_timeout",
    "idle_in_transaction_session_timeout",
)
_TIMEOUTS_QUERY = """
SELECT current_user, name, setting::pg_catalog.int8 FROM pg_catalog.pg_settings
WHERE name = ANY (%(names)s::pg_catalog.text[]) ORDER BY name
"""

_PRIVILEGES_QUERY = f"""
SELECT n.nspname, c.relname, current_user,
       pg_catalog.has_schema_privilege(n.oid, 'USAGE')
         AND pg_catalog.has_table_privilege(c.oid, 'SELECT'),
       pg_catalog.row_security_active(c.oid) AND NOT ({POLICIES_SHOW_ALL_ROWS}),
       pg_catalog.row_security_active(c.oid)
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = ANY (%(oids)s::oid[])
ORDER BY n.nspname, c.relname
"""  # noqa: S608 (text of ours)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What a check found: errors, or what is there to be served."""

    errors: tuple[PgRealtimeError, ...]
    summary_lines: tuple[str, ...] = ()
    """Lines for people."""
    warnings: tuple[str, ...] = ()
    """What runs, but hardly as it is meant; for people, with what mends it."""


async def run_check(
    parsed: ParsedConfig,
    *,
    with_database: bool,
    report_progress: Callable[[str], None] = lambda _: None,
) -> CheckResult:
    """Return everything that is wrong with the configuration, its rules and the database.

    A problem in one place keeps the others from being looked at only where they hang on it.

    Args:
        parsed: What the file says.
        with_database: Whether to connect.
        report_progress: Takes a line about what is waited for.
    """
    config = parsed.config
    if config is None:
        return CheckResult(
            errors=(ConfigError(parsed.problems, source_name=parsed.locations.source),)
        )
    is_connectable = not any(path[:1] == ("database",) for path in parsed.dropped_keys)
    if with_database and is_connectable:
        problems, errors, facts, warnings = await _check_database(config, parsed, report_progress)
    else:
        problems, errors, facts = _offline_problems(config), (), (_summarize_config(config),)
        warnings = ()
    problems = (*problems, *issuer_key_problems(config))
    said = ConfigError((*config_warnings(config), *warnings))
    located = _in_file_order(parsed.locations.locate(said).problems)
    lines = tuple(describe_problem(parsed.locations.source, warning) for warning in located)
    if parsed.problems or problems:
        located = parsed.locations.locate(ConfigError(problems)).problems
        all_problems = _in_file_order((*parsed.problems, *located))
        errors = (ConfigError(all_problems, source_name=parsed.locations.source), *errors)
    return CheckResult(errors=errors, summary_lines=facts, warnings=lines)


def _in_file_order(problems: Iterable[ConfigProblem]) -> tuple[ConfigProblem, ...]:
    return tuple(sorted(problems, key=lambda p: (p.line is None, p.line or 0, p.path)))


def _offline_problems(config: Config) -> tuple[ConfigProblem, ...]:
    return (*check_names(config.collections), *syntax_problems(config.collections))


@dataclass(frozen=True, slots=True, kw_only=True)
class _QueryConnectionResult:
    """What the connection that rules are asked on had to say."""

    collections: Collections
    problems: tuple[ConfigProblem, ...]
    errors: tuple[PgRealtimeError, ...]
    warnings: tuple[ConfigProblem, ...]
    server_description: str
    """For people."""
    system_id: str
    is_standby: bool

    @property
    def tables(self) -> list[Table]:
        """The tables that would be streamed."""
        return list(streamed_tables(self.collections, self.problems).values())


async def _check_database(
    config: Config, parsed: ParsedConfig, report_progress: Callable[[str], None]
) -> tuple[
    tuple[ConfigProblem, ...],
    tuple[PgRealtimeError, ...],
    tuple[str, ...],
    tuple[ConfigProblem, ...],
]:
    """Return problems, errors, facts and warnings."""
    try:
        asked = await _check_query_connection(config, parsed)
    except PgRealtimeError as error:
        return _offline_problems(config), (error,), (), ()
    try:
        system, slot, reason = await dry_run_stream(
            config.database.url,
            config.replication,
            asked.tables,
            on_wait=lambda wait: report_progress(_describe_wait(wait)),
        )
    except PgRealtimeError as error:
        return asked.problems, (*asked.errors, error), (), asked.warnings
    if system.system_id != asked.system_id:
        return asked.problems, (*asked.errors, _different_servers_error()), (), asked.warnings
    if asked.is_standby:
        return asked.problems, (*asked.errors, _standby_error()), (), asked.warnings
    facts = (
        _summarize_collections(asked.collections),
        f"{asked.server_description}, {slot.plugin}{f' ({reason})' if reason else ''}",
    )
    return asked.problems, asked.errors, facts, asked.warnings


async def _check_query_connection(config: Config, parsed: ParsedConfig) -> _QueryConnectionResult:
    database = config.database
    key = "database.query_url" if database.query_url else _URL_SETTING
    async with connect_once(database.query_url or database.url, key=key) as connection:
        names = configured_table_names(config.collections, database.schemas)
        catalog = await read_catalog(connection, schemas=database.schemas, names=names)
        collections, problems = _build_collections(config, catalog, parsed)
        system_id, is_standby = await _fetch_row(connection, _SYSTEM_QUERY)
        # Where something is wrong, what it means is anybody's guess.
        warnings = [] if problems else list(collection_warnings(collections))
        if not problems:
            warnings += [one async for one in index_warnings(connection, collections)]
        warnings += await _timeout_warnings(connection, database)
        return _QueryConnectionResult(
            collections=collections,
            problems=problems,
            errors=await queried_privilege_errors(connection, collections),
            warnings=tuple(warnings),
            server_description=_describe_server(connection),
            system_id=system_id,
            is_standby=is_standby,
        )


async def _timeout_warnings(
    connection: AsyncConnection[Any], database: DatabaseConfig
) -> list[ConfigProblem]:
    """Say which time-outs that sessions begin with end what ours would let go on."""
    ours = database.statement_timeout * 1000
    rows = await (
        await connection.execute(_TIMEOUTS_QUERY, {"names": list(_TIMEOUT_SETTINGS)})
    ).fetchall()
    return [
        ConfigProblem(
            "database.statement_timeout",
            f'sessions of role "{role}" begin with {name} = {milliseconds} ms, less than this',
            f"ALTER ROLE {quote_identifier(role)} RESET {name};"
            " or the database's, whichever sets it",
        )
        for role, name, milliseconds in rows
        if 0 < milliseconds < ours
    ]


async def _fetch_row(connection: AsyncConnection[Any], query: LiteralString) -> tuple[Any, ...]:
    row = await (await connection.execute(query)).fetchone()
    assert row is not None
    return tuple(row)


def _describe_wait(wait: SlotWait) -> str:
    """Return what the slot's making waits for: every transaction that has written and is open."""
    whose = [f"process {pid}" for pid in wait.pids] or [
        f'prepared "{gid}"' for gid in wait.prepared
    ]
    return f"waiting for the open transaction of {', '.join(whose) or 'somebody'}"


def _different_servers_error() -> SetupError:
    return SetupError(
        "database.url and database.query_url lead to different servers",
        detail="Their system identifiers differ.",
        hint="Both must reach the same primary; query_url may do so through a pooler.",
        code="different_servers",
    )


def _standby_error() -> SetupError:
    return SetupError(
        "database.query_url leads to a standby",
        detail="Rules would be asked of rows that have yet to come there.",
        hint="Let it lead to the primary, for instance by target_session_attrs=primary over all"
        " hosts.",
        code="standby",
    )


def _build_collections(
    config: Config, catalog: Catalog, parsed: ParsedConfig
) -> tuple[Collections, tuple[ConfigProblem, ...]]:
    """Return the collections, and what is wrong with them and their rules.

    Where a collection could not be made out, relations and rules may name it: then only the
    syntax of rules is judged.
    """
    if any(path[0] == "collections" and len(path) <= 2 for path in parsed.dropped_keys):  # noqa: PLR2004 (collections.NAME)
        return Collections(()), tuple(syntax_problems(config.collections))
    collections, problems = build_with_problems(config.collections, catalog)
    if len(collections) < len(config.collections):
        return collections, (*problems, *syntax_problems(config.collections))
    return collections, (*problems, *rule_problems(collections))


def rule_problems(collections: Collections) -> Iterator[ConfigProblem]:
    """Yield each rule that can't be used, with the place in its text."""
    for collection in collections.values():
        for key, rule in _nonempty_rules(collection):
            try:
                check_rule(collections, collection, rule)
            except RuleError as error:
                yield _rule_problem(f"collections.{collection.name}.{key}", rule, error)


def issuer_key_problems(config: Config) -> tuple[ConfigProblem, ...]:
    """Return which public keys can't be used."""
    try:
        key_sources_of(config.auth)
    except ConfigError as error:
        return error.problems
    return ()


def syntax_problems(configured: Mapping[str, CollectionConfig]) -> Iterator[ConfigProblem]:
    """Yield each rule that isn't of the language, whatever the tables are."""
    for name, config in configured.items():
        for key, rule in _nonempty_rules(config):
            try:
                parse_expression(rule)
            except RuleError as error:
                yield _rule_problem(f"collections.{name}.{key}", rule, error)


def _nonempty_rules(owner: Collection | CollectionConfig) -> Iterator[tuple[str, str]]:
    """Yield the rules that have a text: neither everyone's nor nobody's."""
    for key in ("list_rule", "view_rule", "manage_rule", "auth_rule"):
        rule = getattr(owner, key)
        if rule:
            yield key, rule


def _rule_problem(path: str, rule: str, error: RuleError) -> ConfigProblem:
    hint = (error.hint[:1].lower() + error.hint[1:]).removesuffix(".")
    return ConfigProblem(
        path, error.message, hint, marked_text=underline_span(rule, error.start, error.end)
    )


def underline_span(text: str, start: int, end: int) -> str:
    """Return the line of the text that a span begins in, and carets under the span.

    Args:
        text: A rule, maybe of several lines.
        start: Offset in characters.
        end: Offset after the last one; at least one caret is drawn.
    """
    begin = text.rfind("\n", 0, start) + 1
    line = text[begin:].partition("\n")[0].replace("\t", " ")
    before, marked = line[: start - begin], line[start - begin : end - begin]
    return f"    {line}\n    {' ' * _terminal_width(before)}{'^' * max(1, _terminal_width(marked))}"


def _terminal_width(text: str) -> int:
    """Return how wide a terminal shows the text: ideographs take two cells."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@asynccontextmanager
async def connect_once(url: str, *, key: str = _URL_SETTING) -> AsyncIterator[AsyncConnection[Any]]:
    """Connect once, in autocommit mode; an empty URL is libpq's PG* variables.

    Args:
        url: Of the database.
        key: Where it is configured, for people.

    Raises:
        DatabaseUnreachableError: Nobody answers, or the login is refused.
        SetupError: Code ``database_url_invalid``.
    """
    settings = parse_database_url(url) | {
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


async def privilege_errors(
    connection: AsyncConnection[Any], tables: Iterable[Table]
) -> Mapping[TableName, SetupError]:
    """Say which tables rules could not be asked of, or only through somebody's policies."""
    oids = [table.oid for table in tables]
    rows = await (await connection.execute(_PRIVILEGES_QUERY, {"oids": oids})).fetchall()
    return {
        (name := TableName(schema, table)): _policy_error(name, role)
        if is_readable
        else _grant_error(name, role)
        for schema, table, role, is_readable, is_filtered, _ in rows
        if is_filtered or not is_readable
    }


async def configure_row_security(pool: QueryPool, collections: Collections) -> None:
    """Let the pool read tables by policies that show every row, if there are such tables.

    Until that is known, and if there is no answer, each of its transactions asks itself.

    Raises:
        psycopg.Error: There is no answer.
        PoolTimeout: No connection became free in time.
    """
    pool.enable_row_security_for(queried_table_names(collections))
    oids = [table.oid for table in _queried_tables(collections)]
    async with pool.connection() as connection:
        cursor = await connection.execute(_PRIVILEGES_QUERY, {"oids": oids})
        if not any(row[-1] for row in await cursor.fetchall()):
            pool.enable_row_security_for(())


def queried_table_names(*collection_sets: Collections) -> frozenset[TableName]:
    """Return the tables that are asked about for some collections."""
    return frozenset(table.name for one in collection_sets for table in _queried_tables(one))


async def queried_privilege_errors(
    connection: AsyncConnection[Any], collections: Collections
) -> tuple[SetupError, ...]:
    """Say of which of the tables that they read rules could not be asked."""
    return tuple((await privilege_errors(connection, _queried_tables(collections))).values())


def _queried_tables(collections: Collections) -> Iterator[Table]:
    for collection in collections.values():
        yield collection.table
        for field in collection.fields:
            if field.relation is not None and field.relation.junction is not None:
                yield field.relation.junction.table


def _grant_error(name: TableName, role: str) -> SetupError:
    schema, table, to = (quote_identifier(part) for part in (name.schema, name.name, role))
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
        hint=f"Run as a superuser: ALTER ROLE {quote_identifier(role)} BYPASSRLS;"
        " or as the table's owner: CREATE POLICY pgrealtime"
        f" ON {quote_identifier(name.schema)}.{quote_identifier(name.name)} FOR SELECT"
        f" TO {quote_identifier(role)} USING (true);",
        code="row_security",
    )


def _summarize_collections(collections: Collections) -> str:
    fields = sum(len(collection.fields) for collection in collections.values())
    rules = _rule_count(collections.values())
    counts = ((len(collections), "collection"), (fields, "field"), (rules, "rule"))
    return ", ".join(_pluralize(count, word) for count, word in counts)


def _summarize_config(config: Config) -> str:
    rules = _rule_count(config.collections.values())
    return f"{_pluralize(len(config.collections), 'collection')}, {_pluralize(rules, 'rule')}"


def _rule_count(owners: Iterable[Collection | CollectionConfig]) -> int:
    return sum(1 for one in owners for _ in _nonempty_rules(one))


def _pluralize(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _describe_server(connection: AsyncConnection[Any]) -> str:
    info = connection.info
    major, minor = divmod(info.server_version, 10_000)
    return f'PostgreSQL {major}.{minor}, database "{info.dbname}"'
