"""Reads and evaluates the next slice of one connection that catches up; called by its task.

Connections at the same cursor often have the same topics: ``CatchUpCache`` keeps the messages that
one of them was just sent, for the others.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import Struct

from pgrealtime.auth.principal import account_of
from pgrealtime.changelog.memory import Changelog
from pgrealtime.changes import Action
from pgrealtime.errors import ChangelogError
from pgrealtime.hub.connections.connection import Connection, Group, Subscription
from pgrealtime.hub.connections.group import RenderKey
from pgrealtime.hub.connections.output import MessageBatch
from pgrealtime.hub.delivery.compose import subscriptions_by_group
from pgrealtime.hub.delivery.enrichment import NO_ENRICHMENT, Enrichment, EnrichmentNeed
from pgrealtime.hub.evaluation.evaluator import SliceResult, gap_xids
from pgrealtime.hub.evaluation.filter_limits import FilterBudget
from pgrealtime.hub.events.event import (
    SLICE_CHANGES,
    Event,
    GapNotice,
    Slice,
    slice_prefix,
    split_into_slices,
)
from pgrealtime.hub.state.callers import CallerCheck, CallerCheckResult
from pgrealtime.hub.state.generation import Generation
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import Cursor


class EvaluatedSlice(Struct):
    """The events that follow a connection's cursor, evaluated for its subscriptions."""

    events: list[Event]
    account_events: Sequence[Event]
    """Those of them that may change its caller."""
    gap: GapNotice | None
    """After the events, if ``end_cursor`` reaches it."""
    end_cursor: Cursor
    budget: FilterBudget
    revision: int
    subscriptions: Mapping[str, Subscription]
    """By topic, those for which it was evaluated."""
    result: SliceResult
    enrichment: Enrichment
    caller_check: CallerCheckResult | None = None
    """None if nothing that was read live depends on the caller."""
    is_caller_outdated: bool = False
    """Whether its caller has changed in the database."""

    def continues(self, connection: Connection, revision: int) -> bool:
        """Whether the connection was sent part of its first change and must be sent the rest."""
        return (
            self.revision == revision
            and self.subscriptions is connection.subscriptions
            and connection.is_amid_change()
            and connection.cursor < self.events[0].cursor
            and bool(connection.messages_sent_of(self.events[0].cursor))
        )


@dataclass(eq=False)
class SliceReader:
    """Reads slices from the changelog at connections' own cursors."""

    changelog: Changelog
    progress: DispatchProgress
    registry: ConnectionRegistry
    visibility: VisibilityTracker

    async def read(
        self, connection: Connection, max_events: int, budget: FilterBudget
    ) -> EvaluatedSlice:
        """Evaluate what follows the cursor; update the caller to that. Its lock is held."""
        slice_ = slice_prefix(self._next_slice(connection), max_events)
        # Nothing beyond the dispatcher's target: each event is evaluated either there or here.
        end = min(slice_.end_cursor, self.progress.evaluation_target)
        events = [event for event in slice_.events if event.cursor <= end]
        evaluated = EvaluatedSlice(
            events,
            [event for event in slice_.account_events if event.cursor <= end],
            slice_.gap if slice_.gap is not None and slice_.gap.cursor <= end else None,
            end,
            budget,
            self.progress.revision,
            connection.subscriptions,
            SliceResult([()] * len(events)),
            NO_ENRICHMENT,
        )
        self._request_identity_resyncs(connection, evaluated.account_events)
        # Before the evaluation; a deletion is applied once the slice was delivered.
        self.apply_caller_changes(connection, evaluated.account_events, "update")
        await self._evaluate(connection, evaluated)
        if concerns := self.progress.generation.matcher.concerns:
            evaluated.result.record_concerned(
                concerns.find(slice_.transactions, slice_.begin_cursor, end)
            )
        subscribed = self.progress.generation.subscription_counts
        if causes := gap_xids(evaluated.gap, events, evaluated.result, subscribed):
            # A client that is notified of a gap reloads at once and must find its changes.
            await self.visibility.wait_until_visible(causes)
        return evaluated

    def _next_slice(self, connection: Connection) -> Slice:
        try:
            target = self.progress.evaluation_target
            entries = self.changelog.read(connection.cursor, target, SLICE_CHANGES)
        except ChangelogError:
            # It read too slowly for the changelog's window, and goes on from where that begins.
            floor = self.changelog.floor
            return Slice([], GapNotice(None, "expired", floor), floor, connection.cursor, [])

        def changes_caller(event: Event) -> bool:
            caller, read_point = connection.caller, connection.caller_read_point
            return self.registry.callers.caller_after(event, caller, read_point) is not caller

        # The first slice of the entries only, so that all connections at a cursor read the same:
        # what follows may be split by a caller that this one changes.
        generation, cursor = self.progress.generation, connection.cursor
        fits = generation.shape_checker.fits
        links = generation.matcher.links
        slices = split_into_slices(
            entries, cursor, generation.collections, changes_caller, fits=fits, links=links
        )
        return next(slices)

    async def _evaluate(self, connection: Connection, evaluated: EvaluatedSlice) -> None:
        events, budget = evaluated.events, evaluated.budget
        by_group = subscriptions_by_group(connection)
        if not events or not by_group:
            return
        # Both steps by one generation: a reload in between would not know these groups.
        generation = self.progress.generation
        evaluated.result = await generation.evaluator.evaluate(events, budget, by_group.keys())
        if not evaluated.result.over_budget_groups:
            await self._enrich(connection, evaluated, by_group, generation)

    async def _enrich(
        self,
        connection: Connection,
        evaluated: EvaluatedSlice,
        by_group: Mapping[Group, Sequence[Subscription]],
        generation: Generation,
    ) -> None:
        events = evaluated.events

        def needs(groups: Iterable[Group]) -> Iterable[EnrichmentNeed]:
            return (
                (subscription.expand_viewer, subscription.bound_manage_rule)
                for group in groups
                for subscription in by_group[group]
            )

        check = CallerCheck(
            self.registry.callers, generation, events, lambda _viewers, _groups: [connection]
        )
        evaluated.enrichment = enrichment = await generation.enricher.try_enrich(
            events, evaluated.result, needs, check
        )
        evaluated.caller_check = check.result
        evaluated.is_caller_outdated = connection in check.outdated_connections
        seconds = enrichment.related_records.load_seconds
        evaluated.budget.spend(seconds)
        viewers = (
            own.expand_viewer for own in connection.subscriptions.values() if own.expand_viewer
        )
        generation.enricher.record_expand_seconds(viewers, seconds, len(events))
        if outdated := check.outdated_connections.get(connection):
            generation.enricher.withhold_expands(events, evaluated.result, enrichment, outdated)

    def _request_identity_resyncs(
        self, connection: Connection, account_events: Sequence[Event]
    ) -> None:
        """Have mirrors loaded anew that resumed and were others' before the caller's row changed.

        Its row was read when the call was authenticated, so the change itself changes nothing now.
        """
        callers, caller = self.registry.callers, connection.caller
        read_point = connection.caller_read_point
        for event in account_events:
            if (
                event.account_key == account_of(caller)
                and read_point is not None
                and not read_point.predates(event.xid, event.cursor.lsn)
                and callers.caller_before(event, caller) != caller
            ):
                for subscription in connection.subscriptions.values():
                    group = subscription.group
                    is_resumed = subscription.read_point is None
                    if is_resumed and (group is None or group.specialization.reads_caller):
                        self.registry.request_resync(subscription, "identity")

    def apply_caller_changes(
        self, connection: Connection, account_events: Sequence[Event], action: Action
    ) -> None:
        """Apply the events of one action to the connection's caller."""
        for event in account_events:
            if event.action == action:
                self.registry.apply_caller_change(connection, event)


