"""An exception in the work for one connection, wherever it is raised, costs others no event."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import TypeAlias

import pytest

import pgrealtime
from pgrealtime import fairness
from pgrealtime.auth.principal import GUEST, AuthRecord, Caller
from pgrealtime.changes import Action, Delete, Update, WholeRow
from pgrealtime.hub.catchup.tasks import CatchUpTasks
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.delivery import compose
from pgrealtime.hub.delivery.render import RecordRenderer
from pgrealtime.hub.dispatcher import Dispatcher
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.hub import Hub
from pgrealtime.hub.state.resyncs import MirrorResyncs
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.slow_queries import TimeBudget
from pgrealtime.rules.engine.batch_query import PairQuestion
from tests.unit.hub.harness import (
    NOTES,
    PEOPLE,
    FakeDatabase,
    MemorySink,
    delete,
    insert,
    open_harness,
)
from tests.unit.hub.test_mirrors import MIRROR, mirrors, settle, unlogged

PACKAGE = str(Path(pgrealtime.__file__).parent)
TOPICS = (
    ("posts/*",),
    ("posts/*", "posts/p3", "PB_CURSOR"),
    ("posts", "notes/*"),
    ('posts/*?options={"query":{"filter":"title ~ \'t\'"}}',),
    ('posts/*?options={"query":{"fields":"id,title:excerpt(5)"}}', "people/*"),
)


class InjectedError(Exception):
    """An error that no code expects."""


Scenario: TypeAlias = Callable[
    [Callable[[CodeType], None] | None], Coroutine[object, object, list[tuple[str, list[str]]]]
]
Seen = dict[tuple[str, str], CodeType]


def _is_dispatch_task(task: asyncio.Task[object] | None) -> bool:
    code = getattr(task.get_coro() if task else None, "cr_code", None)
    return code is Hub.run.__code__


@contextmanager
def profiling(on_call: Callable[[CodeType], None]) -> Iterator[None]:
    """Call ``on_call`` for each call of the package's functions in the dispatch task.

    Calls that render a record are left out: their errors are a gap of that record.
    """

    def on_event(frame: FrameType, event: str, _arg: object) -> None:
        if (
            event == "call"
            and frame.f_code.co_filename.startswith(PACKAGE)
            and not _is_rendering(frame)
        ):
            try:
                task = asyncio.current_task()
            except RuntimeError:
                return
            if _is_dispatch_task(task):
                on_call(frame.f_code)

    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(None)


def _is_rendering(frame: FrameType | None) -> bool:
    """Whether a frame renders a record."""
    while frame is not None and frame.f_code is not Dispatcher._deliver.__code__:
        if frame.f_code is RecordRenderer._render_record.__code__:
            return True
        frame = frame.f_back
    return False


def user(record_id: str) -> Caller:
    return Caller(
        AuthRecord(collection_id="pbc_people", collection_name="people", id=record_id, email="e")
    )


class Database(FakeDatabase):
    """A database that admits every pair that it is asked about."""

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        del budget
        while questions := evaluation.questions():
            for question in questions:
                assert isinstance(question, PairQuestion)
                question.accept([(index,) for index in range(len(question.pairs))])
            evaluation.resume()
        return frozenset()


async def scenario(on_call: Callable[[CodeType], None] | None) -> list[tuple[str, list[str]]]:
    """Return whether each connection is still open, and which events it received."""
    async with open_harness(database=Database()) as harness:
        harness.hub.set_waits_for_visibility(waits=True)
        open_: list[tuple[Connection, MemorySink]] = []
        for n, topics in enumerate(TOPICS):
            connection, sink = harness.connect()
            await harness.subscribe(connection, *topics, caller=user(f"u{n}"))
            open_.append((connection, sink))
        harness.commit(insert("p0"))
        await harness.until_delivered()
        await harness.until_caught_up()

        def changes() -> None:
            harness.commit(insert("p1"), insert("n1", table=NOTES))
            was = WholeRow({"id": "u1", "email": "e", "key": "k"})
            harness.commit(Update(PEOPLE, {"id": "u1", "email": "f", "key": "k"}, was))
            harness.commit(insert("p3"), delete("p1"))

        changes()
        if on_call is None:
            await harness.until_delivered()
        else:
            with profiling(on_call):
                await harness.until_delivered()
        await harness.until_caught_up()
        harness.commit(insert("p4"), insert("n4", table=NOTES))
        await harness.until_delivered()
        await harness.until_caught_up()
        return [(sink.state, received(sink)) for _, sink in open_]


async def resync_scenario(
    on_call: Callable[[CodeType], None] | None,
) -> list[tuple[str, list[str]]]:
    """Return the same of mirrors that must load anew: what the row was before isn't logged.

    Of a resync that is told again only the last counts: nothing may follow that it doesn't cover.
    """
    async with mirrors(pace="1ms") as harness:
        open_: list[tuple[Connection, MemorySink]] = []
        for name in ("ann", "bob", "ann"):
            connection, sink = harness.connect()
            await harness.subscribe(connection, MIRROR, "PB_CURSOR", caller=user(name))
            open_.append((connection, sink))
        await settle(harness)
        harness.commit(unlogged("a", "ann"), insert("b", "bob"))
        if on_call is None:
            await settle(harness)
        else:
            with profiling(on_call):
                await settle(harness)
        return [
            (sink.state, [*reversed(dict.fromkeys(reversed(received(sink))))]) for _, sink in open_
        ]


def received(sink: MemorySink) -> list[str]:
    found = [
        (name.partition("?")[0], json.loads(data))
        for _, name, data in sink.events()
        if name.startswith(("posts", "notes", "people"))
    ]
    return [f"{name} {data['action']} {data['record']['id']}" for name, data in found]


def run(
    on_call: Callable[[CodeType], None] | None, scenario: Scenario = scenario
) -> list[tuple[str, list[str]]]:
    """Run a scenario with empty caches, so that each run makes the same calls."""
    for name, module in list(sys.modules.items()):
        if name.startswith(pgrealtime.__name__):
            for value in vars(module).values():
                if isinstance(value, _lru_cache_wrapper):
                    value.cache_clear()
    return asyncio.run(scenario(on_call))


def functions(scenario: Scenario = scenario) -> list[CodeType]:
    """Return the functions that the dispatch task calls.

    Left out are those that render a record, and the loop itself.
    """
    seen: dict[CodeType, None] = {}
    run(seen.setdefault, scenario)
    loop = (Hub.run, Dispatcher.run, Dispatcher._dispatch, Dispatcher._has_undispatched)
    excluded = {function.__code__ for function in loop}
    return [code for code in seen if code not in excluded]


@pytest.fixture
def same_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the calls independent of the speed of the machine.

    Every yield timer is due when read, and rendering seems to take no time.
    """
    monkeypatch.setattr(fairness, "perf_counter", count(step=fairness.YIELD_AFTER_SECONDS).__next__)
    monkeypatch.setattr(fairness, "_MAX_PAUSE_SECONDS", 0)
    monkeypatch.setattr(compose, "perf_counter", lambda: 0.0)


