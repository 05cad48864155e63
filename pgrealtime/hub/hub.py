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

from pgrealtime.auth.principal import GUEST, Caller, is_same_principal
from pgrealtime.changelog.base import Changelog, Entry
from pgrealtime.changelog.row_history import RowHistory, WaitForLSN
from pgrealtime.changes import Action, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.model import CollectionLoginConfig, HiddenFieldsMode, RealtimeConfig
from pgrealtime.errors import PgRealtimeError, SubscriptionError, SubscriptionLimitError
from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.fairness import FairLock
from pgrealtime.hub.catchup.tasks import MAX_CONCURRENT_CATCH_UPS, CatchUpTasks
from pgrealtime.hub.connections.connection import (
    CURSOR_TOPIC,
    NO_MESSAGE_KEYS,
    RESYNC_TOPIC,
    Connection,
    ConnectionState,
    Group,
    ResponseWriter,
    Subscription,
)
from pgrealtime.hub.connections.send_budget import SendBudget
from pgrealtime.hub.delivery.compose import ComposedMessages, MessageComposer, enqueue_messages
from pgrealtime.hub.delivery.render import NO_ENRICHMENT, Enrichment, needs_of_groups
from pgrealtime.hub.evaluation.evaluator import HubQueries, raise_location
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.evaluation.slice_result import EvaluationGap, SliceResult, gap_xids
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.slices import (
    LIVE_SLICE_CHANGES,
    GapNotice,
    Slice,
    delivery_ranges,
    split_into_slices,
)
from pgrealtime.hub.state.caller_check import CallerCheck
from pgrealtime.hub.state.callers import CallerTracker
from pgrealtime.hub.state.epochs import ResumableEpochs
from pgrealtime.hub.state.gaps import GapNotifier
from pgrealtime.hub.state.generation import Generation
from pgrealtime.hub.state.isolation import IsolatedConnections
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.timeouts import ConnectionTimeouts
from pgrealtime.hub.state.totals import HubCounters
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor
from pgrealtime.protocol.frame import connect_tail
from pgrealtime.protocol.topic import Topic
from pgrealtime.records.encode import View
from pgrealtime.snapshot import ReadPoint, parse_read_point

log = structlog.get_logger(__name__)

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 40
_NO_LOGINS: Mapping[str, CollectionLoginConfig] = MappingProxyType({})
_START = Cursor(LSN(0), 0)
_SCHEMA_TIMEOUT_SECONDS = 5.0
"""How long events are held back until the schema was read; as long as they wait to be visible."""
_CATALOG_RETRY_SECONDS = 1.0
"""Between two questions about the catalogue that have no answer."""
_STEPS_PER_CHUNK = 50
"""Topics of a call that are taken or given at once; each takes 5 to 30 us."""
_LOGGED_TOPIC_CHARACTERS = 200
"""Characters of a topic that are logged."""


