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
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import HiddenFields
from pgrealtime.expand.load import Check, Enter, Expander, Reading, Related, Wanted
from pgrealtime.expand.plan import Node, Plan, Viewer, Viewers, junction_steps
from pgrealtime.hub.connections.connection import Receives, Subscription
from pgrealtime.hub.evaluation.matcher import Group
from pgrealtime.hub.evaluation.point_evaluation import Looking
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.live_reads.row_history import RowHistory
from pgrealtime.lsn import Xid
from pgrealtime.protocol.frame import event_tail
from pgrealtime.records.encode import RecordEncoder, View, encoder, unshowable
from pgrealtime.rule_queries.executor import Asked
from pgrealtime.rule_queries.filter_trials import MANY_TAKERS
from pgrealtime.rules.engine.before_state import Pasts, tables_of
from pgrealtime.rules.engine.plan import Bound, Planner, moment
from pgrealtime.rules.language.request import Request

log = structlog.get_logger(__name__)

_EXPAND_SECONDS = 0.01
"""That the related records of all others may take of a slice, and for each change some more."""
_EXPAND_SECONDS_OF_CHANGE = 0.001
_ENCODERS = 1024
_NO_IDS: Mapping[str, Sequence[str]] = MappingProxyType({})

Sight: TypeAlias = tuple[Viewer | None, Bound | None]
"""What a subscription's records show beside their rows: to whom, and who manages them."""


class Entire(Struct):
    """An event whose row has the columns of a live row where it lacks its own."""

    event: Event
    groups: frozenset[Group]
    """Who may see the live row."""
    ids: Mapping[str, Sequence[str]] | None = None
    """By field, where the live row leads through junction tables, if it isn't known where the
    event's own did."""


class Beside(Struct):
    """What was found out about a slice's events beside their rows."""

    looking: Looking[int]
    """By place, what the managers asked."""
    related: Related
    entire: Mapping[int, Entire] = {}
    """By place, rows with more columns than are known of the event."""
    late: frozenset[Viewer] = frozenset()
    """Viewers whose related records took too long: they are served apart."""


NOTHING_BESIDE = Beside(Looking(moment(datetime.now(UTC))), Related())


class Showing(Struct):
    """An event that is being shown to those who hear of it."""

    event: Event
    place: int
    beside: Beside
    records: dict[tuple[View, Viewer | None], bytes] = {}
    """Its record as it was made for who sees what."""
    entire: Showing | None = None
    """With the columns of a live row as well."""
    groups: Container[Group] = ()
    """Those that see it so."""
    ids: Mapping[str, Sequence[str]] | None = None
    """Instead of the event's ids in junction tables."""

    def is_managed(self, manager: Bound) -> bool:
        """Whether the record's address is shown to them."""
        return manager in self.beside.looking.admitted(self.place)


def showing_of(event: Event, place: int, beside: Beside) -> Showing:
    """Return the event as it is being shown."""
    entire = beside.entire.get(place) if beside.entire else None
    if entire is None:
        return Showing(event, place, beside)
    shown = Showing(entire.event, place, beside, ids=entire.ids)
    return Showing(event, place, beside, entire=shown, groups=entire.groups)


class Asking(Protocol):
    """What is needed of ``hub.probe`` to show more than rows."""

    async def ask(self, judging: Asked) -> frozenset[str]:
        """Find out what the judging wants to know, until nothing is left to ask."""
        ...

    def reading(
        self, xids: frozenset[Xid], seconds: float | None = None
    ) -> AbstractAsyncContextManager[Reading]:
        """Open a snapshot for several questions."""
        ...


