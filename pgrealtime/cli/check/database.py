"""Checks the configuration against the database: schema, rules, privileges, and the stream.

The part of ``check`` that connects: once as the query role, once for a dry run of the stream.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from psycopg import AsyncConnection

from pgrealtime.bus.postgres import probe_postgres_bus, read_bus_report
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog
from pgrealtime.catalog.privileges import read_privilege_errors
from pgrealtime.changes import quote_identifier
from pgrealtime.cli.check.indexes import index_warnings
from pgrealtime.cli.check.list_indexes import list_index_warnings
from pgrealtime.cli.check.mirrors import mirror_lines
from pgrealtime.cli.check.warnings import collection_warnings
from pgrealtime.collections.build import build_with_problems
from pgrealtime.collections.model import Collections
from pgrealtime.collections.names import configured_table_names
from pgrealtime.collections.streamed_tables import reachable_tables, streamed_tables
from pgrealtime.config.load import ParsedConfig
from pgrealtime.config.model import Config, DatabaseConfig, SlotConfig
from pgrealtime.errors import ConfigProblem, PgRealtimeError, SetupError
from pgrealtime.explain.rule_tests import run_rule_tests
from pgrealtime.log.installed import require_client
from pgrealtime.postgres.connect import URL_SETTING, connect_once
from pgrealtime.rules.rule_set import rule_problems, rule_texts, syntax_problems
from pgrealtime.wal.provider import Provider, read_provider
from pgrealtime.wal.slot import SlotWait
from pgrealtime.wal.slot_status import list_own_slots
from pgrealtime.wal.stream import dry_run_stream

_SYSTEM_QUERY = """
SELECT system_identifier::text, pg_catalog.pg_is_in_recovery() FROM pg_catalog.pg_control_system()
"""

_TIMEOUTS_QUERY = """
SELECT current_user, name, setting::pg_catalog.int8 FROM pg_catalog.pg_settings
WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout')
ORDER BY name
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found, before paths have lines of the file."""

    has_catalog: bool = False
    """Whether the collections were checked against the catalogue."""
    problems: tuple[ConfigProblem, ...] = ()
    errors: tuple[PgRealtimeError, ...] = ()
    warnings: tuple[ConfigProblem, ...] = ()
    summary_lines: tuple[str, ...] = ()
    failed_tests: tuple[ConfigProblem, ...] = ()
    """Rule tests that came out otherwise than expected."""
    test_decisions: int = 0
    """Decisions of all rule tests."""


async def check_database(
    config: Config, parsed: ParsedConfig, report_progress: Callable[[str], None]
) -> Findings:
    """Check both connections; the summary has lines only if there is no error."""
    try:
        schema = await _check_schema(config, parsed)
    except PgRealtimeError as error:
        return Findings(errors=(error,))
    try:
        findings = await _check_rule_tests(config, schema)
    except PgRealtimeError as error:
        findings = replace(schema.findings, errors=(*schema.findings.errors, error))
    try:
        system, slot = await dry_run_stream(
            config.database.url,
            config.replication,
            list(streamed_tables(schema.collections, findings.problems).values()),
            on_wait=lambda wait: report_progress(_describe_wait(wait)),
        )
    except PgRealtimeError as error:
        return replace(findings, errors=(*findings.errors, error))
    if system.system_id != schema.system_id:
        return replace(findings, errors=(*findings.errors, _different_servers_error()))
    if schema.is_standby:
        return replace(findings, errors=(*findings.errors, _standby_error()))
    try:
        bus_lines = await _check_bus(config)
    except PgRealtimeError as error:
        return replace(findings, errors=(*findings.errors, error))
    reason = f" ({slot.plugin_reason})" if slot.plugin_reason else ""
    server_line = f"{schema.server_description}, {slot.plugin}{reason}"
    lines = (
        _summarize_collections(schema.collections),
        *_read_only_lines(schema.collections),
        server_line,
        *mirror_lines(schema.collections),
        *bus_lines,
        *([count_text(findings.test_decisions, "rule test")] if findings.test_decisions else ()),
    )
    return replace(findings, summary_lines=lines)


async def _check_bus(config: Config) -> tuple[str, ...]:
    """Pass a message on by the bus; return what is there, if there is a bus."""
    url, cluster = config.database.url, config.cluster
    if cluster.bus == "none":
        return ()
    if cluster.bus == "nats":
        require_client()
        from pgrealtime.log.probe import probe_log  # noqa: PLC0415 (the client library is an extra)

        return await probe_log(config)
    async with connect_once(url) as connection:
        report = await read_bus_report(connection, cluster.name)
    await probe_postgres_bus(url, name=cluster.name, secret=cluster.secret)
    verb = "is" if report.replicas == 1 else "are"
    running = f"{count_text(report.replicas, 'process')} of it {verb} running"
    room = f"replication slots and walsenders for {report.room} more"
    return (f'bus "{cluster.name}": works; {running}, {room}',)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SchemaCheck:
    """What the connection of the query role showed."""

    collections: Collections
    findings: Findings
    server_description: str
    system_id: str
    is_standby: bool


async def _check_schema(config: Config, parsed: ParsedConfig) -> _SchemaCheck:
    database = config.database
    key = "database.query_url" if database.query_url else URL_SETTING
    async with connect_once(database.query_url or database.url, key=key) as connection:
        names = configured_table_names(config.collections, database.schemas)
        catalog = await read_catalog(connection, schemas=database.schemas, names=names)
        collections, problems = _build_collections(config, catalog, parsed)
        row = await (await connection.execute(_SYSTEM_QUERY)).fetchone()
        assert row is not None
        warnings: list[ConfigProblem] = []
        if not problems:  # otherwise warnings could be about other tables than intended
            warnings += collection_warnings(collections)
            warnings += [warning async for warning in index_warnings(connection, collections)]
            if config.reads.enabled:
                lists = list_index_warnings(connection, collections)
                warnings += [warning async for warning in lists]
        warnings += await _timeout_warnings(connection, database)
        warnings += await _slot_warnings(connection, config.replication.slot)
        errors = await read_privilege_errors(connection, reachable_tables(collections).values())
        provider = await read_provider(connection)
        major, minor = divmod(connection.info.server_version, 10_000)
        return _SchemaCheck(
            collections=collections,
            findings=Findings(
                has_catalog=True,
                problems=problems,
                errors=tuple(errors.values()),
                warnings=tuple(warnings),
            ),
            server_description=f"PostgreSQL {major}.{minor}{_describe_provider(provider)},"
            f' database "{connection.info.dbname}"',
            system_id=row[0],
            is_standby=row[1],
        )


async def _check_rule_tests(config: Config, schema: _SchemaCheck) -> Findings:
    """Decide the rule tests, unless what they rest on has problems."""
    findings = schema.findings
    if not config.tests or findings.problems or findings.errors:
        return findings
    results = await run_rule_tests(config, schema.collections)
    return replace(
        findings,
        problems=results.problems,
        failed_tests=results.failures,
        test_decisions=results.decisions,
    )


def _build_collections(
    config: Config, catalog: Catalog, parsed: ParsedConfig
) -> tuple[Collections, tuple[ConfigProblem, ...]]:
    """Return the collections, with the problems of theirs and of their rules.

    If a collection is missing, relations and rules may name it: then only the syntax of rules is
    checked.
    """
    if any(path[0] == "collections" and len(path) <= 2 for path in parsed.dropped_keys):  # noqa: PLR2004 (collections.NAME)
        return Collections(()), tuple(syntax_problems(config.collections))
    collections, problems = build_with_problems(
        config.collections, catalog, config.auth.claim_names
    )
    if len(collections) < len(config.collections):
        return collections, (*problems, *syntax_problems(config.collections))
    return collections, (*problems, *rule_problems(collections))


async def _timeout_warnings(
    connection: AsyncConnection[Any], database: DatabaseConfig
) -> list[ConfigProblem]:
    """Return a warning for each timeout of the role or database that is shorter than ours."""
    statement_timeout_ms = database.statement_timeout * 1000
    cursor = await connection.execute(_TIMEOUTS_QUERY)
    return [
        ConfigProblem(
            "database.statement_timeout",
            f'sessions of role "{role}" start with {name} = {milliseconds} ms, which is shorter',
            f"ALTER ROLE {quote_identifier(role)} RESET {name};"
            " or the setting of the database, if that is where it is set",
        )
        for role, name, milliseconds in await cursor.fetchall()
        if 0 < milliseconds < statement_timeout_ms
    ]


async def _slot_warnings(
    connection: AsyncConnection[Any], config: SlotConfig
) -> list[ConfigProblem]:
    """Return a warning if the durable slot exists and the service would not go on from it."""
    if not config.durable:
        return []
    return [
        ConfigProblem(
            "replication.slot",
            f'the service will drop slot "{status.name}" and create it anew, because {reason}',
            "clients are notified of the gap; nothing is left to be done",
        )
        for status in await list_own_slots(connection, config.name)
        if status.name == config.name
        and (reason := status.reason_to_replace(config.max_retained_wal))
    ]


def _describe_provider(provider: Provider | None) -> str:
    if provider is None:
        return ""
    return f" of {provider.name}{f' ({provider.note})' if provider.note else ''}"


def _describe_wait(wait: SlotWait) -> str:
    """Return which open transactions the creation of the slot waits for."""
    sessions = [f"process {pid}" for pid in wait.pids] or [f'prepared "{g}"' for g in wait.prepared]
    return f"waiting for the open transaction of {', '.join(sessions) or 'another session'}"


def _different_servers_error() -> SetupError:
    return SetupError(
        "database.url and database.query_url connect to different servers",
        detail="Their system identifiers differ.",
        hint="Both must connect to the same primary; query_url may go through a pooler.",
        code="different_servers",
    )


def _standby_error() -> SetupError:
    return SetupError(
        "database.query_url connects to a standby",
        detail="Rules would be evaluated on rows that the standby has not received yet.",
        hint="Connect to the primary, for example with all hosts and target_session_attrs=primary.",
        code="standby",
    )


def _summarize_collections(collections: Collections) -> str:
    fields = sum(len(collection.fields) for collection in collections.values())
    rules = sum(1 for served in collections.values() for _ in rule_texts(served))
    counts = ((len(collections), "collection"), (fields, "field"), (rules, "rule"))
    return ", ".join(count_text(count, noun) for count, noun in counts)


def _read_only_lines(collections: Collections) -> Iterator[str]:
    names = [collection.name for collection in collections.values() if not collection.is_streamed]
    if names:
        yield f"read only: {', '.join(names)}"


def count_text(count: int, noun: str) -> str:
    """Return ``1 rule``, ``2 rules``."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{'' if count == 1 else plural}"
