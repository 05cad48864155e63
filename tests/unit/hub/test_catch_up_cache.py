"""Connections that read on from the same place share the work, and never each other's rows."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller, Superuser
from pgrealtime.changes import Delete, Insert, Truncate, WholeRow
from pgrealtime.hub.catchup.slice_reader import (
    CachedSlice,
    CatchUpCache,
    CatchUpCacheKey,
    catch_up_cache_key,
)
from pgrealtime.hub.connections.output import MessageBatch
from pgrealtime.hub.evaluation.filter_limits import FilterBudget
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor
from tests.unit.hub.room import NOTES, PEOPLE, POSTS, MemorySink, Room, insert, open_room

COUNT = 1500
CONNECTIONS = 20


def ids(sink: MemorySink) -> list[str]:
    found = (re.search(r'"id":"(\w+)"', data) for _, _, data in sink.events()[1:])
    return [match[1] for match in found if match is not None]


def count_judged(room: Room, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many events each call judges from now on."""
    counts: list[int] = []
    matcher = room.hub._progress.generation.matcher
    start = matcher.start_evaluation

    def counted(events: Sequence[Event], *rest: Any, **more: Any) -> Any:
        counts.append(len(events))
        return start(events, *rest, **more)

    monkeypatch.setattr(matcher, "start_evaluation", counted)
    return counts


ALL_POSTS = 'posts/*?options={"query":{"filter":"title != \'x\'"}}'
"""Has a condition, so that answers may be missing; all have it."""


def stick(sinks: Sequence[MemorySink]) -> None:
    for sink in sinks:
        sink.is_stuck = True
        sink.overhead = 1_000_000


async def fall_behind(room: Room, sinks: Sequence[MemorySink]) -> None:
    """Let the clients take nothing while more is committed; one write fills their buffers."""
    stick(sinks)
    for first in range(0, COUNT, 50):
        room.commit(*(insert(str(n), f"k{n % 2}") for n in range(first, first + 50)))
        await room.settled()


async def test_who_fell_behind_together_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst that is more than the clients take would otherwise cost many times what it cost."""
    async with open_room(max_size=10_000_000) as room:
        sinks = []
        for _ in range(CONNECTIONS):
            connection, sink = room.connect()
            await room.subscribe(connection, "posts/*")
            sinks.append(sink)
        await asyncio.sleep(0)
        counts = count_judged(room, monkeypatch)
        await fall_behind(room, sinks)
        for sink in sinks:
            sink.unstick()
        for sink in sinks:
            await sink.wait_for(1 + COUNT)

        # CONNECTIONS * COUNT if each evaluated alone.
        assert COUNT <= sum(counts) < 2 * COUNT + 500
        async with asyncio.timeout(5.0):
            while room.hub._catch_up._tasks:
                await asyncio.sleep(0)
        assert not room.hub._catch_up._cache._slices
    assert [ids(sink) for sink in sinks] == [[str(n) for n in range(COUNT)]] * CONNECTIONS


def kind(number: int) -> str:
    options = json.dumps({"query": {"filter": f'title = "k{number}"'}})
    return f"posts/*?options={options}".replace(" ", "%20")


async def test_who_asks_something_else_is_judged_by_that() -> None:
    """They stand at the same cursor, and hear what their own filters admit."""
    async with open_room(max_size=10_000_000) as room:
        sinks = []
        for number in (0, 1, 0, 1):
            connection, sink = room.connect()
            await room.subscribe(connection, kind(number))
            sinks.append(sink)
        await asyncio.sleep(0)
        await fall_behind(room, sinks)
        for sink in sinks:
            sink.unstick()
        for sink in sinks:
            await sink.wait_for(1 + COUNT // 2)

    for place, sink in enumerate(sinks):
        assert ids(sink) == [str(n) for n in range(place % 2, COUNT, 2)]


async def test_who_sees_more_of_a_record_keeps_it_to_itself() -> None:
    """A guest that reads on after a superuser is not given the superuser's text."""
    async with open_room(max_size=10_000_000) as room:
        superuser, above = room.connect()
        await room.subscribe(superuser, "people/*", caller=Caller(Superuser("root")))
        guest, below = room.connect()
        await room.subscribe(guest, "people/*")
        await asyncio.sleep(0)
        stick((above, below))
        for number in range(100):
            room.commit(Insert(PEOPLE, {"id": str(number), "email": "a@b.c", "key": "k"}))
            await room.settled()
        above.unstick()
        await above.wait_for(101)
        below.unstick()
        await below.wait_for(101)

    assert all("a@b.c" in data for _, _, data in above.events()[1:])
    assert not any("a@b.c" in data for _, _, data in below.events())


async def test_position_is_each_connection_s_own() -> None:
    """One asked for positions and one didn't: the text is shared, the ids aren't."""
    async with open_room(max_size=10_000_000) as room:
        plain, without = room.connect()
        resumable, with_positions = room.connect(position="")
        for connection in (plain, resumable):
            await room.subscribe(connection, "posts/*")
        await asyncio.sleep(0)
        await fall_behind(room, (without, with_positions))
        for sink in (without, with_positions):
            sink.unstick()
            await sink.wait_for(1 + COUNT)

    assert {name for name, _, _ in without.events()} == {plain.id}
    positions = [name.removeprefix(f"{resumable.id}.") for name, _, _ in with_positions.events()]
    assert positions == sorted(set(positions))


