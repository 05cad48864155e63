"""Connections that are not LIVE and read on from the changelog, each at its own cursor.

A connection catches up after a subscribe call, when it resumes from a position, when its client
reads slowly, and while its filters are slow. The dispatcher and subscribe calls start its task,
which ends when the connection has reached the dispatcher's head and is LIVE.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog
from msgspec import Struct

from pgrealtime.auth.principal import account_of
from pgrealtime.changelog.memory import Changelog
from pgrealtime.hub.catchup.slice_reader import (
    CatchUpCache,
    CatchUpCacheKey,
    EvaluatedSlice,
    SliceReader,
    catch_up_cache_key,
)
from pgrealtime.hub.connections.connection import NO_MESSAGE_KEYS, Connection
from pgrealtime.hub.connections.output import MessageBatch
from pgrealtime.hub.delivery.compose import ConnectionMessages, compose_for_connection
from pgrealtime.hub.events.event import SLICE_CHANGES, Event, GapNotice
from pgrealtime.hub.state.callers import CallerCheckResult, may_account_have_changed
from pgrealtime.hub.state.gaps import GapNotifier
from pgrealtime.hub.state.isolation import IsolatedConnections
from pgrealtime.hub.state.progress import DispatchProgress, HubSettings
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.hub.state.resyncs import MirrorResyncs
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import LSN, Cursor
from pgrealtime.observe.redact import raise_location

log = structlog.get_logger(__name__)

_MAX_WRITE_BYTES = 256 * 1024
"""Written to a connection at once, though its send buffer may hold more: the loop is shared."""


class _CatchUpState(Struct):
    """What one connection's task keeps between slices."""

    max_events: int = SLICE_CHANGES
    """Events to evaluate next: about twice as many as could be sent last."""
    is_limited: bool = True
    """Whether its filters have a time limit; not if the last slice exceeded it."""
    unsent: EvaluatedSlice | None = None
    """A slice whose first change is too large for one write and not sent completely."""
    oversized_message_bytes: int = 0
    """Size of the next message, if there was no room for it."""
    awaited_key: CatchUpCacheKey | None = None
    """The key of the evaluation that it waited for last. It waits for one only: not every result
    may be sent to others."""


