"""Opens the query pool of the service, or one connection for a command."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

from pgrealtime.config.model import DatabaseConfig
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.postgres.url import DEAD_NETWORK_SETTINGS, parse_database_url

log = structlog.get_logger(__name__)

_CONNECT_SECONDS = 10
_RETRY_SECONDS = 0.5

URL_SETTING = "database.url (DATABASE_URL), or the PG* variables if it is empty"

# Of both: under a server encoding of SQL_ASCII psycopg returns bytes instead of str otherwise.
_SETTINGS = {"application_name": "pgrealtime", "client_encoding": "utf8"}


@asynccontextmanager
async def connect_once(url: str, *, key: str = URL_SETTING) -> AsyncIterator[AsyncConnection[Any]]:
    """Open one connection in autocommit mode, and close it at the end of the block.

    An empty URL takes libpq's PG* variables. ``key`` names the setting in the error's hint.

    Raises:
        DatabaseUnreachableError: The server doesn't answer, or refuses the login.
        SetupError: Code ``database_url_invalid``.
    """
    settings = parse_database_url(url) | _SETTINGS | {"connect_timeout": _CONNECT_SECONDS}
    try:
        connection = await AsyncConnection.connect("", autocommit=True, **settings)
        async with connection:
            yield connection
    except psycopg.OperationalError as error:
        raise _unreachable_error(error, f"Check {key}.") from error


@asynccontextmanager
async def open_query_pool(
    database: DatabaseConfig,
    *,
    statement_timeout: float | None = None,
    max_size: int | None = None,
) -> AsyncIterator[QueryPool]:
    """Open a pool of read-only connections; by default that on which rule queries run.

    Waits up to ``wait_for`` seconds for a server that is still starting.

    Raises:
        DatabaseUnreachableError: The server didn't answer within that time.
        SetupError: Code ``database_url_invalid``.
    """
    settings = parse_database_url(database.query_url or database.url)
    conninfo = make_conninfo("", **settings | _SETTINGS | DEAD_NETWORK_SETTINGS)
    await _wait_for_server(conninfo, database)
    async with QueryPool(
        conninfo,
        statement_timeout=statement_timeout or database.statement_timeout,
        max_size=max_size or database.pool_size,
    ) as pool:
        yield pool


async def _wait_for_server(conninfo: str, database: DatabaseConfig) -> None:
    deadline = time.monotonic() + database.wait_for
    key = "database.query_url" if database.query_url else "database.url"
    logged_detail = ""
    while True:
        try:
            async with await AsyncConnection.connect(conninfo):
                return
        except psycopg.OperationalError as error:
            if time.monotonic() >= deadline:
                hint = f"Check {key}; it has to lead to the primary."
                raise _unreachable_error(error, hint) from error
            # A wrong password and a server that is still starting look the same: log the detail.
            if (detail := str(error).strip()) != logged_detail:
                log.warning("database.waiting", wait_for=database.wait_for, detail=detail)
                logged_detail = detail
            await asyncio.sleep(_RETRY_SECONDS)


def _unreachable_error(error: psycopg.OperationalError, hint: str) -> DatabaseUnreachableError:
    return DatabaseUnreachableError(
        "the database can't be reached", detail=str(error).strip(), hint=hint
    )
