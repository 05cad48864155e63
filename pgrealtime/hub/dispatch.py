"""The task joining changelog, matcher, probe and connections: who is sent what, in which order.

Everything here runs on one loop. The dispatch task reads the changelog in slices, has each slice
judged and hands it to the LIVE connections; every other connection reads on from the changelog at
its own cursor (REPLAY), be it back from a break, slow, or fresh from a subscribe call.
"""

from __future__ import annotations

import asyncio
import secrets
import string
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

import structlog
from msgspec import Struct

from pgrealtime.auth.principal import GUEST, AuthRecord, Caller, Superuser, is_same
from pgrealtime.changelog.base import Changelog, Entry, Gap
from pgrealtime.changes import Oversized, TableName, Transaction
from pgrealtime.collections import Collections
from pgrealtime.config import CollectionLoginConfig, RealtimeConfig
from pgrealtime.errors import ChangelogError, PgRealtimeError, RuleError, SubscriptionError
from pgrealtime.hub.batch import Batch
from pgrealtime.hub.connection import (
    CURSOR_TOPIC,
    RESYNC_TOPIC,
    Connection,
    Receives,
    Sink,
    State,
    Subscription,
)
from pgrealtime.hub.event import Action, Emptied, Event, events_of
from pgrealtime.hub.expand import Expander, Reading, Related, Wanted
from pgrealtime.hub.expansion import Node, Viewer, Viewers, junction_steps
from pgrealtime.hub.frame import connect_tail, event_tail, resync_tail
from pgrealtime.hub.identity import Identities, Person, person_in, person_of
from pgrealtime.hub.looking import Looking
from pgrealtime.hub.match import Audience, Group, Matcher
from pgrealtime.hub.probe import Asked, LiveRow
from pgrealtime.hub.snapshot import Barrier, Snapshot, Snapshots, barrier_of
from pgrealtime.hub.topic import parse_topic
from pgrealtime.lsn import END, LSN, Cursor, Position, Xid, parse_position
from pgrealtime.records.encode import RecordEncoder, View, encoder
from pgrealtime.rules.past import Past, tables_of
from pgrealtime.rules.plan import Bound, moment
from pgrealtime.rules.request import Request

log = structlog.get_logger(__name__)

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 40
_POSITION_LIMIT = 128
"""Bytes of a submitted position that are looked at; anything longer is not ours."""
_SLICE = 250
"""Changes judged and delivered together: large enough to join frames, small enough to share."""
_CONNECT_SECONDS = 10.0
"""How long PB_CONNECT is held back at most."""
_CALL_SECONDS = 30.0
"""How long a resumable connection waits for topics; a plain one has PocketBase's idle limit."""
_SETTLE_SECONDS = 1.0
"""No connection is ended sooner after its first call's answer: the JS SDK would stay dead."""
_SHUTDOWN_SETTLE_SECONDS = 2.0
_BARRIER_SECONDS = 10.0
_BARRIER_RETRY_SECONDS = 0.005
_CLOSED_PER_SECOND = 500
_REPLAYS_AT_ONCE = 16
_ENCODERS = 1024
_NO_IDS: Mapping[str, Sequence[str]] = MappingProxyType({})
_NO_LOGINS: Mapping[str, CollectionLoginConfig] = MappingProxyType({})


class Asking(Protocol):
    """What the hub needs of ``hub.probe``."""

    async def snapshot(self) -> tuple[str, str, bool]:
        """Return the row of ``SNAPSHOT_QUERY``."""
        ...

    async def ask(self, judging: Asked) -> None:
        """Find out what the judging wants to know, until nothing is left to ask."""
        ...

    def reading(self, xids: Sized[Xid]) -> AbstractAsyncContextManager[Reading]:
        """Open a snapshot for several questions."""
        ...

    async def live_rows(self, events: Sequence[Event]) -> dict[tuple[str, str], LiveRow]:
        """Return what the tables hold now for the events' records."""
        ...


class Announcement(Struct, frozen=True):
    """A gap as clients are told of it."""

    collections: frozenset[str] | None
    """Names; None is all."""
    reason: str
    at: Cursor

    def concerns(self, collection: str) -> bool:
        """Whether something of the collection of that name may be missing."""
        return self.collections is None or collection in self.collections


class Slice(Struct):
    """A stretch of the stream: events, then perhaps a gap; everything up to ``upto``."""

    events: list[Event]
    gap: Announcement | None
    upto: Cursor
    people: list[Event] = []
    """Those of the events that may change callers. One that does change a caller of the reader is
    the first of the slice if it is an update, and part of its last change if it is a delete."""


Judged: TypeAlias = list[Iterable[Group]]


Sight: TypeAlias = tuple[Viewer | None, Bound | None]
"""What a subscription's records show beside their rows: to whom, and who manages them."""


class Beside(Struct):
    """What was found out about a slice's events beside their rows."""

    looking: Looking[int]
    """By place, what the managers asked."""
    related: Related


_NOTHING_BESIDE = Beside(Looking(moment(datetime.now(UTC))), Related())


class Showing(Struct):
    """An event that is being shown to those who hear of it."""

    event: Event
    place: int
    beside: Beside
    records: dict[tuple[View, Viewer | None], bytes] = {}
    """Its record as it was made for who sees what."""

    def is_managed(self, manager: Bound) -> bool:
        """Whether the record's address is shown to them."""
        return manager in self.beside.looking.admitted(self.place)


