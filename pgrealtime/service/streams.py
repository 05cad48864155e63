"""Opens replication streams, and advances the durable slot. The feed receives these methods."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import structlog

from pgrealtime.config.model import Config
from pgrealtime.feed.base import WantedTables
from pgrealtime.lsn import LSN
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.service.slot_watch import SlotWatch
from pgrealtime.wal import slot_status
from pgrealtime.wal.server import open_ordinary_connection
from pgrealtime.wal.slot import SlotWait
from pgrealtime.wal.stream import WalStream, dry_run_stream, open_stream

log = structlog.get_logger(__name__)


class StreamOpener:
    """Opens streams with the database, slot and size limits that the process was started with.

    ``pool`` is asked how much WAL their slots retain.
    """

    def __init__(self, config: Config, pool: QueryPool) -> None:
        self._pool = pool
        self._url = config.database.url
        self._replication = config.replication
        self._max_transaction_bytes = config.changelog.max_size

    @property
    def is_durable(self) -> bool:
        """Whether all streams read one durable slot."""
        return self._replication.slot.durable

    @asynccontextmanager
    async def open(
        self, wanted: WantedTables, start_lsn: LSN | None = None
    ) -> AsyncIterator[WalStream]:
        """Open a stream of the tables; on a durable slot it may begin later than the slot.

        It ends with SlotLostError when its slot retains too much WAL.
        """
        async with open_stream(
            self._url,
            self._replication,
            list(wanted.tables.values()),
            record_keys=wanted.record_keys,
            max_transaction_bytes=self._max_transaction_bytes,
            start_lsn=start_lsn,
            on_wait=_log_slot_wait,
        ) as stream:
            watch = SlotWatch(stream, self._pool, self._replication.slot.max_retained_wal)
            watch_task = asyncio.create_task(watch.run(), name="slot-watch")
            try:
                yield stream
            finally:
                watch_task.cancel()
                await asyncio.wait((watch_task,))

    async def check_reopenable(self, wanted: WantedTables) -> None:
        """Check that the durable slot could be reopened with other tables.

        Does nothing for a temporary slot: its successor is opened before the stream is replaced.

        Raises:
            PgRealtimeError: It couldn't be.
        """
        if self.is_durable:
            await dry_run_stream(self._url, self._replication, list(wanted.tables.values()))

    async def advance_slot(self) -> None:
        """Move the durable slot to the end of the server's WAL; log a warning if that fails."""
        name = self._replication.slot.name
        try:
            async with await open_ordinary_connection(self._url) as connection:
                await slot_status.advance_slot(connection, name)
        except psycopg.Error as error:
            log.warning("slot.advance_failed", slot=name, reason=message_without_values(error))


def _log_slot_wait(wait: SlotWait) -> None:
    log.warning("slot.waiting", pids=wait.pids, prepared=wait.prepared)
