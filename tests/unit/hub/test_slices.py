"""How a backlog is delivered: few writes where few events match, smaller parts where many do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence

from pgrealtime.hub.events.event import LIVE_SLICE_CHANGES, SLICE_CHANGES, Event, delivery_ranges
from pgrealtime.lsn import LSN, Cursor, Xid
from tests.topics import topic
from tests.unit.hub.harness import COLLECTIONS, HubHarness, MemorySink, insert, open_harness

KINDS = 50
COUNT = 2 * LIVE_SLICE_CHANGES + 500


def event(index: int, *, lsn: int = 100, ordinal: int | None = None) -> Event:
    collection = COLLECTIONS["posts"]
    cursor = Cursor(LSN(lsn), index if ordinal is None else ordinal)
    return Event(collection, "create", str(index), {"id": str(index)}, cursor, Xid(1))


def cut(events: Sequence[Event], groups: Sequence[Iterable[str]]) -> list[tuple[int, int]]:
    """Return first and end index of each part; ``groups`` receive the events."""
    return [(part.start, part.stop) for part in delivery_ranges(events, groups)]


def test_a_group_that_receives_all_events_is_given_them_in_parts() -> None:
    """Send buffers are checked after each part, so none grows by a whole backlog."""
    events = [event(index) for index in range(3 * SLICE_CHANGES + 10)]

    assert cut(events, [["all"]] * len(events)) == [
        (0, SLICE_CHANGES),
        (SLICE_CHANGES, 2 * SLICE_CHANGES),
        (2 * SLICE_CHANGES, 3 * SLICE_CHANGES),
        (3 * SLICE_CHANGES, 3 * SLICE_CHANGES + 10),
    ]


def test_groups_that_receive_few_events_are_given_them_at_once() -> None:
    """A message joined with others costs a tenth of a single one."""
    events = [event(index) for index in range(LIVE_SLICE_CHANGES)]

    assert cut(events, [[str(index % KINDS)] for index in range(LIVE_SLICE_CHANGES)]) == [
        (0, LIVE_SLICE_CHANGES)
    ]


def test_two_events_of_one_change_stay_together() -> None:
    """A position is between changes, never within one."""
    events = [event(index) for index in range(2 * SLICE_CHANGES)]
    events[SLICE_CHANGES] = event(SLICE_CHANGES, ordinal=SLICE_CHANGES - 1)

    assert cut(events, [["all"]] * len(events)) == [
        (0, SLICE_CHANGES + 1),
        (SLICE_CHANGES + 1, 2 * SLICE_CHANGES),
    ]


def test_a_slice_without_events_is_one_part() -> None:
    """A slice without events still has an end, and perhaps a gap to notify."""
    assert cut([], []) == [(0, 0)]


def kind(number: int) -> str:
    """Return the topic of the rows of one kind."""
    return topic("posts/*", filter=f'title = "k{number}"')


def ids(sink: MemorySink) -> list[int]:
    found = (re.search(r'"id":"(\d+)"', data) for _, _, data in sink.events()[1:])
    return [int(match[1]) for match in found if match is not None]


async def write_backlog(harness: HubHarness) -> None:
    """Commit rows of all kinds in turn, before the hub reads the first."""
    for first in range(0, COUNT, 100):
        harness.commit(*(insert(str(n), f"k{n % KINDS}") for n in range(first, first + 100)))


async def test_a_backlog_arrives_complete_and_in_order() -> None:
    """Subscribers of one kind receive it by few writes; a subscriber of all kinds, by parts."""
    async with open_harness(max_size=10_000_000) as harness:
        everything, all_of_it = harness.connect()
        await harness.subscribe(everything, "posts/*")
        sinks = []
        for number in range(KINDS):
            connection, sink = harness.connect()
            await harness.subscribe(connection, kind(number))
            sinks.append(sink)
        await asyncio.sleep(0)
        await write_backlog(harness)
        await harness.until_delivered()

    assert ids(all_of_it) == list(range(COUNT))
    for number, sink in enumerate(sinks):
        assert ids(sink) == list(range(number, COUNT, KINDS))
    assert all_of_it.writes > COUNT / SLICE_CHANGES


async def test_a_backlog_with_few_events_for_each_takes_few_writes() -> None:
    """One write for PB_CONNECT, and one for each slice."""
    async with open_harness(max_size=10_000_000) as harness:
        sinks = []
        for number in range(KINDS):
            connection, sink = harness.connect()
            await harness.subscribe(connection, kind(number))
            sinks.append(sink)
        await asyncio.sleep(0)
        await write_backlog(harness)
        await harness.until_delivered()

    assert [ids(sink) for sink in sinks] == [
        list(range(number, COUNT, KINDS)) for number in range(KINDS)
    ]
    assert {sink.writes for sink in sinks} == {1 + 3}


async def test_a_connection_that_subscribes_between_parts_receives_everything_once() -> None:
    """The connection catches up from the part that it had, and is LIVE again after the slice."""
    async with open_harness(max_size=10_000_000) as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        await asyncio.sleep(0)
        await write_backlog(harness)
        for part_number in range(1, 12):
            await sink.wait_for(1 + part_number * SLICE_CHANGES)
            await harness.subscribe(connection, "posts/*", *([kind(3)] if part_number % 2 else []))
        await harness.subscribe(connection, "posts/*")
        await sink.wait_for(1 + COUNT)
        await harness.until_delivered()

    received = [
        n for n, (_, name, _) in zip(ids(sink), sink.events()[1:], strict=True) if name == "posts/*"
    ]
    assert received == list(range(COUNT))


async def test_a_connection_that_becomes_slow_between_parts_misses_nothing() -> None:
    """It falls behind to the end of the last part, not to the beginning of the slice."""
    async with open_harness(max_size=10_000_000, send_buffer="16KiB") as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        await asyncio.sleep(0)
        await write_backlog(harness)
        await sink.wait_for(1 + 2 * SLICE_CHANGES)
        sink.is_stuck = True
        await harness.until_delivered()
        sink.unstick()
        await sink.wait_for(1 + COUNT)

    assert ids(sink) == list(range(COUNT))
