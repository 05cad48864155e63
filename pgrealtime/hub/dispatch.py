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
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

import structlog
from msgspec import Struct

from pgrealtime.auth.principal import GUEST, AuthRecord, Caller, is_same
from pgrealtime.changelog.base import Changelog
from pgrealtime.collections import Collections
from pgrealtime.config import CollectionLoginConfig, RealtimeConfig
from pgrealtime.errors import ChangelogError, RuleError, SubscriptionError
from pgrealtime.hub.batch import Batch
from pgrealtime.hub.connection import (
    CURSOR_TOPIC,
    RESYNC_TOPIC,
    Connection,
    Sink,
    State,
    Subscription,
)
from pgrealtime.hub.display import (
    NOTHING_BESIDE,
    Beside,
    Display,
    Showing,
    Sight,
    sights_of_audiences,
)
from pgrealtime.hub.event import Action, Event
from pgrealtime.hub.expand import Reading
from pgrealtime.hub.frame import connect_tail, resync_tail
from pgrealtime.hub.identity import Identities, person_of
from pgrealtime.hub.limits import Limits
from pgrealtime.hub.match import Audience, Group, Matcher
from pgrealtime.hub.probe import Asked, LiveRow
from pgrealtime.hub.recent import Recent, standpoint
from pgrealtime.hub.slices import SLICE, WIDE, Announcement, Slice, parted, portions, slices
from pgrealtime.hub.snapshot import Barrier, barrier_of
from pgrealtime.hub.topic import parse_topic
from pgrealtime.hub.visibility import Visibility
from pgrealtime.lsn import LSN, Cursor, Position, Xid, parse_position
from pgrealtime.records.encode import View
from pgrealtime.rules.request import Request

log = structlog.get_logger(__name__)

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 40
_POSITION_LIMIT = 128
"""Bytes of a submitted position that are looked at; anything longer is not ours."""
_REPLAYS_AT_ONCE = 16
_AUDIENCE_BYTES = 256 * 1024
"""Of one portion for one audience: by so much a send buffer overruns at most, one change aside."""
_PORTION_BYTES = 16 * 1024 * 1024
"""Of one portion for all audiences: a client may have a thousand topics that hear the same."""
_NO_LOGINS: Mapping[str, CollectionLoginConfig] = MappingProxyType({})


_START = Cursor(LSN(0), 0)
_NEVER = Cursor(LSN(1 << 64), 0)


