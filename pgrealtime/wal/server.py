"""Opens connections to the server for ``wal``, explains refusals, reads what decides on streaming.

A replication connection has settings pinned that decide how values are printed, so that the texts
in ``changes`` do not depend on settings of the role, the database or the environment.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL

from pgrealtime.changes import quote_identifier
from pgrealtime.errors import (
    DatabaseUnreachableError,
    PgRealtimeError,
    SetupError,
    SlotBusyError,
    WalError,
)
from pgrealtime.history import SystemIdentity
from pgrealtime.lsn import LSN, parse_lsn
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.url import DEAD_NETWORK_SETTINGS, parse_database_url
from pgrealtime.wal.provider import MAY_REPLICATE, Provider, read_provider

_PINNED_SETTINGS = SQL(
    "SET search_path = pg_catalog; SET DateStyle = ISO; SET TimeZone = UTC;"
    " SET IntervalStyle = postgres; SET extra_float_digits = 1; SET bytea_output = hex;"
    " SET client_encoding = UTF8"
)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Settings of the server that decide how it can be streamed."""

    version: int
    """As ``server_version_num``."""
    encoding: str
    wal_sender_timeout: float
    """Seconds; 0 is never."""
    synchronous_standby_names: str
    application_name: str
    """Of this session."""
    max_slot_wal_keep_mb: int
    """``max_slot_wal_keep_size`` in megabytes; -1 is unlimited."""


@asynccontextmanager
async def open_replication_connection(url: str) -> AsyncIterator[AsyncConnection[Any]]:
    """Open a replication connection to the database; close it on exit.

    Raises:
        DatabaseUnreachableError: No answer, or the login is refused.
        SetupError: The role lacks REPLICATION, or wal_level isn't logical.
        SlotBusyError: All walsenders are in use.
    """
    try:
        connection = await psycopg.AsyncConnection.connect(
            _conninfo(url, replication="database"),
            autocommit=True,
            cursor_factory=psycopg.AsyncClientCursor,
        )
    except psycopg.OperationalError as error:
        raise await _explain_refusal(url, error) from error
    try:
        with translate_driver_errors():
            await connection.execute(_PINNED_SETTINGS)
        yield connection
    finally:
        # Not "async with", whose COMMIT is refused while the connection streams.
        await connection.close()


@contextmanager
def translate_driver_errors() -> Iterator[None]:
    """Translate the driver's errors while a stream is set up."""
    try:
        yield
    except psycopg.OperationalError as error:
        raise DatabaseUnreachableError(
            "the connection was lost while the stream was set up", detail=str(error).strip()
        ) from error
    except psycopg.Error as error:
        raise WalError(
            "the stream can't be set up", detail=message_without_values(error)
        ) from error


async def open_ordinary_connection(url: str) -> AsyncConnection[Any]:
    """Open an ordinary connection in autocommit, whose driver's errors are not translated."""
    return await AsyncConnection.connect(_conninfo(url), autocommit=True)


async def fetch_row(
    connection: AsyncConnection[Any], query: LiteralString | bytes, *params: object
) -> tuple[Any, ...]:
    """Return the row of a query that has one."""
    row: tuple[Any, ...] | None = await (await connection.execute(query, params or None)).fetchone()
    assert row is not None
    return row


def _conninfo(url: str, **more: str) -> str:
    defaults = {"fallback_application_name": "pgrealtime", **DEAD_NETWORK_SETTINGS}
    return make_conninfo("", **{**defaults, **parse_database_url(url), **more})


_REFUSAL_QUERY: LiteralString = f"""
SELECT current_user,
  (SELECT {MAY_REPLICATE} FROM pg_catalog.pg_roles r WHERE r.rolname = current_user),
  current_setting('wal_level'),
  (SELECT count(*) FROM pg_catalog.pg_stat_get_wal_senders()),
  current_setting('max_wal_senders')::int
"""  # noqa: S608 (constant text)


async def _explain_refusal(url: str, error: psycopg.OperationalError) -> PgRealtimeError:
    """Return why a replication connection was refused, from queries on an ordinary one."""
    # The refusal itself has no SQLSTATE, and its text is in the server's language.
    detail = str(error).strip()
    try:
        async with await open_ordinary_connection(url) as connection:
            role, may_replicate, wal_level, senders, max_senders = await fetch_row(
                connection,
                _REFUSAL_QUERY,
            )
            provider = await read_provider(connection)
    except psycopg.Error:
        return DatabaseUnreachableError("the database can't be reached", detail=detail)
    if not may_replicate:
        return SetupError(
            f'role "{role}" may not read the replication stream',
            detail="It lacks the REPLICATION attribute.",
            hint=provider.replication_hint(role)
            if provider
            else f"Run as a superuser: ALTER ROLE {quote_identifier(role)} REPLICATION;",
            code="replication_attribute_missing",
        )
    if wal_level != "logical":
        return _wal_level_error(wal_level, provider)
    if senders >= max_senders:
        return SlotBusyError(
            "all walsenders of the server are in use",
            detail=f"max_wal_senders is {max_senders}, {senders} are connected.",
            hint="End a replica or reader that is not needed, or raise max_wal_senders (restart).",
            code="walsenders_exhausted",
        )
    return DatabaseUnreachableError(
        "the server refuses replication connections",
        detail=detail,
        hint="An ordinary connection with the same URL succeeds. Check pg_hba.conf, and that the"
        " URL leads to the server itself: poolers don't carry replication.",
        code="replication_refused",
    )


def _wal_level_error(wal_level: str, provider: Provider | None) -> SetupError:
    return SetupError(
        f'wal_level is "{wal_level}" and has to be "logical"',
        detail=f"The server is hosted by {provider.name}." if provider else "",
        hint=provider.wal_level
        if provider
        else "Run as a superuser: ALTER SYSTEM SET wal_level = logical; and restart the server.",
        code="wal_level",
    )


async def identify_system(connection: AsyncConnection[Any]) -> tuple[SystemIdentity, LSN]:
    """Return the identity of the connected server, and the flush LSN of its WAL."""
    system_id, timeline, flushed, database = await fetch_row(connection, "IDENTIFY_SYSTEM")
    system = SystemIdentity(system_id=system_id, timeline=int(timeline), database_name=database)
    return system, parse_lsn(flushed)


async def read_server_facts(connection: AsyncConnection[Any]) -> ServerFacts:
    """Return the server's facts.

    Raises:
        SetupError: The server can't be streamed: wal_level, or it is a standby.
    """
    is_standby, wal_level, *settings = await fetch_row(
        connection,
        "SELECT pg_is_in_recovery(), current_setting('wal_level'),"
        # In the order of ServerFacts.
        " current_setting('server_version_num')::int, current_setting('server_encoding'),"
        " (SELECT setting::float / 1000 FROM pg_settings WHERE name = 'wal_sender_timeout'),"
        " current_setting('synchronous_standby_names'), current_setting('application_name'),"
        " (SELECT setting::int FROM pg_settings WHERE name = 'max_slot_wal_keep_size')",
    )
    if is_standby:
        raise SetupError(
            "the server is a standby",
            detail="A standby's snapshots leave out running transactions, so that what a new"
            " subscriber sees and what it receives can't be joined without a gap.",
            hint="Connect to the primary, for example with all hosts and"
            " target_session_attrs=primary.",
            code="standby",
        )
    if wal_level != "logical":
        raise _wal_level_error(wal_level, await read_provider(connection))
    return ServerFacts(*settings)
