"""A connection whose filter is slow is isolated: it waits for its filter, and others don't."""

from __future__ import annotations

import asyncio
import json

import pytest

from pgrealtime.hub.connections.connection import LIVE, Connection
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.hub.evaluation.filter_limits import SHARED_FILTER_SECONDS
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.slow_queries import SLICE_FILTER_SECONDS, TimeBudget
from pgrealtime.rules.engine.batch_query import PairQuestion, Question
from tests.clock import Clock
from tests.topics import topic
from tests.unit.hub.harness import (
    DEADLINE,
    NOTES,
    FakeDatabase,
    HubHarness,
    MemorySink,
    at,
    insert,
    open_harness,
)


def remote_filter(extra_conditions: int, name: str = "posts/*") -> str:
    """Return a topic whose filter only PostgreSQL can evaluate.

    Args:
        extra_conditions: How many conditions of another kind it has besides; each number makes
            another question.
        name: The topic without its options.
    """
    text = " && ".join(
        ["geoDistance(id, 2, 3, 4) >= 0"] + ["geoDistance(title, 1, 1, 1) > 1"] * extra_conditions
    )
    return topic(name, filter=text)


QUICK, SLOW = remote_filter(0), remote_filter(1)


class Filters(FakeDatabase):
    """A database that admits every row; questions that read ``title`` take ``seconds``.

    Questions without a time limit wait at ``open_gate``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = SLICE_FILTER_SECONDS
        self.first: list[float] = []
        """Seconds that the first of these questions take instead."""
        self.open_gate = asyncio.Event()
        self.open_gate.set()
        self.is_waiting = asyncio.Event()
        self.gates_all = False
        """Whether questions with a time limit wait there as well."""
        self.had_time_limit: list[bool] = []
        """For each of these questions, whether it had the time limit of the shared evaluation."""

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
            self.had_time_limit.append(budget.is_limited)
            budget.spend(self.first.pop(0) if self.first else self.seconds)
            if self.gates_all or not budget.is_limited:
                self.is_waiting.set()
                await self.open_gate.wait()
        question.accept([(index,) for index in range(len(question.pairs))])


def ids(sink: MemorySink) -> list[str]:
    found = (json.loads(data) for _, name, data in sink.events() if name.startswith("posts"))
    return [data["record"]["id"] for data in found]


async def subscribed(harness: HubHarness, *topics: str) -> tuple[Connection, MemorySink]:
    connection, sink = harness.connect()
    await harness.subscribe(connection, *topics)
    await wait_until_live(connection)
    return connection, sink


async def wait_until_live(connection: Connection) -> None:
    async with asyncio.timeout(DEADLINE):
        while connection.state is not LIVE:
            await asyncio.sleep(0)


def is_isolated(connection: Connection) -> bool:
    return connection.is_isolated  # it changes between awaits


async def test_others_continue_and_the_slow_connection_receives_all_in_order_later() -> None:
    """Connections with another filter that needs PostgreSQL aren't delayed either."""
    database = Filters()
    async with open_harness(database=database) as harness:
        quick, quick_sink = await subscribed(harness, QUICK)
        _, other_sink = await subscribed(harness, "posts/*")
        harness.commit(insert("tried"))
        await harness.until_delivered()
        await harness.until_caught_up()
        slow, slow_sink = await subscribed(harness, SLOW, "posts")
        database.open_gate.clear()
        for n in range(5):
            harness.commit(insert(f"n{n}"))
            await harness.until_delivered()
        await database.is_waiting.wait()

        assert ids(other_sink) == ids(quick_sink) == ["tried", *(f"n{n}" for n in range(5))]
        assert (quick.state is LIVE, quick.is_isolated) == (True, False)
        assert (slow.state is LIVE, slow.is_isolated) == (False, True)
        assert ids(slow_sink) == []
        database.open_gate.set()
        await slow_sink.wait_for(1 + 10)
        assert ids(slow_sink) == [f"n{n}" for n in range(5) for _ in range(2)]


async def test_a_connection_known_as_slow_costs_others_no_question() -> None:
    """After one question with a time limit, its questions are asked for its connection only."""
    database = Filters()
    async with open_harness(database=database) as harness:
        slow, slow_sink = await subscribed(harness, SLOW)
        for n in range(6):
            harness.commit(insert(f"n{n}"))
            await harness.until_delivered()
            await harness.until_caught_up()
            if n < 3:
                continue
            await harness.subscribe(slow, remote_filter(1, f"posts/n{n + 1}"), remote_filter(1))
            await harness.until_caught_up()

    assert database.had_time_limit.count(True) == 1
    assert set(ids(slow_sink)) == {f"n{n}" for n in range(6)}


