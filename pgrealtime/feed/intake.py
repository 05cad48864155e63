"""Appends entries to the changelog, waits while it is full, and wakes the follower.

The reader of the replication stream hands its transactions over here; nothing else appends to the
changelog. Knows neither streams nor connections.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

import structlog

from pgrealtime.changelog.memory import Changelog, Entry, Gap, Watermark
from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.lsn import LSN, Cursor, format_lsn

log = structlog.get_logger(__name__)


class Follower(Protocol):
    """Reads the changelog and delivers it."""

    @property
    def head(self) -> Cursor:
        """The cursor up to which everything was delivered."""

    @property
    def progressed(self) -> asyncio.Event:
        """Set whenever the head advanced."""

    def wake(self) -> None:
        """Read on: the changelog has new entries."""

    def stream_started(self, epoch: str) -> None:
        """A stream is being read."""

    def stream_continued(self, epoch: str) -> None:
        """Another stream continues exactly where the last one ended."""

    def stream_lost(self) -> None:
        """No stream is being read."""


class Intake:
    """Appends to the changelog, which nothing else does.

    ``max_size`` bytes may wait in the changelog for the follower. Beyond them ``append`` waits, and
    the stream is closed after its ``max_pause``: a gap.
    """

    def __init__(self, changelog: Changelog, follower: Follower, *, max_size: int) -> None:
        self.changelog = changelog
        self.follower = follower
        self.changes_received = 0
        self._max_size = max_size
        self._appended_at = time.monotonic()

    @property
    def end_lsn(self) -> LSN:
        """The end of the last entry."""
        return self.changelog.end_cursor.lsn

    async def append(self, entry: Transaction | OversizedTransaction) -> None:
        """Append a transaction once there is room for it. The caller wakes the follower.

        A transaction larger than ``max_size`` is appended when nothing else waits.
        """
        size = entry.size_bytes if isinstance(entry, Transaction) else 0
        bytes_after, follower = self.changelog.bytes_after, self.follower
        while (waiting := bytes_after(follower.head)) and waiting + size > self._max_size:
            # Cleared before the follower is woken: its progress in between would be missed.
            follower.progressed.clear()
            follower.wake()
            await follower.progressed.wait()
        self._append(entry, time.monotonic())
        if isinstance(entry, Transaction):
            self.changes_received += len(entry.changes)
        else:
            _log_gap("too_large", entry.tables)

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        """Append a gap: changes of the tables may be missing up to here."""
        # Behind the last commit and before any later one: a commit record alone has more bytes.
        end_lsn = LSN(self.end_lsn + 1)
        self._append(Gap(end_lsn, reason, tables), time.monotonic())
        _log_gap(reason, tables)
        self.follower.wake()

    def append_lost_slot(self, start_lsn: LSN) -> None:
        """Append a gap of all tables, up to where a new slot begins."""
        self._append(Gap(start_lsn, "slot_lost"), time.monotonic())
        log.warning("replication.gap", reason="slot_lost", lsn=format_lsn(start_lsn))

    def append_watermark(self, lsn: LSN, now: float, *, min_interval_seconds: float) -> bool:
        """Record that no table had a commit up to an LSN; return whether that was due."""
        if lsn <= self.end_lsn or now - self._appended_at < min_interval_seconds:
            return False
        self._append(Watermark(lsn), now)
        self.follower.wake()
        return True

    def _append(self, entry: Entry, now: float) -> None:
        # What the follower has yet to deliver is not trimmed.
        self.changelog.append(entry, now, self.follower.head)
        self._appended_at = now


def _log_gap(reason: str, tables: Iterable[TableName]) -> None:
    log.warning("replication.gap", reason=reason, tables=sorted(map(str, tables)))
