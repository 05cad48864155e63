"""Clients that ask for large lists and read nothing, or leave, hold neither memory nor turns."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pgrealtime.api import large_responses
from tests.attacks.reading import reading
from tests.bench.machine import resident_kilobytes
from tests.e2e.service import service

SCHEMA = """
CREATE TABLE pages (id text PRIMARY KEY, html text NOT NULL);
INSERT INTO pages SELECT i, repeat('x', 20000) FROM generate_series(1, 500) i;
CREATE VIEW slow AS SELECT id, pg_sleep(30)::text AS waited FROM pages WHERE id = '1';
"""
COLLECTIONS: dict[str, dict[str, Any]] = {
    "pages": {"table": "pages", "list_rule": "", "view_rule": ""},
    "slow": {"table": "slow", "id": "id", "stream": False, "list_rule": ""},
}
MEBIBYTES = 10
"""Of one answer."""
CLIENTS = 60


async def ask(port: int, path: str) -> socket.socket:
    """Send a request and read nothing of its answer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    request = f"GET /api/collections/{path} HTTP/1.1\r\nHost: x\r\n\r\n"
    await loop.sock_sendall(client, request.encode())
    return client


@pytest.mark.timeout(120)
async def test_answers_that_nobody_reads_fill_no_memory_and_keep_nobody_else_from_reading(
    database_url: str, tmp_path: Path
) -> None:
    """Sixty times ten megabytes would be 600; small lists are answered all the while."""
    async with (
        service(
            database_url,
            tmp_path,
            schema=SCHEMA,
            collections=COLLECTIONS,
            sections={"reads": {"max_answer_size": f"{2 * MEBIBYTES}MiB"}},
        ) as running,
        aiohttp.ClientSession() as session,
    ):
        url = f"{running.url}/api/collections/pages/records"
        before = resident_kilobytes(running.process.pid)
        with ExitStack() as stack:
            for _ in range(CLIENTS):
                port = running.address.port
                stack.enter_context(await ask(port, "pages/records?perPage=1000&skipTotal=1"))
            async with asyncio.timeout(60):
                while True:
                    async with session.get(f"{url}?perPage=1000") as response:
                        if response.status == 429:
                            break
                    await asyncio.sleep(0.05)
            async with session.get(f"{url}?perPage=1") as response:
                assert response.status == 200
            gained = resident_kilobytes(running.process.pid) - before
        async with asyncio.timeout(30):
            while True:
                async with session.get(f"{url}?perPage=1000") as response:
                    if response.status == 200:
                        assert len((await response.json())["items"]) == 500
                        break
                await asyncio.sleep(0.05)

    assert gained < 12 * MEBIBYTES * 1024 + 60_000


@pytest.mark.parametrize("path", ["slow/records", "pages/records?perPage=1000"])
async def test_whoever_leaves_gives_up_turn_and_connection(database_url: str, path: str) -> None:
    """While a query runs, while others are waited for, while the answer is sent."""
    reads = {"statement_timeout": 20.0, "pool_size": 2}
    async with reading(database_url, SCHEMA, COLLECTIONS, reads=reads) as reader:
        for _ in range(3):
            clients = [await ask(reader.port, path) for _ in range(8)]
            await asyncio.sleep(0.3)
            for client in clients:
                client.close()
        async with asyncio.timeout(8):
            lists = [reader.ids("pages", perPage="1") for _ in range(6)]
            assert len(await asyncio.gather(*lists)) == 6


async def test_a_client_that_reads_too_slowly_is_disconnected(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a byte now and then doesn't keep the answer in memory."""
    monkeypatch.setattr(large_responses, "_MIN_SECONDS", 0.5)
    monkeypatch.setattr(large_responses, "_MIN_BYTES_PER_SECOND", 1e9)
    async with reading(database_url, SCHEMA, COLLECTIONS) as reader:
        client = await ask(reader.port, "pages/records?perPage=1000")
        loop, received = asyncio.get_running_loop(), 0
        with client:
            async with asyncio.timeout(10):
                try:
                    while count := len(await loop.sock_recv(client, 100)):
                        received += count
                        await asyncio.sleep(0.01 if received < 10_000 else 0)
                except ConnectionResetError:
                    pass

    assert received < MEBIBYTES * 1_000_000


async def test_a_body_of_a_read_is_small(database_url: str) -> None:
    """It is held while the request waits for its turn, and a hundred of an address may wait."""
    async with reading(database_url, SCHEMA, COLLECTIONS) as reader:
        statuses = []
        for size in (1000, 1_000_000):
            body = b'{"text": "%b"}' % (b"x" * size)
            headers = {"Content-Type": "application/json"}
            url = reader.url("pages/records", perPage="1")
            async with reader.session.get(url, data=body, headers=headers) as response:
                statuses.append(response.status)

    assert statuses == [200, 413]