class Asking(Protocol):
    """What the hub needs of ``hub.probe``."""

    async def snapshot(self) -> tuple[str, str, bool]:
        """Return the row of ``SNAPSHOT_QUERY``."""
        ...

    async def ask(self, judging: Asked) -> frozenset[str]:
        """Find out what the judging wants to know, until nothing is left to ask.

        Returns:
            The collections whose rows nobody could be asked about.
        """
        ...

    def reading(self, xids: Sized[Xid]) -> AbstractAsyncContextManager[Reading]:
        """Open a snapshot for several questions."""
        ...

    async def live_rows(
        self, events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return what the tables hold now for the events' records.

        Returns:
            The rows, and the collections about which nobody could be asked.
        """
        ...


Sights: TypeAlias = Callable[[Iterable[Group]], Iterable[Sight]]

_NO_NAMES: frozenset[str] = frozenset()


class Verdict(Struct):
    """What was found out about events."""

    hits: list[Iterable[Group]]
    """Per event, the groups that may receive it."""
    undecided: frozenset[str] = _NO_NAMES
    """Collections whose rules could not be asked: who depends on one may miss something."""
    lost: frozenset[str] = _NO_NAMES
    """Collections of which anybody may miss something."""


class Hub:
    """Connections on one side, the changelog on the other.

    Args:
        changelog: What the relay fills.
        logins: How people log in, by collection name.
        epoch: Of the stream's positions; changes with ``restarted``.
        replays_at_once: Connections that are served from the changelog at the same moment; what
            they ask of the database must leave some of it to the others.
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
        replays_at_once: int = _REPLAYS_AT_ONCE,
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
        self._epochs = {epoch: _START}
        """This one and the one before, whose positions the changelog goes on from, and since when:
        tables that come back were not streamed in between."""
        self._used = {epoch}
        self._can_resume = can_resume
        self._on_doubt = on_doubt or (lambda: None)
        self._clock = clock
        self._visibility = Visibility(probe.snapshot, lambda: self._edition, clock)
        self._connections: dict[str, Connection] = {}
        self._ends = Limits(
            self._connections,
            limits,
            head=lambda: self._head,
            end=self._end,
            drop=self._drop,
            clock=clock,
        )
        self._display = self._display_of(collections, matcher)
        self._identities = Identities(logins)
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
        self._replays: dict[Connection, asyncio.Task[None]] = {}
        self._replay_turns = asyncio.Semaphore(replays_at_once)
        self._recent = Recent(clock)
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
        since = self._head if epoch in self._used else _START
        self._epochs = {self._epoch: self._epochs[self._epoch], epoch: since}
        self._used.add(epoch)
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
        self._display = self._display_of(collections, matcher)
        self._edition += 1
        self._reported.clear()
        for connection in self._connections.values():
            self._identities.become(connection, reconsider(connection.caller))
            for subscription in connection.subscriptions.values():
                subscription.group = None  # the other matcher's, which goes with it
                self._mean(subscription, connection.caller)

    def _display_of(self, collections: Collections, matcher: Matcher) -> Display:
        return Display(
            self._probe,
            collections,
            matcher.planner,
            nulls=self._nulls,
            on_doubt=self._on_doubt,
        )

    def _restarted(self, epoch: str) -> None:
        """Positions of before mean nothing any more: the changelog was emptied as well."""
        self._epoch = epoch
        self._epochs = {epoch: _START}
        self._used = {epoch}
        self._edition += 1
        self._head = self._target = self._changelog.head
        self._visibility.clear()
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
        is_ours = asked is not None and asked.cursor >= self._epochs.get(asked.epoch, _NEVER)
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

    def _drop(self, connection: Connection) -> None:
        log.warning("connection.dropped", connection=connection.id, reason="stalled")
        connection.sink.abort()
        self.close(connection)

    def _doom(self, connection: Connection, reason: str) -> None:
        """End the connection, as soon as its client can bear that."""
        connection.doom = reason
        if self._ends.is_settled(connection, self._clock()):
            self._end(connection, reason)

    async def watch_limits(self) -> None:
        """Apply the time limits, send heartbeats, let go of what has become visible; for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ends.watch(), name="limits")
            group.create_task(self._visibility.watch(), name="visibility")

    async def shutdown(self, grace: float) -> None:
        """End every connection in small groups, never taking longer than ``grace`` seconds."""
        self._is_closing = True
        await self._ends.shutdown(grace)

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
            if connection.cursor <= self._changelog.head:
                return None
            # Another process may be ahead of us, or have seen it before a restore.
            barrier = await self._visibility.barrier(_START)
            if connection.cursor.lsn <= barrier.insert_lsn:
                return None
            connection.gap, connection.resumes = "unknown", False
        if is_first:
            # It has heard nothing yet, so nothing can come out of order: begin at the head.
            connection.cursor = self._head
        return await self._visibility.barrier(connection.cursor)

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
        caller = replace(self._reconsider(caller), reading=None)
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
        topic = subscription.topic
        subscription.own_id = ""
        collection = self._collections.find(topic.collection)
        if collection is None:
            return ""
        principal = caller.principal
        if isinstance(principal, AuthRecord) and principal.collection_id == collection.id:
            subscription.own_id = principal.id
        request = Request(principal=principal, query=topic.query, headers=topic.headers)
        try:
            self._display.view(subscription, collection, request)
            reason = self._matcher.add(subscription, principal, dict(caller.own) or None)
        except RuleError as error:
            self._report(topic.collection, error)
            return error.message
        self._display.expanding += subscription.viewer is not None and not reason
        return reason

    def _leave(self, subscription: Subscription) -> None:
        """Take a subscription out of the group that ``_mean`` put it in, if any."""
        if subscription.group is not None:
            self._display.expanding -= subscription.viewer is not None
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
        entries = self._changelog.read(self._head, self._changelog.head, WIDE)
        self._visibility.told(entries)
        edition = self._edition
        if self._gate:
            await self._visibility.wait_for(entries)
            if self._edition != edition:
                return
        turns = self._identities.turns
        for part in slices(entries, self._head, self._collections, turns, WIDE):
            self._target, self._is_deciding = part.upto, True
            self._begin(part)
            verdict = await self._judge_in_turns(part.events)
            beside = await self._look_beside(part.events, verdict, sights_of_audiences)
            for portion in portions(part.events, verdict.hits):
                stop = portion.start
                while stop < portion.stop or not portion:
                    if self._edition != edition:
                        return  # another history has begun, and this slice isn't of it
                    stop = self._deliver(part, verdict, beside, range(stop, portion.stop))
                    if stop == len(part.events):
                        break
                    self._head = part.events[stop - 1].cursor
                    await asyncio.sleep(0)
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
                # The caller was looked up before: everything that comes is news about it too.
                subscription.barrier = subscription.connection.known = None
                del self._fresh[subscription]

    async def _judge(self, events: list[Event], among: Sized[Group] | None = None) -> Verdict:
        """Return who may receive the events; completes the rows on the way."""
        try:
            return await self._find_out(events, among)
        except Exception as error:  # noqa: BLE001 (a fault of ours in one rule or row stops nobody)
            log.error("judging.failed", error=type(error).__name__, at=_where(error))  # noqa: TRY400 (see _where)
            return Verdict([()] * len(events), lost=_names_in(events))

    async def _find_out(self, events: list[Event], among: Sized[Group] | None) -> Verdict:
        partial = [event for event in events if event.action != "delete" and not event.is_whole]
        live, lost = await self._probe.live_rows(partial) if partial else ({}, _NO_NAMES)
        if partial:
            _complete(partial, live, proven=True)
        judging = self._matcher.match(events, datetime.now(UTC), among)
        undecided = await self._probe.ask(judging)
        if partial:
            _complete(partial, live, proven=False)
        return Verdict(judging.hits, undecided=undecided, lost=lost)

    async def _judge_in_turns(self, events: list[Event]) -> Verdict:
        """Judge as many at a time as the loop's other users can wait for."""
        whole = Verdict([])
        share = min(SLICE, self._matcher.at_once)
        for first in range(0, len(events), share):
            if first:
                await asyncio.sleep(0)
            part = await self._judge(events[first : first + share])
            whole.hits += part.hits
            whole.undecided |= part.undecided
            whole.lost |= part.lost
        return whole

    async def _look_beside(
        self, events: Sequence[Event], verdict: Verdict, sights: Sights
    ) -> Beside:
        try:
            return await self._display.look_beside(events, verdict.hits, sights)
        except Exception as error:  # noqa: BLE001 (as in _judge)
            log.error("display.failed", error=type(error).__name__, at=_where(error))  # noqa: TRY400 (see _where)
            verdict.lost |= _names_in(events)
            return NOTHING_BESIDE

    def _deliver(self, part: Slice, verdict: Verdict, beside: Beside, places: range) -> int:
        """Hand out a portion of a slice, or as many bytes of it as are bearable at once.

        With the last one goes the slice's gap. Returns the place of the first event left over.
        """
        audiences, mine, stop = self._compose(part.events, verdict, beside, places)
        touched: list[Connection] = []
        for audience in audiences:
            self._hand_out(audience, part.events, mine, touched)
        self._flush(touched, part.events)
        is_last = stop == len(part.events)
        if is_last and (part.gap is not None or verdict.undecided or verdict.lost):
            touched = [c for c in self._connections.values() if c.is_live]
            for connection in touched:
                self._tell_all(connection, part.gap, verdict, part.upto)
        self._say_cursors(touched, part.upto if is_last else part.events[stop - 1].cursor)
        return stop

    def _compose(
        self, events: Sequence[Event], verdict: Verdict, beside: Beside, places: range
    ) -> tuple[list[Audience], dict[Subscription, Batch], int]:
        """Make the messages of some events for each audience, and for who sees more than it.

        Returns:
            Both, and the place where it stopped: at the end, or between two changes when it was
            too much for one connection or for the process.
        """
        audiences: list[Audience] = []
        mine: dict[Subscription, Batch] = {}
        size = largest = 0
        for place in places:
            event = events[place]
            is_enough = largest >= _AUDIENCE_BYTES or size >= _PORTION_BYTES
            if is_enough and event.cursor != events[place - 1].cursor:
                return audiences, mine, place
            showing = Showing(event, place, beside)
            for group in verdict.hits[place]:
                for audience in group.audiences:
                    if audience.batch is None:
                        audience.batch = Batch()
                        audiences.append(audience)
                    tail = self._display.tail(showing, audience.receives)
                    if not tail:
                        continue
                    audience.batch.add(place, tail)
                    size += len(tail)
                    largest = max(largest, audience.batch.size)
                    for owner in audience.owners(event.record_id):
                        own = self._display.tail(showing, audience.receives, is_own=True)
                        mine.setdefault(owner, Batch()).add(place, own)
        return audiences, mine, places.stop

    def _say_cursors(self, connections: Sequence[Connection], at: Cursor) -> None:
        for connection in connections:
            if connection.wants_cursor and connection.is_live:
                connection.say_cursor(at)

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

    def _flush(self, touched: Sequence[Connection], events: Sequence[Event]) -> None:
        now = self._clock()
        bound = self._limits.send_buffer
        for connection in touched:
            is_full = connection.sink.buffered() >= bound
            if is_full or connection.is_taken_too_much(events, bound):
                # It reads on from the changelog, at its own pace, from before this portion.
                connection.discard()
                connection.is_live = False
                connection.state = State.REPLAY
                connection.cursor = self._head
                self._replay(connection)
                continue
            connection.write(connection.compose(events))
            connection.active_at = connection.written_at = now

    # --- connections at their own cursor ----------------------------------------------------

    def _replay(self, connection: Connection) -> None:
        if connection not in self._replays:
            self._replays[connection] = asyncio.create_task(
                self._read_on(connection), name=f"replay {connection.id[:8]}"
            )

    async def _read_on(self, connection: Connection) -> None:
        try:
            await connection.sink.drain()
            at_once = SLICE
            while at_once := await self._read_slice(connection, at_once):
                await connection.sink.drain()
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 (as in _judge)
            log.error("replay.failed", error=type(error).__name__, at=_where(error))  # noqa: TRY400 (see _where)
            self._end(connection, "failed")  # its client comes back; silence would be a gap
        finally:
            if self._replays.get(connection) is asyncio.current_task():
                del self._replays[connection]
            if not self._replays:
                self._recent.clear()

    async def _read_slice(self, connection: Connection, at_once: int) -> int:
        """Hand the connection what is next for it: so many events.

        Returns:
            How many should be tried the next time; 0 if there is no next time.
        """
        async with connection.turn:
            if not connection.is_replaying() or self._opens_with_gap(connection):
                return 0
            if self._hand_again(connection):
                return at_once
            if connection.cursor >= self._target:
                self._join(connection)
                return 0
            async with self._replay_turns:
                # Looked at once more: others had their turn.
                if connection.is_replaying() and connection.cursor < self._target:
                    part, _ = parted(self._part_for(connection), at_once)
                    return await self._hand(connection, part)
            return at_once

    def _hand_again(self, connection: Connection) -> bool:
        """Deliver what another one that stood there was given a moment ago, if any."""
        stands = standpoint(connection, self._edition)
        stretch = None if stands is None else self._recent.find(stands)
        if stretch is None or stretch.upto > self._target:
            return False
        self._give(connection, stretch.events, stretch.batch)
        connection.cursor = stretch.upto
        if connection.wants_cursor:
            connection.say_cursor(stretch.upto)
        return True

    def _give(self, connection: Connection, events: Sequence[Event], batch: Batch) -> None:
        if batch.places:
            connection.take(batch)
            connection.write(connection.compose(events))
            connection.active_at = connection.written_at = self._clock()

    def _opens_with_gap(self, connection: Connection) -> bool:
        """Tell a gap that the submitted position lies in; return whether that ended it."""
        if not connection.gap:
            return False
        reason, connection.gap = connection.gap, ""
        self._tell(connection, Announcement(None, reason, connection.cursor))
        return connection.is_ended

    def _part_for(self, connection: Connection) -> Slice:
        """Return the next slice of what the connection has yet to read."""
        try:
            entries = self._changelog.read(connection.cursor, self._target, SLICE)
        except ChangelogError:
            floor = self._changelog.floor
            return Slice([], Announcement(None, "expired", floor), floor)

        def turns(event: Event) -> bool:
            caller = connection.caller
            return self._identities.caller_after(event, caller, connection.known) is not caller

        # Always the first: so all who stand at a cursor are given the same.
        return next(slices(entries, connection.cursor, self._collections, turns))

    async def _hand(self, connection: Connection, part: Slice) -> int:
        """Deliver a slice to one connection: what its own topics may see of it.

        What lies beyond the dispatch task's own is left for later, so that it is judged either
        here or there and never twice; and so is what was judged by collections that are no longer
        those of now, and what would be too much at once.

        Returns:
            How many events should be tried the next time: what isn't handed out was judged in vain.
        """
        edition = self._edition
        upto = min(part.upto, self._target)
        events = [event for event in part.events if event.cursor <= upto]
        people = [event for event in part.people if event.cursor <= upto]
        self._turn_one(connection, people, "update")
        stands = standpoint(connection, edition)
        batch, verdict, stop = await self._batch_for(connection, events)
        if connection.is_ended or self._edition != edition:
            return SLICE
        is_cut = stop < len(events)
        if is_cut:
            upto = events[stop - 1].cursor
        self._give(connection, events, batch)
        is_plain = part.gap is None and not part.people
        if stands is not None and is_plain and not (verdict.undecided or verdict.lost):
            self._recent.keep(stands, events, batch, upto)
        if not is_cut:
            self._turn_one(connection, people, "delete")
        connection.cursor = upto
        gap = part.gap if part.gap is not None and part.gap.at <= upto else None
        self._tell_all(connection, gap, verdict, upto)
        # Not before the gap: who breaks off in between would come back from behind it.
        if connection.wants_cursor and not connection.is_ended:
            connection.say_cursor(upto)
        return stop if is_cut else min(SLICE, max(1, len(events)) * 2)

    def _turn_one(self, connection: Connection, people: Sequence[Event], action: Action) -> None:
        for event in people:
            if event.action == action:
                self._turn(connection, event)

    async def _batch_for(
        self, connection: Connection, events: list[Event]
    ) -> tuple[Batch, Verdict, int]:
        """Return the messages, and of how many of the events they are."""
        by_group: dict[Group, list[Subscription]] = {}
        for subscription in connection.subscriptions.values():
            if subscription.group is not None:
                by_group.setdefault(subscription.group, []).append(subscription)
        batch = Batch()
        if not events or not by_group:
            return batch, Verdict([]), len(events)
        verdict = await self._judge(events, by_group.keys())

        def sights(groups: Iterable[Group]) -> Iterable[Sight]:
            return ((one.viewer, one.manager) for group in groups for one in by_group[group])

        beside = await self._look_beside(events, verdict, sights)
        for place, (event, groups) in enumerate(zip(events, verdict.hits, strict=True)):
            is_enough = batch.size >= self._limits.send_buffer
            if is_enough and event.cursor != events[place - 1].cursor:
                return batch, verdict, place
            showing = Showing(event, place, beside)
            for subscription in (one for group in groups for one in by_group[group]):
                barrier = subscription.barrier
                if barrier is not None and not barrier.admits(event.xid, event.cursor.lsn):
                    continue
                is_own = subscription.own_id == event.record_id
                if tail := self._display.tail(showing, subscription.receives, is_own=is_own):
                    batch.add(place, tail)
        return batch, verdict, len(events)

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

    def _tell_all(
        self, connection: Connection, gap: Announcement | None, verdict: Verdict, at: Cursor
    ) -> None:
        """Tell a connection of a gap in the stream, and of what nobody could be asked about."""
        if gap is not None:
            self._tell(connection, gap)
        if unknown := verdict.lost | (verdict.undecided & _asked_about(connection)):
            self._tell(connection, Announcement(unknown, "unknown", at))

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


def _asked_about(connection: Connection) -> frozenset[str]:
    """The collections about whose rows something may be asked for the connection's sake."""
    groups = (s.group for s in connection.subscriptions.values() if s.group is not None)
    return frozenset(g.variant.collection.name for g in groups if g.variant.formula is not True)


def _names_in(events: Iterable[Event]) -> frozenset[str]:
    return frozenset(event.collection.name for event in events)


def _where(error: BaseException) -> str:
    """The line that raised it. What an error says, and its traceback with it, may show a row."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{at.filename}:{at.lineno}"


def _unchanged(caller: Caller) -> Caller:
    return caller


def _position_of(text: str | None) -> Position | None:
    """Return the position in an id of ours, with or without the client id before it."""
    if not text or len(text) > _POSITION_LIMIT:
        return None
    return parse_position(text.rpartition(".")[2])


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