_MAX_AGE_SECONDS = 1.0
"""Seconds. Rules query the database as it is now; the answers in the cache may be so old."""
_MAX_BYTES = 16 * 1024 * 1024
"""Of messages in the cache."""


class CatchUpCacheKey(NamedTuple):
    """What decides the messages a connection receives next; equal keys mean equal bytes."""

    revision: int
    cursor: Cursor
    group: Group
    render_key: RenderKey


class CachedSlice(NamedTuple):
    """The messages that follow one key."""

    events: Sequence[Event]
    batch: MessageBatch
    end_cursor: Cursor
    budget: FilterBudget
    """Used to evaluate them: the filters of each connection that receives them take as long."""
    stored_at: float
    """Monotonic seconds."""
    size_bytes: int
    checked: CallerCheckResult | None
    """What was found out about the caller for whom it was made, if rules depend on the caller."""


def catch_up_cache_key(connection: Connection, revision: int) -> CatchUpCacheKey | None:
    """Return the connection's key; None if its messages differ from those of all others.

    They do with several topics, with an own record, and soon after a topic was added.
    """
    if len(connection.subscriptions) != 1:
        return None
    (subscription,) = connection.subscriptions.values()
    if subscription.group is None or subscription.own_record_id:
        return None
    if subscription.mirror is not None and subscription.mirror.pending_reason:
        return None
    read_point = subscription.read_point
    if read_point is not None and connection.cursor.lsn <= read_point.insert_lsn:
        return None
    return CatchUpCacheKey(revision, connection.cursor, subscription.group, subscription.render_key)


class CatchUpCache:
    """The last few slices; the clock is monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slices: OrderedDict[CatchUpCacheKey, CachedSlice] = OrderedDict()
        self._total_bytes = 0

    def get(self, key: CatchUpCacheKey) -> CachedSlice | None:
        """Return what follows the key, if it is recent."""
        cached = self._slices.get(key)
        if cached is None or self._clock() - cached.stored_at > _MAX_AGE_SECONDS:
            return None
        return cached

    def store(
        self,
        key: CatchUpCacheKey,
        events: Sequence[Event],
        batch: MessageBatch,
        end_cursor: Cursor,
        budget: FilterBudget,
        *,
        checked: CallerCheckResult | None,
    ) -> None:
        """Store what follows the key; the oldest are evicted."""
        now = self._clock()
        old = self._slices.pop(key, None)
        size = sum(map(len, batch.tails))
        self._slices[key] = CachedSlice(events, batch, end_cursor, budget, now, size, checked)
        self._total_bytes += size - (0 if old is None else old.size_bytes)
        while self._slices:
            oldest_key, oldest = next(iter(self._slices.items()))
            # By age too: a slice without messages has no size, but holds its events in memory.
            if self._total_bytes <= _MAX_BYTES and now - oldest.stored_at <= _MAX_AGE_SECONDS:
                return
            del self._slices[oldest_key]
            self._total_bytes -= oldest.size_bytes

    def clear(self) -> None:
        """Evict all; called when no connection catches up any more."""
        self._slices.clear()
        self._total_bytes = 0
