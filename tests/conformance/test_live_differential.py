"""Random scenarios, run on the real PocketBase and on pgrealtime at the same time.

The seeds are fresh in every run and part of the test's name. ``PGREALTIME_SEED`` repeats a run from
there, ``PGREALTIME_SCENARIOS`` makes it longer. Users have tokens of pgrealtime's login where the
seed is odd, and of another issuer where it is even. A new password invalidates the former, as in
PocketBase, and not the latter, which PocketBase doesn't have.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from random import Random

import msgspec
import pytest

from tests.conformance.differential import DifferenceError, Duel, Side
from tests.conformance.fixtures import Fixtures
from tests.conformance.natural_schema import Style
from tests.conformance.pgrealtime_server import PgRealtimeServer, Setting, running
from tests.conformance.pocketbase_server import PocketBaseTemplate
from tests.conformance.scenarios import (
    ALL,
    BEACON,
    PASSWORD,
    Ability,
    Scenario,
    Subscribe,
    World,
    person_id,
)
from tests.conformance.transcript import Write

PER_WORLD = 12
"""Scenarios on one pair of servers, whose start costs as much as all of them."""

SCENARIOS = int(os.environ.get("PGREALTIME_SCENARIOS") or 24)

FIRST_SEED = int(os.environ.get("PGREALTIME_SEED") or secrets.randbelow(10**9))

SEEDS = [FIRST_SEED + number for number in range(-(-SCENARIOS // PER_WORLD))]

NOT_YET: dict[Ability, str] = {}
"""What worlds leave out, with the reason."""

STYLE = Style(empty="zero", json_type="json")
"""PocketBase has no NULLs in its columns, so rules over NULLs have no counterpart there."""


def _story(world: World, scenario: Scenario) -> str:
    rules = [
        f"{c.name}: list {c.list_rule!r}, view {c.view_rule!r}" for c in world.fixtures.collections
    ]
    return "\n".join([*rules, *map(str, scenario.actions)])


@asynccontextmanager
async def duelling(
    fixtures: Fixtures, database_url: str, directory: Path, *, has_own_tokens: bool
) -> AsyncIterator[tuple[Duel, PgRealtimeServer]]:
    """Start both servers with the same data.

    Args:
        fixtures: The data.
        database_url: An empty database.
        directory: An empty folder.
        has_own_tokens: Whether users log in at pgrealtime, rather than at another issuer.
    """
    for name in ("template", "ours"):
        (directory / name).mkdir()
    template = await PocketBaseTemplate.build(fixtures, directory / "template")
    async with (
        template.running(directory / "original") as original,
        running(
            fixtures,
            [collection.name for collection in fixtures.collections],
            database_url=database_url,
            directory=directory / "ours",
            style=STYLE,
            setting=Setting(login_through_api=has_own_tokens),
        ) as ours,
    ):
        sides = (
            await Side.of("PocketBase", original, fixtures),
            await Side.of("pgrealtime", ours, fixtures),
        )
        yield Duel(*sides), ours


@pytest.mark.parametrize("seed", SEEDS)
async def test_clients_of_both_servers_receive_the_same(
    seed: int, database_url: str, tmp_path: Path
) -> None:
    """Whatever the rules, options and writes, every client receives PocketBase's bytes."""
    has_own_tokens = seed % 2 == 1
    left_out = NOT_YET.keys() | (set() if has_own_tokens else {Ability.NEW_PASSWORDS})
    world = World(Random(seed), ALL - left_out)
    both = duelling(world.fixtures, database_url, tmp_path, has_own_tokens=has_own_tokens)
    async with both as (duel, ours):
        for number in range(PER_WORLD):
            scenario = world.scenario()
            try:
                events = await duel.run(scenario)
            except DifferenceError as error:
                error.add_note(f"seed {seed}, scenario {number}\n{_story(world, scenario)}")
                error.add_note(f"pgrealtime printed:\n{ours.output}")
                raise
            print(f"seed {seed}, scenario {number}: {events} events alike")  # noqa: T201 (-rP shows what was compared)


@pytest.mark.parametrize("has_own_tokens", [True, False], ids=["login", "issuer"])
async def test_a_new_password_ends_the_tokens_that_pocketbase_has(
    *, has_own_tokens: bool, database_url: str, tmp_path: Path
) -> None:
    """Tokens of another issuer stay valid, so worlds that use them change no passwords."""
    fixtures = World(Random(0)).fixtures
    collections = tuple(
        msgspec.structs.replace(c, list_rule="id = @request.auth.id") if c.name == "people" else c
        for c in fixtures.collections
    )
    fixtures = msgspec.structs.replace(fixtures, collections=collections)
    listening = Subscribe(conn="A", account="ben", topics=(f"{BEACON}/*", "people/*"))
    ben = person_id("ben")
    changed = Write(op="set_password", collection="people", id=ben, password=PASSWORD)
    written = Write(op="update", collection="people", id=ben, data={"score": 5})
    actions = (listening, written, changed, written, listening, written)
    goes_on = pytest.raises(
        DifferenceError, match=r"set_password.*\nA lacks: \[\]\nA has too much: \['event:people/\*"
    )
    both = duelling(fixtures, database_url, tmp_path, has_own_tokens=has_own_tokens)
    async with both as (duel, _):
        with nullcontext() if has_own_tokens else goes_on:
            # The first and the last.
            assert await duel.run(Scenario(connections=("A",), actions=actions)) == 2
