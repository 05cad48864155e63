"""One client's SSE response as the hub sees it: its state, its topics, its bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeAlias

from pgrealtime.auth.principal import Caller
from pgrealtime.hub.connections.batch import Batch, merged
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import Cursor, Position, format_position
from pgrealtime.networks import network_of
from pgrealtime.protocol.frame import HEARTBEAT, cursor_tail
from pgrealtime.protocol.topic import Topic
from pgrealtime.records.encode import View

if TYPE_CHECKING:
    from pgrealtime.expand.plan import Viewer
    from pgrealtime.hub.evaluation.matcher import Group
    from pgrealtime.rules.engine.plan import Bound
    from pgrealtime.snapshot import Barrier

Receives: TypeAlias = "tuple[bytes, View, Viewer | None, Bound | None]"

Part: TypeAlias = tuple[int, bytes]
"""A message of a change: which of its events, and the topic."""

NO_PARTS: AbstractSet[Part] = frozenset()

CURSOR_TOPIC = "PB_CURSOR"
RESYNC_TOPIC = "PB_RESYNC"

_CURSOR_EVERY = 16
"""Messages between two PB_CURSOR within a batch: a client that has no other way to know its
position hears no more than these again after a break."""


class Sink(Protocol):
    """Where a connection's bytes go; HTTP's side of it is the API's business."""

    def write(self, data: bytes) -> None:
        """Take bytes of the event stream; never blocks."""
        ...

    def buffered(self) -> int:
        """Bytes taken that the kernel hasn't."""
        ...

    async def drain(self) -> None:
        """Wait until the buffer is low."""
        ...

    def end(self) -> None:
        """End the body in an orderly way, after what was written."""
        ...

    def abort(self) -> None:
        """Drop the connection and what is buffered."""
        ...


class State(Enum):
    """Where a connection stands (the design's state machine, OPENING being ``Hub.open``)."""

    CONNECTING = "connecting"
    """The head is out, PB_CONNECT waits for the stream from the database."""
    HELD = "held"
    """PB_CONNECT is out, no call with topics was accepted yet: nothing is delivered."""
    PAUSED = "paused"
    """A subscribe call is at work: output waits at ``cursor``."""
    REPLAY = "replay"
    """Reads on from the changelog at ``cursor``: after a break, when slow, after a call."""
    LIVE = "live"
    """Gets what the hub delivers as it comes."""
    LOST = "lost"
    """Nobody knows who its caller is by now: it is about to be ended, and until its client is back,
    or calls once more, nothing is delivered and its position stays."""
    ENDED = "ended"


class Subscription:
    """One topic of one connection.

    Attributes:
        own_id: Of an auth collection: the id of the subscriber's own record, whose email it sees.
        barrier: What it must still hear although it joined late; None once everything is.
        group: The subscriptions it is judged with; None if nothing can ever match.
        viewer: Who it is to related records; None if it wants none.
        manager: What is asked of a record whose address isn't public; None if nothing helps.
    """

    __slots__ = (
        "barrier",
        "connection",
        "group",
        "manager",
        "name",
        "own_id",
        "topic",
        "view",
        "viewer",
    )

    def __init__(self, connection: Connection, topic: Topic, view: View, own_id: str) -> None:
        self.connection = connection
        self.topic = topic
        self.name = topic.text.encode()
        self.view = view
        self.own_id = own_id
        self.barrier: Barrier | None = None
        self.group: Group | None = None
        self.viewer: Viewer | None = None
        self.manager: Bound | None = None

    @property
    def receives(self) -> Receives:
        """What decides, beside its group, which bytes it is sent, its own record's aside."""
        return self.name, self.view, self.viewer, self.manager


