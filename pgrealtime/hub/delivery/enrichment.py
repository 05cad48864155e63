"""Loads related data of records: expanded records, e-mail addresses, columns read live.

The dispatcher enriches a slice for all LIVE connections once it is evaluated, and each connection
that catches up enriches what it reads by itself. The renderer shows the result. Whatever cannot be
loaded is recorded in the slice's result, and clients are notified of it; no event is held back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple, TypeAlias
from weakref import WeakSet

import structlog
from msgspec import Struct
from msgspec.structs import replace

from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.expand.load import ExpandRequest, RelatedRecordLoader, RelatedRecords
from pgrealtime.expand.plan import ExpandPlan, ExpandViewer, junction_hops
from pgrealtime.expand.render import RenderRecord
from pgrealtime.hub.connections.connection import LIVE, Group
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.hub.evaluation.evaluator import SliceResult, collection_names
from pgrealtime.hub.evaluation.filter_limits import FilterBudget
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.observe.redact import raise_location
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rule_queries.session import ReadSession, fetch_rows_by_id
from pgrealtime.rules.engine.before_state import BeforeStates
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameters import MacroValues

log = structlog.get_logger(__name__)

_EXPAND_SECONDS = 0.01
"""Seconds that the ``expand`` of few connections may take of a slice that all wait for, plus
``_EXPAND_SECONDS_PER_CHANGE`` for each of its events."""
_EXPAND_SECONDS_PER_CHANGE = 0.001

EnrichmentNeed: TypeAlias = tuple[ExpandViewer | None, BoundPredicate | None]
"""What a subscription needs loaded: related records for a viewer, a manage rule's verdict."""

FindEnrichmentNeeds: TypeAlias = Callable[[Iterable[Group]], Iterable[EnrichmentNeed]]
"""Returns the needs of the subscriptions of some groups."""


class Enrichment(Struct):
    """Related data of the records of a slice's events."""

    manage_evaluation: Evaluation[int, BoundPredicate]
    """By index of the event, the manage rules that its row satisfies."""
    related_records: RelatedRecords
    live_row_events: Mapping[int, LiveRowEvent] = {}
    """By index of the event; only of events whose rows lack columns."""
    excluded_viewers: frozenset[ExpandViewer] = frozenset()
    """Viewers whose related records would take too long: their connections must fall behind."""


NO_ENRICHMENT = Enrichment(Evaluation(MacroValues(datetime.now(UTC))), RelatedRecords())


class _Needs(NamedTuple):
    """What the receivers of a slice's events need."""

    event_indexes: Sequence[int]
    """Of the events that any group receives."""
    expands: list[ExpandRequest]
    manage_evaluation: Evaluation[int, BoundPredicate]
    managed_indexes: frozenset[int]
    """Of the events for which manage rules are evaluated."""


