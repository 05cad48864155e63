"""How events are shown: records, what stands beside their rows, and to whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias
from weakref import WeakSet

import structlog
from msgspec import Struct

from pgrealtime.auth.principal import Superuser
from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.expand.load import (
    CheckViewers,
    ExpandRequest,
    LoadLiveRows,
    RelatedRecordLoader,
    RelatedRecords,
)
from pgrealtime.expand.node import RecordNode
from pgrealtime.expand.plan import (
    ExpandCompiler,
    ExpandPlan,
    ExpandViewer,
    junction_hops,
)
from pgrealtime.hub.connections.connection import LIVE, Group, Subscription
from pgrealtime.hub.connections.group import MANY_CONNECTIONS, RenderKey
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import Xid
from pgrealtime.protocol.frame import event_tail
from pgrealtime.records.encode import RecordEncoder, View, compile_encoder, unencodable_column
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.session import ReadSession
from pgrealtime.rules.engine.before_state import BeforeStates
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameter_values import macro_values_at
from pgrealtime.rules.language.request import RuleRequest

log = structlog.get_logger(__name__)

_EXPAND_SECONDS = 0.01
"""That the related records of all others may take of a slice, and for each change some more."""
_EXPAND_SECONDS_PER_CHANGE = 0.001
_MAX_ENCODERS = 1024
_NO_IDS: Mapping[str, Sequence[str]] = MappingProxyType({})

EnrichmentNeed: TypeAlias = tuple[ExpandViewer | None, BoundPredicate | None]
"""What a subscription's records show beside their rows: to whom, and who manages them."""


class LiveRowEvent(Struct):
    """An event whose row has the columns of a live row where it lacks its own."""

    event: Event
    groups: frozenset[Group]
    """Who may see the live row."""
    live_junction_ids: Mapping[str, Sequence[str]] | None = None
    """By field, where the live row leads through junction tables, if it isn't known where the
    event's own did."""


class Enrichment(Struct):
    """What was found out about a slice's events beside their rows."""

    manage_evaluation: Evaluation[int, BoundPredicate]
    """By place, what the managers asked."""
    related_records: RelatedRecords
    live_row_events: Mapping[int, LiveRowEvent] = {}
    """By place, rows with more columns than are known of the event."""
    excluded_viewers: frozenset[ExpandViewer] = frozenset()
    """Viewers whose related records took too long: they are served apart."""


NO_ENRICHMENT = Enrichment(Evaluation(macro_values_at(datetime.now(UTC))), RelatedRecords())


class EventRendering(Struct):
    """An event that is being shown to those who hear of it."""

    event: Event
    event_index: int
    enrichment: Enrichment
    rendered_records: dict[tuple[View, ExpandViewer | None], bytes] = {}
    """Its record as it was made for who sees what."""
    live_row_rendering: EventRendering | None = None
    """With the columns of a live row as well."""
    live_row_groups: Container[Group] = ()
    """Those that see it so."""
    live_junction_ids: Mapping[str, Sequence[str]] | None = None
    """Instead of the event's ids in junction tables."""

    def satisfies_manage_predicate(self, manage_predicate: BoundPredicate) -> bool:
        """Whether the record's address is shown to them."""
        return manage_predicate in self.enrichment.manage_evaluation.hits(self.event_index)


def event_rendering(event: Event, event_index: int, enrichment: Enrichment) -> EventRendering:
    """Return the event as it is being shown."""
    entire = enrichment.live_row_events.get(event_index) if enrichment.live_row_events else None
    if entire is None:
        return EventRendering(event, event_index, enrichment)
    shown = EventRendering(
        entire.event, event_index, enrichment, live_junction_ids=entire.live_junction_ids
    )
    return EventRendering(
        event, event_index, enrichment, live_row_rendering=shown, live_row_groups=entire.groups
    )


class EnrichmentQueries(Protocol):
    """What is needed of ``hub.probe`` to show more than rows."""

    async def answer_questions(self, evaluation: PendingEvaluation) -> frozenset[str]:
        """Find out what the judging wants to know, until nothing is left to ask."""
        ...

    def read_session(
        self, xids: frozenset[Xid], max_seconds: float | None = None
    ) -> AbstractAsyncContextManager[ReadSession]:
        """Open a snapshot for several questions."""
        ...


