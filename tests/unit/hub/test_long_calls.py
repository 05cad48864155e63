"""A call with a thousand topics yields to other tasks, and whatever they do meanwhile is safe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Literal, TypeAlias

import pytest

from pgrealtime import fairness
from pgrealtime.auth.principal import GUEST, AuthRecord, Caller
from pgrealtime.changes import Delete, Row, WholeRow
from pgrealtime.collections.model import Collections
from pgrealtime.errors import SubscriptionError, SubscriptionLimitError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.evaluation.filter_limits import UNINDEXED_FILTERS_PER_CONNECTION
from pgrealtime.lsn import LSN
from tests.topics import topic
from tests.unit.hub.harness import (
    COLLECTIONS,
    DEADLINE,
    PEOPLE,
    HubHarness,
    MemorySink,
    insert,
    open_harness,
)

OLD = tuple(f"posts/old{n}" for n in range(200))
NEW = tuple(f"posts/new{n}" for n in range(200))
TOO_MANY = (
    *(f"posts/bad{n}" for n in range(200)),
    *(
        topic("posts/*", filter=f"title ~ '{n}'")
        for n in range(UNINDEXED_FILTERS_PER_CONNECTION + 1)
    ),
)
"""The last topic exceeds the limit, so the call is refused."""
ANN = Caller(AuthRecord(collection_id="pbc_people", collection_name="people", id="ann", email=""))
Phase: TypeAlias = Literal["removing", "adding", "restoring"]
"""What the call does: removes the old topics, adds the new ones, or restores the old ones."""
PHASES: list[tuple[tuple[str, ...], Phase]] = [
    (NEW, "removing"),
    (NEW, "adding"),
    (TOO_MANY, "adding"),
    (TOO_MANY, "restoring"),
]


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yield after every step."""
    monkeypatch.setattr(fairness, "YIELD_AFTER_SECONDS", 0.0)


@asynccontextmanager
async def mid_call(
    harness: HubHarness, *topics: str, phase: Phase = "adding"
) -> AsyncIterator[tuple[Connection, MemorySink]]:
    """A connection that is subscribed to the old topics and in the middle of a call for others."""
    connection, sink = harness.connect(position="")
    await harness.subscribe(connection, *OLD, "PB_RESYNC")
    call = asyncio.create_task(harness.subscribe(connection, *topics, caller=ANN))
    async with asyncio.timeout(DEADLINE):
        while not is_half_done(connection, topics, phase):
            await asyncio.sleep(0)
            assert not call.done(), "no other task ran"
    CALLS[connection] = call
    try:
        yield connection, sink
    finally:
        call.cancel()
        await asyncio.wait([call])


CALLS: dict[Connection, asyncio.Task[None]] = {}


