"""A call with a thousand topics gives others their turn, whatever they do with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Literal, TypeAlias
from urllib.parse import quote

import pytest

from pgrealtime import fairness
from pgrealtime.auth.principal import GUEST, AuthRecord, Caller
from pgrealtime.changes import Delete, Row, WholeRow
from pgrealtime.collections.model import Collections
from pgrealtime.errors import SubscriptionError, SubscriptionLimitError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.evaluation.quotas import UNINDEXED_FILTERS_PER_CONNECTION
from pgrealtime.lsn import LSN
from tests.unit.hub.room import COLLECTIONS, DEADLINE, PEOPLE, MemorySink, Room, insert, open_room

OLD = tuple(f"posts/old{n}" for n in range(200))
NEW = tuple(f"posts/new{n}" for n in range(200))
TOO_MANY = (
    *(f"posts/bad{n}" for n in range(200)),
    *(
        "posts/*?options=" + quote(json.dumps({"query": {"filter": f"title ~ '{n}'"}}))
        for n in range(UNINDEXED_FILTERS_PER_CONNECTION + 1)
    ),
)
"""The last one is refused."""
ANN = Caller(AuthRecord(collection_id="pbc_people", collection_name="people", id="ann", email=""))
Phase: TypeAlias = Literal["taking", "giving", "restoring"]
PHASES: list[tuple[tuple[str, ...], Phase]] = [
    (NEW, "taking"),
    (NEW, "giving"),
    (TOO_MANY, "giving"),
    (TOO_MANY, "restoring"),
]


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step each."""
    monkeypatch.setattr(fairness, "YIELD_AFTER_SECONDS", 0.0)


@asynccontextmanager
async def called(
    room: Room, *topics: str, phase: Phase = "giving"
) -> AsyncIterator[tuple[Connection, MemorySink]]:
    """A connection that hears of the old topics and is amid a call for others."""
    connection, sink = room.connect(position="")
    await room.subscribe(connection, *OLD, "PB_RESYNC")
    call = asyncio.create_task(room.subscribe(connection, *topics, caller=ANN))
    async with asyncio.timeout(DEADLINE):
        while not is_amid(connection, topics, phase):
            await asyncio.sleep(0)
            assert not call.done(), "nobody else had a turn"
    CALLS[connection] = call
    try:
        yield connection, sink
    finally:
        call.cancel()
        await asyncio.wait([call])


CALLS: dict[Connection, asyncio.Task[None]] = {}


