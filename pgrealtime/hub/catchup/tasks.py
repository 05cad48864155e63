"""Connections that read on from the changelog at their own cursor: after a break, when slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog
from msgspec import Struct

from pgrealtime.auth.principal import account_of
from pgrealtime.changelog.base import Changelog
from pgrealtime.changes import Action
from pgrealtime.errors import ChangelogError
from pgrealtime.hub.catchup.replay_cache import CatchUpCache, catch_up_cache_key
from pgrealtime.hub.connections.batch import MessageBatch
from pgrealtime.hub.connections.connection import (
    NO_MESSAGE_KEYS,
    Connection,
    Group,
    Subscription,
)
from pgrealtime.hub.delivery.compose import (
    ConnectionMessages,
    compose_for_connection,
    subscriptions_by_group,
)
from pgrealtime.hub.delivery.render import NO_ENRICHMENT, Enrichment, EnrichmentNeed
from pgrealtime.hub.evaluation.evaluator import raise_location
from pgrealtime.hub.evaluation.filter_budget import FilterBudget
from pgrealtime.hub.evaluation.slice_result import SliceResult, gap_xids
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.slices import (
    SLICE_CHANGES,
    GapNotice,
    Slice,
    slice_prefix,
    split_into_slices,
)
from pgrealtime.hub.state.caller_check import (
    CallerCheck,
    CallerCheckResult,
    may_account_have_changed,
)
from pgrealtime.hub.state.gaps import GapNotifier
from pgrealtime.hub.state.isolation import IsolatedConnections
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.hub.state.settings import HubSettings
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import LSN, Cursor

log = structlog.get_logger(__name__)

_MAX_WRITE_BYTES = 256 * 1024
"""Handed to a connection at once, though more may wait for it: others of the loop have their turn
between two pieces."""


class _EvaluatedSlice(Struct):
    """A slice as it was judged for one connection, whose first change isn't handed out whole."""

    slice: Slice
    events: Sequence[Event]
    slice_result: SliceResult
    enrichment: Enrichment
    end_cursor: Cursor
    budget: FilterBudget
    revision: int
    subscriptions: Mapping[str, Subscription]
    checked: CallerCheckResult | None = None
    """What was found out about its caller, as far as that was asked."""
    is_caller_outdated: bool = False
    """Whether its caller is another by now."""

    def is_next_for(self, connection: Connection, revision: int) -> bool:
        """Whether it is what the connection must be handed next, by topics and rules of now."""
        return (
            self.revision == revision
            and self.subscriptions is connection.subscriptions
            and connection.is_amid_change()
            and connection.cursor < self.events[0].cursor
            and bool(connection.messages_sent_of(self.events[0].cursor))
        )


class _CatchUpState(Struct):
    """How one connection's task goes on."""

    max_events: int = SLICE_CHANGES
    """Events that are tried next."""
    is_limited: bool = True
    """Whether filters have a limited time for them; not if that was too little for the last."""
    unsent: _EvaluatedSlice | None = None
    """What is left of a change too large to be sent at once."""
    oversized_message_bytes: int = 0
    """Bytes of the next message, if there was no room for it."""


