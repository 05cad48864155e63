"""Finds the groups that receive each event of a slice; asks PostgreSQL where rules need it.

The dispatcher evaluates each slice once for all LIVE connections, catch-up evaluates for single
ones. Rules come first and have no bound but ``statement_timeout``. Filters that ask PostgreSQL more
than their rules do follow, within a budget: no connection may make the others wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection as Sized
from collections.abc import Iterable
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
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import Specialization

log = structlog.get_logger(__name__)


class SliceEvaluator:
    """Evaluates events by one generation's collections.

    Args:
        queries: Answers questions about rules.
        matcher: Holds the groups.
        completer: Fills in columns that the WAL left out.
    """

    def __init__(self, queries: HubQueries, matcher: Matcher, completer: RowCompleter) -> None:
        self._queries = queries
        self._matcher = matcher
        self._completer = completer

    async def evaluate(
        self, events: list[Event], budget: FilterBudget, only_groups: Sized[Group] | None = None
    ) -> SliceResult:
        """Return the receivers of the events; fills in missing columns of their rows.

        A defect in one rule or row ends no connection: then all the events count as failed.

        Args:
            events: In stream order.
            budget: For filters.
            only_groups: The only groups to evaluate; None is all.
        """
        try:
            result = await self._evaluate(events, budget, only_groups)
        except Exception as error:  # noqa: BLE001 (see above)
            log.error("evaluation.failed", error=type(error).__name__, at=raise_location(error))  # noqa: TRY400 (a traceback may show a row)
            result = SliceResult([()] * len(events), failed_collections=collection_names(events))
        result.update_gap_indexes(events)
        return result

    async def evaluate_in_chunks(self, events: list[Event]) -> SliceResult:
        """Return the receivers of a slice's events, evaluated for all connections.

        At most ``SLICE_CHANGES`` are evaluated at once, so that the loop's other tasks run in
        between. Exceptions propagate to the caller, which lets each connection evaluate alone.
        """
        budget = FilterBudget.for_slice(len(events))
        whole: SliceResult | None = None
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
        result.hits = _hits_per_event(evaluation, len(events))
        if lacks_columns:
            result.record_unprovable(evaluation)
        deferred = evaluation.deferred_members
        if self._matcher.has_remote_filters or deferred:
            filters = self._matcher.start_evaluation(
                events,
                now,
                only_groups,
                has_remote_filter=True,
                work_budget=budget.work_budget,
                deferred_groups=deferred,
            )
            await self._add_filters(filters, result, budget)
            if lacks_columns:
                result.record_unprovable(filters)
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
        self, filters: Evaluation[int, Group], result: SliceResult, budget: FilterBudget
    ) -> None:
        """Add what the filters decide that are evaluated last, as far as the budget allows."""
        await budget.run_in_process(filters)
        result.undecided_collections |= await self._queries.answer_questions(filters, budget)
        result.hits = _merge_hits(result.hits, _hits_per_event(filters, len(result.hits)))
        result.over_budget_groups = filters.undecided_members

    def _partial_row_indexes(self, events: list[Event]) -> list[int]:
        """Return the indexes of events with subscriptions whose rows lack columns.

        Of a delete nothing more can be read; its rules see what the replica identity logs.
        """
        return [
            index
            for index, event in enumerate(events)
            if event.action != "delete"
            and event.missing_columns
            and self._matcher.has_subscriptions(event.collection)
        ]

    async def _complete_rows(self, events: list[Event], result: SliceResult) -> None:
        """Fill in what can be proved of the partial rows; the others stay partial."""
        indexes = result.partial_row_indexes
        completed = await self._completer.complete([events[index] for index in indexes])
        result.failed_collections = completed.unreadable_collections
        result.partial_row_indexes = [
            index for index in indexes if not completed.is_row_complete(events[index])
        ]

    async def _retry_shared_filters(
        self, events: list[Event], result: SliceResult, budget: FilterBudget, now: datetime
    ) -> None:
        """Evaluate filters again, with more time, that are over budget and widely used.

        If each of their connections evaluated them alone, it would take longer in all.
        """
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
        filters = self._matcher.start_evaluation(
            events,
            now,
            retried,
            has_remote_filter=True,
            work_budget=budget.work_budget,
            deferred_groups={},
        )
        await budget.run_in_process(filters)
        result.undecided_collections |= await self._queries.answer_questions(
            filters, budget.for_shared_filters()
        )
        # What the first attempt found of them is incomplete, and replaced by the second's.
        others = [
            tuple(group for group in groups if group not in retried) for groups in result.hits
        ]
        result.hits = _merge_hits(others, _hits_per_event(filters, len(events)))
        result.over_budget_groups = (
            result.over_budget_groups - retried
        ) | filters.undecided_members
        result.record_unprovable(filters)


def _hits_per_event(evaluation: Evaluation[int, Group], event_count: int) -> list[Iterable[Group]]:
    return [evaluation.hits(index) for index in range(event_count)]


def _merge_hits(
    first_hits: Iterable[Iterable[Group]], second_hits: Iterable[Iterable[Group]]
) -> list[Iterable[Group]]:
    return [(*a, *b) if b else a for a, b in zip(first_hits, second_hits, strict=True)]
