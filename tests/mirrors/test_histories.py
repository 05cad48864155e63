"""Every mirror equals a new list, whatever was written and whatever broke.

Half of the clients load their lists, to the others they are sent.

Random rules, people, filters, transactions and faults over real SSE. ``PGREALTIME_TEST_MIRRORS``
is the number of histories, ``PGREALTIME_TEST_MIRROR_SEED`` repeats one.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.conftest import MakeDatabase
from tests.mirrors import world
from tests.mirrors.client import MirrorClient
from tests.mirrors.scene import Scene, scene
from tests.mirrors.world import Condition

HISTORIES = int(os.environ.get("PGREALTIME_TEST_MIRRORS", "10"))
_OF_A_WORLD = 5
_STEPS = 8
_ACTIONS = {"create", "update", "delete", "resync", "ready", "histories"}
_CLIENTS = 8
_KILL = (
    "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name LIKE 'pgrealtime%'"
)


class History:
    """Some clients with random topics, and what happens to them."""

    def __init__(
        self, running: Scene, seed: str, *, has_faults: bool, of_related: bool = False
    ) -> None:
        self.running = running
        self.rules = world.RELATED_RULES if of_related else world.RULES
        self.of_related = of_related
        self.chance = random.Random(seed)
        self.has_faults = has_faults
        self.list_rule, self.view_rule = self.chance.choices(self.rules, k=2)
        self.filters: dict[MirrorClient, Condition] = {}
        self.counts: Counter[str] = Counter()

    async def live(self) -> None:
        """Connect the clients, and compare after each step."""
        running, chance = self.running, self.chance
        await running.disconnect()
        running.clients.clear()
        await running.reload(world.collections(self.list_rule, self.view_rule))
        for _ in range(_CLIENTS):
            record_id = chance.choice(world.IDS) if not chance.randrange(4) else ""
            # No list with a filter is under the rule of a single record.
            filters = world.RELATED_FILTERS if self.of_related else world.FILTERS
            filter_ = filters[0] if record_id else chance.choice(filters)
            client = MirrorClient(
                running.reader,
                "tasks",
                chance.choice(world.PEOPLE),
                filter=filter_.text,
                record_id=record_id,
                is_resumable=chance.random() < 0.5,
                is_loaded=chance.random() < 0.5,
            )
            self.filters[client] = filter_
            running.clients.append(client)
            await client.connect()
        await self.compare()
        for _ in range(_STEPS):
            await self.step()
            await self.compare()
        for client in running.clients:
            self.counts.update(client.resyncs)
            self.counts.update(action for action, _ in client.log)

    def transaction(self) -> Iterator[str]:
        """Yield the statements of a random transaction."""
        return world.transaction(self.chance, of_related=self.of_related)

    async def step(self) -> None:
        chance, running = self.chance, self.running
        if self.has_faults and not chance.randrange(3):
            await self.fault()
        for _ in range(chance.choice((1, 1, 3))):
            await running.write(*self.transaction())

    async def fault(self) -> None:
        faults = (self.break_off, self.fall_behind, self.kill, self.truncate)
        await self.chance.choice((*faults, self.break_off, self.change_rules, self.restart))()

    async def write_some(self) -> None:
        for _ in range(self.chance.randrange(4)):
            await self.running.write(*self.transaction())

    async def break_off(self) -> None:
        broken = self.chance.sample(self.running.clients, 3)
        for client in broken:
            await client.disconnect()
        await self.write_some()
        for client in broken:
            await client.connect()

    async def fall_behind(self) -> None:
        hub = self.running.reader.service.hub
        for connection in hub._registry.live_connections():
            if self.chance.random() < 0.5:
                hub._dispatcher._fall_behind(connection)

    async def kill(self) -> None:
        await self.running.write(_KILL)

    async def truncate(self) -> None:
        await self.running.write("TRUNCATE tasks CASCADE", *self.transaction())

    async def change_rules(self) -> None:
        self.list_rule, self.view_rule = self.chance.choices(self.rules, k=2)
        await self.running.reload(world.collections(self.list_rule, self.view_rule))

    async def restart(self) -> None:
        await self.running.disconnect()
        await self.running.stop()
        await self.write_some()
        await self.running.start()
        for client in self.running.clients:
            await client.connect()

    async def compare(self) -> None:
        """Compare every list once all has come."""
        await self.running.settle()
        await self.compare_now()

    async def compare_now(self) -> None:
        """Compare every list with SQL, and with what the client would load."""
        # At once: an empty list with a filter is answered late.
        lists = await asyncio.gather(*(client.fetch_list() for client in self.filters))
        for (client, filter_), new in zip(self.filters.items(), lists, strict=True):
            rule = self.view_rule if client.record_id else self.list_rule
            about = f"{client.person} {client.topic} by {rule.text!r}: {client.log[-12:]}"
            if rule.sql and filter_.sql:
                statement = world.expected_ids(client.person, rule, filter_)
                rows = await (
                    await self.running.reader.write.execute(statement.encode())
                ).fetchall()
                assert set(client.rows) == {
                    one for (one,) in rows if client.record_id in {"", one}
                }, about
            assert client.rows == new, about


@pytest.mark.timeout(600)
@pytest.mark.parametrize("has_faults", [False, True], ids=["calm", "with faults"])
@pytest.mark.parametrize("identity", world.IDENTITIES)
async def test_every_mirror_equals_a_new_list(
    make_database: MakeDatabase,
    identity: world.Identity,
    has_faults: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    """Without a fault a list is loaded anew only if its caller changed or an old row is unknown."""
    reasons = {"start", "identity"} | ({"unknown"} if identity != "full" else set())
    schema = world.SCHEMA + world.IDENTITIES[identity] + ";"
    counts = await live_histories(make_database, schema, has_faults=has_faults)
    print(f"{identity}: {dict(counts)}")  # noqa: T201 (what the run is about)

    assert has_faults or set(counts) - _ACTIONS <= reasons


@pytest.mark.timeout(600)
@pytest.mark.parametrize("has_faults", [False, True], ids=["calm", "with faults"])
@pytest.mark.parametrize("identity", ["full", "default"])
async def test_every_mirror_by_related_rows_equals_a_new_list(
    make_database: MakeDatabase,
    identity: str,
    has_faults: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    """Whoever a related change concerns loads anew."""
    tables = ("projects", "members", "tags", "task_tags", "tasks")
    schema = world.SCHEMA + "".join(
        f"ALTER TABLE {table} REPLICA IDENTITY {identity};" for table in tables
    )
    counts = await live_histories(make_database, schema, has_faults=has_faults, of_related=True)
    print(f"related, {identity}: {dict(counts)}")  # noqa: T201 (what the run is about)

    assert has_faults or set(counts) - _ACTIONS <= {"start", "identity", "related", "unknown"}


async def live_histories(
    make_database: MakeDatabase, schema: str, *, has_faults: bool, of_related: bool = False
) -> Counter[str]:
    """Live some histories over a schema; return what clients were told."""
    given = os.environ.get("PGREALTIME_TEST_MIRROR_SEED", "")
    counts: Counter[str] = Counter()
    wanted = -(-HISTORIES // 10)
    while counts["histories"] < wanted:
        seed, _, number = given.partition(":")
        seed = seed or f"{random.randrange(1 << 32):08x}"
        numbers = [int(number)] if number else range(min(_OF_A_WORLD, wanted))
        begun = world.collections(world.RULES[0], world.RULES[0])
        settings = {"mirrors": {"pace": 0.02}}
        async with scene(make_database(), schema, begun, **settings) as running:
            for one in numbers:
                name = f"{seed}:{one}"
                history = History(running, name, has_faults=has_faults, of_related=of_related)
                try:
                    async with asyncio.timeout(120):
                        await history.live()
                except BaseException as error:
                    error.add_note(f"PGREALTIME_TEST_MIRROR_SEED={name}")
                    raise
                counts["histories"] += 1
                counts.update(history.counts)
    return counts
