"""A client whose filter is slow waits for itself; the others go on without it."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import quote

import pytest

from pgrealtime.hub.connections.connection import LIVE, Connection
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.hub.evaluation.filter_limits import SHARED_FILTER_SECONDS
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.slow_queries import (
    SLICE_FILTER_SECONDS,
    TimeBudget,
)
from pgrealtime.rules.engine.batch_query import PairQuestion, Question
from tests.unit.hub.room import (
    DEADLINE,
    NOTES,
    GivenDatabase,
    MemorySink,
    Room,
    at,
    insert,
    open_room,
)


def asking(far: int, name: str = "posts/*") -> str:
    """A topic whose filter nobody but Postgres can decide; by ``far`` it is of another shape."""
    text = " && ".join(
        ["geoDistance(id, 2, 3, 4) >= 0"] + ["geoDistance(title, 1, 1, 1) > 1"] * far
    )
    return f"{name}?options=" + quote(json.dumps({"query": {"filter": text}}))


QUICK, SLOW = asking(0), asking(1)


class Filters(GivenDatabase):
    """Admits all; what is asked of titles takes ``seconds``, the first times those of ``first``.

    Who has all the time waits at the gate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = SLICE_FILTER_SECONDS
        self.first: list[float] = []
        self.open_gate = asyncio.Event()
        self.open_gate.set()
        self.is_waiting = asyncio.Event()
        self.gates_all = False
        """Whether those wait there who have little time, too."""
        self.put: list[bool] = []
        """Of each slow question whether others waited for it."""

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        while questions := evaluation.questions():
            assert budget is not None
            for question in questions:
                await self._answer(question, budget)
                question.is_postponed = budget.is_spent()
            evaluation.resume()
            if budget.is_spent():
                break
        return frozenset()

    async def _answer(self, question: Question, budget: TimeBudget) -> None:
        assert isinstance(question, PairQuestion)
        if "title" in question.test.column_names:
            self.put.append(budget.is_limited)
            budget.spend(self.first.pop(0) if self.first else self.seconds)
            if self.gates_all or not budget.is_limited:
                self.is_waiting.set()
                await self.open_gate.wait()
        question.accept([(place,) for place in range(len(question.pairs))])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ids(sink: MemorySink) -> list[str]:
    found = (json.loads(data) for _, name, data in sink.events() if name.startswith("posts"))
    return [data["record"]["id"] for data in found]


async def subscribed(room: Room, *topics: str) -> tuple[Connection, MemorySink]:
    connection, sink = room.connect()
    await room.subscribe(connection, *topics)
    await live(connection)
    return connection, sink


async def live(connection: Connection) -> None:
    async with asyncio.timeout(DEADLINE):
        while connection.state is not LIVE:
            await asyncio.sleep(0)


def is_isolated(connection: Connection) -> bool:
    return connection.is_isolated  # it changes between awaits


async def at_rest(room: Room) -> None:
    async with asyncio.timeout(DEADLINE):
        while room.hub._catch_up._tasks:
            await asyncio.sleep(0)


async def test_others_go_on_and_the_slow_one_hears_all_in_order_when_it_is_answered() -> None:
    """Those who ask something else of Postgres stay with the others."""
    database = Filters()
    async with open_room(database=database) as room:
        quick, quick_sink = await subscribed(room, QUICK)
        _, other_sink = await subscribed(room, "posts/*")
        room.commit(insert("tried"))
        await room.settled()
        await at_rest(room)
        slow, slow_sink = await subscribed(room, SLOW, "posts")
        database.open_gate.clear()
        for n in range(5):
            room.commit(insert(f"n{n}"))
            await room.settled()
        await database.is_waiting.wait()

        assert ids(other_sink) == ids(quick_sink) == ["tried", *(f"n{n}" for n in range(5))]
        assert (quick.state is LIVE, quick.is_isolated) == (True, False)
        assert (slow.state is LIVE, slow.is_isolated) == (False, True)
        assert ids(slow_sink) == []
        database.open_gate.set()
        await slow_sink.wait_for(1 + 10)
        assert ids(slow_sink) == [f"n{n}" for n in range(5) for _ in range(2)]


