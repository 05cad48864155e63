"""Connections that catch up from the same cursor share evaluated slices, but never foreign rows."""

from __future__ import annotations

import asyncio
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
from tests.clock import Clock
from tests.topics import topic
from tests.unit.hub.harness import (
    NOTES,
    PEOPLE,
    POSTS,
    HubHarness,
    MemorySink,
    insert,
    open_harness,
)

COUNT = 1500
CONNECTIONS = 20


def ids(sink: MemorySink) -> list[str]:
    matches = (re.search(r'"id":"(\w+)"', data) for _, _, data in sink.events()[1:])
    return [match[1] for match in matches if match is not None]


def count_evaluated(harness: HubHarness, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of events of each evaluation from now on."""
    counts: list[int] = []
    matcher = harness.hub._progress.generation.matcher
    start = matcher.start_evaluation

    def counted(events: Sequence[Event], *rest: Any, **more: Any) -> Any:
        counts.append(len(events))
        return start(events, *rest, **more)

    monkeypatch.setattr(matcher, "start_evaluation", counted)
    return counts


ALL_POSTS = 'posts/*?options={"query":{"filter":"title != \'x\'"}}'
"""A topic with a condition, so that verdicts may be missing. It admits every row."""


def stick(sinks: Sequence[MemorySink]) -> None:
    for sink in sinks:
        sink.is_stuck = True
        sink.overhead = 1_000_000


async def fall_behind(harness: HubHarness, sinks: Sequence[MemorySink]) -> None:
    """Commit rows while the clients take nothing; a single write fills their buffers."""
    stick(sinks)
    for first in range(0, COUNT, 50):
        harness.commit(*(insert(str(n), f"k{n % 2}") for n in range(first, first + 50)))
        await harness.until_delivered()


def make_evaluation_pause(harness: HubHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other tasks run before each evaluation, as a query of its rules would."""
    evaluator = harness.hub._progress.generation.evaluator
    evaluate = evaluator.evaluate

    async def paused(*args: Any) -> Any:
        await asyncio.sleep(0.001)
        return await evaluate(*args)

    monkeypatch.setattr(evaluator, "evaluate", paused)


@pytest.mark.parametrize("evaluation_pauses", [False, True])
async def test_connections_that_fell_behind_together_are_evaluated_once(
    monkeypatch: pytest.MonkeyPatch, *, evaluation_pauses: bool
) -> None:
    """Otherwise a burst that exceeds the send buffers would be evaluated for each connection."""
    async with open_harness(max_size=10_000_000) as harness:
        sinks = []
        for _ in range(CONNECTIONS):
            connection, sink = harness.connect()
            await harness.subscribe(connection, "posts/*")
            sinks.append(sink)
        await asyncio.sleep(0)
        counts = count_evaluated(harness, monkeypatch)
        await fall_behind(harness, sinks)
        if evaluation_pauses:
            make_evaluation_pause(harness, monkeypatch)
        for sink in sinks:
            sink.unstick()
        for sink in sinks:
            await sink.wait_for(1 + COUNT)

        # CONNECTIONS * COUNT if each evaluated alone.
        assert COUNT <= sum(counts) < 2 * COUNT + 500
        await harness.until_caught_up()
        assert not harness.hub._catch_up._cache._slices
    assert [ids(sink) for sink in sinks] == [[str(n) for n in range(COUNT)]] * CONNECTIONS


def kind(number: int) -> str:
    """Return the topic of the rows of one kind."""
    return topic("posts/*", filter=f'title = "k{number}"')


async def test_connections_with_other_filters_are_evaluated_by_their_own() -> None:
    """Connections at the same cursor receive what their own filters admit."""
    async with open_harness(max_size=10_000_000) as harness:
        sinks = []
        for number in (0, 1, 0, 1):
            connection, sink = harness.connect()
            await harness.subscribe(connection, kind(number))
            sinks.append(sink)
        await asyncio.sleep(0)
        await fall_behind(harness, sinks)
        for sink in sinks:
            sink.unstick()
        for sink in sinks:
            await sink.wait_for(1 + COUNT // 2)

    for index, sink in enumerate(sinks):
        assert ids(sink) == [str(n) for n in range(index % 2, COUNT, 2)]


async def test_what_only_one_caller_may_see_is_not_shared() -> None:
    """A guest that catches up after a superuser doesn't receive the superuser's records."""
    async with open_harness(max_size=10_000_000) as harness:
        superuser, broad_sink = harness.connect()
        await harness.subscribe(superuser, "people/*", caller=Caller(Superuser("root")))
        guest, narrow_sink = harness.connect()
        await harness.subscribe(guest, "people/*")
        await asyncio.sleep(0)
        stick((broad_sink, narrow_sink))
        for number in range(100):
            harness.commit(Insert(PEOPLE, {"id": str(number), "email": "a@b.c", "key": "k"}))
            await harness.until_delivered()
        broad_sink.unstick()
        await broad_sink.wait_for(101)
        narrow_sink.unstick()
        await narrow_sink.wait_for(101)

    assert all("a@b.c" in data for _, _, data in broad_sink.events()[1:])
    assert not any("a@b.c" in data for _, _, data in narrow_sink.events())


async def test_position_is_each_connection_s_own() -> None:
    """With positions and without: the data of messages is shared, ids aren't."""
    async with open_harness(max_size=10_000_000) as harness:
        plain, without = harness.connect()
        resumable, with_positions = harness.connect(position="")
        for connection in (plain, resumable):
            await harness.subscribe(connection, "posts/*")
        await asyncio.sleep(0)
        await fall_behind(harness, (without, with_positions))
        for sink in (without, with_positions):
            sink.unstick()
            await sink.wait_for(1 + COUNT)

    assert {name for name, _, _ in without.events()} == {plain.id}
    positions = [name.removeprefix(f"{resumable.id}.") for name, _, _ in with_positions.events()]
    assert positions == sorted(set(positions))


@pytest.mark.parametrize("kind", ["undecided", "truncated"])
async def test_a_cached_slice_hides_no_gap(kind: str) -> None:
    """Each connection that uses the cached slice is notified of the gap."""
    async with open_harness() as harness:
        start = f"{'x' * 40}.abcdef-{100:016x}-ffffffff"
        harness.commit(insert("n", table=NOTES))
        harness.commit(insert("a"), insert("b"))
        if kind == "truncated":
            harness.commit(Truncate(POSTS))
        await harness.until_delivered()
        busy, busy_sink = harness.connect(position=start)
        stick([busy_sink])
        await harness.subscribe(busy, "notes/*")
        await busy_sink.wait_for(2)  # and doesn't take it: while its task runs, the cache is kept
        if kind == "undecided":
            harness.database.undecided = frozenset({"posts"})
        received = []
        for _ in range(2):
            connection, sink = harness.connect(position=start)
            await harness.subscribe(connection, ALL_POSTS)
            assert catch_up_cache_key(connection, 0) is not None
            received.append([name for _, name, _ in await sink.wait_for(4)])

    assert received == [["PB_CONNECT", ALL_POSTS, ALL_POSTS, "PB_RESYNC"]] * 2


async def test_a_cached_slice_hides_no_change_of_a_caller() -> None:
    """An event of its row changes the caller, though another connection evaluated the slice."""
    ann = AuthRecord(collection_id="pbc_people", collection_name="people", id="ann")
    async with open_harness() as harness:
        start = f"{'x' * 40}.abcdef-{100:016x}-ffffffff"
        harness.commit(insert("n", table=NOTES))
        harness.commit(insert("a"), Delete(PEOPLE, WholeRow({"id": "ann", "email": "", "key": ""})))
        await harness.until_delivered()
        busy, busy_sink = harness.connect(position=start)
        stick([busy_sink])
        await harness.subscribe(busy, "notes/*")
        await busy_sink.wait_for(2)
        guest, guest_sink = harness.connect(position=start)
        await harness.subscribe(guest, "posts/*")
        await guest_sink.wait_for(2)
        connection, sink = harness.connect(position=start)
        await harness.subscribe(connection, "posts/*", caller=Caller(ann))
        await sink.wait_for(2)
        harness.commit(insert("b"))
        await sink.wait_for(3)

        assert connection.caller == Caller()


async def subscribed_key(
    harness: HubHarness, *topics: str, caller: Caller | None = None
) -> CatchUpCacheKey | None:
    """Subscribe a connection; return the key by which it shares slices."""
    connection, _ = harness.connect()
    await harness.subscribe(connection, *topics, caller=caller)
    for subscription in connection.subscriptions.values():
        subscription.read_point = None
    return catch_up_cache_key(connection, 0)


async def test_slices_that_concern_one_connection_alone_are_not_shared() -> None:
    """Not shared are slices of several topics, of callers with an own record, and of new topics.

    A new topic leaves out changes that its read point has seen; later slices of it are shared.
    """
    ann = Caller(AuthRecord(collection_id="pbc_people", collection_name="people", id="ann"))
    async with open_harness() as harness:
        harness.database.insert_lsn = "0/64"
        fresh, _ = harness.connect()
        await harness.subscribe(fresh, "posts/*")

        assert await subscribed_key(harness, "posts/*") is not None
        assert catch_up_cache_key(fresh, 0) is None
        fresh.cursor = Cursor(LSN(0x65), 0)
        assert catch_up_cache_key(fresh, 0) is not None
        assert await subscribed_key(harness, "posts/*", "notes/*") is None
        assert await subscribed_key(harness, "people/*", caller=ann) is None
        assert await subscribed_key(harness, "nowhere/*") is None


async def test_cache_keys_are_equal_for_the_same_rule_of_the_same_generation() -> None:
    """A rule with other values is another group, though the topic has the same text."""
    async with open_harness() as harness:
        key = await subscribed_key(harness, "posts/*")
        assert key is not None
        same = await subscribed_key(harness, "posts/*")
        another = await subscribed_key(harness, "posts/1")
        assert another is not None

    assert key == same
    assert key != key._replace(group=another.group)
    assert key != key._replace(revision=1)


def key_at(lsn: int) -> CatchUpCacheKey:
    return CatchUpCacheKey(0, Cursor(LSN(lsn), 0), None, None)  # type: ignore[arg-type]  # only compared


def lookup(cache: CatchUpCache, lsn: int) -> CachedSlice | None:
    return cache.get(key_at(lsn))


def test_a_cached_slice_expires() -> None:
    """A rule that needs a query may have another verdict later."""
    clock = Clock()
    cache = CatchUpCache(clock)
    cache.store(
        key_at(1), [], MessageBatch([(0, b"x")]), Cursor(LSN(2), 0), FilterBudget(), checked=None
    )

    assert lookup(cache, 1) is not None
    clock.now += 1.1
    assert lookup(cache, 1) is None


def test_the_cache_is_bounded() -> None:
    """The oldest slices are dropped first, also for a slice that is stored again."""
    cache = CatchUpCache(Clock())
    batch = MessageBatch([(0, b"x" * 6_000_000)])
    for lsn in (1, 1, 2, 3):
        cache.store(key_at(lsn), [], batch, Cursor(LSN(9), 0), FilterBudget(), checked=None)

    assert [lookup(cache, lsn) is not None for lsn in (1, 2, 3)] == [False, True, True]


def test_expired_slices_are_dropped() -> None:
    """Also slices without messages: they hold no bytes that count, but events."""
    clock = Clock()
    cache = CatchUpCache(clock)
    for lsn in range(1, 100):
        clock.now += 0.1
        cache.store(
            key_at(lsn), [], MessageBatch(), Cursor(LSN(9), 0), FilterBudget(), checked=None
        )

    assert len(cache._slices) <= 11


def test_a_slice_that_is_too_large_is_not_cached() -> None:
    """A slice beyond the bound of the whole cache isn't stored."""
    cache = CatchUpCache(Clock())
    for lsn in (1, 2):
        cache.store(
            key_at(lsn),
            [],
            MessageBatch([(0, b"x" * 17_000_000)]),
            Cursor(LSN(9), 0),
            FilterBudget(),
            checked=None,
        )

    assert not cache._slices
