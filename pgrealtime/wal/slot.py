"""Chooses the decoder, creates or reuses the slot and starts replication; explains refusals.

Between ``wal.server`` (the connection) and ``wal.stream``, which reads what is sent.
"""

import asyncio
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import psycopg
from psycopg import AsyncConnection
from psycopg import errors as pg

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName, quote_identifier
from pgrealtime.config.model import ReplicationConfig
from pgrealtime.errors import (
    DatabaseUnreachableError,
    PgRealtimeError,
    SetupError,
    SlotBusyError,
    SlotLostError,
    WalError,
)
from pgrealtime.lsn import LSN, format_lsn, parse_lsn
from pgrealtime.wal.publication import Publication, check_publication, check_tables
from pgrealtime.wal.server import ServerFacts, fetch_row, open_ordinary_connection
from pgrealtime.wal.slot_status import SlotStatus, drop_slot, find_durable_slot

Plugin: TypeAlias = Literal["wal2json", "pgoutput"]

_WAIT_REPORT_SECONDS = 2.0
"""Creating a slot that takes longer waits for open transactions, which are then reported."""
_DRY_RUN_SECONDS = 10.0
"""Timeout of creating a slot in a dry run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotWait:
    """The open transactions for which creating a slot waits."""

    pids: tuple[int, ...]
    prepared: tuple[str, ...]
    """Prepared transactions of the cluster, if no backend is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A slot to stream from."""

    name: str
    plugin: Plugin
    start_lsn: LSN
    """Every transaction that commits later is sent. The consistent point of a new slot, the
    confirmed flush LSN of a reused one."""
    is_durable: bool = False
    plugin_reason: str = ""
    """Why ``auto`` chose pgoutput; empty otherwise."""
    replace_reason: str = ""
    """Why the durable slot of that name was dropped for this one; empty if there was none."""


async def acquire_slot(
    connection: AsyncConnection[Any],
    url: str,
    config: ReplicationConfig,
    *,
    facts: ServerFacts,
    tables: Collection[Table],
    on_wait: Callable[[SlotWait], None] | None = None,
) -> Slot:
    """Create a slot for the configured or the first usable decoder, or reuse the durable one.

    A durable slot that was invalidated, or retains too much WAL, is dropped first.

    Raises:
        SetupError: No allowed decoder, or not the durable slot, can be used.
        SlotBusyError: As ``create_slot``, or the slot to drop is being read.
    """
    check_tables(tables)
    reason = ""
    if config.slot.durable and (status := await find_durable_slot(connection, config, facts)):
        reason = status.reason_to_replace(config.slot.max_retained_wal)
        if not reason:
            return await _reuse_durable_slot(connection, config, status, tables, facts)
        await drop_slot(connection, status)
    slot = await _create_usable_slot(
        connection, url, config, facts=facts, tables=tables, on_wait=on_wait
    )
    return replace(slot, replace_reason=reason)


async def _create_usable_slot(
    connection: AsyncConnection[Any],
    url: str,
    config: ReplicationConfig,
    *,
    facts: ServerFacts,
    tables: Collection[Table],
    on_wait: Callable[[SlotWait], None] | None,
) -> Slot:
    """Create a slot for the configured or the first usable decoder."""
    refusal: SetupError | None = None
    if config.plugin != "pgoutput":
        try:
            _check_encoding("wal2json", facts)
            return await create_slot(connection, url, "wal2json", config, on_wait=on_wait)
        except SetupError as error:
            if config.plugin == "wal2json":
                raise
            refusal = error
    try:
        _check_encoding("pgoutput", facts)
        # Before the slot is created: up to PostgreSQL 17 a change older than the publication stops
        # the decoder for good, and from 18 on a missing publication sends nothing, without error.
        await _check_publication(connection, config, tables, facts)
        slot = await create_slot(connection, url, "pgoutput", config, on_wait=on_wait)
    except SetupError as error:
        raise (error if refusal is None else _no_decoder_error(refusal, error)) from error
    return slot if refusal is None else replace(slot, plugin_reason=refusal.message)


async def dry_run_config(
    connection: AsyncConnection[Any], config: ReplicationConfig, facts: ServerFacts
) -> ReplicationConfig:
    """Return a configuration with which ``acquire_slot`` only tries whether it would succeed.

    The slot is temporary, whatever is configured, and has to be created within a timeout.

    Raises:
        SetupError: As ``find_durable_slot``.
    """
    plugin = config.plugin
    if config.slot.durable and (status := await find_durable_slot(connection, config, facts)):
        plugin = _plugin_of(status)
    temporary = {"durable": False, "failover": False, "create_timeout": _DRY_RUN_SECONDS}
    slot = config.slot.model_copy(update=temporary)
    return config.model_copy(update={"slot": slot, "plugin": plugin})


async def _reuse_durable_slot(
    connection: AsyncConnection[Any],
    config: ReplicationConfig,
    status: SlotStatus,
    tables: Collection[Table],
    facts: ServerFacts,
) -> Slot:
    """Return the durable slot, once it has what is configured."""
    plugin = _plugin_of(status)
    if plugin == "pgoutput":
        await _check_publication(connection, config, tables, facts)
    if config.slot.failover and not status.has_failover:
        await connection.execute(f'ALTER_REPLICATION_SLOT "{status.name}" (FAILOVER true)'.encode())
    return Slot(
        name=status.name,
        plugin=plugin,
        start_lsn=status.confirmed_flush_lsn,
        is_durable=True,
    )


def _plugin_of(slot: SlotStatus) -> Plugin:
    # ``find_durable_slot`` refuses others.
    return "wal2json" if slot.plugin == "wal2json" else "pgoutput"


async def _check_publication(
    connection: AsyncConnection[Any],
    config: ReplicationConfig,
    tables: Collection[Table],
    facts: ServerFacts,
) -> None:
    publication = await read_publication(connection, config.publication)
    check_publication(config.publication, publication, tables, facts.version)


def _no_decoder_error(wal2json: SetupError, pgoutput: SetupError) -> SetupError:
    """Return the error of a server with which neither decoder can be used, with both hints."""
    return SetupError(
        "neither wal2json nor pgoutput can be used",
        detail="\n".join(
            f"{name}: {error.message}. {error.detail}".rstrip()
            for name, error in (("wal2json", wal2json), ("pgoutput", pgoutput))
        ),
        hint=wal2json.hint
        if wal2json.hint == pgoutput.hint
        else f"Either: {wal2json.hint}\nor: {pgoutput.hint}",
        code=wal2json.error_code,
    )


def _check_encoding(plugin: Plugin, facts: ServerFacts) -> None:
    """Check that the decoder sends UTF-8; wal2json writes in the database's encoding."""
    if facts.encoding == "UTF8" or (plugin == "pgoutput" and facts.encoding != "SQL_ASCII"):
        return
    raise SetupError(
        f'{plugin} can\'t be used with a database in encoding "{facts.encoding}"',
        hint="Set replication.plugin to pgoutput."
        if plugin == "wal2json" and facts.encoding != "SQL_ASCII"
        else "Move the data to a database with ENCODING 'UTF8'.",
        code="encoding_unsupported",
    )


