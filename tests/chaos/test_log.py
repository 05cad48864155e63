"""Replicas that share a log: whatever happens to one of them, to NATS or to PostgreSQL.

Rows are numbered in commit order and counted at the clients, which resume at any replica: none is
lost, none comes twice, the order is kept, and no client is told of a gap.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from nats.errors import Error as NatsError

from pgrealtime.config.model import LogConfig
from pgrealtime.log.connection import LogNames, connect
from tests.log_world import (
    Cluster,
    Listener,
    NatsServer,
    Replica,
    Writer,
    cluster,
    drop_slot,
    everyone_has,
    longest_delay,
    longest_silence,
    nats_cluster,
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
    database_url: str
    slot_name: str
    _is_forgiven: bool = False
    """Whether rows may be missing at the end: clients were told."""

    def forgive(self) -> None:
        """Let the end wait for no rows: clients were told that some are missing."""
        self._is_forgiven = True

    async def execute(self, statement: str, *values: object) -> None:
        async with await psycopg.AsyncConnection.connect(
            self.database_url, autocommit=True
        ) as connection:
            await connection.execute(statement.encode(), values)

    async def stop(self) -> None:
        """End all replicas."""
        await asyncio.gather(*(r.stop() for r in self.cluster.replicas), return_exceptions=True)

    async def heal(self) -> None:
        """Return once every listener has what was committed by now."""
        await asyncio.sleep(0.3)
        await everyone_has(self.listeners, self.writer.last)


@asynccontextmanager
async def world(
    database_url: str,
    folder: Path,
    *,
    count: int = 3,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    log: Mapping[str, Any] | None = None,
    servers: Sequence[NatsServer] | None = None,
) -> AsyncIterator[World]:
    """Start replicas, clients and a writer; ``servers`` are NATS servers that are there already."""
    name = f"log_{uuid4().hex[:8]}"
    slot = {"name": name, "durable": True, "allow_unlimited_wal": True}
    async with (
        nats_server() as nats,
        cluster(
            database_url,
            servers or [nats],
            folder,
            count=count,
            sections={"replication": {"slot": slot}, **(sections or {})},
            log=log,
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
            yielded = World(made, nats, writer, listeners, database_url, name)
            yield yielded
            writing.cancel()
            await asyncio.wait([writing])
            if not yielded._is_forgiven:
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
            for replica in made.replicas:
                replica.database.mend()
                replica.nats.mend()
            await asyncio.gather(*(replica.stop() for replica in made.replicas))
            await drop_slot(database_url, name)


async def last_number(url: str) -> int:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        cursor = await connection.execute("SELECT max(id) FROM numbers")
        row = await cursor.fetchone()
        assert row is not None
        return int(row[0])


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


SLOWEST = 3.0
"""Seconds until others go on: 2 on a machine of one's own."""

OWNER_FAULTS: list[Fault] = [
    *(kill, pause, cut_from_database, terminate),
    *((cut_from_nats, cut_from_both) if ALL else ()),
]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=by_hand)])
async def test_an_owner_that_is_lost_is_replaced_and_nothing_is_missed(
    workers: int, database_url: str, tmp_path: Path
) -> None:
    """Killed, paused and woken, cut from NATS or from the database, ended.

    With workers the main process of each machine follows the log for all of them.
    """
    took: dict[str, str] = {}
    server = {"server": {"workers": workers}}
    async with world(database_url, tmp_path, sections=server) as made:
        for fault in OWNER_FAULTS * (3 if ALL else 1):
            owner = await made.cluster.owner()
            began = time.monotonic()
            await fault(made, owner)
            successor = await made.cluster.owner(but=owner)
            others = [listener for listener in made.listeners if owner.address != listener.address]
            await asyncio.sleep(2.5)
            silence = max(longest_silence(listener, began) for listener in others)
            took[fault.__name__] = f"{silence:.2f} s"
            print(fault.__name__, f"{silence:.2f} s", successor.logged("owner.taken")[-1])  # noqa: T201
            assert silence < SLOWEST, fault.__name__
            await undo(owner)
            await made.heal()
            if fault is pause:
                assert owner.logged("owner.stopped")[-1]["code"] in ("log_fenced", "log_refused")
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


NATS_FAULTS = [
    *(wipe_nats, set_nats_back),
    *((restart_nats, kill_nats, nats_away) if ALL else ()),
]


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
        for mode in ("fast", "immediate") if ALL else ("immediate",):
            began = time.monotonic()
            arguments = ("restart", f"--mode={mode}", f"--log={server.folder}/log")
            await asyncio.to_thread(server.control, *arguments)
            back = time.monotonic()
            await made.heal()
            silence = max(longest_silence(listener, began) for listener in made.listeners)
            print(mode, f"{silence:.2f} s, {time.monotonic() - back:.2f} s after it")  # noqa: T201
    for listener in made.listeners:
        assert (listener.faults, listener.resyncs) == ([], [])


# -- what is told, and not silently missed