class SliceEnricher:
    """Enriches events by one generation's collections."""

    def __init__(
        self,
        queries: QueryExecutor,
        collections: Collections,
        matcher: Matcher,
        render_record: RenderRecord,
        *,
        row_history: RowHistory,
        omitted_column_counts: Counter[str],
    ) -> None:
        self._queries = queries
        self._matcher = matcher
        self._related_loader = RelatedRecordLoader(queries, collections, render_record, row_history)
        self._omitted_column_counts = omitted_column_counts
        self._before_states = BeforeStates(reachable_tables(collections))
        self._enriched_collections = frozenset(
            collection.name
            for collection in collections.values()
            if collection.manage_rule is not None or junction_hops(collections, collection)
        )
        """Names of collections whose records show more than their rows even without ``expand``."""
        self.expanding_count = 0
        """Subscriptions with ``expand``; written by the generation."""
        self._quick_plans: WeakSet[ExpandPlan] = WeakSet()
        """The ``expand`` options that were quick when no other connection waited, and not over
        their time since."""

    def needs_enrichment(self, events: Sequence[Event], result: SliceResult) -> bool:
        """Whether records may need related data, or rows lack columns."""
        names = self._enriched_collections
        return bool(result.partial_row_indexes or self.expanding_count) or (
            bool(names) and any(event.collection.name in names for event in events)
        )

    async def try_enrich(
        self,
        events: Sequence[Event],
        result: SliceResult,
        find_needs: FindEnrichmentNeeds,
        check_callers: CheckCallers,
    ) -> Enrichment:
        """Return the enrichment for one connection; if it fails, all events count as failed."""
        try:
            return await self.enrich(events, result, find_needs, check_callers)
        except Exception as error:  # noqa: BLE001 (a defect ends no connection: it becomes a gap)
            log.error("enrichment.failed", error=type(error).__name__, at=raise_location(error))  # noqa: TRY400 (a traceback may show a row)
            result.failed_collections |= collection_names(events)
            result.gap_indexes = range(len(events))
            return NO_ENRICHMENT

    async def enrich(
        self,
        events: Sequence[Event],
        result: SliceResult,
        find_needs: FindEnrichmentNeeds,
        check_callers: CheckCallers,
        *,
        is_shared: bool = False,
    ) -> Enrichment:
        """Return the enrichment, and record in the result which events lack a part of it.

        ``is_shared`` says that all connections wait. Then an ``expand`` that fewer than
        ``MANY_CONNECTIONS`` use is loaded only if it was quick before, and in a short time;
        otherwise its viewers are excluded.
        """
        if not self.needs_enrichment(events, result):
            return NO_ENRICHMENT
        needs = self._collect_needs(events, result.hits, find_needs)
        unanswered = await self._queries.answer_questions(needs.manage_evaluation)
        live_rows = LiveRowEvents(self._matcher, events, result.hits, check_callers)
        related, excluded = await self._load_related(
            events, result, needs, live_rows, is_shared=is_shared
        )
        if unanswered:
            related.failed.update((index, None) for index in needs.managed_indexes)
        enrichment = Enrichment(needs.manage_evaluation, related, excluded_viewers=excluded)
        if result.partial_row_indexes or related.live_junction_ids:
            for index in {*result.partial_row_indexes, *related.live_junction_ids}:
                live = live_rows.checked.get(index)
                complete_groups = frozenset[Group]() if live is None else live.groups
                if not complete_groups.issuperset(result.hits[index]):
                    self._omitted_column_counts[events[index].collection.name] += 1
            for index, live_row in live_rows.checked.items():
                live_row.live_junction_ids = related.live_junction_ids.get(index)
            enrichment.live_row_events = live_rows.checked
        if related.failed:
            result.record_failed_enrichment(events, related.failed)
        return enrichment

    def _collect_needs(
        self,
        events: Sequence[Event],
        hits: Sequence[Iterable[Group]],
        find_needs: FindEnrichmentNeeds,
    ) -> _Needs:
        """Collect what the receivers need, and add the rows to evaluate manage rules for."""
        evaluation: Evaluation[int, BoundPredicate] = Evaluation(
            MacroValues(datetime.now(UTC)), frozenset(event.xid for event in events)
        )
        expands: list[ExpandRequest] = []
        managed: set[int] = set()
        self._before_states.begin_batch()
        # Of a departure the id alone is shown.
        received = [
            index for index, groups in enumerate(hits) if groups and not events[index].is_departure
        ]
        for index in received:
            event = events[index]
            needs = list(find_needs(hits[index]))
            expands += ((index, viewer) for viewer, _ in needs if viewer is not None)
            if event.collection.manage_rule is not None and event.hides_email:
                changes = event.transaction_changes if event.action == "delete" else None
                before = None if changes is None else self._before_states.state_before(changes)
                predicates = {predicate for _, predicate in needs if predicate is not None}
                managed.add(index)
                evaluation.add(index, event.collection, event.row, predicates, before)
        return _Needs(received, expands, evaluation, frozenset(managed))

    async def _load_related(
        self,
        events: Sequence[Event],
        result: SliceResult,
        needs: _Needs,
        live_rows: LiveRowEvents,
        *,
        is_shared: bool,
    ) -> tuple[RelatedRecords, frozenset[ExpandViewer]]:
        """Load related records and live rows; return the viewers who are excluded as well."""
        partial = [index for index in result.partial_row_indexes if result.hits[index]]
        shared, rare = needs.expands, list[ExpandRequest]()
        if is_shared and shared:
            plans = _widely_used_plans(result.hits)
            rare = [request for request in needs.expands if request[1].plan not in plans]
            shared = [request for request in needs.expands if request[1].plan in plans]
        indexes, load, check = needs.event_indexes, live_rows.load, live_rows.check_callers
        related = await self._related_loader.load_for_events(
            events, indexes, shared, partial, load_live_rows=load, check_viewers=check
        )
        excluded = frozenset[ExpandViewer]()
        if rare:
            excluded = await self._load_rare_expands(events, rare, partial, live_rows, related)
        return related, excluded

    async def _load_rare_expands(
        self,
        events: Sequence[Event],
        requests: Sequence[ExpandRequest],
        partial_row_indexes: Sequence[int],
        live_rows: LiveRowEvents,
        related: RelatedRecords,
    ) -> frozenset[ExpandViewer]:
        """Add to ``related`` the expands that were quick before; return the other viewers."""
        quick_plans = self._quick_plans
        quick = [request for request in requests if request[1].plan in quick_plans]
        excluded = frozenset(viewer for _, viewer in requests if viewer.plan not in quick_plans)
        if not quick:
            return excluded
        seconds, check = _expand_seconds(len(events)), live_rows.check_callers
        loaded = await self._related_loader.load_expands_within(
            seconds, events, quick, partial_row_indexes, check_viewers=check
        )
        if loaded is None:
            quick_plans.difference_update({viewer.plan for _, viewer in quick})
            return excluded.union(viewer for _, viewer in quick)
        related.expand_json |= loaded.expand_json
        related.failed |= loaded.failed
        return excluded

    def record_expand_seconds(
        self, viewers: Iterable[ExpandViewer], seconds: float, event_count: int
    ) -> None:
        """Record how long the expands of some events took a connection that catches up.

        If they took less than half the time that they may take of a slice that all wait for, they
        are loaded there from now on, also for other viewers with the same ``expand``.
        """
        if 0 < seconds < _expand_seconds(event_count) / 2:
            self._quick_plans.update(viewer.plan for viewer in viewers)

    def withhold_expands(
        self,
        events: Sequence[Event],
        result: SliceResult,
        enrichment: Enrichment,
        viewers: Sized[ExpandViewer],
    ) -> None:
        """Remove the related records of some viewers, and record which events lack them."""
        expands = enrichment.related_records.expand_json
        # An event without related records lacks nothing.
        withheld = [
            (index, viewer)
            for (index, viewer), expand in expands.items()
            if viewer in viewers and expand not in {None, b"{}"}
        ]
        for expand_key in withheld:
            del expands[expand_key]
        if withheld:
            result.record_failed_enrichment(events, withheld)


