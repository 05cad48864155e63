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
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Literal

import structlog

from pgrealtime.auth.principal import GUEST, Caller, is_same
from pgrealtime.changelog.base import Changelog, Entry
from pgrealtime.changes import Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionLoginConfig, HiddenFields, RealtimeConfig
from pgrealtime.errors import PgRealtimeError, SubscriptionError, SubscriptionLimitError
from pgrealtime.expand.plan import Viewer
from pgrealtime.hub.catchup.tasks import REPLAYS_AT_ONCE, Replays
from pgrealtime.hub.connections.connection import (
    CURSOR_TOPIC,
    NO_PARTS,
    RESYNC_TOPIC,
    Connection,
    Sink,
    State,
    Subscription,
)
from pgrealtime.hub.connections.send_budget import SendBudget
from pgrealtime.hub.delivery.compose import Composer, Portion, hand_out
from pgrealtime.hub.delivery.render import NOTHING_BESIDE, Beside, sights_of_audiences
from pgrealtime.hub.evaluation.evaluator import Asking, Unheard, Verdict, causes_of, where
from pgrealtime.hub.evaluation.matcher import Group, Matcher
from pgrealtime.hub.events.event import Action, Event
from pgrealtime.hub.events.slices import WIDE, Announcement, Slice, portions, slices
from pgrealtime.hub.live_reads.caller_check import CallerCheck
from pgrealtime.hub.live_reads.row_history import Reach, RowHistory
from pgrealtime.hub.state.callers import Identities
from pgrealtime.hub.state.epochs import History
from pgrealtime.hub.state.gaps import Gaps
from pgrealtime.hub.state.generation import Meaning
from pgrealtime.hub.state.progress import Course
from pgrealtime.hub.state.timeouts import Limits
from pgrealtime.hub.state.totals import Counts
from pgrealtime.hub.state.visibility import Visibility
from pgrealtime.lsn import END, LSN, Cursor
from pgrealtime.protocol.frame import connect_tail
from pgrealtime.protocol.topic import Topic
from pgrealtime.records.encode import View
from pgrealtime.rule_queries.slow_filters import IsolatedConnections
from pgrealtime.rules.engine.before_state import tables_of
from pgrealtime.snapshot import Barrier, barrier_of
from pgrealtime.turns import TurnQueue

log = structlog.get_logger(__name__)

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 40
_NO_LOGINS: Mapping[str, CollectionLoginConfig] = MappingProxyType({})
_START = Cursor(LSN(0), 0)
_SCHEMA_SECONDS = 5.0
"""How long events are held back until the schema was read; as long as they wait to be visible."""
_AGAIN_SECONDS = 1.0
"""Between two questions about the catalogue that have no answer."""
_STEPS_AT_ONCE = 50
"""Topics of a call that are taken or given at once; each takes 5 to 30 us."""
_TOLD = 200
"""Characters of a topic that are logged."""


