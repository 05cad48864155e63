"""The engine admits whom the reference query of each subscriber admits.

Rules, filters, rows, related rows and subscribers are drawn anew on each run; a failure names its
seed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from random import Random

import psycopg
import pytest

from pgrealtime.changes import Row
from pgrealtime.errors import RuleError
from pgrealtime.rules.index import Index
from pgrealtime.rules.plan import Planner
from pgrealtime.rules.reference import Everyone, Nobody, Reference, reference
from pgrealtime.rules.request import Request
from tests.engine_driving import Asker, decided
from tests.rules_world import World


def asked(
    world: World, rule: str, request: Request, rows: Sequence[Row], now: datetime
) -> set[int]:
    """Return the rows that the reference query admits."""
    made = reference(world.collections, world.collections["posts"], rule, request)
    match made:
        case Everyone():
            return set(range(len(rows)))
        case Nobody():
            return set()
        case Reference():
            return _answer(world.connection, made, rows, now)


def _answer(
    connection: psycopg.Connection, made: Reference, rows: Sequence[Row], now: datetime
) -> set[int]:
    try:
        question = made.question(rows, now)
        found = connection.execute(question.sql.encode(), question.params).fetchall()
        return {index for (index,) in found}
    except psycopg.Error:
        if len(rows) == 1:
            return set()
        return {n for n, row in enumerate(rows) if _answer(connection, made, [row], now)}


def request_of(world: World, text: str) -> Request:
    chance = world.chance
    query = {} if chance.random() < 0.2 else {"q": chance.choice(["u1", "pub", "", "5", "hel%"])}
    if text:
        query["filter"] = text
    headers = {"x_key": chance.choice(["u2", "draft"])} if chance.random() < 0.5 else {}
    return Request(principal=world.principal(), query=query, headers=headers)


@pytest.mark.timeout(300)
def test_random_rules_admit_whom_the_reference_admits(database_url: str) -> None:
    """Whatever is decided in the process, by keys that Postgres names or pair by pair."""
    start = secrets.randbits(32)
    world = World(database_url, Random(start))
    with world.connection:
        for seed in range(start, start + ROUNDS):
            world.chance.seed(seed)
            rule = world.rule()
            fault = round_(world, rule)
            assert not fault, f"seed {start}, round {seed - start}: {rule}\n{fault}"


ROUNDS = 60


def round_(world: World, rule: str) -> str:
    """Return how engine and reference differ for some subscribers and rows, or an empty text."""
    chance = world.chance
    now = datetime.now(UTC)
    planner = Planner(world.collections)
    rows = [world.post() for _ in range(12)]
    filters = ["", "", *(world.filter() for _ in range(2))]
    index: Index[Asker] = Index()
    askers: list[Asker] = []
    expected: dict[Asker, set[int]] = {}
    for _ in range(14):
        request = request_of(world, chance.choice(filters))
        own = world.own_row(request.principal) if chance.random() < 0.5 else None
        try:
            wanted = asked(world, rule, request, rows, now)
        except RuleError:
            return ""
        bound = planner.bind(world.collections["posts"], rule, request, own)
        if isinstance(bound, Nobody):
            if wanted:
                return f"{request}: admitted {wanted}, the engine has {bound}"
            continue
        asker = Asker(request, bound.variant, bound.values)
        index.add(asker)
        askers.append(asker)
        expected[asker] = wanted
    for among in (None, askers):
        for n, hits in enumerate(decided(world.connection, index, rows, now, among=among)):
            for asker, wanted in expected.items():
                if (asker in hits) != (n in wanted):
                    return (
                        f"{asker.request}\n{rows[n]}\nby paths {asker.variant.paths}\n"
                        f"values {asker.values}\nreference says {n in wanted}"
                    )
    for asker in askers:
        index.remove(asker)
    return "" if not index else f"something was left in the index: {index}"
