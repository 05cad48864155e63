"""One client's SSE response: its state, its subscriptions, its position and its queued messages.

``hub.state.registry`` opens a connection. While it is LIVE it receives slices from
``hub.dispatcher``, while it is catching up from ``hub.catchup``; ``hub.subscribe`` changes its
topics. They call its transitions; nothing outside of its class assigns its fields.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeAlias

from pgrealtime.auth.principal import Caller
from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.fairness import client_network
from pgrealtime.hub.connections.group import MemberGroup, MemberRenderGroup, RenderKey
from pgrealtime.hub.connections.output import ConnectionOutput, ResponseWriter
from pgrealtime.lsn import Cursor
from pgrealtime.protocol.frame import HEARTBEAT, connect_tail
from pgrealtime.protocol.topic import Topic
from pgrealtime.records.encode import View
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.snapshot import ReadPoint

MessageKey: TypeAlias = tuple[int, bytes]
"""One message of a change: the index of its event among the change's events, and the topic."""

NO_MESSAGE_KEYS: AbstractSet[MessageKey] = frozenset()

CURSOR_TOPIC = "PB_CURSOR"
RESYNC_TOPIC = "PB_RESYNC"
START_REASON = "start"
"""Of the resync that a mirror begins with."""
WIDE_REASON = "wide"
"""Of one whose list is not sent, although its client asked for that: it has to load it itself."""

_CLOSE_DELAY_SECONDS = 1.0
"""Seconds that a connection stays open after its first call was answered. The PocketBase JS SDK
does not reconnect if its connection ends between PB_CONNECT and the answer to its first call."""


class ConnectionState(Enum):
    """The state of a connection; ``Connection``'s methods are the transitions."""

    CONNECTING = "connecting"
    """The response's head was sent; PB_CONNECT waits for the replication stream."""
    UNSUBSCRIBED = "unsubscribed"
    """PB_CONNECT was sent and there is no topic: nothing is delivered."""
    SUBSCRIBING = "subscribing"
    """A subscribe call is in progress: delivery waits at ``cursor``."""
    CATCHING_UP = "catching up"
    """Reads on from the changelog at ``cursor``: after a break, when slow, after a call."""
    LIVE = "live"
    """Receives each slice as the dispatcher delivers it."""
    CALLER_INVALID = "caller invalid"
    """Its caller is not known any more, so it is about to be closed. Nothing is delivered and its
    position stays, until its client reconnects or calls again."""
    CLOSED = "closed"


# Not Final: mypy would narrow ``connection.state`` by it, and it changes between awaits. Hot loops
# compare with a module's global: 2 ns a comparison on Python 3.11, ``ConnectionState.LIVE`` 100 ns.
LIVE: ConnectionState = ConnectionState.LIVE

_CALL_STATES = (
    ConnectionState.CONNECTING,
    ConnectionState.UNSUBSCRIBED,
    ConnectionState.SUBSCRIBING,
)
"""While a subscribe call is in progress, if the caller is valid."""
_OPEN_STATES = tuple(state for state in ConnectionState if state is not ConnectionState.CLOSED)


@dataclass(slots=True, eq=False)
class MirrorState:
    """What a subscription has beyond others if its client keeps a list by it.

    Where events can't keep the list right, the client is told to load it anew: by a resync.
    """

    is_told: bool
    """Whether its client asked for a mirror, and so knows resyncs. Others are notified of gaps."""
    pending_reason: str = ""
    """Why a resync is to be written; empty if none is."""
    resynced_at: float = -math.inf
    """When the last one was written."""

    @property
    def is_unloaded(self) -> bool:
        """Whether its client has no list yet, and is sent no event before it is told to load it."""
        return self.pending_reason == START_REASON


