"""Who may receive events, and what is shown beside their rows; where needed Postgres is asked."""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from collections.abc import Collection as Sized
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Protocol, TypeAlias

import structlog

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, unpadded_id
from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.hub.delivery.render import (
    NO_ENRICHMENT,
    Enrichment,
    EnrichmentNeed,
    LiveRowEvent,
    RecordRenderer,
)
from pgrealtime.hub.evaluation.filter_budget import FilterBudget
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.evaluation.slice_result import SliceResult, collection_names
from pgrealtime.hub.evaluation.toast import RowCompleter
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.slices import SLICE_CHANGES
from pgrealtime.lsn import Xid
from pgrealtime.rule_queries.live_rows import LiveRow
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.session import ReadSession, fetch_rows_by_id
from pgrealtime.rule_queries.slow_queries import TimeBudget
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import Specialization

log = structlog.get_logger(__name__)


class HubQueries(Protocol):
    """What the hub needs of ``hub.probe``."""

    async def fetch_snapshot(self) -> tuple[str, str, bool]:
        """Return the row of ``SNAPSHOT_QUERY``."""
        ...

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        """Find out what the judging wants to know, until nothing is left to ask.

        Args:
            evaluation: What wants to know.
            budget: What is asked once it is spent stays undecided; None is no bound.

        Returns:
            The collections whose rows nobody could be asked about.
        """
        ...

    async def verify_assumptions(self, assumptions: CatalogAssumptions) -> bool:
        """Return whether the catalogue says what is believed of tables.

        Raises:
            DatabaseUnreachableError: There was no answer.
        """
        ...

    def read_session(
        self, xids: Sized[Xid], max_seconds: float | None = None
    ) -> AbstractAsyncContextManager[ReadSession]:
        """Open a snapshot for several questions."""
        ...

    async def fetch_live_rows(
        self, events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return what the tables hold now of columns that the events' rows lack.

        Returns:
            The rows, and the collections whose rows couldn't be read.
        """
        ...


CheckCallers: TypeAlias = Callable[
    [ReadSession, Sized[ExpandViewer], Sized[Group]], Awaitable[frozenset[Group]]
]
"""Finds those of viewers and groups to whom what was read live may not be shown, and returns such
groups (``hub.caller_check``)."""

FindEnrichmentNeeds: TypeAlias = Callable[[Iterable[Group]], Iterable[EnrichmentNeed]]


class SliceEvaluator:
    """Judges events by one set of collections; another set has another judge.

    Args:
        queries: Asks Postgres.
        matcher: Knows the groups.
        renderer: Knows what is shown beside rows.
        completer: Fills in what the WAL left out of rows.
        omitted_column_counts: Counts records that were shown to somebody without a column, by
            collection.
    """

    def __init__(
        self,
        queries: HubQueries,
        matcher: Matcher,
        renderer: RecordRenderer,
        completer: RowCompleter,
        omitted_column_counts: Counter[str],
    ) -> None:
        self._queries = queries
        self._matcher = matcher
        self._renderer = renderer
        self._completer = completer
        self._omitted_column_counts = omitted_column_counts

    async def evaluate(
        self, events: list[Event], budget: FilterBudget, only_groups: Sized[Group] | None = None
    ) -> SliceResult:
        """Return who may receive the events; completes the rows on the way.

        Args:
            events: In stream order.
            budget: For the questions of filters.
            only_groups: The only groups to consider; None is all.
        """
        try:
            verdict = await self._evaluate_events(events, budget, only_groups)
        except Exception as error:  # noqa: BLE001 (a fault of ours in one rule or row stops nobody)
            log.error("evaluation.failed", error=type(error).__name__, at=raise_location(error))  # noqa: TRY400 (see where)
            verdict = SliceResult([()] * len(events), failed_collections=collection_names(events))
        verdict.update_gap_indexes(events)
        return verdict

    async def evaluate_in_chunks(self, events: list[Event]) -> SliceResult:
        """Judge as many at a time as the loop's other users can wait for.

        What raises here is left to each connection to judge by itself.
        """
        budget = FilterBudget.for_slice(len(events))
        if len(events) <= SLICE_CHANGES:
            verdict = await self._evaluate_events(events, budget, None)
            verdict.update_gap_indexes(events)
            return verdict
        whole = SliceResult([])
        for first in range(0, len(events), SLICE_CHANGES):
            if first:
                await asyncio.sleep(0)
            some = events[first : first + SLICE_CHANGES]
            part = await self._evaluate_events(some, budget, None)
            part.update_gap_indexes(some)
            whole.hits += part.hits
            whole.undecided_collections |= part.undecided_collections
            whole.failed_collections |= part.failed_collections
            whole.over_budget_groups |= part.over_budget_groups
            whole.expensive_groups |= part.expensive_groups
            whole.gap_indexes = [*whole.gap_indexes, *(first + place for place in part.gap_indexes)]
            whole.unprovable_groups |= part.unprovable_groups
            if part.partial_row_indexes or part.unproven_indexes:
                whole.unproven_indexes = [
                    *whole.unproven_indexes,
                    *(first + place for place in part.unproven_indexes),
                ]
                whole.partial_row_indexes = [
                    *whole.partial_row_indexes,
                    *(first + place for place in part.partial_row_indexes),
                ]
        return whole

    async def try_enrich(
        self,
        events: Sequence[Event],
        result: SliceResult,
        find_needs: FindEnrichmentNeeds,
        check_callers: CheckCallers,
    ) -> Enrichment:
        """Return what is shown beside the rows; where that fails, the events count as lost."""
        try:
            return await self.enrich(events, result, find_needs, check_callers)
        except Exception as error:  # noqa: BLE001 (as in judge)
            log.error("enrichment.failed", error=type(error).__name__, at=raise_location(error))  # noqa: TRY400 (see where)
            result.failed_collections |= collection_names(events)
            result.gap_indexes = range(len(events))
            return NO_ENRICHMENT

    def needs_enrichment(self, events: Sequence[Event], result: SliceResult) -> bool:
        """Whether anything may be shown beside the rows, or of what they lack."""
        return bool(result.partial_row_indexes) or self._renderer.needs_enrichment(events)

    async def enrich(
        self,
        events: Sequence[Event],
        result: SliceResult,
        find_needs: FindEnrichmentNeeds,
        check_callers: CheckCallers,
        *,
        is_shared: bool = False,
    ) -> Enrichment:
        """Return what is shown beside the rows, and of what they lack.

        Args:
            events: The slice's.
            result: On them.
            find_needs: What those want to see for whom it is done.
            check_callers: Finds who of those may not be shown what is read live.
            is_shared: Whether all connections wait for it.
        """
        found: dict[int, LiveRowEvent] = {}
        entire: dict[int, LiveRowEvent] = {}

        async def enter(reading: ReadSession, places: Sized[int]) -> None:
            found.clear()
            found.update(await self._live_row_events(reading, events, result, places))

        async def check_all(reading: ReadSession, viewers: Sized[ExpandViewer]) -> None:
            seeing = frozenset[Group]().union(*(one.groups for one in found.values()))
            withheld = await check_callers(reading, viewers, seeing)
            for one in found.values():
                one.groups -= withheld
            # Not before: it may fail, and then nobody is shown them.
            entire.update(found)
            found.clear()

        beside = await self._renderer.enrich(
            events,
            result.hits,
            find_needs,
            result.partial_row_indexes,
            enter,
            check_viewers=check_all,
            is_shared=is_shared,
        )
        related = beside.related_records
        if result.partial_row_indexes or related.live_junction_ids:
            for place in {*result.partial_row_indexes, *related.live_junction_ids}:
                self._count_omitted_columns(events[place], result.hits[place], entire.get(place))
            for place, one in entire.items():
                one.live_junction_ids = related.live_junction_ids.get(place)
            beside.live_row_events = entire
        if related.failed:
            result.record_failed_enrichment(events, related.failed)
        return beside

    def withhold_expands(
        self,
        events: Sequence[Event],
        result: SliceResult,
        enrichment: Enrichment,
        viewers: Sized[ExpandViewer],
    ) -> None:
        """Leave out the related records that some viewers would be shown, and note that."""
        expands = enrichment.related_records.expand_json
        # Where nothing was found nothing is withheld.
        withheld = [
            (place, viewer)
            for (place, viewer), shown in expands.items()
            if viewer in viewers and shown not in {None, b"{}"}
        ]
        for one in withheld:
            del expands[one]
        if withheld:
            result.record_failed_enrichment(events, withheld)

    def _count_omitted_columns(
        self, event: Event, groups: Iterable[Group], live_row_event: LiveRowEvent | None
    ) -> None:
        seeing = () if live_row_event is None else live_row_event.groups
        if any(group not in seeing for group in groups):
            self._omitted_column_counts[event.collection.name] += 1

    async def _evaluate_events(
        self, events: list[Event], budget: FilterBudget, only_groups: Sized[Group] | None
    ) -> SliceResult:
        partial = [
            place
            for place, event in enumerate(events)
            if event.action != "delete"
            and event.missing_columns
            and self._matcher.has_subscriptions(event.collection)
        ]
        lost: frozenset[str] = frozenset()
        had_partial = bool(partial)
        if partial:
            completed = await self._completer.complete([events[place] for place in partial])
            lost = completed.unreadable_collections
            partial = [place for place in partial if not completed.is_row_complete(events[place])]
        now = datetime.now(UTC)
        testing = budget.work_budget
        judging = self._matcher.start_evaluation(events, now, only_groups, work_budget=testing)
        await _run_in_process_tests(judging, budget)
        undecided = await self._queries.answer_questions(judging)
        verdict = SliceResult(
            _hits_per_event(judging, len(events)),
            undecided_collections=undecided,
            failed_collections=lost,
            partial_row_indexes=partial,
        )
        if had_partial:
            verdict.record_unprovable(judging)
        deferred = judging.deferred_members
        if self._matcher.has_remote_filters or deferred:
            filters = self._matcher.start_evaluation(
                events,
                now,
                only_groups,
                has_remote_filter=True,
                work_budget=testing,
                deferred_groups=deferred,
            )
            await _run_in_process_tests(filters, budget)
            verdict.undecided_collections |= await self._queries.answer_questions(filters, budget)
            verdict.hits = _merge_hits(verdict.hits, _hits_per_event(filters, len(events)))
            verdict.over_budget_groups = filters.undecided_members
            if had_partial:
                verdict.record_unprovable(filters)
            if verdict.over_budget_groups and only_groups is None:
                await self._retry_shared_filters(events, verdict, budget, now)
                self._matcher.trials.record_over_budget(
                    {group.specialization for group in verdict.over_budget_groups}
                )
        if testing.late_members:
            verdict.over_budget_groups |= testing.late_members.keys()
            verdict.expensive_groups |= testing.costly_members.keys()
        verdict.unprovable_groups -= verdict.over_budget_groups
        return verdict

    async def _retry_shared_filters(
        self, events: list[Event], result: SliceResult, budget: FilterBudget, now: datetime
    ) -> None:
        """Evaluate filters once more that were late, and that many connections share."""
        takers: Counter[Specialization] = Counter()
        for group in result.over_budget_groups:
            if group.specialization.has_remote_filter:
                takers[group.specialization] += group.shared_subscription_count
        again = {
            group
            for group in result.over_budget_groups
            if takers[group.specialization] >= MANY_CONNECTIONS
        }
        if not again:
            return
        filters = self._matcher.start_evaluation(
            events,
            now,
            again,
            has_remote_filter=True,
            work_budget=budget.work_budget,
            deferred_groups={},
        )
        await _run_in_process_tests(filters, budget)
        result.undecided_collections |= await self._queries.answer_questions(
            filters, budget.for_shared_filters()
        )
        others = [tuple(group for group in groups if group not in again) for groups in result.hits]
        result.hits = _merge_hits(others, _hits_per_event(filters, len(events)))
        result.over_budget_groups = (result.over_budget_groups - again) | filters.undecided_members
        result.record_unprovable(filters)

    async def _live_row_events(
        self,
        session: ReadSession,
        events: Sequence[Event],
        result: SliceResult,
        event_indexes: Sized[int],
    ) -> dict[int, LiveRowEvent]:
        """Return events with what live rows hold, for who may see these whole.

        Of what isn't known as it was, that is all that can be shown: who may see the row of now
        may know what it holds. To others it is left out.
        """
        rows = await _fetch_whole_rows(session, [events[place] for place in event_indexes])
        asked = [
            (place, event, row, result.hits[place])
            for place, event in ((place, events[place]) for place in event_indexes)
            if (row := rows.get((event.collection.name, event.record_id))) is not None
            and event.action != "delete"
        ]
        budget = FilterBudget.for_slice(len(asked))
        judging = self._matcher.start_evaluation_of_pairs(
            [(_with_row(event, row), groups) for _, event, row, groups in asked],
            datetime.now(UTC),
            budget.work_budget,
        )
        await _run_in_process_tests(judging, budget)
        await session.answer_questions(judging)
        return {
            place: LiveRowEvent(
                _with_row(event, _without_email(event, row) | event.row), frozenset(groups)
            )
            for index, (place, event, row, _) in enumerate(asked)
            if (groups := judging.hits(index))
        }


def _hits_per_event(evaluation: Evaluation[int, Group], event_count: int) -> list[Iterable[Group]]:
    return [evaluation.hits(index) for index in range(event_count)]


def _merge_hits(
    first_hits: Iterable[Iterable[Group]], second_hits: Iterable[Iterable[Group]]
) -> list[Iterable[Group]]:
    return [(*a, *b) if b else a for a, b in zip(first_hits, second_hits, strict=True)]


async def _run_in_process_tests(evaluation: Evaluation[int, Group], budget: FilterBudget) -> None:
    """Do what needs no Postgres, in turns with the loop's other users."""
    if budget.work_lock is None:
        turn = YieldTimer()
        while not evaluation.run_in_process(turn.is_due):
            await turn.pause()
        return
    is_done = False
    while not is_done:
        async with budget.work_lock.acquire_for_loop_work(budget.network) as turn:
            is_done = evaluation.run_in_process(turn.is_due)


def raise_location(error: BaseException) -> str:
    """The line that raised it. What an error says, and its traceback with it, may show a row."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{at.filename}:{at.lineno}"


async def _fetch_whole_rows(
    session: ReadSession, events: Iterable[Event]
) -> dict[tuple[str, str], Row]:
    """Return the whole rows that the tables hold now for the events' records."""
    wanted: dict[str, tuple[Collection, dict[str, None]]] = {}
    for event in events:
        collection = event.collection
        wanted.setdefault(collection.name, (collection, {}))[1][event.record_id] = None
    rows: dict[tuple[str, str], Row] = {}
    for name, (collection, ids) in wanted.items():
        found = await fetch_rows_by_id(session, collection, ids) or {}
        for record_id in ids:
            row = found.get(unpadded_id(collection, record_id))
            if row is not None:
                rows[name, record_id] = row
    return rows


def _with_row(event: Event, row: Row) -> Event:
    return Event(
        event.collection,
        event.action,
        event.record_id,
        row,
        event.cursor,
        event.xid,
        event.transaction_changes,
    )


def _without_email(event: Event, row: Row) -> Row:
    """Return what may be shown of a live row beside the columns that are known of the event.

    Not the address: whether it is shown is decided by the event's own columns.
    """
    hidden = (
        event.collection.fields_by_name.get("email") if event.collection.type == "auth" else None
    )
    column = None if hidden is None else hidden.column
    if column is None:
        return row
    return {name: text for name, text in row.items() if name != column.name}
