"""How the running service is, read off its rooms when somebody asks: metrics, readiness."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
from psycopg_pool import PoolTimeout

from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.login import Login
from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.feed.reader import Relay
from pgrealtime.hub.hub import Hub
from pgrealtime.observe.metrics import Reading
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.rule_queries.executor import Probe

_PATIENCE_SECONDS = 1.0
"""For the database's answer: whoever scrapes has a time-out of their own, often 10 s or less."""

_SLOT = """
SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), confirmed_flush_lsn)::int8,
       pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn)::int8
FROM pg_catalog.pg_replication_slots
WHERE slot_name = %s AND confirmed_flush_lsn IS NOT NULL AND restart_lsn IS NOT NULL
"""


class Vitals:
    """Reads the rooms.

    Args:
        pool: Where rules are asked.
    """

    def __init__(
        self,
        *,
        hub: Hub,
        relay: Relay,
        changelog: MemoryChangelog,
        probe: Probe,
        authenticator: Authenticator,
        login: Login,
        pool: QueryPool,
    ) -> None:
        self._hub = hub
        self._relay = relay
        self._changelog = changelog
        self._probe = probe
        self._authenticator = authenticator
        self._login = login
        self._pool = pool

    async def read(self) -> Reading:
        """Return what is counted and measured."""
        lag_bytes, retained_bytes = await self._slot()
        hub, counts = self._hub, self._hub.counts
        return Reading(
            connections=len(hub.connections),
            subscriptions=hub.subscriptions,
            events_sent=counts.events_of_closed + sum(one.events for one in hub.connections),
            closed=counts.closed,
            gaps=hub.gaps_told,
            resumes=counts.resumes,
            filters_refused=counts.filters_refused,
            left_out=counts.left_out,
            rule_errors=self._probe.errors,
            auth_checks=self._authenticator.checks,
            logins=self._login.results,
            changes=self._relay.changes,
            stream_breaks=self._relay.breaks,
            changelog_bytes=self._changelog.size,
            is_streaming=self._relay.stream is not None,
            lag_bytes=lag_bytes,
            retained_bytes=retained_bytes,
        )

    async def faults(self) -> list[str]:
        """Return why no traffic should come here; nothing if it may."""
        found = []
        if self._hub.is_closing:
            found.append("shutting_down")
        if not self._hub.stream_is_up:
            found.append("stream_away")
        if await self._ask("SELECT 1") is None or self._probe.outage.is_on:
            found.append("database_away")
        return found

    async def _slot(self) -> tuple[int | None, int | None]:
        stream = self._relay.stream
        row = None if stream is None else await self._ask(_SLOT, stream.slot_name)
        return (None, None) if row is None else (int(row[0]), int(row[1]))

    async def _ask(self, query: str, *params: str) -> tuple[Any, ...] | None:
        try:
            async with (
                asyncio.timeout(_PATIENCE_SECONDS),
                self._pool.connection(_PATIENCE_SECONDS) as connection,
            ):
                cursor = await connection.execute(query.encode(), params or None)
                row: tuple[Any, ...] | None = await cursor.fetchone()
                return row
        except (psycopg.Error, PoolTimeout, TimeoutError):
            return None
