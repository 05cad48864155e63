"""The replication stream as an async iterator of batches of whole transactions. Read by ``feed``.

psycopg has no API for replication, so this uses libpq's functions through ``psycopg.pq``. The event
loop's reader calls ``_on_readable``, which decodes everything that the socket has; the transactions
completed by it are one batch. Status updates are sent from a timer, whether or not the consumer
takes batches: it may be busy for longer than wal_sender_timeout.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from enum import Enum
from typing import Any, Self

import psycopg
from psycopg import AsyncConnection, pq
from psycopg import errors as pg

from pgrealtime.catalog.model import Table
from pgrealtime.changes import OversizedTransaction, Transaction
from pgrealtime.config.model import ReplicationConfig
from pgrealtime.errors import (
    PgRealtimeError,
    SlotLostError,
    StreamInterruptedError,
    UnexpectedMessageError,
)
from pgrealtime.history import SystemIdentity
from pgrealtime.lsn import LSN
from pgrealtime.observe.redact import is_free_of_row_values
from pgrealtime.wal import pgoutput, server, wal2json
from pgrealtime.wal import slot as slots
from pgrealtime.wal.assembler import RecordKeys, TransactionAssembler, default_record_keys
from pgrealtime.wal.feedback import CONFIRM_SECONDS, Feedback
from pgrealtime.wal.message import Commit, Decoder
from pgrealtime.wal.server import ServerFacts
from pgrealtime.wal.slot import Plugin, Slot, SlotWait
from pgrealtime.wal.visible_lsn import may_match_standby_names, watch_visible_lsn
from pgrealtime.wal.wire import PrimaryKeepalive, StandbyStatusUpdate, format_status, parse_message

TransactionBatch = list[Transaction | OversizedTransaction]

_MAX_STATUS_SECONDS = 10.0
"""Between status updates, also where wal_sender_timeout is longer or off."""

_MAX_DRAIN_SECONDS = 0.005
"""After this a drain of the socket ends, so that other tasks run under load."""

_DEFAULT_SILENCE_SECONDS = 300.0
"""Silence of the server after which the stream ends, if wal_sender_timeout is off."""

_LOAD_MESSAGES = 64
"""Messages of one drain from which on the next is delayed: fewer wake-ups, on both sides. A single
event has far fewer and is never delayed."""

_THROTTLE_SECONDS = 0.001

_MAX_BATCH_BYTES = 8 * 1024 * 1024
"""Decoder bytes waiting for the consumer above which reading pauses."""


class _ReadState(Enum):
    OPEN = "open"
    """The event loop watches the socket."""
    THROTTLED = "throttled"
    """A timer will read next; the socket isn't watched."""
    PAUSED = "paused"
    """The consumer has too much to do; nothing is read until it takes the batch."""
    ENDED = "ended"


