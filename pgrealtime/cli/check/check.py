"""``pgrealtime check``: everything that would keep the service from running, in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, LiteralString

from psycopg import AsyncConnection

from pgrealtime.auth.authenticator import issuer_key_problems
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.catalog.naming import quote_identifier
from pgrealtime.catalog.privileges import (
    read_privilege_errors,
)
from pgrealtime.cli.check.indexes import index_warnings
from pgrealtime.cli.check.warnings import collection_warnings, config_warnings
from pgrealtime.collections.build import (
    build_with_problems,
    check_names,
    configured_table_names,
)
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.streamed_tables import reachable_tables, streamed_tables
from pgrealtime.config.load import ParsedConfig
from pgrealtime.config.model import CollectionConfig, Config, DatabaseConfig
from pgrealtime.errors import (
    ConfigError,
    ConfigProblem,
    PgRealtimeError,
    SetupError,
    describe_problem,
)
from pgrealtime.postgres.connect import URL_SETTING, connect_once
from pgrealtime.rules.rule_set import rule_problems, rule_texts, syntax_problems
from pgrealtime.wal.slot import SlotWait
from pgrealtime.wal.stream import dry_run_stream

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
    key = "database.query_url" if database.query_url else URL_SETTING
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
            errors=tuple(
                (
                    await read_privilege_errors(connection, reachable_tables(collections).values())
                ).values()
            ),
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


def _summarize_collections(collections: Collections) -> str:
    fields = sum(len(collection.fields) for collection in collections.values())
    rules = _rule_count(collections.values())
    counts = ((len(collections), "collection"), (fields, "field"), (rules, "rule"))
    return ", ".join(_pluralize(count, word) for count, word in counts)


def _summarize_config(config: Config) -> str:
    rules = _rule_count(config.collections.values())
    return f"{_pluralize(len(config.collections), 'collection')}, {_pluralize(rules, 'rule')}"


def _rule_count(owners: Iterable[Collection | CollectionConfig]) -> int:
    return sum(1 for one in owners for _ in rule_texts(one))


def _pluralize(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _describe_server(connection: AsyncConnection[Any]) -> str:
    info = connection.info
    major, minor = divmod(info.server_version, 10_000)
    return f'PostgreSQL {major}.{minor}, database "{info.dbname}"'
