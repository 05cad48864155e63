"""Any process is killed at any moment during numbered writes.

No client misses a number unknowingly.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conformance.http_client import Address, EventStream, ProtocolError, Request
from tests.e2e.listener import Message, parse
from tests.e2e.service import Service, service
from tests.own_server import OwnServer
from tests.realtime import subscribe

SECONDS = float(os.environ.get("PGREALTIME_TEST_SECONDS", "30"))
CALM_SECONDS = 60.0
"""For every client to have every number after the last kill."""

_FEWEST = 6
"""Kills of a run, on however slow a machine."""

COLLECTIONS = {"numbers": {"table": "numbers", "list_rule": "", "view_rule": ""}}
SCHEMA = "CREATE TABLE numbers (id bigint PRIMARY KEY, filler text)"
INSERT = "INSERT INTO numbers SELECT i, repeat('x', 100) FROM generate_series(%s::int, %s::int) i"
KILL_BACKENDS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    " AND (backend_type = %s) AND application_name LIKE 'pgrealtime%%'"
)

Blow = Callable[[], Awaitable[None]]


class Database:
    """The table as clients read and write it, whenever the server restarts."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def run(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement; wait for the server if it is down."""
        while True:
            with suppress(psycopg.OperationalError):
                return await self.try_to_run(statement, *values)
            await asyncio.sleep(0.05)

    async def try_to_run(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as connection:
            cursor = await connection.execute(statement.encode(), values)
            return await cursor.fetchall() if cursor.description else []

    async def numbers(self) -> set[int]:
        return {n for (n,) in await self.run("SELECT id FROM numbers")}

    async def write(self, rng: random.Random) -> None:
        """Commit one number after another, or a few at once, without end."""
        n = 1
        while True:
            with suppress(psycopg.OperationalError):
                async with await psycopg.AsyncConnection.connect(
                    self._url, autocommit=True, application_name="writer"
                ) as connection:
                    while True:
                        first, n = n, n + rng.choice([1, 1, 1, 1, 5, 300])
                        await connection.execute(INSERT, [first, n - 1])
                        await asyncio.sleep(0.03)
            await asyncio.sleep(0.05)


class Follower:
    """A client that reconnects without end and reads the table whenever it has to."""

    def __init__(self, name: str, address: Address, database: Database, *, resumes: bool) -> None:
        self.name = name
        self.known: set[int] = set()
        """Numbers that were read or received."""
        self.resyncs = self.connections = 0
        self._received: set[int] = set()
        self._address = address
        self._database = database
        self._resumes = resumes
        self._position = ""
        self._stream: EventStream | None = None

    def cut(self) -> None:
        """Lose the connection."""
        if self._stream is not None:
            self._stream._writer.transport.abort()

    async def follow(self) -> None:
        while True:
            with suppress(OSError, ProtocolError, asyncio.IncompleteReadError, TimeoutError):
                await self._connect()
            await asyncio.sleep(0.1)

    async def _connect(self) -> None:
        asked = f"?lastEventId={self._position}" if self._resumes else ""
        request = Request(method="GET", path=f"/api/realtime{asked}", headers={})
        async with asyncio.timeout(20):
            stream = await EventStream.open(request, self._address, self.name)
        self._stream = stream
        try:
            await self._listen(stream)
        finally:
            self._stream = None
            await stream.close()

    async def _listen(self, stream: EventStream) -> None:
        for raw in await stream.take(1, 20):
            message = parse(raw)
            async with asyncio.timeout(20):
                status = await subscribe(self._address, message.data["clientId"], "numbers/*")
            if status != 204:
                return
            self.connections += 1
            if not (self._resumes and self._position):
                # Earlier numbers don't count: the page is loaded anew.
                self.known = await self._database.numbers()
            self._note(message)
        last = 0
        while taken := await stream.take(1, 120):
            last = await self._receive(parse(taken[0]), last)

    async def _receive(self, message: Message, last: int) -> int:
        if message.event == "PB_RESYNC":
            self.resyncs += 1
            self.known |= await self._database.numbers()
        elif message.event == "numbers/*":
            number = int(message.data["record"]["id"])
            assert number > last, f"{self.name} received {number} after {last}"
            if self._resumes:
                assert number not in self._received, f"{self.name} received {number} again"
            self._received.add(number)
            self.known.add(number)
            last = number
        self._note(message)
        return last

    def _note(self, message: Message) -> None:
        """Apply the message; its position is where the client resumes."""
        if self._resumes:
            self._position = message.id


def blows(
    rng: random.Random,
    server: OwnServer,
    database: Database,
    running: Service,
    followers: list[Follower],
) -> list[Blow]:
    """Return the kills that may happen."""

    async def kill_program() -> None:
        os.kill(running.process.pid, signal.SIGKILL)
        await running.process._process.wait()
        await running.start()

    async def restart_program() -> None:
        await running.stop()
        await running.start()

    async def freeze_program() -> None:
        os.kill(running.process.pid, signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.1, 3.0))
        os.kill(running.process.pid, signal.SIGCONT)

    async def kill_walsender() -> None:
        await database.run(KILL_BACKENDS, "walsender")

    async def kill_queries() -> None:
        await database.run(KILL_BACKENDS, "client backend")

    async def restart_server() -> None:
        mode = rng.choice(["immediate", "fast"])
        arguments = ("restart", f"--mode={mode}", f"--log={server.folder}/log")
        await asyncio.to_thread(server.control, *arguments)

    async def cut_clients() -> None:
        for follower in rng.sample(followers, rng.randint(1, len(followers))):
            follower.cut()

    return [
        *(kill_program, restart_program, freeze_program, kill_walsender, kill_queries),
        *(restart_server, cut_clients, cut_clients, cut_clients),
    ]


