"""Whatever happens in whatever order, everybody hears everything once and in order, or is told."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import pytest

from pgrealtime.hub import dispatcher
from pgrealtime.hub.catchup import slice_reader, tasks
from pgrealtime.hub.connections.connection import LIVE, Connection
from pgrealtime.hub.delivery import compose
from pgrealtime.hub.evaluation import evaluator
from pgrealtime.hub.events import slices
from tests import virtual_time
from tests.unit.hub.reader import Kind, Reader
from tests.unit.hub.world import World

SECONDS = float(os.environ.get("PGREALTIME_TEST_SECONDS", "15"))
_KINDS: tuple[Kind, ...] = ("plain", "told", "position", "cursor")


async def live(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, is_gated=rng.random() < 0.4)
    tasks = [asyncio.create_task(world.hub.run()), asyncio.create_task(world.hub.run_timers())]
    readers = [Reader(world, rng.choice(_KINDS), f"reader {n}") for n in range(4)]
    try:
        for _ in range(rng.choice([50, 200])):
            await step(world, rng.choice(readers))
            await world.moment()
            check_tasks(tasks)
        async with asyncio.timeout(600):
            await calm_down(world, readers)
        check_tasks(tasks)
        missing = [line for reader in readers for line in reader.missing()]
        assert not missing, "\n".join(missing)
        check_rest(world, readers)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_tasks(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


Action: TypeAlias = Callable[[World, Reader], Awaitable[None] | None]


def commit(world: World, _reader: Reader) -> None:
    if running := world.running():
        world.commit(world.rng.choice(running))


def decode(world: World, _reader: Reader) -> None:
    world.decode()


def fail_snapshots(world: World, _reader: Reader) -> None:
    world.failing = world.rng.choice([0.0, 0.0, 0.5])


def slow_down(world: World, _reader: Reader) -> None:
    world.slowness = world.rng.choice([0.0, 0.0, 0.05, 1.0])


def stick(_world: World, reader: Reader) -> None:
    if reader.stream is not None:
        reader.stream.sink.is_stuck = True


def unstick(_world: World, reader: Reader) -> None:
    if reader.stream is not None:
        reader.stream.sink.unstick()


def give_up_call(_world: World, reader: Reader) -> None:
    if reader.call is not None:
        reader.call.cancel()


def act(world: World, reader: Reader) -> None:
    """Do what is next for a client."""
    if reader.stream is None:
        reader.connect()
    elif not reader.wanted or world.rng.random() < 0.3:
        reader.choose_topics()
        reader.submit()
    elif not reader.is_served():
        reader.submit()


ACTIONS: tuple[tuple[float, Action], ...] = (
    (6, lambda world, _: world.begin()),
    (6, commit),
    (6, lambda world, _: world.reveal()),
    (6, decode),
    (1, lambda world, _: world.expire()),
    (0.3, lambda world, _: world.lose_stream()),
    (1, lambda world, _: world.regain_stream()),
    (0.2, lambda world, _: world.fail_over()),
    (0.5, lambda world, _: world.reload()),
    (1, fail_snapshots),
    (1, slow_down),
    (0.8, lambda _, reader: reader.leave()),
    (1, stick),
    (1, unstick),
    (1, give_up_call),
    (1, lambda _, reader: reader.take()),
    (5, act),
)


async def step(world: World, reader: Reader) -> None:
    """Do one thing, whatever it is."""
    weights = [weight for weight, _ in ACTIONS]
    ((_, action),) = world.rng.choices(ACTIONS, weights)
    done = action(world, reader)
    if done is not None:
        await done


async def calm_down(world: World, readers: list[Reader]) -> None:
    """Let everything that can happen happen, and everybody be served."""
    world.failing = world.slowness = 0.0
    world.regain_stream()
    while not await is_calm(world, readers):
        for commit in world.running():
            world.commit(commit)
        for commit in world.commits:
            commit.is_visible = True
        world.decode()
        for reader in readers:
            await serve(reader)
        await asyncio.sleep(world.rng.choice([0, 0.1, 1]))


async def serve(reader: Reader) -> None:
    await reader.take()
    if reader.stream is None:
        reader.connect()
        return
    reader.stream.sink.unstick()
    if not reader.wanted:
        reader.choose_topics()
    if not reader.is_served():
        reader.submit()


async def is_calm(world: World, readers: list[Reader]) -> bool:
    if world.running() or world.decode() or world.hub.head < world.changelog.end_cursor:
        return False
    for reader in readers:
        unstick(world, reader)
        await reader.take()
    return all(
        reader.is_served()
        and reader.stream is not None
        and (
            is_at_rest(world, reader.stream.connection)
            and not reader.stream.connection.close_reason
        )
        and (reader.call is None or reader.call.done())
        for reader in readers
    )


def is_at_rest(world: World, connection: Connection) -> bool:
    """Whether it has all there is."""
    replays = world.hub._catch_up
    is_parked = replays._caught_up.get(connection, False) and connection not in replays._tasks
    return connection.state is LIVE or (is_parked and connection.cursor == world.hub.head)


def check_rest(world: World, readers: list[Reader]) -> None:
    """Nothing is left over of all that was under way."""
    hub = world.hub
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
    """So that a handful of changes is cut as hundreds are."""
    for module in (evaluator, slice_reader, tasks, slices):
        monkeypatch.setattr(module, "SLICE_CHANGES", 3)
    for module in (dispatcher, slices):
        monkeypatch.setattr(module, "LIVE_SLICE_CHANGES", 10)
    monkeypatch.setattr(slices.split_into_slices, "__defaults__", (3,))
    monkeypatch.setattr(compose, "_RENDER_GROUP_BYTES", 400)
    monkeypatch.setattr(compose, "_COMPOSED_BYTES", 1500)


@pytest.mark.usefixtures("_small_slices")
def test_everybody_hears_everything_in_order_or_is_told() -> None:
    """Each seed is another life; a failure shows the seed, and the same seed fails again."""
    given = os.environ.get("PGREALTIME_TEST_SEED")
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        seed = int(given) if given else random.randrange(1 << 32)
        try:
            virtual_time.run(live(seed))
        except BaseException as error:
            error.add_note(f"PGREALTIME_TEST_SEED={seed}")
            raise
        if given:
            break
