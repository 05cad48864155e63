"""Replicas that share a log: whatever happens to one of them, to NATS or to PostgreSQL.

Rows are numbered in commit order and counted at the clients, which resume at any replica: none is
lost, none comes twice, the order is kept, and no client is told of a gap.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from tests.log_world import (
    Cluster,
    Listener,
    NatsServer,
    Replica,
    Writer,
    cluster,
    everyone_has,
    longest_delay,
    longest_silence,
    nats_server,
)
from tests.own_server import OwnServer

ALL = os.environ.get("PGREALTIME_TEST_LOG") == "all"
"""Whether every fault is tried, and for longer."""
by_hand = pytest.mark.skipif(not ALL, reason="PGREALTIME_TEST_LOG=all runs it")


@dataclass
class World:
    """What a test's faults happen to."""

    cluster: Cluster
    nats: NatsServer
    writer: Writer
    listeners: list[Listener]

    async def heal(self) -> None:
        """Return once every listener has what was committed by now."""
        await asyncio.sleep(0.3)
        await everyone_has(self.listeners, self.writer.last)


@asynccontextmanager
async def world(database_url: str, folder: Path, *, count: int = 3) -> AsyncIterator[World]:
    slot = {"name": f"log_{uuid4().hex[:8]}", "durable": True, "allow_unlimited_wal": True}
    async with (
        nats_server() as nats,
        cluster(
            database_url,
            [nats],
            folder,
            count=count,
            sections={"replication": {"slot": slot}},
        ) as made,
    ):
        writer = Writer(database_url)
        addresses = [replica.address for replica in made.replicas]
        listeners = [Listener(f"listener {n}", addresses, n) for n in range(count)]
        await made.owner()
        tasks = [asyncio.create_task(listener.listen()) for listener in listeners]
        await asyncio.sleep(1.0)
        writing = asyncio.create_task(writer.write())
        try:
            await asyncio.sleep(1.0)
            yield World(made, nats, writer, listeners)
            writing.cancel()
            await asyncio.wait([writing])
            await everyone_has(listeners, await last_number(database_url))
        except BaseException:
            for replica in made.replicas:
                assert replica.process is not None
                print(replica.name, replica.process.output()[-4000:])  # noqa: T201
            raise
        finally:
            for task in (*tasks, writing):
                task.cancel()
            await asyncio.wait([*tasks, writing])
            await drop_slot(database_url, slot["name"], made)


async def last_number(url: str) -> int:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        cursor = await connection.execute("SELECT max(id) FROM numbers")
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])


async def drop_slot(url: str, name: object, made: Cluster) -> None:
    for replica in made.replicas:
        replica.database.mend()
        replica.nats.mend()
    await asyncio.gather(*(r.stop() for r in made.replicas), return_exceptions=True)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
            " WHERE slot_name = %s AND active_pid IS NOT NULL",
            (name,),
        )
        await asyncio.sleep(0.2)
        await connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
            " WHERE slot_name = %s",
            (name,),
        )


Fault = Callable[[World, Replica], Awaitable[None]]


async def kill(_: World, owner: Replica) -> None:
    await owner.kill()


async def pause(_: World, owner: Replica) -> None:
    owner.signal(signal.SIGSTOP)


async def cut_from_nats(_: World, owner: Replica) -> None:
    owner.nats.cut()


async def cut_from_database(_: World, owner: Replica) -> None:
    owner.database.cut()


async def cut_from_both(_: World, owner: Replica) -> None:
    owner.database.cut()
    owner.nats.cut()


async def terminate(_: World, owner: Replica) -> None:
    owner.signal(signal.SIGTERM)


async def undo(owner: Replica) -> None:
    """Bring the replica back: started again, woken, or with its links mended."""
    owner.database.mend()
    owner.nats.mend()
    assert owner.process is not None
    owner_process = owner.process._process
    if owner_process.returncode is None:
        owner.signal(signal.SIGCONT)
        try:
            async with asyncio.timeout(3):
                await owner_process.wait()
        except TimeoutError:
            return
    await owner.start()


