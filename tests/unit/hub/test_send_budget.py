"""How many bytes may wait for each connection and for all; a larger change comes in parts."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Sequence

import pytest

from pgrealtime.hub.connections.connection import Connection, ConnectionState
from pgrealtime.hub.connections.send_budget import COUNTED_FROM_BYTES, SendBudget
from pgrealtime.hub.delivery import compose
from pgrealtime.lsn import LSN, Cursor
from tests.unit.hub.harness import HubHarness, MemorySink, at, insert, open_harness, update

KIB, MIB = 1024, 1024 * 1024
MESSAGE = 1000
"""Bytes of one event's title."""


def topics(count: int) -> list[str]:
    """Return topics with different texts, so that each receives its own message of a change."""
    return [f"posts/*?n={n}" for n in range(count)]


class SlowSink(MemorySink):
    """A client that takes the waiting bytes when ``take`` is called."""

    most = 0
    """The most bytes that waited for it at one time."""

    def write(self, data: bytes) -> None:
        super().write(data)
        self.most = max(self.most, self.buffered_bytes())

    def take(self) -> None:
        self._take()
        self._unstuck.set()

    async def take_all(self, count: int) -> list[tuple[str, str, str]]:
        while len(self.events()) < count:
            seen = len(self.events())
            self.take()
            await self.wait_for(seen + 1)
        self.take()
        return self.events()


def slow_connection(
    harness: HubHarness, *, position: str | None = None
) -> tuple[Connection, SlowSink]:
    sink = SlowSink()
    connection = harness.hub.open_connection(
        sink, address="127.0.0.1", last_event_id=None, position=position
    )
    return connection, sink


