"""Other collections under open connections: taken between two slices, and by all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.changes import Insert
from pgrealtime.collections.model import Collections
from tests.unit.hub.room import (
    COLLECTIONS,
    DEADLINE,
    POSTS,
    MemorySink,
    Room,
    at,
    insert,
    open_room,
)

ANN = Caller(AuthRecord(collection_id="pbc_users", collection_name="users", id="ann"))
POSTS_OF_NOW = COLLECTIONS["posts"]


def posts(rule: str | None, *, name: str = "posts") -> Collections:
    shown = replace(POSTS_OF_NOW, name=name, list_rule=rule, view_rule=rule)
    return Collections((shown, COLLECTIONS["notes"]))


LOCKED = posts(None)


async def use(
    room: Room,
    collections: Collections,
    reconsider: Callable[[Caller], Caller] = lambda caller: caller,
) -> None:
    async with asyncio.timeout(DEADLINE):
        await room.hub.replace_generation(collections, reconsider)


def heard(sink: MemorySink) -> list[tuple[str, str]]:
    """Topic and record id of what came after PB_CONNECT."""
    events = [(name, json.loads(data)) for _, name, data in sink.events()]
    return [(name, data["record"]["id"]) for name, data in events if "record" in data]


async def subscribed(room: Room, *topics: str, caller: Caller | None = None) -> MemorySink:
    connection, sink = room.connect()
    await room.subscribe(connection, *topics, caller=caller)
    return sink


async def test_collections_that_cannot_be_used_leave_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who a caller is follows the collections in force, not those that were refused."""

    def fail(_collections: Collections) -> None:
        raise ValueError("no")

    async with open_room() as room:
        sink = await subscribed(room, "posts/*", caller=ANN)
        monkeypatch.setattr(room.hub, "_make_generation", fail)
        with pytest.raises(ValueError, match="no"):
            await use(room, LOCKED, lambda _caller: Caller())
        assert room.hub._registry.callers.revalidate(ANN) == ANN
        room.commit(insert("a"))
        await room.settled()
    assert heard(sink) == [("posts/*", "a")]


async def test_rules_are_in_force_from_the_next_event_on() -> None:
    async with open_room() as room:
        sink = await subscribed(room, "posts/*")
        for number, collections in enumerate((COLLECTIONS, LOCKED, COLLECTIONS)):
            await use(room, collections)
            room.commit(insert(f"p{number}"))
            await room.settled()

        assert heard(sink) == [("posts/*", "p0"), ("posts/*", "p2")]


async def test_a_slice_that_is_being_judged_is_finished_by_the_rules_of_before() -> None:
    """What comes after it is not, although it was there already."""
    async with open_room() as room:
        sink = await subscribed(room, "posts/*")
        room.database.rows_gate = asyncio.Event()
        room.commit(Insert(POSTS, {"id": "held"}))
        await room.database.is_holding.wait()
        room.commit(insert("later"))
        using = asyncio.create_task(use(room, LOCKED))
        await asyncio.sleep(0)
        assert not using.done()
        room.database.rows_gate.set()
        await using
        await room.settled()

        assert heard(sink) == [("posts/*", "held")]


async def test_what_is_cut_already_is_cut_anew() -> None:
    """A transaction of many slices: each is judged once, by one of the two."""
    async with open_room() as room:
        sink = await subscribed(room, "posts/*", "pbc_posts/*")
        room.commit(*(insert(f"{number:04}") for number in range(2000)))
        await sink.wait_for(2)
        await use(room, posts("", name="letters"))
        await room.settled()
        room.commit(insert("last"))
        await room.settled()

        ids = [f"{number:04}" for number in range(2000)] + ["last"]
        by_name = [record_id for name, record_id in heard(sink) if name == "posts/*"]
        by_id = [record_id for name, record_id in heard(sink) if name == "pbc_posts/*"]
        assert by_id == ids
        assert by_name == ids[: len(by_name)]
        assert 0 < len(by_name) < len(ids)


async def test_a_slow_connection_reads_on_by_the_new_rules() -> None:
    """It is behind; what it has yet to hear is judged by what is in force when it hears it."""
    async with open_room(send_buffer=100) as room:
        sink = await subscribed(room, "pbc_posts/*")
        sink.is_stuck = True
        for number in range(10):
            room.commit(insert(f"p{number}"))
            await room.settled()
        got = len(heard(sink))
        assert got < 10
        await use(room, posts('title = "seen"', name="letters"))
        room.commit(insert("q", "seen"))
        await room.settled()
        sink.unstick()
        await sink.wait_for_bytes(b'"q"')

        assert heard(sink)[got:] == [("pbc_posts/*", "q")]