@pytest.mark.parametrize("durable", [False, True], ids=["temporary", "durable"])
async def test_no_client_misses_a_number_unknowingly_whatever_is_killed(
    server: OwnServer, tmp_path: Path, *, durable: bool
) -> None:
    """What a client read after a 204 or a gap, and what it received, is every number.

    With a durable slot a client that resumes receives every number itself: there is no gap.
    """
    seed = int(os.environ.get("PGREALTIME_TEST_SEED", random.randrange(1 << 32)))
    print(f"PGREALTIME_TEST_SEED={seed}")  # noqa: T201 (pytest shows it with the failure)
    rng = random.Random(seed)
    database = Database(server.url)
    struck: list[str] = []
    slot = {"durable": durable, "allow_unlimited_wal": durable}
    async with service(
        server.url,
        tmp_path,
        collections=COLLECTIONS,
        schema=SCHEMA,
        sections={"replication": {"slot": slot}},
    ) as running:
        followers = [
            Follower(f"follower {n}", running.address, database, resumes=n % 3 > 0)
            for n in range(6)
        ]
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(database.write(rng))
            following = [group.create_task(follower.follow()) for follower in followers]
            until = time.monotonic() + SECONDS
            while time.monotonic() < until or len(struck) < _FEWEST:
                await asyncio.sleep(rng.uniform(0.0, 2.0))
                blow = rng.choice(blows(rng, server, database, running, followers))
                struck.append(blow.__name__)
                await blow()
            writing.cancel()
            await asyncio.wait([writing])
            written = await database.numbers()
            await everybody_has(written, followers)
            for task in following:
                task.cancel()

    connects_and_resyncs = {
        follower.name: (follower.connections, follower.resyncs) for follower in followers
    }
    print(len(written), struck, connects_and_resyncs)  # noqa: T201 (as above)
    resyncs = sum(follower.resyncs for follower in followers)
    if durable:
        assert resyncs == 0
    else:
        assert resyncs or "kill_walsender" not in struck


async def everybody_has(written: set[int], followers: list[Follower]) -> None:
    """Return when all clients have every number; waiting longer brings no lost one."""
    deadline = time.monotonic() + CALM_SECONDS
    while lacking := {f.name: sorted(written - f.known) for f in followers if written - f.known}:
        assert time.monotonic() < deadline, lacking
        await asyncio.sleep(0.1)
