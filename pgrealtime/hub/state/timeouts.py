"""How long connections may live, be idle, stall: one timer for all of them; and their last call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog

from pgrealtime.config.model import RealtimeConfig
from pgrealtime.hub.connections.connection import Connection, State
from pgrealtime.lsn import Cursor

log = structlog.get_logger(__name__)

_CONNECT_SECONDS = 10.0
"""How long PB_CONNECT is held back at most."""
_CALL_SECONDS = 30.0
"""How long a resumable connection waits for topics; a plain one has PocketBase's idle limit."""
_SETTLE_SECONDS = 1.0
"""No connection is ended sooner after its first call's answer: the JS SDK would stay dead."""
_SHUTDOWN_SETTLE_SECONDS = 2.0
_CLOSED_PER_SECOND = 500


class Limits:
    """Ends connections that are due.

    Args:
        connections: The open ones, by id.
        limits: The operator's.
        head: The cursor that LIVE connections have.
        end: Ends a connection in an orderly way, for a reason.
        drop: Ends one that takes nothing.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        connections: Mapping[str, Connection],
        limits: RealtimeConfig,
        *,
        head: Callable[[], Cursor],
        end: Callable[[Connection, str], None],
        drop: Callable[[Connection], None],
        clock: Callable[[], float],
    ) -> None:
        self._connections = connections
        self._limits = limits
        self._head = head
        self._end = end
        self._drop = drop
        self._clock = clock

    async def watch(self) -> None:
        """Apply the time limits and send heartbeats, from one timer for all connections."""
        limits = self._limits
        shortest = min(
            limits.idle_timeout, limits.max_lifetime, limits.heartbeat, limits.stall_timeout
        )
        pause = max(0.02, min(0.5, shortest / 20))
        while True:
            await asyncio.sleep(pause)
            now = self._clock()
            for connection in list(self._connections.values()):
                try:
                    self._apply(connection, now)
                except Exception as error:  # noqa: BLE001 (one connection's fault stops nobody)
                    self._fail(connection, error)

    def _apply(self, connection: Connection, now: float) -> None:
        if connection.state is State.CONNECTING:
            if now - connection.opened_at >= _CONNECT_SECONDS:
                self._end(connection, "no_stream")
            return
        connection.note_taken(now)
        if now - connection.taken_at >= self._limits.stall_timeout:
            self._drop(connection)
        elif reason := self._overdue(connection, now):
            if self.is_settled(connection, now):
                self._end(connection, reason)
        elif (
            now - connection.written_at >= self._limits.heartbeat and not connection.sink.buffered()
        ):
            connection.written_at = now
            connection.beat(self._head() if connection.is_live else connection.cursor)

    def _fail(self, connection: Connection, error: Exception) -> None:
        name = type(error).__name__
        log.error("connection.failed", connection=connection.id, error=name)
        with suppress(Exception):
            self._end(connection, "failed")

    def _overdue(self, connection: Connection, now: float) -> str:
        limits = self._limits
        expires_at = connection.caller.expires_at
        if connection.doom:
            return connection.doom
        if now - connection.active_at >= limits.idle_timeout:
            return "idle"
        if now - connection.connected_at >= limits.max_lifetime:
            return "lifetime"
        if expires_at is not None and time.time() >= expires_at:
            return "token_expired"
        if (
            connection.answered_at is None
            and connection.is_resumable
            and now - connection.connected_at >= _CALL_SECONDS
        ):
            return "no_call"
        return ""

    def is_settled(self, connection: Connection, now: float) -> bool:
        """Whether ending it now can't fall between PB_CONNECT and the answer to its call."""
        if connection.answered_at is None:
            is_called = connection.turn.locked()
            return not is_called and now - connection.connected_at >= _SETTLE_SECONDS
        return now - connection.answered_at >= _SETTLE_SECONDS

    async def shutdown(self, grace: float) -> None:
        """End every connection in small groups, never taking longer than ``grace`` seconds."""
        began = self._clock()
        while self._connections and (now := self._clock()) - began < grace:
            ready = [
                connection
                for connection in self._connections.values()
                if self.is_settled(connection, now) or now - began >= _SHUTDOWN_SETTLE_SECONDS
            ]
            share = max(_CLOSED_PER_SECOND, len(self._connections) / max(grace, 0.1) * 2) / 20
            for connection in ready[: int(share) + 1]:
                self._end(connection, "shutdown")
            await asyncio.sleep(0.05)
        for connection in list(self._connections.values()):
            self._end(connection, "shutdown")