class CatchUpTasks:
    """One task for each connection that catches up; it ends when the connection is LIVE.

    Args:
        changelog: Read by each connection at its own cursor.
        progress: The dispatcher's.
        registry: Closes connections and applies changes of their callers.
        visibility: Waits until transactions are visible.
        gap_notifier: Notifies of what cannot be delivered.
        settings: How many are served at the same time, and when a slow one is dropped.
        clock: Monotonic seconds.

    Attributes:
        isolated: The connections whose filters are slow.
    """

    def __init__(
        self,
        changelog: Changelog,
        progress: DispatchProgress,
        registry: ConnectionRegistry,
        *,
        visibility: VisibilityTracker,
        gap_notifier: GapNotifier,
        settings: HubSettings,
        clock: Callable[[], float],
    ) -> None:
        max_concurrent = settings.max_concurrent_catch_ups
        self._changelog = changelog
        self._progress = progress
        self._registry = registry
        self._visibility = visibility
        self._gap_notifier = gap_notifier
        self._send_budget = registry.send_budget
        self._stall_timeout = settings.limits.stall_timeout
        self._clock = clock
        self.isolated = IsolatedConnections(progress, clock)
        self._tasks: dict[Connection, asyncio.Task[None]] = {}
        self._semaphore = asyncio.Semaphore(max_concurrent)
        self._isolated_semaphore = asyncio.Semaphore(max(1, max_concurrent // 2))
        self._cache = CatchUpCache(clock)
        self._caught_up: dict[Connection, bool] = {}
        """Those that have read all there is: they wait for the slice being evaluated, or (True)
        must stay isolated."""
        registry.when_removed(self._stop)

    def start(self, connection: Connection) -> None:
        """Let a connection in the state REPLAY read on."""
        if connection not in self._tasks:
            self._tasks[connection] = asyncio.create_task(
                self._run(connection), name=f"replay {connection.id[:8]}"
            )

    def _stop(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self.prevent_going_live(connection)
        task = self._tasks.pop(connection, None)
        if task is not None:
            task.cancel()

    def prevent_going_live(self, connection: Connection) -> None:
        """Don't let it become LIVE: a call is at work on it."""
        self._caught_up.pop(connection, None)

    def make_caught_up_live(self) -> None:
        """Nothing is being judged: make those LIVE who have read all there is."""
        for connection in list(self._caught_up):
            if connection not in self._tasks:
                try:
                    self._try_go_live(connection)
                except Exception as error:  # noqa: BLE001 (as in _run)
                    self._close_failed(connection, error)

    def _try_go_live(self, connection: Connection) -> None:
        """Make LIVE a connection that has read all there is; or let it wait, or read on."""
        course = self._progress
        if not connection.is_catching_up():
            self._caught_up.pop(connection, None)
            return
        if course.is_evaluating or connection.cursor > course.head:
            # The slice being judged was judged without its groups; it has read that one itself.
            self._caught_up.setdefault(connection, False)
        elif connection.cursor < course.head:
            self._tasks.pop(connection, None)
            self.start(connection)
        elif self.isolated.try_rejoin(connection):
            self._caught_up.pop(connection, None)
            connection.go_live()
            if connection.has_cursor_topic:
                connection.write_cursor_event(course.head)
        elif not self._caught_up.get(connection):
            self._caught_up[connection] = True
            if connection.has_cursor_topic:
                connection.write_cursor_event(course.head)

    # --- one connection's task

    async def _run(self, connection: Connection) -> None:
        try:
            await connection.writer.drain()
            progress = _CatchUpState()
            while await self._deliver_next(connection, progress):
                if connection.writer.buffered_bytes() >= self._send_budget.counted_from_bytes:
                    progress.unsent = None  # it would keep a transaction in memory meanwhile
                await connection.writer.drain()
                if progress.oversized_message_bytes:
                    await self._deliver_oversized(connection, progress)
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 (a fault of ours ends this connection only)
            self._close_failed(connection, error)
        finally:
            if self._tasks.get(connection) is asyncio.current_task():
                del self._tasks[connection]
            if not self._tasks:
                self._cache.clear()

    def _close_failed(self, connection: Connection, error: Exception) -> None:
        log.error("replay.failed", error=type(error).__name__, at=raise_location(error))
        self._registry.close(connection, "failed")  # its client comes back; silence would be a gap

    async def _deliver_oversized(self, connection: Connection, state: _CatchUpState) -> None:
        """Hand on a message that is larger than what may wait for one: when there is room.

        One after the other, so that none waits for ever. Clients that leave no room for too long
        are dropped, those that take least of what they are sent first.
        """
        async with self._send_budget.oversized_lock:
            while not await self._send_budget.wait_for_room(
                state.oversized_message_bytes, self._stall_timeout
            ):
                largest = self._send_budget.largest_connection()
                if largest is not None:
                    self._registry.abort(largest)
            await self._deliver_next(connection, state)

    async def _deliver_next(self, connection: Connection, state: _CatchUpState) -> bool:
        """Hand the connection what is next for it; return whether there is a next time."""
        course = self._progress
        async with connection.lock:
            if not connection.is_catching_up() or self._notify_pending_gap(connection):
                return False
            if self._deliver_cached(connection):
                return True
            if connection.cursor >= course.evaluation_target:
                self._try_go_live(connection)
                return False
            is_isolated = connection.is_isolated
            async with self._isolated_semaphore if is_isolated else self._semaphore:
                # Looked at once more: others had their turn, perhaps from the same cursor.
                if self._has_more(connection) and not self._deliver_cached(connection):
                    await self._deliver_slice(connection, state)
                    # At once, so that those who wait to ask the same needn't be late as well.
                    if is_isolated and not state.is_limited and self._has_more(connection):
                        await self._deliver_slice(connection, state)
            return True

    def _has_more(self, connection: Connection) -> bool:
        """Whether there is more for it to read; it changes between awaits."""
        return connection.is_catching_up() and connection.cursor < self._progress.evaluation_target

    def _notify_pending_gap(self, connection: Connection) -> bool:
        """Tell a gap that the submitted position lies in; return whether nothing may follow."""
        if not connection.pending_gap_reason:
            return False
        reason = connection.take_pending_gap()
        self._gap_notifier.notify(connection, GapNotice(None, reason, connection.cursor))
        return not connection.is_catching_up()

    def _deliver_cached(self, connection: Connection) -> bool:
        """Deliver what another one that stood there was given a moment ago, if any."""
        if connection.is_amid_change():
            return False
        stands = catch_up_cache_key(connection, self._progress.revision)
        stretch = None if stands is None else self._cache.get(stands)
        if stretch is None or stretch.end_cursor > self._progress.evaluation_target:
            return False
        if not self._may_use_cached(connection, stretch.checked):
            return False
        if stretch.size_bytes > self._send_budget.limit_bytes():
            return False
        self.isolated.record_usage(connection, stretch.budget, stretch.events)
        self._write_batch(connection, stretch.events, stretch.batch)
        connection.advance(stretch.end_cursor)
        if connection.has_cursor_topic:
            connection.write_cursor_event(stretch.end_cursor)
        return True

    def _write_batch(
        self,
        connection: Connection,
        events: Sequence[Event],
        batch: MessageBatch,
        position_limit: Cursor | None = None,
    ) -> None:
        if batch.event_indexes:
            connection.enqueue(batch)
            connection.write(connection.encode_queued(events, position_limit))
            connection.mark_event_sent(self._clock())
            self._send_budget.update(connection)

    def _next_slice(self, connection: Connection) -> Slice:
        """Return the next slice of what the connection has yet to read."""
        try:
            entries = self._changelog.read(
                connection.cursor, self._progress.evaluation_target, SLICE_CHANGES
            )
        except ChangelogError:
            floor = self._changelog.floor
            return Slice([], GapNotice(None, "expired", floor), floor)

        def turns(event: Event) -> bool:
            caller = connection.caller
            return (
                self._registry.callers.caller_after(event, caller, connection.caller_read_point)
                is not caller
            )

        # Always the first: so all who stand at a cursor are given the same.
        meaning = self._progress.generation
        fits = meaning.shape_checker.fits
        return next(
            split_into_slices(entries, connection.cursor, meaning.collections, turns, fits=fits)
        )

    async def _deliver_slice(self, connection: Connection, state: _CatchUpState) -> None:
        """Deliver a slice to one connection, or a piece of it: what its own topics may see of it.

        What lies beyond the dispatch task's own is left for later, so that it is judged either
        here or there and never twice; and so is what was judged by collections that are no longer
        those of now, and what would be too much at once. What isn't handed out was judged in
        vain, so fewer events are tried the next time.
        """
        edition = self._progress.revision
        stands = None if connection.is_amid_change() else catch_up_cache_key(connection, edition)
        judged, state.unsent = state.unsent, None
        if judged is None or not judged.is_next_for(connection, edition):
            budget = self.isolated.budget_for(connection, is_limited=state.is_limited)
            judged = await self._evaluate(connection, state.max_events, budget)
            await self._wait_for_gap_causes(judged)
            if not connection.is_catching_up() or self._progress.revision != edition:
                return
            was_late = self.isolated.record_usage(connection, budget, judged.events)
            state.is_limited = not was_late
            if judged.slice_result.over_budget_groups:
                # Of one event Postgres may know in time; else it is slow, and may be that.
                state.max_events = 1
                return
        part, events, verdict = judged.slice, judged.events, judged.slice_result
        limit = self._send_budget.limit_bytes()
        piece = await self._compose(connection, judged, min(limit, _MAX_WRITE_BYTES))
        if connection.is_closed() or self._progress.revision != edition:
            return
        size, state.oversized_message_bytes = piece.batch.size_bytes, 0
        if size > limit and not self._send_budget.admits(size):
            state.oversized_message_bytes, state.unsent = size, judged
            return
        if piece.sent_messages:
            self._write_batch(connection, events, piece.batch, events[0].cursor)
            connection.record_messages_sent(events[0].cursor, piece.sent_messages)
            state.unsent = judged
            return
        is_cut = piece.stop_index < len(events)
        upto = events[piece.stop_index - 1].cursor if is_cut else judged.end_cursor
        unheard = verdict.gap_in(events, range(piece.stop_index), piece.failed_indexes)
        self._write_batch(
            connection, events, piece.batch, self._gap_notifier.position_limit(connection, unheard)
        )
        is_plain = part.gap is None and not part.account_events
        if stands is not None and is_plain and unheard is None and not judged.is_caller_outdated:
            self._cache.store(
                stands, events, piece.batch, upto, judged.budget, checked=judged.checked
            )
        connection.advance(upto)
        connection.record_messages_sent(upto, NO_MESSAGE_KEYS)
        gap = part.gap if part.gap is not None and part.gap.cursor <= upto else None
        self._gap_notifier.notify_slice(connection, gap, unheard, upto)
        if not is_cut and not connection.is_closed():
            # Not before the gap: what may be missed is told to who might have heard it.
            people = [event for event in part.account_events if event.cursor <= upto]
            self._apply_caller_changes(connection, people, "delete")
        # Nor this: who breaks off in between would come back from behind the gap.
        if connection.has_cursor_topic and not connection.is_closed():
            connection.write_cursor_event(upto)
        state.max_events = (
            piece.stop_index if is_cut else min(SLICE_CHANGES, max(1, len(events)) * 2)
        )

    async def _compose(
        self, connection: Connection, evaluated: _EvaluatedSlice, max_bytes: int
    ) -> ConnectionMessages:
        """Make so many bytes of messages; on return readers see the events that can't be shown."""
        events = evaluated.events
        piece = await compose_for_connection(
            self._progress.generation.renderer,
            connection,
            events,
            evaluated.slice_result.hits,
            evaluated.enrichment,
            max_bytes=max_bytes,
        )
        if piece.failed_indexes:
            await self._visibility.wait_until_visible(
                events[place].xid for place in piece.failed_indexes
            )
        return piece

    async def _wait_for_gap_causes(self, evaluated: _EvaluatedSlice) -> None:
        """Wait until readers see what caused the gaps that are about to be told."""
        gap = evaluated.slice.gap
        if gap is not None and gap.cursor > evaluated.end_cursor:
            gap = None
        subscribed = self._progress.generation.subscription_counts
        if causes := gap_xids(gap, evaluated.events, evaluated.slice_result, subscribed):
            await self._visibility.wait_until_visible(causes)

    def _apply_caller_changes(
        self, connection: Connection, account_events: Sequence[Event], action: Action
    ) -> None:
        for event in account_events:
            if event.action == action:
                self._registry.apply_caller_change(connection, event)

    async def _evaluate(
        self, connection: Connection, max_events: int, budget: FilterBudget
    ) -> _EvaluatedSlice:
        """Judge what is next for a connection: so many events, if there are."""
        course = self._progress
        part = slice_prefix(self._next_slice(connection), max_events)
        upto = min(part.end_cursor, course.evaluation_target)
        events = [event for event in part.events if event.cursor <= upto]
        people = [event for event in part.account_events if event.cursor <= upto]
        self._apply_caller_changes(connection, people, "update")
        judged = _EvaluatedSlice(
            part,
            events,
            SliceResult([()] * len(events)),
            NO_ENRICHMENT,
            upto,
            budget,
            course.revision,
            connection.subscriptions,
        )
        by_group = subscriptions_by_group(connection)
        if not events or not by_group:
            return judged
        judge = course.generation.evaluator
        judged.slice_result = await judge.evaluate(events, budget, by_group.keys())

        def sights(groups: Iterable[Group]) -> Iterable[EnrichmentNeed]:
            return (
                (one.expand_viewer, one.bound_manage_rule)
                for group in groups
                for one in by_group[group]
            )

        if not judged.slice_result.over_budget_groups:
            check = self._caller_check_for(connection, events)
            judged.enrichment = await judge.try_enrich(events, judged.slice_result, sights, check)
            judged.checked = check.result
            judged.is_caller_outdated = connection in check.outdated_connections
            seconds = judged.enrichment.related_records.load_seconds
            budget.spend(seconds)
            viewers = (
                one.expand_viewer for one in connection.subscriptions.values() if one.expand_viewer
            )
            course.generation.renderer.record_expand_seconds(viewers, seconds, len(events))
            if outdated := check.outdated_connections.get(connection):
                judge.withhold_expands(events, judged.slice_result, judged.enrichment, outdated)
        return judged

    def _caller_check_for(self, connection: Connection, events: Sequence[Event]) -> CallerCheck:
        """Return what finds out whether the connection's caller is another by now."""
        return CallerCheck(
            self._registry.callers,
            self._progress.generation,
            events=events,
            find_connections=lambda _viewers, _groups: [connection],
        )

    def _may_use_cached(self, connection: Connection, checked: CallerCheckResult | None) -> bool:
        """Whether what was read live for another one that stood there may be shown to this one."""
        person = account_of(connection.caller)
        if checked is None or person is None:
            return True
        generation = self._progress.generation
        collection = generation.collections.get(person[0])
        before = LSN(checked.commit_lsn - 1)
        return checked.is_changelog_complete and (
            collection is None
            or not may_account_have_changed(generation.row_history, collection, person, before)
        )
