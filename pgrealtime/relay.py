"""From the stream to the changelog, acknowledging only what is kept; opens the stream anew.

Knows neither connections nor rules: whoever reads the changelog is a ``Follower``.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import structlog

from pgrealtime.changelog.base import Gap
from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.changes import Oversized, TableName, Transaction
from pgrealtime.errors import PgRealtimeError
from pgrealtime.lsn import Cursor, format_lsn
from pgrealtime.wal.slot import SystemIdentity
from pgrealtime.wal.stream import WalStream

log = structlog.get_logger(__name__)

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 10.0
_EXPIRE_SECONDS = 1.0


class Follower(Protocol):
    """Who reads the changelog."""

    @property
    def head(self) -> Cursor:
        """Everything up to here was delivered."""
        ...

    @property
    def progressed(self) -> asyncio.Event:
        """Set whenever the head moved."""
        ...

    def wake(self) -> None:
        """The changelog has more."""
        ...

    def stream_started(self, epoch: str) -> None:
        """The stream is being read."""
        ...

    def stream_lost(self) -> None:
        """The stream is away."""
        ...


class Relay:
    """Keeps the changelog filled.

    Args:
        open_stream: Opens a stream with a slot of its own.
        changelog: Where transactions are kept; this is its only writer.
        follower: Who reads it.
        tables: What is streamed: part of what a position means.
        max_size: Bytes that may wait in the changelog for the follower. Beyond, reading stops,
            and the stream gives up after its ``max_pause``: a gap.
    """

    def __init__(
        self,
        open_stream: Callable[[], AbstractAsyncContextManager[WalStream]],
        changelog: MemoryChangelog,
        follower: Follower,
        *,
        tables: Iterable[TableName],
        max_size: int,
    ) -> None:
        self._open_stream = open_stream
        self._changelog = changelog
        self._follower = follower
        self._tables = tuple(tables)
        self._max_size = max_size
        self._epoch = ""
        self.stream: WalStream | None = None
        """The stream being read, if any."""

    async def run(self) -> None:
        """Read the stream for ever; wait and open it anew where that can help.

        Raises:
            PgRealtimeError: Waiting doesn't mend it.
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                async with self._open_stream() as stream:
                    self._begin(stream)
                    pause = _FIRST_PAUSE
                    await self._read(stream)
            except PgRealtimeError as error:
                self._lose(error)
                if not error.retryable:
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _begin(self, stream: WalStream) -> None:
        epoch = epoch_of(stream.system, self._tables)
        head = self._changelog.head
        if epoch != self._epoch or stream.start_lsn < head.lsn:
            # Another history: first start, failover, restore. LSNs may be used again.
            self._changelog.restart(stream.start_lsn)
        elif stream.start_lsn > head.lsn:
            self._changelog.append(Gap(stream.start_lsn, "slot_lost"), time.monotonic())
            log.warning("replication.gap", reason="slot_lost", lsn=format_lsn(stream.start_lsn))
        is_same_history = epoch == self._epoch and stream.start_lsn >= head.lsn
        if not is_same_history and epoch == self._epoch:
            epoch = _next(epoch)
        self._epoch, self.stream = epoch, stream
        log.info(
            "replication.started",
            plugin=stream.plugin,
            reason=stream.reason or None,
            slot=stream.slot_name,
            lsn=format_lsn(stream.start_lsn),
        )
        self._follower.stream_started(epoch)
        self._follower.wake()

    def _lose(self, error: PgRealtimeError) -> None:
        if self.stream is not None:
            self.stream = None
            self._follower.stream_lost()
        log.warning(
            "replication.lost", code=error.error_code, reason=error.message, detail=error.detail
        )

    async def _read(self, stream: WalStream) -> None:
        async for batch in stream:
            for entry in batch:
                await self._keep(entry)
            stream.keep(batch[-1].end_lsn)
            self._follower.wake()

    async def _keep(self, entry: Transaction | Oversized) -> None:
        size = entry.size if isinstance(entry, Transaction) else 0
        while self._waiting() and self._waiting() + size > self._max_size:
            self._follower.progressed.clear()
            self._follower.wake()
            await self._follower.progressed.wait()
        self._changelog.append(entry, time.monotonic())

    def _waiting(self) -> int:
        return self._changelog.bytes_after(self._follower.head)

    async def expire(self) -> None:
        """Let what is too old go, for ever."""
        while True:
            await asyncio.sleep(_EXPIRE_SECONDS)
            self._changelog.expire(time.monotonic(), self._follower.head)


def epoch_of(system: SystemIdentity, tables: Iterable[TableName]) -> str:
    """Return the six hexadecimal digits that positions of this history of these tables share."""
    names = sorted(f"{table.schema}\0{table.name}" for table in tables)
    text = "\n".join([system.system_id, str(system.timeline), system.database, *names])
    return hashlib.blake2s(text.encode(), digest_size=3).hexdigest()


def _next(epoch: str) -> str:
    """Another epoch, for a history that can't be told apart by system and timeline: a restore."""
    return hashlib.blake2s(epoch.encode(), digest_size=3).hexdigest()
