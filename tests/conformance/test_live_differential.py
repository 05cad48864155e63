"""Random scenarios, done to the real PocketBase and to pgrealtime at the same time.

The seeds are fresh in every run and part of the test's name. ``PGREALTIME_SEED`` repeats a run from
there, ``PGREALTIME_SCENARIOS`` makes it longer.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from random import Random

import pytest

from tests.conformance.differential import DifferenceError, Duel, Side
from tests.conformance.natural_schema import Style
from tests.conformance.pgrealtime_server import Setting, running
from tests.conformance.pocketbase_server import PocketBaseTemplate
from tests.conformance.scenarios import ALL, Ability, Scenario, World

PER_WORLD = 12
"""Scenarios on one pair of servers, whose start costs as much as all of them."""

SCENARIOS = int(os.environ.get("PGREALTIME_SCENARIOS") or 24)

FIRST_SEED = int(os.environ.get("PGREALTIME_SEED") or secrets.randbelow(10**9))

SEEDS = [FIRST_SEED + number for number in range(-(-SCENARIOS // PER_WORLD))]

NOT_YET: dict[Ability, str] = {}
"""What worlds leave out, with the reason."""

STYLE = Style(empty="zero", json_type="json")
"""PocketBase has no NULLs in its columns: rules over real ones have no counterpart there."""


def _story(world: World, scenario: Scenario) -> str:
    rules = [
        f"{c.name}: list {c.list_rule!r}, view {c.view_rule!r}" for c in world.fixtures.collections
    ]
    return "\n".join([*rules, *map(str, scenario.actions)])


@pytest.mark.parametrize("seed", SEEDS)
async def test_clients_of_both_servers_hear_the_same(
    seed: int, database_url: str, tmp_path: Path
) -> None:
    """Whatever the rules, options and writes: every client hears PocketBase's bytes."""
    world = World(Random(seed), ALL - NOT_YET.keys())
    fixtures = world.fixtures
    for directory in ("template", "ours"):
        (tmp_path / directory).mkdir()
    template = await PocketBaseTemplate.build(fixtures, tmp_path / "template")
    async with (
        template.running(tmp_path / "original") as original,
        running(
            fixtures,
            [collection.name for collection in fixtures.collections],
            database_url=database_url,
            directory=tmp_path / "ours",
            style=STYLE,
            setting=Setting(),
        ) as ours,
    ):
        duel = Duel(
            await Side.of("PocketBase", original, fixtures),
            await Side.of("pgrealtime", ours, fixtures),
        )
        for number in range(PER_WORLD):
            scenario = world.scenario()
            try:
                events = await duel.run(scenario)
            except DifferenceError as error:
                error.add_note(f"seed {seed}, scenario {number}\n{_story(world, scenario)}")
                error.add_note(f"pgrealtime printed:\n{ours.output}")
                raise
            print(f"seed {seed}, scenario {number}: {events} events alike")  # noqa: T201 (-rP shows what was compared)
