"""Finds the groups that receive each event of a slice; asks PostgreSQL where rules need it.

The dispatcher evaluates each slice once for all LIVE connections, catch-up evaluates for single
ones. Rules come first and have no bound but ``statement_timeout``. Filters that ask PostgreSQL more
than their rules do follow, within a budget: no connection may make the others wait. A
``SliceResult`` is delivered; connections are notified of the ``EvaluationGap`` in it
(``hub.state.gaps``).
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection as Sized
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import structlog
from msgspec import Struct

from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.hub.evaluation.filter_limits import FilterBudget
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.evaluation.mirrors import (
    ImageVerdicts,
    MirrorEvents,
    row_images,
    with_mirror_events,
)
from pgrealtime.hub.evaluation.toast import RowCompleter
from pgrealtime.hub.events.event import SLICE_CHANGES, Event, GapNotice
from pgrealtime.lsn import Cursor, Xid
from pgrealtime.observe.redact import raise_location
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import Specialization

log = structlog.get_logger(__name__)


class SliceEvaluator:
    """Evaluates events by one generation's collections."""

    def __init__(self, queries: QueryExecutor, matcher: Matcher, completer: RowCompleter) -> None:
        self._queries = queries
        self._matcher = matcher
        self._completer = completer

    async def evaluate(
        self, events: list[Event], budget: FilterBudget, only_groups: Sized[Group] | None = None
    ) -> SliceResult:
        """Return the receivers of events in stream order, of some groups; complete their rows.

        Events that mirrors alone receive are inserted into ``events``, each behind its change's.
        Superseded ones are removed.
        """
        try:
            result = await self._evaluate(events, budget, only_groups)
        except Exception as error:  # noqa: BLE001 (a defect in one rule or row ends no connection)
            log.error("evaluation.failed", error=type(error).__name__, at=raise_location(error))  # noqa: TRY400 (a traceback may show a row)
            result = SliceResult([()] * len(events), failed_collections=collection_names(events))
        result.update_gap_indexes(events)
        return result

    async def evaluate_in_chunks(self, events: list[Event]) -> SliceResult:
        """Return the receivers of a slice's events, evaluated for all connections.

        As ``evaluate`` does, it completes rows and inserts events. Exceptions propagate to the
        caller, which lets each connection evaluate alone.
        """
        budget = FilterBudget.for_slice(len(events))
        whole: SliceResult | None = None
        evaluated: list[Event] = []
        # In chunks, so that the loop's other tasks run in between.
        for first in range(0, len(events), SLICE_CHANGES):
            if first:
                await asyncio.sleep(0)
            chunk = events[first : first + SLICE_CHANGES]
            result = await self._evaluate(chunk, budget, None)
            result.update_gap_indexes(chunk)
            evaluated += chunk
            if whole is None:
                whole = result
            else:
                whole.append(result)
        events[:] = evaluated
        return whole or SliceResult([])

    async def _evaluate(
        self, events: list[Event], budget: FilterBudget, only_groups: Sized[Group] | None
    ) -> SliceResult:
        relinked = [one for one in events if one.is_relinked] if self._matcher.links else []
        if relinked:
            self._drop_unreceived(events, relinked)
        lacks_columns = self._partial_row_indexes(events)
        result = SliceResult([], partial_row_indexes=lacks_columns)
        if lacks_columns:
            await self._complete_rows(events, result)
        if relinked:
            self._drop_superseded(events, result)
        search = _Search(events, datetime.now(UTC), budget, only_groups)
        await self._find_receivers(search, result)
        if relinked:
            result.withhold_unread(events)
        if lacks_columns:
            result.record_unprovable(search.evaluations[0])
        if self._matcher.has_mirrors:
            await self._add_mirror_events(search, result)
        if budget.work_budget.late_members:
            result.over_budget_groups |= budget.work_budget.late_members.keys()
            result.expensive_groups |= budget.work_budget.costly_members.keys()
        result.unprovable_groups -= result.over_budget_groups
        return result

    async def _find_receivers(self, search: _Search, result: SliceResult) -> None:
        """Find the groups that may see the search's rows."""
        events, budget = search.events, search.budget
        evaluation = self._matcher.start_evaluation(
            events,
            search.now,
            search.only_groups,
            of_mirrors=search.of_mirrors,
            work_budget=budget.work_budget,
        )
        search.evaluations.append(evaluation)
        await budget.run_in_process(evaluation)
        result.undecided_collections = await self._queries.answer_questions(evaluation)
        result.hits = [evaluation.hits(index) for index in range(len(events))]
        deferred = evaluation.deferred_members
        if self._matcher.has_remote_filters or deferred:
            await self._add_filters(search, result, deferred=deferred)
            if result.over_budget_groups and search.only_groups is None:
                await self._retry_shared_filters(search, result)
                self._matcher.trials.record_over_budget(
                    {group.specialization for group in result.over_budget_groups}
                )

    async def _add_mirror_events(self, search: _Search, result: SliceResult) -> None:
        """Insert the events of mirrors, with their receivers, into the search's events."""
        events, matcher = search.events, self._matcher
        collections = {event.collection.name: event.collection for event in events}
        names = {name for name, one in collections.items() if matcher.has_mirrors_of(one)}
        if search.only_groups is not None:
            names &= {g.specialization.collection.name for g in search.only_groups if g.is_mirror}
        images = row_images(events, {name: matcher.columns_of_mirrors(name) for name in names})
        if not images.events:
            return
        of_images = replace(search, events=images.events, of_mirrors=True, evaluations=[])
        found = SliceResult([])
        await self._find_receivers(of_images, found)
        result.over_budget_groups |= found.over_budget_groups
        verdicts = ImageVerdicts(found.hits, of_images.evaluations)
        mirrored = with_mirror_events(events, result.hits, images, verdicts)
        events[:] = mirrored.events
        result.replace_hits(mirrored)
        groups = mirrored.undecided
        if found.undecided_collections:
            groups.update(self._dependent_mirrors(search, found.undecided_collections))
        result.resync_reasons |= dict.fromkeys(groups - found.over_budget_groups, "unknown")
        # Where clients are mirrors that didn't ask, they are notified as of other topics.
        always = {name for name in names if collections[name].mirrors == "always"}
        if always:
            result.undecided_collections |= found.undecided_collections & always
            result.record_unproven(mirrored, always)

    def _dependent_mirrors(self, search: _Search, names: Iterable[str]) -> Iterator[Group]:
        """Yield the groups of mirrors of some collections whose verdicts depend on answers."""
        for name in names:
            groups = search.only_groups
            for group in self._matcher.mirror_groups(name) if groups is None else groups:
                is_of_name = group.is_mirror and group.specialization.collection.name == name
                # A rule whose formula is True admits every caller to every row.
                if is_of_name and group.specialization.formula is not True:
                    yield group

    async def _add_filters(
        self, search: _Search, result: SliceResult, *, deferred: Mapping[int, Sized[Group]]
    ) -> None:
        """Add what the filters decide that are evaluated last, as far as the budget allows."""
        budget = search.budget
        filters = self._matcher.start_evaluation(
            search.events,
            search.now,
            search.only_groups,
            has_remote_filter=True,
            of_mirrors=search.of_mirrors,
            work_budget=budget.work_budget,
            deferred_groups=deferred,
        )
        search.evaluations.append(filters)
        await budget.run_in_process(filters)
        result.undecided_collections |= await self._queries.answer_questions(filters, budget)
        hits = [filters.hits(index) for index in range(len(search.events))]
        result.hits = [(*a, *b) if b else a for a, b in zip(result.hits, hits, strict=True)]
        result.over_budget_groups |= filters.undecided_members
        result.record_unprovable(filters)

    def _partial_row_indexes(self, events: list[Event]) -> list[int]:
        """Return the indexes of events with subscriptions whose rows lack columns."""
        # Of a delete nothing more can be read; its rules see what the replica identity logs.
        return [
            index
            for index, event in enumerate(events)
            if event.action != "delete"
            and event.missing_columns
            and self._matcher.has_subscriptions(event.collection)
        ]

    def _drop_unreceived(self, events: list[Event], relinked: Iterable[Event]) -> None:
        """Remove updates by links that no subscription is about: their rows needn't be read."""
        unreceived = {
            id(event)
            for event in relinked
            if not self._matcher.has_subscriptions_to(event.collection, event.record_id)
        }
        if unreceived:
            events[:] = [event for event in events if id(event) not in unreceived]

    def _drop_superseded(self, events: list[Event], result: SliceResult) -> None:
        """Remove the superseded events; mirrors that they may concern load their lists anew."""
        superseded = [event for event in events if event.is_superseded]
        if not superseded:
            return
        partial = {id(events[index]) for index in result.partial_row_indexes}
        events[:] = [event for event in events if not event.is_superseded]
        result.partial_row_indexes = [n for n, one in enumerate(events) if id(one) in partial]
        for event in superseded:
            result.record_concerned(self._matcher.concerns.find_relinked(event))

    async def _complete_rows(self, events: list[Event], result: SliceResult) -> None:
        indexes = result.partial_row_indexes
        completed = await self._completer.complete([events[index] for index in indexes])
        result.failed_collections = completed.unreadable_collections
        result.partial_row_indexes = [
            index for index in indexes if not completed.is_row_complete(events[index])
        ]

    async def _retry_shared_filters(self, search: _Search, result: SliceResult) -> None:
        """Evaluate filters again, with more time, that are over budget and widely used."""
        # If each of their connections evaluated them alone, it would take longer in all.
        counts: Counter[Specialization] = Counter()
        for group in result.over_budget_groups:
            if group.specialization.has_remote_filter:
                counts[group.specialization] += group.shared_subscription_count
        late = result.over_budget_groups
        retried = {group for group in late if counts[group.specialization] >= MANY_CONNECTIONS}
        if not retried:
            return
        # What the first attempt found of them is incomplete, and replaced by the second's.
        result.hits = [tuple(group for group in hit if group not in retried) for hit in result.hits]
        result.over_budget_groups -= retried
        budget = search.budget.for_shared_filters()
        retry = replace(search, budget=budget, only_groups=retried)
        await self._add_filters(retry, result, deferred={})


