"""Guests that submit the maximum of topics and then read nothing."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench.machine import resident_kilobytes
from tests.conformance.http_client import EventStream, Request, send
from tests.e2e.service import Service, service

OPEN = {"posts": {"table": "posts", "list_rule": "", "view_rule": ""}}
GUESTS = 12
TOPICS = 400
LARGE = 60_000
"""Bytes of the row that all topics receive: 290 MB of messages."""
MEGABYTES = 60
"""How much the process may grow by them."""
SECONDS = 1.5
"""How much later than without the guests another connection may receive a row, on a busy machine.

Without bounds, when everything was written at once, it took many times as long.
"""


async def subscribe(running: Service, client_id: str, topics: list[str]) -> None:
    body = json.dumps({"clientId": client_id, "subscriptions": topics}).encode()
    headers = {"Content-Type": "application/json"}
    request = Request(method="POST", path="/api/realtime", headers=headers, body=body)
    assert (await send(request, running.address)).head.status == 204


def client_id_in(text: bytes) -> str:
    found = re.search(rb'"clientId":"(\w+)"', text)
    assert found is not None, text
    return found[1].decode()


async def stalled_guest(running: Service, number: int, stack: ExitStack) -> None:
    """Subscribe, and read no more after that; the kernel buffers little for it."""
    guest = stack.enter_context(socket.socket())
    guest.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    guest.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(guest, (running.address.host, running.address.port))
    await loop.sock_sendall(guest, b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n")
    text = b""
    async with asyncio.timeout(10.0):
        while b"\n\n" not in text:
            text += await loop.sock_recv(guest, 4096)
    options = [json.dumps({"query": {"n": f"{number}.{n}"}}) for n in range(TOPICS)]
    await subscribe(running, client_id_in(text), [f"posts/*?options={one}" for one in options])


async def seconds_until_received(
    running: Service, stream: EventStream, row: str, size: int
) -> float:
    """Insert a row and return the seconds until the connection has received it."""
    began = time.monotonic()
    await running.write.execute(
        "INSERT INTO posts (id, title) VALUES (%s, repeat('x', %s))", [row, size]
    )
    async with asyncio.timeout(60.0):
        while not any(row.encode() in one for one in await stream.take(1, 30.0)):
            pass
    return time.monotonic() - began


@pytest.mark.timeout(90)
async def test_a_thousand_topics_of_guests_that_read_nothing_delay_no_other_and_fill_no_memory(
    database_url: str, tmp_path: Path
) -> None:
    """The limits of send buffers, per connection and in all, hold even within one change."""
    async with service(database_url, tmp_path, collections=OPEN) as running:
        request = Request(method="GET", path="/api/realtime", headers={})
        stream = await EventStream.open(request, running.address, "honest")
        (connect,) = await stream.take(1, 10.0)
        await subscribe(running, client_id_in(connect), ["posts/*"])
        alone = [
            await seconds_until_received(running, stream, f"alone-{n}", LARGE) for n in range(5)
        ]
        with ExitStack() as stack:
            for number in range(GUESTS):
                await stalled_guest(running, number, stack)
            before = resident_kilobytes(running.process.pid)
            attacked = [
                await seconds_until_received(running, stream, f"row-{n}", LARGE) for n in range(3)
            ]
            attacked += [
                await seconds_until_received(running, stream, f"small-{n}", 10) for n in range(5)
            ]
            gained = resident_kilobytes(running.process.pid) - before
        await stream.close()

    assert max(attacked) < 5 * max(alone) + SECONDS
    assert gained < MEGABYTES * 1024