async def read_publication(connection: AsyncConnection[Any], name: str) -> Publication | None:
    """Return the publication of that name, None if the database has none."""
    cursor = await connection.execute(
        "SELECT puballtables OR EXISTS (SELECT FROM pg_publication_namespace"
        "                               WHERE pnpubid = p.oid),"
        " pubviaroot, pubinsert AND pubupdate AND pubdelete AND pubtruncate,"
        " coalesce(to_jsonb(p) ->> 'pubgencols' = 's', false)"  # from 18 on
        " FROM pg_publication p WHERE pubname = %s",
        (name,),
    )
    row = await cursor.fetchone()
    if row is None:
        return None
    is_open, via_root, is_complete, has_generated_columns = row
    cursor = await connection.execute(
        "SELECT schemaname, tablename, rowfilter IS NOT NULL OR EXISTS ("
        # By name: ::regclass would need USAGE on the schema, which this role need not have.
        "   SELECT FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
        "   JOIN pg_namespace n ON n.oid = c.relnamespace"
        "   WHERE n.nspname = schemaname AND c.relname = tablename AND attnum > 0"
        "   AND NOT attisdropped AND attgenerated = ''"
        "   AND attname <> ALL (attnames))"
        " FROM pg_publication_tables WHERE pubname = %s",
        (name,),
    )
    tables = await cursor.fetchall()
    return Publication(
        tables=frozenset(TableName(schema, table) for schema, table, _ in tables),
        partial_tables=frozenset(
            TableName(schema, table) for schema, table, part in tables if part
        ),
        includes_future_tables=is_open,
        is_via_root=via_root,
        publishes_all_actions=is_complete,
        has_generated_columns=has_generated_columns,
    )


async def create_slot(
    connection: AsyncConnection[Any],
    url: str,
    plugin: Plugin,
    config: ReplicationConfig,
    *,
    on_wait: Callable[[SlotWait], None] | None = None,
) -> Slot:
    """Create a slot, temporary unless a durable one is configured.

    The server waits for every open transaction of the cluster that has written, prepared ones too;
    ``on_wait`` is called with them every few seconds, read on another connection. A temporary slot
    lives as long as the connection.

    Raises:
        SetupError: The plugin is refused or missing.
        SlotBusyError: No slot is free, or the timeout ended.
    """
    slot = config.slot
    name = slot.name if slot.durable else f"{slot.name}_{secrets.token_hex(4)}"
    kind = "" if slot.durable else "TEMPORARY "
    options = "(SNAPSHOT 'nothing', FAILOVER true)" if slot.failover else "NOEXPORT_SNAPSHOT"
    command = f'CREATE_REPLICATION_SLOT "{name}" {kind}LOGICAL {plugin} {options}'
    async with asyncio.TaskGroup() as group:
        watch_task = group.create_task(
            _watch_wait(url, connection.info.backend_pid, on_wait), name="slot-wait"
        )
        outcome = await _run_create(connection, command, plugin, config.slot.create_timeout)
        watch_task.cancel()
    if isinstance(outcome, PgRealtimeError):
        raise outcome
    return Slot(name=name, plugin=plugin, start_lsn=outcome, is_durable=slot.durable)