@dataclass(frozen=True, slots=True)
class _Search:
    """Rows whose receivers are to be found."""

    events: list[Event]
    now: datetime
    budget: FilterBudget
    only_groups: Sized[Group] | None
    of_mirrors: bool = False
    """Whether of mirrors, or of the other subscriptions."""
    evaluations: list[Evaluation[int, Group]] = field(default_factory=list)
    """Those that searched."""


_NO_NAMES: frozenset[str] = frozenset()
_NO_GROUPS: frozenset[Group] = frozenset()


class SliceResult(Struct):
    """The receivers of a slice's events; indexes are those of the events in the slice."""

    hits: list[Iterable[Group]]
    """Per event, the groups that receive it."""
    undecided_collections: frozenset[str] = _NO_NAMES
    """Names of collections whose rules could not be asked: connections that depend on the answers
    may miss events of them."""
    failed_collections: frozenset[str] = _NO_NAMES
    """Names of collections of which any connection may miss events."""
    over_budget_groups: frozenset[Group] = _NO_GROUPS
    """Groups whose filters exceeded the budget: their connections must evaluate them alone."""
    expensive_groups: frozenset[Group] = _NO_GROUPS
    """Those of them whose own filters took that long in the process."""
    unprovable_groups: frozenset[Group] = _NO_GROUPS
    """Groups that may miss events, as their rules read columns whose values are unknown."""
    incomplete_expands: frozenset[tuple[Group, ExpandViewer]] = frozenset()
    """Groups' viewers who may miss related records."""
    unproven_indexes: Sequence[int] = ()
    """Events that the groups and viewers of the two sets above may miss."""
    partial_row_indexes: Sequence[int] = ()
    """Events whose rows lack columns."""
    gap_indexes: Sequence[int] = ()
    """All events that any connection may miss, ascending."""
    resync_reasons: dict[Group, str] = {}
    """Groups of mirrors that must load their lists anew, and why."""

    def append(self, part: SliceResult) -> None:
        """Append the result of the events that follow those of this one."""
        first = len(self.hits)
        self.hits += part.hits
        self.undecided_collections |= part.undecided_collections
        self.failed_collections |= part.failed_collections
        self.over_budget_groups |= part.over_budget_groups
        self.expensive_groups |= part.expensive_groups
        self.unprovable_groups |= part.unprovable_groups
        self.incomplete_expands |= part.incomplete_expands
        self.unproven_indexes = _appended(self.unproven_indexes, part.unproven_indexes, first)
        partial = _appended(self.partial_row_indexes, part.partial_row_indexes, first)
        self.partial_row_indexes = partial
        self.gap_indexes = _appended(self.gap_indexes, part.gap_indexes, first)
        self.resync_reasons |= part.resync_reasons

    def withhold_unread(self, events: Sequence[Event]) -> None:
        """Send no event whose row could not be read; connections are notified of a gap."""
        for index in [index for index in self.partial_row_indexes if events[index].is_unread]:
            self.hits[index] = ()
            self.failed_collections |= {events[index].collection.name}

    def replace_hits(self, mirrored: MirrorEvents) -> None:
        """Replace the receivers by those of a slice with the events of mirrors."""
        self.hits = mirrored.hits
        new, copied = mirrored.new_indexes, mirrored.copied_indexes
        self.unproven_indexes = [new[index] for index in self.unproven_indexes]
        partial = {new[index] for index in self.partial_row_indexes}
        copies = (copy for copy, original in copied.items() if original in partial)
        self.partial_row_indexes = sorted([*partial, *copies])

    def record_unproven(self, mirrored: MirrorEvents, collection_names: Sized[str]) -> None:
        """Record mirrors of some collections that may miss an event."""
        for index, groups in mirrored.unproven.items():
            if groups and mirrored.events[index].collection.name in collection_names:
                self.unproven_indexes = [*self.unproven_indexes, index]
                self.unprovable_groups |= groups - self.over_budget_groups

    def record_unprovable(self, evaluation: Evaluation[int, Group]) -> None:
        """Record the groups whose rules read missing columns; once no question is open."""
        indexes, groups = evaluation.members_missing_columns()
        self.unproven_indexes = [*self.unproven_indexes, *indexes]
        self.unprovable_groups |= groups - self.over_budget_groups

    def record_failed_enrichment(
        self, events: Sequence[Event], failed: Iterable[tuple[int, ExpandViewer | None]]
    ) -> None:
        """Record what could not be loaded: an event's index, and who lacks it; None is everyone."""
        viewers_by_index: defaultdict[int, set[ExpandViewer | None]] = defaultdict(set)
        for index, viewer in failed:
            viewers_by_index[index].add(viewer)
        unprovable: set[Group] = set()
        incomplete: set[tuple[Group, ExpandViewer]] = set()
        for index, viewers in viewers_by_index.items():
            groups = self.hits[index]
            if None in viewers:
                unprovable.update(groups)
            incomplete.update(
                (group, viewer)
                for group in groups
                for render_group in group.render_groups
                if (viewer := render_group.render_key[2]) and viewer in viewers
            )
        self.unprovable_groups |= unprovable
        self.incomplete_expands |= incomplete
        self.unproven_indexes = [*self.unproven_indexes, *viewers_by_index]
        self.update_gap_indexes(events)

    def update_gap_indexes(self, events: Sequence[Event]) -> None:
        """Derive ``gap_indexes`` from what was recorded so far."""
        names = self.undecided_collections | self.failed_collections
        if names or self.unproven_indexes:
            unproven = frozenset(self.unproven_indexes)
            self.gap_indexes = [
                index
                for index, event in enumerate(events)
                if index in unproven or event.collection.name in names
            ]

    def record_concerned(self, groups: Iterable[Group]) -> None:
        """Record groups of mirrors that changes of related rows concern."""
        for group in groups:
            self.resync_reasons.setdefault(group, "related")

    def gap_in(
        self, events: Sequence[Event], event_indexes: range, failed_indexes: Sequence[int] = ()
    ) -> EvaluationGap | None:
        """Return what connections must be notified of for some of the events; None if nothing.

        ``failed_indexes`` are, ascending, those that can't be rendered for some connection.
        """
        in_range = [index for index in self.gap_indexes if index in event_indexes]
        if not in_range and not failed_indexes:
            return None
        names = collection_names(events[index] for index in in_range)
        first = min([*in_range[:1], *failed_indexes[:1]])
        has_unproven = any(index in event_indexes for index in self.unproven_indexes)
        return EvaluationGap(
            undecided_collections=self.undecided_collections & names,
            failed_collections=(self.failed_collections & names)
            | collection_names(events[index] for index in failed_indexes),
            unprovable_groups=self.unprovable_groups if has_unproven else _NO_GROUPS,
            incomplete_expands=self.incomplete_expands if has_unproven else frozenset(),
            first_cursor=events[first].cursor,
        )


