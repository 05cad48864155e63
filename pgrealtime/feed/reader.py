"""From the stream to the changelog, acknowledging only what is kept; opens the stream anew.

From a temporary slot the server may forget what the changelog has. A durable one is the log behind
the changelog: the server may forget what that has let go of, and sends the rest again after a
break, in this process or the next.

Knows neither connections nor rules: whoever reads the changelog is a ``Follower``.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import structlog

from pgrealtime.changelog.base import Entry, Gap, Watermark
from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.errors import PgRealtimeError, SlotBusyError, StreamInterruptedError
from pgrealtime.lsn import LSN, Cursor, Xid, format_lsn
from pgrealtime.wal.server import SystemIdentity
from pgrealtime.wal.stream import WalStream

log = structlog.get_logger(__name__)

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_EXPIRE_SECONDS = 1.0
_MARK_SECONDS = 10.0
"""Between two marks in the changelog where nothing of ours happens, but the server's WAL grows."""
_REOPEN_SECONDS = 5.0
"""How long the server may take to see that a stream was closed; then its slot can be read anew."""
_MAX_DECODER_FAILURES = 5
"""How often in a row a decoder may fail at the same place: with the pauses, some seconds."""
_POLL_SECONDS = 0.02
"""While another stream waits to go on: between two looks at how far this one has read."""

_LSN_WAIT_SECONDS = 1.0
_LSN_POLL_SECONDS = 0.003
_PAGE_BYTES = 8192
_PAGE_HEADER_BYTES = 40