async def test_a_known_slow_one_costs_the_others_no_question_whatever_it_asks() -> None:
    """One question of its own in little time, then only its own."""
    database = Filters()
    async with open_room(database=database) as room:
        slow, slow_sink = await subscribed(room, SLOW)
        for n in range(6):
            room.commit(insert(f"n{n}"))
            await room.settled()
            await at_rest(room)
            if n < 3:
                continue
            await room.subscribe(slow, asking(1, f"posts/n{n + 1}"), asking(1))
            await at_rest(room)

    assert database.put.count(True) == 1
    assert set(ids(slow_sink)) == {f"n{n}" for n in range(6)}


async def test_nobody_waits_for_a_filter_that_was_never_tried_or_was_slow_when_it_was() -> None:
    """A client can send new ones all the time, and from new connections."""
    database = Filters()
    database.gates_all = True
    async with open_room(database=database) as room:
        _, other_sink = await subscribed(room, "posts/*")
        for n in range(4):
            database.open_gate.clear()
            slow, slow_sink = await subscribed(room, asking(1 + n // 2))
            room.commit(insert(f"n{n}"))
            await room.settled()
            assert ids(other_sink) == [f"n{n}" for n in range(n + 1)]
            await database.is_waiting.wait()
            assert ids(slow_sink) == []
            database.open_gate.set()
            await at_rest(room)
            assert ids(slow_sink) == [f"n{n}"]
            room.hub.remove_connection(slow)


@pytest.mark.parametrize(("share", "is_quick"), [(0.0, True), (0.4, True), (0.6, False)])
async def test_once_quick_alone_it_is_evaluated_with_others_whoever_uses_it(
    *, share: float, is_quick: bool
) -> None:
    """With others it shares the time, so quick is who needs less than half of it."""
    database = Filters()
    database.seconds = share * SLICE_FILTER_SECONDS
    async with open_room(database=database) as room:
        first, _ = await subscribed(room, SLOW)
        for n in range(3):
            if n == 1:
                other, _ = await subscribed(room, SLOW)
            room.commit(insert(f"n{n}"))
            await room.settled()
            assert is_isolated(first) == (n == 0 or not is_quick)
            await live(first)
            if n:
                await live(other)

    assert (database.put == [True] * 3) == is_quick


async def test_a_change_of_another_collection_tries_nothing() -> None:
    async with open_room(database=Filters()) as room:
        slow, _ = await subscribed(room, SLOW)
        room.commit(insert("n1", table=NOTES))
        await room.settled()
        assert not is_isolated(slow)
        room.commit(insert("n0"))
        await room.settled()
        assert is_isolated(slow)


async def test_it_comes_back_when_it_was_quick_for_a_while() -> None:
    """Each time it is slow that takes twice as long; nothing is lost or heard twice by it."""
    database, clock = Filters(), Clock()
    async with open_room(database=database, clock=clock) as room:
        slow, slow_sink = await subscribed(room, SLOW)
        for pause in (5, 10):
            database.seconds = SLICE_FILTER_SECONDS
            room.commit(insert(f"slow{pause}"))
            await room.settled()
            await at_rest(room)
            clock.now += 0.6 * pause
            database.seconds = 0
            room.commit(insert(f"early{pause}"))
            await room.settled()
            await at_rest(room)
            assert is_isolated(slow)
            clock.now += 0.6 * pause
            room.commit(insert(f"late{pause}"))
            await room.settled()
            await live(slow)
            assert not is_isolated(slow)
            room.commit(insert(f"live{pause}"))
            await room.settled()

    names = [f"{name}{pause}" for pause in (5, 10) for name in ("slow", "early", "late", "live")]
    assert ids(slow_sink) == names


async def test_what_was_late_for_all_and_is_quick_alone_is_forgiven() -> None:
    """Whose question it was that took the time isn't known before each is asked alone."""
    database = Filters()
    async with open_room(database=database) as room:
        one, sink = await subscribed(room, SLOW)
        database.first, database.seconds = [0, SLICE_FILTER_SECONDS], 0
        for name in ("a", "b", "c"):
            room.commit(insert(name))
            await room.settled()
            await live(one)

    assert ids(sink) == ["a", "b", "c"]
    assert database.put == [True] * 4  # alone, with all, alone again, with all again


async def test_many_changes_at_once_may_take_longer_than_one() -> None:
    """Who comes back after a break has many to judge; that alone makes nobody slow."""
    database = Filters()
    async with open_room(database=database) as room:
        made = room.commit(*(insert(f"n{n}") for n in range(5)))
        await room.settled()
        database.first, database.seconds = [SLICE_FILTER_SECONDS], 0
        one, sink = room.connect(position=f"{'x' * 40}.{at(made, 0)}")
        await room.subscribe(one, SLOW)
        await live(one)

    assert ids(sink) == [f"n{n}" for n in range(5)]
    assert database.put == [True] * 4  # of all, of one, of two, of the other two


async def test_many_with_the_same_slow_filter_share_the_answers_of_a_few() -> None:
    """What others are handed counts for them as well: their filter is as slow."""
    database = Filters()
    async with open_room(database=database) as room:
        many = [await subscribed(room, SLOW) for _ in range(40)]
        database.open_gate.clear()
        room.commit(insert("n0"))
        async with asyncio.timeout(DEADLINE):
            while database.put.count(False) < 8:
                await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        database.open_gate.set()
        await at_rest(room)

        # Of each of eight one in little time and one in all the time.
        assert (database.put.count(True), database.put.count(False)) == (8, 8)
        assert all(ids(sink) == ["n0"] for _, sink in many)
        assert all(is_isolated(connection) for connection, _ in many)
        room.commit(insert("n1"))
        await room.settled()
        await at_rest(room)
        assert all(ids(sink) == ["n0", "n1"] for _, sink in many)
        assert database.put.count(True) == 8


@pytest.mark.parametrize("count", [MANY_CONNECTIONS - 1, MANY_CONNECTIONS])
async def test_what_many_share_has_more_time_before_they_are_isolated(count: int) -> None:
    """Apart each of them would ask; for a few that is better than to let all others wait."""
    database = Filters()
    database.seconds = 2 * SLICE_FILTER_SECONDS
    async with open_room(database=database) as room:
        many = [await subscribed(room, SLOW, "posts") for _ in range(count)]
        for n in range(3):
            room.commit(insert(f"n{n}"))
            await room.settled()
            await at_rest(room)

    heard = [name for n in range(3) for name in (f"n{n}", f"n{n}")]
    assert all(ids(sink) == heard for _, sink in many)
    assert {is_isolated(connection) for connection, _ in many} == {count < MANY_CONNECTIONS}
    assert (database.put == [True, True] * 3) == (count >= MANY_CONNECTIONS)


async def test_what_many_share_is_isolated_when_it_takes_longer_than_that_as_well() -> None:
    database = Filters()
    database.seconds = SHARED_FILTER_SECONDS
    async with open_room(database=database) as room:
        many = [await subscribed(room, SLOW) for _ in range(MANY_CONNECTIONS)]
        room.commit(insert("n0"))
        await room.settled()
        await at_rest(room)

    assert all(ids(sink) == ["n0"] for _, sink in many)
    assert all(is_isolated(connection) for connection, _ in many)


async def test_a_slow_one_is_read_for_once_at_a_time_however_much_is_committed() -> None:
    database = Filters()
    async with open_room(database=database) as room:
        await subscribed(room, SLOW)
        room.commit(insert("a"))
        await room.settled()
        await at_rest(room)
        database.open_gate.clear()
        for n in range(5):
            room.commit(insert(f"n{n}"))
            await room.settled()

        names = [task.get_name() for task in asyncio.all_tasks()]
        assert sum(name.startswith("catch-up ") for name in names) == 1


@pytest.mark.parametrize("topics", [(SLOW, "PB_RESYNC"), (SLOW,)])
async def test_a_slow_one_that_the_changelog_has_passed_is_told_or_ended(
    topics: tuple[str, ...],
) -> None:
    database = Filters()
    async with open_room(database=database, max_size=500) as room:
        slow, sink = await subscribed(room, *topics)
        slow.first_call_answered_at = 0.0  # long ago: it may be ended
        database.open_gate.clear()
        room.commit(insert("first"))
        await database.is_waiting.wait()
        for n in range(20):
            room.commit(insert(f"n{n}"))
            await room.settled()
        database.open_gate.set()
        if "PB_RESYNC" in topics:
            await sink.wait_for_bytes(b'"reason":"expired"')
            await sink.wait_for_bytes(b'"id":"n19"')
        else:
            await sink.wait_until("ended")

    assert ids(sink)[0] == "first"


async def test_a_slow_one_that_leaves_while_it_waits_leaves_nothing_behind() -> None:
    database = Filters()
    async with open_room(database=database) as room:
        slow, _sink = await subscribed(room, SLOW)
        database.open_gate.clear()
        room.commit(insert("a"))
        await database.is_waiting.wait()
        room.hub.remove_connection(slow)
        async with asyncio.timeout(DEADLINE):
            while room.hub._catch_up._isolated_semaphore._value < 8:
                await asyncio.sleep(0)

        replays = room.hub._catch_up
        assert (replays._caught_up, replays._tasks) == ({}, {})
        assert room.hub._progress.generation.matcher._remote_filter_tables == {}


async def test_who_asked_for_it_is_told_its_position_although_it_stays_isolated() -> None:
    database = Filters()
    async with open_room(database=database) as room:
        slow, sink = await subscribed(room, SLOW)
        room.commit(insert("a"))
        await room.settled()
        await at_rest(room)
        await room.subscribe(slow, SLOW, "PB_CURSOR")
        await sink.wait_for(3)

    assert [name for _, name, _ in sink.events()] == ["PB_CONNECT", SLOW, "PB_CURSOR"]
    assert slow.is_isolated


async def test_who_reads_on_for_another_reason_doesn_t_wait_for_the_slow_ones() -> None:
    """However many of them there are."""
    database = Filters()
    async with open_room(database=database) as room:
        database.open_gate.clear()
        for _ in range(20):
            await subscribed(room, SLOW)
        made = room.commit(insert("a"))
        await room.settled()
        async with asyncio.timeout(DEADLINE):
            while database.put.count(False) < 8:
                await asyncio.sleep(0)
        back, sink = room.connect(position=f"{'x' * 40}.{at(made, 0)}")
        await room.subscribe(back, "posts/*")
        await sink.wait_for(2)

    assert ids(sink) == ["a"]


def fitting(times: int) -> str:
    """A topic whose filter nearly fits everywhere in a text of many ``a``."""
    text = f"title ~ '%{'a_' * times}b%' || title = '{'a' * 900}'"
    return "posts/*?options=" + quote(json.dumps({"query": {"filter": text}}))


DEAR, DEAREST = fitting(8), fitting(100)
"""Of 2,900 units of work for a row, and of 30,000: more than it is tried apart."""


@pytest.mark.parametrize("topic", [DEAR, DEAREST])
async def test_a_filter_that_is_dear_in_the_process_waits_for_itself_alone(topic: str) -> None:
    """What is too much even then Postgres is asked; it hears all, in order and once."""
    clock = Clock()
    async with open_room(database=Filters(), clock=clock) as room:
        room.database.seconds = 0  # type: ignore[attr-defined]
        dear, dear_sink = await subscribed(room, topic, "notes/*")
        other, other_sink = await subscribed(room, "posts/*")
        for n in range(3):
            await live(dear)
            room.commit(insert(f"n{n}", "a" * 900))
            await room.settled()
            assert dear.state is not LIVE
            assert ids(other_sink) == [f"n{m}" for m in range(n + 1)]
            await at_rest(room)
        await live(dear)
        room.commit(insert("n3", "a" * 900))
        await room.settled()
        await at_rest(room)
        assert is_isolated(dear)
        assert ids(dear_sink) == ids(other_sink) == [f"n{n}" for n in range(4)]
        clock.now += 6
        room.commit(insert("n4", "short"))
        await room.settled()
        await live(dear)

        assert not is_isolated(dear)
        assert (other.state is LIVE, len(ids(other_sink))) == (True, 5)