def topics_and_ids(events: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Return topic and record id of each event."""
    return [
        (topic, json.loads(data)["record"]["id"]) for _, topic, data in events if topic[:2] != "PB"
    ]


async def test_no_more_waits_for_a_connection_than_its_buffer_within_one_change_too() -> None:
    """Each topic receives the change once, and the next change after it."""
    async with open_harness(send_buffer=8 * KIB) as harness:
        connection, sink = slow_connection(harness)
        await harness.subscribe(connection, *topics(100))
        sink.is_stuck = True
        harness.commit(insert("a", "x" * MESSAGE))
        harness.commit(insert("b"))
        events = await sink.take_all(201)

    assert sink.most <= 8 * KIB + 2 * MESSAGE
    assert sorted(topics_and_ids(events)[:100]) == sorted((topic, "a") for topic in topics(100))
    assert sorted(topics_and_ids(events)[100:]) == sorted((topic, "b") for topic in topics(100))


async def test_all_pieces_of_a_change_but_the_last_carry_the_position_before_it() -> None:
    """A client that disconnects between two parts receives the whole change again.

    And a client that skips what is below the position of a list skips no part of it.
    """
    async with open_harness(send_buffer=4 * KIB) as harness:
        connection, sink = slow_connection(harness, position="")
        await harness.subscribe(connection, *topics(20))
        harness.commit(insert("a"))
        await sink.wait_for(21)
        sink.is_stuck = True
        made = harness.commit(insert("b", "x" * MESSAGE))
        events = (await sink.take_all(41))[21:]
        resumed, resumed_sink = slow_connection(harness, position=events[7][0])
        await harness.subscribe(resumed, *topics(20))
        repeated = topics_and_ids((await resumed_sink.wait_for(21))[1:])

    positions = [event[0].partition(".")[2] for event in events]
    assert positions == [at(made, 0)] * 19 + [at(made, 1)]
    assert sorted(repeated) == sorted((topic, "b") for topic in topics(20))


async def test_a_call_between_two_pieces_repeats_nothing_to_the_topics_that_stay() -> None:
    """Topics that the call keeps receive the change once."""
    async with open_harness(send_buffer=4 * KIB) as harness:
        connection, sink = slow_connection(harness)
        await harness.subscribe(connection, *topics(20))
        sink.is_stuck = True
        harness.commit(insert("a", "x" * MESSAGE))
        await sink.wait_for(3)
        kept = topics(20)[:10]
        await harness.subscribe(connection, *kept)
        harness.commit(insert("b"))
        for _ in range(100):
            if ("posts/*?n=9", "b") in topics_and_ids(sink.events()):
                break
            sink.take()
            await sink.wait_for(len(sink.events()) + 1)

    found = topics_and_ids(sink.events())
    assert len(found) == len(set(found))
    assert {(topic, "a") for topic in kept} <= set(found)


async def test_both_events_of_a_changed_key_arrive_although_they_come_in_parts() -> None:
    """Each topic receives both the delete and the create."""
    async with open_harness(send_buffer=2 * KIB) as harness:
        connection, sink = slow_connection(harness)
        await harness.subscribe(connection, *topics(10))
        sink.is_stuck = True
        harness.commit(update("new", "x" * MESSAGE, was="old"))
        events = await sink.take_all(21)

    expected = [(topic, record) for record in ("old", "new") for topic in topics(10)]
    assert sorted(topics_and_ids(events)) == sorted(expected)


async def test_many_topics_of_stalled_clients_cost_others_neither_time_nor_memory() -> None:
    """Twenty clients of 200 topics each: 80 MB for one change if it were composed at once."""
    async with open_harness(max_size=10 * MIB) as harness:
        stalled = [slow_connection(harness) for _ in range(20)]
        for number, (connection, sink) in enumerate(stalled):
            await harness.subscribe(connection, *(f"{topic}&of={number}" for topic in topics(200)))
            sink.is_stuck = True
        reading, reading_sink = harness.connect()
        await harness.subscribe(reading, "posts/*")
        tracemalloc.start()
        try:
            harness.commit(insert("a", "x" * 20 * KIB))
            await reading_sink.wait_for(2)
            await harness.until_delivered()
            for _, sink in stalled:
                await sink.wait_for(2)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert reading.state is ConnectionState.LIVE
        assert {connection.state for connection, _ in stalled} == {ConnectionState.CATCHING_UP}
    waiting = sum(len(sink.data) for _, sink in stalled)
    assert waiting < 20 * (256 + 64) * KIB
    # The sinks of this test are measured as well, twice while they are copied to grow.
    assert peak < 3 * waiting + 4 * MIB


async def test_a_change_that_is_too_much_for_a_shared_slice_is_delivered_to_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Connections left out of the shared slice catch up, whether they have many topics or few."""
    monkeypatch.setattr(compose, "_CHANGE_BYTES", 2 * MESSAGE)
    monkeypatch.setattr(compose, "_COMPOSED_BYTES", 4 * MESSAGE)
    async with open_harness() as harness:
        sinks = []
        for number, count in enumerate((4, 3, 4)):
            connection, sink = harness.connect()
            await harness.subscribe(connection, *(f"{name}&of={number}" for name in topics(count)))
            sinks.append((sink, count))
        harness.commit(insert("a", "x" * MESSAGE))
        await harness.until_delivered()
        for sink, count in sinks:
            await sink.wait_for(1 + count)

    assert [len(topics_and_ids(sink.events())) for sink, _ in sinks] == [4, 3, 4]


async def test_one_large_message_after_the_other_waits_until_there_is_room() -> None:
    """A client that never takes its message doesn't keep the others waiting."""
    async with open_harness(
        max_size=10 * MIB, send_buffer=64 * KIB, send_buffers=1 * MIB, stall_timeout=0.3
    ) as harness:
        slow = [slow_connection(harness) for _ in range(5)]
        for connection, sink in slow:
            await harness.subscribe(connection, "posts/*")
            sink.is_stuck = True
        harness.commit(insert("a", "x" * 400 * KIB))
        await harness.until_delivered()
        waiting = sum(sink.buffered_bytes() for _, sink in slow)
        assert waiting <= 1 * MIB
        last = slow[-1][1]
        last.unstick()
        await last.wait_for(2)

    assert topics_and_ids(last.events()) == [("posts/*", "a")]


async def test_small_buffers_count_as_well_where_none_may_be_large() -> None:
    """A message that exceeds a send buffer waits for budget even if it isn't large."""
    async with open_harness(send_buffer=4 * KIB, send_buffers=256 * KIB) as harness:
        slow = [slow_connection(harness) for _ in range(30)]
        for connection, sink in slow:
            await harness.subscribe(connection, "posts/*")
            sink.is_stuck = True
        harness.commit(insert("a", "x" * 30 * KIB))
        await harness.until_delivered()
        await asyncio.sleep(0.1)
        waiting = sum(sink.buffered_bytes() for _, sink in slow)

    assert 128 * KIB < waiting <= 256 * KIB


class _Filled(MemorySink):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.is_stuck = True
        self.data = b"x" * size


def _connection(size: int) -> Connection:
    cursor = Cursor(LSN(0), 0)
    return Connection("x", _Filled(size), address="", epoch="", cursor=cursor, now=0.0)


def test_the_more_waits_for_others_the_less_may_wait_for_one() -> None:
    """Down to a minimum that every connection has."""
    budget = SendBudget(per_connection_bytes=MIB, total_bytes=8 * MIB, clock=lambda: 0.0)
    assert budget.limit_bytes() == MIB
    waiting = []
    for _ in range(100):
        waiting.append(budget.limit_bytes())
        budget.update(_connection(waiting[-1]))

    assert waiting == sorted(waiting, reverse=True)
    assert sum(size for size in waiting if size > COUNTED_FROM_BYTES) <= 8 * MIB
    assert waiting[-1] == COUNTED_FROM_BYTES


@pytest.mark.parametrize("is_taken", [True, False])
def test_what_was_taken_is_free_again(*, is_taken: bool) -> None:
    """Bytes count until the client has taken them."""
    now = [0.0]
    budget = SendBudget(per_connection_bytes=MIB, total_bytes=MIB, clock=lambda: now[0])
    connection = _connection(MIB)
    budget.update(connection)
    assert budget.limit_bytes() == COUNTED_FROM_BYTES
    if is_taken:
        connection.writer.unstick()  # type: ignore[attr-defined]
    now[0] = 1.0
    budget.limit_bytes()

    assert budget.admits(MIB // 2) is is_taken