@lru_cache(maxsize=4096)
def _position_text(epoch: str, cursor: Cursor) -> bytes:
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
        "_batches",
        "_parts",
        "_prefix",
        "_taken",
        "active_at",
        "address",
        "answered_at",
        "asked",
        "caller",
        "connected_at",
        "cursor",
        "doom",
        "epoch",
        "events",
        "gap",
        "id",
        "is_isolated",
        "is_live",
        "is_resumable",
        "known",
        "network",
        "opened_at",
        "position",
        "resumes",
        "sink",
        "state",
        "subscriptions",
        "taken_at",
        "turn",
        "wants_cursor",
        "wants_resync",
        "written",
        "written_at",
    )

    def __init__(
        self, client_id: str, sink: Sink, *, address: str, epoch: str, cursor: Cursor, now: float
    ) -> None:
        self.id = client_id
        self.sink = sink
        self.address = address
        self.network = network_of(address)
        self.epoch = epoch
        self.cursor = cursor
        self.state = State.CONNECTING
        self.is_live = False
        self.is_isolated = False
        """Whether its filters kept others waiting, and are evaluated for it alone. Written by the
        matcher: its groups depend on it."""
        self.is_resumable = False
        self.asked: tuple[str | None, str | None] = (None, None)
        """``Last-Event-ID`` and ``lastEventId`` as they came, read when PB_CONNECT goes out."""
        self.gap: str = ""
        """Reason to announce when the first call is accepted; empty if there is none."""
        self.resumes = False
        """Whether it came with a position that the changelog reaches back to."""
        self.doom = ""
        """Why it is to be ended as soon as that can be, so that its client comes back; a call
        that could not be answered, a gap that can't be told."""
        self.connected_at = now
        self.position: bytes = b""
        self.caller = Caller()
        self.known: Barrier | None = None
        """What was visible when the caller's row was read; None if it has no row."""
        self.subscriptions: dict[str, Subscription] = {}
        self.wants_cursor = False
        self.wants_resync = False
        self.turn = asyncio.Lock()
        """Held by whoever moves ``cursor`` or the subscriptions: one replay slice, one call."""
        self.opened_at = now
        self.answered_at: float | None = None
        self.active_at = now
        """When it connected or was last sent an event: the idle limit counts from here."""
        self.written_at = now
        self.taken_at = now
        self.written = 0
        self._taken = 0
        self.events = 0
        self._batches: tuple[Batch, ...] = ()
        self._parts: tuple[Cursor, AbstractSet[Part]] | None = None
        """What was sent of the change after ``cursor``, if that is too large to be sent at once."""
        self._prefix = b"id:" + client_id.encode()

    @property
    def is_ended(self) -> bool:
        """Whether it is over."""
        return self.state is State.ENDED

    def is_replaying(self) -> bool:
        """Whether it reads on from the changelog; no property, for it changes between awaits."""
        return self.state is State.REPLAY

    def is_lost(self) -> bool:
        """Whether its caller isn't known any more; no property, as ``is_replaying``."""
        return self.state is State.LOST

    def mark_ended(self) -> None:
        """Make it over: nothing is written any more."""
        self.state = State.ENDED
        self.is_live = False

    def say(self, tail: bytes, at: Cursor | None) -> None:
        """Write one message of ours; ``at`` moves a resumable connection's position."""
        if at is not None and self.is_resumable:
            self.position = self.position_text(at)
        self.write(self._full_id() + tail)

    def say_cursor(self, at: Cursor) -> None:
        """Write PB_CURSOR with the position."""
        self.position = self.position_text(at)
        full_id = self._full_id()
        self.write(full_id + cursor_tail(full_id[3:]))

    def beat(self, at: Cursor) -> None:
        """Write what keeps the connection alive: the position if it moved, else a comment."""
        if self.is_resumable and not self.gap and self.position_text(at) != self.position:
            self.say_cursor(at)
        else:
            self.write(HEARTBEAT)

    def position_text(self, cursor: Cursor) -> bytes:
        """The position as ids carry it."""
        return _position_text(self.epoch, cursor)

    def _full_id(self) -> bytes:
        return b"%b.%b" % (self._prefix, self.position) if self.is_resumable else self._prefix

    def write(self, data: bytes) -> None:
        """Hand bytes to the sink."""
        self.sink.write(data)
        self.written += len(data)

    def take(self, batch: Batch) -> bool:
        """Take part of a slice's messages; return whether it is the first part."""
        is_first = not self._batches
        self._batches += (batch,)
        return is_first

    def taken(self) -> int:
        """Bytes of what was taken."""
        return sum([batch.size for batch in self._batches])

    def is_one_message(self) -> bool:
        """Whether what was taken can't be divided."""
        return sum([len(batch.places) for batch in self._batches]) == 1

    def parts_sent_of(self, change: Cursor) -> AbstractSet[Part]:
        """Return which messages of a change were sent, if that wasn't all of them."""
        return self._parts[1] if self._parts is not None and self._parts[0] == change else NO_PARTS

    def note_parts(self, change: Cursor, parts: AbstractSet[Part]) -> None:
        """Take note of the messages that were sent of a change, if that isn't all of them."""
        self._parts = (change, parts) if parts else None

    def is_within_change(self) -> bool:
        """Whether it was sent some of the messages of the change after ``cursor``."""
        return self._parts is not None and self.cursor < self._parts[0]

    def compose(self, events: Sequence[Event], hold: Cursor | None = None) -> bytes:
        """Return what was taken of the slice as bytes; moves the position.

        Args:
            events: The slice's.
            hold: Where something begins that the connection has yet to be told: its position
                stays before that.
        """
        if not self._batches:
            return b""
        batch = merged(self._batches)
        self._batches = ()
        self.events += len(batch.places)
        if not self.is_resumable:
            return self._prefix.join(batch.tails)
        cursors = [events[place].cursor for place in batch.places]
        return b"".join(self._with_positions(batch.tails[1:], cursors, hold))

    def _with_positions(
        self, tails: Sequence[bytes], cursors: Sequence[Cursor], hold: Cursor | None
    ) -> list[bytes]:
        """Put an id before each tail; of several for one change only the last moves it."""
        prefix = self._prefix + b"."
        parts: list[bytes] = []
        for place, (tail, cursor) in enumerate(zip(tails, cursors, strict=True), start=1):
            is_last_of_change = place == len(cursors) or cursors[place] != cursor
            if is_last_of_change and (hold is None or cursor < hold):
                self.position = self.position_text(cursor)
            parts += (prefix, self.position, tail)
            if self.wants_cursor and place % _CURSOR_EVERY == 0:
                full_id = prefix + self.position
                parts += (full_id, cursor_tail(full_id[3:]))
        return parts

    def discard(self) -> None:
        """Forget what was taken; the changelog still has it."""
        self._batches = ()

    def note_taken(self, now: float) -> None:
        """See whether the client took bytes since the last look.

        What the sink adds to each write is in ``buffered`` and not in ``written``, so less may
        seem to be taken than before; that is no sign of life.
        """
        buffered = self.sink.buffered()
        taken = self.written - buffered
        if taken > self._taken or buffered == 0:
            self._taken, self.taken_at = taken, now