def _expand_seconds(event_count: int) -> float:
    return _EXPAND_SECONDS + _EXPAND_SECONDS_PER_CHANGE * event_count


def needs_of_groups(groups: Iterable[Group]) -> Iterable[EnrichmentNeed]:
    """Yield the needs of all subscriptions of the groups."""
    for group in groups:
        for render_group in group.render_groups:
            _topic, _view, viewer, manage_predicate = render_group.render_key
            yield viewer, manage_predicate


def _widely_used_plans(hits: Iterable[Iterable[Group]]) -> set[ExpandPlan]:
    counts: Counter[ExpandPlan] = Counter()
    for group in {group for groups in hits for group in groups}:
        for render_group in group.render_groups:
            viewer = render_group.render_key[2]
            if viewer is not None and counts[viewer.plan] < MANY_CONNECTIONS:
                live = (None for own in render_group if own.connection.state is LIVE)
                counts[viewer.plan] += sum(1 for _ in islice(live, MANY_CONNECTIONS))
    return {plan for plan, count in counts.items() if count >= MANY_CONNECTIONS}


CheckCallers: TypeAlias = Callable[
    [ReadSession, Sized[ExpandViewer], Sized[Group]], Awaitable[frozenset[Group]]
]
"""Finds the viewers and groups whose callers have changed since, and who must not be shown what was
read live; returns those of the groups (``hub.state.callers``)."""


