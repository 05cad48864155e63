"""Who may receive events, and what is shown beside their rows; where needed Postgres is asked."""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Protocol, TypeAlias

import structlog
from msgspec import Struct

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.expand.load import Reading
from pgrealtime.expand.plan import Viewer
from pgrealtime.expand.relation_sql import rows_statement
from pgrealtime.hub.delivery.render import NOTHING_BESIDE, Beside, Display, Entire, Sight
from pgrealtime.hub.evaluation.matcher import Group, Judging, Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.slices import SLICE, Announcement
from pgrealtime.hub.live_reads.table_definitions import Belief
from pgrealtime.hub.live_reads.toast import Completion
from pgrealtime.lsn import Cursor, Xid
from pgrealtime.rule_queries.executor import Asked, LiveRow
from pgrealtime.rule_queries.filter_trials import MANY_TAKERS
from pgrealtime.rule_queries.slow_filters import TimeBudget
from pgrealtime.rules.engine.plan import Variant
from pgrealtime.turns import Turn

log = structlog.get_logger(__name__)


class Asking(Protocol):
    """What the hub needs of ``hub.probe``."""

    async def snapshot(self) -> tuple[str, str, bool]:
        """Return the row of ``SNAPSHOT_QUERY``."""
        ...

    async def ask(self, judging: Asked, budget: TimeBudget | None = None) -> frozenset[str]:
        """Find out what the judging wants to know, until nothing is left to ask.

        Args:
            judging: What wants to know.
            budget: What is asked once it is spent stays undecided; None is no bound.

        Returns:
            The collections whose rows nobody could be asked about.
        """
        ...

    async def bears_out(self, belief: Belief) -> bool:
        """Return whether the catalogue says what is believed of tables.

        Raises:
            DatabaseUnreachableError: There was no answer.
        """
        ...

    def reading(
        self, xids: Sized[Xid], seconds: float | None = None
    ) -> AbstractAsyncContextManager[Reading]:
        """Open a snapshot for several questions."""
        ...

    async def live_rows(
        self, events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return what the tables hold now of columns that the events' rows lack.

        Returns:
            The rows, and the collections whose rows couldn't be read.
        """
        ...


CheckCallers: TypeAlias = Callable[
    [Reading, Sized[Viewer], Sized[Group]], Awaitable[frozenset[Group]]
]
"""Finds those of viewers and groups to whom what was read live may not be shown, and returns such
groups (``hub.caller_check``)."""

Sights: TypeAlias = Callable[[Iterable[Group]], Iterable[Sight]]

_NO_NAMES: frozenset[str] = frozenset()
_NO_GROUPS: frozenset[Group] = frozenset()


class Verdict(Struct):
    """What was found out about events."""

    hits: list[Iterable[Group]]
    """Per event, the groups that may receive it."""
    undecided: frozenset[str] = _NO_NAMES
    """Collections whose rules could not be asked: who depends on one may miss something."""
    lost: frozenset[str] = _NO_NAMES
    """Collections of which anybody may miss something."""
    late: frozenset[Group] = frozenset()
    """Groups whose filters took too long: they must be judged anew, alone."""
    dear: frozenset[Group] = frozenset()
    """Those of them that took so long themselves, in the process."""
    unprovable: frozenset[Group] = frozenset()
    """Groups that may miss something, as their rules read columns that nobody knows any more."""
    unseen: frozenset[tuple[Group, Viewer]] = frozenset()
    """Groups' viewers who may miss something of what they expand."""
    unproved: Sequence[int] = ()
    """Places of events that some of those may miss."""
    partial: Sequence[int] = ()
    """Places of events whose rows lack columns."""
    unheard: Sequence[int] = ()
    """Places, ascending, of the events that somebody may miss."""

    def note_unprovable(self, judging: Judging) -> None:
        """Note who may miss which of the events, once nothing is left to ask."""
        places, groups = judging.unprovable()
        self.unproved = [*self.unproved, *places]
        self.unprovable |= groups - self.late

    def note_failed(
        self, events: Sequence[Event], failed: Iterable[tuple[int, Viewer | None]]
    ) -> None:
        """Note of which events something couldn't be had, perhaps for one viewer alone."""
        viewers: defaultdict[int, set[Viewer | None]] = defaultdict(set)
        for place, viewer in failed:
            viewers[place].add(viewer)
        unprovable: set[Group] = set()
        unseen: set[tuple[Group, Viewer]] = set()
        for place, missing in viewers.items():
            groups = self.hits[place]
            if None in missing:
                unprovable.update(groups)
            pairs = ((g, audience.receives[2]) for g in groups for audience in g.audiences)
            unseen.update((g, one) for g, one in pairs if one is not None and one in missing)
        self.unprovable |= unprovable
        self.unseen |= unseen
        self.unproved = [*self.unproved, *viewers]
        self.note_unheard(events)

    def note_unheard(self, events: Sequence[Event]) -> None:
        """Note which of the events it was found about somebody may miss."""
        names = self.undecided | self.lost
        if names or self.unproved:
            unproved = frozenset(self.unproved)
            self.unheard = [
                place
                for place, event in enumerate(events)
                if place in unproved or event.collection.name in names
            ]

    def unheard_in(
        self, events: Sequence[Event], places: range, failed: Sequence[int] = ()
    ) -> Unheard | None:
        """Return what must be told of some of the events, if anything.

        Args:
            events: Those that were judged.
            places: Of the events concerned.
            failed: Places, ascending, of events that could not be shown to somebody.
        """
        doubted = [place for place in self.unheard if place in places]
        if not doubted and not failed:
            return None
        names = _names_in(events[place] for place in doubted)
        first = min([*doubted[:1], *failed[:1]])
        is_unproved = any(place in places for place in self.unproved)
        return Unheard(
            undecided=self.undecided & names,
            lost=(self.lost & names) | _names_in(events[place] for place in failed),
            unprovable=self.unprovable if is_unproved else _NO_GROUPS,
            unseen=self.unseen if is_unproved else frozenset(),
            since=events[first].cursor,
        )


class Unheard(Struct, frozen=True):
    """Events that somebody may miss and has to be told of."""

    undecided: frozenset[str]
    """As the verdict has it."""
    lost: frozenset[str]
    """As the verdict has it."""
    unprovable: frozenset[Group]
    """As the verdict has it."""
    unseen: frozenset[tuple[Group, Viewer]]
    """As the verdict has it."""
    since: Cursor
    """Of the first of them: until they are told no position may pass it."""


def causes_of(
    gap: Announcement | None,
    events: Sequence[Event],
    verdict: Verdict,
    subscribed: Mapping[str, int],
) -> set[Xid]:
    """Return the transactions that readers must see before a slice's gaps are told.

    Args:
        gap: The slice's.
        events: The slice's.
        verdict: On them.
        subscribed: Collections that anybody may hear of; of the others nobody is told.
    """
    doubted = (events[place] for place in verdict.unheard)
    causes = {event.xid for event in doubted if subscribed.get(event.collection.name)}
    if gap is not None and gap.xid is not None and any(map(subscribed.get, gap.collections or ())):
        causes.add(gap.xid)
    return causes


class Judge:
    """Judges events by one set of collections; another set has another judge.

    Args:
        probe: Asks Postgres.
        matcher: Knows the groups.
        display: Knows what is shown beside rows.
        completion: Fills in what the WAL left out of rows.
        left_out: Counts records that were shown to somebody without a column, by collection.
    """

    def __init__(
        self,
        probe: Asking,
        matcher: Matcher,
        display: Display,
        completion: Completion,
        left_out: Counter[str],
    ) -> None:
        self._probe = probe
        self._matcher = matcher
        self._display = display
        self._completion = completion
        self._left_out = left_out

    async def judge(
        self, events: list[Event], budget: TimeBudget, among: Sized[Group] | None = None
    ) -> Verdict:
        """Return who may receive the events; completes the rows on the way.

        Args:
            events: In stream order.
            budget: For the questions of filters.
            among: The only groups to consider; None is all.
        """
        try:
            verdict = await self._find_out(events, budget, among)
        except Exception as error:  # noqa: BLE001 (a fault of ours in one rule or row stops nobody)
            log.error("judging.failed", error=type(error).__name__, at=where(error))  # noqa: TRY400 (see where)
            verdict = Verdict([()] * len(events), lost=_names_in(events))
        verdict.note_unheard(events)
        return verdict

    async def judge_in_turns(self, events: list[Event]) -> Verdict:
        """Judge as many at a time as the loop's other users can wait for.

        What raises here is left to each connection to judge by itself.
        """
        budget = TimeBudget.of_slice(len(events))
        if len(events) <= SLICE:
            verdict = await self._find_out(events, budget, None)
            verdict.note_unheard(events)
            return verdict
        whole = Verdict([])
        for first in range(0, len(events), SLICE):
            if first:
                await asyncio.sleep(0)
            some = events[first : first + SLICE]
            part = await self._find_out(some, budget, None)
            part.note_unheard(some)
            whole.hits += part.hits
            whole.undecided |= part.undecided
            whole.lost |= part.lost
            whole.late |= part.late
            whole.dear |= part.dear
            whole.unheard = [*whole.unheard, *(first + place for place in part.unheard)]
            whole.unprovable |= part.unprovable
            if part.partial or part.unproved:
                whole.unproved = [*whole.unproved, *(first + place for place in part.unproved)]
                whole.partial = [*whole.partial, *(first + place for place in part.partial)]
        return whole

    async def try_to_look_beside(
        self, events: Sequence[Event], verdict: Verdict, sights: Sights, check: CheckCallers
    ) -> Beside:
        """Return what is shown beside the rows; where that fails, the events count as lost."""
        try:
            return await self.look_beside(events, verdict, sights, check)
        except Exception as error:  # noqa: BLE001 (as in judge)
            log.error("display.failed", error=type(error).__name__, at=where(error))  # noqa: TRY400 (see where)
            verdict.lost |= _names_in(events)
            verdict.unheard = range(len(events))
            return NOTHING_BESIDE

    def has_more_to_show(self, events: Sequence[Event], verdict: Verdict) -> bool:
        """Whether anything may be shown beside the rows, or of what they lack."""
        return bool(verdict.partial) or self._display.has_more_to_show(events)

    async def look_beside(
        self,
        events: Sequence[Event],
        verdict: Verdict,
        sights: Sights,
        check: CheckCallers,
        *,
        is_shared: bool = False,
    ) -> Beside:
        """Return what is shown beside the rows, and of what they lack.

        Args:
            events: The slice's.
            verdict: On them.
            sights: What those want to see for whom it is done.
            check: Finds who of those may not be shown what is read live.
            is_shared: Whether all connections wait for it.
        """
        found: dict[int, Entire] = {}
        entire: dict[int, Entire] = {}

        async def enter(reading: Reading, places: Sized[int]) -> None:
            found.clear()
            found.update(await self._entire_of(reading, events, verdict, places))

        async def check_all(reading: Reading, viewers: Sized[Viewer]) -> None:
            seeing = frozenset[Group]().union(*(one.groups for one in found.values()))
            withheld = await check(reading, viewers, seeing)
            for one in found.values():
                one.groups -= withheld
            # Not before: it may fail, and then nobody is shown them.
            entire.update(found)
            found.clear()

        beside = await self._display.look_beside(
            events,
            verdict.hits,
            sights,
            verdict.partial,
            enter,
            check=check_all,
            is_shared=is_shared,
        )
        related = beside.related
        if verdict.partial or related.live_ids:
            for place in {*verdict.partial, *related.live_ids}:
                self._count_left_out(events[place], verdict.hits[place], entire.get(place))
            for place, one in entire.items():
                one.ids = related.live_ids.get(place)
            beside.entire = entire
        if related.failed:
            verdict.note_failed(events, related.failed)
        return beside

    def withhold(
        self, events: Sequence[Event], verdict: Verdict, beside: Beside, viewers: Sized[Viewer]
    ) -> None:
        """Leave out the related records that some viewers would be shown, and note that."""
        expands = beside.related.expands
        # Where nothing was found nothing is withheld.
        withheld = [
            (place, viewer)
            for (place, viewer), shown in expands.items()
            if viewer in viewers and shown not in {None, b"{}"}
        ]
        for one in withheld:
            del expands[one]
        if withheld:
            verdict.note_failed(events, withheld)

    def _count_left_out(self, event: Event, groups: Iterable[Group], entire: Entire | None) -> None:
        seeing = () if entire is None else entire.groups
        if any(group not in seeing for group in groups):
            self._left_out[event.collection.name] += 1

    async def _find_out(
        self, events: list[Event], budget: TimeBudget, among: Sized[Group] | None
    ) -> Verdict:
        partial = [
            place
            for place, event in enumerate(events)
            if event.action != "delete"
            and event.missing
            and self._matcher.is_heard(event.collection)
        ]
        lost = _NO_NAMES
        had_partial = bool(partial)
        if partial:
            completed = await self._completion.complete([events[place] for place in partial])
            lost = completed.unread
            partial = [place for place in partial if not completed.is_whole(events[place])]
        now = datetime.now(UTC)
        testing = budget.testing
        judging = self._matcher.matching(events, now, among, testing=testing)
        await _tested(judging, budget)
        undecided = await self._probe.ask(judging)
        verdict = Verdict(judging.hits, undecided=undecided, lost=lost, partial=partial)
        if had_partial:
            verdict.note_unprovable(judging)
        deferred = judging.deferred
        if self._matcher.has_costly or deferred:
            filters = self._matcher.matching(
                events, now, among, costly=True, testing=testing, deferred=deferred
            )
            await _tested(filters, budget)
            verdict.undecided |= await self._probe.ask(filters, budget)
            verdict.hits = _joined(verdict.hits, filters.hits)
            verdict.late = filters.undecided
            if had_partial:
                verdict.note_unprovable(filters)
            if verdict.late and among is None:
                await self._ask_for_many(events, verdict, budget, now)
                self._matcher.trials.note_late({group.variant for group in verdict.late})
        if testing.late:
            verdict.late |= testing.late.keys()
            verdict.dear |= testing.dear.keys()
        verdict.unprovable -= verdict.late
        return verdict

    async def _ask_for_many(
        self, events: list[Event], verdict: Verdict, budget: TimeBudget, now: datetime
    ) -> None:
        """Evaluate filters once more that were late, and that many connections share."""
        takers: Counter[Variant] = Counter()
        for group in verdict.late:
            if group.variant.is_costly:
                takers[group.variant] += group.shared
        again = {group for group in verdict.late if takers[group.variant] >= MANY_TAKERS}
        if not again:
            return
        filters = self._matcher.matching(
            events, now, again, costly=True, testing=budget.testing, deferred={}
        )
        await _tested(filters, budget)
        verdict.undecided |= await self._probe.ask(filters, budget.for_many())
        others = [tuple(group for group in groups if group not in again) for groups in verdict.hits]
        verdict.hits = _joined(others, filters.hits)
        verdict.late = (verdict.late - again) | filters.undecided
        verdict.note_unprovable(filters)

    async def _entire_of(
        self, reading: Reading, events: Sequence[Event], verdict: Verdict, places: Sized[int]
    ) -> dict[int, Entire]:
        """Return events with what live rows hold, for who may see these whole.

        Of what isn't known as it was, that is all that can be shown: who may see the row of now
        may know what it holds. To others it is left out.
        """
        rows = await _live_rows(reading, [events[place] for place in places])
        asked = [
            (place, event, row, verdict.hits[place])
            for place, event in ((place, events[place]) for place in places)
            if (row := rows.get((event.collection.name, event.record_id))) is not None
            and event.action != "delete"
        ]
        budget = TimeBudget.of_slice(len(asked))
        judging = self._matcher.matching_given(
            [(_with_row(event, row), groups) for _, event, row, groups in asked],
            datetime.now(UTC),
            budget.testing,
        )
        await _tested(judging, budget)
        await reading.judge(judging)
        return {
            place: Entire(_with_row(event, _shown_of(event, row) | event.row), frozenset(groups))
            for (place, event, row, _), groups in zip(asked, judging.hits, strict=True)
            if groups
        }


def _joined(
    some: Iterable[Iterable[Group]], more: Iterable[Iterable[Group]]
) -> list[Iterable[Group]]:
    return [(*a, *b) if b else a for a, b in zip(some, more, strict=True)]


async def _tested(judging: Judging, budget: TimeBudget) -> None:
    """Do what needs no Postgres, in turns with the loop's other users."""
    if budget.queue is None:
        turn = Turn()
        while not judging.go_on(turn.is_over):
            await turn.pause()
        return
    is_done = False
    while not is_done:
        async with budget.queue.work(budget.network) as turn:
            is_done = judging.go_on(turn.is_over)


def where(error: BaseException) -> str:
    """The line that raised it. What an error says, and its traceback with it, may show a row."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{at.filename}:{at.lineno}"


def _names_in(events: Iterable[Event]) -> frozenset[str]:
    return frozenset(event.collection.name for event in events)


async def _live_rows(reading: Reading, events: Iterable[Event]) -> dict[tuple[str, str], Row]:
    """Return the whole rows that the tables hold now for the events' records."""
    wanted: dict[str, tuple[Collection, dict[str, None]]] = {}
    for event in events:
        collection = event.collection
        wanted.setdefault(collection.name, (collection, {}))[1][event.record_id] = None
    rows: dict[tuple[str, str], Row] = {}
    for name, (collection, ids) in wanted.items():
        columns = [column.name for column in collection.table.columns]
        for values in await reading.texts(rows_statement(collection), {"ids": list(ids)}) or ():
            row: Row = dict(zip(columns, values, strict=True))
            rows[name, row[collection.key.name] or ""] = row
    return rows


def _with_row(event: Event, row: Row) -> Event:
    return Event(
        event.collection, event.action, event.record_id, row, event.cursor, event.xid, event.changes
    )


def _shown_of(event: Event, row: Row) -> Row:
    """Return what may be shown of a live row beside the columns that are known of the event.

    Not the address: whether it is shown is decided by the event's own columns.
    """
    hidden = event.collection.by_name.get("email") if event.collection.type == "auth" else None
    column = None if hidden is None else hidden.column
    if column is None:
        return row
    return {name: text for name, text in row.items() if name != column.name}