async def _run_create(
    connection: AsyncConnection[Any], command: str, plugin: Plugin, timeout_seconds: float
) -> LSN | PgRealtimeError:
    try:
        # The timeout cancels the command on the server too, so that no slot is left.
        # statement_timeout does not end this wait.
        async with asyncio.timeout(timeout_seconds):
            _, consistent_point, *_ = await fetch_row(connection, command.encode())
    except TimeoutError:
        return SlotBusyError(
            f"no slot could be created within {timeout_seconds:g} s",
            detail="Making one waits for all transactions that have written and are open,"
            " prepared ones too, in every database of the server.",
            hint="Look for old ones in pg_stat_activity (xact_start) and pg_prepared_xacts.",
            code="slot_create_timeout",
        )
    except psycopg.Error as error:
        return _create_error(error, plugin)
    return parse_lsn(consistent_point)


def _create_error(error: psycopg.Error, plugin: Plugin) -> PgRealtimeError:
    detail = str(error).strip()
    match error:
        case pg.InsufficientPrivilege():
            return SetupError(
                f'the server refuses the decoder "{plugin}"',
                detail=detail,
                hint="Run as a superuser: ALTER SYSTEM SET output_plugin_libraries = pgoutput,"
                " test_decoding, wal2json; SELECT pg_reload_conf();",
                code="plugin_refused",
            )
        case pg.UndefinedFile():
            return SetupError(
                f'the decoder "{plugin}" is not installed on the server',
                detail=detail,
                hint="Install its package, such as postgresql-17-wal2json, or set"
                " replication.plugin to pgoutput.",
                code="plugin_missing",
            )
        case pg.ConfigurationLimitExceeded():
            return SlotBusyError(
                "all replication slots of the server are in use",
                detail=detail,
                hint="Drop an unused slot, or raise max_replication_slots (restart).",
                code="slots_exhausted",
            )
        case pg.OperationalError():
            return DatabaseUnreachableError(
                "the connection was lost while the slot was created", detail=detail
            )
        case _:
            return WalError("the slot can't be created", detail=detail, code="slot_create_failed")


async def _watch_wait(
    url: str, backend_pid: int, on_wait: Callable[[SlotWait], None] | None
) -> None:
    if on_wait is None:
        return
    while True:
        await asyncio.sleep(_WAIT_REPORT_SECONDS)
        try:
            async with await open_ordinary_connection(url) as connection:
                on_wait(await _read_wait(connection, backend_pid))
        except psycopg.Error:
            continue  # only the report fails; creating the slot raises its own errors


async def _read_wait(connection: AsyncConnection[Any], backend_pid: int) -> SlotWait:
    blocking_pids, prepared = await fetch_row(
        connection,
        "SELECT pg_catalog.pg_blocking_pids(%s),"
        " ARRAY(SELECT gid FROM pg_catalog.pg_prepared_xacts ORDER BY prepared)",
        backend_pid,
    )
    # A prepared transaction has pid 0 there.
    pids = tuple(pid for pid in blocking_pids if pid)
    return SlotWait(pids=pids, prepared=() if pids else tuple(prepared))


async def start_replication(
    connection: AsyncConnection[Any], slot: Slot, options: dict[str, str]
) -> None:
    """Start streaming from the slot; afterwards the connection can run no other command.

    The server starts at the slot's confirmed flush LSN if that is higher than the ``start_lsn``.

    Raises:
        SlotLostError, SlotBusyError, SetupError, WalError: The server refuses.
    """
    # The grammar of replication commands has neither parameters nor E'' strings, which the driver
    # would use for a backslash: options are quoted here.
    listed = ", ".join(
        f"{quote_identifier(name)} '{value.replace(chr(39), chr(39) * 2)}'"
        for name, value in options.items()
    )
    start = format_lsn(slot.start_lsn)
    command = f"START_REPLICATION SLOT {quote_identifier(slot.name)} LOGICAL {start} ({listed})"
    try:
        await connection.execute(command.encode())
    except psycopg.Error as error:
        raise _start_error(error, slot) from error


def _start_error(error: psycopg.Error, slot: Slot) -> PgRealtimeError:
    detail = str(error).strip()
    match error:
        case pg.InsufficientPrivilege() | pg.UndefinedFile():
            return _create_error(error, slot.plugin)
        case pg.UndefinedObject() | pg.ObjectNotInPrerequisiteState():
            return SlotLostError(f'slot "{slot.name}" can no longer be read', detail=detail)
        case pg.ObjectInUse():
            return SlotBusyError(f'slot "{slot.name}" is active for another process', detail=detail)
        case pg.OperationalError():
            return DatabaseUnreachableError(
                "the connection was lost while the stream was started", detail=detail
            )
        case _:
            return WalError("the stream can't be started", detail=detail, code="stream_start")
