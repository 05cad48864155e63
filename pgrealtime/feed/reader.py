"""Reads the replication stream, reopens or switches it, and acknowledges what needs no resending.

The service runs one reader; it hands transactions to the intake, which fills the changelog. Which
WAL the server keeps depends on the slot. A temporary slot is confirmed as soon as a transaction is
in the changelog. A durable slot lags behind the changelog: it is confirmed up to where the
changelog begins, and the server sends the rest again after a break, in this process or the next.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import structlog

from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.errors import PgRealtimeError, SlotBusyError, StreamInterruptedError
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.repeats import RepeatCheck
from pgrealtime.history import Era, make_era
from pgrealtime.lsn import LSN, format_lsn
from pgrealtime.wal.stream import WalStream

log = structlog.get_logger(__name__)

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_EXPIRE_SECONDS = 1.0
_MARK_SECONDS = 10.0
"""Between two watermarks while the streamed tables have no commits and the server's WAL grows."""
_REOPEN_SECONDS = 5.0
"""How long the server may take to notice that a stream was closed and its slot is free."""
_MAX_DECODER_FAILURES = 5
"""Decoder failures in a row at the same LSN before the slot is advanced: some seconds."""
_POLL_SECONDS = 0.02
"""Interval at which a stream's position is polled while a successor or a repeat is awaited."""

_LSN_WAIT_SECONDS = 1.0
_LSN_POLL_SECONDS = 0.003
_PAGE_BYTES = 8192
_PAGE_HEADER_BYTES = 40

