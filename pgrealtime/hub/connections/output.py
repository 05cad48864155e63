"""Writes one client's messages: their ids and positions, and the queue of a slice's messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import Cursor, Position, format_position
from pgrealtime.protocol.frame import cursor_tail

_MESSAGES_PER_CURSOR_EVENT = 16
"""Messages between two PB_CURSOR within a batch. A client that learns its position from PB_CURSOR
alone receives at most so many messages a second time after a break."""


class ResponseWriter(Protocol):
    """The transport of a connection's bytes; the API implements it."""

    def write(self, data: bytes) -> None:
        """Buffer bytes of the event stream; never blocks."""

    def buffered_bytes(self) -> int:
        """Bytes that were written and the kernel has not accepted yet."""

    async def drain(self) -> None:
        """Wait until the buffer is low."""

    def close(self) -> None:
        """End the response body in order, after what was written."""

    def abort(self) -> None:
        """Drop the connection and what is buffered."""


@lru_cache(maxsize=4096)
def encode_position(epoch: str, cursor: Cursor, *, awaits_resync: bool = False) -> bytes:
    """Return a position as event ids carry it."""
    return format_position(Position(epoch, cursor, awaits_resync)).encode()


class ConnectionOutput:
    """Encodes and writes the messages of one connection; the base class of ``Connection``."""

    __slots__ = (
        "_drained_bytes",
        "_id_prefix",
        "_queued_batches",
        "_written_bytes",
        "awaits_resync",
        "epoch",
        "events_sent",
        "has_cursor_topic",
        "id",
        "idle_since",
        "is_resumable",
        "last_drained_at",
        "last_write_at",
        "mirror_frames",
        "position",
        "writer",
    )

    def __init__(self, client_id: str, writer: ResponseWriter, epoch: str, now: float) -> None:
        self.id = client_id
        self.writer = writer
        self.epoch = epoch
        self.is_resumable = False
        """Whether ids carry positions. Other clients receive PocketBase's bytes."""
        self.position: bytes = b""
        """The position in the last id sent, if ids carry positions."""
        self.awaits_resync = False
        """Whether a resync is to be written for a mirror. Positions say so until it is: on resuming
        from one of them mirrors are told to load anew."""
        self.has_cursor_topic = False
        self.idle_since = now
        """When it connected or last received an event."""
        self.last_write_at = now
        """The heartbeat counts from here."""
        self.last_drained_at = now
        """When the client last read bytes, or had none to read."""
        self.events_sent = 0
        self.mirror_frames: Counter[str] | None = None
        """Those of them that mirrors received, by action; None if it had no mirror."""
        self._id_prefix = b"id:" + client_id.encode()
        self._written_bytes = 0
        self._drained_bytes = 0
        self._queued_batches: tuple[MessageBatch, ...] = ()

    def write(self, data: bytes) -> None:
        """Write bytes to the transport."""
        self.writer.write(data)
        self._written_bytes += len(data)

    def write_message(self, tail: bytes, cursor: Cursor | None) -> None:
        """Write one message; its cursor, if any, becomes a resumable connection's position."""
        if cursor is not None and self.is_resumable:
            self.position = self._encode_position(cursor)
        self.write(self._event_id() + tail)

    def write_cursor_event(self, cursor: Cursor) -> None:
        """Write PB_CURSOR with the position."""
        self.position = self._encode_position(cursor)
        full_id = self._event_id()
        self.write(full_id + cursor_tail(full_id[3:]))

    def mark_event_sent(self, now: float) -> None:
        """Restart the idle timeout and the heartbeat."""
        self.idle_since = self.last_write_at = now

    def _encode_position(self, cursor: Cursor) -> bytes:
        if self.awaits_resync:
            return encode_position(self.epoch, cursor, awaits_resync=True)
        return encode_position(self.epoch, cursor)  # for each message

    def _event_id(self) -> bytes:
        return b"%b.%b" % (self._id_prefix, self.position) if self.is_resumable else self._id_prefix

    def enqueue(self, batch: MessageBatch) -> bool:
        """Queue messages of a slice; return whether they are the first."""
        is_first = not self._queued_batches
        self._queued_batches += (batch,)
        return is_first

    def queued_bytes(self) -> int:
        """Return the size of the queued messages."""
        return sum([batch.size_bytes for batch in self._queued_batches])

    def has_one_queued_message(self) -> bool:
        """Whether a single message is queued, which cannot be divided."""
        return sum([len(batch.event_indexes) for batch in self._queued_batches]) == 1

    def write_queued(
        self, events: Sequence[Event], position_limit: Cursor | None, now: float
    ) -> None:
        """Write the queued messages; the position moves with them.

        It stays before ``position_limit``, the start of a gap of which the client has yet to be
        notified: if it breaks off in between, it is notified again.
        """
        if self.mirror_frames is not None:
            for queued in self._queued_batches:
                self.mirror_frames.update(events[index].action for index in queued.mirror_indexes)
        batch = merge_batches(self._queued_batches)
        self._queued_batches = ()
        self.events_sent += len(batch.event_indexes)
        if self.is_resumable:
            cursors = [events[index].cursor for index in batch.event_indexes]
            self.write(b"".join(self._with_positions(batch.tails[1:], cursors, position_limit)))
        else:
            self.write(self._id_prefix.join(batch.tails))
        self.mark_event_sent(now)

    def _with_positions(
        self, tails: Sequence[bytes], cursors: Sequence[Cursor], position_limit: Cursor | None
    ) -> list[bytes]:
        """Put an id before each tail; of several for one change only the last is behind it."""
        prefix = self._id_prefix + b"."
        parts: list[bytes] = []
        for count, (tail, cursor) in enumerate(zip(tails, cursors, strict=True), start=1):
            # A position says that all of its change was sent: with the id of an earlier message a
            # client that breaks off there would lose the rest of the change. So that carries the
            # position just before the change, and not an older one: a client that skips what is
            # below the position of a list must not skip it.
            is_last_of_change = count == len(cursors) or cursors[count] != cursor
            sent = cursor
            if not is_last_of_change or (position_limit is not None and cursor >= position_limit):
                sent = Cursor(cursor.lsn, cursor.ordinal - 1)
            if position_limit is None or sent < position_limit:
                self.position = self._encode_position(sent)
            parts += (prefix, self.position, tail)
            if self.has_cursor_topic and count % _MESSAGES_PER_CURSOR_EVENT == 0:
                full_id = prefix + self.position
                parts += (full_id, cursor_tail(full_id[3:]))
        return parts

    def record_drained(self, now: float) -> None:
        """Note whether the client read bytes since the last call."""
        buffered = self.writer.buffered_bytes()
        # ``buffered`` includes what the transport adds to each write and ``_written_bytes`` does
        # not, so the difference may shrink; that is no sign of life.
        drained = self._written_bytes - buffered
        if drained > self._drained_bytes or buffered == 0:
            self._drained_bytes, self.last_drained_at = drained, now


