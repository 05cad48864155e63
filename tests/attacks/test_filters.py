"""The most expensive filters and views that a client may submit delay only their own connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.listener import Listener, listener
from tests.e2e.service import service
from tests.topics import topic

GUESTS = 10
ROWS = 4
SCHEMA = "CREATE TABLE pages (id text PRIMARY KEY, tags text[], names text[], html text);"
COLLECTIONS: dict[str, dict[str, Any]] = {"pages": {"table": "pages", "list_rule": ""}}
HTML = "<p>a<b>b</b> &amp; c</p>" * 400


def items(guest: int) -> list[str]:
    """Compare every item with every item, many times over; the last part is true."""
    pairs = " || ".join(f"tags:each > names:each && tags:each = 'x{guest}{n}'" for n in range(15))
    return [topic("pages/*", filter=f"({pairs} || names:each ?~ 'n1') && tags:each != 'y{guest}'")]


def patterns(guest: int) -> list[str]:
    """Match a pattern that nearly fits at each position of a long text."""
    nearly = f"%{'a_' * 700}b{guest}%"
    return [topic("pages/*", filter=f"html ~ '{nearly}{n}' || id != '{n}'") for n in range(20)]


def columns(guest: int) -> list[str]:
    """Match a column's value as the pattern."""
    return [topic("pages/*", filter=f"html ~ html || id = '{guest}{n}'") for n in range(40)]


def views(guest: int) -> list[str]:
    """Request a hundred excerpts of nine kilobytes of HTML, all different."""
    limits = range(1000 + 100 * guest, 1100 + 100 * guest)
    return [topic("pages/*", fields=f"id,html:excerpt({limit},true)") for limit in limits]


async def waits(client: Listener, write: Callable[[int], Any], rows: range) -> list[float]:
    """Return how long each row took to reach the subscriber, one after the other."""
    found = []
    for n in rows:
        began = time.monotonic()
        await write(n)
        (received,) = await client.take(1, 60)
        assert received.data["record"]["id"] == f"r{n}"
        found.append(time.monotonic() - began)
    return found


@pytest.mark.parametrize("attack", [items, patterns, columns, views])
async def test_others_receive_in_time_and_the_attackers_receive_all_in_order(
    database_url: str, tmp_path: Path, attack: Callable[[int], list[str]]
) -> None:
    """Without time limits a row took up to eighteen seconds for every connection."""
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            service(database_url, tmp_path, schema=SCHEMA, collections=COLLECTIONS)
        )
        honest = await stack.enter_async_context(listener(running.address, "pages/*"))
        tags = [f"t{n:02}" for n in range(20)]
        names = [f"n{n:02}" for n in range(20)]
        html = HTML if attack is views else "a" * 9_000

        async def write(n: int) -> None:
            await running.write.execute(
                "INSERT INTO pages VALUES (%s, %s, %s, %s)", [f"r{n}", tags, names, html]
            )

        alone = await waits(honest, write, range(3))
        guests = [
            await stack.enter_async_context(listener(running.address, *attack(n)))
            for n in range(GUESTS)
        ]
        attacked = await waits(honest, write, range(3, 3 + ROWS))
        async with asyncio.timeout(100):
            topics = len(attack(0))
            received = await guests[0].take(topics, 90)

    assert max(attacked) < 2
    assert sum(attacked) / ROWS < 0.5 + 5 * max(alone)
    ids = [message.data["record"]["id"] for message in received]
    assert ids == ["r3"] * topics