class Hub:
    """Connections on one side, the changelog on the other.

    Args:
        changelog: What the relay fills.
        logins: How people log in, by collection name.
        nulls: How NULL is shown.
        hidden: Who may expand a hidden relation.
        epoch: Of the stream's positions; changes with ``restarted``.
        allows_guests: Whether a connection that has become a guest's keeps its topics, or ends.
        replays_at_once: Connections that are served from the changelog at the same moment; what
            they ask of the database must leave some of it to the others.
        on_doubt: Told when a row doesn't fit what the catalogue says of its table.
        reach: Waits until the changelog has what was committed by now.
        read_schema: Returns once the schema of now, or of later, is in force; False if it couldn't
            be read.
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
        hidden: HiddenFields = "strict",
        epoch: str = "000000",
        can_resume: bool = True,
        allows_guests: bool = True,
        replays_at_once: int = REPLAYS_AT_ONCE,
        on_doubt: Callable[[], None] | None = None,
        reach: Reach | None = None,
        read_schema: Callable[[], Awaitable[bool]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changelog = changelog
        self._probe = probe
        self._limits = limits
        self._nulls: Literal["null", "zero"] = nulls
        self._hidden: HiddenFields = hidden
        self._on_doubt = on_doubt or (lambda: None)
        self._read_schema = read_schema
        self._clock = clock
        self._row_history = RowHistory(changelog, reach)
        self.counts = Counts()
        meaning = self._meaning_of(collections, matcher)
        self._course = Course(changelog.head, changelog.head, meaning)
        self._history = History(epoch, can_resume=can_resume)
        self._visibility = Visibility(probe.snapshot, lambda: self._course.edition, clock)
        self._connections: dict[str, Connection] = {}
        self._ends = Limits(
            self._connections,
            limits,
            head=lambda: self._course.head,
            end=self._end,
            drop=self._drop,
            clock=clock,
        )
        self._identities = Identities(logins, allows_guests=allows_guests)
        self._isolated = IsolatedConnections(self._course, clock)
        self._gaps = Gaps(self._course, doom=self._doom, lose=self._lose, clock=clock)
        self._budget = SendBudget(
            per_connection=limits.send_buffer, total=limits.send_buffers, clock=clock
        )
        self._replays = Replays(
            changelog,
            self._course,
            self._identities,
            self._isolated,
            self._gaps,
            history=self._row_history,
            at_once=replays_at_once,
            budget=self._budget,
            stall_timeout=limits.stall_timeout,
            turn=self._turn_or_end,
            seen=self._visibility.seen,
            end=self._end,
            drop=self._drop,
            clock=clock,
        )
        self._stream_is_up = False
        self._is_closing = False
        self._gate = False
        self._waiting: deque[Callable[[], None]] = deque()
        self._reconsider: Callable[[Caller], Caller] = _unchanged
        self._calls = TurnQueue()
        """Subscribe calls whose topics are read."""
        self._fresh: dict[Subscription, None] = {}
        """Those that have a barrier."""
        self._handed = changelog.head
        """Where the last portion ended that was handed out."""
        self._known_upto: Cursor | None = None
        """Where the entries end that ``_known`` let pass in the dispatch under way."""
        self._gone: Sequence[Event] = ()
        """The people whose rows that one deleted, until their connections were told."""
        self._appended = asyncio.Event()
        self.progressed = asyncio.Event()
        """Set whenever the head moved; whoever waits for that clears it first."""

    # --- what the relay and the supervisor say --------------------------------------------

    @property
    def head(self) -> Cursor:
        """Everything up to here was handed to the connections that are LIVE."""
        return self._course.head

    @property
    def connections(self) -> Sized[Connection]:
        """The open connections."""
        return self._connections.values()

    @property
    def is_closing(self) -> bool:
        """Whether no connection is taken any more."""
        return self._is_closing

    @property
    def subscriptions(self) -> Mapping[str, int]:
        """How many there are that something can match, by collection."""
        return self._course.meaning.subscriptions

    @property
    def gaps_told(self) -> Mapping[str, int]:
        """How often a connection was told of a gap, or ended for it, by the gap's reason."""
        return self._gaps.told

    @property
    def stream_is_up(self) -> bool:
        """Whether the stream from the database is being read."""
        return self._stream_is_up

    def wake(self) -> None:
        """The changelog has more."""
        self._appended.set()

    def stream_started(self, epoch: str) -> None:
        """The stream is being read: connections that waited for it get their PB_CONNECT."""
        if epoch != self._history.epoch:
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
        self._history.go_on(epoch, self._course.head)
        for connection in self._connections.values():
            connection.epoch = epoch

    async def use(
        self,
        collections: Collections,
        matcher: Matcher,
        reconsider: Callable[[Caller], Caller],
        *,
        logins: Mapping[str, CollectionLoginConfig] = _NO_LOGINS,
        allows_guests: bool = True,
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
            allows_guests: Whether guests keep their topics.
        """
        in_force = asyncio.get_running_loop().create_future()

        def take() -> None:
            try:
                self._identities.use(logins, allows_guests=allows_guests)
                self._take(collections, matcher, reconsider)
            except Exception as error:  # noqa: BLE001 (told to whoever waits)
                if not in_force.done():
                    in_force.set_exception(error)
            if not in_force.done():
                in_force.set_result(None)

        if self._course.is_deciding:
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
        self._course.meaning, self._reconsider = self._meaning_of(collections, matcher), reconsider
        self._course.edition += 1
        for connection in list(self._connections.values()):
            for subscription in connection.subscriptions.values():
                subscription.group = None  # the other matcher's, which goes with it
            with self._ending_if_it_fails(connection):
                self._identities.become(connection, reconsider(connection.caller))
                for subscription in connection.subscriptions.values():
                    self._course.meaning.give(subscription, connection.caller)
                self._mind_guest(connection, self._course.head)

    def _meaning_of(self, collections: Collections, matcher: Matcher) -> Meaning:
        self._row_history.use(tables_of(collections))
        return Meaning(
            self._probe,
            collections,
            matcher,
            nulls=self._nulls,
            hidden=self._hidden,
            on_doubt=self._on_doubt,
            history=self._row_history,
            left_out=self.counts.left_out,
        )

    def _restarted(self, epoch: str) -> None:
        """Positions of before mean nothing any more: the changelog was emptied as well."""
        course = self._course
        self._history.begin(epoch)
        course.edition += 1
        course.head = course.target = self._handed = self._changelog.head
        self._gone = ()
        self._visibility.clear()
        self._row_history.clear()
        # A snapshot of before takes ids that are used anew for seen.
        for subscription in self._fresh:
            subscription.barrier = None
        self._fresh.clear()
        self._identities.forget(course.head.lsn)
        for connection in list(self._connections.values()):
            connection.epoch = epoch
            connection.cursor = course.head
            connection.note_parts(course.head, NO_PARTS)
            connection.known = None
            if connection.state is State.HELD and connection.is_resumable:
                connection.gap = connection.gap or "unknown"
            elif connection.subscriptions or connection.state is State.PAUSED:
                self._gaps.tell(connection, Announcement(None, "unknown", course.head))
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
            client_id,
            sink,
            address=address,
            epoch=self._history.epoch,
            cursor=self._course.head,
            now=now,
        )
        connection.asked = (last_event_id, position)
        self._connections[client_id] = connection
        if len(self._connections) > self._limits.max_connections:
            # Any status but 200 is final to an EventSource: accept, wait, end (see the tick).
            log.warning("connection.refused", limit=self._limits.max_connections)
        elif self._stream_is_up and not self._is_closing:
            self._connect(connection)
        return connection

    def _connect(self, connection: Connection) -> None:
        connection.state = State.HELD
        connection.cursor, connection.epoch = self._course.head, self._history.epoch
        self._history.place(connection, self._course.head, self._changelog.floor)
        now = self._clock()
        connection.connected_at = connection.active_at = connection.written_at = now
        connection.say(connect_tail(connection.id), None)

    def close(self, connection: Connection, reason: str = "client") -> None:
        """Forget a connection whose client has gone, or that was ended. Idempotent."""
        connection.mark_ended()
        self._identities.remove(connection)
        self._replays.stop(connection)
        for subscription in connection.subscriptions.values():
            self._course.meaning.take(subscription)
            self._fresh.pop(subscription, None)
        connection.subscriptions = {}
        if self._connections.pop(connection.id, None) is not None:
            self.counts.closed[reason] += 1
            self.counts.events_of_closed += connection.events
            log.debug("connection.closed", connection=connection.id, events=connection.events)

    def _drop(self, connection: Connection) -> None:
        log.warning("connection.dropped", connection=connection.id, reason="stalled")
        connection.sink.abort()
        self._budget.forget(connection)
        self.close(connection, "stalled")

    def _doom(self, connection: Connection, reason: str) -> None:
        """End the connection, as soon as its client can bear that."""
        connection.doom = reason
        if self._ends.is_settled(connection, self._clock()):
            self._end(connection, reason)

    def _lose(self, connection: Connection, reason: str, at: Cursor) -> None:
        """End a connection whose caller isn't known any more, and let it hear nothing till then.

        Args:
            connection: Which one.
            reason: Why it is ended.
            at: What it was handed, if it is LIVE. It may go on from there when it is back.
        """
        if connection.is_live:
            connection.cursor = at
        connection.is_live = False
        connection.state = State.LOST
        self._doom(connection, reason)

    async def watch_limits(self) -> None:
        """Apply the time limits, send heartbeats, let go of what has become visible; for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ends.watch(), name="limits")
            group.create_task(self._visibility.watch(), name="visibility")
            group.create_task(self._row_history.watch(), name="row history")

    async def shutdown(self, grace: float) -> None:
        """End every connection in small groups, never taking longer than ``grace`` seconds."""
        self._is_closing = True
        await self._ends.shutdown(grace)

    def _end(self, connection: Connection, reason: str) -> None:
        if connection.is_ended:
            return
        log.debug("connection.ended", connection=connection.id, reason=reason)
        try:
            self.close(connection, reason)  # first: the sink may say at once that its client went
        finally:
            connection.sink.end()

    @contextmanager
    def _ending_if_it_fails(self, connection: Connection) -> Iterator[None]:
        """End one connection for what fails on its account; the others go on.

        Its client comes back, and loads anew or goes on from its position: silence would be a gap.
        """
        try:
            yield
        except SubscriptionLimitError as error:
            # By another caller or configuration its topics are too many: no call can be refused.
            log.info("connection.refused", connection=connection.id, limit=error.limit)
            self._end(connection, "limit")
        except Exception as error:  # noqa: BLE001 (a fault of ours, or a value nobody thought of)
            self._give_up(connection, error)

    def _give_up(self, connection: Connection, error: Exception) -> None:
        log.error(
            "connection.failed",
            connection=connection.id,
            error=type(error).__name__,
            at=where(error),
        )
        connection.is_live = False
        try:
            self._end(connection, "failed")
        except Exception as another:  # noqa: BLE001 (as above)
            name = type(another).__name__
            log.error("connection.failed", connection=connection.id, error=name)  # noqa: TRY400 (see where)

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
            SubscriptionLimitError: There are too many topics of a kind; nor was anything then.
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
            except SubscriptionLimitError as error:
                self.counts.filters_refused += 1
                log.info("subscription.refused", connection=connection.id, limit=error.limit)
                raise
            except SubscriptionError as error:
                if error.error_code == "stream_away" and connection.answered_at is None:
                    connection.answered_at = self._clock()
                    connection.doom = "stream_away"
                raise
            if connection.answered_at is None:
                connection.answered_at = self._clock()

    def mute_topics(self, client_id: str) -> frozenset[str]:
        """Return the topics of a connection that nothing can match for its caller now."""
        connection = self._connections.get(client_id.partition(".")[0])
        if connection is None:
            return frozenset()
        return frozenset(
            name
            for name, one in connection.subscriptions.items()
            if one.group is None and not one.topic.collection.startswith("PB_")
        )

    async def _replace(self, connection: Connection, names: list[str], caller: Caller) -> None:
        if not self._stream_is_up:
            raise SubscriptionError("the stream is away", code="stream_away")
        is_first = connection.state in (State.CONNECTING, State.HELD)
        if connection.is_live:
            connection.cursor = self._course.head
        connection.is_live = False
        self._replays.hold(connection)
        if not is_first and not connection.is_lost():
            connection.state = State.PAUSED
        try:
            topics = await self._course.meaning.read(names, caller, self._calls, connection.network)
            barrier = await self._barrier_for(connection, names, is_first=is_first)
            if connection.is_ended:
                raise SubscriptionError("unknown client id", code="client_unknown")
            await self._install(connection, topics, caller, barrier)
            if connection.is_lost():
                connection.state = State.PAUSED  # it has said anew who it is
        finally:
            if not connection.is_lost():
                self._resume(connection)

    def _resume(self, connection: Connection) -> None:
        """Let a connection hear of what came while a call was at work."""
        if connection.subscriptions and not connection.is_ended:
            connection.state = State.REPLAY
            self._replays.start(connection)
        elif connection.state is State.PAUSED:
            connection.state = State.HELD
            connection.cursor = self._course.head

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
            connection.cursor = self._course.head
        return await self._visibility.barrier(connection.cursor)

    async def _install(
        self,
        connection: Connection,
        topics: Mapping[str, Topic],
        caller: Caller,
        barrier: Barrier | None,
    ) -> None:
        """Put the topics in place of those that there are, or leave these if that fails.

        Others use the event loop in between. Meanwhile the connection isn't LIVE and its cursor
        stays, so nothing that comes is handed to some of its topics only. If other collections came
        into force meanwhile, or another history began, all is done anew.

        Raises:
            SubscriptionError: As ``subscribe`` says.
            SubscriptionLimitError: Likewise.
        """
        before = connection.subscriptions
        known = None if caller.reading is None else barrier_of(*caller.reading)
        try:
            while True:
                epoch, now = connection.epoch, self._caller_now(connection, caller, known)
                exchange = self._exchange(connection, before, topics, now, barrier)
                if await self._in_turns(connection, exchange):
                    break
                if connection.epoch != epoch:
                    # A snapshot of before takes ids that are used anew for seen.
                    barrier = None
                    for subscription in before.values():
                        subscription.barrier = None
        except asyncio.CancelledError:
            deque(self._restore(connection, before), maxlen=0)
            raise
        except Exception:
            await self._put_back(connection, before)
            raise
        connection.known = known
        self._identities.become(connection, now)
        connection.wants_resync = RESYNC_TOPIC in topics
        connection.wants_cursor = CURSOR_TOPIC in topics
        if connection.wants_cursor and not connection.is_resumable:
            connection.is_resumable = True
            connection.position = connection.position_text(connection.cursor)
        if topics:
            self.counts.note_call(connection)
            connection.resumes = False

    def _caller_now(self, connection: Connection, caller: Caller, known: Barrier | None) -> Caller:
        """Return the caller as of the connection's cursor and the configuration in force.

        Both may have changed since the caller was recognised.

        Raises:
            SubscriptionError: ``stream_away``: nobody knows any more.
        """
        try:
            caller = self._identities.caught_up(caller, known, connection.cursor)
        except LookupError as error:
            raise SubscriptionError("the caller's row may have changed", code="stream_away") from (
                error
            )
        return replace(self._reconsider(caller), reading=None)

    async def _in_turns(self, connection: Connection, steps: Generator[None]) -> bool:
        """Take steps for a call, the loop's other users having their turn in between.

        Few steps are taken at once; of long work one call's at a time is done.

        Returns:
            Whether all were taken; False if other collections have come into force meanwhile, or
            another history has begun.

        Raises:
            SubscriptionError: ``client_unknown``: the connection has ended meanwhile.
        """
        edition = self._course.edition
        with closing(steps):
            if not any(True for _ in islice(steps, _STEPS_AT_ONCE - 1, _STEPS_AT_ONCE)):
                return True
            is_done = False
            while not is_done:
                async with self._calls.work(connection.network) as turn:
                    if not connection.is_ended and self._course.edition == edition:
                        is_done = not any(turn.is_over() for _ in steps)
                if connection.is_ended:
                    raise SubscriptionError("unknown client id", code="client_unknown")
                if self._course.edition != edition:
                    return False
            return True

    async def _put_back(self, connection: Connection, before: Mapping[str, Subscription]) -> None:
        """Let a connection have the subscriptions that it had before a call that is refused."""
        try:
            while not await self._in_turns(connection, self._restore(connection, before)):
                pass
        except asyncio.CancelledError:
            deque(self._restore(connection, before), maxlen=0)
            raise

    def _exchange(
        self,
        connection: Connection,
        before: Mapping[str, Subscription],
        topics: Mapping[str, Topic],
        caller: Caller,
        barrier: Barrier | None,
    ) -> Generator[None]:
        """Put subscriptions to the topics in place of those that there are, step by step.

        Args:
            connection: Whose they are.
            before: Those that it had before the call; what they must still hear goes on.
            topics: What it wants to hear of.
            caller: Who calls.
            barrier: What the others must still hear although they joined late.

        Raises:
            SubscriptionLimitError: There are too many of a kind. Some may be there then.
        """
        yield from self._withdraw_all(connection)
        mute: defaultdict[str, list[str]] = defaultdict(list)
        for name, topic in topics.items():
            subscription = Subscription(connection, topic, View(), "")
            kept = before.get(name)
            subscription.barrier = kept.barrier if kept else barrier
            if subscription.barrier is not None:
                self._fresh[subscription] = None
            # Among the connection's before it is given anything: a refusal takes all of it back.
            connection.subscriptions[name] = subscription
            reason = self._course.meaning.give(subscription, caller)
            if reason:
                mute[reason].append(name)
            yield
        self._report_mute(connection, mute)

    def _withdraw_all(self, connection: Connection) -> Generator[None]:
        """Take all of a connection's subscriptions out of their groups, step by step."""
        meaning = self._course.meaning
        subscriptions = iter(connection.subscriptions.values())
        connection.subscriptions = {}
        try:
            for subscription in subscriptions:
                self._withdraw(subscription, meaning)
                yield
        finally:
            # It has ended, or other collections have come into force: all at once.
            for subscription in subscriptions:
                self._withdraw(subscription, meaning)

    def _withdraw(self, subscription: Subscription, meaning: Meaning) -> None:
        meaning.take(subscription)
        self._fresh.pop(subscription, None)

    def _restore(
        self, connection: Connection, before: Mapping[str, Subscription]
    ) -> Generator[None]:
        """Do what ``_put_back`` does, step by step."""
        if connection.is_ended:
            return
        yield from self._withdraw_all(connection)
        with self._ending_if_it_fails(connection):
            for name, subscription in before.items():
                connection.subscriptions[name] = subscription
                if subscription.group is None:
                    self._course.meaning.give(subscription, connection.caller)
                if subscription.barrier is not None:
                    self._fresh[subscription] = None
                yield

    def _report_mute(self, connection: Connection, mute: Mapping[str, Sequence[str]]) -> None:
        for reason, topics in mute.items():
            log.info(
                "subscription.mute",
                connection=connection.id,
                reason=reason,
                topics=len(topics),
                # Of the first, and without its options: they may hold a token.
                topic=topics[0].partition("?")[0][:_TOLD],
            )

    # --- reading the changelog --------------------------------------------------------------

    async def run(self) -> None:
        """Hand the changelog to the LIVE connections, for ever."""
        while True:
            await self._appended.wait()
            self._appended.clear()
            while self._is_behind():
                await self._dispatch()

    def _is_behind(self) -> bool:
        """Whether there is more; if that can't be said, ``_dispatch`` finds out."""
        try:
            return self._course.head < self._changelog.head
        except Exception:  # noqa: BLE001 (see _dispatch)
            return True

    async def _dispatch(self) -> None:
        """Hand out some of what there is.

        What fails on nobody's account alone each connection reads by itself.
        """
        edition = self._course.edition
        try:
            await self._hand_out_entries()
        except Exception as error:  # noqa: BLE001 (one row, rule or client may not end all)
            log.error("dispatch.failed", error=type(error).__name__, at=where(error))  # noqa: TRY400 (see where)
            if self._course.edition == edition:
                # What lies beyond may not be visible yet, or of another schema.
                self._leave_to_each(self._known_upto or self._changelog.head)
            self._course.is_deciding = False
        finally:
            self._known_upto = None

    def _leave_to_each(self, upto: Cursor) -> None:
        """Let every connection read on by itself from where all were handed things.

        What fails for one of them there ends that one, and nobody else.
        """
        self._course.head = max(self._course.head, self._handed)
        for connection in [one for one in self._connections.values() if one.is_live]:
            with self._ending_if_it_fails(connection):
                self._leave_behind(connection)
        self._turn_gone()
        # What was to be told of people may not have been.
        self._identities.forget(upto.lsn)
        self._course.head = self._course.target = upto
        self._let_go()

    def _turn_gone(self) -> None:
        """Make guests of those whose rows were deleted by what is handed out already."""
        for event in self._gone:
            for connection in list(self._identities.concerned(event)):
                if connection.cursor >= event.cursor:
                    self._turn_or_end(connection, event)
        self._gone = ()

    async def _hand_out_entries(self) -> None:
        course = self._course
        entries = self._changelog.read(course.head, self._changelog.head, WIDE)
        self._visibility.told(entries)
        edition, meaning = course.edition, course.meaning
        entries = await self._known(entries)
        if course.edition != edition:
            return
        if entries:
            self._known_upto = Cursor(entries[-1].end_lsn, END)
        turns, fits = self._identities.turns, meaning.shapes.fits
        for part in slices(entries, course.head, meaning.collections, turns, WIDE, fits=fits):
            course.target, course.is_deciding = part.upto, True
            self._begin(part)
            verdict = await self._judge(part)
            beside = await self._look_beside(part, verdict)
            if causes := causes_of(part.gap, part.events, verdict, meaning.subscriptions):
                await self._visibility.seen(causes)
            if not await self._hand_out(part, verdict, beside, edition):
                return
            self._turn_live(part.people, "delete")
            self._advance(part)
            self._gone = ()
            # Others of this loop get their turn: the reader, replays, HTTP.
            await asyncio.sleep(0)
            if course.edition != edition:
                return  # the rest was cut for other collections, or is of another history

    async def _judge(self, part: Slice) -> Verdict:
        """Judge a slice, and go on without those whose filters take too long, or might."""
        meaning = self._course.meaning
        if meaning.matcher.trials.has_untried:
            self._let_read_alone(self._isolated.untried(part.events), ())
        verdict = await meaning.judge.judge_in_turns(part.events)
        if verdict.late or verdict.dear:
            self._let_read_alone(_connections_of(verdict.late), _connections_of(verdict.dear))
        return verdict

    async def _hand_out(self, part: Slice, verdict: Verdict, beside: Beside, edition: int) -> bool:
        """Hand out a judged slice, in portions, unless another history has begun since an edition.

        Returns:
            Whether all of it was handed out.
        """
        course, events = self._course, part.events
        composer = Composer(
            course.meaning.display,
            events,
            verdict.hits,
            beside,
            send_buffer=self._limits.send_buffer,
        )
        for places in portions(events, verdict.hits):
            stop = places.start
            while stop < places.stop or not places:
                portion = await composer.portion(range(stop, places.stop))
                if portion.failed:  # to somebody; readers see those before a gap is told
                    await self._visibility.seen(events[place].xid for place in portion.failed)
                if course.edition != edition:
                    return False
                if portion.late:
                    self._let_read_alone(portion.late, portion.dear)
                stop = self._deliver(part, verdict, portion, start=stop)
                if stop == len(events):
                    break
                course.head = events[stop - 1].cursor
                await asyncio.sleep(0)
        return True

    async def _look_beside(self, part: Slice, verdict: Verdict) -> Beside:
        """Find out what is shown beside the rows, and go on without those who can't be served so.

        These are who waits for a slow expansion, and whose caller the database knows as another.
        """
        judge = self._course.meaning.judge
        if not judge.has_more_to_show(part.events, verdict):
            return NOTHING_BESIDE
        check = self._check_of(part, verdict)
        beside = await judge.look_beside(
            part.events,
            verdict,
            sights_of_audiences,
            check,
            is_shared=not self._ends_callers(part),
        )
        late = _viewing(verdict.hits, beside.late)
        self._let_read_alone(late, late)
        for connection in check.outdated:
            if connection.is_live:
                self._leave_behind(connection)
        return beside

    def _check_of(self, part: Slice, verdict: Verdict) -> CallerCheck:
        """Return what finds the LIVE connections whose callers are others by now."""

        def connections(viewers: Sized[Viewer], groups: Sized[Group]) -> Iterable[Connection]:
            found = {*_viewing(verdict.hits, viewers), *_connections_of(groups)}
            return (one for one in found if one.is_live)

        return CallerCheck(
            self._identities,
            self._course.meaning,
            self._row_history,
            events=part.events,
            connections=connections,
        )

    async def _known(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return the first of the entries, which readers see if they have to.

        It is those whose rows are what the catalogue says. If that is none, the catalogue is read:
        at the first that it doesn't fit, before anything is made of it.
        """
        edition, meaning = self._course.edition, self._course.meaning
        shapes, definitions = meaning.shapes, meaning.definitions
        if self._gate:
            await self._visibility.wait_for(entries)
            if self._course.edition != edition:
                return entries
        is_so = await self._is_borne_out(entries)
        if self._course.edition != edition:
            return entries
        for place, entry in enumerate(entries):
            if not isinstance(entry, Transaction):
                continue
            is_stale = not is_so and definitions.behind([entry]) is not None
            if is_stale or shapes.is_doubtful(entry):
                if place:
                    return entries[:place]
                # The rows may have been committed together with what altered their table.
                await self._visibility.seen([entry.xid])
                is_read = False
                if self._read_schema is not None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_SCHEMA_SECONDS):
                            is_read = await self._read_schema()
                shapes.settle(entry, is_read=is_read, is_stale=is_stale)
                return entries[:1]
        return entries

    async def _is_borne_out(self, entries: Sequence[Entry]) -> bool:
        """Whether tables are still what is believed of them, where the stream doesn't say.

        Nothing is handed out before that is known, or another schema is in force.
        """
        edition = self._course.edition
        belief = self._course.meaning.definitions.behind(entries)
        while belief is not None and self._course.edition == edition:
            try:
                return await self._probe.bears_out(belief)
            except Exception as error:  # noqa: BLE001 (as above)
                reason = error.message if isinstance(error, PgRealtimeError) else repr(type(error))
                log.warning("definitions.unknown", error=reason)
                await asyncio.sleep(_AGAIN_SECONDS)
        return True

    def _let_read_alone(self, late: Iterable[Connection], dear: Iterable[Connection]) -> None:
        """Go on without connections that keep others waiting; some of them are to blame for it."""
        for connection in dear:
            self._isolated.isolate_slow(connection)
        for connection in late:
            self._isolated.isolate(connection)
            if connection.is_live:
                self._leave_behind(connection)

    def _begin(self, part: Slice) -> None:
        """Take note of what the slice tells of people and tables, before it is judged."""
        if any(len(event.row) > len(event.collection.column_names) for event in part.events):
            self._on_doubt()  # a column is new; one that is gone is missed where rows are judged
        for event in part.people:
            self._identities.tell(event)
        self._turn_live(part.people, "update")
        gap = part.gap
        # The others are logged where they arise.
        if gap is not None and gap.xid is not None and gap.reason in {"truncate", "schema"}:
            log.warning(
                "replication.gap", reason=gap.reason, collections=sorted(gap.collections or ())
            )
        if gap is not None and any(
            collection.type == "auth" and gap.concerns(name)
            for name, collection in self._course.meaning.collections.items()
        ):
            self._identities.forget(gap.at.lsn)

    def _ends_callers(self, part: Slice) -> bool:
        """Whether rows of connected people are deleted.

        They are shown their own deletion as who they were. Who reads it alone is told a gap
        instead, since the stream has told that they are nobody by now.
        """
        deleted = (event for event in part.people if event.action == "delete")
        return any(one.is_live for event in deleted for one in self._identities.concerned(event))

    def _turn_live(self, people: Sequence[Event], action: Action) -> None:
        for event in people:
            if event.action == action:
                for connection in [c for c in self._identities.concerned(event) if c.is_live]:
                    self._turn_or_end(connection, event)

    def _turn_or_end(self, connection: Connection, event: Event) -> None:
        with self._ending_if_it_fails(connection):
            self._turn(connection, event)

    def _turn(self, connection: Connection, event: Event) -> None:
        """Make the connection's caller what the event makes of it; the client isn't told."""
        caller = self._identities.caller_after(event, connection.caller, connection.known)
        if caller is connection.caller:
            return
        self._identities.become(connection, caller)
        for subscription in connection.subscriptions.values():
            self._course.meaning.take(subscription)
            self._course.meaning.give(subscription, caller)
        at = event.cursor if event.action == "delete" else self._course.head
        if caller.is_lost:
            self._lose(connection, "caller_lost", at)
        else:
            self._mind_guest(connection, at)

    def _mind_guest(self, connection: Connection, at: Cursor) -> None:
        """End a connection that has become a guest's where there shall be none: it is told so.

        Args:
            connection: Which one.
            at: What it was handed, if it is LIVE.
        """
        if not self._identities.is_welcome(connection):
            self._lose(connection, "guest", at)

    def _advance(self, part: Slice) -> None:
        self._course.head = part.upto
        self._let_go()

    def _let_go(self) -> None:
        """On with whoever waited for a head that moved, and for nothing being judged."""
        self._course.is_deciding = False
        self.progressed.set()
        while self._waiting:
            self._waiting.popleft()()
        if self._fresh:
            self._clear_barriers()
        self._replays.join_waiting()

    def _clear_barriers(self) -> None:
        for subscription in list(self._fresh):
            barrier = subscription.barrier
            is_over = barrier is None or self._course.head.lsn > barrier.insert_lsn
            if is_over and subscription.connection.is_live:
                # The caller was looked up before: everything that comes is news about it too.
                subscription.barrier = subscription.connection.known = None
                del self._fresh[subscription]

    def _deliver(self, part: Slice, verdict: Verdict, portion: Portion, *, start: int) -> int:
        """Hand out a portion of a slice, which begins at a place.

        With the last one goes the slice's gap, and with each what nobody could be asked about of
        its events: who breaks off later comes back from behind it. Returns the place of the first
        event left over.
        """
        touched = hand_out(portion, part.events)
        stop = portion.stop
        is_last = stop == len(part.events)
        upto = part.upto if is_last else part.events[stop - 1].cursor
        gap = part.gap if is_last else None
        unheard = verdict.unheard_in(part.events, range(start, stop), portion.failed)
        self._flush(touched, part.events, unheard)
        if stop:
            self._handed = part.events[stop - 1].cursor
        if is_last:
            self._gone = [event for event in part.people if event.action == "delete"]
        if gap is not None or unheard is not None:
            touched = [c for c in self._connections.values() if c.is_live]
            for connection in touched:
                with self._ending_if_it_fails(connection):
                    self._gaps.tell_all(connection, gap, unheard, upto)
        self._say_cursors(touched, upto)
        return stop

    def _say_cursors(self, connections: Sequence[Connection], at: Cursor) -> None:
        for connection in connections:
            if connection.wants_cursor and connection.is_live:
                with self._ending_if_it_fails(connection):
                    connection.say_cursor(at)

    def _flush(
        self, touched: Sequence[Connection], events: Sequence[Event], unheard: Unheard | None
    ) -> None:
        now = self._clock()
        limit = self._budget.limit()
        for connection in touched:
            try:
                size, buffered = connection.taken(), connection.sink.buffered()
                is_larger = buffered + size > limit
                if not size or (is_larger and not self._may_exceed(connection, size, buffered)):
                    self._leave_behind(connection)
                    continue
                hold = self._gaps.held_at(connection, unheard)
                connection.write(connection.compose(events, hold))
                connection.active_at = connection.written_at = now
                if buffered + size >= self._budget.counted:
                    self._budget.note(connection)
                    limit = self._budget.limit()
            except Exception as error:  # noqa: BLE001 (see _ending_if_it_fails; that is slower)
                self._give_up(connection, error)

    def _may_exceed(self, connection: Connection, size: int, buffered: int) -> bool:
        """Whether it may be sent more than its limit: one message, when nothing else waits."""
        return not buffered and connection.is_one_message() and self._budget.admits(size)

    def _leave_behind(self, connection: Connection) -> None:
        """Let it read on from the changelog, at its own pace, from before this portion."""
        connection.discard()
        connection.is_live = False
        connection.state = State.REPLAY
        connection.cursor = self._course.head
        self._replays.start(connection)


def _connections_of(groups: Iterable[Group]) -> dict[Connection, None]:
    members = (one for group in groups for audience in group.audiences for one in audience)
    return {one.connection: None for one in members}


def _viewing(hits: Iterable[Iterable[Group]], viewers: Sized[Viewer]) -> set[Connection]:
    """Return whose subscriptions among those hit have one of the viewers."""
    if not viewers:
        return set()
    audiences = {
        audience
        for group in {group for groups in hits for group in groups}
        for audience in group.audiences
        if audience.receives[2] in viewers
    }
    return {one.connection for audience in audiences for one in audience}


def _unchanged(caller: Caller) -> Caller:
    return caller