class WalStream:
    """Iterates over batches of transactions in commit order. Made by ``open_stream``.

    Raises on iteration: StreamInterruptedError if the connection ended or timed out, SlotLostError
    if the slot can't be read any more, UnexpectedMessageError if a message can't be decoded.
    """

    def __init__(
        self,
        connection: AsyncConnection[Any],
        slot: Slot,
        decoder: Decoder,
        *,
        tables: Collection[Table],
        facts: ServerFacts,
        system: SystemIdentity,
        initial_wal_end: LSN,
        max_pause_seconds: float,
        max_transaction_bytes: int,
        record_keys: RecordKeys | None = None,
    ) -> None:
        self.slot = slot
        """If it is durable, the next stream begins with the transactions not released of this."""
        self.system = system
        self.initial_wal_end = initial_wal_end
        """End of the server's WAL when the stream was opened."""
        self.wal_end = slot.start_lsn
        """Last known end of the server's WAL."""
        self.last_received_at = time.monotonic()
        self._loop = asyncio.get_running_loop()
        status_interval = min(facts.wal_sender_timeout / 3 or math.inf, _MAX_STATUS_SECONDS)
        self.feedback = Feedback(
            slot.start_lsn,
            interval=status_interval,
            now=self._loop.time(),
            is_durable=slot.is_durable,
        )
        """Decides which WAL the server may remove; is to be told what is kept."""
        self._pgconn = connection.pgconn
        # Kept, because the property raises once the connection is lost, and the loop's reader must
        # be removed even then.
        self._socket = connection.pgconn.socket
        self._decoder = decoder
        self._assembler = TransactionAssembler(
            max_bytes=max_transaction_bytes,
            record_keys=record_keys or {},
            default_keys=default_record_keys(tables),
        )
        self._max_pause_seconds = max_pause_seconds
        self._tick_seconds = min(status_interval, CONFIRM_SECONDS)
        self._silence_seconds = facts.wal_sender_timeout or _DEFAULT_SILENCE_SECONDS
        self._silent_ticks = 0
        """Counted in ticks, not seconds: after the process was stopped for a while, what arrived
        in that time must be read before the server counts as silent."""
        self._read_state = _ReadState.ENDED
        self._batch: TransactionBatch = []
        self._batch_bytes = 0
        self._wakeup = asyncio.Event()
        self._error: PgRealtimeError | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TransactionBatch:
        while not self._batch:
            if self._error is not None:
                raise self._error
            # No await between the check and this, so no wake-up in between is lost.
            self._wakeup.clear()
            await self._wakeup.wait()
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if self._read_state is _ReadState.PAUSED:
            # Meanwhile TCP's flow control held up the server.
            self._resume_reading()
        return batch

    def request_keepalive(self) -> None:
        """Request a keepalive from the server, whose position advances ``feedback.empty_until``."""
        if self._read_state is _ReadState.ENDED:
            return
        with self._ending_on_error():
            self.feedback.request_keepalive(self._loop.time())
            self._send(self.feedback.due(self._loop.time()))

    def start_reading(self) -> None:
        """Start reading; called by ``open_stream``."""
        self._pgconn.nonblocking = 1
        self._tick()
        # libpq may have read the first messages together with the answer to START_REPLICATION:
        # then the socket doesn't become readable for them.
        self._throttle(0)

    def stop(self) -> None:
        """Send the last confirmed position and close; called by ``open_stream``."""
        if self._read_state is _ReadState.ENDED:
            return
        # Confirmations are sent once a second; without this one a durable slot's next stream would
        # repeat what was confirmed since.
        with suppress(psycopg.Error):
            self._send(self.feedback.final_updates())
        self._end_with(StreamInterruptedError("the stream was closed", code="stream_closed"))

    def end(self, error: PgRealtimeError) -> None:
        """Close the connection; once what it brought is taken, iterating raises the error."""
        self._end_with(error)

    # Reading

    def _resume_reading(self) -> None:
        self._cancel_timer("throttle")
        self._cancel_timer("pause")
        self._read_state = _ReadState.OPEN
        self._loop.add_reader(self._socket, self._on_readable)

    def _throttle(self, seconds: float) -> None:
        """Read next from a timer."""
        # With TLS a record is read whole from the socket, and its rest stays in the library, where
        # no poll sees it.
        self._loop.remove_reader(self._socket)
        self._read_state = _ReadState.THROTTLED
        self._set_timer("throttle", seconds, self._on_throttle_over)

    def _on_throttle_over(self) -> None:
        self._resume_reading()
        self._on_readable()

    def _pause_reading(self) -> None:
        self._loop.remove_reader(self._socket)
        self._read_state = _ReadState.PAUSED
        self._set_timer("pause", self._max_pause_seconds, self._on_pause_over)

    def _on_pause_over(self) -> None:
        self._end_with(
            StreamInterruptedError(
                f"delivery was held up for {self._max_pause_seconds:g} s",
                detail="A reader that doesn't read can hold up the server's checkpoints, so the"
                " connection was closed.",
                code="delivery_held_up",
            )
        )

    def _on_readable(self) -> None:
        with self._ending_on_error():
            # Drained before sending: the update then has the position just received.
            count, is_drained = self._drain()
            self._send(self.feedback.due(self._loop.time()))
            if self._batch:
                self._wakeup.set()
            if self._batch_bytes > _MAX_BATCH_BYTES:
                self._pause_reading()
            # Other callbacks run before the rest is read.
            elif not is_drained:
                self._throttle(0)
            elif count >= _LOAD_MESSAGES:
                self._throttle(_THROTTLE_SECONDS)

    def _drain(self) -> tuple[int, bool]:
        """Read what the socket has; return the number of messages and whether that was all."""
        pgconn, handle_payload = self._pgconn, self._handle_payload
        until = self._loop.time() + _MAX_DRAIN_SECONDS
        count = 0
        while True:
            # Reads what the socket has, without waiting: many messages, or a part of one.
            pgconn.consume_input()
            before = count
            # PQgetCopyData without waiting: 0 is no whole message yet, -1 the end of the copy.
            # psycopg raises -2.
            length, data = pgconn.get_copy_data(1)
            while length > 0:
                count += 1
                handle_payload(data)
                length, data = pgconn.get_copy_data(1)
            if length < 0:
                raise _end_of_stream_error(pgconn)
            # Only a read that completed no message shows that the socket is empty, or a message
            # incomplete.
            is_drained = count == before
            if is_drained or self._loop.time() > until or self._batch_bytes > _MAX_BATCH_BYTES:
                break
        if count:
            self._silent_ticks = 0
            self.last_received_at = time.monotonic()
        return count, is_drained

    def _handle_payload(self, data: memoryview) -> None:
        received = parse_message(data)
        if isinstance(received, PrimaryKeepalive):
            self._handle_keepalive(received)
            return
        message = self._decoder.decode(received)
        if message is None:
            return
        done = self._assembler.feed(message, len(received))
        if done is not None:
            self._batch.append(done)
            self._batch_bytes += done.size_bytes if isinstance(done, Transaction) else 0
            self.feedback.record_transaction(done.end_lsn)
            self.wal_end = max(self.wal_end, done.end_lsn)
        elif isinstance(message, Commit):
            # None of its changes were of our tables.
            self.feedback.record_quiet(message.end_lsn)
            self.wal_end = max(self.wal_end, message.end_lsn)

    def _handle_keepalive(self, keepalive: PrimaryKeepalive) -> None:
        self.wal_end = max(self.wal_end, keepalive.wal_end)
        if self._assembler.is_in_transaction:
            # It came within a large transaction, whose commit lies before this position and has
            # yet to be sent.
            self.feedback.record_received(keepalive.wal_end)
        else:
            self.feedback.record_quiet(keepalive.wal_end)
        if keepalive.reply_requested:
            self.feedback.record_reply_request()

    # Writing

    def _tick(self) -> None:
        # Set first, so that it is among the timers that ending the stream cancels.
        self._set_timer("tick", self._tick_seconds, self._tick)
        with self._ending_on_error():
            self._check_silence()
            self._send(self.feedback.due(self._loop.time()))

    def _check_silence(self) -> None:
        """End the stream if the server hasn't answered for its own wal_sender_timeout."""
        if self._read_state in (_ReadState.PAUSED, _ReadState.ENDED):
            return
        # Each periodic update requests a keepalive, so a server that is alive answers. Behind a
        # network or proxy that drops packets, a dead one would otherwise go unnoticed.
        self._silent_ticks += 1
        if self._silent_ticks * self._tick_seconds > self._silence_seconds:
            raise StreamInterruptedError(
                f"the server has sent nothing for {self._silence_seconds:g} s"
            )

    def _send(self, updates: tuple[StandbyStatusUpdate, ...]) -> None:
        for update in updates:
            self._pgconn.put_copy_data(format_status(update, time.time_ns() // 1000))
        if updates:
            self._flush()

    def _flush(self) -> None:
        # 1: the socket takes no more now. Meanwhile the reader goes on, so a server that is blocked
        # sending to us comes to read again.
        if self._pgconn.flush():
            self._loop.add_writer(self._socket, self._on_writable)

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._socket)
        with self._ending_on_error():
            self._flush()

    # Ending

    @contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        """End the stream with an error raised in a callback of the loop, which has no caller."""
        try:
            yield
        except PgRealtimeError as error:
            self._end_with(error)
        except psycopg.Error as error:
            self._end_with(_translate_error(error))
        except BaseException:
            # A defect. The loop would only log it, and the iterator wait for ever.
            self._end_with(UnexpectedMessageError("reading the stream failed", code="internal"))
            raise

    def _end_with(self, error: PgRealtimeError) -> None:
        if self._read_state is _ReadState.ENDED:
            return
        self._read_state = _ReadState.ENDED
        self._error = error
        for timer in self._timers.values():
            timer.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        # Only now: it closes the descriptor, whose number the process's next socket may get, and
        # the loop must not watch that.
        self._pgconn.finish()
        self._wakeup.set()

    def _set_timer(self, name: str, seconds: float, callback: Callable[[], None]) -> None:
        self._timers[name] = self._loop.call_later(seconds, callback)

    def _cancel_timer(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


def _end_of_stream_error(pgconn: pq.abc.PGconn) -> PgRealtimeError:
    result = pgconn.get_result()
    if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
        return _translate_error(pg.error_from_result(result))
    return StreamInterruptedError(
        "the server ended the stream", detail="It is shutting down, or ended the walsender."
    )


def _translate_error(error: psycopg.Error) -> PgRealtimeError:
    detail = str(error).strip()
    match error:
        case pg.ObjectNotInPrerequisiteState():
            return SlotLostError("the slot can no longer be read", detail=detail)
        # None: libpq's own, such as a reset. 57: the server ends (57P01) or the walsender is
        # terminated. 08: connection exceptions.
        case _ if error.sqlstate is None or error.sqlstate.startswith(("57", "08")):
            return StreamInterruptedError("the connection to the server was lost", detail=detail)
        case _:
            message = error.diag.message_primary if is_free_of_row_values(error.sqlstate) else None
            code = f"SQLSTATE {error.sqlstate}"
            return StreamInterruptedError(
                "the decoder failed on the server",
                # The context has the LSN.
                detail="\n".join(filter(None, (message or code, error.diag.context))),
                code="decoder_failed",
            )


@asynccontextmanager
async def open_stream(
    url: str,
    config: ReplicationConfig,
    tables: Collection[Table],
    *,
    max_transaction_bytes: int,
    record_keys: RecordKeys | None = None,
    start_lsn: LSN | None = None,
    on_wait: Callable[[SlotWait], None] | None = None,
) -> AsyncIterator[WalStream]:
    """Connect, create or reuse the slot, and stream the committed changes of the tables.

    A durable slot's stream begins at ``start_lsn``, if the slot still has what follows.

    The URL must lead to the primary itself, with a role that has REPLICATION. A transaction with
    more than ``max_transaction_bytes`` of decoder output becomes an ``OversizedTransaction``.
    ``record_keys`` override the primary keys, see ``TransactionAssembler``.

    Raises:
        SetupError: Server or schema aren't set up; the hint has the SQL.
        SlotBusyError: No slot or walsender is free, or creating the slot timed out.
        DatabaseUnreachableError: No answer, or the login is refused.
    """
    async with server.open_replication_connection(url) as connection:
        with server.translate_driver_errors():
            # Everything is asked before START_REPLICATION, after which the connection takes no
            # queries.
            facts = await server.read_server_facts(connection)
            system, wal_end = await server.identify_system(connection)
            slot = await slots.acquire_slot(
                connection, url, config, facts=facts, tables=tables, on_wait=on_wait
            )
            if slot.is_durable and start_lsn is not None and start_lsn > slot.start_lsn:
                slot = replace(slot, start_lsn=start_lsn)
            decoder, options = make_decoder(slot.plugin, tables, config)
            await slots.start_replication(connection, slot, options)
        stream = WalStream(
            connection,
            slot,
            decoder,
            tables=tables,
            facts=facts,
            system=system,
            initial_wal_end=wal_end,
            max_pause_seconds=config.max_pause,
            max_transaction_bytes=max_transaction_bytes,
            record_keys=record_keys,
        )
        stream.start_reading()
        try:
            async with _confirming_visible_only(stream, url, facts):
                yield stream
        finally:
            stream.stop()


async def dry_run_stream(
    url: str,
    config: ReplicationConfig,
    tables: Collection[Table],
    *,
    on_wait: Callable[[SlotWait], None] | None = None,
) -> tuple[SystemIdentity, Slot]:
    """Return server and slot as ``open_stream`` would have them.

    The slot is temporary, whatever is configured, so that nothing remains.

    Raises:
        PgRealtimeError: Why the stream could not be opened.
    """
    async with server.open_replication_connection(url) as connection:
        with server.translate_driver_errors():
            facts = await server.read_server_facts(connection)
            system, _ = await server.identify_system(connection)
            config = await slots.dry_run_config(connection, config, facts)
            slot = await slots.acquire_slot(
                connection, url, config, facts=facts, tables=tables, on_wait=on_wait
            )
    return system, slot


@asynccontextmanager
async def _confirming_visible_only(
    stream: WalStream, url: str, facts: ServerFacts
) -> AsyncIterator[None]:
    """If this process may count as a synchronous standby, advance over visible commits only."""
    if not may_match_standby_names(facts.synchronous_standby_names, facts.application_name):
        yield
        return
    # Before the first batch: until the watch reports, nothing is confirmed.
    stream.feedback.limit_confirmation(stream.slot.start_lsn)
    watch = watch_visible_lsn(url, stream.feedback.limit_confirmation)
    watch_task = asyncio.create_task(watch, name="visible-lsn")
    try:
        yield
    finally:
        watch_task.cancel()
        await asyncio.wait((watch_task,))


def make_decoder(
    plugin: Plugin, tables: Collection[Table], config: ReplicationConfig
) -> tuple[Decoder, dict[str, str]]:
    """Return the plugin's decoder and the options of START_REPLICATION that it requires."""
    match plugin:
        case "wal2json":
            return wal2json.Wal2JsonDecoder(tables), wal2json.start_replication_options(tables)
        case "pgoutput":
            return pgoutput.PgoutputDecoder(tables), pgoutput.start_replication_options(
                config.publication
            )
