"""Who may receive events, and what is shown beside their rows; where needed Postgres is asked."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Protocol, TypeAlias

import structlog
from msgspec import Struct

from pgrealtime.hub.allowance import Allowance
from pgrealtime.hub.display import NOTHING_BESIDE, Beside, Display, Sight
from pgrealtime.hub.event import Event, Versions
from pgrealtime.hub.expand import Reading
from pgrealtime.hub.match import Group, Judging, Matcher
from pgrealtime.hub.probe import Asked, LiveRow
from pgrealtime.hub.slices import SLICE
from pgrealtime.lsn import Cursor, Xid
from pgrealtime.turns import Turn

log = structlog.get_logger(__name__)


class Asking(Protocol):
    """What the hub needs of ``hub.probe``."""

    async def snapshot(self) -> tuple[str, str, bool]:
        """Return the row of ``SNAPSHOT_QUERY``."""
        ...

    async def ask(self, judging: Asked, allowance: Allowance | None = None) -> frozenset[str]:
        """Find out what the judging wants to know, until nothing is left to ask.

        Args:
            judging: What wants to know.
            allowance: What is asked once it is spent stays undecided; None is no bound.

        Returns:
            The collections whose rows nobody could be asked about.
        """
        ...

    def reading(self, xids: Sized[Xid]) -> AbstractAsyncContextManager[Reading]:
        """Open a snapshot for several questions."""
        ...

    async def live_rows(
        self, events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return what the tables hold now for the events' records.

        Returns:
            The rows, and the collections about which nobody could be asked.
        """
        ...


Sights: TypeAlias = Callable[[Iterable[Group]], Iterable[Sight]]

_NO_NAMES: frozenset[str] = frozenset()


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
    unheard: Sequence[int] = ()
    """Places, ascending, of the events that are of ``undecided`` or ``lost``."""

    def note_unheard(self, events: Sequence[Event]) -> None:
        """Note which of the events it was found about somebody may miss."""
        if names := self.undecided | self.lost:
            self.unheard = [
                place for place, event in enumerate(events) if event.collection.name in names
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
        return Unheard(
            undecided=self.undecided & names,
            lost=(self.lost & names) | _names_in(events[place] for place in failed),
            since=events[first].cursor,
        )


class Unheard(Struct, frozen=True):
    """Events that somebody may miss and has to be told of."""

    undecided: frozenset[str]
    """As the verdict has it."""
    lost: frozenset[str]
    """As the verdict has it."""
    since: Cursor
    """Of the first of them: until they are told no position may pass it."""


class Judge:
    """Judges events by one set of collections; another set has another judge.

    Args:
        probe: Asks Postgres.
        matcher: Knows the groups.
        display: Knows what is shown beside rows.
    """

    def __init__(self, probe: Asking, matcher: Matcher, display: Display) -> None:
        self._probe = probe
        self._matcher = matcher
        self._display = display
        self._versions = Versions()

    async def judge(
        self, events: list[Event], allowance: Allowance, among: Sized[Group] | None = None
    ) -> Verdict:
        """Return who may receive the events; completes the rows on the way.

        Args:
            events: In stream order.
            allowance: For the questions of filters.
            among: The only groups to consider; None is all.
        """
        try:
            verdict = await self._find_out(events, allowance, among)
        except Exception as error:  # noqa: BLE001 (a fault of ours in one rule or row stops nobody)
            log.error("judging.failed", error=type(error).__name__, at=where(error))  # noqa: TRY400 (see where)
            verdict = Verdict([()] * len(events), lost=_names_in(events))
        verdict.note_unheard(events)
        return verdict

    async def judge_in_turns(self, events: list[Event]) -> Verdict:
        """Judge as many at a time as the loop's other users can wait for.

        What raises here is left to each connection to judge by itself.
        """
        whole, allowance = Verdict([]), Allowance.for_all(len(events))
        for first in range(0, len(events), SLICE):
            if first:
                await asyncio.sleep(0)
            some = events[first : first + SLICE]
            part = await self._find_out(some, allowance, None)
            part.note_unheard(some)
            whole.hits += part.hits
            whole.undecided |= part.undecided
            whole.lost |= part.lost
            whole.late |= part.late
            whole.dear |= part.dear
            whole.unheard = [*whole.unheard, *(first + place for place in part.unheard)]
        return whole

    async def look_beside(
        self, events: Sequence[Event], verdict: Verdict, sights: Sights
    ) -> Beside:
        """Return what is shown beside the rows; where that fails, the events count as lost."""
        try:
            return await self._display.look_beside(events, verdict.hits, sights)
        except Exception as error:  # noqa: BLE001 (as in judge)
            log.error("display.failed", error=type(error).__name__, at=where(error))  # noqa: TRY400 (see where)
            verdict.lost |= _names_in(events)
            verdict.unheard = range(len(events))
            return NOTHING_BESIDE

    async def _find_out(
        self, events: list[Event], allowance: Allowance, among: Sized[Group] | None
    ) -> Verdict:
        partial = [event for event in events if event.action != "delete" and event.missing]
        live, lost = await self._probe.live_rows(partial) if partial else ({}, _NO_NAMES)
        if partial:
            _prove(partial, live, self._versions)
        now = datetime.now(UTC)
        testing = allowance.testing
        judging = self._matcher.matching(events, now, among, testing=testing)
        await _tested(judging, allowance)
        undecided = await self._probe.ask(judging)
        verdict = Verdict(judging.hits, undecided=undecided, lost=lost)
        deferred = judging.deferred
        if self._matcher.has_costly or deferred:
            filters = self._matcher.matching(
                events, now, among, costly=True, testing=testing, deferred=deferred
            )
            await _tested(filters, allowance)
            verdict.undecided |= await self._probe.ask(filters, allowance)
            verdict.undecided |= allowance.unanswered
            verdict.hits = [
                (*a, *b) if b else a for a, b in zip(verdict.hits, filters.hits, strict=True)
            ]
            verdict.late = filters.undecided
        if testing.late:
            verdict.late |= testing.late.keys()
            verdict.dear |= testing.dear.keys()
        if partial:
            _complete(partial, live)
        return verdict


async def _tested(judging: Judging, allowance: Allowance) -> None:
    """Do what needs no Postgres, in turns with the loop's other users."""
    if allowance.queue is None:
        turn = Turn()
        while not judging.go_on(turn.is_over):
            await turn.pause()
        return
    is_done = False
    while not is_done:
        async with allowance.queue.work(allowance.whose) as turn:
            is_done = judging.go_on(turn.is_over)


def where(error: BaseException) -> str:
    """The line that raised it. What an error says, and its traceback with it, may show a row."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{at.filename}:{at.lineno}"


def _names_in(events: Iterable[Event]) -> frozenset[str]:
    return frozenset(event.collection.name for event in events)


def _prove(
    events: Sequence[Event], live: Mapping[tuple[str, str], LiveRow], versions: Versions
) -> None:
    """Fill in columns that the WAL left out as they were then, so that rules may be judged on them.

    The live row of the same transaction has them, but for those that it wrote again later.
    """
    for event in events:
        found = live.get((event.collection.name, event.record_id))
        if found is not None and found.xid == event.xid:
            later = versions.written_after(event)
            kept = {name: text for name, text in found.row.items() if name not in later}
            event.row = {**kept, **event.row}


def _complete(events: Sequence[Event], live: Mapping[tuple[str, str], LiveRow]) -> None:
    """Fill in what is still unknown from any live row, to be shown."""
    for event in events:
        found = live.get((event.collection.name, event.record_id))
        if found is not None:
            event.row = {**found.row, **event.row}