class CatchUpTasks:
    """One task for each connection that catches up."""

    def __init__(
        self,
        changelog: Changelog,
        progress: DispatchProgress,
        registry: ConnectionRegistry,
        visibility: VisibilityTracker,
        gap_notifier: GapNotifier,
        *,
        resyncs: MirrorResyncs,
        settings: HubSettings,
        clock: Callable[[], float],
    ) -> None:
        max_concurrent = settings.max_concurrent_catch_ups
        self._progress = progress
        self._registry = registry
        self._visibility = visibility
        self._gap_notifier = gap_notifier
        self._resyncs = resyncs
        self._send_budget = registry.send_budget
        self._stall_timeout = settings.limits.stall_timeout
        self._clock = clock
        self._reader = SliceReader(changelog, progress, registry, visibility)
        self.isolated = IsolatedConnections(progress, clock)
        """The connections whose filters are slow."""
        self._tasks: dict[Connection, asyncio.Task[None]] = {}
        self._semaphore = asyncio.Semaphore(max_concurrent)
        # One of its own: slow filters hold a place for seconds, and would take all of the others'.
        self._isolated_semaphore = asyncio.Semaphore(max(1, max_concurrent // 2))
        self._cache = CatchUpCache(clock)
        self._evaluations: dict[CatchUpCacheKey, asyncio.Event] = {}
        """Those in progress or waiting for a place; set when they end."""
        self._caught_up: dict[Connection, bool] = {}
        """Connections that have read everything and wait: for the end of the slice being
        evaluated, or (True) because they must stay isolated."""
        registry.when_removed(self._stop)

    def start_task(self, connection: Connection) -> None:
        """Start the task of a connection that is catching up, if it has none."""
        if connection not in self._tasks:
            self._tasks[connection] = asyncio.create_task(
                self._run(connection), name=f"catch-up {connection.id[:8]}"
            )

    def continue_after_call(self, connection: Connection) -> None:
        """Make a connection LIVE whose call has ended, or start its task if it has to read on."""
        # Most have nothing to read, and a task would end at once.
        if (
            connection in self._tasks
            or connection.cursor < self._progress.evaluation_target
            or connection.pending_gap_reason
            or connection.awaits_resync
            or connection.writer.buffered_bytes()
        ):
            self.start_task(connection)
            return
        try:
            self._try_go_live(connection)
        except Exception as error:  # noqa: BLE001 (as in _run)
            self._close_failed(connection, error)

    def _stop(self, connection: Connection) -> None:
        self.prevent_going_live(connection)
        task = self._tasks.pop(connection, None)
        if task is not None:
            task.cancel()

    def prevent_going_live(self, connection: Connection) -> None:
        """Don't make a connection LIVE that has caught up: a call is in progress on it."""
        self._caught_up.pop(connection, None)

    def make_caught_up_live(self) -> None:
        """Make the connections LIVE that have caught up; called while no slice is evaluated."""
        for connection in list(self._caught_up):
            # Its own task, if it has one, does this when it has read on.
            if connection not in self._tasks:
                try:
                    self._try_go_live(connection)
                except Exception as error:  # noqa: BLE001 (as in _run)
                    self._close_failed(connection, error)

    def _try_go_live(self, connection: Connection) -> None:
        """Make a connection LIVE that has read everything, or let it wait, or read on."""
        progress = self._progress
        if not connection.is_catching_up():
            # A call or a lost caller took it out of this state while it waited.
            self._caught_up.pop(connection, None)
            return
        # Nothing is awaited from these comparisons to ``go_live``: the head can't move in between,
        # or the slice in between would be lost for it.
        if progress.is_evaluating or connection.cursor > progress.head:
            # Its groups are not among those evaluated now; it has read that slice by itself.
            self._caught_up.setdefault(connection, False)
        elif connection.cursor < progress.head:
            # The head moved since it had read everything. The task that calls this is about to end.
            self._tasks.pop(connection, None)
            self.start_task(connection)
        elif self.isolated.try_rejoin(connection):
            self._caught_up.pop(connection, None)
            connection.go_live()
            if connection.has_cursor_topic:
                connection.write_cursor_event(progress.head)
        elif not self._caught_up.get(connection):
            # It must stay isolated. This comes after each slice: its position is written once.
            self._caught_up[connection] = True
            if connection.has_cursor_topic:
                connection.write_cursor_event(progress.head)

    # --- one connection's task ----------------------------------------------------------------

    async def _run(self, connection: Connection) -> None:
        try:
            await connection.writer.drain()
            state = _CatchUpState()
            while await self._deliver_next(connection, state):
                if connection.writer.buffered_bytes() >= self._send_budget.counted_from_bytes:
                    state.unsent = None  # it would keep a transaction in memory during the wait
                await connection.writer.drain()
                if state.oversized_message_bytes:
                    await self._deliver_oversized(connection, state)
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 (a fault of ours ends this connection only)
            self._close_failed(connection, error)
        finally:
            # Another task may have been started for it meanwhile.
            if self._tasks.get(connection) is asyncio.current_task():
                del self._tasks[connection]
            if not self._tasks:
                self._cache.clear()

    def _close_failed(self, connection: Connection, error: Exception) -> None:
        log.error("catch_up.failed", error=type(error).__name__, at=raise_location(error))
        self._registry.close(connection, "failed")  # its client reconnects; silence would be a gap

    async def _deliver_oversized(self, connection: Connection, state: _CatchUpState) -> None:
        """Deliver a message that is larger than the connection's limit, once there is room."""
        # One such message at a time, so that none waits for ever. Clients that leave no room for
        # too long are dropped, the one with the largest send buffer first.
        async with self._send_budget.oversized_lock:
            budget, size = self._send_budget, state.oversized_message_bytes
            while not await budget.wait_for_room(size, self._stall_timeout):
                largest = budget.largest_connection()
                if largest is not None:
                    self._registry.abort(largest)
            await self._deliver_next(connection, state)

    async def _deliver_next(self, connection: Connection, state: _CatchUpState) -> bool:
        """Deliver what is next for the connection; return whether there may be more."""
        await self._wait_for_same_evaluation(connection, state)
        # A slice at a time, so that a subscribe call waits for one slice and not for the end.
        async with connection.lock:
            if not connection.is_catching_up() or self._notify_pending_gap(connection):
                return False
            await self._resyncs.write_to(connection)
            if not connection.is_catching_up():
                return False
            # Before it waits for a place: what another was sent costs no query.
            if self._deliver_cached(connection):
                return True
            if connection.cursor >= self._progress.evaluation_target:
                self._try_go_live(connection)
                return False
            # Read once: the evaluation below may isolate it, and the place is that of before.
            is_isolated = connection.is_isolated
            with self._evaluation_announced(connection):
                async with self._isolated_semaphore if is_isolated else self._semaphore:
                    await self._deliver_uncached(connection, state, is_isolated=is_isolated)
            return True

    async def _deliver_uncached(
        self, connection: Connection, state: _CatchUpState, *, is_isolated: bool
    ) -> None:
        # Again: while it waited, another may have read on from the same cursor.
        if not self._has_more(connection) or self._deliver_cached(connection):
            return
        await self._deliver_slice(connection, state)
        # Without a time limit now, at once: those that wait to ask the same queries find the
        # answer in the cache.
        if is_isolated and not state.is_limited and self._has_more(connection):
            await self._deliver_slice(connection, state)

    async def _wait_for_same_evaluation(self, connection: Connection, state: _CatchUpState) -> None:
        """Wait while another connection's task evaluates what this one would: it may be cached.

        Isolated connections don't wait: whether a filter is slow, each finds out by itself.
        """
        key = self._cache_key(connection)
        if key is None or key == state.awaited_key or connection.is_isolated:
            return
        evaluation = self._evaluations.get(key)
        if evaluation is not None:
            state.awaited_key = key
            await evaluation.wait()

    @contextmanager
    def _evaluation_announced(self, connection: Connection) -> Iterator[None]:
        """Let the others with the same key wait, unless they wait for another's already."""
        key = self._cache_key(connection)
        if key is None or key in self._evaluations or connection.is_isolated:
            yield
            return
        evaluation = self._evaluations[key] = asyncio.Event()
        try:
            yield
        finally:
            del self._evaluations[key]
            evaluation.set()

    def _cache_key(self, connection: Connection) -> CatchUpCacheKey | None:
        """Return the key of what is next for the connection; None if that is its own."""
        if connection.is_amid_change():
            return None
        return catch_up_cache_key(connection, self._progress.revision)

    def _has_more(self, connection: Connection) -> bool:
        return connection.is_catching_up() and connection.cursor < self._progress.evaluation_target

    def _notify_pending_gap(self, connection: Connection) -> bool:
        """Notify of a gap before the submitted position; return whether that ends delivery."""
        if not connection.pending_gap_reason:
            return False
        reason = connection.take_pending_gap()
        self._gap_notifier.notify(connection, GapNotice(None, reason, connection.cursor))
        return not connection.is_catching_up()

    # --- one slice ----------------------------------------------------------------------------

    async def _deliver_slice(self, connection: Connection, state: _CatchUpState) -> None:
        """Evaluate and deliver the next slice to one connection, or as much as may be sent.

        What was evaluated and can't be sent is evaluated again later, so fewer events are tried
        the next time. The same goes for what was evaluated by an older revision.
        """
        revision = self._progress.revision
        key = self._cache_key(connection)  # before the evaluation may change its caller and group
        evaluated, state.unsent = state.unsent, None
        if evaluated is None or not evaluated.continues(connection, revision):
            evaluated = await self._evaluate(connection, state)
            if evaluated is None:
                return
        # After the evaluation: others may have filled the total meanwhile.
        limit = self._send_budget.limit_bytes()
        messages = await self._compose(connection, evaluated, min(limit, _MAX_WRITE_BYTES))
        if connection.is_closed() or self._progress.revision != revision:
            return
        size, state.oversized_message_bytes = messages.batch.size_bytes, 0
        if size > limit and not self._send_budget.admits(size):
            state.oversized_message_bytes, state.unsent = size, evaluated
        elif messages.sent_messages:
            # The cursor stays before the change, of which a part was sent: a client that breaks off
            # resumes there and receives that part again.
            change = evaluated.events[0].cursor
            self._write_batch(connection, evaluated.events, messages.batch, change)
            connection.record_messages_sent(change, messages.sent_messages)
            state.unsent = evaluated
        else:
            self._deliver_messages(connection, evaluated, messages, key)
            count, stop = len(evaluated.events), messages.stop_index
            state.max_events = stop if stop < count else min(SLICE_CHANGES, max(1, count) * 2)

    async def _evaluate(
        self, connection: Connection, state: _CatchUpState
    ) -> EvaluatedSlice | None:
        """Evaluate the next slice; None if it may not be delivered, or took too long."""
        revision = self._progress.revision
        budget = self.isolated.budget_for(connection, is_limited=state.is_limited)
        evaluated = await self._reader.read(connection, state.max_events, budget)
        # Its caller may have become invalid in the slice, or another generation begun.
        if not connection.is_catching_up() or self._progress.revision != revision:
            return None
        exceeds_limit = self.isolated.record_usage(connection, budget, evaluated.events)
        state.is_limited = not exceeds_limit
        if evaluated.result.over_budget_groups:
            # One event may be evaluated in time; if it isn't, its filter is slow.
            state.max_events = 1
            return None
        return evaluated

    async def _compose(
        self, connection: Connection, evaluated: EvaluatedSlice, max_bytes: int
    ) -> ConnectionMessages:
        renderer, events = self._progress.generation.renderer, evaluated.events
        hits, enrichment = evaluated.result.hits, evaluated.enrichment
        messages = await compose_for_connection(
            renderer, connection, events, hits, enrichment, max_bytes=max_bytes
        )
        # The connection is notified of a gap, and its client must find them on reloading.
        if messages.failed_indexes:
            await self._visibility.wait_until_visible(
                events[index].xid for index in messages.failed_indexes
            )
        return messages

    def _deliver_messages(
        self,
        connection: Connection,
        evaluated: EvaluatedSlice,
        messages: ConnectionMessages,
        key: CatchUpCacheKey | None,
    ) -> None:
        """Write the messages of the first events, then gaps, and move the cursor behind both."""
        events, stop = evaluated.events, messages.stop_index
        is_whole = stop == len(events)
        end = evaluated.end_cursor if is_whole else events[stop - 1].cursor
        gap = evaluated.gap if is_whole else None
        evaluation_gap = evaluated.result.gap_in(events, range(stop), messages.failed_indexes)
        position_limit = self._gap_notifier.position_limit(connection, evaluation_gap)
        # Before the messages, whose positions would go past what the mirrors are told.
        for subscription in connection.subscriptions.values():
            if reason := subscription.group and evaluated.result.resync_reasons.get(
                subscription.group
            ):
                self._registry.request_resync(subscription, reason)
        self._write_batch(connection, events, messages.batch, position_limit)
        # Not what depends on this connection alone: a gap that it is notified of by its own topics,
        # a change of its caller, rows that it was not shown.
        is_same_for_others = not (
            evaluated.gap
            or evaluated.account_events
            or evaluated.is_caller_outdated
            or evaluated.result.resync_reasons
        )
        if key is not None and is_same_for_others and evaluation_gap is None:
            self._cache.store(
                key, events, messages.batch, end, evaluated.budget, checked=evaluated.caller_check
            )
        # Before the gap, which may close it: a closed connection's cursor can't advance.
        connection.advance(end)
        connection.record_messages_sent(end, NO_MESSAGE_KEYS)
        self._gap_notifier.notify_slice(connection, gap, evaluation_gap, end)
        if is_whole and not connection.is_closed():
            # After the gap, of which the caller is notified as who it was.
            self._reader.apply_caller_changes(connection, evaluated.account_events, "delete")
        # After the gap as well: a client that breaks off in between would resume behind it.
        if connection.has_cursor_topic and not connection.is_closed():
            connection.write_cursor_event(end)

    def _write_batch(
        self,
        connection: Connection,
        events: Sequence[Event],
        batch: MessageBatch,
        position_limit: Cursor | None = None,
    ) -> None:
        if batch.event_indexes:
            connection.enqueue(batch)
            connection.write_queued(events, position_limit, self._clock())
            self._send_budget.update(connection)

    # --- what another connection was just sent ------------------------------------------------

    def _deliver_cached(self, connection: Connection) -> bool:
        """Deliver what another connection at the same cursor was just sent, if there is any."""
        key = self._cache_key(connection)
        cached = None if key is None else self._cache.get(key)
        if (
            cached is None
            or cached.end_cursor > self._progress.evaluation_target
            or not self._may_use_cached(connection, cached.checked)
            or cached.size_bytes > self._send_budget.limit_bytes()
        ):
            return False
        # Its filters took this time, though for another connection: they are as slow for it.
        self.isolated.record_usage(connection, cached.budget, cached.events)
        self._write_batch(connection, cached.events, cached.batch)
        connection.advance(cached.end_cursor)
        if connection.has_cursor_topic:
            connection.write_cursor_event(cached.end_cursor)
        return True

    def _may_use_cached(self, connection: Connection, checked: CallerCheckResult | None) -> bool:
        """Whether rows that were read live for another caller may be sent to this one."""
        account = account_of(connection.caller)
        if checked is None or account is None:
            return True
        generation = self._progress.generation
        collection = generation.collections.get(account[0])
        # Its own row may have changed in the commit itself, and ``after`` is exclusive.
        before = LSN(checked.commit_lsn - 1)
        return checked.is_changelog_complete and (
            collection is None
            or not may_account_have_changed(generation.row_history, collection, account, before)
        )
