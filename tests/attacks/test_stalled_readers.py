"""Guests that submit the maximum of topics and then read nothing."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench.machine import resident_kilobytes
from tests.conformance.http_client import EventStream
from tests.e2e.service import Service, service
from tests.realtime import open_stream, open_unread, subscribe
from tests.topics import topic

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
        stream, client_id = await open_stream(running.address)
        assert await subscribe(running.address, client_id, "posts/*") == 204
        alone = [
            await seconds_until_received(running, stream, f"alone-{n}", LARGE) for n in range(5)
        ]
        with ExitStack() as stack:
            for number in range(GUESTS):
                topics = [topic("posts/*", n=f"{number}.{n}") for n in range(TOPICS)]
                stack.enter_context(await open_unread(running.address, *topics))
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
