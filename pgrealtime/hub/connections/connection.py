"""One client's SSE response as the hub sees it: its state, its topics, its bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeAlias

from pgrealtime.auth.principal import Caller
from pgrealtime.hub.connections.batch import MessageBatch, merge_batches
from pgrealtime.hub.connections.group import MemberGroup, MemberRenderGroup, RenderKey
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import Cursor, Position, format_position
from pgrealtime.networks import client_network
from pgrealtime.protocol.frame import HEARTBEAT, cursor_tail
from pgrealtime.protocol.topic import Topic
from pgrealtime.records.encode import View

if TYPE_CHECKING:
    from pgrealtime.expand.plan import ExpandViewer
    from pgrealtime.rules.engine.plan import BoundPredicate
    from pgrealtime.snapshot import ReadPoint

MessageKey: TypeAlias = tuple[int, bytes]
"""A message of a change: which of its events, and the topic."""

NO_MESSAGE_KEYS: AbstractSet[MessageKey] = frozenset()

CURSOR_TOPIC = "PB_CURSOR"
RESYNC_TOPIC = "PB_RESYNC"

_MESSAGES_PER_CURSOR_EVENT = 16
"""Messages between two PB_CURSOR within a batch: a client that has no other way to know its
position hears no more than these again after a break."""


class ResponseWriter(Protocol):
    """Where a connection's bytes go; HTTP's side of it is the API's business."""

    def write(self, data: bytes) -> None:
        """Take bytes of the event stream; never blocks."""
        ...

    def buffered_bytes(self) -> int:
        """Bytes taken that the kernel hasn't."""
        ...

    async def drain(self) -> None:
        """Wait until the buffer is low."""
        ...

    def close(self) -> None:
        """End the body in an orderly way, after what was written."""
        ...

    def abort(self) -> None:
        """Drop the connection and what is buffered."""
        ...


class ConnectionState(Enum):
    """Where a connection stands (the design's state machine, OPENING being ``Hub.open``)."""

    CONNECTING = "connecting"
    """The head is out, PB_CONNECT waits for the stream from the database."""
    UNSUBSCRIBED = "held"
    """PB_CONNECT is out, no call with topics was accepted yet: nothing is delivered."""
    SUBSCRIBING = "paused"
    """A subscribe call is at work: output waits at ``cursor``."""
    CATCHING_UP = "replay"
    """Reads on from the changelog at ``cursor``: after a break, when slow, after a call."""
    LIVE = "live"
    """Gets what the hub delivers as it comes."""
    CALLER_INVALID = "lost"
    """Nobody knows who its caller is by now: it is about to be ended, and until its client is back,
    or calls once more, nothing is delivered and its position stays."""
    CLOSED = "ended"


class Subscription:
    """One topic of one connection.

    Attributes:
        own_record_id: Of an auth collection: the id of the subscriber's own record, whose email it
            sees.
        read_point: What it must still hear although it joined late; None once everything is.
        group: The subscriptions it is judged with; None if nothing can ever match.
        expand_viewer: Who it is to related records; None if it wants none.
        bound_manage_rule: What is asked of a record whose address isn't public; None if nothing
            helps.
    """

    __slots__ = (
        "bound_manage_rule",
        "connection",
        "expand_viewer",
        "group",
        "own_record_id",
        "read_point",
        "topic",
        "topic_bytes",
        "view",
    )

    def __init__(
        self, connection: Connection, topic: Topic, view: View, own_record_id: str
    ) -> None:
        self.connection = connection
        self.topic = topic
        self.topic_bytes = topic.text.encode()
        self.view = view
        self.own_record_id = own_record_id
        self.read_point: ReadPoint | None = None
        self.group: Group | None = None
        self.expand_viewer: ExpandViewer | None = None
        self.bound_manage_rule: BoundPredicate | None = None

    @property
    def render_key(self) -> RenderKey:
        """What decides, beside its group, which bytes it is sent, its own record's aside."""
        return self.topic_bytes, self.view, self.expand_viewer, self.bound_manage_rule


Group: TypeAlias = MemberGroup[Subscription]
RenderGroup: TypeAlias = MemberRenderGroup[Subscription]


@lru_cache(maxsize=4096)
def _encode_position(epoch: str, cursor: Cursor) -> bytes:
    return format_position(Position(epoch, cursor)).encode()


