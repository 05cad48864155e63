"""Which related records are loaded in slices of LIVE connections, and which for one connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Collection as Sized

import pytest

from pgrealtime.auth.principal import GUEST
from pgrealtime.changelog.memory import Changelog
from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.expand.load import CheckViewers, ExpandRequest, LoadLiveRows, RelatedRecords
from pgrealtime.expand.plan import ExpandPlan, ExpandViewer
from pgrealtime.hub.connections.connection import Connection, Group, Subscription
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.hub.delivery.enrichment import SliceEnricher, needs_of_groups
from pgrealtime.hub.evaluation.evaluator import SliceResult
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.records.encode import View
from pgrealtime.rule_queries.session import ReadSession
from tests.unit.hub.harness import COLLECTIONS, FakeDatabase, MemorySink, viewer_of

EVENT = Event(COLLECTIONS["posts"], "update", "p", {"id": "p"}, Cursor(LSN(8), 1), Xid(3))


class RecordingLoader:
    """Records the viewers that it is called for, and finds no records.

    ``is_late`` makes the calls with a time limit fail.
    """

    def __init__(self) -> None:
        self.is_late = False
        self.shared: list[ExpandViewer] = []
        self.limited: list[ExpandViewer] = []

    async def load_for_events(
        self,
        _events: Sequence[Event],
        _indexes: Iterable[int],
        requests: Iterable[ExpandRequest],
        _partial: Iterable[int] = (),
        **_callbacks: LoadLiveRows | CheckViewers | None,
    ) -> RelatedRecords:
        self.shared += [viewer for _, viewer in requests]
        return RelatedRecords()

    async def load_expands_within(
        self,
        _seconds: float,
        _events: Sequence[Event],
        requests: Iterable[ExpandRequest],
        _partial: Sequence[int],
        **_callbacks: CheckViewers | None,
    ) -> RelatedRecords | None:
        self.limited += [viewer for _, viewer in requests]
        return None if self.is_late else RelatedRecords()


@pytest.fixture
def loader() -> RecordingLoader:
    return RecordingLoader()


@pytest.fixture
def enricher(loader: RecordingLoader) -> SliceEnricher:
    made = SliceEnricher(
        FakeDatabase(),
        COLLECTIONS,
        Matcher(COLLECTIONS),
        lambda _node, _view, _expand: b"{}",
        row_history=RowHistory(Changelog(LSN(0), max_bytes=0, max_age_seconds=0)),
        omitted_column_counts=Counter(),
    )
    made.expanding_count = 1
    made._related_loader = loader  # type: ignore[assignment]
    return made


@pytest.fixture
def group() -> Callable[[ExpandViewer, int], Group]:
    def make(viewer: ExpandViewer, connection_count: int) -> Group:
        matcher = Matcher(COLLECTIONS)
        for _ in range(connection_count):
            start = Cursor(LSN(0), 0)
            client = Connection("c", MemorySink(), address="", epoch="", cursor=start, now=0.0)
            made = Subscription(client, parse_topic("posts/*"), View(), "")
            made.set_view(View(), viewer)
            client.connect("", start, None, 0.0)
            client.add_subscription("posts/*", made)
            client.end_call(start)
            client.go_live()
            matcher.add(made, GUEST)
        assert made.group is not None
        return made.group

    return make


async def excluded_viewers_of(enricher: SliceEnricher, group: Group) -> frozenset[ExpandViewer]:
    """Return the viewers whose related records were not loaded in the shared slice."""

    async def check(
        _session: ReadSession, _viewers: Sized[ExpandViewer], _groups: Sized[Group]
    ) -> frozenset[Group]:
        return frozenset()

    enrichment = await enricher.enrich(
        [EVENT], SliceResult([[group]]), needs_of_groups, check, is_shared=True
    )
    return enrichment.excluded_viewers


async def test_an_expand_of_few_connections_is_tried_for_one_connection_first(
    enricher: SliceEnricher, loader: RecordingLoader, group: Callable[[ExpandViewer, int], Group]
) -> None:
    """Once it was quick for one connection it is loaded for all, until it is late again."""
    plan = ExpandPlan((), {}, ())
    one, other = viewer_of(plan), viewer_of(plan)
    assert await excluded_viewers_of(enricher, group(one, 1)) == {one}
    enricher.record_expand_seconds([one], 0.0, 1)  # none of its events was of interest
    enricher.record_expand_seconds([one], 0.006, 1)
    assert await excluded_viewers_of(enricher, group(one, 1)) == {one}
    assert loader.limited == []

    enricher.record_expand_seconds([one], 0.005, 1)
    assert await excluded_viewers_of(enricher, group(other, MANY_CONNECTIONS - 1)) == frozenset()
    assert loader.limited == [other]

    loader.is_late = True
    assert await excluded_viewers_of(enricher, group(one, 1)) == {one}
    assert loader.limited == [other, one]
    assert await excluded_viewers_of(enricher, group(other, 1)) == {other}
    assert loader.limited == [other, one]
    assert loader.shared == []


async def test_an_expand_of_many_connections_is_loaded_for_all_at_once(
    enricher: SliceEnricher, loader: RecordingLoader, group: Callable[[ExpandViewer, int], Group]
) -> None:
    """Without a trial and without the time limit for few."""
    viewer = viewer_of(ExpandPlan((), {}, ()))
    assert await excluded_viewers_of(enricher, group(viewer, MANY_CONNECTIONS)) == frozenset()
    assert loader.shared == [viewer]
    assert loader.limited == []