class _Cut:
    """A slice in the making.

    A row that comes changes no caller: nobody could be it before. One that changes begins a slice,
    for it is judged with its own news; one that goes ends it.
    """

    __slots__ = ("events", "limit", "people", "turned")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.people: list[Event] = []
        self.limit = _SLICE
        self.turned: Person | None = None
        """Whom the first event changes: before the slice is handed out nobody can say whether
        another event changes that caller again."""

    def may_turn(self, event: Event, turns: Callable[[Event], bool]) -> bool:
        return self.turned == person_in(event) or turns(event)

    def is_over_before(self, event: Event, *, is_full: bool) -> bool:
        """Whether the event, a turn or not, belongs to the next slice; no change is torn apart."""
        events = self.events
        is_apart = bool(events) and event.cursor != events[-1].cursor
        return is_apart and (is_full or event.action == "update")

    def note(self, event: Event, *, is_turn: bool) -> None:
        """Take note of an event about a person."""
        self.people.append(event)
        if is_turn and event.action == "delete":
            self.limit = 0  # what follows is judged without this caller
        elif is_turn:
            self.turned = person_in(event)

    def slice(self, gap: Announcement | None, upto: Cursor) -> Slice:
        return Slice(self.events, gap, upto, self.people)


class Hub:
    """Connections on one side, the changelog on the other.

    Args:
        changelog: What the relay fills.
        logins: How people log in, by collection name.
        epoch: Of the stream's positions; changes with ``restarted``.
        on_doubt: Told when a row doesn't fit what the catalogue says of its table.
    """

    def __init__(
        self,
        changelog: Changelog,
        matcher: Matcher,
        probe: Asking,
        *,
        collections: Collections,
        limits: RealtimeConfig,
        logins: Mapping[str, CollectionLoginConfig] = _NO_LOGINS,
        nulls: Literal["null", "zero"] = "null",
        epoch: str = "000000",
        can_resume: bool = True,
        on_doubt: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changelog = changelog
        self._matcher = matcher
        self._probe = probe
        self._collections = collections
        self._limits = limits
        self._nulls = nulls
        self._epoch = epoch
        self._epochs: set[str] = set()
        """Earlier ones whose positions the changelog goes on from."""
        self._can_resume = can_resume
        self._on_doubt = on_doubt or (lambda: None)
        self._clock = clock
        self._snapshots = Snapshots(probe.snapshot)
        self._connections: dict[str, Connection] = {}
        self._show_by(collections, matcher)
        self._identities = Identities(logins)
        # Views hold what clients wrote as fields: bounded, so that nobody can fill the memory.
        self._encoder = lru_cache(maxsize=_ENCODERS)(self._make_encoder)
        self._stream_is_up = False
        self._is_closing = False
        self._gate = False
        self._head = self._target = changelog.head
        self._is_deciding = False
        self._waiting: deque[Callable[[], None]] = deque()
        self._edition = 0
        """Counts the collections and the histories that were in use: what was read or judged by
        those of before counts no more."""
        self._reported: set[tuple[str, str]] = set()
        self._reconsider: Callable[[Caller], Caller] = _unchanged
        self._joining: dict[Connection, None] = {}
        self._fresh: dict[Subscription, None] = {}
        """Those that have a barrier."""
        self._unseen: deque[tuple[LSN, Xid]] = deque()
        self._replays: dict[Connection, asyncio.Task[None]] = {}
        self._replay_turns = asyncio.Semaphore(_REPLAYS_AT_ONCE)
        self._appended = asyncio.Event()
        self.progressed = asyncio.Event()
        """Set whenever the head moved; whoever waits for that clears it first."""

    # --- what the relay and the supervisor say --------------------------------------------

    @property
    def head(self) -> Cursor:
        """Everything up to here was handed to the connections that are LIVE."""
        return self._head

    @property
    def connections(self) -> Sized[Connection]:
        """The open connections."""
        return self._connections.values()

    @property
    def stream_is_up(self) -> bool:
        """Whether the stream from the database is being read."""
        return self._stream_is_up

    def wake(self) -> None:
        """The changelog has more."""
        self._appended.set()

    def stream_started(self, epoch: str) -> None:
        """The stream is being read: connections that waited for it get their PB_CONNECT."""
        if epoch != self._epoch:
            self._restarted(epoch)
        self._stream_is_up = True
        if self._is_closing:
            return
        for connection in list(self._connections.values())[: self._limits.max_connections]:
            if connection.state is State.CONNECTING:
                self._connect(connection)

    def stream_lost(self) -> None:
        """The stream is away: PB_CONNECT is held back and subscribe calls are refused."""
        self._stream_is_up = False

    def gate_on_visibility(self, *, gate: bool) -> None:
        """Whether events wait until their transactions are visible to readers."""
        self._gate = gate

    def stream_continued(self, epoch: str) -> None:
        """Another stream goes on where the last one left off: nothing was missed or repeated."""
        self._epochs.add(self._epoch)
        self._epoch = epoch
        for connection in self._connections.values():
            connection.epoch = epoch

    async def use(
        self,
        collections: Collections,
        matcher: Matcher,
        reconsider: Callable[[Caller], Caller],
        *,
        logins: Mapping[str, CollectionLoginConfig] = _NO_LOGINS,
    ) -> None:
        """Judge and show by other collections from the next slice on; on return that is so.

        Connections and their topics stay: each topic now means what it means by the new
        collections, which may be nothing.

        Args:
            collections: Instead of those of now.
            matcher: For them, without any subscription.
            reconsider: What a caller who is known already is by the new configuration: the same,
                changed, or a guest.
            logins: How people log in, by collection name.
        """
        in_force = asyncio.get_running_loop().create_future()

        def take() -> None:
            self._identities.use(logins)
            self._take(collections, matcher, reconsider)
            if not in_force.done():
                in_force.set_result(None)

        if self._is_deciding:
            self._waiting.append(take)
        else:
            take()
        await in_force

    def _take(
        self,
        collections: Collections,
        matcher: Matcher,
        reconsider: Callable[[Caller], Caller],
    ) -> None:
        self._collections, self._matcher, self._reconsider = collections, matcher, reconsider
        self._show_by(collections, matcher)
        self._encoder = lru_cache(maxsize=_ENCODERS)(self._make_encoder)
        self._edition += 1
        self._reported.clear()
        for connection in self._connections.values():
            self._identities.become(connection, reconsider(connection.caller))
            for subscription in connection.subscriptions.values():
                subscription.group = None  # the other matcher's, which goes with it
                self._mean(subscription, connection.caller)

    def _show_by(self, collections: Collections, matcher: Matcher) -> None:
        """Let records be shown as these collections say."""
        self._planner = matcher.planner
        self._viewers = Viewers(collections, matcher.planner)
        self._expander = Expander(self._probe, collections, self._show)
        self._tables = tables_of(collections)
        self._rich = frozenset(
            one.name
            for one in collections.values()
            if one.manage_rule is not None or junction_steps(collections, one)
        )
        """Collections whose records show more than their rows."""
        self._expanding = 0
        """Subscriptions that want related records."""

    def _restarted(self, epoch: str) -> None:
        """Positions of before mean nothing any more: the changelog was emptied as well."""
        self._epoch = epoch
        self._epochs.clear()
        self._edition += 1
        self._head = self._target = self._changelog.head
        self._unseen.clear()
        # A snapshot of before takes ids that are used anew for seen.
        for subscription in self._fresh:
            subscription.barrier = None
        self._fresh.clear()
        self._identities.forget(self._head.lsn)
        for connection in list(self._connections.values()):
            connection.epoch = epoch
            connection.cursor = self._head
            connection.known = None
            if connection.state is State.HELD and connection.is_resumable:
                connection.gap = connection.gap or "unknown"
            elif connection.subscriptions:
                self._tell(connection, Announcement(None, "unknown", self._head))
        self._let_go()

    # --- opening and closing --------------------------------------------------------------

    def open(
        self, sink: Sink, *, address: str, last_event_id: str | None, position: str | None
    ) -> Connection:
        """Take a new connection whose head is out.

        Args:
            sink: Where its bytes go.
            address: The client's, which subscribe calls must share.
            last_event_id: The header ``Last-Event-ID``, if any. Without a cursor it is not ours.
            position: The query parameter ``lastEventId``, if any; ``""`` asks for positions
                from now on.
        """
        now = self._clock()
        client_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
        connection = Connection(
            client_id, sink, address=address, epoch=self._epoch, cursor=self._head, now=now
        )
        connection.asked = (last_event_id, position)
        self._connections[client_id] = connection
        if len(self._connections) > self._limits.max_connections:
            # Any status but 200 is final to an EventSource: accept, wait, end (see the tick).
            log.warning("connection.refused", limit=self._limits.max_connections)
        elif self._stream_is_up and not self._is_closing:
            self._connect(connection)
        return connection

    def _read_position(self, connection: Connection) -> None:
        last_event_id, position = connection.asked
        asked = _position_of(last_event_id)
        if asked is None and position is None:
            return
        connection.is_resumable = True
        given = last_event_id if asked is not None else position
        if not given:
            connection.position = connection.position_text(self._head)
            return
        asked = asked or _position_of(position)
        is_ours = asked is not None and asked.epoch in (self._epoch, *self._epochs)
        if asked is None or not is_ours or not self._can_resume:
            connection.gap = "unknown"
        elif asked.cursor < self._changelog.floor:
            connection.gap = "expired"
        else:
            connection.cursor = asked.cursor
            connection.resumes = True
        # Until something was delivered the id stays the old position, also after a gap: who
        # breaks off now asks again and is told again.
        text = given.rpartition(".")[2][:_POSITION_LIMIT]
        connection.position = text.encode() if asked else connection.position_text(self._head)

    def _connect(self, connection: Connection) -> None:
        connection.state = State.HELD
        connection.cursor, connection.epoch = self._head, self._epoch
        self._read_position(connection)
        now = self._clock()
        connection.connected_at = connection.active_at = connection.written_at = now
        connection.say(connect_tail(connection.id), None)

    def close(self, connection: Connection) -> None:
        """Forget a connection whose client has gone, or that was ended. Idempotent."""
        connection.mark_ended()
        self._identities.remove(connection)
        self._joining.pop(connection, None)
        replay = self._replays.pop(connection, None)
        if replay is not None:
            replay.cancel()
        for subscription in connection.subscriptions.values():
            self._leave(subscription)
            self._fresh.pop(subscription, None)
        connection.subscriptions = {}
        if self._connections.pop(connection.id, None) is not None:
            log.debug("connection.closed", connection=connection.id, events=connection.events)

    def _end(self, connection: Connection, reason: str) -> None:
        if connection.is_ended:
            return
        log.debug("connection.ended", connection=connection.id, reason=reason)
        connection.sink.end()
        self.close(connection)

    # --- subscribing ----------------------------------------------------------------------

    async def subscribe(
        self, client_id: str, topics: Sequence[str], caller: Caller, address: str
    ) -> None:
        """Replace a connection's topics and authorization; on return the promise of a 204 holds.

        Args:
            client_id: As submitted, with or without a position after a dot.
            topics: As submitted; empty strings and repetitions are skipped.
            caller: Who calls.
            address: From where.

        Raises:
            SubscriptionError: ``client_unknown``, ``address_mismatch``,
                ``authorization_mismatch``, ``stream_away``. Nothing was changed then.
        """
        connection = self._connections.get(client_id.partition(".")[0])
        if connection is None:
            raise SubscriptionError("unknown client id", code="client_unknown")
        if self._limits.same_address and connection.address != address:
            raise SubscriptionError("another address", code="address_mismatch")
        async with connection.turn:
            if connection.is_ended:
                raise SubscriptionError("unknown client id", code="client_unknown")
            held = connection.caller.principal
            if held != GUEST and not is_same(held, caller.principal):
                raise SubscriptionError("another caller", code="authorization_mismatch")
            try:
                await self._replace(connection, list(dict.fromkeys(filter(None, topics))), caller)
            except SubscriptionError as error:
                if error.error_code == "stream_away" and connection.answered_at is None:
                    connection.answered_at = self._clock()
                    connection.doom = "stream_away"
                raise
            if connection.answered_at is None:
                connection.answered_at = self._clock()

    async def _replace(self, connection: Connection, names: list[str], caller: Caller) -> None:
        if not self._stream_is_up:
            raise SubscriptionError("the stream is away", code="stream_away")
        is_first = connection.state in (State.CONNECTING, State.HELD)
        if connection.is_live:
            connection.cursor = self._head
        connection.is_live = False
        self._joining.pop(connection, None)
        if not is_first:
            connection.state = State.PAUSED
        try:
            barrier = await self._barrier_for(connection, names, is_first=is_first)
            if connection.is_ended:
                raise SubscriptionError("unknown client id", code="client_unknown")
            self._install(connection, names, caller, barrier)
        finally:
            if connection.subscriptions and not connection.is_ended:
                connection.state = State.REPLAY
                self._replay(connection)
            elif connection.state is State.PAUSED:
                connection.state = State.HELD
                connection.cursor = self._head

    async def _barrier_for(
        self, connection: Connection, names: list[str], *, is_first: bool
    ) -> Barrier | None:
        if all(name in connection.subscriptions for name in names):
            return None
        if is_first and connection.resumes:
            return None
        if is_first:
            # It has heard nothing yet, so nothing can come out of order: begin at the head.
            connection.cursor = self._head
        return await self._barrier(connection.cursor)

    async def _barrier(self, handed: Cursor) -> Barrier:
        """Return a barrier whose snapshot sees every transaction up to ``handed``.

        One that it didn't see would have to reach the new topic after later ones that the
        connection had already, and a resume from a later id would lose it.
        """
        deadline = self._clock() + _BARRIER_SECONDS
        while True:
            edition = self._edition
            try:
                barrier = await self._snapshots.take()
            except PgRealtimeError as error:
                raise SubscriptionError("no snapshot", code="stream_away") from error
            if self._edition != edition:
                continue  # it may be another history's
            self._note_seen(barrier.snapshot)
            if not any(end_lsn <= handed.lsn for end_lsn, _xid in self._unseen):
                return barrier
            if self._clock() > deadline:
                raise SubscriptionError("a commit stays invisible", code="stream_away")
            await asyncio.sleep(_BARRIER_RETRY_SECONDS)

    def _note_seen(self, snapshot: Snapshot) -> None:
        self._unseen = deque(
            (end_lsn, xid) for end_lsn, xid in self._unseen if not snapshot.sees(xid)
        )

    def _install(
        self, connection: Connection, names: list[str], caller: Caller, barrier: Barrier | None
    ) -> None:
        # Configuration and row may have changed since the caller was recognised.
        known = None if caller.reading is None else barrier_of(*caller.reading)
        try:
            caller = self._identities.caught_up(caller, known, connection.cursor)
        except LookupError as error:
            raise SubscriptionError("the caller's row may have changed", code="stream_away") from (
                error
            )
        caller = self._reconsider(caller)
        before = connection.subscriptions
        for subscription in before.values():
            self._leave(subscription)
            self._fresh.pop(subscription, None)
        connection.known = known
        self._identities.become(connection, caller)
        connection.subscriptions = {}
        connection.wants_resync = RESYNC_TOPIC in names
        connection.wants_cursor = CURSOR_TOPIC in names
        if connection.wants_cursor and not connection.is_resumable:
            connection.is_resumable = True
            connection.position = connection.position_text(connection.cursor)
        for name in names:
            subscription = Subscription(connection, parse_topic(name), View(), "")
            kept = before.get(name)
            subscription.barrier = kept.barrier if kept else barrier
            if subscription.barrier is not None:
                self._fresh[subscription] = None
            reason = self._mean(subscription, caller)
            if reason:
                log.info("subscription.mute", connection=connection.id, reason=reason)
            connection.subscriptions[name] = subscription
        if names:
            connection.resumes = False

    def _mean(self, subscription: Subscription, caller: Caller) -> str:
        """Give a subscription that is in no group what its topic means to the caller now.

        Returns:
            Why nothing can match, or ``""``.
        """
        topic, is_superuser = subscription.topic, isinstance(caller.principal, Superuser)
        subscription.view = View(
            sees_hidden=is_superuser, sees_email=is_superuser, fields=topic.query.get("fields")
        )
        subscription.own_id = ""
        subscription.viewer = subscription.manager = None
        collection = self._collections.find(topic.collection)
        if collection is None:
            return ""
        request = Request(principal=caller.principal, query=topic.query, headers=topic.headers)
        principal = caller.principal
        if isinstance(principal, AuthRecord) and principal.collection_id == collection.id:
            subscription.own_id = principal.id
        if "expand" in topic.query:
            subscription.viewer = self._viewers.viewer(collection, request)
        try:
            if collection.manage_rule is not None and not is_superuser:
                bound = self._planner.bind(collection, collection.manage_rule, request)
                subscription.manager = bound if isinstance(bound, Bound) else None
            reason = self._matcher.add(subscription, caller.principal)
        except RuleError as error:
            self._report(topic.collection, error)
            return error.message
        self._expanding += subscription.viewer is not None and not reason
        return reason

    def _leave(self, subscription: Subscription) -> None:
        """Take a subscription out of the group that ``_mean`` put it in, if any."""
        if subscription.group is not None:
            self._expanding -= subscription.viewer is not None
            self._matcher.remove(subscription)

    def _report(self, collection: str, error: RuleError) -> None:
        """Say once that a collection's rule denies everybody."""
        if (collection, error.message) not in self._reported:
            self._reported.add((collection, error.message))
            log.error("rule.error", collection=collection, reason=error.message)

    # --- reading the changelog --------------------------------------------------------------

    async def run(self) -> None:
        """Hand the changelog to the LIVE connections, for ever."""
        while True:
            await self._appended.wait()
            self._appended.clear()
            while self._head < self._changelog.head:
                await self._dispatch()

    async def _dispatch(self) -> None:
        entries = self._changelog.read(self._head, self._changelog.head, _SLICE)
        # Noted before anything is handed out: a barrier must know of all that was.
        self._unseen.extend(
            (entry.end_lsn, entry.xid) for entry in entries if isinstance(entry, Transaction)
        )
        edition = self._edition
        if self._gate:
            await self._until_visible(entries)
            if self._edition != edition:
                return
        for part in self._slices(entries, self._head, self._identities.turns):
            self._target, self._is_deciding = part.upto, True
            self._begin(part)
            judged = await self._judge(part.events) if part.events else []
            beside = await self._look_beside(part.events, judged, _sights_of_audiences)
            if self._edition != edition:
                return  # another history has begun, and this slice isn't of it
            self._deliver(part, judged, beside)
            self._turn_live(part.people, "delete")
            self._advance(part)
            # Others of this loop get their turn: the reader, replays, HTTP.
            await asyncio.sleep(0)
            if self._edition != edition:
                return  # the rest was cut for other collections, or is of another history

    def _begin(self, part: Slice) -> None:
        """Take note of what the slice tells of people, before it is judged."""
        for event in part.people:
            self._identities.tell(event)
        self._turn_live(part.people, "update")
        gap = part.gap
        if gap is not None and any(
            collection.type == "auth" and gap.concerns(name)
            for name, collection in self._collections.items()
        ):
            self._identities.forget(gap.at.lsn)

    def _turn_live(self, people: Sequence[Event], action: Action) -> None:
        for event in people:
            if event.action == action:
                for connection in [c for c in self._identities.concerned(event) if c.is_live]:
                    self._turn(connection, event)

    def _turn(self, connection: Connection, event: Event) -> None:
        """Make the connection's caller what the event makes of it; the client isn't told."""
        caller = self._identities.caller_after(event, connection.caller, connection.known)
        if caller is connection.caller:
            return
        self._identities.become(connection, caller)
        for subscription in connection.subscriptions.values():
            self._leave(subscription)
            self._mean(subscription, caller)

    async def _until_visible(self, entries: Sequence[Entry]) -> None:
        xids = [entry.xid for entry in entries if isinstance(entry, Transaction)]
        edition = self._edition
        while xids and self._edition == edition:
            try:
                snapshot = (await self._snapshots.take()).snapshot
            except PgRealtimeError as error:
                log.warning("visibility.unknown", error=error.message)
                await asyncio.sleep(_SETTLE_SECONDS)
                continue
            xids = [xid for xid in xids if not snapshot.sees(xid)]
            if xids:
                await asyncio.sleep(_BARRIER_RETRY_SECONDS)

    def _advance(self, part: Slice) -> None:
        self._head = part.upto
        self._let_go()

    def _let_go(self) -> None:
        """On with whoever waited for a head that moved, and for nothing being judged."""
        self._is_deciding = False
        self.progressed.set()
        while self._waiting:
            self._waiting.popleft()()
        if self._fresh:
            self._clear_barriers()
        joining, self._joining = self._joining, {}
        for connection in joining:
            self._join(connection)

    def _clear_barriers(self) -> None:
        for subscription in list(self._fresh):
            barrier = subscription.barrier
            is_over = barrier is None or self._head.lsn > barrier.insert_lsn
            if is_over and subscription.connection.is_live:
                subscription.barrier = None
                del self._fresh[subscription]

    def _slices(
        self, entries: Sequence[Entry], after: Cursor, turns: Callable[[Event], bool]
    ) -> Iterator[Slice]:
        """Cut entries into slices that begin after the cursor.

        Args:
            entries: In the order of the stream.
            after: What the reader has.
            turns: Whether an event about a person changes a caller of the reader. The slice
                before must have been handed out when the next one is asked for.
        """
        if not entries:
            # All that the commit changed lies behind; to its very end there is nothing to read.
            yield Slice([], None, Cursor(after.lsn, END))
            return
        cut = _Cut()
        upto = after
        for entry in entries:
            if isinstance(entry, Transaction):
                for event in events_of(entry, self._collections):
                    if event.cursor <= after:
                        continue
                    if isinstance(event, Emptied):
                        names = frozenset({event.collection.name})
                        gap = Announcement(names, "truncate", event.cursor)
                        yield cut.slice(gap, event.cursor)
                        cut = _Cut()
                        continue
                    is_person = event.collection.type == "auth" and event.action != "create"
                    is_turn = is_person and cut.may_turn(event, turns)
                    is_full = len(cut.events) >= cut.limit
                    if (is_turn or is_full) and cut.is_over_before(event, is_full=is_full):
                        yield cut.slice(None, cut.events[-1].cursor)
                        cut = _Cut()
                    cut.events.append(event)
                    if is_person:
                        cut.note(event, is_turn=is_turn)
                upto = Cursor(entry.end_lsn, END)
            else:
                upto = Cursor(entry.end_lsn, END)
                yield cut.slice(self._announcement(entry, upto), upto)
                cut = _Cut()
        if upto > after:
            yield cut.slice(None, upto)

    def _announcement(self, entry: Oversized | Gap, at: Cursor) -> Announcement:
        reason = "too_large" if isinstance(entry, Oversized) else entry.reason
        return Announcement(self._names(entry.tables), reason, at)

    def _names(self, tables: frozenset[TableName] | None) -> frozenset[str] | None:
        if tables is None:
            return None
        found = (self._collections.of_table(table) for table in tables)
        return frozenset(collection.name for collection in found if collection is not None)

    async def _judge(self, events: list[Event], among: Sized[Group] | None = None) -> Judged:
        """Return, per event, the groups that may receive it; completes the rows on the way."""
        partial = [event for event in events if event.action != "delete" and not event.is_whole]
        live = await self._probe.live_rows(partial) if partial else {}
        if partial:
            _complete(partial, live, proven=True)
        judging = self._matcher.match(events, datetime.now(UTC), among)
        await self._probe.ask(judging)
        if partial:
            _complete(partial, live, proven=False)
        return judging.hits

    async def _look_beside(
        self,
        events: Sequence[Event],
        judged: Judged,
        sights: Callable[[Iterable[Group]], Iterable[Sight]],
    ) -> Beside:
        """Find out what else is shown of the events' records, and to whom.

        Args:
            events: The slice's.
            judged: Who hears of them.
            sights: What those of some groups want to see whom this is done for.
        """
        rich = self._rich
        if not self._expanding and not any(event.collection.name in rich for event in events):
            return _NOTHING_BESIDE
        xids = frozenset(event.xid for event in events)
        looking: Looking[int] = Looking(moment(datetime.now(UTC)), xids)
        wanted: list[Wanted] = []
        heard = [place for place, groups in enumerate(judged) if groups]
        for place in heard:
            event = events[place]
            found = list(sights(judged[place]))
            wanted += ((place, viewer) for viewer, _ in found if viewer is not None)
            if event.collection.manage_rule is not None and event.hides_email:
                past = Past(event.changes, self._tables) if event.action == "delete" else None
                bounds = {manager for _, manager in found if manager is not None}
                looking.consider(place, event.collection, event.row, bounds, past)
        await self._probe.ask(looking)
        related = await self._expander.related(events, heard, wanted)
        return Beside(looking, related)

    def _deliver(self, part: Slice, judged: Judged, beside: Beside) -> None:
        audiences: list[Audience] = []
        mine: dict[Subscription, Batch] = {}
        for place, (event, groups) in enumerate(zip(part.events, judged, strict=True)):
            showing = Showing(event, place, beside)
            for group in groups:
                for audience in group.audiences:
                    if audience.batch is None:
                        audience.batch = Batch()
                        audiences.append(audience)
                    tail = self._tail(showing, audience.receives)
                    if not tail:
                        continue
                    audience.batch.add(place, tail)
                    for owner in audience.owners(event.record_id):
                        own = self._tail(showing, audience.receives, is_own=True)
                        mine.setdefault(owner, Batch()).add(place, own)
        touched: list[Connection] = []
        for audience in audiences:
            self._hand_out(audience, part.events, mine, touched)
        self._flush(touched, part)
        if part.gap is not None:
            for connection in [c for c in self._connections.values() if c.is_live]:
                self._tell(connection, part.gap)

    def _hand_out(
        self,
        audience: Audience,
        events: Sequence[Event],
        mine: Mapping[Subscription, Batch],
        touched: list[Connection],
    ) -> None:
        """Give the audience's batch to its LIVE connections, the same object wherever it fits."""
        shared, audience.batch = audience.batch, None
        if shared is None or not shared.places:
            return
        for subscription in audience:
            connection = subscription.connection
            if not connection.is_live:
                continue
            batch = shared
            if subscription in mine:
                batch = Batch(
                    {**dict(shared.messages()), **dict(mine[subscription].messages())}.items()
                )
            barrier = subscription.barrier
            if barrier is not None:
                batch = Batch(
                    (place, tail)
                    for place, tail in batch.messages()
                    if barrier.admits(events[place].xid, events[place].cursor.lsn)
                )
                if not batch.places:
                    continue
            if connection.take(batch):
                touched.append(connection)

    def _tail(self, showing: Showing, receives: Receives, *, is_own: bool = False) -> bytes:
        """Return the message, or nothing if the row can't be shown: that row alone is lost."""
        name, view, viewer, manager = receives
        if is_own or (manager is not None and showing.is_managed(manager)):
            view = _with_email(view)
        record = showing.records.get((view, viewer))
        if record is None:
            record = showing.records[view, viewer] = self._record(showing, view, viewer)
        return event_tail(name, record, showing.event.action) if record else b""

    def _record(self, showing: Showing, view: View, viewer: Viewer | None) -> bytes:
        event, related = showing.event, showing.beside.related
        try:
            return self._encoder(event.collection.name, view)(
                event.row,
                related.ids.get(showing.place, _NO_IDS),
                None if viewer is None else related.expands.get((showing.place, viewer)),
            )
        except (ValueError, LookupError) as error:
            # A value that isn't of the type that the catalogue gave the column when it was read.
            log.error(  # noqa: TRY400 (the message may not show the row)
                "record.failed", collection=event.collection.name, error=type(error).__name__
            )
            self._on_doubt()
            return b""

    def _show(self, node: Node, view: View, expand: bytes | None) -> bytes:
        return self._encoder(node.collection.name, view)(node.row, node.related, expand)

    def _make_encoder(self, name: str, view: View) -> RecordEncoder:
        return encoder(self._collections[name], nulls=self._nulls, view=view)

    def _flush(self, touched: Sequence[Connection], part: Slice) -> None:
        now = self._clock()
        bound = self._limits.send_buffer
        for connection in touched:
            buffered = connection.sink.buffered()
            if buffered >= bound:
                # Slow: it reads on from the changelog, at its own pace, from before this slice.
                connection.discard()
                connection.is_live = False
                connection.state = State.REPLAY
                connection.cursor = self._head
                self._replay(connection)
                continue
            connection.write(connection.compose(part.events))
            connection.active_at = connection.written_at = now
            if connection.wants_cursor:
                connection.say_cursor(part.upto)

    # --- connections at their own cursor ----------------------------------------------------

    def _replay(self, connection: Connection) -> None:
        if connection not in self._replays:
            self._replays[connection] = asyncio.create_task(
                self._read_on(connection), name=f"replay {connection.id[:8]}"
            )

    async def _read_on(self, connection: Connection) -> None:
        try:
            await connection.sink.drain()
            while True:
                async with connection.turn:
                    if not connection.is_replaying() or self._opens_with_gap(connection):
                        return
                    edition = self._edition
                    parts = self._parts_for(connection)
                    if parts is None:
                        self._join(connection)
                        return
                is_whole, cursor = True, connection.cursor
                while is_whole:
                    async with connection.turn, self._replay_turns:
                        if not connection.is_replaying():
                            return
                        # Cut only now: a call may have changed the caller meanwhile.
                        part = next(parts, None)
                        if part is None:
                            break
                        if self._edition != edition or connection.cursor != cursor:
                            break  # a restart or a call has put it elsewhere
                        is_whole = await self._hand(connection, part)
                        cursor = connection.cursor
                    await connection.sink.drain()
        finally:
            if self._replays.get(connection) is asyncio.current_task():
                del self._replays[connection]

    def _opens_with_gap(self, connection: Connection) -> bool:
        """Tell a gap that the submitted position lies in; return whether that ended it."""
        if not connection.gap:
            return False
        reason, connection.gap = connection.gap, ""
        self._tell(connection, Announcement(None, reason, connection.cursor))
        return connection.is_ended

    def _parts_for(self, connection: Connection) -> Iterator[Slice] | None:
        """Return what the connection has yet to read, or None if it has caught up."""
        if connection.cursor >= self._target:
            return None
        try:
            entries = self._changelog.read(connection.cursor, self._target, _SLICE)
        except ChangelogError:
            floor = self._changelog.floor
            return iter([Slice([], Announcement(None, "expired", floor), floor)])

        def turns(event: Event) -> bool:
            caller = connection.caller
            return self._identities.caller_after(event, caller, connection.known) is not caller

        return self._slices(entries, connection.cursor, turns)

    async def _hand(self, connection: Connection, part: Slice) -> bool:
        """Deliver a slice to one connection: what its own topics may see of it.

        Returns whether that was the whole slice: what lies beyond the dispatch task's own is
        left for later, so that it is judged either here or there and never twice; and so is what
        was judged by collections that are no longer those of now.
        """
        edition = self._edition
        upto = min(part.upto, self._target)
        events = [event for event in part.events if event.cursor <= upto]
        people = [event for event in part.people if event.cursor <= upto]
        self._turn_one(connection, people, "update")
        batch = await self._batch_for(connection, events)
        if connection.is_ended or self._edition != edition:
            return False
        if batch.places:
            connection.take(batch)
            connection.write(connection.compose(events))
            connection.active_at = connection.written_at = self._clock()
        self._turn_one(connection, people, "delete")
        connection.cursor = upto
        if connection.wants_cursor:
            connection.say_cursor(upto)
        if part.gap is not None and part.gap.at <= upto:
            self._tell(connection, part.gap)
        return upto == part.upto

    def _turn_one(self, connection: Connection, people: Sequence[Event], action: Action) -> None:
        for event in people:
            if event.action == action:
                self._turn(connection, event)

    async def _batch_for(self, connection: Connection, events: list[Event]) -> Batch:
        by_group: dict[Group, list[Subscription]] = {}
        for subscription in connection.subscriptions.values():
            if subscription.group is not None:
                by_group.setdefault(subscription.group, []).append(subscription)
        batch = Batch()
        if not events or not by_group:
            return batch
        judged = await self._judge(events, by_group.keys())

        def sights(groups: Iterable[Group]) -> Iterable[Sight]:
            return ((one.viewer, one.manager) for group in groups for one in by_group[group])

        beside = await self._look_beside(events, judged, sights)
        for place, (event, groups) in enumerate(zip(events, judged, strict=True)):
            showing = Showing(event, place, beside)
            for subscription in (one for group in groups for one in by_group[group]):
                barrier = subscription.barrier
                if barrier is not None and not barrier.admits(event.xid, event.cursor.lsn):
                    continue
                is_own = subscription.own_id == event.record_id
                if tail := self._tail(showing, subscription.receives, is_own=is_own):
                    batch.add(place, tail)
        return batch

    def _join(self, connection: Connection) -> None:
        """Make LIVE a connection that has read all there is; or let it wait, or read on."""
        if connection.state is not State.REPLAY:
            return
        if self._is_deciding or connection.cursor > self._head:
            # The slice being judged was judged without its groups; it has read that one itself.
            self._joining[connection] = None
        elif connection.cursor < self._head:
            self._replays.pop(connection, None)
            self._replay(connection)
        else:
            connection.state = State.LIVE
            connection.is_live = True
            if connection.wants_cursor:
                connection.say_cursor(self._head)

    def _tell(self, connection: Connection, gap: Announcement) -> None:
        """Tell a connection of a gap that concerns it; a plain one is ended, so that it reloads.

        So is one whose caller's row may have changed in the gap: coming back it says anew who
        it is.
        """
        topics = (s.topic.collection for s in connection.subscriptions.values())
        found = {c.name for c in map(self._collections.find, topics) if c is not None}
        is_concerned = gap.collections is None or bool(found & gap.collections)
        is_told = connection.is_resumable or connection.wants_resync
        if is_concerned and is_told:
            connection.say(resync_tail(gap.collections or (), gap.reason), gap.at)
            connection.cursor = gap.at
            connection.active_at = connection.written_at = self._clock()
        if (is_concerned and not is_told) or self._is_caller_lost(connection, gap):
            self._doom(connection, "gap")

    def _is_caller_lost(self, connection: Connection, gap: Announcement) -> bool:
        """Whether the caller's row may have changed in the gap since it was read."""
        name, _ = person_of(connection.caller) or ("", "")
        if name not in self._collections or not gap.concerns(name):
            return False
        return connection.known is None or connection.known.insert_lsn < gap.at.lsn

    # --- limits and shutdown ----------------------------------------------------------------

    async def watch_limits(self) -> None:
        """Apply the time limits and send heartbeats, from one timer for all connections."""
        limits = self._limits
        shortest = min(
            limits.idle_timeout, limits.max_lifetime, limits.heartbeat, limits.stall_timeout
        )
        pause = max(0.02, min(0.5, shortest / 20))
        while True:
            await asyncio.sleep(pause)
            now = self._clock()
            for connection in list(self._connections.values()):
                self._apply_limits(connection, now)
            if self._unseen:
                await self._forget_seen()

    async def _forget_seen(self) -> None:
        try:
            self._note_seen((await self._snapshots.take()).snapshot)
        except PgRealtimeError:
            return  # the next round asks again

    def _apply_limits(self, connection: Connection, now: float) -> None:
        if connection.state is State.CONNECTING:
            if now - connection.opened_at >= _CONNECT_SECONDS:
                self._end(connection, "no_stream")
            return
        connection.note_taken(now)
        if now - connection.taken_at >= self._limits.stall_timeout:
            connection.sink.abort()
            log.warning("connection.dropped", connection=connection.id, reason="stalled")
            self.close(connection)
        elif reason := self._overdue(connection, now):
            if self._is_settled(connection, now):
                self._end(connection, reason)
        elif (
            now - connection.written_at >= self._limits.heartbeat and not connection.sink.buffered()
        ):
            connection.written_at = now
            connection.beat(self._head if connection.is_live else connection.cursor)

    def _doom(self, connection: Connection, reason: str) -> None:
        """End the connection, as soon as its client can bear that."""
        connection.doom = reason
        if self._is_settled(connection, self._clock()):
            self._end(connection, reason)

    def _overdue(self, connection: Connection, now: float) -> str:
        limits = self._limits
        expires_at = connection.caller.expires_at
        if connection.doom:
            return connection.doom
        if now - connection.active_at >= limits.idle_timeout:
            return "idle"
        if now - connection.connected_at >= limits.max_lifetime:
            return "lifetime"
        if expires_at is not None and time.time() >= expires_at:
            return "token_expired"
        if (
            connection.answered_at is None
            and connection.is_resumable
            and now - connection.connected_at >= _CALL_SECONDS
        ):
            return "no_call"
        return ""

    def _is_settled(self, connection: Connection, now: float) -> bool:
        """Whether ending it now can't fall between PB_CONNECT and the answer to its call."""
        if connection.answered_at is None:
            is_called = connection.turn.locked()
            return not is_called and now - connection.connected_at >= _SETTLE_SECONDS
        return now - connection.answered_at >= _SETTLE_SECONDS

    async def shutdown(self, grace: float) -> None:
        """End every connection in small groups, never taking longer than ``grace`` seconds."""
        self._is_closing = True
        began = self._clock()
        while self._connections and (now := self._clock()) - began < grace:
            ready = [
                connection
                for connection in self._connections.values()
                if self._is_settled(connection, now) or now - began >= _SHUTDOWN_SETTLE_SECONDS
            ]
            share = max(_CLOSED_PER_SECOND, len(self._connections) / max(grace, 0.1) * 2) / 20
            for connection in ready[: int(share) + 1]:
                self._end(connection, "shutdown")
            await asyncio.sleep(0.05)
        for connection in list(self._connections.values()):
            self._end(connection, "shutdown")


def _unchanged(caller: Caller) -> Caller:
    return caller


def _position_of(text: str | None) -> Position | None:
    """Return the position in an id of ours, with or without the client id before it."""
    if not text or len(text) > _POSITION_LIMIT:
        return None
    return parse_position(text.rpartition(".")[2])


def _sights_of_audiences(groups: Iterable[Group]) -> Iterable[Sight]:
    for group in groups:
        for audience in group.audiences:
            _name, _view, viewer, manager = audience.receives
            yield viewer, manager


def _with_email(view: View) -> View:
    return View(sees_hidden=view.sees_hidden, sees_email=True, fields=view.fields)


def _complete(events: list[Event], live: dict[tuple[str, str], LiveRow], *, proven: bool) -> None:
    """Fill in columns that the WAL left out.

    Args:
        events: Events with partial rows.
        live: What the tables hold now.
        proven: Only from a live row that is the very version the event tells of, so that rules
            may be judged on it; else from any, to be shown.
    """
    for event in events:
        found = live.get((event.collection.name, event.record_id))
        if found is not None and (not proven or found.xid == event.xid):
            event.row = {**found.row, **event.row}
