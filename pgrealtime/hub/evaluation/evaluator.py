"""Finds the groups that receive each event of a slice; asks PostgreSQL where rules need it.

The dispatcher evaluates each slice once for all LIVE connections, catch-up evaluates for single
ones. Rules come first and have no bound but ``statement_timeout``. Filters that ask PostgreSQL more
than their rules do follow, within a budget: no connection may make the others wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection as Sized
from collections.abc import Mapping
from datetime import UTC, datetime

import structlog

from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.hub.evaluation.filter_limits import FilterBudget
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.evaluation.queries import HubQueries
from pgrealtime.hub.evaluation.slice_result import SliceResult, collection_names
from pgrealtime.hub.evaluation.toast import RowCompleter
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.slices import SLICE_CHANGES
from pgrealtime.observe.redact import raise_location
from pgrealtime.rules.engine.plan import Specialization

log = structlog.get_logger(__name__)


class SliceEvaluator:
    """Evaluates events by one generation's collections."""

    def __init__(self, queries: HubQueries, matcher: Matcher, completer: RowCompleter) -> None:
        self._queries = queries
        self._matcher = matcher
        self._completer = completer

    async def evaluate(
        self, events: list[Event], budget: FilterBudget, only_groups: Sized[Group] | None = None
    ) -> SliceResult:
        """Return the receivers of events in stream order, among some groups or all.

        Fills in missing columns of the events' rows.
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

        Exceptions propagate to the caller, which lets each connection evaluate alone.
        """
        budget = FilterBudget.for_slice(len(events))
        whole: SliceResult | None = None
        # In chunks, so that the loop's other tasks run in between.
        for first in range(0, len(events), SLICE_CHANGES):
            if first:
                await asyncio.sleep(0)
            chunk = events[first : first + SLICE_CHANGES]
            result = await self._evaluate(chunk, budget, None)
            result.update_gap_indexes(chunk)
            if whole is None:
                whole = result
            else:
                whole.append(result)
        return whole or SliceResult([])

    async def _evaluate(
        self, events: list[Event], budget: FilterBudget, only_groups: Sized[Group] | None
    ) -> SliceResult:
        lacks_columns = self._partial_row_indexes(events)
        result = SliceResult([], partial_row_indexes=lacks_columns)
        if lacks_columns:
            await self._complete_rows(events, result)
        now = datetime.now(UTC)
        evaluation = self._matcher.start_evaluation(
            events, now, only_groups, work_budget=budget.work_budget
        )
        await budget.run_in_process(evaluation)
        result.undecided_collections = await self._queries.answer_questions(evaluation)
        result.hits = [evaluation.hits(index) for index in range(len(events))]
        if lacks_columns:
            result.record_unprovable(evaluation)
        deferred = evaluation.deferred_members
        if self._matcher.has_remote_filters or deferred:
            await self._add_filters(
                events, result, budget, now, groups=only_groups, deferred=deferred
            )
            if result.over_budget_groups and only_groups is None:
                await self._retry_shared_filters(events, result, budget, now)
                self._matcher.trials.record_over_budget(
                    {group.specialization for group in result.over_budget_groups}
                )
        if budget.work_budget.late_members:
            result.over_budget_groups |= budget.work_budget.late_members.keys()
            result.expensive_groups |= budget.work_budget.costly_members.keys()
        result.unprovable_groups -= result.over_budget_groups
        return result

    async def _add_filters(
        self,
        events: list[Event],
        result: SliceResult,
        budget: FilterBudget,
        now: datetime,
        *,
        groups: Sized[Group] | None,
        deferred: Mapping[int, Sized[Group]],
    ) -> None:
        """Add what the filters decide that are evaluated last, as far as the budget allows."""
        filters = self._matcher.start_evaluation(
            events,
            now,
            groups,
            has_remote_filter=True,
            work_budget=budget.work_budget,
            deferred_groups=deferred,
        )
        await budget.run_in_process(filters)
        result.undecided_collections |= await self._queries.answer_questions(filters, budget)
        hits = [filters.hits(index) for index in range(len(events))]
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

    async def _complete_rows(self, events: list[Event], result: SliceResult) -> None:
        indexes = result.partial_row_indexes
        completed = await self._completer.complete([events[index] for index in indexes])
        result.failed_collections = completed.unreadable_collections
        result.partial_row_indexes = [
            index for index in indexes if not completed.is_row_complete(events[index])
        ]

    async def _retry_shared_filters(
        self, events: list[Event], result: SliceResult, budget: FilterBudget, now: datetime
    ) -> None:
        """Evaluate filters again, with more time, that are over budget and widely used."""
        # If each of their connections evaluated them alone, it would take longer in all.
        counts: Counter[Specialization] = Counter()
        for group in result.over_budget_groups:
            if group.specialization.has_remote_filter:
                counts[group.specialization] += group.shared_subscription_count
        retried = {
            group
            for group in result.over_budget_groups
            if counts[group.specialization] >= MANY_CONNECTIONS
        }
        if not retried:
            return
        # What the first attempt found of them is incomplete, and replaced by the second's.
        result.hits = [
            tuple(group for group in groups if group not in retried) for groups in result.hits
        ]
        result.over_budget_groups -= retried
        await self._add_filters(
            events, result, budget.for_shared_filters(), now, groups=retried, deferred={}
        )
