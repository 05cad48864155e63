"""Random lists and records are answered as the real PocketBase answers them.

The seeds are fresh in every run and part of the test's name. ``PGREALTIME_SEED`` repeats a run from
there, ``PGREALTIME_LISTS`` makes it longer.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import psycopg
import pytest

from tests.conformance.random_records import RandomWorld, Shape
from tests.conformance.records_differential import duelling

PER_WORLD = 60
"""Requests on one pair of servers, whose start costs as much as all of them."""
PER_RULES = 12

LISTS = int(os.environ.get("PGREALTIME_LISTS") or 120)

FIRST_SEED = int(os.environ.get("PGREALTIME_SEED") or secrets.randbelow(10**9))

SEEDS = [FIRST_SEED + number for number in range(-(-LISTS // PER_WORLD))]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", SEEDS)
async def test_lists_of_both_servers_show_the_same(
    seed: int, database_url: str, tmp_path: Path
) -> None:
    """Whatever schema, rules, caller, filter, sort, expand and page."""
    world = RandomWorld(seed)
    async with duelling(world, database_url, tmp_path) as duel:
        for _ in range(PER_WORLD // PER_RULES):
            await duel.compare(PER_RULES)
    print(f"\nseed {seed}, {world.shape}: {duel.report}")  # noqa: T201 (-rP shows what was compared)

    assert not duel.report.differing, "\n".join(duel.report.differing)


async def test_a_difference_is_noticed(database_url: str, tmp_path: Path) -> None:
    """Two servers with other rows don't pass."""
    async with duelling(RandomWorld(1, Shape()), database_url, tmp_path) as duel:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("TRUNCATE posts, people")
        await duel.compare(PER_RULES)

    assert duel.report.differing
