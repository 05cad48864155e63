"""The window that is the log: takes what the reader appends, and stores it as messages.

It is both sides of the owner's intake: the window that entries are appended to, and the follower
that they wait for. Entries wait here until they are stored; the WAL behind the slot is the buffer
for all that doesn't fit.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from pgrealtime.changelog.memory import Entry
from pgrealtime.changes import Transaction
from pgrealtime.errors import LogAwayError
from pgrealtime.feed.frames import EntriesFrame, EraFrame
from pgrealtime.feed.wire import encode_frame
from pgrealtime.history import Era
from pgrealtime.log.jetstream import LogStream
from pgrealtime.log.message import MAX_UNACKNOWLEDGED, Chain, Kind
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor

MAX_WAITING_BYTES = 8 * 1024 * 1024
"""Entries, in memory, that may wait to be stored."""
_BATCH_BYTES = 256 * 1024
"""Of entries in memory, which are larger than their encoding."""
_ERA_SECONDS = 60.0


class _Body(NamedTuple):
    """What one message says, or several as its parts."""

    kind: Kind
    data: bytes
    size_bytes: int
    """Of the entries, in memory."""
    item_count: int
    """Of entries and eras."""
    end: Cursor
    """Where the last entry ends."""


class _UnderWay(NamedTuple):
    """A message that was sent."""

    future: asyncio.Future[int]
    sent_at: float
    completed: _Body | None
    """What is stored as a whole once this message is."""


class LogWriter:
    """Writes the log in one term. ``run`` sends; all other methods return at once.

    Args:
        stream: Appended to.
        chain: Its fence is stored.
        era: What the log's last entries belong to; None if nobody knows.
        start: Where the log ends, by the rule of reading.
        stored_upto: Returns the LSN up to which the log was read back.
        lag_seconds: How far the slot stays behind that.
        max_pause_seconds: Without an acknowledgement for so long the log is away.
        era_bytes: An era is repeated at least as often.
    """

    def __init__(
        self,
        stream: LogStream,
        chain: Chain,
        *,
        era: Era | None,
        start: LSN,
        stored_upto: Callable[[], LSN],
        lag_seconds: float,
        max_pause_seconds: float,
        era_bytes: int,
    ) -> None:
        self.era = era
        self.floor = self.end_cursor = self.head = Cursor(start, END_ORDINAL)
        self.progressed = asyncio.Event()
        self.is_streaming = False
        self.sequence = 0
        """Of the last message known to be stored."""
        self.stored_lsn = LSN(0)
        """Where the entries end that are known to be stored in this term; 0 before its era is."""
        self.append_seconds = 0.0
        """How long the last message took to be stored."""
        self.resume_lsn = start
        """Where the next stream begins: before the last entry, so that it proves the history."""
        self._stream = stream
        self._chain = chain
        self._stored_upto = stored_upto
        self._lag_seconds = lag_seconds
        self._max_pause_seconds = max_pause_seconds
        self._era_bytes = era_bytes
        self._waiting: deque[Entry | EraFrame] = deque()
        self._waiting_bytes = self._era_due_bytes = 0
        self._added_count = self._stored_count = 0
        """Entries and eras, ever."""
        self._era_due_at = time.monotonic() + _ERA_SECONDS
        self._is_restarted = False
        self._floors: deque[tuple[float, LSN]] = deque()
        self._wakeup = asyncio.Event()
        self._stored = asyncio.Event()

    # -- the window

    def begin_era(self, era: Era) -> None:
        """All entries from now on belong to an era."""
        self.era = era

    def append(self, entry: Entry, now: float, upto: Cursor) -> None:  # noqa: ARG002 (the protocol's)
        """Let an entry be stored with those before it."""
        self._waiting.append(entry)
        self._added_count += 1
        self._waiting_bytes += _size_of(entry)
        self.resume_lsn = self.end_cursor.lsn
        self.end_cursor = Cursor(entry.end_lsn, END_ORDINAL)

    def restart(self, start: LSN) -> None:
        """Begin another history with the era that follows."""
        self._is_restarted = True
        self.floor = self.end_cursor = Cursor(start, END_ORDINAL)
        self.resume_lsn = start
        self._floors.clear()

    def expire(self, now: float, upto: Cursor) -> None:  # noqa: ARG002 (the protocol's)
        """Let the slot forget what was read back from the log ``lag_seconds`` ago."""
        # At most the end: right after a restart the log's head is another history's.
        self._floors.append((now, min(self._stored_upto(), self.end_cursor.lsn)))
        while self._floors and self._floors[0][0] <= now - self._lag_seconds:
            self.floor = Cursor(max(self.floor.lsn, self._floors.popleft()[1]), END_ORDINAL)
        if now >= self._era_due_at:
            self._repeat_era()

    def bytes_after(self, cursor: Cursor) -> int:  # noqa: ARG002 (only the head is asked for)
        """Return the bytes of the entries that wait to be stored."""
        return self._waiting_bytes

    # -- the follower

    def wake(self) -> None:
        """Store what was appended."""
        self._wakeup.set()

    def stream_started(self, epoch: str) -> None:  # noqa: ARG002 (the era says it)
        """Store the era of a stream that is being read."""
        self.is_streaming = True
        self._add_era(is_continuation=False)

    def stream_continued(self, epoch: str) -> None:  # noqa: ARG002 (the era says it)
        """Store the era of a stream that continues the last one."""
        self._add_era(is_continuation=True)

    def stream_lost(self) -> None:
        """No stream is being read; beats say so."""
        self.is_streaming = False

    async def wait_stored(self) -> None:
        """Wait until everything that was appended so far is stored."""
        target = self._added_count
        while self._stored_count < target:
            self._stored.clear()
            await self._stored.wait()

    # -- storing

    async def run(self) -> None:
        """Store what is appended, in order, for ever.

        Raises:
            LogAwayError: The log refuses a message, or doesn't acknowledge it in time.
        """
        under_way: deque[_UnderWay] = deque()
        while True:
            self._wakeup.clear()
            while self._waiting:
                await self._send(self._next_body(), under_way)
            if under_way:
                await self._await_stored(under_way.popleft())
            else:
                await self._wakeup.wait()

    async def _send(self, body: _Body, under_way: deque[_UnderWay]) -> None:
        """Send a body's messages; wait while as many are under way as may be."""
        parts = self._chain.messages(body.kind, body.data)
        for part, (after, payload) in enumerate(parts, start=1):
            if len(under_way) >= MAX_UNACKNOWLEDGED:
                await self._await_stored(under_way.popleft())
            future = await self._stream.append(payload, after)
            completed = body if part == len(parts) else None
            under_way.append(_UnderWay(future, time.monotonic(), completed))

    async def _await_stored(self, message: _UnderWay) -> None:
        """Wait for the acknowledgement of the message that was sent first of those under way.

        Those of later ones mean nothing before it.
        """
        try:
            async with asyncio.timeout(self._max_pause_seconds):
                self.sequence = await message.future
        except TimeoutError:
            raise LogAwayError(
                f"the log has acknowledged nothing for {self._max_pause_seconds:g} s"
            ) from None
        self.append_seconds = time.monotonic() - message.sent_at
        if (body := message.completed) is not None:
            self._waiting_bytes -= body.size_bytes
            self._stored_count += body.item_count
            self.head, self.stored_lsn = body.end, body.end.lsn
        self.progressed.set()
        self._stored.set()

    def _next_body(self) -> _Body:
        """Return what waits first: an era, or entries up to the size of a batch."""
        first = self._waiting[0]
        if isinstance(first, EraFrame):
            self._waiting.popleft()
            end = Cursor(first.start_lsn, END_ORDINAL)
            return _Body(Kind.ERA, encode_frame(first), 0, 1, end)
        entries: list[Entry] = []
        size = 0
        while self._waiting and size < _BATCH_BYTES:
            entry = self._waiting[0]
            if isinstance(entry, EraFrame):
                break
            entries.append(entry)
            size += _size_of(entry)
            self._waiting.popleft()
        end = Cursor(entries[-1].end_lsn, END_ORDINAL)
        self._era_due_bytes += size
        if self._era_due_bytes > self._era_bytes:
            self._repeat_era(end)
        data = encode_frame(EntriesFrame(tuple(entries)))
        return _Body(Kind.ENTRIES, data, size, len(entries), end)

    def _repeat_era(self, at: Cursor | None = None) -> None:
        if self.era is None or not self.is_streaming:
            return
        self._era_due_at, self._era_due_bytes = time.monotonic() + _ERA_SECONDS, 0
        self._added_count += 1
        if at is None:
            self._waiting.append(EraFrame(self.era, self.end_cursor.lsn))
        else:
            self._waiting.appendleft(EraFrame(self.era, at.lsn))
        self._wakeup.set()

    def _add_era(self, *, is_continuation: bool) -> None:
        assert self.era is not None, "begin_era comes first"
        start = self.end_cursor.lsn
        self._waiting.append(EraFrame(self.era, start, self._is_restarted, is_continuation))
        self._is_restarted = False
        self._added_count += 1
        self._wakeup.set()


def _size_of(entry: Entry) -> int:
    return entry.size_bytes if isinstance(entry, Transaction) else 0
