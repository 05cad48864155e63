"""A new generation under open connections: in force between two slices, and for all at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.changes import Insert
from pgrealtime.collections.model import Collections
from tests.unit.hub.harness import (
    COLLECTIONS,
    DEADLINE,
    POSTS,
    HubHarness,
    MemorySink,
    at,
    insert,
    open_harness,
)

ANN = Caller(AuthRecord(collection_id="pbc_users", collection_name="users", id="ann"))
POSTS_COLLECTION = COLLECTIONS["posts"]


def posts(rule: str | None, *, name: str = "posts") -> Collections:
    shown = replace(POSTS_COLLECTION, name=name, list_rule=rule, view_rule=rule)
    return Collections((shown, COLLECTIONS["notes"]))


LOCKED = posts(None)


async def replace_collections(
    harness: HubHarness,
    collections: Collections,
    revalidate: Callable[[Caller], Caller] = lambda caller: caller,
) -> None:
    async with asyncio.timeout(DEADLINE):
        await harness.hub.replace_generation(collections, revalidate)


def received(sink: MemorySink) -> list[tuple[str, str]]:
    """Return topic and record id of each event."""
    events = [(name, json.loads(data)) for _, name, data in sink.events()]
    return [(name, data["record"]["id"]) for name, data in events if "record" in data]


async def subscribed(harness: HubHarness, *topics: str, caller: Caller | None = None) -> MemorySink:
    connection, sink = harness.connect()
    await harness.subscribe(connection, *topics, caller=caller)
    return sink


async def test_collections_that_cannot_be_used_leave_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who a caller is follows the collections in force, not those that were refused."""

    def fail(_collections: Collections) -> None:
        raise ValueError("no")

    async with open_harness() as harness:
        sink = await subscribed(harness, "posts/*", caller=ANN)
        monkeypatch.setattr(harness.hub, "_make_generation", fail)
        with pytest.raises(ValueError, match="no"):
            await replace_collections(harness, LOCKED, lambda _caller: Caller())
        assert harness.hub._registry.callers.revalidate(ANN) == ANN
        harness.commit(insert("a"))
        await harness.until_delivered()
    assert received(sink) == [("posts/*", "a")]


async def test_rules_are_in_force_from_the_next_event_on() -> None:
    """Without another call of the client."""
    async with open_harness() as harness:
        sink = await subscribed(harness, "posts/*")
        for number, collections in enumerate((COLLECTIONS, LOCKED, COLLECTIONS)):
            await replace_collections(harness, collections)
            harness.commit(insert(f"p{number}"))
            await harness.until_delivered()

        assert received(sink) == [("posts/*", "p0"), ("posts/*", "p2")]


async def test_a_slice_under_evaluation_is_finished_by_the_rules_from_before() -> None:
    """Later events are evaluated by the new rules, also if they were in the changelog before."""
    async with open_harness() as harness:
        sink = await subscribed(harness, "posts/*")
        harness.database.rows_gate = asyncio.Event()
        harness.commit(Insert(POSTS, {"id": "held"}))
        await harness.database.is_at_rows_gate.wait()
        harness.commit(insert("later"))
        replacing = asyncio.create_task(replace_collections(harness, LOCKED))
        await asyncio.sleep(0)
        assert not replacing.done()
        harness.database.rows_gate.set()
        await replacing
        await harness.until_delivered()

        assert received(sink) == [("posts/*", "held")]


async def test_slices_cut_before_are_cut_again() -> None:
    """Each slice of a long transaction is evaluated once, by one of the two generations."""
    async with open_harness() as harness:
        sink = await subscribed(harness, "posts/*", "pbc_posts/*")
        harness.commit(*(insert(f"{number:04}") for number in range(2000)))
        await sink.wait_for(2)
        await replace_collections(harness, posts("", name="letters"))
        await harness.until_delivered()
        harness.commit(insert("last"))
        await harness.until_delivered()

        ids = [f"{number:04}" for number in range(2000)] + ["last"]
        by_name = [record_id for name, record_id in received(sink) if name == "posts/*"]
        by_id = [record_id for name, record_id in received(sink) if name == "pbc_posts/*"]
        assert by_id == ids
        assert by_name == ids[: len(by_name)]
        assert 0 < len(by_name) < len(ids)


async def test_a_slow_connection_reads_on_by_the_new_rules() -> None:
    """What it has yet to receive is evaluated by the generation in force at that time."""
    async with open_harness(send_buffer=100) as harness:
        sink = await subscribed(harness, "pbc_posts/*")
        sink.is_stuck = True
        for number in range(10):
            harness.commit(insert(f"p{number}"))
            await harness.until_delivered()
        received_before = len(received(sink))
        assert received_before < 10
        await replace_collections(harness, posts('title = "seen"', name="letters"))
        harness.commit(insert("q", "seen"))
        await harness.until_delivered()
        sink.unstick()
        await sink.wait_for_bytes(b'"q"')

        assert received(sink)[received_before:] == [("pbc_posts/*", "q")]


async def test_topics_name_the_collections_in_force() -> None:
    """A renamed collection keeps its id, a removed one has no events, a new one has all of them."""
    old, new = Collections((POSTS_COLLECTION,)), Collections((COLLECTIONS["notes"],))
    topics = ("posts/*", "letters/*", "pbc_posts/1", "notes/*")
    async with open_harness() as harness:
        await replace_collections(harness, old)
        sink = await subscribed(harness, *topics)

        async def round_of(collections: Collections) -> set[str]:
            await replace_collections(harness, collections)
            before = len(received(sink))
            harness.commit(insert("1"), insert("1", table=COLLECTIONS["notes"].table.name))
            await harness.until_delivered()
            return {name for name, _ in received(sink)[before:]}

        assert await round_of(old) == {"posts/*", "pbc_posts/1"}
        assert await round_of(posts("", name="letters")) == {"letters/*", "pbc_posts/1", "notes/*"}
        assert await round_of(new) == {"notes/*"}
        assert await round_of(old) == {"posts/*", "pbc_posts/1"}