def check_faults(found: Sequence[CodeType], scenario: Scenario) -> None:
    """Let each function raise once in the scenario, and compare what the connections receive."""
    whole = run(None, scenario)
    unraised: list[str] = []
    wrong: list[tuple[str, int, list[tuple[str, list[str]]]]] = []
    for code in found:
        is_raised: list[bool] = []

        def inject(called: CodeType, code: CodeType = code, done: list[bool] = is_raised) -> None:
            if called is code and not done:
                done.append(True)
                raise InjectedError

        try:
            result = run(inject, scenario)
        except TimeoutError:
            wrong.append((code.co_qualname, 0, []))
            continue
        if not is_raised:
            unraised.append(code.co_qualname)
        ended = [state for state, _ in result if state != "open"]
        complete = [r == w for r, w in zip(result, whole, strict=True) if r[0] == "open"]
        if len(ended) > 1 or not all(complete):
            wrong.append((code.co_qualname, len(ended), result))
    assert not wrong
    assert not unraised


@pytest.mark.usefixtures("same_calls")
def test_a_fault_in_any_call_of_the_dispatch_task_ends_one_connection_at_most() -> None:
    """Each function raises once; all other connections receive every event, in order and once."""
    found = functions()
    check_faults(found, scenario)

    assert len(found) > 150
    assert fairness.YieldTimer.pause.__code__ in found
    assert CatchUpTasks.make_caught_up_live.__code__ in found


