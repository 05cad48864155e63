"""What the result of a slice records of events whose enrichment failed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.expand.plan import ExpandPlan, ExpandViewer
from pgrealtime.hub.connections.connection import Connection, Group, Subscription
from pgrealtime.hub.evaluation.evaluator import SliceResult
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.records.encode import View
from tests.unit.hub.harness import COLLECTIONS, MemorySink, viewer_of

EVENTS = [
    Event(COLLECTIONS["posts"], "update", "p", {"id": "p"}, Cursor(LSN(8), n), Xid(3))
    for n in range(1, 5)
]


def viewer() -> ExpandViewer:
    return viewer_of(ExpandPlan((), {}, ()))


def expanding(count: int) -> tuple[list[Group], list[ExpandViewer]]:
    """Return groups of one subscription each, and the viewers of their related records."""
    matcher, start = Matcher(COLLECTIONS), Cursor(LSN(0), 0)
    groups: list[Group] = []
    viewers = [viewer() for _ in range(count)]
    for number, one in enumerate(viewers):
        client = Connection("c", MemorySink(), address="", epoch="", cursor=start, now=0.0)
        topic = parse_topic(f'posts/*?options={{"query":{{"filter":"title = \'{number}\'"}}}}')
        made = Subscription(client, topic, View(), "")
        made.expand_viewer = one
        matcher.add(made, AuthRecord(collection_id="c", collection_name="people", id="ann"))
        assert made.group is not None
        groups.append(made.group)
    return groups, viewers


def failing(groups: Sequence[Group], viewers: Sequence[ExpandViewer]) -> SliceResult:
    """Return a result in which every enrichment of every event failed."""
    result = SliceResult([dict.fromkeys(groups)] * len(EVENTS))
    result.record_failed_enrichment(
        EVENTS, {(at, one) for at in range(len(EVENTS)) for one in viewers}
    )
    return result


def test_a_failed_expand_is_recorded_for_groups_that_receive_the_event() -> None:
    """A failed expand is a gap only for groups that receive the event."""
    groups, viewers = expanding(3)
    result = SliceResult([groups, groups[:2], groups, groups])
    result.record_failed_enrichment(EVENTS, {(1, viewers[0]), (1, viewers[2]), (2, viewers[1])})

    assert result.incomplete_expands == {(groups[0], viewers[0]), (groups[1], viewers[1])}
    assert list(result.gap_indexes) == [1, 2]


def test_recording_failed_expands_takes_linear_time() -> None:
    """Its cost is linear: a failed statement concerns every viewer of its batch."""

    def seconds(count: int) -> float:
        given = expanding(count)
        began = time.process_time()
        failing(*given)
        return time.process_time() - began

    few, many = min(seconds(200) for _ in range(3)), min(seconds(1600) for _ in range(2))

    assert many < 24 * few + 0.05
