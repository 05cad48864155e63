"""Holds the open connections: adds them, sends PB_CONNECT, closes them, and applies caller changes.

The API adds a connection when its response head is sent, feed says when the replication stream is
up; both call ``hub.hub``. All code that ends a connection calls a method of ``ConnectionRegistry``,
which awaits nothing. ``ConnectionTimeouts`` closes connections that are due and sends heartbeats,
from one timer; it ends all at shutdown.
"""

import asyncio
import secrets
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Collection as Sized
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
from msgspec import Struct, field

from pgrealtime.config.model import RealtimeConfig
from pgrealtime.errors import SubscriptionLimitError
from pgrealtime.hub.connections.connection import (
    LIVE,
    Connection,
    ConnectionState,
    Group,
    Subscription,
)
from pgrealtime.hub.connections.group import has_same_predicate
from pgrealtime.hub.connections.output import ResponseWriter
from pgrealtime.hub.connections.send_budget import SendBudget
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.state.callers import CallerTracker
from pgrealtime.hub.state.generation import Generation
from pgrealtime.hub.state.progress import DispatchProgress, HubSettings, ResumableEpochs
from pgrealtime.lsn import Cursor
from pgrealtime.observe.redact import raise_location

log = structlog.get_logger(__name__)

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 40
_CONNECT_TIMEOUT_SECONDS = 10.0
"""How long PB_CONNECT is held back at most."""
_FIRST_CALL_TIMEOUT_SECONDS = 30.0
"""How long a resumable connection waits for topics; a plain one has PocketBase's idle timeout."""
_SHUTDOWN_CLOSE_DELAY_SECONDS = 2.0
_SHUTDOWN_CLOSES_PER_SECOND = 500
_SHUTDOWN_PAUSE_SECONDS = 0.05


class HubCounters(Struct):
    """Totals since the start."""

    closed_connections: Counter[str] = field(default_factory=Counter)
    """By reason; ``client`` if the client closed it."""
    events_sent_to_closed: int = 0
    """To connections that are closed now."""
    mirror_frames_sent_to_closed: Counter[str] = field(default_factory=Counter)
    """The same of mirrors, by action."""
    resume_outcomes: Counter[str] = field(default_factory=Counter)
    """First calls of connections that submitted a position: ``resumed``, or the gap's reason."""
    refused_subscribe_calls: int = 0
    incomplete_records: Counter[str] = field(default_factory=Counter)
    """By collection, records sent to some subscribers without a column: the WAL doesn't carry its
    old value, and their rule may not admit the row as it is now."""


