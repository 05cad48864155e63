"""Every mirror equals a new list, whichever processes its stream, calls and lists come from.

Over two replicas with a slot each, over two workers, and over two replicas of a log: random rules,
people, filters, transactions, and breaks after which a client is at another process.
``PGREALTIME_TEST_MIRRORS_SEVERAL`` is the number of histories of each form.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import cast

import pytest

from pgrealtime.workers import main
from pgrealtime.workers.messages import Message, Prepare
from pgrealtime.workers.process import WorkerProcess
from tests.conftest import MakeDatabase
from tests.mirrors import world
from tests.mirrors.client import SECONDS
from tests.mirrors.several import FORMS, Form, SeveralScene, several
from tests.mirrors.test_histories import History

HISTORIES = int(os.environ.get("PGREALTIME_TEST_MIRRORS_SEVERAL", "1"))


class SeveralHistory(History):
    """What happens to clients of several processes."""

    async def fault(self) -> None:
        faults = (self.break_off, self.break_off, self.kill, self.truncate, self.lose_one)
        await self.chance.choice(faults)()

    async def lose_one(self) -> None:
        running = cast(SeveralScene, self.running)
        losing = asyncio.create_task(running.lose_one(self.chance))
        try:
            await self.write_some()
        finally:
            await losing

    async def compare(self) -> None:
        """Compare until all lists are equal: what processes have yet to tell isn't seen here."""
        deadline = asyncio.get_running_loop().time() + SECONDS
        while True:
            await self.running.settle()
            try:
                await self.compare_now()
            except AssertionError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)
            else:
                return


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", FORMS)
async def test_every_mirror_equals_a_new_list(make_database: MakeDatabase, form: Form) -> None:
    """A worker is killed, a replica restarted (the owner of the log among them), streams end.

    Every other history has rules that read related rows.
    """
    tables = ("projects", "members", "tags", "task_tags", "tasks")
    schema = world.SCHEMA + "".join(f"ALTER TABLE {t} REPLICA IDENTITY FULL;" for t in tables)
    begun = world.collections(world.RULES[0], world.RULES[0])
    seed = os.environ.get("PGREALTIME_TEST_MIRROR_SEED", "") or f"{random.randrange(1 << 32):08x}"
    counts: Counter[str] = Counter()
    async with several(form, make_database(), schema, begun) as running:
        for number in range(HISTORIES):
            history = SeveralHistory(
                running,
                f"{seed}:{number}",
                has_faults=True,
                of_related=(number + FORMS.index(form)) % 2 == 0,
            )
            try:
                async with asyncio.timeout(300):
                    await history.live()
            except BaseException as error:
                error.add_note(f"PGREALTIME_TEST_MIRROR_SEED={seed}, history {number}")
                raise
            counts["histories"] += 1
            counts.update(history.counts)
    print(f"{form}: {dict(counts)}")  # noqa: T201 (what the run is about)
    assert counts["start"] > 0


async def test_lists_are_of_the_new_rules_before_mirrors_are_told(
    make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker applies a reload later than the other: it doesn't answer by the old rules then."""
    ask_in_time = main._ask_in_time

    async def ask(worker: WorkerProcess, message: Message) -> None:
        if worker.number % 2 and not isinstance(message, Prepare):
            await asyncio.sleep(1.0)
        await ask_in_time(worker, message)

    monkeypatch.setattr(main, "_ask_in_time", ask)
    everything, done = world.RULES[0], world.RULES[3]
    schema, before = world.SCHEMA, world.collections(everything, everything)
    async with several("workers", make_database(), schema, before) as running:
        await running.write(
            "INSERT INTO tasks SELECT 't' || i, 'ann', 'red', i % 2 = 0, 1 FROM"
            " generate_series(1, 8) i"
        )
        clients = [await running.client("tasks", "ann") for _ in range(8)]
        await running.reload(world.collections(done, done))
        async with asyncio.timeout(SECONDS):
            while not all(client.resyncs["rules"] for client in clients):
                await asyncio.sleep(0.02)
        await running.settle()
        found = [set(client.rows) for client in clients]

    assert found == [{"t1", "t3", "t5", "t7"}] * 8