def is_half_done(connection: Connection, topics: tuple[str, ...], phase: Phase) -> bool:
    """Whether half of the phase's topics are done."""
    subscriptions = connection.subscriptions
    match phase:
        case "removing":
            return not subscriptions
        case "adding":
            return topics[len(topics) // 2] in subscriptions
        case "restoring":
            return OLD[100] in subscriptions and OLD[101] not in subscriptions


async def wait_for_call(connection: Connection) -> None:
    """Wait for the end of the connection's call."""
    async with asyncio.timeout(DEADLINE):
        await CALLS.pop(connection)


def received_topics(sink: MemorySink) -> list[str]:
    return [name for _, name, _ in sink.events() if name.startswith("posts/")]


async def assert_receives(harness: HubHarness, sink: MemorySink, *names: str) -> None:
    """Commit rows of old and new topics; only the named ones must be received, once each."""
    sink.forget()
    harness.commit(*(insert(name) for name in ("old0", "old199", "new0", "new199", "bad0")))
    await sink.wait_for(len(names))
    await harness.until_delivered()
    assert received_topics(sink) == [f"posts/{name}" for name in names]


async def test_others_receive_events_during_a_call_and_its_connection_after_it() -> None:
    """Events during the call reach other connections at once, and this one after it, once."""
    async with open_harness() as harness:
        other, other_sink = harness.connect()
        await harness.subscribe(other, "posts/*")
        async with mid_call(harness, *NEW) as (connection, sink):
            harness.commit(insert("new0"), insert("new199"), insert("old0"))
            await other_sink.wait_for(4)
            assert is_half_done(connection, NEW, "adding")
            assert NEW[-1] not in connection.subscriptions
            await wait_for_call(connection)
            await sink.wait_for(3)
            assert received_topics(sink) == ["posts/new0", "posts/new199"]
            await assert_receives(harness, sink, "new0", "new199")


async def test_a_refused_call_leaves_all_as_it_was() -> None:
    """Caller and topics are those from before the call."""
    async with open_harness() as harness, mid_call(harness, *TOO_MANY) as (connection, sink):
        with pytest.raises(SubscriptionLimitError):
            await wait_for_call(connection)
        assert connection.caller.principal == GUEST
        await assert_receives(harness, sink, "old0", "old199")


@pytest.mark.parametrize("is_waiting", [False, True])
@pytest.mark.parametrize(("topics", "phase"), PHASES)
async def test_a_connection_that_ends_meanwhile_leaves_nothing_behind(
    topics: tuple[str, ...], phase: Phase, *, is_waiting: bool
) -> None:
    """Whether it ends between two steps of its call, or while another call has the lock."""
    async with (
        open_harness() as harness,
        mid_call(harness, *topics, phase=phase) as (connection, _),
    ):
        async with (
            harness.hub._subscribe_calls._work_lock.acquire("another")
            if is_waiting
            else nullcontext()
        ):
            if is_waiting:
                await asyncio.sleep(0.01)
            harness.hub.remove_connection(connection)
        with pytest.raises(SubscriptionError) as caught:
            await wait_for_call(connection)
        assert caught.value.error_code == "client_unknown"
        generation = harness.hub._progress.generation
        assert (generation.matcher._tables, +generation.subscription_counts) == ({}, {})
        assert harness.hub._registry.subscriptions_with_read_point == {}


@pytest.mark.parametrize(("topics", "phase"), PHASES)
async def test_a_call_that_is_given_up_leaves_all_as_it_was(
    topics: tuple[str, ...], phase: Phase
) -> None:
    """A cancelled call restores the old topics, whichever phase it was in."""
    async with (
        open_harness() as harness,
        mid_call(harness, *topics, phase=phase) as (connection, sink),
    ):
        CALLS[connection].cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait_for_call(connection)
        await assert_receives(harness, sink, "old0", "old199")


def visible_only_to(principal_id: str) -> Collections:
    """Return collections whose records only one principal may see."""
    rule = f"@request.auth.id = '{principal_id}'"
    return Collections(tuple(replace(one, view_rule=rule) for one in COLLECTIONS.values()))


async def replace_collections(
    harness: HubHarness, collections: Collections, *, known: bool = True
) -> None:
    await harness.hub.replace_generation(collections, lambda one: one if known else Caller())


@pytest.mark.parametrize("phase", ["removing", "adding"])
async def test_a_reload_meanwhile_is_in_force_for_all_topics(phase: Phase) -> None:
    """Also for topics that the call added before the reload."""
    async with open_harness() as harness:
        async with mid_call(harness, *NEW, phase=phase) as (connection, sink):
            await replace_collections(harness, visible_only_to("ann"))
            await wait_for_call(connection)
            await assert_receives(harness, sink, "new0", "new199")
        async with mid_call(harness, *NEW, phase=phase) as (connection, sink):
            await replace_collections(harness, visible_only_to("bob"))
            await wait_for_call(connection)
            await replace_collections(harness, COLLECTIONS)
            await assert_receives(harness, sink, "new0", "new199")
            await replace_collections(harness, visible_only_to("bob"))
            await assert_receives(harness, sink)


async def test_a_reload_meanwhile_revalidates_the_caller() -> None:
    """A caller that the new configuration doesn't accept is a guest at the end of its call."""
    async with open_harness() as harness, mid_call(harness, *NEW) as (connection, sink):
        await replace_collections(harness, visible_only_to("ann"), known=False)
        await wait_for_call(connection)
        assert connection.caller.principal == GUEST
        await assert_receives(harness, sink)


@pytest.mark.parametrize("phase", ["removing", "adding", "restoring"])
async def test_a_refused_call_during_a_reload_leaves_all_to_the_new_collections(
    phase: Phase,
) -> None:
    """The old topics are restored in the matcher of the new generation."""
    async with (
        open_harness() as harness,
        mid_call(harness, *TOO_MANY, phase=phase) as (connection, sink),
    ):
        await replace_collections(harness, COLLECTIONS)
        with pytest.raises(SubscriptionLimitError):
            await wait_for_call(connection)
        await assert_receives(harness, sink, "old0", "old199")
        harness.hub.remove_connection(connection)
        assert harness.hub._progress.generation.matcher._tables == {}


@pytest.mark.parametrize("phase", ["removing", "adding"])
async def test_another_history_meanwhile_is_notified_and_the_new_topics_are_in_force(
    phase: Phase,
) -> None:
    """A read point of the lost history doesn't stay with the new topics."""
    topics = (*NEW, "PB_RESYNC")
    async with (
        open_harness() as harness,
        mid_call(harness, *topics, phase=phase) as (connection, sink),
    ):
        harness.hub.stream_lost()
        harness.changelog.restart(LSN(150))
        harness._end = 150
        harness.hub.stream_started("fedcba")
        harness.hub.wake()
        await wait_for_call(connection)
        assert '"reason":"unknown"' in sink.data.decode()
        assert all(one.read_point is None for one in connection.subscriptions.values())
        await assert_receives(harness, sink, "new0", "new199")


async def test_a_caller_that_is_deleted_meanwhile_is_a_guest_in_the_end() -> None:
    """The call ends as a guest's, and events after the deletion are evaluated for a guest."""
    async with open_harness() as harness:
        await replace_collections(harness, visible_only_to("ann"))
        async with mid_call(harness, *NEW) as (connection, sink):
            row: Row = {"id": "ann", "email": "", "key": "k"}
            harness.commit(insert("new0"), Delete(PEOPLE, WholeRow(row)), insert("new199"))
            await harness.until_delivered()
            await wait_for_call(connection)
            await sink.wait_for(2)
            assert received_topics(sink) == ["posts/new0"]
            assert connection.caller.principal == GUEST
            await assert_receives(harness, sink)


@pytest.mark.parametrize(
    ("filter_text", "waits"),
    [
        ("title > 'a'", False),
        ("title > 'a' || author.name = 'b'", True),  # other rows
        ("title = 'a' || " * 5 + "title = 'b'", True),
        ("title > strftime('%Y', 'now')", True),
    ],
)
async def test_a_short_filter_is_compiled_beside_the_work_of_others(
    filter_text: str, *, waits: bool
) -> None:
    """Any other waits for its turn: a call may bring many that take long."""
    async with open_harness() as harness:
        connection, _ = harness.connect()
        async with harness.hub._subscribe_calls._work_lock.acquire("another"):
            task = asyncio.create_task(
                harness.subscribe(connection, topic("posts/*", filter=filter_text))
            )
            for _ in range(100):
                await asyncio.sleep(0)
            assert task.done() is not waits
        await task