class ConnectionRegistry:
    """The open connections by id."""

    def __init__(
        self,
        progress: DispatchProgress,
        epochs: ResumableEpochs,
        settings: HubSettings,
        counters: HubCounters,
        clock: Callable[[], float],
    ) -> None:
        limits = settings.limits
        self._progress = progress
        self._epochs = epochs
        self._tag = settings.tag
        self._max_connections = limits.max_connections
        self._clock = clock
        self._connections: dict[str, Connection] = {}
        self._removal_callbacks: list[Callable[[Connection], None]] = []
        self.callers = CallerTracker(settings.logins, allows_guests=settings.allows_guests)
        """The index from an account (a row of a users table) to its connections."""
        self.counters = counters
        self.send_budget = SendBudget(
            per_connection_bytes=limits.send_buffer, total_bytes=limits.send_buffers, clock=clock
        )
        self.is_stream_up = False
        """Whether the replication stream is being read. While it is not, PB_CONNECT is held back
        and subscribe calls are refused."""
        self.is_closing = False
        """Whether new connections get no PB_CONNECT any more."""
        self.subscriptions_with_read_point: dict[Subscription, None] = {}
        self.mirrors_to_resync: dict[Subscription, None] = {}
        """Those whose clients are to be told to load anew (``hub.state.resyncs``), oldest first."""
        self.resync_requested = asyncio.Event()

    @property
    def connections(self) -> Sized[Connection]:
        """The open connections, in order of opening."""
        return self._connections.values()

    def find(self, client_id: str) -> Connection | None:
        """Return the connection of an id, with or without a position after a dot."""
        return self._connections.get(client_id.partition(".")[0])

    def live_connections(self) -> list[Connection]:
        """Return the connections that are LIVE now."""
        return [connection for connection in self._connections.values() if connection.state is LIVE]

    # --- opening ----------------------------------------------------------------------------

    def open(
        self,
        writer: ResponseWriter,
        *,
        address: str,
        last_event_id: str | None,
        position: str | None,
    ) -> Connection:
        """Add a connection whose response head was sent; send PB_CONNECT if the stream is up.

        The positions are the header ``Last-Event-ID`` and the query parameter ``lastEventId``, of
        which ``""`` asks for positions from now on. Subscribe calls must come from ``address``.
        """
        connection = Connection(
            self._make_id(),
            writer,
            address=address,
            submitted_positions=(last_event_id, position),
            epoch=self._epochs.epoch,
            cursor=self._progress.head,
            now=self._clock(),
        )
        self._connections[connection.id] = connection
        if len(self._connections) > self._max_connections:
            # An EventSource never retries after a status other than 200: the response stays open
            # without PB_CONNECT. It gets one if a place is free when the stream starts again, else
            # the connect timeout closes it.
            log.warning("connection.refused", limit=self._max_connections)
        elif self.is_stream_up and not self.is_closing:
            self._connect(connection)
        return connection

    def _make_id(self) -> str:
        random_length = _ID_LENGTH - len(self._tag)
        return self._tag + "".join(secrets.choice(_ID_LETTERS) for _ in range(random_length))

    def connect_waiting(self) -> None:
        """Send PB_CONNECT to the connections that waited for the stream."""
        if self.is_closing:
            return
        for connection in list(self._connections.values())[: self._max_connections]:
            if connection.state is ConnectionState.CONNECTING:
                self._connect(connection)

    def _connect(self, connection: Connection) -> None:
        head = self._progress.head
        resumption = self._epochs.resolve(connection.submitted_positions, head)
        connection.connect(self._epochs.epoch, head, resumption, self._clock())

    # --- closing ----------------------------------------------------------------------------

    def when_removed(self, callback: Callable[[Connection], None]) -> None:
        """Call back with each connection that is removed, perhaps twice, before it is unbound."""
        self._removal_callbacks.append(callback)

    def remove(self, connection: Connection, reason: str) -> None:
        """Remove a connection whose response has ended, or is about to. Idempotent."""
        # Its state first: whatever the calls below run finds it closed.
        connection.close()
        self.callers.remove(connection)
        for callback in self._removal_callbacks:
            callback(connection)
        for subscription in connection.take_subscriptions().values():
            self.unbind(subscription, self._progress.generation)
            self.mirrors_to_resync.pop(subscription, None)
        if self._connections.pop(connection.id, None) is not None:
            self.counters.closed_connections[reason] += 1
            self.counters.events_sent_to_closed += connection.events_sent
            self.counters.mirror_frames_sent_to_closed.update(connection.mirror_frames or {})
            log.debug("connection.closed", connection=connection.id, events=connection.events_sent)

    def close(self, connection: Connection, reason: str) -> None:
        """Remove a connection, and end its response after the bytes written so far. Idempotent."""
        if connection.is_closed():
            return
        log.debug("connection.ended", connection=connection.id, reason=reason)
        try:
            # Before the writer is closed: it may report at once that its client has gone.
            self.remove(connection, reason)
        finally:
            connection.writer.close()

    def abort(self, connection: Connection) -> None:
        """Drop a connection that reads too slowly, with what is buffered for it."""
        log.warning("connection.dropped", connection=connection.id, reason="stalled")
        connection.writer.abort()
        self.send_budget.deduct_aborted(connection)
        self.remove(connection, "stalled")

    def request_close(self, connection: Connection, reason: str) -> None:
        """Close a connection now, or by ``ConnectionTimeouts`` once ``may_close`` allows it."""
        connection.request_close(reason)
        if connection.may_close(self._clock()):
            self.close(connection, reason)

    def invalidate_caller(self, connection: Connection, reason: str, delivered: Cursor) -> None:
        """Stop delivering to a connection whose caller's row is deleted or unknown, and close it.

        ``delivered`` is what it has received if it is LIVE; its client can resume from there.
        """
        connection.invalidate_caller(delivered)
        self.request_close(connection, reason)

    @contextmanager
    def closing_on_error(self, connection: Connection) -> Iterator[None]:
        """Close the connection if the block raises; other connections are not affected.

        An open connection that misses events would be a gap that nobody is notified of. A client
        whose response ends reconnects, and resumes from its position or loads its data again.
        """
        try:
            yield
        except SubscriptionLimitError as error:
            # Rebinding exceeded a limit, because caller or configuration changed. There is no
            # subscribe call that could be refused.
            log.info("connection.refused", connection=connection.id, limit=error.limit_name)
            self.close(connection, "limit")
        except Exception as error:  # noqa: BLE001 (a bug, or an unexpected value)
            self.close_failed(connection, error)

    def close_failed(self, connection: Connection, error: Exception) -> None:
        """Close a connection for an error; never raises."""
        id_, name = connection.id, type(error).__name__
        log.error("connection.failed", connection=id_, error=name, at=raise_location(error))
        try:
            self.close(connection, "failed")
        except Exception as another:  # noqa: BLE001 (as above)
            connection.close()  # at least nothing more is delivered
            name = type(another).__name__
            log.error("connection.failed", connection=id_, error=name)  # noqa: TRY400 (the error's place is logged above)

    # --- callers and subscriptions ------------------------------------------------------------

    def unbind(self, subscription: Subscription, generation: Generation) -> None:
        """Remove a subscription from its group, and its read point."""
        generation.unbind_subscription(subscription)
        self.subscriptions_with_read_point.pop(subscription, None)

    def add_read_point(self, subscription: Subscription) -> None:
        """Add a subscription to ``subscriptions_with_read_point``, if it has one."""
        if subscription.read_point is not None:
            self.subscriptions_with_read_point[subscription] = None

    def request_resync(self, subscription: Subscription, reason: str) -> None:
        """Have a mirror's client told to load its list anew; others are told nothing by it."""
        subscription.request_resync(reason)
        self.add_mirror_to_resync(subscription)

    def add_mirror_to_resync(self, subscription: Subscription) -> None:
        """Add a subscription to ``mirrors_to_resync``, if a resync was requested for it."""
        if subscription.mirror is not None and subscription.mirror.pending_reason:
            self.mirrors_to_resync[subscription] = None
            self.resync_requested.set()

    def request_resyncs(self, reasons: Mapping[Group, str]) -> None:
        """Request resyncs for the subscriptions of some groups, of LIVE connections."""
        for group, reason in reasons.items():
            for render_group in group.render_groups:
                for subscription in render_group:
                    if subscription.connection.state is LIVE:
                        self.request_resync(subscription, reason)

    def clear_passed_read_points(self) -> None:
        """Remove the read points that the head has passed: they see no later transaction."""
        head = self._progress.head.lsn
        for subscription in list(self.subscriptions_with_read_point):
            read_point, connection = subscription.read_point, subscription.connection
            if (read_point is None or head > read_point.insert_lsn) and connection.state is LIVE:
                subscription.set_read_point(None)
                # The caller's row was read before the topics' snapshot, so that every change of it
                # from here on is newer than what was read.
                connection.forget_caller_read_point()
                del self.subscriptions_with_read_point[subscription]

    def clear_read_points(self) -> None:
        """Remove all read points: a restored server assigns their transaction ids again."""
        for subscription in self.subscriptions_with_read_point:
            subscription.set_read_point(None)
        self.subscriptions_with_read_point.clear()

    def rebind(self, previous: Generation) -> None:
        """Bind all callers and subscriptions in a new generation, which has none yet.

        Mirrors that show other rows or other columns by it than by the previous one are told so.
        """
        generation = self._progress.generation
        for connection in list(self._connections.values()):
            before = {
                subscription: previous.mirror_basis(subscription, connection.caller)
                for subscription in connection.subscriptions.values()
                if subscription.mirror is not None
            }
            # Of all its subscriptions before any is bound: quotas count those that are in groups.
            for subscription in connection.subscriptions.values():
                subscription.set_group(None)  # the other generation's, which is gone
            with self.closing_on_error(connection):
                self.callers.set_caller(connection, self.callers.revalidate(connection.caller))
                for subscription in connection.subscriptions.values():
                    generation.bind_subscription(subscription, connection.caller)
                    if subscription.mirror is not None and (
                        before.get(subscription)
                        != generation.mirror_basis(subscription, connection.caller)
                    ):
                        self.request_resync(subscription, "rules")
                self._close_if_guest(connection, self._progress.head)

    def apply_caller_change(self, connection: Connection, event: Event) -> None:
        """Change the connection's caller as an event of its row says; an error closes it."""
        with self.closing_on_error(connection):
            callers = self.callers
            caller = callers.caller_after(event, connection.caller, connection.caller_read_point)
            if caller is connection.caller or connection.is_closed():
                return
            callers.set_caller(connection, caller)
            generation = self._progress.generation
            for subscription in connection.subscriptions.values():
                before = subscription.group
                generation.unbind_subscription(subscription)
                generation.bind_subscription(subscription, caller)
                if not has_same_predicate(before, subscription.group):
                    self.request_resync(subscription, "identity")
            # An account's deletion is delivered before it applies, other changes apply first.
            delivered = event.cursor if event.action == "delete" else self._progress.head
            if caller.is_stale:
                self.invalidate_caller(connection, "caller_lost", delivered)
            else:
                self._close_if_guest(connection, delivered)

    def _close_if_guest(self, connection: Connection, delivered: Cursor) -> None:
        if not self.callers.may_keep_topics(connection):
            self.invalidate_caller(connection, "guest", delivered)