@dataclass(slots=True, eq=False, repr=False)
class Subscription:
    """One topic of one connection.

    What its group depends on changes only while it is in no group, which could not find it again.
    """

    connection: Connection
    topic: Topic
    view: View
    own_record_id: str
    """Of the caller's record, whose email is shown to it; empty for topics of other collections."""
    topic_bytes: bytes = field(init=False)
    read_point: ReadPoint | None = None
    """Transactions visible in this snapshot are not delivered for a topic that was added to a
    connection. None once all later transactions are invisible in it."""
    group: Group | None = None
    """The subscriptions that it is evaluated with; None if no event can match."""
    expand_viewer: ExpandViewer | None = None
    bound_manage_rule: BoundPredicate | None = None
    """The rule that shows an email which is not public; None if none can."""
    mirror: MirrorState | None = None
    """None if it is no mirror: it is told of a row when that is written and its caller sees it."""

    def __post_init__(self) -> None:
        self.topic_bytes = self.topic.text.encode()

    @property
    def render_key(self) -> RenderKey:
        """What, with its group and its own record, determines the bytes of its messages."""
        return self.topic_bytes, self.view, self.expand_viewer, self.bound_manage_rule

    def set_own_record(self, record_id: str) -> None:
        """Set the id of the caller's own record."""
        self.own_record_id = record_id

    def set_view(
        self,
        view: View,
        expand_viewer: ExpandViewer | None = None,
        bound_manage_rule: BoundPredicate | None = None,
    ) -> None:
        """Set what it sees of records."""
        self.view = view
        self.expand_viewer = expand_viewer
        self.bound_manage_rule = bound_manage_rule

    def set_group(self, group: Group | None) -> None:
        """Set the group that the matcher put it into, or None."""
        self.group = group

    @property
    def is_loaded_here(self) -> bool:
        """Whether the list of its mirror is sent to its client, which asked for that."""
        return self.mirror is not None and self.mirror.is_told and self.topic.asks_for_load

    def set_mirror(self, mirror: MirrorState | None) -> None:
        """Make it a mirror, or none; before it is put into a group."""
        self.mirror = mirror
        if mirror is not None:
            self.connection.count_mirror_frames()

    def request_resync(self, reason: str) -> None:
        """Have its client told to load its list anew; a reason that it is to be told for stays."""
        if self.mirror is not None and self.mirror.is_told and not self.mirror.pending_reason:
            self.mirror.pending_reason = reason
            self.connection.mark_resync_requested()

    def set_read_point(self, read_point: ReadPoint | None) -> None:
        """Set the snapshot whose transactions are not delivered for it."""
        self.read_point = read_point


Group: TypeAlias = MemberGroup[Subscription]
RenderGroup: TypeAlias = MemberRenderGroup[Subscription]


def connections_of(groups: Iterable[Group]) -> dict[Connection, None]:
    """Return the connections that have subscriptions in any of the groups."""
    return {
        subscription.connection: None
        for group in groups
        for render_group in group.render_groups
        for subscription in render_group
    }


class Resumption(NamedTuple):
    """The place that the position which a client submitted leads to."""

    cursor: Cursor
    """Delivery begins after it."""
    position: bytes
    """The position to send until something was delivered."""
    gap_reason: str = ""
    """Why changes are missing before ``cursor``; empty if none are."""
    is_resuming: bool = False
    """Whether delivery resumes from the submitted position."""
    awaits_resync: bool = False
    """Whether a resync was about to be written at that position: mirrors begin anew."""


