"""A client that never reads affects no other client, and costs the server bounded memory."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.bench.machine import resident_kilobytes
from tests.conformance.http_client import EventStream
from tests.e2e.service import Service, service
from tests.realtime import open_stream, open_unread, subscribe

EVENTS = 200_000
IN_A_COMMIT = 500
MEGABYTE = 1024
"""In kilobytes, the unit in which memory is read."""

OPEN = {"posts": {"table": "posts", "list_rule": "", "view_rule": ""}}
LIMITS = {
    "changelog": {"max_size": "4MiB"},
    "realtime": {"send_buffer": "1MiB", "stall_timeout": "5m"},
}
"""A changelog that fills before a fifth of the events, so that its growth isn't measured.

No connection is dropped for not reading, which is what this test is about.
"""

GROWTH = 16 * MEGABYTE
"""How much the server may grow from a fifth of the events to their end; 2 MB were seen.

What waits for the client that never reads would be 50 MB as bytes, and several times that as
objects.
"""

_NUMBER = re.compile(rb'"n":(\d+)')


async def write(running: Service) -> None:
    for first in range(1, EVENTS, IN_A_COMMIT):
        await running.write.execute(
            "INSERT INTO posts (id, title, n) SELECT 'r' || i, repeat('x', 100), i"
            " FROM generate_series(%s::int, %s::int) i",
            [first, first + IN_A_COMMIT - 1],
        )


def numbers(messages: tuple[bytes, ...]) -> Iterator[int]:
    for message in messages:
        found = _NUMBER.search(message)
        assert found is not None, message
        yield int(found[1])


async def read_all(running: Service, stream: EventStream) -> list[int]:
    """Check that every event comes, in order; return memory after each tenth, in kilobytes."""
    expected = 1
    memory: list[int] = []
    while expected <= EVENTS:
        messages = await stream.take(1, 30.0)
        messages += await stream.take(len(stream.waiting), 0.0)
        for number in numbers(messages):
            assert number == expected
            expected += 1
        assert messages, f"nothing came for 30 s after {expected - 1} events: {stream.end}"
        if expected > (len(memory) + 1) * EVENTS // 10:
            memory.append(resident_kilobytes(running.process.pid))
    return memory


@pytest.mark.timeout(180)
async def test_memory_stays_flat_with_a_client_that_never_reads(
    database_url: str, tmp_path: Path
) -> None:
    """200,000 events: one connection reads none of them, another one receives them all in order."""
    async with service(database_url, tmp_path, sections=LIMITS, collections=OPEN) as running:
        with closing(await open_unread(running.address, "posts/*")):
            stream, client_id = await open_stream(running.address)
            assert await subscribe(running.address, client_id, "posts/*") == 204
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write(running))
                reading = tasks.create_task(read_all(running, stream))
            await stream.close()

    _, settled, *later = reading.result()
    assert max(later) - settled < GROWTH, f"kilobytes after each tenth: {reading.result()}"