@pytest.mark.usefixtures("same_calls")
def test_a_fault_amid_resyncs_costs_others_neither_event_nor_resync() -> None:
    """A resync that was asked for is told later, perhaps twice."""
    elsewhere = functions()
    found = [code for code in functions(resync_scenario) if code not in elsewhere]
    check_faults(found, resync_scenario)

    assert {MirrorResyncs._write.__code__, Connection.write_resync.__code__} <= {*found}
    assert Dispatcher._write_resyncs.__code__ in elsewhere


async def test_a_connection_whose_bytes_cannot_be_written_is_ended_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of one transport doesn't reach the connections after it."""
    async with open_harness() as harness:
        pairs = [harness.connect() for _ in range(3)]
        for connection, _ in pairs:
            await harness.subscribe(connection, "posts/*")
        await harness.until_caught_up()

        def fail(_data: bytes) -> None:
            raise InjectedError

        monkeypatch.setattr(pairs[1][1], "write", fail)
        harness.commit(insert("a"))
        await harness.until_delivered()
        harness.commit(insert("b"))
        await harness.until_delivered()

    assert [sink.state for _, sink in pairs] == ["open", "ended", "open"]
    assert [len(received(sink)) for _, sink in pairs] == [2, 0, 2]


class _FaultyOnce(FakeDatabase):
    """Raises in the first evaluation, once ``may_raise`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.may_raise = asyncio.Event(), asyncio.Event()
        self._is_over = False

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        if not self._is_over:
            self.is_asked.set()
            await self.may_raise.wait()
            self._is_over = True
            raise InjectedError
        return await super().answer_questions(evaluation, budget)


async def test_after_a_fault_nothing_is_delivered_before_it_is_visible() -> None:
    """Events that arrive meanwhile still wait until they are visible."""
    database = _FaultyOnce()
    async with open_harness(database=database) as harness:
        harness.hub.set_waits_for_visibility(waits=True)
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        await harness.until_caught_up()
        harness.commit(insert("seen"))
        await database.is_asked.wait()
        unseen = harness.commit(insert("unseen"))
        database.snapshot_text = f"{unseen.xid}:1000000:{unseen.xid}"
        database.may_raise.set()
        await sink.wait_for(2)
        await database.wait_for_snapshot_queries(2)
        before = received(sink)
        database.snapshot_text = "1000000:1000000:"
        await sink.wait_for(3)

    assert before == ["posts/* create seen"]
    assert received(sink) == [*before, "posts/* create unseen"]


async def test_after_a_fault_a_caller_whose_deletion_was_delivered_is_a_guest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event of its deletion was delivered, and is not read again."""
    faults = [InjectedError()]

    def fail_once(_dispatcher: Dispatcher, _events: Sequence[Event], action: Action) -> None:
        if action == "delete" and faults:
            raise faults.pop()

    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "people/*", caller=user("u1"))
        await harness.until_caught_up()
        monkeypatch.setattr(Dispatcher, "_apply_to_live_callers", fail_once)
        harness.commit(Delete(PEOPLE, WholeRow({"id": "u1", "email": "e", "key": "k"})))
        await sink.wait_for(2)
        await harness.until_delivered()

    assert not faults
    assert received(sink) == ["people/* delete u1"]
    assert connection.caller.principal == GUEST
