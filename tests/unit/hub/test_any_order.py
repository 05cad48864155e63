"""Random runs of a hub: whatever the order of actions, events arrive or a gap is notified."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import pytest

from pgrealtime import fairness
from pgrealtime.hub import dispatcher
from pgrealtime.hub.catchup import slice_reader, tasks
from pgrealtime.hub.connections.connection import LIVE, Connection
from pgrealtime.hub.delivery import compose
from pgrealtime.hub.evaluation import evaluator
from pgrealtime.hub.events import event as slices
from tests import virtual_time
from tests.unit.hub.reader import Kind, Reader
from tests.unit.hub.simulation import Simulation

SECONDS = float(os.environ.get("PGREALTIME_TEST_SECONDS", "15"))
_KINDS: tuple[Kind, ...] = ("plain", "resync", "position", "cursor")


async def run_simulation(seed: int) -> None:
    """Run one simulation, and check what its readers received."""
    rng = random.Random(seed)
    simulation = Simulation(rng, is_gated=rng.random() < 0.4)
    tasks = [
        asyncio.create_task(simulation.hub.run()),
        asyncio.create_task(simulation.hub.run_timers()),
    ]
    readers = [Reader(simulation, rng.choice(_KINDS), f"reader {n}") for n in range(4)]
    try:
        for _ in range(rng.choice([50, 200])):
            await step(simulation, rng.choice(readers))
            await simulation.random_delay()
            check_tasks(tasks)
        async with asyncio.timeout(600):
            await calm_down(simulation, readers)
        check_tasks(tasks)
        missing = [line for reader in readers for line in reader.missing()]
        assert not missing, "\n".join(missing)
        check_rest(simulation, readers)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_tasks(tasks: list[asyncio.Task[None]]) -> None:
    """Raise the error of a task that ended."""
    for task in tasks:
        if task.done():
            task.result()


Action: TypeAlias = Callable[[Simulation, Reader], Awaitable[None] | None]


def commit(simulation: Simulation, _reader: Reader) -> None:
    if running := simulation.running():
        simulation.commit(simulation.rng.choice(running))


def decode(simulation: Simulation, _reader: Reader) -> None:
    simulation.decode()


def fail_snapshots(simulation: Simulation, _reader: Reader) -> None:
    simulation.failing = simulation.rng.choice([0.0, 0.0, 0.5])


def slow_down(simulation: Simulation, _reader: Reader) -> None:
    simulation.slowness = simulation.rng.choice([0.0, 0.0, 0.05, 1.0])


def stick(_simulation: Simulation, reader: Reader) -> None:
    if reader.stream is not None:
        reader.stream.sink.is_stuck = True


def unstick(_simulation: Simulation, reader: Reader) -> None:
    if reader.stream is not None:
        reader.stream.sink.unstick()


def give_up_call(_simulation: Simulation, reader: Reader) -> None:
    if reader.call is not None:
        reader.call.cancel()


def act(simulation: Simulation, reader: Reader) -> None:
    """Do what a client does next: connect, choose topics, or submit them."""
    if reader.stream is None:
        reader.connect()
    elif not reader.wanted or simulation.rng.random() < 0.3:
        reader.choose_topics()
        reader.submit()
    elif not reader.is_served():
        reader.submit()


ACTIONS: tuple[tuple[float, Action], ...] = (
    (6, lambda simulation, _: simulation.begin()),
    (6, commit),
    (6, lambda simulation, _: simulation.reveal()),
    (6, decode),
    (1, lambda simulation, _: simulation.expire()),
    (0.3, lambda simulation, _: simulation.lose_stream()),
    (1, lambda simulation, _: simulation.regain_stream()),
    (0.2, lambda simulation, _: simulation.fail_over()),
    (0.5, lambda simulation, _: simulation.reload()),
    (1, fail_snapshots),
    (1, slow_down),
    (0.8, lambda _, reader: reader.leave()),
    (1, stick),
    (1, unstick),
    (1, give_up_call),
    (1, lambda _, reader: reader.take()),
    (5, act),
)


async def step(simulation: Simulation, reader: Reader) -> None:
    """Do one random action."""
    weights = [weight for weight, _ in ACTIONS]
    ((_, action),) = simulation.rng.choices(ACTIONS, weights)
    done = action(simulation, reader)
    if done is not None:
        await done


async def calm_down(simulation: Simulation, readers: list[Reader]) -> None:
    """Let every commit be decoded and visible, and every reader be connected and subscribed."""
    simulation.failing = simulation.slowness = 0.0
    simulation.regain_stream()
    while not await is_calm(simulation, readers):
        for commit in simulation.running():
            simulation.commit(commit)
        for commit in simulation.commits:
            commit.is_visible = True
        simulation.decode()
        for reader in readers:
            await serve(reader)
        await asyncio.sleep(simulation.rng.choice([0, 0.1, 1]))


async def serve(reader: Reader) -> None:
    """Read, connect or submit, whichever the reader needs next."""
    await reader.take()
    if reader.stream is None:
        reader.connect()
        return
    reader.stream.sink.unstick()
    if not reader.wanted:
        reader.choose_topics()
    if not reader.is_served():
        reader.submit()


async def is_calm(simulation: Simulation, readers: list[Reader]) -> bool:
    """Whether everything committed was delivered to every reader."""
    if (
        simulation.running()
        or simulation.decode()
        or simulation.hub.head < simulation.changelog.end_cursor
    ):
        return False
    for reader in readers:
        unstick(simulation, reader)
        await reader.take()
    return all(
        reader.is_served()
        and reader.stream is not None
        and (
            is_at_rest(simulation, reader.stream.connection)
            and not reader.stream.connection.close_reason
        )
        and (reader.call is None or reader.call.done())
        for reader in readers
    )


def is_at_rest(simulation: Simulation, connection: Connection) -> bool:
    """Whether the connection has nothing left to read: LIVE, or isolated and caught up."""
    catch_up = simulation.hub._catch_up
    is_parked = catch_up._caught_up.get(connection, False) and connection not in catch_up._tasks
    return connection.state is LIVE or (is_parked and connection.cursor == simulation.hub.head)


def check_rest(simulation: Simulation, readers: list[Reader]) -> None:
    """Nothing is left over: no task, deferred callback, lock, or miscounted subscription."""
    hub = simulation.hub
    assert (hub._catch_up._tasks, list(hub._progress._deferred)) == ({}, [])
    assert (hub._catch_up._semaphore._value, hub._catch_up._isolated_semaphore._value) == (16, 8)
    assert set(hub._catch_up._caught_up) <= {c for c in hub.connections if c.is_isolated}
    assert all(hub._catch_up._caught_up.values())
    topics_of = [(c, one.group) for c in hub.connections for one in c.subscriptions.values()]
    members = [(connection, group) for connection, group in topics_of if group is not None]
    shared = Counter(g for c, g in members if not (c.is_isolated and g.specialization.filter_tests))
    assert all(group.shared_subscription_count == shared[group] for _, group in members)
    assert not any(connection.lock.locked() for connection in hub.connections)
    assert len(hub.connections) == len(readers)
    topics = sum(len(connection.subscriptions) for connection in hub.connections)
    assert len(hub._registry.subscriptions_with_read_point) <= topics


@pytest.fixture
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the sizes of slices, so that few changes are cut as hundreds are."""
    for module in (evaluator, slice_reader, tasks, slices):
        monkeypatch.setattr(module, "SLICE_CHANGES", 3)
    for module in (dispatcher, slices):
        monkeypatch.setattr(module, "LIVE_SLICE_CHANGES", 10)
    monkeypatch.setattr(slices.split_into_slices, "__defaults__", (3,))
    monkeypatch.setattr(compose, "_RENDER_GROUP_BYTES", 400)
    monkeypatch.setattr(compose, "_COMPOSED_BYTES", 1500)


def busy_clock(rng: random.Random) -> Callable[[], float]:
    """Return a clock of the work that is done at once: at random that takes no time, or long."""
    share, now = rng.choice([0.0, 0.05, 0.3, 1.0]), 0.0

    def clock() -> float:
        nonlocal now
        if rng.random() < share:
            now += rng.choice([0.0005, 0.0025, 0.05])
        return now

    return clock


@pytest.mark.usefixtures("_small_slices")
def test_clients_receive_all_events_in_order_or_a_gap_is_notified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each seed is another run. A failure adds the seed as a note; with it the run is repeated.

    Where long work pauses is the seed's choice too, and not the machine's.
    """
    given_seed = os.environ.get("PGREALTIME_TEST_SEED")
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        seed = int(given_seed) if given_seed else random.randrange(1 << 32)
        clock = busy_clock(random.Random(f"clock {seed}"))
        for module in (fairness, compose):
            monkeypatch.setattr(module, "perf_counter", clock)
        try:
            virtual_time.run(run_simulation(seed))
        except BaseException as error:
            error.add_note(f"PGREALTIME_TEST_SEED={seed}")
            raise
        if given_seed:
            break