class LiveRowEvent(Struct):
    """An event whose row has the columns of a live row where it lacks its own."""

    event: Event
    groups: frozenset[Group]
    """The groups that may see the live row."""
    live_junction_ids: Mapping[str, Sequence[str]] | None = None
    """By field, the ids to which the live row leads through junction tables; None if it is known
    to which the event's own row led."""


@dataclass(eq=False)
class LiveRowEvents:
    """The live row events of one slice; callers are checked at the end of each read session.

    A column that the WAL left out, and whose value at the event can't be proved
    (``evaluation.toast``), is shown only to groups whose rules admit the live row: they may know
    what it holds. To all others the record is shown without the column.
    """

    matcher: Matcher
    events: Sequence[Event]
    hits: Sequence[Iterable[Group]]
    find_changed_callers: CheckCallers
    unchecked: dict[int, LiveRowEvent] = field(default_factory=dict)
    checked: dict[int, LiveRowEvent] = field(default_factory=dict)
    """By index of the event. Nothing is in it before its callers were checked: if the check fails,
    no live row is shown."""

    async def load(self, session: ReadSession, event_indexes: Sized[int]) -> None:
        """Read live rows and find the groups that may see them."""
        self.unchecked = {}  # the session may be a second attempt
        events = {index: self.events[index] for index in event_indexes}
        rows = await _fetch_rows(session, events.values())
        loaded = [
            (index, event, row)
            for index, event in events.items()
            if (row := rows.get((event.collection.name, event.record_id))) is not None
            and event.action != "delete"
        ]
        budget = FilterBudget.for_slice(len(loaded))
        evaluation = self.matcher.start_evaluation_of_pairs(
            [(replace(event, row=row), self.hits[index]) for index, event, row in loaded],
            datetime.now(UTC),
            budget.work_budget,
        )
        await budget.run_in_process(evaluation)
        await session.answer_questions(evaluation)
        self.unchecked = {
            index: LiveRowEvent(
                replace(event, row=_without_email(event, row) | event.row), frozenset(groups)
            )
            for row_key, (index, event, row) in enumerate(loaded)
            if (groups := evaluation.hits(row_key))
        }

    async def check_callers(self, session: ReadSession, viewers: Sized[ExpandViewer]) -> None:
        """Check the callers of the viewers, and of the groups that would see live rows."""
        groups = frozenset[Group]().union(*(live.groups for live in self.unchecked.values()))
        withheld = await self.find_changed_callers(session, viewers, groups)
        for live_row in self.unchecked.values():
            live_row.groups -= withheld
        self.checked.update(self.unchecked)
        self.unchecked.clear()


async def _fetch_rows(session: ReadSession, events: Iterable[Event]) -> dict[tuple[str, str], Row]:
    """Return the whole live rows of the events' records, by collection name and record id."""
    ids_by_collection: dict[str, tuple[Collection, dict[str, None]]] = {}
    for event in events:
        collection = event.collection
        ids_by_collection.setdefault(collection.name, (collection, {}))[1][event.record_id] = None
    rows: dict[tuple[str, str], Row] = {}
    for name, (collection, ids) in ids_by_collection.items():
        fetched = await fetch_rows_by_id(session, collection, ids) or {}
        for record_id in ids:
            row = fetched.get(unpadded_id(collection, record_id))
            if row is not None:
                rows[name, record_id] = row
    return rows


def _without_email(event: Event, row: Row) -> Row:
    """Return the live row without the e-mail address, which the event's own columns decide."""
    email = event.collection.fields_by_name.get("email")
    column = email.column if email is not None and event.collection.type == "auth" else None
    if column is None:
        return row
    return {name: text for name, text in row.items() if name != column.name}