async def test_no_other_waits_for_a_filter_that_is_untried_or_was_slow() -> None:
    """A client may send new filters all the time, also from new connections."""
    database = Filters()
    database.gates_all = True
    async with open_harness(database=database) as harness:
        _, other_sink = await subscribed(harness, "posts/*")
        for n in range(4):
            database.open_gate.clear()
            slow, slow_sink = await subscribed(harness, remote_filter(1 + n // 2))
            harness.commit(insert(f"n{n}"))
            await harness.until_delivered()
            assert ids(other_sink) == [f"n{n}" for n in range(n + 1)]
            await database.is_waiting.wait()
            assert ids(slow_sink) == []
            database.open_gate.set()
            await harness.until_caught_up()
            assert ids(slow_sink) == [f"n{n}"]
            harness.hub.remove_connection(slow)


@pytest.mark.parametrize(("share", "is_quick"), [(0.0, True), (0.4, True), (0.6, False)])
async def test_a_filter_that_was_quick_alone_is_evaluated_with_others(
    *, share: float, is_quick: bool
) -> None:
    """A shared evaluation has one time limit for all filters: half of it is the bound for one."""
    database = Filters()
    database.seconds = share * SLICE_FILTER_SECONDS
    async with open_harness(database=database) as harness:
        first, _ = await subscribed(harness, SLOW)
        for n in range(3):
            if n == 1:
                other, _ = await subscribed(harness, SLOW)
            harness.commit(insert(f"n{n}"))
            await harness.until_delivered()
            assert is_isolated(first) == (n == 0 or not is_quick)
            await wait_until_live(first)
            if n:
                await wait_until_live(other)

    assert (database.had_time_limit == [True] * 3) == is_quick


async def test_a_change_of_another_collection_tries_nothing() -> None:
    """A filter is tried at the first event of its collection."""
    async with open_harness(database=Filters()) as harness:
        slow, _ = await subscribed(harness, SLOW)
        harness.commit(insert("n1", table=NOTES))
        await harness.until_delivered()
        assert not is_isolated(slow)
        harness.commit(insert("n0"))
        await harness.until_delivered()
        assert is_isolated(slow)


async def test_isolation_ends_when_the_filter_was_quick_for_a_while() -> None:
    """The time doubles with each relapse; no event is lost or repeated by it."""
    database, clock = Filters(), Clock()
    async with open_harness(database=database, clock=clock) as harness:
        slow, slow_sink = await subscribed(harness, SLOW)
        for pause in (5, 10):
            database.seconds = SLICE_FILTER_SECONDS
            harness.commit(insert(f"slow{pause}"))
            await harness.until_delivered()
            await harness.until_caught_up()
            clock.now += 0.6 * pause
            database.seconds = 0
            harness.commit(insert(f"early{pause}"))
            await harness.until_delivered()
            await harness.until_caught_up()
            assert is_isolated(slow)
            clock.now += 0.6 * pause
            harness.commit(insert(f"late{pause}"))
            await harness.until_delivered()
            await wait_until_live(slow)
            assert not is_isolated(slow)
            harness.commit(insert(f"live{pause}"))
            await harness.until_delivered()

    names = [f"{name}{pause}" for pause in (5, 10) for name in ("slow", "early", "late", "live")]
    assert ids(slow_sink) == names


async def test_a_filter_late_among_others_and_quick_alone_is_not_isolated() -> None:
    """Which of the shared questions took the time isn't known before each is asked alone."""
    database = Filters()
    async with open_harness(database=database) as harness:
        one, sink = await subscribed(harness, SLOW)
        database.first, database.seconds = [0, SLICE_FILTER_SECONDS], 0
        for name in ("a", "b", "c"):
            harness.commit(insert(name))
            await harness.until_delivered()
            await wait_until_live(one)

    assert ids(sink) == ["a", "b", "c"]
    assert database.had_time_limit == [True] * 4  # alone, with all, alone again, with all again


async def test_many_changes_at_once_may_take_longer_than_one() -> None:
    """A resumed connection has many events to evaluate; that alone doesn't make its filter slow."""
    database = Filters()
    async with open_harness(database=database) as harness:
        made = harness.commit(*(insert(f"n{n}") for n in range(5)))
        await harness.until_delivered()
        database.first, database.seconds = [SLICE_FILTER_SECONDS], 0
        one, sink = harness.connect(position=f"{'x' * 40}.{at(made, 0)}")
        await harness.subscribe(one, SLOW)
        await wait_until_live(one)

    assert ids(sink) == [f"n{n}" for n in range(5)]
    assert database.had_time_limit == [True] * 4  # of all, of one, of two, of the other two


async def test_many_connections_of_one_slow_filter_share_the_answers_of_a_few() -> None:
    """A connection that receives a shared slice is isolated as well: its filter is as slow."""
    database = Filters()
    async with open_harness(database=database) as harness:
        many = [await subscribed(harness, SLOW) for _ in range(40)]
        database.open_gate.clear()
        harness.commit(insert("n0"))
        async with asyncio.timeout(DEADLINE):
            while database.had_time_limit.count(False) < 8:
                await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        database.open_gate.set()
        await harness.until_caught_up()

        # Of each of eight one in little time and one in all the time.
        assert (database.had_time_limit.count(True), database.had_time_limit.count(False)) == (8, 8)
        assert all(ids(sink) == ["n0"] for _, sink in many)
        assert all(is_isolated(connection) for connection, _ in many)
        harness.commit(insert("n1"))
        await harness.until_delivered()
        await harness.until_caught_up()
        assert all(ids(sink) == ["n0", "n1"] for _, sink in many)
        assert database.had_time_limit.count(True) == 8


@pytest.mark.parametrize("count", [MANY_CONNECTIONS - 1, MANY_CONNECTIONS])
async def test_a_filter_of_many_connections_has_more_time_before_they_are_isolated(
    count: int,
) -> None:
    """Isolated, each would ask the same question; for a few that is better than to delay others."""
    database = Filters()
    database.seconds = 2 * SLICE_FILTER_SECONDS
    async with open_harness(database=database) as harness:
        many = [await subscribed(harness, SLOW, "posts") for _ in range(count)]
        for n in range(3):
            harness.commit(insert(f"n{n}"))
            await harness.until_delivered()
            await harness.until_caught_up()

    expected = [name for n in range(3) for name in (f"n{n}", f"n{n}")]
    assert all(ids(sink) == expected for _, sink in many)
    assert {is_isolated(connection) for connection, _ in many} == {count < MANY_CONNECTIONS}
    assert (database.had_time_limit == [True, True] * 3) == (count >= MANY_CONNECTIONS)


async def test_connections_of_a_shared_filter_are_isolated_beyond_that_time() -> None:
    """The longer time is a limit too."""
    database = Filters()
    database.seconds = SHARED_FILTER_SECONDS
    async with open_harness(database=database) as harness:
        many = [await subscribed(harness, SLOW) for _ in range(MANY_CONNECTIONS)]
        harness.commit(insert("n0"))
        await harness.until_delivered()
        await harness.until_caught_up()

    assert all(ids(sink) == ["n0"] for _, sink in many)
    assert all(is_isolated(connection) for connection, _ in many)


async def test_an_isolated_connection_has_one_catch_up_task() -> None:
    """An isolated connection has one task that catches up."""
    database = Filters()
    async with open_harness(database=database) as harness:
        await subscribed(harness, SLOW)
        harness.commit(insert("a"))
        await harness.until_delivered()
        await harness.until_caught_up()
        database.open_gate.clear()
        for n in range(5):
            harness.commit(insert(f"n{n}"))
            await harness.until_delivered()

        names = [task.get_name() for task in asyncio.all_tasks()]
        assert sum(name.startswith("catch-up ") for name in names) == 1


@pytest.mark.parametrize("topics", [(SLOW, "PB_RESYNC"), (SLOW,)])
async def test_an_isolated_connection_that_the_changelog_has_passed_is_notified_or_ended(
    topics: tuple[str, ...],
) -> None:
    """Isolated connections are no exception from the rules of gaps."""
    database = Filters()
    async with open_harness(database=database, max_size=500) as harness:
        slow, sink = await subscribed(harness, *topics)
        slow.first_call_answered_at = 0.0  # long enough ago that it may be ended
        database.open_gate.clear()
        harness.commit(insert("first"))
        await database.is_waiting.wait()
        for n in range(20):
            harness.commit(insert(f"n{n}"))
            await harness.until_delivered()
        database.open_gate.set()
        if "PB_RESYNC" in topics:
            await sink.wait_for_bytes(b'"reason":"expired"')
            await sink.wait_for_bytes(b'"id":"n19"')
        else:
            await sink.wait_until("ended")

    assert ids(sink)[0] == "first"


async def test_an_isolated_connection_that_closes_leaves_nothing_behind() -> None:
    """Neither its task nor its filters stay."""
    database = Filters()
    async with open_harness(database=database) as harness:
        slow, _sink = await subscribed(harness, SLOW)
        database.open_gate.clear()
        harness.commit(insert("a"))
        await database.is_waiting.wait()
        harness.hub.remove_connection(slow)
        async with asyncio.timeout(DEADLINE):
            while harness.hub._catch_up._isolated_semaphore._value < 8:
                await asyncio.sleep(0)

        catch_up = harness.hub._catch_up
        assert (catch_up._caught_up, catch_up._tasks) == ({}, {})
        assert harness.hub._progress.generation.matcher._remote_filter_tables == {}


async def test_an_isolated_connection_receives_its_position() -> None:
    """PB_CURSOR is sent when a connection has caught up, not only when it is LIVE."""
    database = Filters()
    async with open_harness(database=database) as harness:
        slow, sink = await subscribed(harness, SLOW)
        harness.commit(insert("a"))
        await harness.until_delivered()
        await harness.until_caught_up()
        await harness.subscribe(slow, SLOW, "PB_CURSOR")
        await sink.wait_for(3)

    assert [name for _, name, _ in sink.events()] == ["PB_CONNECT", SLOW, "PB_CURSOR"]
    assert slow.is_isolated


async def test_other_catching_up_does_not_wait_for_isolated_connections() -> None:
    """However many isolated connections there are."""
    database = Filters()
    async with open_harness(database=database) as harness:
        database.open_gate.clear()
        for _ in range(20):
            await subscribed(harness, SLOW)
        made = harness.commit(insert("a"))
        await harness.until_delivered()
        async with asyncio.timeout(DEADLINE):
            while database.had_time_limit.count(False) < 8:
                await asyncio.sleep(0)
        back, sink = harness.connect(position=f"{'x' * 40}.{at(made, 0)}")
        await harness.subscribe(back, "posts/*")
        await sink.wait_for(2)

    assert ids(sink) == ["a"]


def backtracking(times: int) -> str:
    """Return a topic whose LIKE pattern backtracks at every position of a text of many ``a``."""
    text = f"title ~ '%{'a_' * times}b%' || title = '{'a' * 900}'"
    return topic("posts/*", filter=text)


EXPENSIVE, MOST_EXPENSIVE = backtracking(8), backtracking(100)
"""Filters of 2,900 units of work for a row, and of 30,000. The latter is more than the process
spends on one row even for an isolated connection."""


@pytest.mark.parametrize("topic", [EXPENSIVE, MOST_EXPENSIVE])
async def test_a_filter_that_is_expensive_in_the_process_delays_only_itself(topic: str) -> None:
    """What exceeds that limit too is put to PostgreSQL. Every event arrives, in order and once."""
    clock = Clock()
    async with open_harness(database=Filters(), clock=clock) as harness:
        harness.database.seconds = 0  # type: ignore[attr-defined]
        expensive, expensive_sink = await subscribed(harness, topic, "notes/*")
        other, other_sink = await subscribed(harness, "posts/*")
        for n in range(3):
            await wait_until_live(expensive)
            harness.commit(insert(f"n{n}", "a" * 900))
            await harness.until_delivered()
            assert expensive.state is not LIVE
            assert ids(other_sink) == [f"n{m}" for m in range(n + 1)]
            await harness.until_caught_up()
        await wait_until_live(expensive)
        harness.commit(insert("n3", "a" * 900))
        await harness.until_delivered()
        await harness.until_caught_up()
        assert is_isolated(expensive)
        assert ids(expensive_sink) == ids(other_sink) == [f"n{n}" for n in range(4)]
        clock.now += 6
        harness.commit(insert("n4", "short"))
        await harness.until_delivered()
        await wait_until_live(expensive)

        assert not is_isolated(expensive)
        assert (other.state is LIVE, len(ids(other_sink))) == (True, 5)