_ID_LINE_BYTES = 76
"""Size of the id line before each tail, if it carries a position."""


class MessageBatch:
    """Messages without their ids, in order, each with the index of its event in the slice."""

    __slots__ = ("event_indexes", "mirror_indexes", "size_bytes", "tails")

    def __init__(self, messages: Iterable[tuple[int, bytes]] = ()) -> None:
        self.tails: list[bytes] = [b""]
        """The messages after an empty first element: joining them with an id puts the id before
        each, in one call per connection whatever the number of messages."""
        self.event_indexes: list[int] = []
        """The events' indexes, ascending; one less than ``tails``."""
        self.mirror_indexes: Sequence[int] = ()
        """Those of the messages for mirrors."""
        self.size_bytes = 0
        """Approximate size of the messages with their ids."""
        for event_index, tail in messages:
            self.add(event_index, tail)

    def add(self, event_index: int, tail: bytes) -> None:
        """Append a message."""
        self.tails.append(tail)
        self.size_bytes += len(tail) + _ID_LINE_BYTES
        self.event_indexes.append(event_index)

    def messages_before(self, event_index: int) -> MessageBatch:
        """Return the messages of the events before an index."""
        if not self.event_indexes or self.event_indexes[-1] < event_index:
            return self
        before = MessageBatch(message for message in self.messages() if message[0] < event_index)
        before.mirror_indexes = [index for index in self.mirror_indexes if index < event_index]
        return before

    def messages(self) -> Iterable[tuple[int, bytes]]:
        """Return the events' indexes and the tails."""
        return zip(self.event_indexes, self.tails[1:], strict=True)


def merge_batches(batches: Sequence[MessageBatch]) -> MessageBatch:
    """Return one batch in the order of the events; messages of one event in the order given."""
    if len(batches) == 1:
        return batches[0]
    messages = (message for batch in batches for message in batch.messages())
    return MessageBatch(sorted(messages, key=lambda message: message[0]))