def is_amid(connection: Connection, topics: tuple[str, ...], phase: Phase) -> bool:
    """Whether half of that is done."""
    subscriptions = connection.subscriptions
    match phase:
        case "taking":
            return not subscriptions
        case "giving":
            return topics[len(topics) // 2] in subscriptions
        case "restoring":
            return OLD[100] in subscriptions and OLD[101] not in subscriptions


async def over(connection: Connection) -> None:
    async with asyncio.timeout(DEADLINE):
        await CALLS.pop(connection)


def heard(sink: MemorySink) -> list[str]:
    return [name for _, name, _ in sink.events() if name.startswith("posts/")]


async def hears(room: Room, sink: MemorySink, *names: str) -> None:
    """Commit rows of all topics; only those of these are heard, once each."""
    sink.forget()
    room.commit(*(insert(name) for name in ("old0", "old199", "new0", "new199", "bad0")))
    await sink.wait_for(len(names))
    await room.settled()
    assert heard(sink) == [f"posts/{name}" for name in names]


async def test_others_hear_events_meanwhile_and_itself_hears_them_afterwards() -> None:
    async with open_room() as room:
        other, other_sink = room.connect()
        await room.subscribe(other, "posts/*")
        async with called(room, *NEW) as (connection, sink):
            room.commit(insert("new0"), insert("new199"), insert("old0"))
            await other_sink.wait_for(4)
            assert is_amid(connection, NEW, "giving")
            assert NEW[-1] not in connection.subscriptions
            await over(connection)
            await sink.wait_for(3)
            assert heard(sink) == ["posts/new0", "posts/new199"]
            await hears(room, sink, "new0", "new199")


async def test_what_is_refused_leaves_all_as_it_was() -> None:
    async with open_room() as room, called(room, *TOO_MANY) as (connection, sink):
        with pytest.raises(SubscriptionLimitError):
            await over(connection)
        assert connection.caller.principal == GUEST
        await hears(room, sink, "old0", "old199")


@pytest.mark.parametrize("is_waiting", [False, True])
@pytest.mark.parametrize(("topics", "phase"), PHASES)
async def test_a_connection_that_ends_meanwhile_leaves_nothing_behind(
    topics: tuple[str, ...], phase: Phase, *, is_waiting: bool
) -> None:
    """Be it between two turns or while another call has its turn."""
    async with open_room() as room, called(room, *topics, phase=phase) as (connection, _):
        async with (
            room.hub._subscribe_calls._work_lock.acquire("another") if is_waiting else nullcontext()
        ):
            if is_waiting:
                await asyncio.sleep(0.01)
            room.hub.remove_connection(connection)
        with pytest.raises(SubscriptionError) as caught:
            await over(connection)
        assert caught.value.error_code == "client_unknown"
        meaning = room.hub._progress.generation
        assert (meaning.matcher._tables, +meaning.subscription_counts) == ({}, {})
        assert room.hub._registry.subscriptions_with_read_point == {}


@pytest.mark.parametrize(("topics", "phase"), PHASES)
async def test_a_call_that_is_given_up_leaves_all_as_it_was(
    topics: tuple[str, ...], phase: Phase
) -> None:
    async with open_room() as room, called(room, *topics, phase=phase) as (connection, sink):
        CALLS[connection].cancel()
        with pytest.raises(asyncio.CancelledError):
            await over(connection)
        await hears(room, sink, "old0", "old199")


def only_for(principal_id: str) -> Collections:
    rule = f"@request.auth.id = '{principal_id}'"
    return Collections(tuple(replace(one, view_rule=rule) for one in COLLECTIONS.values()))


async def use(room: Room, collections: Collections, *, known: bool = True) -> None:
    await room.hub.replace_generation(collections, lambda one: one if known else Caller())


@pytest.mark.parametrize("phase", ["taking", "giving"])
async def test_a_reload_meanwhile_is_in_force_for_all_topics(phase: Phase) -> None:
    async with open_room() as room:
        async with called(room, *NEW, phase=phase) as (connection, sink):
            await use(room, only_for("ann"))
            await over(connection)
            await hears(room, sink, "new0", "new199")
        async with called(room, *NEW, phase=phase) as (connection, sink):
            await use(room, only_for("bob"))
            await over(connection)
            await use(room, COLLECTIONS)
            await hears(room, sink, "new0", "new199")
            await use(room, only_for("bob"))
            await hears(room, sink)


async def test_a_reload_meanwhile_says_anew_who_calls() -> None:
    async with open_room() as room, called(room, *NEW) as (connection, sink):
        await use(room, only_for("ann"), known=False)
        await over(connection)
        assert connection.caller.principal == GUEST
        await hears(room, sink)


@pytest.mark.parametrize("phase", ["taking", "giving", "restoring"])
async def test_a_refused_call_during_a_reload_leaves_all_to_the_new_collections(
    phase: Phase,
) -> None:
    async with open_room() as room, called(room, *TOO_MANY, phase=phase) as (connection, sink):
        await use(room, COLLECTIONS)
        with pytest.raises(SubscriptionLimitError):
            await over(connection)
        await hears(room, sink, "old0", "old199")
        room.hub.remove_connection(connection)
        assert room.hub._progress.generation.matcher._tables == {}


@pytest.mark.parametrize("phase", ["taking", "giving"])
async def test_another_history_meanwhile_is_told_and_goes_on_with_the_new_topics(
    phase: Phase,
) -> None:
    topics = (*NEW, "PB_RESYNC")
    async with open_room() as room, called(room, *topics, phase=phase) as (connection, sink):
        room.hub.stream_lost()
        room.changelog.restart(LSN(150))
        room._end = 150
        room.hub.stream_started("fedcba")
        room.hub.wake()
        await over(connection)
        assert '"reason":"unknown"' in sink.data.decode()
        assert all(one.read_point is None for one in connection.subscriptions.values())
        await hears(room, sink, "new0", "new199")


async def test_who_is_deleted_meanwhile_is_nobody_in_the_end() -> None:
    async with open_room() as room:
        await use(room, only_for("ann"))
        async with called(room, *NEW) as (connection, sink):
            row: Row = {"id": "ann", "email": "", "key": "k"}
            room.commit(insert("new0"), Delete(PEOPLE, WholeRow(row)), insert("new199"))
            await room.settled()
            await over(connection)
            await sink.wait_for(2)
            assert heard(sink) == ["posts/new0"]
            assert connection.caller.principal == GUEST
            await hears(room, sink)
