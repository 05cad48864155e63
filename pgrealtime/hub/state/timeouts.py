"""How long connections may live, be idle, stall: one timer for all of them; and their last call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog

from pgrealtime.config.model import RealtimeConfig
from pgrealtime.hub.connections.connection import Connection, ConnectionState
from pgrealtime.lsn import Cursor

log = structlog.get_logger(__name__)

_CONNECT_TIMEOUT_SECONDS = 10.0
"""How long PB_CONNECT is held back at most."""
_FIRST_CALL_TIMEOUT_SECONDS = 30.0
"""How long a resumable connection waits for topics; a plain one has PocketBase's idle limit."""
_CLOSE_DELAY_SECONDS = 1.0
"""No connection is ended sooner after its first call's answer: the JS SDK would stay dead."""
_SHUTDOWN_CLOSE_DELAY_SECONDS = 2.0
_SHUTDOWN_CLOSES_PER_SECOND = 500


class ConnectionTimeouts:
    """Ends connections that are due.

    Args:
        connections: The open ones, by id.
        limits: The operator's.
        head: The cursor that LIVE connections have.
        close: Ends a connection in an orderly way, for a reason.
        abort: Ends one that takes nothing.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        connections: Mapping[str, Connection],
        limits: RealtimeConfig,
        *,
        head: Callable[[], Cursor],
        close: Callable[[Connection, str], None],
        abort: Callable[[Connection], None],
        clock: Callable[[], float],
    ) -> None:
        self._connections = connections
        self._limits = limits
        self._head = head
        self._close = close
        self._abort = abort
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
                    self._apply_timeouts(connection, now)
                except Exception as error:  # noqa: BLE001 (one connection's fault stops nobody)
                    self._close_failed(connection, error)

    def _apply_timeouts(self, connection: Connection, now: float) -> None:
        if connection.state is ConnectionState.CONNECTING:
            if now - connection.opened_at >= _CONNECT_TIMEOUT_SECONDS:
                self._close(connection, "no_stream")
            return
        connection.record_drained(now)
        if now - connection.last_drained_at >= self._limits.stall_timeout:
            self._abort(connection)
        elif reason := self._reason_to_close(connection, now):
            if self.may_close(connection, now):
                self._close(connection, reason)
        elif (
            now - connection.last_write_at >= self._limits.heartbeat
            and not connection.writer.buffered_bytes()
        ):
            connection.last_write_at = now
            connection.write_heartbeat(self._head() if connection.is_live else connection.cursor)

    def _close_failed(self, connection: Connection, error: Exception) -> None:
        name = type(error).__name__
        log.error("connection.failed", connection=connection.id, error=name)
        with suppress(Exception):
            self._close(connection, "failed")

    def _reason_to_close(self, connection: Connection, now: float) -> str:
        limits = self._limits
        expires_at = connection.caller.expires_at
        if connection.close_reason:
            return connection.close_reason
        if now - connection.idle_since >= limits.idle_timeout:
            return "idle"
        if now - connection.connected_at >= limits.max_lifetime:
            return "lifetime"
        if expires_at is not None and time.time() >= expires_at:
            return "token_expired"
        if (
            connection.first_call_answered_at is None
            and connection.is_resumable
            and now - connection.connected_at >= _FIRST_CALL_TIMEOUT_SECONDS
        ):
            return "no_call"
        return ""

    def may_close(self, connection: Connection, now: float) -> bool:
        """Whether ending it now can't fall between PB_CONNECT and the answer to its call."""
        if connection.first_call_answered_at is None:
            is_called = connection.lock.locked()
            return not is_called and now - connection.connected_at >= _CLOSE_DELAY_SECONDS
        return now - connection.first_call_answered_at >= _CLOSE_DELAY_SECONDS

    async def shutdown(self, grace_seconds: float) -> None:
        """End every connection in small groups, never taking longer than ``grace`` seconds."""
        began = self._clock()
        while self._connections and (now := self._clock()) - began < grace_seconds:
            ready = [
                connection
                for connection in self._connections.values()
                if self.may_close(connection, now) or now - began >= _SHUTDOWN_CLOSE_DELAY_SECONDS
            ]
            share = (
                max(
                    _SHUTDOWN_CLOSES_PER_SECOND,
                    len(self._connections) / max(grace_seconds, 0.1) * 2,
                )
                / 20
            )
            for connection in ready[: int(share) + 1]:
                self._close(connection, "shutdown")
            await asyncio.sleep(0.05)
        for connection in list(self._connections.values()):
            self._close(connection, "shutdown")