class Connection(ConnectionOutput):
    """The state machine of one client's response.

    A transition from a state that it doesn't exist for raises ``RuntimeError``: a fault of this
    program, which ends the connection. ``now`` is in monotonic seconds wherever it is a parameter.
    """

    # Thousands of these wait for hours: 0.9 KB each with a dict.
    __slots__ = (
        "__weakref__",
        "_sent_of_change",
        "address",
        "caller",
        "caller_read_point",
        "close_reason",
        "connected_at",
        "cursor",
        "first_call_answered_at",
        "has_resync_topic",
        "is_isolated",
        "is_resuming",
        "lock",
        "network",
        "opened_at",
        "pending_gap_reason",
        "state",
        "submitted_positions",
        "subscriptions",
    )

    def __init__(
        self,
        client_id: str,
        writer: ResponseWriter,
        *,
        address: str,
        submitted_positions: tuple[str | None, str | None] = (None, None),
        epoch: str,
        cursor: Cursor,
        now: float,
    ) -> None:
        super().__init__(client_id, writer, epoch, now)
        self.address = address
        self.network = client_network(address)
        self.submitted_positions = submitted_positions
        """``Last-Event-ID`` and ``lastEventId``, resolved when PB_CONNECT is sent."""
        self.state = ConnectionState.CONNECTING
        self.cursor = cursor
        """Everything up to here was delivered to it. Stale while LIVE: the head holds."""
        self.pending_gap_reason: str = ""
        """Of a gap to announce once the first call was accepted, or empty."""
        self.is_resuming = False
        """Whether it goes on from a submitted position and has had no call since."""
        self.is_isolated = False
        """Whether its filters are evaluated for it alone because they were slow. Set by the
        matcher, whose groups depend on it."""
        self.close_reason = ""
        """Why it is to be closed as soon as its client can bear that, or empty."""
        self.caller = Caller()
        self.caller_read_point: ReadPoint | None = None
        """The snapshot in which the caller's row was read; None without a row."""
        self.subscriptions: dict[str, Subscription] = {}
        self.has_resync_topic = False
        self.lock = asyncio.Lock()
        """Held while a subscribe call, or one slice of catching up, moves ``cursor`` or changes
        the subscriptions."""
        self.opened_at = now
        self.connected_at = now
        self.first_call_answered_at: float | None = None
        self._sent_of_change: tuple[Cursor, AbstractSet[MessageKey]] | None = None
        """Messages sent of the change after ``cursor``, if it is too large for one write."""

    # Methods and not properties: mypy narrows properties, and the state changes between awaits.

    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self.state is ConnectionState.CLOSED

    def is_catching_up(self) -> bool:
        """Whether it reads on from the changelog."""
        return self.state is ConnectionState.CATCHING_UP

    def may_close(self, now: float) -> bool:
        """Whether closing it cannot fall between PB_CONNECT and the answer to its first call."""
        if self.first_call_answered_at is None:
            # Catching up holds the lock too, but begins after the first call only.
            is_in_call = self.lock.locked()
            return not is_in_call and now - self.connected_at >= _CLOSE_DELAY_SECONDS
        return now - self.first_call_answered_at >= _CLOSE_DELAY_SECONDS

    # --- transitions ------------------------------------------------------------------------

    def _require(self, *states: ConnectionState) -> None:
        if self.state not in states:
            raise RuntimeError(f"no such transition of a connection that is {self.state.value}")

    def connect(self, epoch: str, head: Cursor, resumption: Resumption | None, now: float) -> None:
        """CONNECTING -> UNSUBSCRIBED: send PB_CONNECT, now that there is a replication stream."""
        self._require(ConnectionState.CONNECTING)
        self.state = ConnectionState.UNSUBSCRIBED
        self.epoch = epoch
        self.cursor = head
        if resumption is not None:
            # Only for clients that submitted a position: others receive PocketBase's bytes.
            self.is_resumable = True
            (
                self.cursor,
                self.position,
                self.pending_gap_reason,
                self.is_resuming,
                self.awaits_resync,
            ) = resumption
        # Anew: the time in which PB_CONNECT was held back counts for no timeout of a connected one.
        self.connected_at = self.idle_since = self.last_write_at = now
        self.write_message(connect_tail(self.id), None)

    def begin_call(self, head: Cursor) -> bool:
        """-> SUBSCRIBING, unless it has no topics or no valid caller: stop delivery for a call.

        Returns whether it has no topics, so that nothing was delivered to it.
        """
        match self.state:
            case ConnectionState.CONNECTING | ConnectionState.UNSUBSCRIBED:
                return True
            case ConnectionState.CALLER_INVALID:
                # Nothing is delivered in it. ``accept_call`` leaves it; a refused call does not.
                return False
            case ConnectionState.LIVE:
                # What the dispatcher has composed for it of the slice in progress, it does not
                # enqueue on a connection that is not LIVE: all is read again behind the head.
                self.cursor = head
            case _:
                self._require(ConnectionState.CATCHING_UP)
        self.state = ConnectionState.SUBSCRIBING
        return False

    def start_at(self, head: Cursor, *, loses_position: bool) -> None:
        """Begin delivery at the head; only in a call that finds it without topics."""
        if loses_position:
            # The submitted position turned out not to be one of this stream.
            self.pending_gap_reason, self.is_resuming = "unknown", False
        self.cursor = head

    def accept_call(self, topics: Mapping[str, Topic], read_point: ReadPoint | None) -> None:
        """Apply the rest of an accepted call; subscriptions and caller are set already.

        CALLER_INVALID -> SUBSCRIBING: the call authenticated the caller anew.
        """
        self._require(*_CALL_STATES, ConnectionState.CALLER_INVALID)
        self.caller_read_point = read_point
        self.has_resync_topic = RESYNC_TOPIC in topics
        self.has_cursor_topic = CURSOR_TOPIC in topics
        if self.has_cursor_topic and not self.is_resumable:
            # Never back to False: a client that has seen positions may submit one.
            self.is_resumable = True
            self.position = self._encode_position(self.cursor)
        if topics:
            self.update_awaits_resync()
            # Not by a call without topics, after which the position is still the submitted one.
            self.is_resuming = False
        if self.state is ConnectionState.CALLER_INVALID:
            self.state = ConnectionState.SUBSCRIBING

    def end_call(self, head: Cursor) -> bool:
        """-> CATCHING_UP with topics, else UNSUBSCRIBED; return whether it is catching up now."""
        if self.state in (ConnectionState.CALLER_INVALID, ConnectionState.CLOSED):
            return False
        self._require(*_CALL_STATES)
        if self.subscriptions:
            self.state = ConnectionState.CATCHING_UP
            return True
        # A connection without topics before and after the call keeps its state: CONNECTING, or
        # UNSUBSCRIBED with the cursor from which its client wants to resume.
        if self.state is ConnectionState.SUBSCRIBING:
            self.state = ConnectionState.UNSUBSCRIBED
            self.cursor = head
        return False

    def mark_answered(self, now: float, *, close_reason: str = "") -> None:
        """Note that its first call was answered, and perhaps why it is to be closed after that."""
        if self.first_call_answered_at is None:
            self.first_call_answered_at = now
            self.close_reason = close_reason or self.close_reason

    def advance(self, cursor: Cursor) -> None:
        """Move the cursor while it catches up, or has become invalid within a slice."""
        self._require(ConnectionState.CATCHING_UP, ConnectionState.CALLER_INVALID)
        self.cursor = cursor

    def go_live(self) -> None:
        """CATCHING_UP -> LIVE: it has received everything up to the dispatcher's head."""
        self._require(ConnectionState.CATCHING_UP)
        self.state = LIVE

    def fall_behind(self, head: Cursor) -> None:
        """LIVE -> CATCHING_UP from the head; what was queued is read again from the changelog."""
        self._require(LIVE)
        # The cursor goes back before these messages: written too, they would come twice.
        self._queued_batches = ()
        self.state = ConnectionState.CATCHING_UP
        self.cursor = head

    def invalidate_caller(self, delivered: Cursor) -> None:
        """-> CALLER_INVALID: deliver nothing more; a LIVE one has received ``delivered``."""
        self._require(*_OPEN_STATES)
        if self.state is LIVE:
            self.cursor = delivered
        self.state = ConnectionState.CALLER_INVALID

    def restart(self, epoch: str, head: Cursor) -> bool:
        """Begin at the head of another history; return whether to notify it of a gap now."""
        self.epoch = epoch
        self.cursor = head
        self._sent_of_change = None
        self.caller_read_point = None
        if self.state is ConnectionState.UNSUBSCRIBED and self.is_resumable:
            # Without topics no gap affects it now. Its client may hold a position of the history
            # before, so its first call is followed by one.
            self.pending_gap_reason = self.pending_gap_reason or "unknown"
            return False
        return bool(self.subscriptions) or self.state is ConnectionState.SUBSCRIBING

    def continue_epoch(self, epoch: str) -> None:
        """Write positions of another epoch from now on, in which the stream continues."""
        self.epoch = epoch

    def request_close(self, reason: str) -> None:
        """Have it closed as soon as ``may_close`` allows."""
        self.close_reason = reason

    def close(self) -> None:
        """-> CLOSED, from any state: nothing is written any more."""
        self.state = ConnectionState.CLOSED

    # --- subscriptions and caller -------------------------------------------------------------

    def set_caller(self, caller: Caller) -> None:
        """Set the caller; called by ``CallerTracker``, which keeps the index by account."""
        self.caller = caller

    def forget_caller_read_point(self) -> None:
        """Apply every further change of the caller's row: none is older than the row read."""
        self.caller_read_point = None

    def set_isolated(self, *, is_isolated: bool) -> None:
        """Set whether its filters are evaluated for it alone; called by the matcher."""
        self.is_isolated = is_isolated

    def add_subscription(self, name: str, subscription: Subscription) -> None:
        """Add the subscription of a topic."""
        self.subscriptions[name] = subscription

    def take_subscriptions(self) -> Mapping[str, Subscription]:
        """Return all subscriptions and have none any more."""
        taken, self.subscriptions = self.subscriptions, {}
        return taken

    def take_pending_gap(self) -> str:
        """Return the reason of the gap to announce, and have none any more."""
        reason, self.pending_gap_reason = self.pending_gap_reason, ""
        return reason

    def write_gap(self, tail: bytes, cursor: Cursor | None, now: float) -> None:
        """Write PB_RESYNC; its cursor, if any, is what it has received then."""
        self.write_message(tail, cursor)
        # With the position: a subscribe call begins behind the gap, or the gap would come again.
        self.cursor = cursor or self.cursor
        self.mark_event_sent(now)

    def write_resync(
        self, subscription: Subscription, tail: bytes, cursor: Cursor, now: float
    ) -> None:
        """Write a mirror's resync. ``cursor`` is what the connection has received."""
        assert subscription.mirror is not None
        subscription.mirror.pending_reason = ""
        subscription.mirror.resynced_at = now
        self.update_awaits_resync()
        self.write_message(tail, cursor)
        self.mark_event_sent(now)

    def write_list(
        self,
        subscription: Subscription,
        tails: Sequence[bytes],
        cursor: Cursor,
        now: float,
    ) -> None:
        """Write a mirror's resync and the list that follows it, to the last message."""
        # Until the last of them positions say that a resync is to come: who resumes from one of
        # these has a part of the list.
        resync, *records, ready = tails
        self.write_message(resync, cursor)
        self.write(self._event_id().join((b"", *records)))
        self.events_sent += len(records)
        if self.mirror_frames is not None:
            self.mirror_frames.update({"create": len(records), "ready": 1})
        self.write_resync(subscription, ready, cursor, now)

    def count_mirror_frames(self) -> None:
        """Count what mirrors receive: it has one."""
        self.mirror_frames = Counter() if self.mirror_frames is None else self.mirror_frames

    def mark_resync_requested(self) -> None:
        """Have positions say that a resync is to be written."""
        self.awaits_resync = True

    def update_awaits_resync(self) -> None:
        """Derive ``awaits_resync`` from the subscriptions."""
        mirrors = (own.mirror for own in self.subscriptions.values())
        self.awaits_resync = any(mirror and mirror.pending_reason for mirror in mirrors)

    def write_heartbeat(self, cursor: Cursor, now: float) -> None:
        """Write PB_CURSOR if the position moved, else an SSE comment."""
        self.last_write_at = now
        # Before a pending gap is announced the position must not pass it. Amid a change it would go
        # back behind that of the events that were sent.
        is_position_sent = (
            self.is_resumable and not self.pending_gap_reason and not self.is_amid_change()
        )
        if is_position_sent and self._encode_position(cursor) != self.position:
            self.write_cursor_event(cursor)
        else:
            self.write(HEARTBEAT)

    # --- changes too large for one write -------------------------------------------------------

    def messages_sent_of(self, change: Cursor) -> AbstractSet[MessageKey]:
        """Return the messages sent of a change that is not sent completely."""
        started, sent = self._sent_of_change or (None, NO_MESSAGE_KEYS)
        return sent if started == change else NO_MESSAGE_KEYS

    def record_messages_sent(self, change: Cursor, sent: AbstractSet[MessageKey]) -> None:
        """Note the messages sent of a change; none if it was sent completely."""
        self._sent_of_change = (change, sent) if sent else None

    def is_amid_change(self) -> bool:
        """Whether it was sent some of the messages of the change after ``cursor``."""
        return self._sent_of_change is not None and self.cursor < self._sent_of_change[0]
