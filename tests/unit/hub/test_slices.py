"""How a backlog is cut: few writes for those whom few events concern, small ones for the others."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Sequence

from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.slices import LIVE_SLICE_CHANGES, SLICE_CHANGES, delivery_ranges
from pgrealtime.lsn import LSN, Cursor, Xid
from tests.unit.hub.room import COLLECTIONS, MemorySink, Room, insert, open_room

KINDS = 50
COUNT = 2 * LIVE_SLICE_CHANGES + 500


def event(place: int, *, lsn: int = 100, ordinal: int | None = None) -> Event:
    collection = COLLECTIONS["posts"]
    cursor = Cursor(LSN(lsn), place if ordinal is None else ordinal)
    return Event(collection, "create", str(place), {"id": str(place)}, cursor, Xid(1))


def cut(events: Sequence[Event], judged: Sequence[Iterable[str]]) -> list[tuple[int, int]]:
    return [(places.start, places.stop) for places in delivery_ranges(events, judged)]


def test_a_group_that_hears_everything_is_given_a_slice_at_a_time() -> None:
    """Its connections' buffers are checked in between, so nobody's grows by a whole backlog."""
    events = [event(place) for place in range(3 * SLICE_CHANGES + 10)]

    assert cut(events, [["all"]] * len(events)) == [
        (0, SLICE_CHANGES),
        (SLICE_CHANGES, 2 * SLICE_CHANGES),
        (2 * SLICE_CHANGES, 3 * SLICE_CHANGES),
        (3 * SLICE_CHANGES, 3 * SLICE_CHANGES + 10),
    ]


def test_groups_that_hear_little_are_given_everything_at_once() -> None:
    """Joined messages cost a tenth of single ones."""
    events = [event(place) for place in range(LIVE_SLICE_CHANGES)]

    assert cut(events, [[str(place % KINDS)] for place in range(LIVE_SLICE_CHANGES)]) == [
        (0, LIVE_SLICE_CHANGES)
    ]


def test_two_events_of_one_change_stay_together() -> None:
    """A position lies between changes, never within one."""
    events = [event(place) for place in range(2 * SLICE_CHANGES)]
    events[SLICE_CHANGES] = event(SLICE_CHANGES, ordinal=SLICE_CHANGES - 1)

    assert cut(events, [["all"]] * len(events)) == [
        (0, SLICE_CHANGES + 1),
        (SLICE_CHANGES + 1, 2 * SLICE_CHANGES),
    ]


def test_nothing_is_a_portion_too() -> None:
    """A slice without events still has an end, and perhaps a gap to tell of."""
    assert cut([], []) == [(0, 0)]


def kind(number: int) -> str:
    """The topic of the rows of one kind."""
    options = json.dumps({"query": {"filter": f'title = "k{number}"'}})
    return f"posts/*?options={options}".replace(" ", "%20")


def ids(sink: MemorySink) -> list[int]:
    found = (re.search(r'"id":"(\d+)"', data) for _, _, data in sink.events()[1:])
    return [int(match[1]) for match in found if match is not None]


async def write_backlog(room: Room) -> None:
    """Commit rows of all kinds in turn before the hub can look at the first."""
    for first in range(0, COUNT, 100):
        room.commit(*(insert(str(n), f"k{n % KINDS}") for n in range(first, first + 100)))


async def test_backlog_reaches_everybody_whole_and_in_order() -> None:
    """Those of one kind, and somebody who hears all; the former by few writes."""
    async with open_room(max_size=10_000_000) as room:
        everything, all_of_it = room.connect()
        await room.subscribe(everything, "posts/*")
        sinks = []
        for number in range(KINDS):
            connection, sink = room.connect()
            await room.subscribe(connection, kind(number))
            sinks.append(sink)
        await asyncio.sleep(0)
        await write_backlog(room)
        await room.settled()

    assert ids(all_of_it) == list(range(COUNT))
    for number, sink in enumerate(sinks):
        assert ids(sink) == list(range(number, COUNT, KINDS))
    assert all_of_it.writes > COUNT / SLICE_CHANGES


async def test_backlog_of_little_for_each_takes_few_writes() -> None:
    """PB_CONNECT, and one for each wide slice."""
    async with open_room(max_size=10_000_000) as room:
        sinks = []
        for number in range(KINDS):
            connection, sink = room.connect()
            await room.subscribe(connection, kind(number))
            sinks.append(sink)
        await asyncio.sleep(0)
        await write_backlog(room)
        await room.settled()

    assert [ids(sink) for sink in sinks] == [
        list(range(number, COUNT, KINDS)) for number in range(KINDS)
    ]
    assert {sink.writes for sink in sinks} == {1 + 3}


async def test_who_subscribes_anew_between_portions_hears_everything_once() -> None:
    """The connection reads on from the portion it had, and joins when the slice is over."""
    async with open_room(max_size=10_000_000) as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        await asyncio.sleep(0)
        await write_backlog(room)
        for portion in range(1, 12):
            await sink.wait_for(1 + portion * SLICE_CHANGES)
            await room.subscribe(connection, "posts/*", *([kind(3)] if portion % 2 else []))
        await room.subscribe(connection, "posts/*")
        await sink.wait_for(1 + COUNT)
        await room.settled()

    heard = [
        n for n, (_, name, _) in zip(ids(sink), sink.events()[1:], strict=True) if name == "posts/*"
    ]
    assert heard == list(range(COUNT))


async def test_who_becomes_slow_between_portions_misses_nothing() -> None:
    """It is put back to where the last portion ended, not to where the slice began."""
    async with open_room(max_size=10_000_000, send_buffer="16KiB") as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        await asyncio.sleep(0)
        await write_backlog(room)
        await sink.wait_for(1 + 2 * SLICE_CHANGES)
        sink.is_stuck = True
        await room.settled()
        sink.unstick()
        await sink.wait_for(1 + COUNT)

    assert ids(sink) == list(range(COUNT))