OpenStream: TypeAlias = Callable[[], AbstractAsyncContextManager[WalStream]]
"""Opens a stream with a slot of its own."""


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

    def stream_continued(self, epoch: str) -> None:
        """Another stream goes on exactly where the last one left off."""
        ...

    def stream_lost(self) -> None:
        """The stream is away."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Successor:
    """A stream that is open already, and has all that commits after its start."""

    stream: WalStream
    exit_stack: AsyncExitStack
    """Closes it."""
    has_taken_over: asyncio.Event


class _TransactionIdentity(NamedTuple):
    """Which transaction: after a restore another one may have its place, and its id."""

    end_lsn: LSN
    xid: Xid
    commit_time: int


def _identity_of(entry: Transaction | OversizedTransaction) -> _TransactionIdentity:
    return _TransactionIdentity(entry.end_lsn, entry.xid, entry.commit_time_us)


class ReplicationReader:
    """Keeps the changelog filled.

    Args:
        open_stream: Opens a stream with a slot of its own.
        changelog: Where transactions are kept; this is its only writer.
        follower: Who reads it.
        tables: What is streamed: part of what a position means.
        max_size: Bytes that may wait in the changelog for the follower. Beyond, reading stops,
            and the stream gives up after its ``max_pause``: a gap.
        advance_slot: Moves the durable slot to where the server's WAL ends.
        is_durable: Whether the streams have one slot, so that two can't be open at once.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        changelog: MemoryChangelog,
        follower: Follower,
        *,
        tables: Iterable[TableName],
        max_size: int,
        advance_slot: Callable[[], Awaitable[None]],
        is_durable: bool = False,
    ) -> None:
        self._open_stream = open_stream
        self._is_durable = is_durable
        self._advance_slot = advance_slot
        self._changelog = changelog
        self._follower = follower
        self._tables = tuple(tables)
        self._max_size = max_size
        self._epoch = ""
        self._system: SystemIdentity | None = None
        self._read_upto = LSN(0)
        """The end of the last that came from a stream, or up to where it brought nothing."""
        self._last_kept: _TransactionIdentity | None = None
        """Of the last that was kept of the tables of now."""
        self._expected_repeat: _TransactionIdentity | None = None
        """What a durable slot must send again before anything new, as long as it hasn't."""
        self._has_other_history = False
        """Whether the server turned out to have another history than the changelog."""
        self._appended_at = time.monotonic()
        self._reopening: asyncio.Future[None] | None = None
        """Set while a durable slot's stream is opened anew on purpose."""
        self._reopen_deadline = 0.0
        self._failed_after: LSN | None = None
        """What was read before the durable slot's decoder failed last."""
        self._failure_count = 0
        """How often it did so."""
        self._restore_count = 0
        """How often the history went back without another system or timeline to tell it by."""
        self._timed_out_lsn = LSN(0)
        """What the stream had not come to in time, when it was waited for last."""
        self._switch_lock = asyncio.Lock()
        self._is_reading = False
        self._successor: _Successor | None = None
        self._read_timeout: asyncio.Timeout | None = None
        self.stream: WalStream | None = None
        """The stream being read, if any."""
        self.changes_received = 0
        """Kept so far."""
        self.stream_breaks: Counter[str] = Counter()
        """Of streams, or of attempts at one, by the error's code."""

    async def run(self) -> None:
        """Read the stream for ever; wait and open it anew where that can help.

        Raises:
            PgRealtimeError: Waiting doesn't mend it.
        """
        pause = _FIRST_PAUSE_SECONDS
        while True:
            open_stream = self._open_stream
            try:
                async with AsyncExitStack() as opened:
                    stream = await opened.enter_async_context(open_stream())
                    if self._open_stream is not open_stream:
                        # Other tables are wanted by now.
                        self._reopen_deadline = time.monotonic() + _REOPEN_SECONDS
                        continue
                    self._on_stream_started(stream)
                    pause = pause if self._failure_count else _FIRST_PAUSE_SECONDS
                    await self._read_with_successors(stream, opened)
            except PgRealtimeError as error:
                if self._reopening is not None and self._is_expected_while_reopening(error):
                    await asyncio.sleep(_POLL_SECONDS)
                    continue
                is_durable = self.stream is not None and self.stream.is_durable
                self._on_stream_lost(error)
                if not error.retryable:
                    raise
                if is_durable:
                    await self._handle_decoder_failure(error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def switch(self, open_stream: OpenStream, tables: Iterable[TableName]) -> None:
        """Read other tables from now on, with nothing missed or repeated; return when that is so.

        The other stream is opened beside the one of now, which is read at least up to where the
        other begins; what both have is taken once. Only if the earlier stream breaks before that is
        there a gap, announced like any other. From a durable slot only one stream can be read: it
        is closed and opened anew, and begins with what the changelog holds.

        Raises:
            PgRealtimeError: The other stream can't be opened; the one of now goes on.
        """
        async with self._switch_lock, AsyncExitStack() as opened:
            if self._is_durable or (self.stream is not None and self.stream.is_durable):
                before = self._open_stream, self._tables
                self._open_stream, self._tables = open_stream, tuple(tables)
                self._reopening = asyncio.get_running_loop().create_future()
                self._reopen_deadline = time.monotonic() + _REOPEN_SECONDS
                if self.stream is not None:
                    self.stream.stop()
                # Else run() is opening one, or will: that has the other tables.
                try:
                    await self._reopening
                except PgRealtimeError:
                    self._open_stream, self._tables = before
                    raise
                return
            stream = await opened.enter_async_context(open_stream())
            if self.stream is not None and self.stream.system != stream.system:
                raise StreamInterruptedError(
                    "the database is another by now",
                    detail="The stream of now and one opened beside it lead to different servers"
                    " or histories, so that neither goes on from the other.",
                )
            self._open_stream, self._tables = open_stream, tuple(tables)
            if not self._is_reading:
                return  # run() opens one of these itself
            took_over = asyncio.Event()
            self._successor = _Successor(
                stream=stream, exit_stack=opened.pop_all(), has_taken_over=took_over
            )
            if self._read_timeout is not None:
                self._read_timeout.reschedule(asyncio.get_running_loop().time())
            await took_over.wait()

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        """Announce that changes of the tables may be missing up to here."""
        # Beyond the last commit and before any to come: a commit record alone has more bytes.
        end_lsn = LSN(self._changelog.head.lsn + 1)
        self._append(Gap(end_lsn, reason, tables), time.monotonic())
        _report_gap(reason, tables)
        self._follower.wake()

    async def wait_for_changelog(self, lsn: LSN) -> bool:
        """Wait until the changelog has all that commits up to a position; return whether it does.

        Who asks holds up events, so it is waited for a second at most; and where that wasn't
        enough, not again before the stream has got there.
        """
        lsn = _end_of_record(lsn)
        if self._complete_upto() < self._timed_out_lsn:
            return False
        until = time.monotonic() + _LSN_WAIT_SECONDS
        while self._complete_upto() < lsn:
            if time.monotonic() >= until:
                self._timed_out_lsn = lsn
                return False
            if self.stream is not None:
                self.stream.request_keepalive()
            await asyncio.sleep(_LSN_POLL_SECONDS)
        return True

    def _complete_upto(self) -> LSN:
        head = self._changelog.head.lsn
        if self.stream is None:
            return head
        # What ends before a stream begins is in the changelog, or a gap in it; the last commit of
        # that may have ended earlier.
        return self.stream.empty_until(max(head, self.stream.start_lsn))

    async def _read_with_successors(self, stream: WalStream, opened: AsyncExitStack) -> None:
        """Read a stream and those that go on after it, until one breaks.

        Args:
            stream: The first.
            opened: Closes the one being read.
        """
        self._is_reading = True
        try:
            while True:
                successor = await self._read_until_successor(stream)
                stream, self._successor = successor.stream, None
                earlier = opened.pop_all()
                opened.push_async_exit(successor.exit_stack)
                self._on_stream_continued(stream)
                successor.has_taken_over.set()
                await earlier.aclose()
        finally:
            self._is_reading = False
            if self._successor is not None:
                await self._successor.exit_stack.aclose()
                self._successor.has_taken_over.set()
                self._successor = None

    def _on_stream_continued(self, stream: WalStream) -> None:
        self._epoch, self.stream = self._epoch_of(stream), stream
        log.info(
            "replication.continued",
            plugin=stream.plugin,
            slot=stream.slot_name,
            lsn=format_lsn(stream.start_lsn),
        )
        self._follower.stream_continued(self._epoch)

    def _on_stream_started(self, stream: WalStream) -> None:
        epoch = self._epoch_of(stream)
        head = self._changelog.head
        # Only a durable slot begins earlier: with what it was not told is needed no more.
        begins_within = stream.start_lsn <= head.lsn and self._read_upto <= stream.initial_wal_end
        is_restored, self._has_other_history, self._expected_repeat = (
            self._has_other_history,
            False,
            None,
        )
        if self._reopening is not None:
            self._last_kept = None  # which may have nothing of other tables
        if begins_within and stream.system == self._system and not is_restored:
            if epoch != self._epoch:
                self._follower.stream_continued(epoch)
            if self._last_kept is not None and stream.start_lsn < self._last_kept.end_lsn:
                self._expected_repeat = self._last_kept
        elif epoch != self._epoch or stream.start_lsn < head.lsn or is_restored:
            # Another history: first start, failover, restore. LSNs may be used again.
            if epoch == self._epoch:
                self._restore_count += 1
                epoch = self._epoch_of(stream)
            self._read_upto, self._last_kept = stream.start_lsn, None
            self._timed_out_lsn = LSN(0)
            self._changelog.restart(stream.start_lsn)
        elif stream.start_lsn > head.lsn:
            self._append(Gap(stream.start_lsn, "slot_lost"), time.monotonic())
            log.warning("replication.gap", reason="slot_lost", lsn=format_lsn(stream.start_lsn))
        self._epoch, self._system, self.stream = epoch, stream.system, stream
        log.info(
            "replication.started",
            plugin=stream.plugin,
            reason=stream.plugin_reason or None,
            slot=stream.slot_name,
            lsn=format_lsn(stream.start_lsn),
        )
        self._follower.stream_started(epoch)
        self._follower.wake()
        if self._reopening is not None and not self._reopening.done():
            self._reopening.set_result(None)
        self._reopening = None

    def _epoch_of(self, stream: WalStream) -> str:
        epoch = epoch_of(stream.system, self._tables)
        for _ in range(self._restore_count):
            epoch = _next_epoch(epoch)
        return epoch

    def _is_expected_while_reopening(self, error: PgRealtimeError) -> bool:
        """Whether it only means that the stream before was closed, or that the server is at it."""
        is_closing = isinstance(error, SlotBusyError) or error.error_code == "stream_closed"
        return is_closing and time.monotonic() < self._reopen_deadline

    def _on_stream_lost(self, error: PgRealtimeError) -> None:
        if self._reopening is not None and not self._reopening.done():
            self._reopening.set_exception(error)
        self._reopening = None
        if self.stream is not None:
            self.stream = None
            self._follower.stream_lost()
        self.stream_breaks[error.error_code] += 1
        log.warning(
            "replication.lost", code=error.error_code, reason=error.message, detail=error.detail
        )

    async def _handle_decoder_failure(self, error: PgRealtimeError) -> None:
        """Leave behind what a durable slot's decoder fails at for ever, and with it what follows.

        Each new stream begins before it. The server keeps all WAL until somebody gives in.
        """
        before, self._failed_after = self._failed_after, None
        if error.error_code != "decoder_failed":
            self._failure_count = 0
            return
        # Not by the server's words: a failure may name another address of its memory each time.
        self._failed_after = self._read_upto
        self._failure_count = self._failure_count + 1 if self._failed_after == before else 1
        if self._failure_count >= _MAX_DECODER_FAILURES:
            self._failure_count = 0
            log.error("replication.passed_over", reason=error.message, detail=error.detail)
            await self._advance_slot()

    async def _read_until_successor(self, stream: WalStream) -> _Successor:
        """Keep what comes, until a successor has all that follows; return that."""
        while True:
            # Noted first: all that ends before it is in the batches of before, and in the next.
            wal_end, successor = stream.wal_end, self._successor
            patience = _POLL_SECONDS if successor or self._expected_repeat else None
            try:
                async with asyncio.timeout(patience) as self._read_timeout:
                    batch = await anext(stream)
            except TimeoutError:
                batch = []
            finally:
                self._read_timeout = None
            await self._append_new(batch)
            if self._expected_repeat is not None:
                if wal_end >= self._expected_repeat.end_lsn:
                    self._raise_other_history()
                stream.request_keepalive()
            if batch:
                self._read_upto = max(self._read_upto, batch[-1].end_lsn)
                if stream.is_durable:
                    self._acknowledge_floor(stream)
                else:
                    stream.confirm(batch[-1].end_lsn)
                self._follower.wake()
            if successor is not None and wal_end >= successor.stream.start_lsn:
                return successor

    async def _append_new(self, batch: Iterable[Transaction | OversizedTransaction]) -> None:
        """Keep what the changelog doesn't have."""
        for entry in batch:
            is_new = entry.end_lsn > self._changelog.head.lsn
            if self._expected_repeat is not None or not is_new:
                self._verify_repeat(entry)
            if is_new:
                await self._append_when_room(entry)
                self._last_kept = _identity_of(entry)

    def _verify_repeat(self, entry: Transaction | OversizedTransaction) -> None:
        """Compare with what was read before what a stream sends again.

        A server that was restored from a copy of its files has the same identifier and timeline,
        and writes other commits at the positions that the changelog has already.

        Raises:
            StreamInterruptedError: They differ; the next stream begins another history.
        """
        if self._last_kept is None or entry.end_lsn < self._last_kept.end_lsn:
            return
        if _identity_of(entry) != self._last_kept:
            self._raise_other_history()
        self._expected_repeat = None

    def _raise_other_history(self) -> None:
        self._has_other_history = True
        raise StreamInterruptedError(
            "the server's history is another",
            detail="It doesn't have a transaction that was read from it, as after a restore.",
        )

    async def _append_when_room(self, entry: Transaction | OversizedTransaction) -> None:
        size = entry.size_bytes if isinstance(entry, Transaction) else 0
        while self._undelivered_bytes() and self._undelivered_bytes() + size > self._max_size:
            self._follower.progressed.clear()
            self._follower.wake()
            await self._follower.progressed.wait()
        self._append(entry, time.monotonic())
        if isinstance(entry, Transaction):
            self.changes_received += len(entry.changes)
        else:
            _report_gap("too_large", entry.tables)

    def _append(self, entry: Entry, now: float) -> None:
        self._changelog.append(entry, now, self._follower.head)
        self._appended_at = now

    def _append_mark(self, stream: WalStream, now: float) -> None:
        """Take note that nothing of ours has happened, so that a durable slot moves in time."""
        head = self._changelog.head.lsn
        quiet = stream.empty_until(head)
        if quiet > head and now - self._appended_at >= _MARK_SECONDS:
            self._append(Watermark(quiet), now)
            self._read_upto = max(self._read_upto, quiet)
            self._follower.wake()

    def _acknowledge_floor(self, stream: WalStream) -> None:
        """Say that nobody needs what the changelog doesn't have any more."""
        # A gap that was told ends within the record that follows, perhaps a commit; and a commit
        # that begins before what is let go of isn't sent again. Records begin at multiples of 8.
        floor = self._changelog.floor.lsn
        stream.release(LSN(floor - floor % 8))

    def _undelivered_bytes(self) -> int:
        return self._changelog.bytes_after(self._follower.head)

    async def expire(self) -> None:
        """Let what is too old go, for ever."""
        while True:
            await asyncio.sleep(_EXPIRE_SECONDS)
            now = time.monotonic()
            self._changelog.expire(now, self._follower.head)
            if self.stream is not None and self.stream.is_durable:
                self._append_mark(self.stream, now)
                self._acknowledge_floor(self.stream)


def _end_of_record(insert_lsn: LSN) -> LSN:
    """Return where the record before the insert position ends.

    Between the two there may be the header of a page, which the stream comes to with the next
    record alone.
    """
    into_page = insert_lsn % _PAGE_BYTES
    return LSN(insert_lsn - into_page) if into_page <= _PAGE_HEADER_BYTES else insert_lsn


def epoch_of(system: SystemIdentity, tables: Iterable[TableName]) -> str:
    """Return the six hexadecimal digits that positions of this history of these tables share."""
    names = sorted(f"{table.schema}\0{table.name}" for table in tables)
    text = "\n".join([system.system_id, str(system.timeline), system.database, *names])
    return hashlib.blake2s(text.encode(), digest_size=3).hexdigest()


def _next_epoch(epoch: str) -> str:
    """Another epoch, for a history that can't be told apart by system and timeline: a restore."""
    return hashlib.blake2s(epoch.encode(), digest_size=3).hexdigest()


def _report_gap(reason: str, tables: Iterable[TableName]) -> None:
    log.warning("replication.gap", reason=reason, tables=sorted(map(str, tables)))