async def test_a_rule_that_cannot_be_used_denies() -> None:
    """Rules are checked before a reload. One that fails all the same denies only its collection."""
    async with open_harness() as harness:
        sink = await subscribed(harness, "posts/*", "notes/*")
        await replace_collections(harness, posts("no such field = 1"))
        harness.commit(insert("p"), insert("n", table=COLLECTIONS["notes"].table.name))
        await harness.until_delivered()

        assert received(sink) == [("notes/*", "n")]


async def test_a_caller_that_is_no_longer_accepted_is_a_guest_at_once() -> None:
    """A caller that the new configuration doesn't accept has a guest's rights."""
    own_posts = posts("title = @request.auth.id")
    async with open_harness() as harness:
        await replace_collections(harness, own_posts)
        sink = await subscribed(harness, "posts/*", caller=ANN)
        harness.commit(insert("1", "ann"))
        await harness.until_delivered()
        await replace_collections(harness, own_posts, lambda _: Caller())
        harness.commit(insert("2", "ann"))
        await harness.until_delivered()

        assert received(sink) == [("posts/*", "1")]


async def test_the_caller_of_a_call_in_progress_is_revalidated_too() -> None:
    """Its caller was authenticated by the configuration before the reload."""
    own_posts = posts("title = @request.auth.id")
    async with open_harness() as harness:
        await replace_collections(harness, own_posts)
        connection, sink = harness.connect()
        harness.database.gate = asyncio.Event()
        call = asyncio.create_task(harness.subscribe(connection, "posts/*", caller=ANN))
        await harness.database.wait_for_snapshot_queries(1)
        await replace_collections(harness, own_posts, lambda _: Caller())
        harness.database.gate.set()
        await call
        harness.commit(insert("1", "ann"))
        await harness.until_delivered()

        assert received(sink) == []


@pytest.mark.parametrize(
    "epochs",
    [("fedcba",), ("abcdef",), ("fedcba", "fedcba")],
    ids=["other tables", "other columns", "both"],
)
async def test_positions_of_a_continued_stream_stay_valid(epochs: Sequence[str]) -> None:
    """The stream was continued with other tables or columns: a client resumes without a gap."""
    async with open_harness() as harness:
        first = harness.commit(insert("1"))
        await harness.until_delivered()
        for epoch in epochs:
            harness.hub.stream_continued(epoch)
        harness.commit(insert("2"))
        await harness.until_delivered()
        connection, sink = harness.connect(last_event_id="x." + at(first, 1))
        await harness.subscribe(connection, "posts/*")
        await sink.wait_for(2)

        assert received(sink) == [("posts/*", "2")]
        assert sink.events()[-1][0].split(".")[1].startswith(f"{epochs[-1]}-")


async def test_an_epoch_that_returns_is_resumed_from_its_return_only() -> None:
    """In between its tables weren't all read; the position is another process's, further on."""
    async with open_harness() as harness:
        await harness.until_delivered()
        # Appended, and not delivered by this hub yet: no await until the connection is made.
        read_elsewhere = harness.commit(insert("1"))
        harness.hub.stream_continued("fedcba")
        harness.commit(insert("2"))
        harness.hub.stream_continued("abcdef")
        connection, sink = harness.connect(last_event_id="x." + at(read_elsewhere, 1))
        await harness.subscribe(connection, "posts/*")
        await sink.wait_for(2)

        assert [name for _, name, _ in sink.events()][:2] == ["PB_CONNECT", "PB_RESYNC"]


async def test_positions_of_another_history_do_not_come_back_with_a_switch() -> None:
    """Continuing the stream with other tables doesn't validate positions of a lost history."""
    async with open_harness() as harness:
        first = harness.commit(insert("1"))
        await harness.until_delivered()
        harness.hub.stream_started("fedcba")
        harness.hub.stream_continued("aaaaaa")
        connection, sink = harness.connect(last_event_id="x." + at(first, 1))
        await harness.subscribe(connection, "posts/*")
        await sink.wait_for(2)

        assert [name for _, name, _ in sink.events()] == ["PB_CONNECT", "PB_RESYNC"]


async def test_a_connection_whose_topics_exceed_a_limit_after_a_reload_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No call could be refused. When the client subscribes again, the answer has the reason."""
    topics = [
        f'posts/*?options={{"query":{{"filter":"title ~ \'{text}\'"}}}}' for text in ("a", "b")
    ]
    async with open_harness() as harness:
        (many, many_sink), (few, few_sink) = harness.connect(), harness.connect()
        await harness.subscribe(many, *topics)
        await harness.subscribe(few, topics[0])
        monkeypatch.setattr(
            "pgrealtime.hub.evaluation.filter_limits.UNINDEXED_FILTERS_PER_CONNECTION", 1
        )
        await harness.hub.replace_generation(COLLECTIONS, lambda caller: caller)
        harness.commit(insert("x", "ab"))
        await harness.until_delivered()
        await few_sink.wait_for(2)

        assert (many_sink.state, few_sink.state) == ("ended", "open")
        assert harness.hub.counters.closed_connections == {"limit": 1}