class RecordRenderer:
    """Shows events as one set of collections says; another set has another display.

    Args:
        queries: Where related records are asked for.
        collections: What there is.
        compiler: Binds manage rules and the view rules of what is expanded.
        nulls: How NULL is shown.
        hidden: Who may expand a hidden relation.
        on_schema_mismatch: Told when a row doesn't fit what the catalogue says of its table.
        row_history: Knows what was done to junction tables later.

    Attributes:
        expanding_count: Subscriptions that want related records.
    """

    def __init__(
        self,
        queries: EnrichmentQueries,
        collections: Collections,
        compiler: RuleCompiler,
        *,
        nulls: Literal["null", "zero"],
        hidden: HiddenFieldsMode = "strict",
        on_schema_mismatch: Callable[[], None],
        row_history: RowHistory | None = None,
    ) -> None:
        self._queries = queries
        self._collections = collections
        self._compiler = compiler
        self._nulls: Literal["null", "zero"] = nulls
        self._on_schema_mismatch = on_schema_mismatch
        self._expand_compiler = ExpandCompiler(collections, compiler, hidden=hidden)
        self._related_loader = RelatedRecordLoader(
            queries, collections, self._render_node, row_history
        )
        self._before_states = BeforeStates(reachable_tables(collections))
        self._enriched_collections = frozenset(
            one.name
            for one in collections.values()
            if one.manage_rule is not None or junction_hops(collections, one)
        )
        """Collections whose records show more than their rows."""
        self.expanding_count = 0
        self._quick_plans: WeakSet[ExpandPlan] = WeakSet()
        """The ``expand`` options that were quick when nobody waited, and not late since."""
        # Views hold what clients wrote as fields: bounded, so that nobody can fill the memory.
        self._encoder = lru_cache(maxsize=_MAX_ENCODERS)(self._make_encoder)

    def compile_expand(
        self, collection: Collection, request: RuleRequest, own_row: Row | None
    ) -> ExpandViewer | None:
        """Return who the subscriber is to related records; None if it wants none."""
        return self._expand_compiler.compile_expand(collection, request, own_row)

    def set_subscription_view(
        self,
        subscription: Subscription,
        collection: Collection,
        request: RuleRequest,
        own_row: Row | None,
    ) -> None:
        """Say what the subscriber sees of the collection's records.

        Args:
            subscription: Whose view it is.
            collection: That its topic is about.
            request: The subscriber.
            own_row: Columns of its own row; None if there is none, or rules ask for none.

        Raises:
            RuleError: The manage rule can't be used.
        """
        is_superuser = isinstance(request.principal, Superuser)
        view = View(
            sees_hidden=is_superuser, sees_email=is_superuser, fields=request.query.get("fields")
        )
        expand_viewer = manage_rule = None
        subscription.set_view(view)  # also if a rule can't be used
        if "expand" in request.query:
            expand_viewer = self._expand_compiler.compile_expand(collection, request, own_row)
        if collection.manage_rule is not None and not is_superuser:
            bound = self._compiler.bind_caller(collection, collection.manage_rule, request, own_row)
            manage_rule = bound if isinstance(bound, BoundPredicate) else None
        subscription.set_view(view, expand_viewer, manage_rule)

    def needs_enrichment(self, events: Sequence[Event]) -> bool:
        """Whether anything may be shown beside the events' rows."""
        rich = self._enriched_collections
        return bool(self.expanding_count) or (
            bool(rich) and any(event.collection.name in rich for event in events)
        )

    async def enrich(
        self,
        events: Sequence[Event],
        hits: Sequence[Iterable[Group]],
        find_needs: Callable[[Iterable[Group]], Iterable[EnrichmentNeed]],
        partial_row_indexes: Sequence[int] = (),
        load_live_rows: LoadLiveRows | None = None,
        *,
        check_viewers: CheckViewers | None = None,
        is_shared: bool,
    ) -> Enrichment:
        """Find out what else is shown of the events' records, and to whom.

        Args:
            events: The slice's.
            hits: Who hears of them.
            find_needs: What those of some groups want to see whom this is done for.
            partial_row_indexes: Places of events whose rows lack columns.
            load_live_rows: Told of which events it isn't known what they held.
            check_viewers: Told for whom something was expanded.
            is_shared: Whether all connections wait for it. Then an ``expand`` that few of them
                ask for is done only if it was quick before, and may take a short time only.
        """
        if not partial_row_indexes and not self.needs_enrichment(events):
            return NO_ENRICHMENT
        xids = frozenset(event.xid for event in events)
        looking: Evaluation[int, BoundPredicate] = Evaluation(
            macro_values_at(datetime.now(UTC)), xids
        )
        wanted: list[ExpandRequest] = []
        asked: set[int] = set()
        self._before_states.begin_batch()
        heard = [place for place, groups in enumerate(hits) if groups]
        for place in heard:
            event = events[place]
            found = list(find_needs(hits[place]))
            wanted += ((place, viewer) for viewer, _ in found if viewer is not None)
            if event.collection.manage_rule is not None and event.hides_email:
                past = (
                    self._before_states.state_before(event.transaction_changes)
                    if event.action == "delete"
                    else None
                )
                bounds = {manager for _, manager in found if manager is not None}
                asked.add(place)
                looking.add(place, event.collection, event.row, bounds, past)
        unanswered = await self._queries.answer_questions(looking)
        partial_row_indexes = [place for place in partial_row_indexes if hits[place]]
        few: list[ExpandRequest] = []
        if is_shared and wanted:
            many = _widely_used_plans(hits)
            few = [one for one in wanted if one[1].plan not in many]
            wanted = [one for one in wanted if one[1].plan in many]
        related = await self._related_loader.load_for_events(
            events,
            heard,
            wanted,
            partial_row_indexes,
            load_live_rows=load_live_rows,
            check_viewers=check_viewers,
        )
        late: frozenset[ExpandViewer] = frozenset()
        if few:
            quick = [one for one in few if one[1].plan in self._quick_plans]
            late = frozenset(viewer for _, viewer in few if viewer.plan not in self._quick_plans)
            expanded: RelatedRecords | None = RelatedRecords()
            if quick:
                expanded = await self._load_quick_expands(
                    events, quick, partial_row_indexes, check_viewers
                )
            if expanded is None:
                late |= {viewer for _, viewer in quick}
            else:
                related.expand_json |= expanded.expand_json
                related.failed |= expanded.failed
        if unanswered:
            related.failed.update((place, None) for place in heard if place in asked)
        return Enrichment(looking, related, excluded_viewers=late)

    async def _load_quick_expands(
        self,
        events: Sequence[Event],
        requests: Sequence[ExpandRequest],
        partial_row_indexes: Sequence[int],
        check_viewers: CheckViewers | None,
    ) -> RelatedRecords | None:
        """Return what is expanded in little time, and None if that was too little."""
        seconds = _EXPAND_SECONDS + _EXPAND_SECONDS_PER_CHANGE * len(events)
        found = await self._related_loader.load_expands_within(
            seconds, events, requests, partial_row_indexes, check_viewers=check_viewers
        )
        if found is None:
            self._quick_plans.difference_update({viewer.plan for _, viewer in requests})
        return found

    def record_expand_seconds(
        self, viewers: Iterable[ExpandViewer], seconds: float, event_count: int
    ) -> None:
        """Take note of how long it took to expand the records of events where nobody waits for it.

        What took half the time there that there is may be done in slices that all wait for, also
        for others who ask the same; what was never tried may not.
        """
        if 0 < seconds < (_EXPAND_SECONDS + _EXPAND_SECONDS_PER_CHANGE * event_count) / 2:
            self._quick_plans.update(viewer.plan for viewer in viewers)

    def render_message(
        self, rendering: EventRendering, render_key: RenderKey, *, is_own_record: bool = False
    ) -> bytes:
        """Return the message, or nothing if the row can't be shown: that row alone is lost."""
        name, view, viewer, manager = render_key
        if is_own_record or (manager is not None and rendering.satisfies_manage_predicate(manager)):
            view = _with_email(view)
        record = rendering.rendered_records.get((view, viewer))
        if record is None:
            record = rendering.rendered_records[view, viewer] = self._render_record(
                rendering, view, viewer
            )
        return event_tail(name, record, rendering.event.action) if record else b""

    def _render_record(
        self, rendering: EventRendering, view: View, viewer: ExpandViewer | None
    ) -> bytes:
        event, related = rendering.event, rendering.enrichment.related_records
        ids = (
            related.junction_ids.get(rendering.event_index, _NO_IDS)
            if rendering.live_junction_ids is None
            else rendering.live_junction_ids
        )
        try:
            return self._encoder(event.collection.name, view)(
                event.row,
                ids,
                None
                if viewer is None
                else related.expand_json.get((rendering.event_index, viewer)),
            )
        except Exception as error:  # noqa: BLE001 (one row that can't be shown stops nobody)
            # A value that isn't of the type that the catalogue gave the column when it was read.
            column = unencodable_column(event.collection, event.row, nulls=self._nulls)
            log.error(  # noqa: TRY400 (the message may not show the row)
                "record.failed",
                collection=event.collection.name,
                column=column or None,
                error=type(error).__name__,
            )
            self._on_schema_mismatch()
            return b""

    def _render_node(self, node: RecordNode, view: View, expand: bytes | None) -> bytes:
        return self._encoder(node.collection.name, view)(node.row, node.junction_ids, expand)

    def _make_encoder(self, collection_name: str, view: View) -> RecordEncoder:
        return compile_encoder(self._collections[collection_name], nulls=self._nulls, view=view)


def needs_of_groups(groups: Iterable[Group]) -> Iterable[EnrichmentNeed]:
    """What all subscriptions of the groups want to see."""
    for group in groups:
        for audience in group.render_groups:
            _name, _view, viewer, manager = audience.render_key
            yield viewer, manager


def _widely_used_plans(hits: Iterable[Iterable[Group]]) -> set[ExpandPlan]:
    """Return the ``expand`` options that many live connections use on the events."""
    takers: Counter[ExpandPlan] = Counter()
    for group in {group for groups in hits for group in groups}:
        for audience in group.render_groups:
            viewer = audience.render_key[2]
            if viewer is not None and takers[viewer.plan] < MANY_CONNECTIONS:
                live = (None for one in audience if one.connection.state is LIVE)
                takers[viewer.plan] += sum(1 for _ in islice(live, MANY_CONNECTIONS))
    return {plan for plan, count in takers.items() if count >= MANY_CONNECTIONS}


def _with_email(view: View) -> View:
    return View(sees_hidden=view.sees_hidden, sees_email=True, fields=view.fields)
