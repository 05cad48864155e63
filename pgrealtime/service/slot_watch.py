"""Watches how much WAL a stream's slot retains, and gives it up rather than let a disk fill.

Run beside each stream by ``service.streams``.
"""

import asyncio
from typing import NoReturn

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from pgrealtime.errors import SlotLostError
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.wal.slot_status import SlotStatus, list_own_slots
from pgrealtime.wal.stream import WalStream

log = structlog.get_logger(__name__)

_POLL_SECONDS = 5.0
_QUERY_TIMEOUT_SECONDS = 5.0

_WARNED_SHARE = 0.5
"""Of the limit."""
_CALM_SHARE = 0.25
"""Below this share of the limit, the next warning may come."""

SERVER_LIMIT_QUERY = (
    "SELECT setting::int8 * 1048576 FROM pg_settings WHERE name = 'max_slot_wal_keep_size'"
)


class SlotWatch:
    """Warns while a slot retains much WAL, and ends its stream when that is too much.

    The reader then opens another one: a temporary slot ends with its stream, and a durable one that
    is beyond the limit is dropped when it is opened again (``wal.slot``). Either is a gap.

    ``max_retained_wal`` is in bytes; 0 is no limit.
    """

    def __init__(self, stream: WalStream, pool: QueryPool, max_retained_wal: int) -> None:
        self._stream = stream
        self._pool = pool
        self._max_retained_wal = max_retained_wal
        self._has_warned = False
        self._wal_status = ""

    async def run(self) -> NoReturn:
        """Watch until cancelled. Nothing is known, and nothing done, while PostgreSQL is silent."""
        while True:
            try:
                async with asyncio.timeout(_QUERY_TIMEOUT_SECONDS):
                    found = await self._read()
            except (psycopg.Error, PoolTimeout, TimeoutError):
                found = None
            if found is not None:
                self.check(*found)
            await asyncio.sleep(_POLL_SECONDS)

    async def _read(self) -> tuple[SlotStatus, int] | None:
        """Return the slot, and the server's own limit in bytes (negative: none)."""
        name = self._stream.slot.name
        async with self._pool.connection(_QUERY_TIMEOUT_SECONDS) as connection:
            row = await (await connection.execute(SERVER_LIMIT_QUERY)).fetchone()
            assert row is not None
            for status in await list_own_slots(connection, name):
                if status.name == name:
                    return status, row[0]
        return None

    def check(self, status: SlotStatus, server_limit: int) -> None:
        """Log what an operator has to know about the slot; end the stream of one to replace."""
        if reason := status.reason_to_replace(self._max_retained_wal):
            log.error("slot.given_up", slot=status.name, reason=reason)
            self._stream.end(SlotLostError(f'slot "{status.name}" is given up', detail=reason))
            return
        self._warn_of_retained(status, server_limit)
        before, self._wal_status = self._wal_status, status.wal_status
        if status.wal_status == "unreserved" and before != "unreserved":
            # More than max_slot_wal_keep_size.
            log.error(
                "slot.wal_unreserved",
                slot=status.name,
                retained_bytes=status.retained_bytes,
                reason="the server removes WAL that the slot needs at its next checkpoint",
            )

    def _warn_of_retained(self, status: SlotStatus, server_limit: int) -> None:
        limits = {
            "replication.slot.max_retained_wal": self._max_retained_wal,
            "max_slot_wal_keep_size": server_limit,
        }
        limits = {name: size for name, size in limits.items() if size > 0}
        if not limits:
            return
        name, limit = min(limits.items(), key=lambda item: item[1])
        if status.retained_bytes < limit * _CALM_SHARE:
            self._has_warned = False
        elif status.retained_bytes >= limit * _WARNED_SHARE and not self._has_warned:
            self._has_warned = True
            log.warning(
                "slot.retained_wal_high",
                slot=status.name,
                retained_bytes=status.retained_bytes,
                unconfirmed_bytes=status.unconfirmed_bytes,
                limit_bytes=limit,
                limit=name,
            )
