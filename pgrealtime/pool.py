"""The connections that rules, users and snapshots are asked through; ``run`` makes the pool.

A pooled connection may be dead without saying so. One that the server closed is passed over at
once, and one that gives no answer is hung up: of a network or proxy that drops everything no
error ever comes.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

Connection: TypeAlias = psycopg.AsyncConnection[TupleRow]

_T = TypeVar("_T")

_GRACE_SECONDS = 1.0
"""The server ends a statement itself; this long its word may take to arrive."""

KEEPALIVE = {
    "connect_timeout": "10",
    "tcp_user_timeout": "30000",
    "keepalives_idle": "30",
}
"""For libpq: how long the kernel believes in a dead network, by default a quarter of an hour."""


class QueryConnection(Connection):
    """Waits for no answer much longer than the server may take for it.

    Attributes:
        answer_seconds: What the server may take.
    """

    answer_seconds = 60.0

    async def wait(self, gen: PQGen[_T], *args: Any, **more: Any) -> _T:
        """As the driver does it, but the connection is closed when no answer comes.

        Raises:
            psycopg.OperationalError: None came.
        """
        patience = self.answer_seconds + _GRACE_SECONDS
        hang_up = asyncio.get_running_loop().call_later(patience, self._hang_up)
        try:
            return await super().wait(gen, *args, **more)
        finally:
            hang_up.cancel()

    def _hang_up(self) -> None:
        # Not a cancel: that asks the server, which says nothing, and waits for it.
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)


class QueryPool(AsyncConnectionPool[Connection]):
    """Gives out connections that are alive.

    After a restart of the server all are dead at once, and whoever took one would be refused. The
    library's own ``check`` waits a second after each that it finds dead.
    """

    async def getconn(self, timeout: float | None = None) -> Connection:  # noqa: ASYNC109 (the library's)
        """Return a connection; as the library does it.

        Raises:
            PoolTimeout: None became free in time.
        """
        patience = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + patience
        while True:
            connection = await super().getconn(max(deadline - time.monotonic(), 0.0))
            if await _is_alive(connection):
                return connection
            await self.putconn(connection)  # which makes another


async def _is_alive(connection: Connection) -> bool:
    """Whether the connection is well, without a round trip if it has nothing to say."""
    if connection.closed:
        return False
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    if not waiting.poll(0):
        return True
    try:
        await QueryPool.check_connection(connection)
    except psycopg.Error:
        return False
    return True