@pytest.mark.parametrize("kind", ["undecided", "emptied"])
async def test_what_is_remembered_hides_no_gap(kind: str) -> None:
    """Each that comes by is told, by PB_RESYNC or by what it missed."""
    async with open_room() as room:
        start = f"{'x' * 40}.abcdef-{100:016x}-ffffffff"
        room.commit(insert("n", table=NOTES))
        room.commit(insert("a"), insert("b"))
        if kind == "emptied":
            room.commit(Truncate(POSTS))
        await room.settled()
        busy, busy_sink = room.connect(position=start)
        stick([busy_sink])
        await room.subscribe(busy, "notes/*")
        await busy_sink.wait_for(2)  # and doesn't take it: its task keeps what is remembered
        if kind == "undecided":
            room.database.undecided = frozenset({"posts"})
        heard = []
        for _ in range(2):
            connection, sink = room.connect(position=start)
            await room.subscribe(connection, ALL_POSTS)
            assert catch_up_cache_key(connection, 0) is not None
            heard.append([name for _, name, _ in await sink.wait_for(4)])

    assert heard == [["PB_CONNECT", ALL_POSTS, ALL_POSTS, "PB_RESYNC"]] * 2


async def test_what_is_remembered_hides_no_change_of_a_caller() -> None:
    """Who comes by is turned by its own row, though the work is shared with who isn't."""
    ann = AuthRecord(collection_id="pbc_people", collection_name="people", id="ann")
    async with open_room() as room:
        start = f"{'x' * 40}.abcdef-{100:016x}-ffffffff"
        room.commit(insert("n", table=NOTES))
        room.commit(insert("a"), Delete(PEOPLE, WholeRow({"id": "ann", "email": "", "key": ""})))
        await room.settled()
        busy, busy_sink = room.connect(position=start)
        stick([busy_sink])
        await room.subscribe(busy, "notes/*")
        await busy_sink.wait_for(2)
        guest, guest_sink = room.connect(position=start)
        await room.subscribe(guest, "posts/*")
        await guest_sink.wait_for(2)
        connection, sink = room.connect(position=start)
        await room.subscribe(connection, "posts/*", caller=Caller(ann))
        await sink.wait_for(2)
        room.commit(insert("b"))
        await sink.wait_for(3)

        assert connection.caller == Caller()


async def standing(
    room: Room, *topics: str, caller: Caller | None = None
) -> CatchUpCacheKey | None:
    connection, _ = room.connect()
    await room.subscribe(connection, *topics, caller=caller)
    for subscription in connection.subscriptions.values():
        subscription.read_point = None
    return catch_up_cache_key(connection, 0)


async def test_what_concerns_one_connection_alone_is_not_shared() -> None:
    """Several topics are joined; an own record shows more; a fresh topic leaves rows out.

    Of what was committed before it was submitted, that is: later changes are shared.
    """
    ann = Caller(AuthRecord(collection_id="pbc_people", collection_name="people", id="ann"))
    async with open_room() as room:
        room.database.insert_lsn = "0/64"
        fresh, _ = room.connect()
        await room.subscribe(fresh, "posts/*")

        assert await standing(room, "posts/*") is not None
        assert catch_up_cache_key(fresh, 0) is None
        fresh.cursor = Cursor(LSN(0x65), 0)
        assert catch_up_cache_key(fresh, 0) is not None
        assert await standing(room, "posts/*", "notes/*") is None
        assert await standing(room, "people/*", caller=ann) is None
        assert await standing(room, "nowhere/*") is None


async def test_standpoints_are_equal_for_the_same_rule_of_the_same_collections() -> None:
    """A rule with other values is another group, though the topic has the same name."""
    async with open_room() as room:
        here = await standing(room, "posts/*")
        assert here is not None
        there = await standing(room, "posts/*")
        another = await standing(room, "posts/1")
        assert another is not None

    assert here == there
    assert here != here._replace(group=another.group)
    assert here != here._replace(revision=1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def at_lsn(lsn: int) -> CatchUpCacheKey:
    return CatchUpCacheKey(0, Cursor(LSN(lsn), 0), None, None)  # type: ignore[arg-type]  # only compared


def found(recent: CatchUpCache, lsn: int) -> CachedSlice | None:
    return recent.get(at_lsn(lsn))


def test_what_was_found_out_is_true_for_a_moment() -> None:
    """A rule that asks the database may have another answer later."""
    clock = Clock()
    recent = CatchUpCache(clock)
    recent.store(
        at_lsn(1), [], MessageBatch([(0, b"x")]), Cursor(LSN(2), 0), FilterBudget(), checked=None
    )

    assert found(recent, 1) is not None
    clock.now = 1.1
    assert found(recent, 1) is None


def test_what_is_kept_is_bounded() -> None:
    """The oldest give way, also to themselves found out anew."""
    recent = CatchUpCache(Clock())
    batch = MessageBatch([(0, b"x" * 6_000_000)])
    for lsn in (1, 1, 2, 3):
        recent.store(at_lsn(lsn), [], batch, Cursor(LSN(9), 0), FilterBudget(), checked=None)

    assert [found(recent, lsn) is not None for lsn in (1, 2, 3)] == [False, True, True]


def test_what_nobody_may_have_any_more_is_let_go() -> None:
    """Also where nothing was heard: then there are no bytes to bound, but events."""
    clock = Clock()
    recent = CatchUpCache(clock)
    for lsn in range(1, 100):
        clock.now += 0.1
        recent.store(
            at_lsn(lsn), [], MessageBatch(), Cursor(LSN(9), 0), FilterBudget(), checked=None
        )

    assert len(recent._slices) <= 11


def test_what_is_too_large_is_not_kept() -> None:
    recent = CatchUpCache(Clock())
    for lsn in (1, 2):
        recent.store(
            at_lsn(lsn),
            [],
            MessageBatch([(0, b"x" * 17_000_000)]),
            Cursor(LSN(9), 0),
            FilterBudget(),
            checked=None,
        )

    assert not recent._slices