class Display:
    """Shows events as one set of collections says; another set has another display.

    Args:
        probe: Where related records are asked for.
        collections: What there is.
        planner: Binds manage rules and the view rules of what is expanded.
        nulls: How NULL is shown.
        hidden: Who may expand a hidden relation.
        on_doubt: Told when a row doesn't fit what the catalogue says of its table.
        history: Knows what was done to junction tables later.

    Attributes:
        expanding: Subscriptions that want related records.
    """

    def __init__(
        self,
        probe: Asking,
        collections: Collections,
        planner: Planner,
        *,
        nulls: Literal["null", "zero"],
        hidden: HiddenFields = "strict",
        on_doubt: Callable[[], None],
        history: RowHistory | None = None,
    ) -> None:
        self._probe = probe
        self._collections = collections
        self._planner = planner
        self._nulls: Literal["null", "zero"] = nulls
        self._on_doubt = on_doubt
        self._viewers = Viewers(collections, planner, hidden=hidden)
        self._expander = Expander(probe, collections, self._show, history)
        self._pasts = Pasts(tables_of(collections))
        self._rich = frozenset(
            one.name
            for one in collections.values()
            if one.manage_rule is not None or junction_steps(collections, one)
        )
        """Collections whose records show more than their rows."""
        self.expanding = 0
        self._quick_plans: WeakSet[Plan] = WeakSet()
        """The ``expand`` options that were quick when nobody waited, and not late since."""
        # Views hold what clients wrote as fields: bounded, so that nobody can fill the memory.
        self._encoder = lru_cache(maxsize=_ENCODERS)(self._make_encoder)

    def viewer(self, collection: Collection, request: Request, own: Row | None) -> Viewer | None:
        """Return who the subscriber is to related records; None if it wants none."""
        return self._viewers.viewer(collection, request, own)

    def view(
        self,
        subscription: Subscription,
        collection: Collection,
        request: Request,
        own: Row | None,
    ) -> None:
        """Say what the subscriber sees of the collection's records.

        Args:
            subscription: Whose view it is.
            collection: That its topic is about.
            request: The subscriber.
            own: Columns of its own row; None if there is none, or rules ask for none.

        Raises:
            RuleError: The manage rule can't be used.
        """
        is_superuser = isinstance(request.principal, Superuser)
        subscription.view = View(
            sees_hidden=is_superuser, sees_email=is_superuser, fields=request.query.get("fields")
        )
        subscription.viewer = subscription.manager = None
        if "expand" in request.query:
            subscription.viewer = self._viewers.viewer(collection, request, own)
        if collection.manage_rule is not None and not is_superuser:
            bound = self._planner.bind(collection, collection.manage_rule, request, own)
            subscription.manager = bound if isinstance(bound, Bound) else None

    def has_more_to_show(self, events: Sequence[Event]) -> bool:
        """Whether anything may be shown beside the events' rows."""
        rich = self._rich
        return bool(self.expanding) or (
            bool(rich) and any(event.collection.name in rich for event in events)
        )

    async def look_beside(
        self,
        events: Sequence[Event],
        judged: Sequence[Iterable[Group]],
        sights: Callable[[Iterable[Group]], Iterable[Sight]],
        partial: Sequence[int] = (),
        enter: Enter | None = None,
        *,
        check: Check | None = None,
        is_shared: bool,
    ) -> Beside:
        """Find out what else is shown of the events' records, and to whom.

        Args:
            events: The slice's.
            judged: Who hears of them.
            sights: What those of some groups want to see whom this is done for.
            partial: Places of events whose rows lack columns.
            enter: Told of which events it isn't known what they held.
            check: Told for whom something was expanded.
            is_shared: Whether all connections wait for it. Then an ``expand`` that few of them
                ask for is done only if it was quick before, and may take a short time only.
        """
        if not partial and not self.has_more_to_show(events):
            return NOTHING_BESIDE
        xids = frozenset(event.xid for event in events)
        looking: Looking[int] = Looking(moment(datetime.now(UTC)), xids)
        wanted: list[Wanted] = []
        asked: set[int] = set()
        self._pasts.begin_batch()
        heard = [place for place, groups in enumerate(judged) if groups]
        for place in heard:
            event = events[place]
            found = list(sights(judged[place]))
            wanted += ((place, viewer) for viewer, _ in found if viewer is not None)
            if event.collection.manage_rule is not None and event.hides_email:
                past = self._pasts.of(event.changes) if event.action == "delete" else None
                bounds = {manager for _, manager in found if manager is not None}
                asked.add(place)
                looking.consider(place, event.collection, event.row, bounds, past)
        unanswered = await self._probe.ask(looking)
        partial = [place for place in partial if judged[place]]
        few: list[Wanted] = []
        if is_shared and wanted:
            many = _plans_of_many(judged)
            few = [one for one in wanted if one[1].plan not in many]
            wanted = [one for one in wanted if one[1].plan in many]
        related = await self._expander.related(
            events, heard, wanted, partial, enter=enter, check=check
        )
        late: frozenset[Viewer] = frozenset()
        if few:
            quick = [one for one in few if one[1].plan in self._quick_plans]
            late = frozenset(viewer for _, viewer in few if viewer.plan not in self._quick_plans)
            expanded: Related | None = Related()
            if quick:
                expanded = await self._expand_quickly(events, quick, partial, check)
            if expanded is None:
                late |= {viewer for _, viewer in quick}
            else:
                related.expands |= expanded.expands
                related.failed |= expanded.failed
        if unanswered:
            related.failed.update((place, None) for place in heard if place in asked)
        return Beside(looking, related, late=late)

    async def _expand_quickly(
        self,
        events: Sequence[Event],
        wanted: Sequence[Wanted],
        partial: Sequence[int],
        check: Check | None,
    ) -> Related | None:
        """Return what is expanded in little time, and None if that was too little."""
        seconds = _EXPAND_SECONDS + _EXPAND_SECONDS_OF_CHANGE * len(events)
        found = await self._expander.expands_within(seconds, events, wanted, partial, check=check)
        if found is None:
            self._quick_plans.difference_update({viewer.plan for _, viewer in wanted})
        return found

    def note_seconds(self, viewers: Iterable[Viewer], seconds: float, events: int) -> None:
        """Take note of how long it took to expand the records of events where nobody waits for it.

        What took half the time there that there is may be done in slices that all wait for, also
        for others who ask the same; what was never tried may not.
        """
        if 0 < seconds < (_EXPAND_SECONDS + _EXPAND_SECONDS_OF_CHANGE * events) / 2:
            self._quick_plans.update(viewer.plan for viewer in viewers)

    def tail(self, showing: Showing, receives: Receives, *, is_own: bool = False) -> bytes:
        """Return the message, or nothing if the row can't be shown: that row alone is lost."""
        name, view, viewer, manager = receives
        if is_own or (manager is not None and showing.is_managed(manager)):
            view = _with_email(view)
        record = showing.records.get((view, viewer))
        if record is None:
            record = showing.records[view, viewer] = self._record(showing, view, viewer)
        return event_tail(name, record, showing.event.action) if record else b""

    def _record(self, showing: Showing, view: View, viewer: Viewer | None) -> bytes:
        event, related = showing.event, showing.beside.related
        ids = related.ids.get(showing.place, _NO_IDS) if showing.ids is None else showing.ids
        try:
            return self._encoder(event.collection.name, view)(
                event.row,
                ids,
                None if viewer is None else related.expands.get((showing.place, viewer)),
            )
        except Exception as error:  # noqa: BLE001 (one row that can't be shown stops nobody)
            # A value that isn't of the type that the catalogue gave the column when it was read.
            column = unshowable(event.collection, event.row, nulls=self._nulls)
            log.error(  # noqa: TRY400 (the message may not show the row)
                "record.failed",
                collection=event.collection.name,
                column=column or None,
                error=type(error).__name__,
            )
            self._on_doubt()
            return b""

    def _show(self, node: Node, view: View, expand: bytes | None) -> bytes:
        return self._encoder(node.collection.name, view)(node.row, node.related, expand)

    def _make_encoder(self, name: str, view: View) -> RecordEncoder:
        return encoder(self._collections[name], nulls=self._nulls, view=view)


def sights_of_audiences(groups: Iterable[Group]) -> Iterable[Sight]:
    """What all subscriptions of the groups want to see."""
    for group in groups:
        for audience in group.audiences:
            _name, _view, viewer, manager = audience.receives
            yield viewer, manager


def _plans_of_many(judged: Iterable[Iterable[Group]]) -> set[Plan]:
    """Return the ``expand`` options that many live connections use on the events."""
    takers: Counter[Plan] = Counter()
    for group in {group for groups in judged for group in groups}:
        for audience in group.audiences:
            viewer = audience.receives[2]
            if viewer is not None and takers[viewer.plan] < MANY_TAKERS:
                live = (None for one in audience if one.connection.is_live)
                takers[viewer.plan] += sum(1 for _ in islice(live, MANY_TAKERS))
    return {plan for plan, count in takers.items() if count >= MANY_TAKERS}


def _with_email(view: View) -> View:
    return View(sees_hidden=view.sees_hidden, sees_email=True, fields=view.fields)
