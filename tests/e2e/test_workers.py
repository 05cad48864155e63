"""A service of several processes on one port: what fails, and what clients see of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from tests.conformance.http_client import Address
from tests.conformance.pgrealtime_server import command
from tests.conformance.process import ServerDiedError, ServerProcess, free_port
from tests.e2e.listener import listener
from tests.e2e.numbered import OPEN, write_numbered
from tests.e2e.resuming import ResumingClient, resuming
from tests.e2e.sdk import sdk
from tests.e2e.service import service
from tests.e2e.test_admin import ask, scrape

TWO: dict[str, dict[str, Any]] = {"server": {"workers": 2}}


def admin_of_two() -> tuple[Address, dict[str, dict[str, Any]]]:
    port = free_port()
    return Address(host="127.0.0.1", port=port), {**TWO, "admin": {"port": port}}


def workers_of(process: ServerProcess) -> list[int]:
    """Return the process ids of the workers, the oldest one first."""
    pid = process.pid
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Return whether the process is there and no zombie."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def wait_ready(address: Address) -> None:
    async with asyncio.timeout(30):
        while (await ask(address, "/ready"))[0] != 200:
            await asyncio.sleep(0.05)  # a probe asks again


async def wait_for_all(clients: Sequence[ResumingClient], last: int, seconds: float = 30) -> None:
    await asyncio.gather(*(client.wait_for(last, seconds) for client in clients))


def check_all(clients: Sequence[ResumingClient], last: int) -> None:
    for client in clients:
        client.check(last)


async def test_subscribe_calls_land_anywhere(database_url: str, tmp_path: Path) -> None:
    """Each call opens a connection of its own, which the kernel gives to either worker."""
    tags = set()
    async with service(database_url, tmp_path, collections=OPEN, sections=TWO) as running:
        for n in range(12):
            async with listener(running.address) as one:
                tags.add(one.client_id[:6])
                assert [await one.subscribe("posts/*") for _ in range(6)] == [204] * 6
                await running.write.execute(
                    "INSERT INTO posts (id, title, n) VALUES (%s, 'x', %s)", [f"r{n}", n]
                )
                (event,) = await one.take(1)
                assert event.data["record"]["n"] == n
        async with sdk(running.url) as client:
            await client.do("subscribe", collection="posts", topic="*")
            await running.write.execute("UPDATE posts SET n = 100 WHERE n = 0")
            (event_of_sdk,) = await client.wait_for(1)
        async with listener(running.address) as gone:
            pass
        assert [await gone.subscribe("posts/*") for _ in range(8)] == [404] * 8
    assert len(tags) == 2
    assert event_of_sdk["record"]["n"] == 100


async def test_a_killed_worker_costs_its_clients_nothing(database_url: str, tmp_path: Path) -> None:
    """They resume at the other one, and at its successor, which has the window of the others."""
    at, sections = admin_of_two()
    async with (
        service(database_url, tmp_path, collections=OPEN, sections=sections) as running,
        resuming(running.address, "posts/*", 8) as clients,
    ):
        writing = asyncio.create_task(write_numbered(running, 500, 0.01))
        for ended in (1, 2):
            await asyncio.sleep(0.5)
            oldest, _ = workers_of(running.process)
            os.kill(oldest, signal.SIGKILL)
            await running.process.wait_logged("worker.ended", ended)
            await wait_ready(at)
        last = await writing
        await wait_for_all(clients, last)
        check_all(clients, last)
        held = {tag for client in clients for tag in client.tags}
        assert len(held) > 2, "some are held by a successor"

        # Whichever worker it comes to: the second row is in the window of all.
        late = ResumingClient(running.address, "posts/*", last_id=clients[0].ids[0])
        task = asyncio.create_task(late.run())
        await late.wait_for(last, 30)
        task.cancel()
        assert (late.gaps, late.numbers) == ([], list(range(2, last + 1)))
        metrics = await scrape(at)
    assert metrics["workers"] == 2
    assert metrics["replication_changes_total"] == last
    assert metrics["events_sent_total"] > last


async def test_a_service_that_ends_starts_no_successor(database_url: str, tmp_path: Path) -> None:
    """A worker has just ended and its successor is due in a moment: nobody would stop that one."""
    sections = {"server": {**TWO["server"], "shutdown_grace": "1s"}}
    async with service(database_url, tmp_path, collections=OPEN, sections=sections) as running:
        for worker in workers_of(running.process):
            os.kill(worker, signal.SIGKILL)
        await running.process.wait_logged("worker.ended", 2)
        began = asyncio.get_running_loop().time()
        os.kill(running.process.pid, signal.SIGTERM)
        async with asyncio.timeout(30):
            while is_alive(running.process.pid):
                await asyncio.sleep(0.05)
    assert asyncio.get_running_loop().time() - began < 5


async def test_a_stopped_worker_holds_up_nobody_and_misses_nothing(
    database_url: str, tmp_path: Path
) -> None:
    """Its own clients hear nothing meanwhile, and needn't reconnect."""
    async with (
        service(database_url, tmp_path, collections=OPEN, sections=TWO) as running,
        resuming(running.address, "posts/*", 10) as clients,
    ):
        stopped, _ = workers_of(running.process)
        os.kill(stopped, signal.SIGSTOP)
        try:
            last = await write_numbered(running, 100, 0.03)
            async with asyncio.timeout(10):
                while not any(client.numbers[-1:] == [last] for client in clients):
                    await asyncio.sleep(0.02)
            assert not all(client.numbers for client in clients)
        finally:
            os.kill(stopped, signal.SIGCONT)
        await wait_for_all(clients, last)
        check_all(clients, last)
        assert all(len(client.tags) == 1 for client in clients)


