"""A fault on one connection's account, wherever it is raised, keeps nothing from the others."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from itertools import count
from pathlib import Path
from types import CodeType, FrameType

import pytest

import pgrealtime
from pgrealtime import fairness
from pgrealtime.auth.principal import GUEST, AuthRecord, Caller
from pgrealtime.changes import Delete, Update, WholeRow
from pgrealtime.hub.catchup.tasks import CatchUpTasks
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.delivery import compose
from pgrealtime.hub.delivery.render import RecordRenderer
from pgrealtime.hub.dispatcher import Dispatcher
from pgrealtime.hub.events.slices import Slice
from pgrealtime.hub.hub import Hub
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.slow_queries import TimeBudget
from pgrealtime.rules.engine.batch_query import PairQuestion
from tests.unit.hub.room import (
    DEADLINE,
    NOTES,
    PEOPLE,
    GivenDatabase,
    MemorySink,
    Room,
    delete,
    insert,
    open_room,
)

PACKAGE = str(Path(pgrealtime.__file__).parent)
TOPICS = (
    ("posts/*",),
    ("posts/*", "posts/p3", "PB_CURSOR"),
    ("posts", "notes/*"),
    ('posts/*?options={"query":{"filter":"title ~ \'t\'"}}',),
    ('posts/*?options={"query":{"fields":"id,title:excerpt(5)"}}', "people/*"),
)


class InjectedError(Exception):
    """Nobody thought of it."""


Seen = dict[tuple[str, str], CodeType]


def _is_ours(task: asyncio.Task[object] | None) -> bool:
    code = getattr(task.get_coro() if task else None, "cr_code", None)
    return code is Hub.run.__code__


@contextmanager
def watching(on_call: Callable[[CodeType], None]) -> Iterator[None]:
    """See each call of the package's functions that the dispatch task makes."""

    def look(frame: FrameType, event: str, _arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and not _shows(frame):
            try:
                task = asyncio.current_task()
            except RuntimeError:
                return
            if _is_ours(task):
                on_call(frame.f_code)

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


def _shows(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not Dispatcher._deliver.__code__:
        if frame.f_code is RecordRenderer._render_record.__code__:
            return True
        frame = frame.f_back
    return False


def person(record_id: str) -> Caller:
    return Caller(
        AuthRecord(collection_id="pbc_people", collection_name="people", id=record_id, email="e")
    )


async def at_rest(room: Room) -> None:
    async with asyncio.timeout(DEADLINE):
        while room.hub._catch_up._tasks:
            await asyncio.sleep(0)


class Database(GivenDatabase):
    """Says of whatever it is asked that it is so."""

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        del budget
        while questions := evaluation.questions():
            for question in questions:
                assert isinstance(question, PairQuestion)
                question.accept([(place,) for place in range(len(question.pairs))])
            evaluation.resume()
        return frozenset()


async def scenario(on_call: Callable[[CodeType], None] | None) -> list[tuple[str, list[str]]]:
    """Whether each connection is still open, and what it heard of."""
    async with open_room(database=Database()) as room:
        room.hub.set_waits_for_visibility(waits=True)
        open_: list[tuple[Connection, MemorySink]] = []
        for n, topics in enumerate(TOPICS):
            connection, sink = room.connect()
            await room.subscribe(connection, *topics, caller=person(f"u{n}"))
            open_.append((connection, sink))
        room.commit(insert("p0"))
        await room.settled()
        await at_rest(room)

        def changes() -> None:
            room.commit(insert("p1"), insert("n1", table=NOTES))
            was = WholeRow({"id": "u1", "email": "e", "key": "k"})
            room.commit(Update(PEOPLE, {"id": "u1", "email": "f", "key": "k"}, was))
            room.commit(insert("p3"), delete("p1"))

        changes()
        if on_call is None:
            await room.settled()
        else:
            with watching(on_call):
                await room.settled()
        await at_rest(room)
        room.commit(insert("p4"), insert("n4", table=NOTES))
        await room.settled()
        await at_rest(room)
        return [(sink.state, heard(sink)) for _, sink in open_]


def heard(sink: MemorySink) -> list[str]:
    found = [
        (name.partition("?")[0], json.loads(data))
        for _, name, data in sink.events()
        if name.startswith(("posts", "notes", "people"))
    ]
    return [f"{name} {data['action']} {data['record']['id']}" for name, data in found]


def run(on_call: Callable[[CodeType], None] | None) -> list[tuple[str, list[str]]]:
    """Play the scenario with nothing kept from the time before, so that it makes the same calls."""
    for name, module in list(sys.modules.items()):
        if name.startswith(pgrealtime.__name__):
            for value in vars(module).values():
                if isinstance(value, _lru_cache_wrapper):
                    value.cache_clear()
    return asyncio.run(scenario(on_call))


def functions() -> list[CodeType]:
    """What the dispatch task calls, but for what makes a record: that row alone isn't shown."""
    seen: dict[CodeType, None] = {}
    run(seen.setdefault)
    spared = {
        f.__code__
        for f in (Hub.run, Dispatcher.run, Dispatcher._dispatch, Dispatcher._has_undispatched)
    }
    return [code for code in seen if code not in spared]


def test_a_fault_in_any_call_of_the_dispatch_task_ends_one_connection_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each function that it calls raises once: the others hear all, in order, and once."""
    # Every turn is over when it is asked and nothing is dear, however fast the machine is.
    monkeypatch.setattr(fairness, "perf_counter", count(step=fairness.YIELD_AFTER_SECONDS).__next__)
    monkeypatch.setattr(fairness, "_MAX_PAUSE_SECONDS", 0)
    monkeypatch.setattr(compose, "perf_counter", lambda: 0.0)
    whole = run(None)
    found = functions()
    unraised: list[str] = []
    wrong: list[tuple[str, int, list[tuple[str, list[str]]]]] = []
    for code in found:
        is_raised: list[bool] = []

        def inject(called: CodeType, code: CodeType = code, done: list[bool] = is_raised) -> None:
            if called is code and not done:
                done.append(True)
                raise InjectedError

        try:
            result = run(inject)
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
    assert len(found) > 150
    assert fairness.YieldTimer.pause.__code__ in found
    assert CatchUpTasks.make_caught_up_live.__code__ in found


async def test_a_connection_whose_bytes_cannot_be_written_is_ended_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_room() as room:
        pairs = [room.connect() for _ in range(3)]
        for connection, _ in pairs:
            await room.subscribe(connection, "posts/*")
        await at_rest(room)

        def fail(_data: bytes) -> None:
            raise InjectedError

        monkeypatch.setattr(pairs[1][1], "write", fail)
        room.commit(insert("a"))
        await room.settled()
        room.commit(insert("b"))
        await room.settled()

    assert [sink.state for _, sink in pairs] == ["open", "ended", "open"]
    assert [len(heard(sink)) for _, sink in pairs] == [2, 0, 2]


class _FaultyOnce(GivenDatabase):
    """Raises when the first slice is judged, once it may."""

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


async def test_after_a_fault_nothing_is_handed_out_before_readers_see_it() -> None:
    """What came meanwhile waits as if nothing had happened: for it others wait too."""
    database = _FaultyOnce()
    async with open_room(database=database) as room:
        room.hub.set_waits_for_visibility(waits=True)
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        await at_rest(room)
        room.commit(insert("seen"))
        await database.is_asked.wait()
        unseen = room.commit(insert("unseen"))
        database.snapshot_text = f"{unseen.xid}:1000000:{unseen.xid}"
        database.may_raise.set()
        await sink.wait_for(2)
        await database.asked_again(2)
        before = heard(sink)
        database.snapshot_text = "1000000:1000000:"
        await sink.wait_for(3)

    assert before == ["posts/* create seen"]
    assert heard(sink) == [*before, "posts/* create unseen"]


async def test_after_a_fault_who_was_deleted_in_what_was_handed_out_is_a_guest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event of its deletion was delivered, and nothing reads it again."""
    faults = [InjectedError()]
    advance = Dispatcher._advance_head

    def fail_once(dispatcher: Dispatcher, part: Slice) -> None:
        if faults:
            raise faults.pop()
        advance(dispatcher, part)

    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "people/*", caller=person("u1"))
        await at_rest(room)
        monkeypatch.setattr(Dispatcher, "_apply_to_live_callers", lambda *_: None)
        monkeypatch.setattr(Dispatcher, "_advance_head", fail_once)
        room.commit(Delete(PEOPLE, WholeRow({"id": "u1", "email": "e", "key": "k"})))
        await sink.wait_for(2)
        await room.settled()

    assert not faults
    assert heard(sink) == ["people/* delete u1"]
    assert connection.caller.principal == GUEST
