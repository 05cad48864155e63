"""A server's files are replaced by an older copy: clients are notified, and miss nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from tests.conformance.http_client import End
from tests.e2e.listener import Caller, Listener, Message, listener
from tests.e2e.service import Service, service
from tests.own_server import OwnServer

COLLECTIONS = {"numbers": {"table": "numbers", "list_rule": ""}}
SCHEMA = "CREATE TABLE numbers (id int PRIMARY KEY); CREATE TABLE others (filler text)"
INSERT = "INSERT INTO numbers VALUES (%s)"
FILL = "INSERT INTO others SELECT repeat('x', 1000) FROM generate_series(1, 1000)"

BEFORE = range(1, 4)
LOST = range(101, 105)
"""Numbers written after the copy was made, delivered, and undone by the restore."""
AFTER = 999


async def write(server: OwnServer, numbers: Iterable[int]) -> None:
    """Commit one number after the other."""
    async with await psycopg.AsyncConnection.connect(server.url, autocommit=True) as connection:
        for number in numbers:
            await connection.execute(INSERT, [number])


async def fill(server: OwnServer) -> None:
    """Write to a table that no client subscribes to, more than all numbers take."""
    async with await psycopg.AsyncConnection.connect(server.url, autocommit=True) as connection:
        await connection.execute(FILL)


def start(server: OwnServer) -> None:
    server.control("start", f"--log={server.folder}/log")


def copy_files(server: OwnServer) -> None:
    """Stop the server, copy its files, and start it again."""
    server.control("stop", "--mode=fast")
    _copy(server.folder / "data", server.folder / "copy")
    start(server)


def put_back(server: OwnServer) -> None:
    """Start the server with the files of the copy."""
    # Immediate mode: otherwise it would wait for the stopped program's status update.
    server.control("stop", "--mode=immediate")
    shutil.rmtree(server.folder / "data")
    _copy(server.folder / "copy", server.folder / "data")
    start(server)


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)  # with the owner


@asynccontextmanager
async def stopped(running: Service) -> AsyncIterator[None]:
    """Stop the program with SIGSTOP; it reaches the server again only afterwards."""
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(running.process.pid, signal.SIGCONT)


async def received(to: Listener, last: int | str) -> list[int | str]:
    """Return what a client receives up to a number or gap: numbers, and the reasons of gaps."""
    found: list[int | str] = []
    while not found or found[-1] != last:
        taken = await to.take(1)
        assert taken, f"nothing more after {found}"
        match taken[0]:
            case Message(event="numbers/*", data={"record": {"id": number}}):
                found.append(int(number))
            case Message(event="PB_RESYNC", data={"collections": [], "reason": reason}):
                found.append(reason)
            case Message(event="PB_CURSOR"):
                pass
            case other:
                raise AssertionError(other)
    return found


@pytest.mark.parametrize(
    ("plugin", "written", "fills"),
    [
        pytest.param("wal2json", 0, True, id="nothing-of-ours"),
        pytest.param("wal2json", len(LOST), False, id="as-much"),
        pytest.param("pgoutput", len(LOST), False, id="as-much-pgoutput"),
        pytest.param("wal2json", 20, False, id="more"),
    ],
)
async def test_clients_that_read_what_a_restore_undid_are_notified(
    server: OwnServer, tmp_path: Path, plugin: str, written: int, *, fills: bool
) -> None:
    """System identifier, timeline and slot are the same, and WAL positions may be used again.

    The program sees the server only when the other history has been written.
    """
    others = range(201, 201 + written)
    topics = ("numbers/*", "PB_RESYNC", "PB_CURSOR")
    publication = "; CREATE PUBLICATION pgrealtime FOR TABLE numbers"
    async with service(
        server.url,
        tmp_path,
        collections=COLLECTIONS,
        schema=SCHEMA + (publication if plugin == "pgoutput" else ""),
        sections={
            "replication": {
                "plugin": plugin,
                "slot": {"durable": True, "allow_unlimited_wal": True},
            }
        },
    ) as running:
        async with (
            listener(running.address, *topics) as follower,
            listener(running.address, "numbers/*") as plain,
        ):
            await write(server, BEFORE)
            assert await received(follower, BEFORE[-1]) == [*BEFORE]
            copy_files(server)
            await write(server, LOST)
            assert await received(follower, LOST[-1]) == [*LOST]
            (cursor,) = await follower.take(1)
            async with stopped(running):
                put_back(server)
                if fills:
                    await fill(server)
                await write(server, others)
            assert await received(follower, "unknown") == ["unknown"]
            await write(server, [AFTER])
            # What the copy contains may come again: clients reload everything after a gap.
            after = [one for one in await received(follower, AFTER) if one not in BEFORE]
            assert await plain.stream.wait_end(20) is End.ORDERLY
        back = Caller(headers={"Last-Event-ID": cursor.id})
        async with listener(running.address, *topics, caller=back) as again:
            await write(server, [AFTER + 1])
            resumed = await received(again, AFTER + 1)

    assert after == [*others, AFTER]
    assert resumed == ["unknown", AFTER + 1]
