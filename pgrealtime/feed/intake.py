"""Appends entries to a window, waits while it is full, and wakes the follower.

Where transactions arrive, from the replication stream or from another process, they are handed over
here; nothing else appends to the window. Knows neither streams nor connections.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

import structlog

from pgrealtime.changelog.memory import Entry, Gap, Watermark
from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.history import Era
from pgrealtime.lsn import LSN, Cursor, format_lsn

log = structlog.get_logger(__name__)


class Window(Protocol):
    """Keeps recent entries, as ``Changelog`` does in memory."""

    @property
    def era(self) -> Era | None:
        """What the newest entries belong to; None before the first stream."""

    @property
    def floor(self) -> Cursor:
        """What ends up to here need not be kept any more; the stream's server may forget it."""

    @property
    def end_cursor(self) -> Cursor:
        """The cursor after the last entry."""

    def begin_era(self, era: Era) -> None:
        """All entries from now on belong to an era."""

    def append(self, entry: Entry, now: float, upto: Cursor) -> None:
        """Append an entry; what ends after ``upto`` is not removed for it."""

    def restart(self, start: LSN) -> None:
        """Remove all entries; those that follow belong to another history."""

    def expire(self, now: float, upto: Cursor) -> None:
        """Remove old entries that end by ``upto``."""

    def bytes_after(self, cursor: Cursor) -> int:
        """Return the bytes of the entries that end after the cursor."""


class Follower(Protocol):
    """Reads the window and delivers it."""

    @property
    def head(self) -> Cursor:
        """The cursor up to which everything was delivered."""

    @property
    def progressed(self) -> asyncio.Event:
        """Set whenever the head advanced."""

    def wake(self) -> None:
        """Read on: the window has new entries."""

    def stream_started(self, epoch: str) -> None:
        """A stream is being read."""

    def stream_continued(self, epoch: str) -> None:
        """Another stream continues exactly where the last one ended."""

    def stream_lost(self) -> None:
        """No stream is being read."""


class Intake:
    """Appends to the window, which nothing else does.

    ``max_size`` bytes may wait in the window for the follower. Beyond them ``append`` waits, and
    the stream is closed after its ``max_pause``: a gap.
    """

    def __init__(self, window: Window, follower: Follower, *, max_size: int) -> None:
        self._window = window
        self._follower = follower
        self.changes_received = 0
        self._max_size = max_size
        self._appended_at = time.monotonic()

    @property
    def end_lsn(self) -> LSN:
        """The end of the last entry."""
        return self._window.end_cursor.lsn

    @property
    def floor_lsn(self) -> LSN:
        """What ends up to here need not be sent again."""
        return self._window.floor.lsn

    @property
    def era(self) -> Era | None:
        """What the newest entries belong to; None before the first stream."""
        return self._window.era

    # -- streams

    def restart(self, start_lsn: LSN) -> None:
        """Remove all entries: another history begins, whose era the caller starts next."""
        self._window.restart(start_lsn)

    def start_era(self, era: Era) -> None:
        """A stream is being read; its first entry follows the last one, or a gap."""
        self._window.begin_era(era)
        self._follower.stream_started(era.epoch)
        self._follower.wake()

    def continue_era(self, era: Era) -> None:
        """Another stream continues exactly where the last one ended."""
        self._window.begin_era(era)
        self._follower.stream_continued(era.epoch)

    def lose_stream(self) -> None:
        """No stream is being read."""
        self._follower.stream_lost()

    def wake(self) -> None:
        """Let the follower read what was appended."""
        self._follower.wake()

    def expire(self, now: float) -> None:
        """Remove old entries that the follower has delivered."""
        self._window.expire(now, self._follower.head)

    # -- entries

    async def append(self, entry: Entry, now: float | None = None) -> None:
        """Append an entry once there is room for it. The caller wakes the follower.

        ``now`` are the monotonic seconds from which its age is counted.

        A transaction larger than ``max_size`` is appended when nothing else waits.
        """
        size = entry.size_bytes if isinstance(entry, Transaction) else 0
        bytes_after, follower = self._window.bytes_after, self._follower
        while (waiting := bytes_after(follower.head)) and waiting + size > self._max_size:
            # Cleared before the follower is woken: its progress in between would be missed.
            follower.progressed.clear()
            follower.wake()
            await follower.progressed.wait()
        self._append(entry, time.monotonic() if now is None else now)
        match entry:
            case Transaction():
                self.changes_received += len(entry.changes)
            case OversizedTransaction():
                _log_gap("too_large", entry.tables)
            case Gap():
                _log_gap(entry.reason, entry.tables)
            case Watermark():
                pass

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        """Append a gap: changes of the tables may be missing up to here."""
        # Behind the last commit and before any later one: a commit record alone has more bytes.
        end_lsn = LSN(self.end_lsn + 1)
        self._append(Gap(end_lsn, reason, tables), time.monotonic())
        _log_gap(reason, tables)
        self._follower.wake()

    def append_missing(self, reason: str, upto: LSN) -> None:
        """Append a gap of all tables, up to where what follows begins."""
        self._append(Gap(upto, reason), time.monotonic())
        _log_gap(reason, None, lsn=format_lsn(upto))

    def append_watermark(self, lsn: LSN, now: float, *, min_interval_seconds: float) -> bool:
        """Record that no table had a commit up to an LSN; return whether that was due."""
        if lsn <= self.end_lsn or now - self._appended_at < min_interval_seconds:
            return False
        self._append(Watermark(lsn), now)
        self._follower.wake()
        return True

    def _append(self, entry: Entry, now: float) -> None:
        # What the follower has yet to deliver is not trimmed.
        self._window.append(entry, now, self._follower.head)
        self._appended_at = now


def _log_gap(reason: str, tables: Iterable[TableName] | None, lsn: str | None = None) -> None:
    names = None if tables is None else sorted(map(str, tables))
    log.warning("replication.gap", reason=reason, tables=names, lsn=lsn)