OpenStream: TypeAlias = Callable[[], AbstractAsyncContextManager[WalStream]]
"""Opens a stream on a slot of its own, or on the durable slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Successor:
    """An open stream that will replace the current one; it has every commit after its start."""

    stream: WalStream
    exit_stack: AsyncExitStack
    has_taken_over: asyncio.Event


class ReplicationReader:
    """Keeps a replication stream open and the changelog filled from it.

    ``advance_slot`` moves the durable slot to the end of the server's WAL. ``is_durable`` says that
    all streams read one durable slot, so that two can't be open at once.

    Attributes:
        stream: The stream being read, or None.
        stream_breaks: Streams that broke or couldn't be opened, by error code.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        intake: Intake,
        *,
        tables: Iterable[TableName],
        advance_slot: Callable[[], Awaitable[None]],
        is_durable: bool = False,
    ) -> None:
        self.stream: WalStream | None = None
        self.stream_breaks: Counter[str] = Counter()
        self._open_stream = open_stream
        self._is_durable = is_durable
        self._advance_slot = advance_slot
        self._intake = intake
        self._tables = tuple(tables)
        self._read_upto = intake.end_lsn
        """The end of the last transaction or of the last watermark."""
        self._repeats = RepeatCheck()
        self._reopening: asyncio.Future[None] | None = None
        """Pending while a durable slot's stream is reopened for other tables."""
        self._reopen_deadline = 0.0
        self._has_ended = False
        self._failed_after: LSN | None = None
        """What had been read when the durable slot's decoder failed last."""
        self._failure_count = 0
        self._timed_out_lsn = LSN(0)
        """The LSN for which ``wait_for_changelog`` last timed out."""
        self._switch_lock = asyncio.Lock()
        self._is_reading = False
        self._successor: _Successor | None = None
        self._read_timeout: asyncio.Timeout | None = None

    # -- opening

    async def run(self) -> None:
        """Read the stream for ever; reopen it after an error that can pass.

        Raises:
            PgRealtimeError: The error isn't ``retryable``.
        """
        self._has_ended = False
        try:
            await self._read_for_ever()
        finally:
            self._has_ended = True
            # Nobody would ever open the stream that a switch waits for.
            self._end_reopening(_ended_error())

    async def _read_for_ever(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            open_stream = self._open_stream
            try:
                async with AsyncExitStack() as opened:
                    stream = await opened.enter_async_context(open_stream())
                    if self._open_stream is not open_stream:
                        # switch() was called with other tables since: close this one first.
                        self._reopen_deadline = time.monotonic() + _REOPEN_SECONDS
                        continue
                    self._on_stream_started(stream)
                    pause = pause if self._failure_count else _FIRST_PAUSE_SECONDS
                    await self._read_with_successors(stream, opened)
            except PgRealtimeError as error:
                if self._is_expected_while_reopening(error):
                    await asyncio.sleep(_POLL_SECONDS)
                    continue
                is_durable = self.stream is not None and self.stream.slot.is_durable
                self._on_stream_broken(error)
                if not error.retryable:
                    raise
                if is_durable:
                    await self._handle_decoder_failure(error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _on_stream_started(self, stream: WalStream) -> None:
        era = self._join_to_changelog(stream)
        self.stream = stream
        log.info(
            "replication.started",
            plugin=stream.slot.plugin,
            reason=stream.slot.plugin_reason or None,
            slot=stream.slot.name,
            replaced_slot=stream.slot.replace_reason or None,
            lsn=format_lsn(stream.slot.start_lsn),
        )
        self._intake.start_era(era)
        if self._reopening is not None and not self._reopening.done():
            self._reopening.set_result(None)
        self._reopening = None

    def _join_to_changelog(self, stream: WalStream) -> Era:
        """Return the stream's era; continue the changelog, leave a gap in it or restart it."""
        before, era = self._intake.era, self._era_of(stream)
        is_same_epoch = before is not None and era.epoch == before.epoch
        head_lsn, start_lsn = self._intake.end_lsn, stream.slot.start_lsn
        # Only a durable slot begins before the head: at what it was last confirmed. A restored
        # server's WAL may end before what was read from it.
        begins_within = start_lsn <= head_lsn and self._read_upto <= stream.initial_wal_end
        is_restored = self._repeats.begin_stream()
        if self._reopening is not None:
            self._repeats.forget()  # the last transaction may have nothing of the new tables
        if (
            before is not None
            and stream.system == before.system
            and begins_within
            and not is_restored
        ):
            if not is_same_epoch:
                self._intake.continue_era(era)
            self._repeats.expect_from(start_lsn)
        elif not is_same_epoch or start_lsn < head_lsn or is_restored:
            # Another history (first start, failover, restore): its LSNs may have been used before.
            if is_same_epoch:
                era = msgspec.structs.replace(era, restore_count=era.restore_count + 1)
            self._read_upto = start_lsn
            self._repeats.forget()
            self._timed_out_lsn = LSN(0)
            self._intake.restart(start_lsn)
        elif start_lsn > head_lsn:
            self._intake.append_missing("slot_lost", start_lsn)
        return era

    def _era_of(self, stream: WalStream) -> Era:
        before = self._intake.era
        return make_era(
            stream.system,
            self._tables,
            restore_count=0 if before is None else before.restore_count,
            plugin=stream.slot.plugin,
        )

    def _on_stream_broken(self, error: PgRealtimeError) -> None:
        self._end_reopening(error)
        if self.stream is not None:
            self.stream = None
            self._intake.lose_stream()
        self.stream_breaks[error.error_code] += 1
        log.warning(
            "replication.broken", code=error.error_code, reason=error.message, detail=error.detail
        )

    def _end_reopening(self, error: PgRealtimeError) -> None:
        if self._reopening is not None and not self._reopening.done():
            self._reopening.set_exception(error)
        self._reopening = None

    def _is_expected_while_reopening(self, error: PgRealtimeError) -> bool:
        """Whether the error says only that the old stream was closed or holds the slot."""
        is_closing = isinstance(error, SlotBusyError) or error.error_code == "stream_closed"
        # A slot that stays busy for longer is another reader's.
        is_in_time = time.monotonic() < self._reopen_deadline
        return self._reopening is not None and is_closing and is_in_time

    async def _handle_decoder_failure(self, error: PgRealtimeError) -> None:
        """Advance a durable slot whose decoder fails at the same LSN again and again."""
        before, self._failed_after = self._failed_after, None
        if error.error_code != "decoder_failed":
            self._failure_count = 0
            return
        # Not recognized by the message, which may contain another memory address each time.
        self._failed_after = self._read_upto
        self._failure_count = self._failure_count + 1 if self._failed_after == before else 1
        # Every new stream would begin before that LSN and fail there, and the server would keep all
        # WAL since. What is skipped reaches the changelog as a gap.
        if self._failure_count >= _MAX_DECODER_FAILURES:
            self._failure_count = 0
            log.error("replication.decoder_stuck", reason=error.message, detail=error.detail)
            await self._advance_slot()

    # -- switching to other tables

    async def switch(self, open_stream: OpenStream, tables: Iterable[TableName]) -> None:
        """Read other tables from now on, with nothing missed or repeated; return when that is so.

        Raises:
            PgRealtimeError: The new stream can't be opened; the current one continues.
        """
        async with self._switch_lock:
            if self._is_durable or (self.stream is not None and self.stream.slot.is_durable):
                await self._reopen(open_stream, tuple(tables))
            else:
                await self._open_successor(open_stream, tuple(tables))

    async def _reopen(self, open_stream: OpenStream, tables: tuple[TableName, ...]) -> None:
        """Let ``run`` close the stream and open the new one on the same, durable slot."""
        if self._has_ended:
            raise _ended_error()
        before = self._open_stream, self._tables
        self._open_stream, self._tables = open_stream, tables
        # Only one stream can read the slot, so the old one ends first. The new one begins with what
        # the changelog holds, and repeats are dropped (``_append_new``).
        self._reopening = asyncio.get_running_loop().create_future()
        self._reopen_deadline = time.monotonic() + _REOPEN_SECONDS
        if self.stream is not None:
            self.stream.stop()
        # Otherwise run() is opening a stream, or will; it sees that another one is required.
        try:
            await self._reopening
        except PgRealtimeError:
            self._open_stream, self._tables = before
            raise

    async def _open_successor(self, open_stream: OpenStream, tables: tuple[TableName, ...]) -> None:
        """Open the new stream next to the current one, and let ``run`` continue with it."""
        async with AsyncExitStack() as opened:
            stream = await opened.enter_async_context(open_stream())
            if self.stream is not None and self.stream.system != stream.system:
                raise StreamInterruptedError(
                    "the URL connects to another database now",
                    detail="The current stream and the one opened to replace it have different"
                    " servers or histories, so that neither continues the other.",
                )
            self._open_stream, self._tables = open_stream, tables
            if not self._is_reading:
                return  # run() opens one of these itself
            has_taken_over = asyncio.Event()
            # The current stream is read at least up to where this one begins; transactions that
            # both have are appended once. If it breaks before that, there is a gap like any other.
            self._successor = _Successor(
                stream=stream, exit_stack=opened.pop_all(), has_taken_over=has_taken_over
            )
            if self._read_timeout is not None:
                # ``run`` may be waiting for a quiet stream's next batch: wake it.
                self._read_timeout.reschedule(asyncio.get_running_loop().time())
            await has_taken_over.wait()

    def _on_stream_continued(self, stream: WalStream) -> None:
        self.stream = stream
        log.info(
            "replication.continued",
            plugin=stream.slot.plugin,
            slot=stream.slot.name,
            lsn=format_lsn(stream.slot.start_lsn),
        )
        self._intake.continue_era(self._era_of(stream))

    # -- reading

    async def _read_with_successors(self, stream: WalStream, opened: AsyncExitStack) -> None:
        """Read a stream and its successors until one breaks; ``opened`` closes the one in turn."""
        self._is_reading = True
        try:
            while True:
                successor = await self._read_until_successor(stream)
                stream, self._successor = successor.stream, None
                # Closed only after ``has_taken_over``: ``switch`` need not wait for it.
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

    async def _read_until_successor(self, stream: WalStream) -> _Successor:
        """Append what a stream brings until a successor has all that follows; return that."""
        while True:
            # Read before the batch: all that ends before it is in earlier batches or in this one.
            wal_end, successor = stream.wal_end, self._successor
            batch = await self._next_batch(stream, must_poll=successor is not None)
            await self._append_new(batch)
            if self._repeats.is_pending:
                self._repeats.verify_reached(wal_end)
                stream.request_keepalive()
            if batch:
                self._read_upto = max(self._read_upto, batch[-1].end_lsn)
                if stream.slot.is_durable:
                    self._release_expired(stream)
                else:
                    stream.feedback.confirm(batch[-1].end_lsn)
                self._intake.wake()
            if successor is not None and wal_end >= successor.stream.slot.start_lsn:
                return successor

    async def _next_batch(
        self, stream: WalStream, *, must_poll: bool
    ) -> list[Transaction | OversizedTransaction]:
        """Return the next transactions; nothing if others are waited for and none come soon."""
        wait_seconds = _POLL_SECONDS if must_poll or self._repeats.is_pending else None
        try:
            async with asyncio.timeout(wait_seconds) as self._read_timeout:
                return await anext(stream)
        except TimeoutError:
            return []
        finally:
            self._read_timeout = None

    async def _append_new(self, batch: Iterable[Transaction | OversizedTransaction]) -> None:
        """Append the transactions that the changelog doesn't have; verify the others."""
        for entry in batch:
            # Commits come in the order of their end LSNs, so a repeat is what ends by the head.
            is_new = entry.end_lsn > self._intake.end_lsn
            self._repeats.verify(entry, is_new=is_new)
            if is_new:
                await self._intake.append(entry)
                self._repeats.remember(entry)

    # -- acknowledging

    async def expire_periodically(self) -> None:
        """Remove old entries from the changelog, and WAL behind them from the server, for ever."""
        while True:
            await asyncio.sleep(_EXPIRE_SECONDS)
            now = time.monotonic()
            self._intake.expire(now)
            if self.stream is not None and self.stream.slot.is_durable:
                self._append_watermark(self.stream, now)
                self._release_expired(self.stream)

    def _append_watermark(self, stream: WalStream, now: float) -> None:
        """Let a durable slot advance while the WAL grows by other tables' commits alone."""
        quiet_until = stream.feedback.empty_until(self._intake.end_lsn)
        if self._intake.append_watermark(quiet_until, now, min_interval_seconds=_MARK_SECONDS):
            self._read_upto = max(self._read_upto, quiet_until)

    def _release_expired(self, stream: WalStream) -> None:
        """Let the server forget the WAL of what the changelog has removed."""
        # A gap that was appended on its own ends inside the record that follows, perhaps a commit;
        # and a commit that begins before the released LSN isn't sent again. Records begin at
        # multiples of 8 (MAXALIGN).
        floor = self._intake.floor_lsn
        stream.feedback.release(LSN(floor - floor % 8))

    # -- waiting for an LSN

    async def wait_for_changelog(self, lsn: LSN) -> bool:
        """Wait until the changelog has all commits up to an LSN; return whether it does.

        Events wait while the caller waits. So this waits a second at most, and after a timeout not
        at all until the stream has reached that LSN.
        """
        lsn = _end_of_record(lsn)
        if self._complete_upto() < self._timed_out_lsn:
            return False
        deadline = time.monotonic() + _LSN_WAIT_SECONDS
        while self._complete_upto() < lsn:
            if time.monotonic() >= deadline:
                self._timed_out_lsn = lsn
                return False
            if self.stream is not None:
                self.stream.request_keepalive()
            await asyncio.sleep(_LSN_POLL_SECONDS)
        return True

    def _complete_upto(self) -> LSN:
        head_lsn = self._intake.end_lsn
        if self.stream is None:
            return head_lsn
        # What ends before a stream begins is in the changelog, or is a gap in it; the last commit
        # among it may have ended earlier.
        return self.stream.feedback.empty_until(max(head_lsn, self.stream.slot.start_lsn))


def _end_of_record(insert_lsn: LSN) -> LSN:
    """Return where the last record before an insert position ends."""
    # The insert LSN may lie behind the header of a page (24 bytes, 40 for a segment's first) that
    # has no record yet. The stream passes that only with the next record.
    into_page = insert_lsn % _PAGE_BYTES
    return LSN(insert_lsn - into_page) if into_page <= _PAGE_HEADER_BYTES else insert_lsn


def _ended_error() -> StreamInterruptedError:
    return StreamInterruptedError("the stream isn't read any more")
