"""Rows numbered in commit order, which reveal missing and repeated events."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from tests.e2e.sdk import Sdk
from tests.e2e.service import Service

OPEN = {"posts": {"table": "posts", "list_rule": "", "view_rule": ""}}
"""The posts of ``service.SCHEMA``, readable by every caller."""


def fresh_seed() -> int:
    """Return a new seed for where connections are cut; a failure shows it."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it with the failure)
    return seed


async def write_numbered(running: Service, count: int, pause: float) -> int:
    """Commit rows n = 1, 2, 3, ... one by one, some in threes; return the last number."""
    n = 0
    while n < count:
        size = 3 if n % 10 == 0 else 1
        await running.write.execute(
            "INSERT INTO posts (id, title, n) SELECT 'r' || i, repeat('x', 40), i"
            " FROM generate_series(%s::int, %s::int) i",
            [n + 1, n + size],
        )
        n += size
        await asyncio.sleep(pause)  # limits the writer's pace
    return n


async def wait_for_number(client: Sdk, last: int, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not client.events or max(e["record"]["n"] for e in client.events) < last:
            await client.wait_for(len(client.events) + 1, seconds=seconds)


def repeats(numbers: Sequence[int]) -> int:
    """Check that every number comes, first arrivals in order; return how many came again."""
    firsts = list(dict.fromkeys(numbers))
    assert firsts == list(range(1, len(firsts) + 1)), "a number is missing or out of order"
    return len(numbers) - len(firsts)