class Connection:
    """A client's response.

    Attributes:
        is_resumable: Whether messages carry positions; who didn't ask gets PocketBase's bytes.
        cursor: Everything up to here was handed to it. Stale while LIVE: the hub's head is it.
        position: What the last id said, once positions were asked for.
    """

    # Thousands of these wait for hours: 0.9 KB each with a dict.
    __slots__ = (
        "__weakref__",
        "_drained_bytes",
        "_id_prefix",
        "_queued_batches",
        "_sent_of_change",
        "address",
        "caller",
        "caller_read_point",
        "close_reason",
        "connected_at",
        "cursor",
        "epoch",
        "events_sent",
        "first_call_answered_at",
        "has_cursor_topic",
        "has_resync_topic",
        "id",
        "idle_since",
        "is_isolated",
        "is_live",
        "is_resumable",
        "is_resuming",
        "last_drained_at",
        "last_write_at",
        "lock",
        "network",
        "opened_at",
        "pending_gap_reason",
        "position",
        "state",
        "submitted_positions",
        "subscriptions",
        "writer",
        "written_bytes",
    )

    def __init__(
        self,
        client_id: str,
        writer: ResponseWriter,
        *,
        address: str,
        epoch: str,
        cursor: Cursor,
        now: float,
    ) -> None:
        self.id = client_id
        self.writer = writer
        self.address = address
        self.network = client_network(address)
        self.epoch = epoch
        self.cursor = cursor
        self.state = ConnectionState.CONNECTING
        self.is_live = False
        self.is_isolated = False
        """Whether its filters kept others waiting, and are evaluated for it alone. Written by the
        matcher: its groups depend on it."""
        self.is_resumable = False
        self.submitted_positions: tuple[str | None, str | None] = (None, None)
        """``Last-Event-ID`` and ``lastEventId`` as they came, read when PB_CONNECT goes out."""
        self.pending_gap_reason: str = ""
        """Reason to announce when the first call is accepted; empty if there is none."""
        self.is_resuming = False
        """Whether it came with a position that the changelog reaches back to."""
        self.close_reason = ""
        """Why it is to be ended as soon as that can be, so that its client comes back; a call
        that could not be answered, a gap that can't be told."""
        self.connected_at = now
        self.position: bytes = b""
        self.caller = Caller()
        self.caller_read_point: ReadPoint | None = None
        """What was visible when the caller's row was read; None if it has no row."""
        self.subscriptions: dict[str, Subscription] = {}
        self.has_cursor_topic = False
        self.has_resync_topic = False
        self.lock = asyncio.Lock()
        """Held by whoever moves ``cursor`` or the subscriptions: one replay slice, one call."""
        self.opened_at = now
        self.first_call_answered_at: float | None = None
        self.idle_since = now
        """When it connected or was last sent an event: the idle limit counts from here."""
        self.last_write_at = now
        self.last_drained_at = now
        self.written_bytes = 0
        self._drained_bytes = 0
        self.events_sent = 0
        self._queued_batches: tuple[MessageBatch, ...] = ()
        self._sent_of_change: tuple[Cursor, AbstractSet[MessageKey]] | None = None
        """What was sent of the change after ``cursor``, if that is too large to be sent at once."""
        self._id_prefix = b"id:" + client_id.encode()

    @property
    def is_closed(self) -> bool:
        """Whether it is over."""
        return self.state is ConnectionState.CLOSED

    def is_catching_up(self) -> bool:
        """Whether it reads on from the changelog; no property, for it changes between awaits."""
        return self.state is ConnectionState.CATCHING_UP

    def is_caller_invalid(self) -> bool:
        """Whether its caller isn't known any more; no property, as ``is_catching_up``."""
        return self.state is ConnectionState.CALLER_INVALID

    def mark_closed(self) -> None:
        """Make it over: nothing is written any more."""
        self.state = ConnectionState.CLOSED
        self.is_live = False

    def write_message(self, tail: bytes, cursor: Cursor | None) -> None:
        """Write one message of ours; ``at`` moves a resumable connection's position."""
        if cursor is not None and self.is_resumable:
            self.position = self.encode_position(cursor)
        self.write(self._event_id() + tail)

    def write_cursor_event(self, cursor: Cursor) -> None:
        """Write PB_CURSOR with the position."""
        self.position = self.encode_position(cursor)
        full_id = self._event_id()
        self.write(full_id + cursor_tail(full_id[3:]))

    def write_heartbeat(self, cursor: Cursor) -> None:
        """Write what keeps the connection alive: the position if it moved, else a comment."""
        if (
            self.is_resumable
            and not self.pending_gap_reason
            and self.encode_position(cursor) != self.position
        ):
            self.write_cursor_event(cursor)
        else:
            self.write(HEARTBEAT)

    def encode_position(self, cursor: Cursor) -> bytes:
        """The position as ids carry it."""
        return _encode_position(self.epoch, cursor)

    def _event_id(self) -> bytes:
        return b"%b.%b" % (self._id_prefix, self.position) if self.is_resumable else self._id_prefix

    def write(self, data: bytes) -> None:
        """Hand bytes to the sink."""
        self.writer.write(data)
        self.written_bytes += len(data)

    def enqueue(self, batch: MessageBatch) -> bool:
        """Take part of a slice's messages; return whether it is the first part."""
        is_first = not self._queued_batches
        self._queued_batches += (batch,)
        return is_first

    def queued_bytes(self) -> int:
        """Bytes of what was taken."""
        return sum([batch.size_bytes for batch in self._queued_batches])

    def has_one_queued_message(self) -> bool:
        """Whether what was taken can't be divided."""
        return sum([len(batch.event_indexes) for batch in self._queued_batches]) == 1

    def messages_sent_of(self, change: Cursor) -> AbstractSet[MessageKey]:
        """Return which messages of a change were sent, if that wasn't all of them."""
        return (
            self._sent_of_change[1]
            if self._sent_of_change is not None and self._sent_of_change[0] == change
            else NO_MESSAGE_KEYS
        )

    def record_messages_sent(self, change: Cursor, sent: AbstractSet[MessageKey]) -> None:
        """Take note of the messages that were sent of a change, if that isn't all of them."""
        self._sent_of_change = (change, sent) if sent else None

    def is_amid_change(self) -> bool:
        """Whether it was sent some of the messages of the change after ``cursor``."""
        return self._sent_of_change is not None and self.cursor < self._sent_of_change[0]

    def encode_queued(self, events: Sequence[Event], position_limit: Cursor | None = None) -> bytes:
        """Return what was taken of the slice as bytes; moves the position.

        Args:
            events: The slice's.
            position_limit: Where something begins that the connection has yet to be told: its
                position stays before that.
        """
        if not self._queued_batches:
            return b""
        batch = merge_batches(self._queued_batches)
        self._queued_batches = ()
        self.events_sent += len(batch.event_indexes)
        if not self.is_resumable:
            return self._id_prefix.join(batch.tails)
        cursors = [events[place].cursor for place in batch.event_indexes]
        return b"".join(self._with_positions(batch.tails[1:], cursors, position_limit))

    def _with_positions(
        self, tails: Sequence[bytes], cursors: Sequence[Cursor], position_limit: Cursor | None
    ) -> list[bytes]:
        """Put an id before each tail; of several for one change only the last moves it."""
        prefix = self._id_prefix + b"."
        parts: list[bytes] = []
        for place, (tail, cursor) in enumerate(zip(tails, cursors, strict=True), start=1):
            is_last_of_change = place == len(cursors) or cursors[place] != cursor
            if is_last_of_change and (position_limit is None or cursor < position_limit):
                self.position = self.encode_position(cursor)
            parts += (prefix, self.position, tail)
            if self.has_cursor_topic and place % _MESSAGES_PER_CURSOR_EVENT == 0:
                full_id = prefix + self.position
                parts += (full_id, cursor_tail(full_id[3:]))
        return parts

    def drop_queued(self) -> None:
        """Forget what was taken; the changelog still has it."""
        self._queued_batches = ()

    def record_drained(self, now: float) -> None:
        """See whether the client took bytes since the last look.

        What the sink adds to each write is in ``buffered`` and not in ``written``, so less may
        seem to be taken than before; that is no sign of life.
        """
        buffered = self.writer.buffered_bytes()
        taken = self.written_bytes - buffered
        if taken > self._drained_bytes or buffered == 0:
            self._drained_bytes, self.last_drained_at = taken, now
