"""Closes connections that are due and sends heartbeats, from one timer; ends all at shutdown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pgrealtime.config.model import RealtimeConfig
from pgrealtime.hub.connections.connection import LIVE, Connection, ConnectionState
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.registry import ConnectionRegistry

_CONNECT_TIMEOUT_SECONDS = 10.0
"""How long PB_CONNECT is held back at most."""
_FIRST_CALL_TIMEOUT_SECONDS = 30.0
"""How long a resumable connection waits for topics; a plain one has PocketBase's idle timeout."""
_SHUTDOWN_CLOSE_DELAY_SECONDS = 2.0
_SHUTDOWN_CLOSES_PER_SECOND = 500
_SHUTDOWN_PAUSE_SECONDS = 0.05


class ConnectionTimeouts:
    """Closes connections that are due."""

    def __init__(
        self,
        progress: DispatchProgress,
        registry: ConnectionRegistry,
        limits: RealtimeConfig,
        clock: Callable[[], float],
    ) -> None:
        self._progress = progress
        self._registry = registry
        self._limits = limits
        self._clock = clock

    async def watch(self) -> None:
        """Apply the timeouts and send heartbeats, for ever."""
        limits = self._limits
        shortest = min(
            limits.idle_timeout, limits.max_lifetime, limits.heartbeat, limits.stall_timeout
        )
        pause = max(0.02, min(0.5, shortest / 20))
        while True:
            await asyncio.sleep(pause)
            now = self._clock()
            for connection in list(self._registry.connections):
                with self._registry.closing_on_error(connection):
                    self._apply_timeouts(connection, now)

    def _apply_timeouts(self, connection: Connection, now: float) -> None:
        if connection.state is ConnectionState.CONNECTING:
            if now - connection.opened_at >= _CONNECT_TIMEOUT_SECONDS:
                self._registry.close(connection, "no_stream")
            return
        connection.record_drained(now)
        if now - connection.last_drained_at >= self._limits.stall_timeout:
            self._registry.abort(connection)
        elif reason := self._reason_to_close(connection, now):
            if connection.may_close(now):
                self._registry.close(connection, reason)
        elif (
            now - connection.last_write_at >= self._limits.heartbeat
            and not connection.writer.buffered_bytes()
        ):
            head = self._progress.head
            connection.write_heartbeat(head if connection.state is LIVE else connection.cursor, now)

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

    async def shutdown(self, grace_seconds: float) -> None:
        """Close all connections within ``grace_seconds``, a few at a time."""
        # Their clients reconnect at once: not all of them in the same moment.
        registry, began = self._registry, self._clock()
        while registry.connections and (now := self._clock()) - began < grace_seconds:
            ready = [
                connection
                for connection in registry.connections
                if connection.may_close(now) or now - began >= _SHUTDOWN_CLOSE_DELAY_SECONDS
            ]
            per_second = max(
                _SHUTDOWN_CLOSES_PER_SECOND,
                len(registry.connections) / max(grace_seconds, 0.1) * 2,
            )
            for connection in ready[: int(per_second * _SHUTDOWN_PAUSE_SECONDS) + 1]:
                registry.close(connection, "shutdown")
            await asyncio.sleep(_SHUTDOWN_PAUSE_SECONDS)
        for connection in list(registry.connections):
            registry.close(connection, "shutdown")
