"""Reads the changelog in slices, evaluates each and delivers it to the LIVE connections.

One task runs ``Dispatcher.run``; feed wakes it through ``hub.hub``. A connection that is not LIVE,
or cannot receive a slice with the others, reads it from the changelog by itself: ``hub.catchup``.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Collection as Sized
from dataclasses import dataclass, field

import structlog

from pgrealtime.changelog.memory import Changelog
from pgrealtime.changes import Action
from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.hub.catchup.tasks import CatchUpTasks
from pgrealtime.hub.connections.connection import LIVE, Connection, Group, connections_of
from pgrealtime.hub.delivery.compose import ComposedMessages, MessageComposer, enqueue_messages
from pgrealtime.hub.delivery.enrichment import NO_ENRICHMENT, Enrichment, needs_of_groups
from pgrealtime.hub.entry_checks import EntryChecks
from pgrealtime.hub.evaluation.evaluator import EvaluationGap, SliceResult, gap_xids
from pgrealtime.hub.events.event import (
    LIVE_SLICE_CHANGES,
    Event,
    Slice,
    delivery_ranges,
    split_into_slices,
)
from pgrealtime.hub.state.callers import CallerCheck
from pgrealtime.hub.state.gaps import GapNotifier
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.hub.state.resyncs import MirrorResyncs
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import END_ORDINAL, Cursor
from pgrealtime.observe.redact import raise_location

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Dispatcher:
    """Delivers the changelog to the LIVE connections.

    It writes ``progress``; ``hub.hub`` does when a history or a generation begins.
    """

    changelog: Changelog
    progress: DispatchProgress
    registry: ConnectionRegistry
    visibility: VisibilityTracker
    entry_checks: EntryChecks
    gap_notifier: GapNotifier
    resyncs: MirrorResyncs
    catch_up: CatchUpTasks
    clock: Callable[[], float]
    progressed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever the head has moved; a waiter clears it first."""
    _changelog_appended: asyncio.Event = field(default_factory=asyncio.Event)
    _delivered_upto: Cursor = field(init=False)
    """Where the messages end that were delivered last; the head may be before that."""
    _checked_upto: Cursor | None = None
    """Where the entries end that may be evaluated, of those being dispatched."""
    _account_deletions: Sequence[Event] = ()
    """Deletions of accounts that were delivered and not yet applied to their connections."""

    def __post_init__(self) -> None:
        self._delivered_upto = self.changelog.end_cursor

    # --- the loop ---------------------------------------------------------------------------

    def wake(self) -> None:
        """Read on: the changelog has new entries."""
        self._changelog_appended.set()

    async def run(self) -> None:
        """Deliver the changelog to the LIVE connections, for ever."""
        while True:
            await self._changelog_appended.wait()
            # Before reading, so that an entry that is appended meanwhile sets it again.
            self._changelog_appended.clear()
            is_behind = True
            while is_behind:
                if is_behind := self._has_undispatched():
                    await self._dispatch()
                try:
                    await self._write_resyncs()
                except Exception as error:  # noqa: BLE001 (what is left is written later)
                    log.error("resync.failed", error=type(error).__name__, at=raise_location(error))  # noqa: TRY400 (at says where)

    async def _write_resyncs(self) -> None:
        """Tell mirrors to load anew, behind all that was delivered."""
        for connection in self.resyncs.live_to_load():
            with self.registry.closing_on_error(connection):
                self._fall_behind(connection)
        written = await self.resyncs.write_to_live()
        self._write_cursor_events(written, self.progress.head)

    def _has_undispatched(self) -> bool:
        """Whether the changelog has entries after the head; ``_dispatch`` finds why it raises."""
        try:
            return self.progress.head < self.changelog.end_cursor
        except Exception:  # noqa: BLE001 (see _dispatch)
            return True

    async def _dispatch(self) -> None:
        """Deliver some entries. After an error that is no single connection's all catch up."""
        revision = self.progress.revision
        try:
            await self._dispatch_entries()
        except Exception as error:  # noqa: BLE001 (one row, rule or client may not end all)
            log.error("dispatch.failed", error=type(error).__name__, at=raise_location(error))  # noqa: TRY400 (at says where)
            if self.progress.revision == revision:
                # Entries after that may not be visible yet, or have another schema.
                self._fall_behind_all(self._checked_upto or self.changelog.end_cursor)
        finally:
            self._checked_upto = None

    def _fall_behind_all(self, upto: Cursor) -> None:
        """Let every connection read by itself what was not delivered up to a cursor."""
        progress = self.progress
        # Behind the last message that was enqueued: no connection receives it again.
        progress.head = max(progress.head, self._delivered_upto)
        for connection in self.registry.live_connections():
            with self.registry.closing_on_error(connection):
                self._fall_behind(connection)
        self._apply_account_deletions()
        # Changes of accounts up to there may not have been remembered.
        self.registry.callers.forget_changes_upto(upto.lsn)
        # The entries up to there are skipped here. Connections read them one by one, and an error
        # in one's task closes no other.
        progress.restart(upto)
        self.settle()

    def _apply_account_deletions(self) -> None:
        for event in self._account_deletions:
            for connection in list(self.registry.callers.connections_of(event)):
                if connection.cursor >= event.cursor:
                    self.registry.apply_caller_change(connection, event)
        self._account_deletions = ()

    def restart(self) -> None:
        """Begin at the changelog's head: another history has begun."""
        self._delivered_upto = self.changelog.end_cursor
        self._account_deletions = ()

    def settle(self) -> None:
        """Run what waits for the head to move and for no slice to be in evaluation."""
        self.progressed.set()
        self.progress.end_evaluation()
        if self.registry.subscriptions_with_read_point:
            self.registry.clear_passed_read_points()
        self.catch_up.make_caught_up_live()

    # --- slices -----------------------------------------------------------------------------

    async def _dispatch_entries(self) -> None:
        progress, registry = self.progress, self.registry
        revision, generation = progress.revision, progress.generation
        entries = self.changelog.read(progress.head, self.changelog.end_cursor, LIVE_SLICE_CHANGES)
        # Before the first await: a subscribe call may fetch its snapshot meanwhile, and uses it
        # only if it sees all that was recorded here up to the connection's cursor.
        self.visibility.record_delivered(entries)
        entries = await self.entry_checks.leading_valid(entries)
        if progress.revision != revision:
            return  # the loop reads them again, from where the head is then
        if entries:
            self._checked_upto = Cursor(entries[-1].end_lsn, END_ORDINAL)
        collections, fits = generation.collections, generation.shape_checker.fits
        changes = registry.callers.changes_a_caller
        for slice_ in split_into_slices(
            entries,
            progress.head,
            collections,
            changes,
            LIVE_SLICE_CHANGES,
            fits=fits,
            links=generation.matcher.links,
        ):
            # From here on catching up may read the slice, and a connection that has caught up
            # becomes LIVE after it only: this evaluation may have passed its groups already.
            progress.begin_slice(slice_.end_cursor)
            if not await self._dispatch_slice(slice_, revision):
                return
            # After delivery: a deleted account's connections receive its deletion as its own
            # record's, and what follows as guests.
            self._apply_to_live_callers(slice_.account_events, "delete")
            progress.head = slice_.end_cursor
            self.settle()
            self._account_deletions = ()
            # The loop is shared with the feed, catching up and HTTP.
            await asyncio.sleep(0)
            if progress.revision != revision:
                return  # the rest was split by another generation, or is of another history

    async def _dispatch_slice(self, slice_: Slice, revision: int) -> bool:
        """Evaluate and deliver a slice; return whether all of it was delivered."""
        self.progress.generation.report_unknown_columns(slice_.events)
        self._apply_account_changes(slice_)
        result = await self._evaluate(slice_)
        enrichment = await self._enrich(slice_, result)
        subscribed = self.progress.generation.subscription_counts
        if causes := gap_xids(slice_.gap, slice_.events, result, subscribed):
            # A client that is notified of a gap reloads at once and must find its changes.
            await self.visibility.wait_until_visible(causes)
        return await self._compose_and_deliver(slice_, result, enrichment, revision)

    def _apply_account_changes(self, slice_: Slice) -> None:
        """Apply a slice's changes of accounts, and gaps in them, before it is evaluated."""
        callers, gap = self.registry.callers, slice_.gap
        # A subscribe call that was authenticated before this change may be carried out after it;
        # its caller is then brought up to date by what is remembered here.
        for event in slice_.account_events:
            callers.remember_change(event)
        self._apply_to_live_callers(slice_.account_events, "update")
        if gap is None:
            return
        if gap.xid is not None and gap.reason in {"truncate", "schema"}:
            # The other gaps are logged where they arise.
            names = sorted(gap.collections or ())
            log.warning("replication.gap", reason=gap.reason, collections=names)
        collections = self.progress.generation.collections.items()
        # Calls whose callers were read before the gap are refused: their rows may have changed.
        if any(collection.type == "auth" and gap.affects(name) for name, collection in collections):
            callers.forget_changes_upto(gap.cursor.lsn)

    def _apply_to_live_callers(self, account_events: Sequence[Event], action: Action) -> None:
        for event in account_events:
            if event.action == action:
                for connection in self._live_connections_of(event):
                    self.registry.apply_caller_change(connection, event)

    def _live_connections_of(self, account_event: Event) -> list[Connection]:
        connections = self.registry.callers.connections_of(account_event)
        return [connection for connection in connections if connection.state is LIVE]

    async def _evaluate(self, slice_: Slice) -> SliceResult:
        """Evaluate a slice, without the connections whose filters are slow or may be."""
        generation, isolated = self.progress.generation, self.catch_up.isolated
        if generation.matcher.trials.has_untried:
            self._isolate(isolated.with_untried_filters(slice_.events), ())
        result = await generation.evaluator.evaluate_in_chunks(slice_.events)
        if concerns := generation.matcher.concerns:
            result.record_concerned(
                concerns.find(slice_.transactions, slice_.begin_cursor, slice_.end_cursor)
            )
        late, slow = result.over_budget_groups, result.expensive_groups
        if late or slow:
            self._isolate(connections_of(late), connections_of(slow))
        return result

    async def _enrich(self, slice_: Slice, result: SliceResult) -> Enrichment:
        """Load related data. Connections with slow expands, or changed callers, fall behind."""
        enricher = self.progress.generation.enricher
        if not enricher.needs_enrichment(slice_.events, result):
            return NO_ENRICHMENT
        check = self._caller_check_for(slice_, result)
        # LIVE callers whose rows the slice deletes receive it as who they were. A connection that
        # catches up could not: the stream has made it a guest's, and it is notified of a gap.
        deleted = (event for event in slice_.account_events if event.action == "delete")
        is_shared = not any(self._live_connections_of(event) for event in deleted)
        enrichment = await enricher.enrich(
            slice_.events, result, needs_of_groups, check, is_shared=is_shared
        )
        late = _connections_with_viewers(result.hits, enrichment.excluded_viewers)
        self._isolate(late, late)
        for connection in check.outdated_connections:
            # It may have been closed, or begun a call, while related rows were loaded.
            if connection.state is LIVE:
                self._fall_behind(connection)
        return enrichment

    def _caller_check_for(self, slice_: Slice, result: SliceResult) -> CallerCheck:
        def connections(viewers: Sized[ExpandViewer], groups: Sized[Group]) -> Iterable[Connection]:
            receivers = {*_connections_with_viewers(result.hits, viewers), *connections_of(groups)}
            return (connection for connection in receivers if connection.state is LIVE)

        generation = self.progress.generation
        return CallerCheck(self.registry.callers, generation, slice_.events, connections)

    def _isolate(self, late: Iterable[Connection], slow: Iterable[Connection]) -> None:
        """Continue without connections that are late; the filters of ``slow`` took the time."""
        isolated = self.catch_up.isolated
        for connection in slow:
            isolated.isolate_with_backoff(connection)
        for connection in late:
            # Whatever its state: it must not rejoin the others as soon as it has caught up.
            isolated.isolate(connection)
            if connection.state is LIVE:
                self._fall_behind(connection)

    # --- delivery ---------------------------------------------------------------------------

    async def _compose_and_deliver(
        self, slice_: Slice, result: SliceResult, enrichment: Enrichment, revision: int
    ) -> bool:
        """Deliver an evaluated slice in bounded parts; return False if the revision changed."""
        progress, events = self.progress, slice_.events
        # Before the first message, whose position would go past what the mirrors are told.
        self.registry.request_resyncs(result.resync_reasons)
        max_bytes = self.registry.send_budget.per_connection_bytes
        renderer = progress.generation.renderer
        composer = MessageComposer(renderer, events, result.hits, enrichment, max_bytes)
        for indexes in delivery_ranges(events, result.hits):
            stop = indexes.start
            while stop < indexes.stop or not indexes:
                composed = await composer.compose(range(stop, indexes.stop))
                if composed.failed_indexes:
                    # Their subscribers are notified of a gap, and must find them on reloading.
                    await self.visibility.wait_until_visible(
                        events[index].xid for index in composed.failed_indexes
                    )
                # Nothing is awaited from here to the write. Under another revision these groups are
                # not in force any more: by its rules their members may not see these events.
                if progress.revision != revision:
                    return False
                if composed.over_budget_connections:
                    self._isolate(composed.over_budget_connections, composed.expensive_connections)
                stop = self._deliver(slice_, result, composed, first_index=stop)
                if stop == len(events):
                    break
                # A connection that falls behind in the next part reads on from here.
                progress.head = events[stop - 1].cursor
                await asyncio.sleep(0)
        return True

    def _deliver(
        self, slice_: Slice, result: SliceResult, composed: ComposedMessages, *, first_index: int
    ) -> int:
        """Deliver the messages composed of a slice from an event on; return the first index left.

        The slice's gap is sent with the last of them. A gap for events that could not be evaluated
        is sent with the messages of the events around it: a client that breaks off later resumes
        after it.
        """
        events = slice_.events
        receivers = enqueue_messages(composed, events)
        stop = composed.stop_index
        is_last = stop == len(events)
        end_cursor = slice_.end_cursor if is_last else events[stop - 1].cursor
        evaluation_gap = result.gap_in(events, range(first_index, stop), composed.failed_indexes)
        self._flush(receivers, events, evaluation_gap)
        if stop:
            self._delivered_upto = events[stop - 1].cursor
        if is_last:
            self._account_deletions = [
                event for event in slice_.account_events if event.action == "delete"
            ]
        gap = slice_.gap if is_last else None
        if gap is not None or evaluation_gap is not None:
            # Also those whose topics no event matched: the gap may hide one that matches.
            receivers = self.registry.live_connections()
            for connection in receivers:
                with self.registry.closing_on_error(connection):
                    self.gap_notifier.notify_slice(connection, gap, evaluation_gap, end_cursor)
        # After the gap: a client that breaks off in between must not resume behind it.
        self._write_cursor_events(receivers, end_cursor)
        return stop

    def _write_cursor_events(self, connections: Sequence[Connection], cursor: Cursor) -> None:
        for connection in connections:
            if connection.has_cursor_topic and connection.state is LIVE:
                with self.registry.closing_on_error(connection):
                    connection.write_cursor_event(cursor)

    def _flush(
        self,
        receivers: Sequence[Connection],
        events: Sequence[Event],
        evaluation_gap: EvaluationGap | None,
    ) -> None:
        """Write what is queued for connections; those whose send buffer is full fall behind."""
        now, budget = self.clock(), self.registry.send_budget
        limit = budget.limit_bytes()
        for connection in receivers:
            try:
                size, buffered = connection.queued_bytes(), connection.writer.buffered_bytes()
                # A message can't be divided: one that is larger is written when nothing else waits.
                fits = buffered + size <= limit or (
                    not buffered and connection.has_one_queued_message() and budget.admits(size)
                )
                if not fits or not size:  # nothing is queued if it was excluded from the part
                    self._fall_behind(connection)
                    continue
                position_limit = self.gap_notifier.position_limit(connection, evaluation_gap)
                connection.write_queued(events, position_limit, now)
                if buffered + size >= budget.counted_from_bytes:
                    # The less is free, the less the next ones may have waiting.
                    budget.update(connection)
                    limit = budget.limit_bytes()
            except Exception as error:  # noqa: BLE001 (as closing_on_error, which is slower)
                self.registry.close_failed(connection, error)

    def _fall_behind(self, connection: Connection) -> None:
        """Let a LIVE connection read on from the head, which is before what is being delivered."""
        connection.fall_behind(self.progress.head)
        self.catch_up.start_task(connection)


def _connections_with_viewers(
    hits: Iterable[Iterable[Group]], viewers: Sized[ExpandViewer]
) -> set[Connection]:
    """Return the connections of subscriptions among the hits that have one of the viewers."""
    if not viewers:
        return set()
    return {
        subscription.connection
        for group in {group for groups in hits for group in groups}
        for render_group in group.render_groups
        if render_group.render_key[2] in viewers
        for subscription in render_group
    }