class EvaluationGap(Struct, frozen=True):
    """Events that connections may miss and must be notified of; fields as of ``SliceResult``."""

    undecided_collections: frozenset[str]
    failed_collections: frozenset[str]
    unprovable_groups: frozenset[Group]
    incomplete_expands: frozenset[tuple[Group, ExpandViewer]]
    first_cursor: Cursor
    """Of the first event: no position may pass it before its connection is notified."""


def gap_xids(
    gap: GapNotice | None,
    events: Sequence[Event],
    result: SliceResult,
    subscription_counts: Mapping[str, int],
) -> set[Xid]:
    """Return the transactions that must be visible before connections are notified of gaps.

    A client that reloads when it is notified must see what it missed.
    """
    # Gaps of collections without subscriptions notify nobody, so nothing waits for them.
    missed = (events[index] for index in result.gap_indexes)
    xids = {event.xid for event in missed if subscription_counts.get(event.collection.name)}
    if (
        gap is not None
        and gap.xid is not None
        and any(map(subscription_counts.get, gap.collections or ()))
    ):
        xids.add(gap.xid)
    return xids


def collection_names(events: Iterable[Event]) -> frozenset[str]:
    """Return the names of the events' collections."""
    return frozenset(event.collection.name for event in events)


def _appended(indexes: Sequence[int], more: Sequence[int], first: int) -> Sequence[int]:
    return [*indexes, *(first + index for index in more)] if more else indexes
