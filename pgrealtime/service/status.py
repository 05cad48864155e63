"""Reads metrics and readiness of the running service. Called by the admin port."""

import asyncio
import time
from typing import Any

import psycopg
from psycopg_pool import PoolTimeout

from pgrealtime.config.model import Config
from pgrealtime.inspector.answers import Slot
from pgrealtime.observe.metrics import MetricValues
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.service.parts import ServiceParts
from pgrealtime.service.slot_watch import SERVER_LIMIT_QUERY
from pgrealtime.wal.slot_status import list_own_slots

_QUERY_TIMEOUT_SECONDS = 1.0
"""For PostgreSQL's answer. A scraper's own timeout is often 10 s or less."""

_SLOT_LAG_QUERY = """
SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), confirmed_flush_lsn)::int8,
       pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn)::int8
FROM pg_catalog.pg_replication_slots
WHERE slot_name = %s AND confirmed_flush_lsn IS NOT NULL AND restart_lsn IS NOT NULL
"""


class StatusReader:
    """Reads the counters of the parts, and asks PostgreSQL about the slot.

    The service is not ready in the ``warm_up`` seconds after its stream has begun; 0 is no wait.
    """

    def __init__(self, parts: ServiceParts, *, warm_up: float) -> None:
        self._parts = parts
        self._warm_up_seconds = warm_up
        self.started_at = time.time()
        """Unix seconds."""

    @property
    def pool(self) -> QueryPool:
        """What PostgreSQL is asked by."""
        return self._parts.pool

    @property
    def slot_name(self) -> str | None:
        """The slot that this process reads, if it reads one."""
        return self._parts.feed.status.slot_name

    async def read_metrics(self) -> MetricValues:
        """Return the counters and gauges of this moment."""
        slot_name = self._parts.feed.status.slot_name
        lag_bytes, retained_bytes = await read_slot_lag(self._parts.pool, slot_name)
        hub, counters = self._parts.hub, self._parts.hub.counters
        reader, feed = self._parts.record_reader, self._parts.feed.status
        return MetricValues(
            open_connections=len(hub.connections),
            subscription_counts=hub.subscription_counts,
            events_sent=counters.events_sent_to_closed
            + sum(connection.events_sent for connection in hub.connections),
            closed_connections=counters.closed_connections,
            gaps_notified=hub.gaps_notified,
            mirror_frames=hub.mirror_frames_sent,
            mirror_resyncs=hub.resyncs_written,
            resume_outcomes=counters.resume_outcomes,
            refused_subscribe_calls=counters.refused_subscribe_calls,
            incomplete_records=counters.incomplete_records,
            rule_query_errors=self._parts.executor.unanswered_counts,
            auth_checks=self._parts.authenticator.checks_by_result,
            login_results=self._parts.login_service.attempts_by_result,
            forwarded_calls=self._parts.calls.forwarded_by_result,
            ignored_bus_messages=self._parts.calls.ignored_by_reason,
            read_outcomes={} if reader is None else reader.outcomes,
            changes_received=feed.changes_received,
            stream_breaks=feed.breaks,
            changelog_bytes=self._parts.changelog.size_bytes,
            is_replication_connected=feed.is_connected,
            log=feed.log,
            lag_bytes=lag_bytes,
            retained_bytes=retained_bytes,
        )

    async def not_ready_reasons(self) -> list[str]:
        """Return why no traffic should be sent here; empty if it may be."""
        reasons = []
        if self._parts.hub.is_closing:
            reasons.append("shutting_down")
        if not self._parts.hub.is_stream_up:
            reasons.append("stream_away")
        if self._warm_up_seconds and self._is_warming_up():
            reasons.append("warming_up")
        reasons += self._parts.feed.status.not_ready_reasons
        is_answered = await fetch_row(self._parts.pool, "SELECT 1") is not None
        if not is_answered or self._parts.executor.outage.is_ongoing:
            reasons.append("database_away")
        return reasons

    def _is_warming_up(self) -> bool:
        began_at = self._parts.hub.stream_began_at
        return began_at is None or time.monotonic() - began_at < self._warm_up_seconds


async def read_slot_lag(pool: QueryPool, slot_name: str | None) -> tuple[int | None, int | None]:
    """Return the WAL that a slot hasn't confirmed, and that it retains; None if that is unknown."""
    row = None if slot_name is None else await fetch_row(pool, _SLOT_LAG_QUERY, slot_name)
    return (None, None) if row is None else (int(row[0]), int(row[1]))


async def read_slot(pool: QueryPool, slot_name: str | None, config: Config) -> Slot | None:
    """Return a slot as the server has it; None if there is none, or PostgreSQL doesn't answer."""
    if slot_name is None:
        return None
    try:
        async with (
            asyncio.timeout(_QUERY_TIMEOUT_SECONDS),
            pool.connection(_QUERY_TIMEOUT_SECONDS) as connection,
        ):
            slots = await list_own_slots(connection, slot_name)
            limit = await (await connection.execute(SERVER_LIMIT_QUERY)).fetchone()
    except (psycopg.Error, PoolTimeout, TimeoutError):
        return None
    for one in slots:
        if one.name == slot_name:
            return Slot(
                name=one.name,
                wal_status=one.wal_status,
                is_temporary=one.is_temporary,
                retained_bytes=one.retained_bytes,
                unconfirmed_bytes=one.unconfirmed_bytes,
                max_retained_bytes=config.replication.slot.max_retained_wal,
                server_limit_bytes=limit[0] if limit else -1,
            )
    return None


async def fetch_row(pool: QueryPool, query: str, *params: str) -> tuple[Any, ...] | None:
    """Return the row of a query for probes and metrics; None if PostgreSQL doesn't answer soon."""
    try:
        async with (
            asyncio.timeout(_QUERY_TIMEOUT_SECONDS),
            pool.connection(_QUERY_TIMEOUT_SECONDS) as connection,
        ):
            cursor = await connection.execute(query.encode(), params or None)
            row: tuple[Any, ...] | None = await cursor.fetchone()
            return row
    except (psycopg.Error, PoolTimeout, TimeoutError):
        return None
