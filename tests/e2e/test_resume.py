"""Clients that resume from their last position miss nothing, wherever their connection was cut."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.breaker import breaker
from tests.e2e.numbered import OPEN, fresh_seed, repeats, wait_for_number, write_numbered
from tests.e2e.sdk import EVENT_SOURCES, native, sdk
from tests.e2e.service import service


@pytest.mark.parametrize("library", EVENT_SOURCES)
async def test_the_unmodified_sdk_with_five_lines_misses_nothing(
    library: str, database_url: str, tmp_path: Path
) -> None:
    """Cut at random bytes; per cut at most the messages between two PB_CURSOR are repeated."""
    seed = fresh_seed()
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        breaker(running.address, random.Random(seed)) as proxy,
        sdk(proxy.url, library) as client,
    ):
        await client.do("resume")
        await client.do("subscribe", collection="posts", topic="*")
        proxy.longest = 30_000
        last = await write_numbered(running, 600, 0.008)
        proxy.longest = 0
        await wait_for_number(client, last, 60)
        numbers = [e["record"]["n"] for e in client.events]
        breaks = proxy.breaks

    assert breaks >= 5
    assert not [r for r in client.reports if r["report"] == "resync"]
    assert repeats(numbers) <= breaks * 16


async def test_a_plain_event_source_misses_nothing_and_receives_no_change_twice(
    database_url: str, tmp_path: Path
) -> None:
    """The id of every message means: complete up to here."""
    seed = fresh_seed()
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        breaker(running.address, random.Random(seed)) as proxy,
        native(proxy.url, "posts/*") as client,
    ):
        await client.wait_for(1, "subscribed")
        proxy.longest = 12_000
        last = await write_numbered(running, 300, 0.03)
        proxy.longest = 0
        await wait_for_number(client, last, 60)
        numbers = [e["record"]["n"] for e in client.events]
        breaks = proxy.breaks

    assert breaks >= 2
    assert numbers == list(range(1, last + 1))


async def test_two_topics_that_match_one_change_are_both_received_over_a_break(
    database_url: str, tmp_path: Path
) -> None:
    """Only the second of the two messages advances the position."""
    seed = fresh_seed()
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        breaker(running.address, random.Random(seed)) as proxy,
        native(proxy.url, "posts/*", "posts/r1") as client,
    ):
        await client.wait_for(1, "subscribed")
        await running.write.execute("INSERT INTO posts (id, title, n) VALUES ('r1', 'x', 0)")
        proxy.longest = 6_000
        for n in range(1, 121):
            await running.write.execute("UPDATE posts SET n = %s", [n])
            await asyncio.sleep(0.05)  # paces the writer
        proxy.longest = 0
        async with asyncio.timeout(60):
            while not all(_numbers(client.events, name)[-1:] == [120] for name in TOPICS):
                await client.wait_for(len(client.events) + 1, seconds=60)
        breaks = proxy.breaks

    assert breaks >= 2
    for name in TOPICS:
        assert list(dict.fromkeys(_numbers(client.events, name))) == list(range(121))


TOPICS = ("posts/*", "posts/r1")


def _numbers(events: Sequence[dict[str, Any]], name: str) -> list[int]:
    return [event["record"]["n"] for event in events if event["as"] == name]


async def test_a_position_out_of_reach_is_answered_with_pb_resync(
    database_url: str, tmp_path: Path
) -> None:
    """The changelog is small: the client was away for longer than it reaches back."""
    async with (
        service(
            database_url, tmp_path, collections=OPEN, sections={"changelog": {"max_size": "16KiB"}}
        ) as running,
        breaker(running.address, random.Random(1)) as proxy,
        native(proxy.url, "posts/*") as client,
    ):
        await client.wait_for(1, "subscribed")
        await running.write.execute("INSERT INTO posts (id, title, n) VALUES ('a', 'x', 1)")
        await client.wait_for(1)
        proxy.longest = 1000
        for n in range(300):
            await running.write.execute("UPDATE posts SET n = %s", [n])
        await client.wait_for(1, "break")
        proxy.longest = 0
        (resync,) = await client.wait_for(1, "resync", seconds=60)

    assert json.loads(resync["data"]) == {"collections": [], "reason": "expired"}