async def test_topics_mean_what_the_collections_of_now_say() -> None:
    """A renamed one keeps its id; a removed one is nothing; a new one begins."""
    old, new = Collections((POSTS_OF_NOW,)), Collections((COLLECTIONS["notes"],))
    topics = ("posts/*", "letters/*", "pbc_posts/1", "notes/*")
    async with open_room() as room:
        await use(room, old)
        sink = await subscribed(room, *topics)

        async def round_of(collections: Collections) -> set[str]:
            await use(room, collections)
            before = len(heard(sink))
            room.commit(insert("1"), insert("1", table=COLLECTIONS["notes"].table.name))
            await room.settled()
            return {name for name, _ in heard(sink)[before:]}

        assert await round_of(old) == {"posts/*", "pbc_posts/1"}
        assert await round_of(posts("", name="letters")) == {"letters/*", "pbc_posts/1", "notes/*"}
        assert await round_of(new) == {"notes/*"}
        assert await round_of(old) == {"posts/*", "pbc_posts/1"}


async def test_a_rule_that_cannot_be_used_denies() -> None:
    """It is checked before; whatever gets here all the same hurts only its own collection."""
    async with open_room() as room:
        sink = await subscribed(room, "posts/*", "notes/*")
        await use(room, posts("no such field = 1"))
        room.commit(insert("p"), insert("n", table=COLLECTIONS["notes"].table.name))
        await room.settled()

        assert heard(sink) == [("notes/*", "n")]


async def test_who_is_known_no_more_is_a_guest_at_once() -> None:
    mine = posts("title = @request.auth.id")
    async with open_room() as room:
        await use(room, mine)
        sink = await subscribed(room, "posts/*", caller=ANN)
        room.commit(insert("1", "ann"))
        await room.settled()
        await use(room, mine, lambda _: Caller())
        room.commit(insert("2", "ann"))
        await room.settled()

        assert heard(sink) == [("posts/*", "1")]


async def test_a_call_under_way_is_reconsidered_too() -> None:
    """Its caller was recognised by the configuration of before."""
    mine = posts("title = @request.auth.id")
    async with open_room() as room:
        await use(room, mine)
        connection, sink = room.connect()
        room.database.gate = asyncio.Event()
        call = asyncio.create_task(room.subscribe(connection, "posts/*", caller=ANN))
        await room.database.asked_again(1)
        await use(room, mine, lambda _: Caller())
        room.database.gate.set()
        await call
        room.commit(insert("1", "ann"))
        await room.settled()

        assert heard(sink) == []


@pytest.mark.parametrize(
    "epochs",
    [("fedcba",), ("abcdef",), ("fedcba", "fedcba")],
    ids=["other tables", "other columns", "both"],
)
async def test_positions_of_the_stream_that_was_gone_on_from_stay_good(
    epochs: Sequence[str],
) -> None:
    async with open_room() as room:
        first = room.commit(insert("1"))
        await room.settled()
        for epoch in epochs:
            room.hub.stream_continued(epoch)
        room.commit(insert("2"))
        await room.settled()
        connection, sink = room.connect(last_event_id="x." + at(first, 1))
        await room.subscribe(connection, "posts/*")
        await sink.wait_for(2)

        assert heard(sink) == [("posts/*", "2")]
        assert sink.events()[-1][0].split(".")[1].startswith(f"{epochs[-1]}-")


async def test_positions_of_another_history_do_not_come_back_with_a_switch() -> None:
    async with open_room() as room:
        first = room.commit(insert("1"))
        await room.settled()
        room.hub.stream_started("fedcba")
        room.hub.stream_continued("aaaaaa")
        connection, sink = room.connect(last_event_id="x." + at(first, 1))
        await room.subscribe(connection, "posts/*")
        await sink.wait_for(2)

        assert [name for _, name, _ in sink.events()] == ["PB_CONNECT", "PB_RESYNC"]


async def test_whose_topics_become_too_many_by_a_reload_is_ended_and_not_mute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no call that could be refused; coming back it is told by the answer to its own."""
    topics = [
        f'posts/*?options={{"query":{{"filter":"title ~ \'{text}\'"}}}}' for text in ("a", "b")
    ]
    async with open_room() as room:
        (many, many_sink), (few, few_sink) = room.connect(), room.connect()
        await room.subscribe(many, *topics)
        await room.subscribe(few, topics[0])
        monkeypatch.setattr("pgrealtime.hub.evaluation.quotas.UNINDEXED_FILTERS_PER_CONNECTION", 1)
        await room.hub.replace_generation(COLLECTIONS, lambda caller: caller)
        room.commit(insert("x", "ab"))
        await room.settled()
        await few_sink.wait_for(2)

        assert (many_sink.state, few_sink.state) == ("ended", "open")
        assert room.hub.counters.closed_connections == {"limit": 1}