@dataclass(eq=False)
class ConnectionTimeouts:
    """Closes connections that are due."""

    progress: DispatchProgress
    registry: ConnectionRegistry
    limits: RealtimeConfig
    clock: Callable[[], float]

    async def watch(self) -> None:
        """Apply the timeouts and send heartbeats, for ever."""
        limits = self.limits
        shortest = min(
            limits.idle_timeout, limits.max_lifetime, limits.heartbeat, limits.stall_timeout
        )
        pause = max(0.02, min(0.5, shortest / 20))
        while True:
            await asyncio.sleep(pause)
            now = self.clock()
            unix_now = time.time()
            for connection in list(self.registry.connections):
                try:
                    self._apply_timeouts(connection, now, unix_now)
                except Exception as error:  # noqa: BLE001 (as closing_on_error, which is slower)
                    self.registry.close_failed(connection, error)

    def _apply_timeouts(self, connection: Connection, now: float, unix_now: float) -> None:
        if connection.state is ConnectionState.CONNECTING:
            if now - connection.opened_at >= _CONNECT_TIMEOUT_SECONDS:
                self.registry.close(connection, "no_stream")
            return
        connection.record_drained(now)
        if now - connection.last_drained_at >= self.limits.stall_timeout:
            self.registry.abort(connection)
        elif reason := self._reason_to_close(connection, now, unix_now):
            if connection.may_close(now):
                self.registry.close(connection, reason)
        elif (
            now - connection.last_write_at >= self.limits.heartbeat
            and not connection.writer.buffered_bytes()
        ):
            head = self.progress.head
            connection.write_heartbeat(head if connection.state is LIVE else connection.cursor, now)

    def _reason_to_close(self, connection: Connection, now: float, unix_now: float) -> str:
        expires_at = connection.caller.expires_at
        connected_seconds = now - connection.connected_at
        if connection.close_reason:
            return connection.close_reason
        if now - connection.idle_since >= self.limits.idle_timeout:
            return "idle"
        if connected_seconds >= self.limits.max_lifetime:
            return "lifetime"
        if expires_at is not None and unix_now >= expires_at:
            return "token_expired"
        waits_for_call = connection.is_resumable and connection.first_call_answered_at is None
        return (
            "no_call" if waits_for_call and connected_seconds >= _FIRST_CALL_TIMEOUT_SECONDS else ""
        )

    async def shutdown(self, grace_seconds: float) -> None:
        """Close all connections within ``grace_seconds``, a few at a time."""
        # Their clients reconnect at once: not all of them in the same moment.
        registry, began = self.registry, self.clock()
        while registry.connections and (now := self.clock()) - began < grace_seconds:
            is_late = now - began >= _SHUTDOWN_CLOSE_DELAY_SECONDS
            ready = [one for one in registry.connections if is_late or one.may_close(now)]
            twice_in_time = len(registry.connections) / max(grace_seconds, 0.1) * 2
            per_second = max(_SHUTDOWN_CLOSES_PER_SECOND, twice_in_time)
            for connection in ready[: int(per_second * _SHUTDOWN_PAUSE_SECONDS) + 1]:
                registry.close(connection, "shutdown")
            await asyncio.sleep(_SHUTDOWN_PAUSE_SECONDS)
        for connection in list(registry.connections):
            registry.close(connection, "shutdown")