class Hub:
    """Connections on one side, the changelog on the other.

    Args:
        changelog: What the relay fills.
        logins: How people log in, by collection name.
        nulls: How NULL is shown.
        hidden_fields: Who may expand a hidden relation.
        epoch: Of the stream's positions; changes with ``restarted``.
        allows_guests: Whether a connection that has become a guest's keeps its topics, or ends.
        max_concurrent_catch_ups: Connections that are served from the changelog at the same moment;
            what they ask of the database must leave some of it to the others.
        on_schema_mismatch: Told when a row doesn't fit what the catalogue says of its table.
        wait_for_changelog: Waits until the changelog has what was committed by now.
        read_schema: Returns once the schema of now, or of later, is in force; False if it couldn't
            be read.
    """

    def __init__(
        self,
        changelog: Changelog,
        matcher: Matcher,
        executor: HubQueries,
        *,
        collections: Collections,
        limits: RealtimeConfig,
        logins: Mapping[str, CollectionLoginConfig] = _NO_LOGINS,
        nulls: Literal["null", "zero"] = "null",
        hidden_fields: HiddenFieldsMode = "strict",
        epoch: str = "000000",
        can_resume: bool = True,
        allows_guests: bool = True,
        max_concurrent_catch_ups: int = MAX_CONCURRENT_CATCH_UPS,
        on_schema_mismatch: Callable[[], None] | None = None,
        wait_for_changelog: WaitForLSN | None = None,
        read_schema: Callable[[], Awaitable[bool]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changelog = changelog
        self._executor = executor
        self._limits = limits
        self._nulls: Literal["null", "zero"] = nulls
        self._hidden_fields: HiddenFieldsMode = hidden_fields
        self._on_schema_mismatch = on_schema_mismatch or (lambda: None)
        self._read_schema = read_schema
        self._clock = clock
        self._row_history = RowHistory(changelog, wait_for_changelog)
        self.counters = HubCounters()
        meaning = self._make_generation(collections, matcher)
        self._progress = DispatchProgress(changelog.head, changelog.head, meaning)
        self._epochs = ResumableEpochs(epoch, can_resume=can_resume)
        self._visibility = VisibilityTracker(
            executor.fetch_snapshot, lambda: self._progress.revision, clock
        )
        self._connections: dict[str, Connection] = {}
        self._timeouts = ConnectionTimeouts(
            self._connections,
            limits,
            head=lambda: self._progress.head,
            close=self._close_connection,
            abort=self._abort_connection,
            clock=clock,
        )
        self._callers = CallerTracker(logins, allows_guests=allows_guests)
        self._isolated = IsolatedConnections(self._progress, clock)
        self._gap_notifier = GapNotifier(
            self._progress,
            request_close=self._request_close,
            invalidate_caller=self._invalidate_caller,
            clock=clock,
        )
        self._send_budget = SendBudget(
            per_connection_bytes=limits.send_buffer, total_bytes=limits.send_buffers, clock=clock
        )
        self._catch_up = CatchUpTasks(
            changelog,
            self._progress,
            self._callers,
            self._isolated,
            self._gap_notifier,
            row_history=self._row_history,
            max_concurrent=max_concurrent_catch_ups,
            send_budget=self._send_budget,
            stall_timeout=limits.stall_timeout,
            apply_caller_change=self._apply_caller_change_or_close,
            wait_until_visible=self._visibility.wait_until_visible,
            close=self._close_connection,
            abort=self._abort_connection,
            clock=clock,
        )
        self._is_stream_up = False
        self._is_closing = False
        self._waits_for_visibility = False
        self._deferred_callbacks: deque[Callable[[], None]] = deque()
        self._revalidate_caller: Callable[[Caller], Caller] = _unchanged
        self._subscribe_lock = FairLock()
        """Subscribe calls whose topics are read."""
        self._subscriptions_with_read_point: dict[Subscription, None] = {}
        """Those that have a barrier."""
        self._delivered_upto = changelog.head
        """Where the last portion ended that was handed out."""
        self._checked_upto: Cursor | None = None
        """Where the entries end that ``_known`` let pass in the dispatch under way."""
        self._account_deletions: Sequence[Event] = ()
        """The people whose rows that one deleted, until their connections were told."""
        self._changelog_appended = asyncio.Event()
        self.progressed = asyncio.Event()
        """Set whenever the head moved; whoever waits for that clears it first."""

    # --- what the relay and the supervisor say --------------------------------------------

    @property
    def head(self) -> Cursor:
        """Everything up to here was handed to the connections that are LIVE."""
        return self._progress.head

    @property
    def connections(self) -> Sized[Connection]:
        """The open connections."""
        return self._connections.values()

    @property
    def is_closing(self) -> bool:
        """Whether no connection is taken any more."""
        return self._is_closing

    @property
    def subscription_counts(self) -> Mapping[str, int]:
        """How many there are that something can match, by collection."""
        return self._progress.generation.subscription_counts

    @property
    def gaps_notified(self) -> Mapping[str, int]:
        """How often a connection was told of a gap, or ended for it, by the gap's reason."""
        return self._gap_notifier.notified

    @property
    def is_stream_up(self) -> bool:
        """Whether the stream from the database is being read."""
        return self._is_stream_up

    def wake(self) -> None:
        """The changelog has more."""
        self._changelog_appended.set()

    def stream_started(self, epoch: str) -> None:
        """The stream is being read: connections that waited for it get their PB_CONNECT."""
        if epoch != self._epochs.epoch:
            self._start_epoch(epoch)
        self._is_stream_up = True
        if self._is_closing:
            return
        for connection in list(self._connections.values())[: self._limits.max_connections]:
            if connection.state is ConnectionState.CONNECTING:
                self._connect(connection)

    def stream_lost(self) -> None:
        """The stream is away: PB_CONNECT is held back and subscribe calls are refused."""
        self._is_stream_up = False

    def set_waits_for_visibility(self, *, waits: bool) -> None:
        """Whether events wait until their transactions are visible to readers."""
        self._waits_for_visibility = waits

    def stream_continued(self, epoch: str) -> None:
        """Another stream goes on where the last one left off: nothing was missed or repeated."""
        self._epochs.continue_epoch(epoch, self._progress.head)
        for connection in self._connections.values():
            connection.epoch = epoch

    async def replace_generation(
        self,
        collections: Collections,
        matcher: Matcher,
        revalidate_caller: Callable[[Caller], Caller],
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
            revalidate_caller: What a caller who is known already is by the new configuration: the
                same, changed, or a guest.
            logins: How people log in, by collection name.
            allows_guests: Whether guests keep their topics.
        """
        in_force = asyncio.get_running_loop().create_future()

        def take() -> None:
            try:
                self._callers.replace_settings(logins, allows_guests=allows_guests)
                self._apply_generation(collections, matcher, revalidate_caller)
            except Exception as error:  # noqa: BLE001 (told to whoever waits)
                if not in_force.done():
                    in_force.set_exception(error)
            if not in_force.done():
                in_force.set_result(None)

        if self._progress.is_evaluating:
            self._deferred_callbacks.append(take)
        else:
            take()
        await in_force

    def _apply_generation(
        self,
        collections: Collections,
        matcher: Matcher,
        revalidate_caller: Callable[[Caller], Caller],
    ) -> None:
        self._progress.generation, self._revalidate_caller = (
            self._make_generation(collections, matcher),
            revalidate_caller,
        )
        self._progress.revision += 1
        for connection in list(self._connections.values()):
            for subscription in connection.subscriptions.values():
                subscription.group = None  # the other matcher's, which goes with it
            with self._closing_on_error(connection):
                self._callers.set_caller(connection, revalidate_caller(connection.caller))
                for subscription in connection.subscriptions.values():
                    self._progress.generation.bind_subscription(subscription, connection.caller)
                self._close_if_guest(connection, self._progress.head)

    def _make_generation(self, collections: Collections, matcher: Matcher) -> Generation:
        self._row_history.set_streamed_tables(reachable_tables(collections))
        return Generation(
            self._executor,
            collections,
            matcher,
            nulls=self._nulls,
            hidden_fields=self._hidden_fields,
            on_schema_mismatch=self._on_schema_mismatch,
            row_history=self._row_history,
            incomplete_records=self.counters.incomplete_records,
        )

    def _start_epoch(self, epoch: str) -> None:
        """Positions of before mean nothing any more: the changelog was emptied as well."""
        course = self._progress
        self._epochs.start_epoch(epoch)
        course.revision += 1
        course.head = course.evaluation_target = self._delivered_upto = self._changelog.head
        self._account_deletions = ()
        self._visibility.clear()
        self._row_history.clear()
        # A snapshot of before takes ids that are used anew for seen.
        for subscription in self._subscriptions_with_read_point:
            subscription.read_point = None
        self._subscriptions_with_read_point.clear()
        self._callers.forget_changes_upto(course.head.lsn)
        for connection in list(self._connections.values()):
            connection.epoch = epoch
            connection.cursor = course.head
            connection.record_messages_sent(course.head, NO_MESSAGE_KEYS)
            connection.caller_read_point = None
            if connection.state is ConnectionState.UNSUBSCRIBED and connection.is_resumable:
                connection.pending_gap_reason = connection.pending_gap_reason or "unknown"
            elif connection.subscriptions or connection.state is ConnectionState.SUBSCRIBING:
                self._gap_notifier.notify(connection, GapNotice(None, "unknown", course.head))
        self._run_deferred()

    # --- opening and closing --------------------------------------------------------------

    def open_connection(
        self,
        writer: ResponseWriter,
        *,
        address: str,
        last_event_id: str | None,
        position: str | None,
    ) -> Connection:
        """Take a new connection whose head is out.

        Args:
            writer: Where its bytes go.
            address: The client's, which subscribe calls must share.
            last_event_id: The header ``Last-Event-ID``, if any. Without a cursor it is not ours.
            position: The query parameter ``lastEventId``, if any; ``""`` asks for positions
                from now on.
        """
        now = self._clock()
        client_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
        connection = Connection(
            client_id,
            writer,
            address=address,
            epoch=self._epochs.epoch,
            cursor=self._progress.head,
            now=now,
        )
        connection.submitted_positions = (last_event_id, position)
        self._connections[client_id] = connection
        if len(self._connections) > self._limits.max_connections:
            # Any status but 200 is final to an EventSource: accept, wait, end (see the tick).
            log.warning("connection.refused", limit=self._limits.max_connections)
        elif self._is_stream_up and not self._is_closing:
            self._connect(connection)
        return connection

    def _connect(self, connection: Connection) -> None:
        connection.state = ConnectionState.UNSUBSCRIBED
        connection.cursor, connection.epoch = self._progress.head, self._epochs.epoch
        self._epochs.apply_submitted_position(
            connection, self._progress.head, self._changelog.floor
        )
        now = self._clock()
        connection.connected_at = connection.idle_since = connection.last_write_at = now
        connection.write_message(connect_tail(connection.id), None)

    def remove_connection(self, connection: Connection, reason: str = "client") -> None:
        """Forget a connection whose client has gone, or that was ended. Idempotent."""
        connection.mark_closed()
        self._callers.remove(connection)
        self._catch_up.stop(connection)
        for subscription in connection.subscriptions.values():
            self._progress.generation.unbind_subscription(subscription)
            self._subscriptions_with_read_point.pop(subscription, None)
        connection.subscriptions = {}
        if self._connections.pop(connection.id, None) is not None:
            self.counters.closed_connections[reason] += 1
            self.counters.events_sent_to_closed += connection.events_sent
            log.debug("connection.closed", connection=connection.id, events=connection.events_sent)

    def _abort_connection(self, connection: Connection) -> None:
        log.warning("connection.dropped", connection=connection.id, reason="stalled")
        connection.writer.abort()
        self._send_budget.remove(connection)
        self.remove_connection(connection, "stalled")

    def _request_close(self, connection: Connection, reason: str) -> None:
        """End the connection, as soon as its client can bear that."""
        connection.close_reason = reason
        if self._timeouts.may_close(connection, self._clock()):
            self._close_connection(connection, reason)

    def _invalidate_caller(self, connection: Connection, reason: str, upto: Cursor) -> None:
        """End a connection whose caller isn't known any more, and let it hear nothing till then.

        Args:
            connection: Which one.
            reason: Why it is ended.
            upto: What it was handed, if it is LIVE. It may go on from there when it is back.
        """
        if connection.is_live:
            connection.cursor = upto
        connection.is_live = False
        connection.state = ConnectionState.CALLER_INVALID
        self._request_close(connection, reason)

    async def run_timers(self) -> None:
        """Apply the time limits, send heartbeats, let go of what has become visible; for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._timeouts.watch(), name="limits")
            group.create_task(self._visibility.watch(), name="visibility")
            group.create_task(self._row_history.trim_periodically(), name="row history")

    async def shutdown(self, grace_seconds: float) -> None:
        """End every connection in small groups, never taking longer than ``grace`` seconds."""
        self._is_closing = True
        await self._timeouts.shutdown(grace_seconds)

    def _close_connection(self, connection: Connection, reason: str) -> None:
        if connection.is_closed:
            return
        log.debug("connection.ended", connection=connection.id, reason=reason)
        try:
            self.remove_connection(
                connection, reason
            )  # first: the sink may say at once that its client went
        finally:
            connection.writer.close()

    @contextmanager
    def _closing_on_error(self, connection: Connection) -> Iterator[None]:
        """End one connection for what fails on its account; the others go on.

        Its client comes back, and loads anew or goes on from its position: silence would be a gap.
        """
        try:
            yield
        except SubscriptionLimitError as error:
            # By another caller or configuration its topics are too many: no call can be refused.
            log.info("connection.refused", connection=connection.id, limit=error.limit_name)
            self._close_connection(connection, "limit")
        except Exception as error:  # noqa: BLE001 (a fault of ours, or a value nobody thought of)
            self._close_failed(connection, error)

    def _close_failed(self, connection: Connection, error: Exception) -> None:
        log.error(
            "connection.failed",
            connection=connection.id,
            error=type(error).__name__,
            at=raise_location(error),
        )
        connection.is_live = False
        try:
            self._close_connection(connection, "failed")
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
        async with connection.lock:
            if connection.is_closed:
                raise SubscriptionError("unknown client id", code="client_unknown")
            held = connection.caller.principal
            if held != GUEST and not is_same_principal(held, caller.principal):
                raise SubscriptionError("another caller", code="authorization_mismatch")
            try:
                await self._replace_topics(
                    connection, list(dict.fromkeys(filter(None, topics))), caller
                )
            except SubscriptionLimitError as error:
                self.counters.refused_subscribe_calls += 1
                log.info("subscription.refused", connection=connection.id, limit=error.limit_name)
                raise
            except SubscriptionError as error:
                if error.error_code == "stream_away" and connection.first_call_answered_at is None:
                    connection.first_call_answered_at = self._clock()
                    connection.close_reason = "stream_away"
                raise
            if connection.first_call_answered_at is None:
                connection.first_call_answered_at = self._clock()

    def unmatchable_topics(self, client_id: str) -> frozenset[str]:
        """Return the topics of a connection that nothing can match for its caller now."""
        connection = self._connections.get(client_id.partition(".")[0])
        if connection is None:
            return frozenset()
        return frozenset(
            name
            for name, one in connection.subscriptions.items()
            if one.group is None and not one.topic.collection.startswith("PB_")
        )

    async def _replace_topics(
        self, connection: Connection, topic_texts: list[str], caller: Caller
    ) -> None:
        if not self._is_stream_up:
            raise SubscriptionError("the stream is away", code="stream_away")
        is_first = connection.state in (ConnectionState.CONNECTING, ConnectionState.UNSUBSCRIBED)
        if connection.is_live:
            connection.cursor = self._progress.head
        connection.is_live = False
        self._catch_up.prevent_going_live(connection)
        if not is_first and not connection.is_caller_invalid():
            connection.state = ConnectionState.SUBSCRIBING
        try:
            topics = await self._progress.generation.parse_topics(
                topic_texts, caller, self._subscribe_lock, connection.network
            )
            barrier = await self._fetch_read_point(connection, topic_texts, is_first=is_first)
            if connection.is_closed:
                raise SubscriptionError("unknown client id", code="client_unknown")
            await self._install_topics(connection, topics, caller, barrier)
            if connection.is_caller_invalid():
                connection.state = ConnectionState.SUBSCRIBING  # it has said anew who it is
        finally:
            if not connection.is_caller_invalid():
                self._end_call(connection)

    def _end_call(self, connection: Connection) -> None:
        """Let a connection hear of what came while a call was at work."""
        if connection.subscriptions and not connection.is_closed:
            connection.state = ConnectionState.CATCHING_UP
            self._catch_up.start(connection)
        elif connection.state is ConnectionState.SUBSCRIBING:
            connection.state = ConnectionState.UNSUBSCRIBED
            connection.cursor = self._progress.head

    async def _fetch_read_point(
        self, connection: Connection, topic_texts: list[str], *, is_first: bool
    ) -> ReadPoint | None:
        if all(name in connection.subscriptions for name in topic_texts):
            return None
        if is_first and connection.is_resuming:
            if connection.cursor <= self._changelog.head:
                return None
            # Another process may be ahead of us, or have seen it before a restore.
            barrier = await self._visibility.fetch_read_point(_START)
            if connection.cursor.lsn <= barrier.insert_lsn:
                return None
            connection.pending_gap_reason, connection.is_resuming = "unknown", False
        if is_first:
            # It has heard nothing yet, so nothing can come out of order: begin at the head.
            connection.cursor = self._progress.head
        return await self._visibility.fetch_read_point(connection.cursor)

    async def _install_topics(
        self,
        connection: Connection,
        topics: Mapping[str, Topic],
        caller: Caller,
        read_point: ReadPoint | None,
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
        known = None if caller.read_point is None else parse_read_point(*caller.read_point)
        try:
            while True:
                epoch, now = connection.epoch, self._current_caller(connection, caller, known)
                exchange = self._replace_steps(connection, before, topics, now, read_point)
                if await self._run_in_chunks(connection, exchange):
                    break
                if connection.epoch != epoch:
                    # A snapshot of before takes ids that are used anew for seen.
                    read_point = None
                    for subscription in before.values():
                        subscription.read_point = None
        except asyncio.CancelledError:
            deque(self._restore_steps(connection, before), maxlen=0)
            raise
        except Exception:
            await self._restore_subscriptions(connection, before)
            raise
        connection.caller_read_point = known
        self._callers.set_caller(connection, now)
        connection.has_resync_topic = RESYNC_TOPIC in topics
        connection.has_cursor_topic = CURSOR_TOPIC in topics
        if connection.has_cursor_topic and not connection.is_resumable:
            connection.is_resumable = True
            connection.position = connection.encode_position(connection.cursor)
        if topics:
            self.counters.record_resume_outcome(connection)
            connection.is_resuming = False

    def _current_caller(
        self, connection: Connection, caller: Caller, caller_read_point: ReadPoint | None
    ) -> Caller:
        """Return the caller as of the connection's cursor and the configuration in force.

        Both may have changed since the caller was recognised.

        Raises:
            SubscriptionError: ``stream_away``: nobody knows any more.
        """
        try:
            caller = self._callers.caller_at(caller, caller_read_point, connection.cursor)
        except LookupError as error:
            raise SubscriptionError("the caller's row may have changed", code="stream_away") from (
                error
            )
        return replace(self._revalidate_caller(caller), read_point=None)

    async def _run_in_chunks(self, connection: Connection, steps: Generator[None]) -> bool:
        """Take steps for a call, the loop's other users having their turn in between.

        Few steps are taken at once; of long work one call's at a time is done.

        Returns:
            Whether all were taken; False if other collections have come into force meanwhile, or
            another history has begun.

        Raises:
            SubscriptionError: ``client_unknown``: the connection has ended meanwhile.
        """
        edition = self._progress.revision
        with closing(steps):
            if not any(True for _ in islice(steps, _STEPS_PER_CHUNK - 1, _STEPS_PER_CHUNK)):
                return True
            is_done = False
            while not is_done:
                async with self._subscribe_lock.acquire_for_loop_work(connection.network) as turn:
                    if not connection.is_closed and self._progress.revision == edition:
                        is_done = not any(turn.is_due() for _ in steps)
                if connection.is_closed:
                    raise SubscriptionError("unknown client id", code="client_unknown")
                if self._progress.revision != edition:
                    return False
            return True

    async def _restore_subscriptions(
        self, connection: Connection, previous: Mapping[str, Subscription]
    ) -> None:
        """Let a connection have the subscriptions that it had before a call that is refused."""
        try:
            while not await self._run_in_chunks(
                connection, self._restore_steps(connection, previous)
            ):
                pass
        except asyncio.CancelledError:
            deque(self._restore_steps(connection, previous), maxlen=0)
            raise

    def _replace_steps(
        self,
        connection: Connection,
        previous: Mapping[str, Subscription],
        topics: Mapping[str, Topic],
        caller: Caller,
        read_point: ReadPoint | None,
    ) -> Generator[None]:
        """Put subscriptions to the topics in place of those that there are, step by step.

        Args:
            connection: Whose they are.
            previous: Those that it had before the call; what they must still hear goes on.
            topics: What it wants to hear of.
            caller: Who calls.
            read_point: What the others must still hear although they joined late.

        Raises:
            SubscriptionLimitError: There are too many of a kind. Some may be there then.
        """
        yield from self._unbind_steps(connection)
        mute: defaultdict[str, list[str]] = defaultdict(list)
        for name, topic in topics.items():
            subscription = Subscription(connection, topic, View(), "")
            kept = previous.get(name)
            subscription.read_point = kept.read_point if kept else read_point
            if subscription.read_point is not None:
                self._subscriptions_with_read_point[subscription] = None
            # Among the connection's before it is given anything: a refusal takes all of it back.
            connection.subscriptions[name] = subscription
            reason = self._progress.generation.bind_subscription(subscription, caller)
            if reason:
                mute[reason].append(name)
            yield
        self._log_unmatchable(connection, mute)

    def _unbind_steps(self, connection: Connection) -> Generator[None]:
        """Take all of a connection's subscriptions out of their groups, step by step."""
        meaning = self._progress.generation
        subscriptions = iter(connection.subscriptions.values())
        connection.subscriptions = {}
        try:
            for subscription in subscriptions:
                self._unbind(subscription, meaning)
                yield
        finally:
            # It has ended, or other collections have come into force: all at once.
            for subscription in subscriptions:
                self._unbind(subscription, meaning)

    def _unbind(self, subscription: Subscription, generation: Generation) -> None:
        generation.unbind_subscription(subscription)
        self._subscriptions_with_read_point.pop(subscription, None)

    def _restore_steps(
        self, connection: Connection, previous: Mapping[str, Subscription]
    ) -> Generator[None]:
        """Do what ``_restore_subscriptions`` does, step by step."""
        if connection.is_closed:
            return
        yield from self._unbind_steps(connection)
        with self._closing_on_error(connection):
            for name, subscription in previous.items():
                connection.subscriptions[name] = subscription
                if subscription.group is None:
                    self._progress.generation.bind_subscription(subscription, connection.caller)
                if subscription.read_point is not None:
                    self._subscriptions_with_read_point[subscription] = None
                yield

    def _log_unmatchable(
        self, connection: Connection, topics_by_reason: Mapping[str, Sequence[str]]
    ) -> None:
        for reason, topics in topics_by_reason.items():
            log.info(
                "subscription.mute",
                connection=connection.id,
                reason=reason,
                topics=len(topics),
                # Of the first, and without its options: they may hold a token.
                topic=topics[0].partition("?")[0][:_LOGGED_TOPIC_CHARACTERS],
            )

    # --- reading the changelog --------------------------------------------------------------

    async def run(self) -> None:
        """Hand the changelog to the LIVE connections, for ever."""
        while True:
            await self._changelog_appended.wait()
            self._changelog_appended.clear()
            while self._has_undispatched():
                await self._dispatch()

    def _has_undispatched(self) -> bool:
        """Whether there is more; if that can't be said, ``_dispatch`` finds out."""
        try:
            return self._progress.head < self._changelog.head
        except Exception:  # noqa: BLE001 (see _dispatch)
            return True

    async def _dispatch(self) -> None:
        """Hand out some of what there is.

        What fails on nobody's account alone each connection reads by itself.
        """
        edition = self._progress.revision
        try:
            await self._dispatch_entries()
        except Exception as error:  # noqa: BLE001 (one row, rule or client may not end all)
            log.error("dispatch.failed", error=type(error).__name__, at=raise_location(error))  # noqa: TRY400 (see where)
            if self._progress.revision == edition:
                # What lies beyond may not be visible yet, or of another schema.
                self._let_all_fall_behind(self._checked_upto or self._changelog.head)
            self._progress.is_evaluating = False
        finally:
            self._checked_upto = None

    def _let_all_fall_behind(self, upto: Cursor) -> None:
        """Let every connection read on by itself from where all were handed things.

        What fails for one of them there ends that one, and nobody else.
        """
        self._progress.head = max(self._progress.head, self._delivered_upto)
        for connection in [one for one in self._connections.values() if one.is_live]:
            with self._closing_on_error(connection):
                self._fall_behind(connection)
        self._apply_account_deletions()
        # What was to be told of people may not have been.
        self._callers.forget_changes_upto(upto.lsn)
        self._progress.head = self._progress.evaluation_target = upto
        self._run_deferred()

    def _apply_account_deletions(self) -> None:
        """Make guests of those whose rows were deleted by what is handed out already."""
        for event in self._account_deletions:
            for connection in list(self._callers.connections_of(event)):
                if connection.cursor >= event.cursor:
                    self._apply_caller_change_or_close(connection, event)
        self._account_deletions = ()

    async def _dispatch_entries(self) -> None:
        course = self._progress
        entries = self._changelog.read(course.head, self._changelog.head, LIVE_SLICE_CHANGES)
        self._visibility.record_delivered(entries)
        edition, meaning = course.revision, course.generation
        entries = await self._checked_entries(entries)
        if course.revision != edition:
            return
        if entries:
            self._checked_upto = Cursor(entries[-1].end_lsn, END_ORDINAL)
        turns, fits = self._callers.changes_a_caller, meaning.shape_checker.fits
        for part in split_into_slices(
            entries, course.head, meaning.collections, turns, LIVE_SLICE_CHANGES, fits=fits
        ):
            course.evaluation_target, course.is_evaluating = part.end_cursor, True
            self._apply_account_changes(part)
            verdict = await self._evaluate(part)
            beside = await self._enrich(part, verdict)
            if causes := gap_xids(part.gap, part.events, verdict, meaning.subscription_counts):
                await self._visibility.wait_until_visible(causes)
            if not await self._compose_and_deliver(part, verdict, beside, edition):
                return
            self._apply_to_live_callers(part.account_events, "delete")
            self._advance_head(part)
            self._account_deletions = ()
            # Others of this loop get their turn: the reader, replays, HTTP.
            await asyncio.sleep(0)
            if course.revision != edition:
                return  # the rest was cut for other collections, or is of another history

    async def _evaluate(self, slice_: Slice) -> SliceResult:
        """Judge a slice, and go on without those whose filters take too long, or might."""
        meaning = self._progress.generation
        if meaning.matcher.trials.has_untried:
            self._isolate_late(self._isolated.with_untried_filters(slice_.events), ())
        verdict = await meaning.evaluator.evaluate_in_chunks(slice_.events)
        if verdict.over_budget_groups or verdict.expensive_groups:
            self._isolate_late(
                _connections_of(verdict.over_budget_groups),
                _connections_of(verdict.expensive_groups),
            )
        return verdict

    async def _compose_and_deliver(
        self, slice_: Slice, result: SliceResult, enrichment: Enrichment, revision: int
    ) -> bool:
        """Hand out a judged slice, in portions, unless another history has begun since an edition.

        Returns:
            Whether all of it was handed out.
        """
        course, events = self._progress, slice_.events
        composer = MessageComposer(
            course.generation.renderer,
            events,
            result.hits,
            enrichment,
            send_buffer_bytes=self._limits.send_buffer,
        )
        for places in delivery_ranges(events, result.hits):
            stop = places.start
            while stop < places.stop or not places:
                portion = await composer.compose(range(stop, places.stop))
                if portion.failed_indexes:  # to somebody; readers see those before a gap is told
                    await self._visibility.wait_until_visible(
                        events[place].xid for place in portion.failed_indexes
                    )
                if course.revision != revision:
                    return False
                if portion.over_budget_connections:
                    self._isolate_late(
                        portion.over_budget_connections, portion.expensive_connections
                    )
                stop = self._deliver(slice_, result, portion, first_index=stop)
                if stop == len(events):
                    break
                course.head = events[stop - 1].cursor
                await asyncio.sleep(0)
        return True

    async def _enrich(self, slice_: Slice, result: SliceResult) -> Enrichment:
        """Find out what is shown beside the rows, and go on without those who can't be served so.

        These are who waits for a slow expansion, and whose caller the database knows as another.
        """
        judge = self._progress.generation.evaluator
        if not judge.needs_enrichment(slice_.events, result):
            return NO_ENRICHMENT
        check = self._caller_check_for(slice_, result)
        beside = await judge.enrich(
            slice_.events,
            result,
            needs_of_groups,
            check,
            is_shared=not self._deletes_live_callers(slice_),
        )
        late = _connections_with_viewers(result.hits, beside.excluded_viewers)
        self._isolate_late(late, late)
        for connection in check.outdated_connections:
            if connection.is_live:
                self._fall_behind(connection)
        return beside

    def _caller_check_for(self, slice_: Slice, result: SliceResult) -> CallerCheck:
        """Return what finds the LIVE connections whose callers are others by now."""

        def connections(viewers: Sized[ExpandViewer], groups: Sized[Group]) -> Iterable[Connection]:
            found = {*_connections_with_viewers(result.hits, viewers), *_connections_of(groups)}
            return (one for one in found if one.is_live)

        return CallerCheck(
            self._callers,
            self._progress.generation,
            self._row_history,
            events=slice_.events,
            find_connections=connections,
        )

    async def _checked_entries(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return the first of the entries, which readers see if they have to.

        It is those whose rows are what the catalogue says. If that is none, the catalogue is read:
        at the first that it doesn't fit, before anything is made of it.
        """
        edition, meaning = self._progress.revision, self._progress.generation
        shapes, definitions = meaning.shape_checker, meaning.catalog_assumptions
        if self._waits_for_visibility:
            await self._visibility.wait_for_entries(entries)
            if self._progress.revision != edition:
                return entries
        is_so = await self._is_catalog_as_assumed(entries)
        if self._progress.revision != edition:
            return entries
        for place, entry in enumerate(entries):
            if not isinstance(entry, Transaction):
                continue
            is_stale = not is_so and definitions.assumptions_for([entry]) is not None
            if is_stale or shapes.needs_catalog_read(entry):
                if place:
                    return entries[:place]
                # The rows may have been committed together with what altered their table.
                await self._visibility.wait_until_visible([entry.xid])
                is_read = False
                if self._read_schema is not None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_SCHEMA_TIMEOUT_SECONDS):
                            is_read = await self._read_schema()
                shapes.decide_without_waiting(
                    entry, is_catalog_read=is_read, is_catalog_stale=is_stale
                )
                return entries[:1]
        return entries

    async def _is_catalog_as_assumed(self, entries: Sequence[Entry]) -> bool:
        """Whether tables are still what is believed of them, where the stream doesn't say.

        Nothing is handed out before that is known, or another schema is in force.
        """
        edition = self._progress.revision
        belief = self._progress.generation.catalog_assumptions.assumptions_for(entries)
        while belief is not None and self._progress.revision == edition:
            try:
                return await self._executor.verify_assumptions(belief)
            except Exception as error:  # noqa: BLE001 (as above)
                reason = error.message if isinstance(error, PgRealtimeError) else repr(type(error))
                log.warning("definitions.unknown", error=reason)
                await asyncio.sleep(_CATALOG_RETRY_SECONDS)
        return True

    def _isolate_late(self, late: Iterable[Connection], costly: Iterable[Connection]) -> None:
        """Go on without connections that keep others waiting; some of them are to blame for it."""
        for connection in costly:
            self._isolated.isolate_with_backoff(connection)
        for connection in late:
            self._isolated.isolate(connection)
            if connection.is_live:
                self._fall_behind(connection)

    def _apply_account_changes(self, slice_: Slice) -> None:
        """Take note of what the slice tells of people and tables, before it is judged."""
        if any(len(event.row) > len(event.collection.column_names) for event in slice_.events):
            # A column is new; one that is gone is missed where rows are evaluated.
            self._on_schema_mismatch()
        for event in slice_.account_events:
            self._callers.remember_change(event)
        self._apply_to_live_callers(slice_.account_events, "update")
        gap = slice_.gap
        # The others are logged where they arise.
        if gap is not None and gap.xid is not None and gap.reason in {"truncate", "schema"}:
            log.warning(
                "replication.gap", reason=gap.reason, collections=sorted(gap.collections or ())
            )
        if gap is not None and any(
            collection.type == "auth" and gap.affects(name)
            for name, collection in self._progress.generation.collections.items()
        ):
            self._callers.forget_changes_upto(gap.cursor.lsn)

    def _deletes_live_callers(self, slice_: Slice) -> bool:
        """Whether rows of connected people are deleted.

        They are shown their own deletion as who they were. Who reads it alone is told a gap
        instead, since the stream has told that they are nobody by now.
        """
        deleted = (event for event in slice_.account_events if event.action == "delete")
        return any(one.is_live for event in deleted for one in self._callers.connections_of(event))

    def _apply_to_live_callers(self, account_events: Sequence[Event], action: Action) -> None:
        for event in account_events:
            if event.action == action:
                for connection in [c for c in self._callers.connections_of(event) if c.is_live]:
                    self._apply_caller_change_or_close(connection, event)

    def _apply_caller_change_or_close(self, connection: Connection, event: Event) -> None:
        with self._closing_on_error(connection):
            self._apply_caller_change(connection, event)

    def _apply_caller_change(self, connection: Connection, event: Event) -> None:
        """Make the connection's caller what the event makes of it; the client isn't told."""
        caller = self._callers.caller_after(event, connection.caller, connection.caller_read_point)
        if caller is connection.caller:
            return
        self._callers.set_caller(connection, caller)
        for subscription in connection.subscriptions.values():
            self._progress.generation.unbind_subscription(subscription)
            self._progress.generation.bind_subscription(subscription, caller)
        at = event.cursor if event.action == "delete" else self._progress.head
        if caller.is_stale:
            self._invalidate_caller(connection, "caller_lost", at)
        else:
            self._close_if_guest(connection, at)

    def _close_if_guest(self, connection: Connection, upto: Cursor) -> None:
        """End a connection that has become a guest's where there shall be none: it is told so.

        Args:
            connection: Which one.
            upto: What it was handed, if it is LIVE.
        """
        if not self._callers.may_keep_topics(connection):
            self._invalidate_caller(connection, "guest", upto)

    def _advance_head(self, slice_: Slice) -> None:
        self._progress.head = slice_.end_cursor
        self._run_deferred()

    def _run_deferred(self) -> None:
        """On with whoever waited for a head that moved, and for nothing being judged."""
        self._progress.is_evaluating = False
        self.progressed.set()
        while self._deferred_callbacks:
            self._deferred_callbacks.popleft()()
        if self._subscriptions_with_read_point:
            self._clear_read_points()
        self._catch_up.make_caught_up_live()

    def _clear_read_points(self) -> None:
        for subscription in list(self._subscriptions_with_read_point):
            barrier = subscription.read_point
            is_over = barrier is None or self._progress.head.lsn > barrier.insert_lsn
            if is_over and subscription.connection.is_live:
                # The caller was looked up before: everything that comes is news about it too.
                subscription.read_point = subscription.connection.caller_read_point = None
                del self._subscriptions_with_read_point[subscription]

    def _deliver(
        self, slice_: Slice, result: SliceResult, composed: ComposedMessages, *, first_index: int
    ) -> int:
        """Hand out a portion of a slice, which begins at a place.

        With the last one goes the slice's gap, and with each what nobody could be asked about of
        its events: who breaks off later comes back from behind it. Returns the place of the first
        event left over.
        """
        touched = enqueue_messages(composed, slice_.events)
        stop = composed.stop_index
        is_last = stop == len(slice_.events)
        upto = slice_.end_cursor if is_last else slice_.events[stop - 1].cursor
        gap = slice_.gap if is_last else None
        unheard = result.gap_in(slice_.events, range(first_index, stop), composed.failed_indexes)
        self._flush(touched, slice_.events, unheard)
        if stop:
            self._delivered_upto = slice_.events[stop - 1].cursor
        if is_last:
            self._account_deletions = [
                event for event in slice_.account_events if event.action == "delete"
            ]
        if gap is not None or unheard is not None:
            touched = [c for c in self._connections.values() if c.is_live]
            for connection in touched:
                with self._closing_on_error(connection):
                    self._gap_notifier.notify_slice(connection, gap, unheard, upto)
        self._write_cursor_events(touched, upto)
        return stop

    def _write_cursor_events(self, connections: Sequence[Connection], cursor: Cursor) -> None:
        for connection in connections:
            if connection.has_cursor_topic and connection.is_live:
                with self._closing_on_error(connection):
                    connection.write_cursor_event(cursor)

    def _flush(
        self, touched: Sequence[Connection], events: Sequence[Event], unheard: EvaluationGap | None
    ) -> None:
        now = self._clock()
        limit = self._send_budget.limit_bytes()
        for connection in touched:
            try:
                size, buffered = connection.queued_bytes(), connection.writer.buffered_bytes()
                is_larger = buffered + size > limit
                if not size or (
                    is_larger and not self._may_exceed_limit(connection, size, buffered)
                ):
                    self._fall_behind(connection)
                    continue
                hold = self._gap_notifier.position_limit(connection, unheard)
                connection.write(connection.encode_queued(events, hold))
                connection.idle_since = connection.last_write_at = now
                if buffered + size >= self._send_budget.counted_from_bytes:
                    self._send_budget.update(connection)
                    limit = self._send_budget.limit_bytes()
            except Exception as error:  # noqa: BLE001 (see _closing_on_error; that is slower)
                self._close_failed(connection, error)

    def _may_exceed_limit(self, connection: Connection, size: int, buffered: int) -> bool:
        """Whether it may be sent more than its limit: one message, when nothing else waits."""
        return (
            not buffered and connection.has_one_queued_message() and self._send_budget.admits(size)
        )

    def _fall_behind(self, connection: Connection) -> None:
        """Let it read on from the changelog, at its own pace, from before this portion."""
        connection.drop_queued()
        connection.is_live = False
        connection.state = ConnectionState.CATCHING_UP
        connection.cursor = self._progress.head
        self._catch_up.start(connection)


def _connections_of(groups: Iterable[Group]) -> dict[Connection, None]:
    members = (one for group in groups for audience in group.render_groups for one in audience)
    return {one.connection: None for one in members}


def _connections_with_viewers(
    hits: Iterable[Iterable[Group]], viewers: Sized[ExpandViewer]
) -> set[Connection]:
    """Return whose subscriptions among those hit have one of the viewers."""
    if not viewers:
        return set()
    audiences = {
        audience
        for group in {group for groups in hits for group in groups}
        for audience in group.render_groups
        if audience.render_key[2] in viewers
    }
    return {one.connection for audience in audiences for one in audience}


def _unchanged(caller: Caller) -> Caller:
    return caller
