"""Which expansions are made in the slices that all connections wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest

from pgrealtime.auth.principal import GUEST
from pgrealtime.expand.load import Check, Enter, Related, Wanted
from pgrealtime.expand.plan import Plan, Viewer
from pgrealtime.hub.connections.connection import Connection, Subscription
from pgrealtime.hub.delivery.render import Display, sights_of_audiences
from pgrealtime.hub.evaluation.matcher import Group, Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.records.encode import View
from pgrealtime.rule_queries.filter_trials import MANY_TAKERS
from tests.unit.hub.room import COLLECTIONS, GivenDatabase, MemorySink

EVENT = Event(COLLECTIONS["posts"], "update", "p", {"id": "p"}, Cursor(LSN(8), 1), Xid(3))


class Expansions:
    """Notes what is asked of it, and finds nothing; ``is_late`` is that it isn't done in time."""

    def __init__(self) -> None:
        self.is_late = False
        self.shared: list[Viewer] = []
        self.limited: list[Viewer] = []

    async def related(
        self,
        _events: Sequence[Event],
        _places: Iterable[int],
        wanted: Iterable[Wanted],
        _partial: Iterable[int] = (),
        **_told: Enter | Check | None,
    ) -> Related:
        self.shared += [viewer for _, viewer in wanted]
        return Related()

    async def expands_within(
        self,
        _seconds: float,
        _events: Sequence[Event],
        wanted: Iterable[Wanted],
        _partial: Sequence[int],
        **_told: Check | None,
    ) -> Related | None:
        self.limited += [viewer for _, viewer in wanted]
        return None if self.is_late else Related()


@pytest.fixture
def expansions() -> Expansions:
    return Expansions()


@pytest.fixture
def display(expansions: Expansions) -> Display:
    made = Display(
        GivenDatabase(),
        COLLECTIONS,
        Matcher(COLLECTIONS).planner,
        nulls="zero",
        on_doubt=lambda: None,
    )
    made.expanding = 1
    made._expander = expansions  # type: ignore[assignment]
    return made


@pytest.fixture
def group() -> Callable[[Viewer, int], Group]:
    def make(viewer: Viewer, takers: int) -> Group:
        matcher = Matcher(COLLECTIONS)
        for _ in range(takers):
            start = Cursor(LSN(0), 0)
            client = Connection("c", MemorySink(), address="", epoch="", cursor=start, now=0.0)
            client.is_live = True
            made = Subscription(client, parse_topic("posts/*"), View(), "")
            made.viewer = viewer
            matcher.add(made, GUEST)
        assert made.group is not None
        return made.group

    return make


def viewer_of(plan: Plan) -> Viewer:
    return Viewer(plan=plan, sees_hidden=False, own=None, seen={}, managed={})


async def late_of(display: Display, group: Group) -> frozenset[Viewer]:
    beside = await display.look_beside([EVENT], [[group]], sights_of_audiences, is_shared=True)
    return beside.late


async def test_what_few_ask_for_is_tried_where_nobody_waits_first(
    display: Display, expansions: Expansions, group: Callable[[Viewer, int], Group]
) -> None:
    """Once it was quick there all who ask the same are served together, until it is late."""
    plan = Plan((), {}, ())
    one, other = viewer_of(plan), viewer_of(plan)
    assert await late_of(display, group(one, 1)) == {one}
    display.note_seconds([one], 0.0, 1)  # none of its events was of interest
    display.note_seconds([one], 0.006, 1)
    assert await late_of(display, group(one, 1)) == {one}
    assert expansions.limited == []

    display.note_seconds([one], 0.005, 1)
    assert await late_of(display, group(other, MANY_TAKERS - 1)) == frozenset()
    assert expansions.limited == [other]

    expansions.is_late = True
    assert await late_of(display, group(one, 1)) == {one}
    assert expansions.limited == [other, one]
    assert await late_of(display, group(other, 1)) == {other}
    assert expansions.limited == [other, one]
    assert expansions.shared == []


async def test_what_many_ask_for_is_made_for_all_at_once(
    display: Display, expansions: Expansions, group: Callable[[Viewer, int], Group]
) -> None:
    viewer = viewer_of(Plan((), {}, ()))
    assert await late_of(display, group(viewer, MANY_TAKERS)) == frozenset()
    assert expansions.shared == [viewer]
    assert expansions.limited == []