async def test_a_stuck_worker_is_replaced(database_url: str, tmp_path: Path) -> None:
    async with (
        service(database_url, tmp_path, collections=OPEN, sections=TWO) as running,
        resuming(running.address, "posts/*", 6) as clients,
    ):
        stopped, _ = workers_of(running.process)
        os.kill(stopped, signal.SIGSTOP)
        await running.process.wait_logged("worker.stuck")
        last = await write_numbered(running, 50, 0.01)
        await wait_for_all(clients, last)
        check_all(clients, last)
        assert stopped not in workers_of(running.process)


async def test_workers_end_when_the_main_process_is_killed(
    database_url: str, tmp_path: Path
) -> None:
    """As one process that is killed does: a new one listens at once, and clients resume."""
    slot = {"durable": True, "allow_unlimited_wal": True, "name": f"workers_{uuid4().hex}"}
    sections = {**TWO, "replication": {"slot": slot}}
    async with (
        service(database_url, tmp_path, collections=OPEN, sections=sections) as running,
        resuming(running.address, "posts/*", 4) as clients,
    ):
        writing = asyncio.create_task(write_numbered(running, 300, 0.01))
        await asyncio.sleep(1)
        workers = workers_of(running.process)
        os.kill(running.process.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            while any(map(is_alive, workers)):
                await asyncio.sleep(0.02)  # their parent is gone, so nobody is told
        await running.start()
        last = await writing
        await wait_for_all(clients, last, 60)
        check_all(clients, last)


async def test_sigterm_drains_all(database_url: str, tmp_path: Path) -> None:
    """Connections end in an orderly way, and no process is left."""
    async with (
        service(database_url, tmp_path, collections=OPEN, sections=TWO) as running,
        listener(running.address, "posts/*") as one,
        listener(running.address, "posts/*") as other,
    ):
        # Workers answer a moment before the main process knows that all of them do.
        await running.process.wait_logged("server.started")
        workers = workers_of(running.process)
        await running.stop()
        assert [str(await each.stream.wait_end(1)) for each in (one, other)] == ["End.ORDERLY"] * 2
        assert not any(map(is_alive, workers))
        assert running.process.logged("server.stopping")


async def test_large_rows_and_transactions(database_url: str, tmp_path: Path) -> None:
    """A row of 3 MB, and a transaction of a third of the window."""
    sections = {**TWO, "realtime": {"send_buffer": "128MiB"}}
    async with (
        service(database_url, tmp_path, collections=OPEN, sections=sections) as running,
        resuming(running.address, "posts/*", 3) as clients,
    ):
        await running.write.execute(
            "INSERT INTO posts (id, title, n) VALUES ('big', repeat('x', 3000000), 1)"
        )
        await wait_for_all(clients, 1)
        await running.write.execute(
            "INSERT INTO posts (id, title, n) SELECT 'r' || i, repeat('y', 1000), i"
            " FROM generate_series(2, 10000) i"
        )
        await wait_for_all(clients, 10000, 90)
        check_all(clients, 10000)


async def test_a_flood_holds_up_the_stream_and_becomes_no_gap(
    database_url: str, tmp_path: Path
) -> None:
    """More than the window holds, faster than workers deliver."""
    sections = {**TWO, "changelog": {"max_size": "1MiB"}}
    async with (
        service(database_url, tmp_path, collections=OPEN, sections=sections) as running,
        resuming(running.address, "posts/*", 3) as clients,
    ):
        for n in range(1, 12001, 500):
            await running.write.execute(
                "INSERT INTO posts (id, title, n) SELECT 'r' || i, repeat('y', 100), i"
                f" FROM generate_series({n}, {n + 499}) i".encode()
            )
        await wait_for_all(clients, 12000, 90)
        check_all(clients, 12000)


async def test_a_reload_is_applied_by_all_workers_or_by_none(
    database_url: str, tmp_path: Path
) -> None:
    """One line of the log says which. The gap of a replaced table comes once."""
    async with (
        service(database_url, tmp_path, collections=OPEN, sections=TWO) as running,
        resuming(running.address, "posts/*", 8) as clients,
    ):
        settings = yaml.safe_load(running._config.read_text())
        settings["collections"]["posts"]["list_rule"] = "n > 5"
        running._config.write_text(yaml.safe_dump(settings))
        assert await running.process.reload()
        await running.write.execute(
            "INSERT INTO posts (id, title, n) VALUES ('a', '', 1), ('b', '', 6)"
        )
        await wait_for_all(clients, 6)
        assert all(client.numbers == [6] for client in clients)

        settings["collections"]["posts"]["list_rule"] = "nonsense > 5"
        running._config.write_text(yaml.safe_dump(settings))
        assert not await running.process.reload()
        assert len(running.process.logged("config.rejected")) == 1
        assert len(running.process.logged("config.reloaded")) == 1

        await running.write.execute("ALTER TABLE posts ADD COLUMN extra text DEFAULT 'more'")
        await running.write.execute("INSERT INTO posts (id, title, n) VALUES ('c', '', 7)")
        await wait_for_all(clients, 7)
        assert not any(client.gaps for client in clients)

        await running.write.execute(
            "CREATE TABLE copied (LIKE posts INCLUDING ALL); DROP TABLE posts;"
            "ALTER TABLE copied RENAME TO posts; ALTER TABLE posts REPLICA IDENTITY FULL"
        )
        async with asyncio.timeout(60):
            while not all(client.gaps for client in clients):
                await asyncio.sleep(0.05)
        await running.write.execute("INSERT INTO posts (id, title, n) VALUES ('d', '', 8)")
        await wait_for_all(clients, 8)
        assert [client.gaps for client in clients] == [["schema"]] * 8
        assert len(running.process.logged("replication.gap")) <= 3, "one of main, one of each"


async def test_more_workers_than_connections_are_refused(database_url: str, tmp_path: Path) -> None:
    sections = {"server": {"workers": 3}, "database": {"pool_size": 5}}
    with pytest.raises(ServerDiedError, match="workers_exceed_connections"):
        async with service(database_url, tmp_path, collections=OPEN, sections=sections):
            pass


async def test_another_instance_on_the_port_is_refused(database_url: str, tmp_path: Path) -> None:
    """Although workers share it: the kernel would give each a half of the connections."""
    async with service(database_url, tmp_path, collections=OPEN, sections=TWO) as running:
        other = await ServerProcess.start(
            [command(), "run", "-c", str(running._config)], tmp_path / "other.log"
        )
        with pytest.raises(ServerDiedError, match="port_unavailable"):
            await other.wait_healthy(Address(host="127.0.0.1", port=free_port()))