async def test_a_lost_slot_is_told(database_url: str, tmp_path: Path) -> None:
    """As one that exceeded ``max_slot_wal_keep_size``: a new one is made, clients are notified."""
    async with world(database_url, tmp_path) as made:
        owner = await made.cluster.owner()
        await made.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
            " WHERE slot_name = %s",
            made.slot_name,
        )
        async with asyncio.timeout(20):
            while True:
                with suppress(psycopg.Error):
                    await made.execute("SELECT pg_drop_replication_slot(%s)", made.slot_name)
                    break
                await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            while not all(listener.resyncs for listener in made.listeners):
                await asyncio.sleep(0.05)
        made.forgive()
        assert owner.logged("replication.broken")
    for listener in made.listeners:
        assert all("slot_lost" in said for said in listener.resyncs)
        assert listener.faults == []


@by_hand
async def test_a_replica_that_the_log_has_passed_says_so(database_url: str, tmp_path: Path) -> None:
    """It was cut off for longer than the log reaches back: ``expired``, and then everything."""
    sizes = {"changelog": {"max_size": "1MiB"}}
    async with world(database_url, tmp_path, sections=sizes) as made:
        owner = await made.cluster.owner()
        cut_off = next(replica for replica in made.cluster.replicas if replica is not owner)
        (listener,) = (each for each in made.listeners if each.address == cut_off.address)
        cut_off.nats.cut()
        made.writer.filler = 20_000
        await asyncio.sleep(5.0)
        made.writer.filler = 100
        cut_off.nats.mend()
        async with asyncio.timeout(30):
            while not listener.resyncs:
                await asyncio.sleep(0.05)
        assert cut_off.logged("log.passed")
        made.forgive()
    assert "expired" in listener.resyncs[0]
    assert listener.faults == []


@by_hand
async def test_what_nats_loses_beyond_the_lag_is_told(database_url: str, tmp_path: Path) -> None:
    """The slot was acknowledged further than the log reaches now; who had the rows goes on."""
    async with world(database_url, tmp_path, log={"lag": "1s"}) as made:
        for replica in made.cluster.replicas[1:]:
            await replica.kill()
        # The first one has what the log loses; one that starts afterwards has not.
        await made.nats.set_back(5.0)
        await asyncio.sleep(2.0)
        for replica in made.cluster.replicas[1:]:
            await replica.start()
        await asyncio.sleep(3.0)
        made.forgive()
    for listener in made.listeners:
        assert all("slot_lost" in said or "expired" in said for said in listener.resyncs)


@by_hand
async def test_a_failover_that_the_owner_does_not_see(server: OwnServer, tmp_path: Path) -> None:
    """The owner reads the old primary on. A replica that reaches the new one takes over."""
    server.configure(wal_keep_size="256MB", max_wal_senders="20")
    async with world(server.url, tmp_path) as made:
        owner = await made.cluster.owner()
        with server.standby() as standby:
            standby.control("promote")
            for replica in made.cluster.replicas:
                if replica is not owner:
                    replica.database.lead_to(standby.port)
            successor = await made.cluster.owner(but=owner, seconds=30)
            made.writer.url = standby.url
            await asyncio.sleep(1.0)
            await made.writer.reconnect()
            async with asyncio.timeout(30):
                while not all(listener.resyncs for listener in made.listeners):
                    await asyncio.sleep(0.1)
            await asyncio.sleep(2.0)
            assert owner.logged("owner.stopped")
            assert successor.logged("replication.started")
            assert len(owner.logged("owner.taken")) == 1
            made.forgive()
            await made.stop()
    for listener in made.listeners:
        assert all("unknown" in said for said in listener.resyncs)


@by_hand
async def test_three_nats_servers_survive_the_loss_of_one(
    database_url: str, tmp_path: Path
) -> None:
    """The stream's leader is killed, and comes back; so does an owner meanwhile."""
    async with (
        nats_cluster() as servers,
        world(database_url, tmp_path, log={"replicas": 3}, servers=servers) as made,
    ):
        for _ in range(3):
            leader = await stream_leader(servers)
            began = time.monotonic()
            await leader.kill()
            await made.heal()
            silence = max(longest_silence(listener, began) for listener in made.listeners)
            print(f"leader killed: {silence:.2f} s")  # noqa: T201
            await leader.start()
            owner = await made.cluster.owner()
            began = time.monotonic()
            await owner.kill()
            await made.cluster.owner(but=owner)
            await made.heal()
            silence = max(longest_silence(listener, began) for listener in made.listeners)
            print(f"owner killed: {silence:.2f} s")  # noqa: T201
            await owner.start()
    for listener in made.listeners:
        assert (listener.faults, listener.resyncs) == ([], [])


async def stream_leader(servers: Sequence[NatsServer]) -> NatsServer:
    config = LogConfig(nats=",".join(server.url for server in servers))
    names = LogNames(name="test")
    async with connect(config, names, client_name="test") as client:
        while True:
            with suppress(NatsError):
                answer = await client.request("$JS.API.STREAM.INFO.PGRT_test", b"", timeout=2)
                name = json.loads(answer.data).get("cluster", {}).get("leader")
                for server in servers:
                    if server.name == name:
                        return server
            await asyncio.sleep(0.1)