OWNER_FAULTS: list[tuple[Fault, float]] = [
    (kill, 2.0),
    (pause, 2.0),
    (cut_from_nats, 2.0),
    (cut_from_database, 3.5),
    (cut_from_both, 2.0),
    (terminate, 2.0),
]
"""What happens to an owner, and within how many seconds others go on."""


async def test_an_owner_that_is_lost_is_replaced_and_nothing_is_missed(
    database_url: str, tmp_path: Path
) -> None:
    """Killed, paused and woken, cut from NATS or from the database, ended."""
    took: dict[str, str] = {}
    async with world(database_url, tmp_path) as made:
        for fault, seconds in OWNER_FAULTS:
            owner = await made.cluster.owner()
            began = time.monotonic()
            await fault(made, owner)
            successor = await made.cluster.owner(but=owner)
            others = [listener for listener in made.listeners if owner.address != listener.address]
            await asyncio.sleep(2.5)
            silence = max(longest_silence(listener, began) for listener in others)
            took[fault.__name__] = f"{silence:.2f} s"
            print(fault.__name__, f"{silence:.2f} s", successor.logged("owner.taken")[-1])  # noqa: T201
            assert silence < seconds, fault.__name__
            await undo(owner)
            await made.heal()
    print(took)  # noqa: T201
    for listener in made.listeners:
        assert (listener.faults, listener.resyncs) == ([], [])
        print(listener.name, listener.last, f"{longest_delay(listener, made.writer):.2f}")  # noqa: T201


async def restart_nats(made: World) -> None:
    await made.nats.stop()
    await made.nats.start()


async def kill_nats(made: World) -> None:
    await made.nats.kill()
    await made.nats.start()


async def wipe_nats(made: World) -> None:
    await made.nats.wipe()


async def set_nats_back(made: World) -> None:
    await made.nats.set_back(3.0)


async def nats_away(made: World) -> None:
    await made.nats.stop()
    await asyncio.sleep(6.0)
    reasons = [await replica.ready() for replica in made.cluster.replicas]
    assert all("log_away" in said for said in reasons), reasons
    await made.nats.start()


NATS_FAULTS = [restart_nats, kill_nats, wipe_nats, set_nats_back, nats_away]


async def test_nats_may_restart_and_lose_everything(database_url: str, tmp_path: Path) -> None:
    """What the log loses is in the WAL behind the slot; what a replica has it doesn't repeat."""
    took: dict[str, str] = {}
    async with world(database_url, tmp_path) as made:
        for fault in NATS_FAULTS:
            began = time.monotonic()
            await fault(made)
            back = time.monotonic()
            await made.heal()
            silence = max(longest_silence(listener, began) for listener in made.listeners)
            took[fault.__name__] = f"{silence:.2f} s, {time.monotonic() - back:.2f} s after it"
            print(fault.__name__, took[fault.__name__])  # noqa: T201
    for listener in made.listeners:
        assert (listener.faults, listener.resyncs) == ([], [])


async def test_postgresql_may_restart_and_crash(server: OwnServer, tmp_path: Path) -> None:
    """Nobody fences while it is away; whoever reaches it first goes on."""
    async with world(server.url, tmp_path) as made:
        for mode in ("fast", "immediate"):
            began = time.monotonic()
            arguments = ("restart", f"--mode={mode}", f"--log={server.folder}/log")
            await asyncio.to_thread(server.control, *arguments)
            back = time.monotonic()
            await made.heal()
            silence = max(longest_silence(listener, began) for listener in made.listeners)
            print(mode, f"{silence:.2f} s, {time.monotonic() - back:.2f} s after it")  # noqa: T201
    for listener in made.listeners:
        assert (listener.faults, listener.resyncs) == ([], [])
