"""The engine admits the subscribers that the reference query admits.

Rules, filters, rows, related rows and subscribers are drawn anew on each run; a failure names its
seed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

import psycopg
import pytest

from pgrealtime.changes import Row
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query
from tests.engine_driving import CallerMember, evaluate_rows
from tests.rules_world import World


def asked(
    world: World, rule: str, request: RuleRequest, rows: Sequence[Row], now: datetime
) -> set[int]:
    """Return the rows that the reference query admits."""
    made = reference_query(world.collections, world.collections["posts"], rule, request)
    match made:
        case AdmitAll():
            return set(range(len(rows)))
        case DenyAll():
            return set()
        case ReferenceQuery():
            return _answer(world.connection, made, rows, now)


def _answer(
    connection: psycopg.Connection, made: ReferenceQuery, rows: Sequence[Row], now: datetime
) -> set[int]:
    try:
        question = made.sql_query(rows, now)
        found = connection.execute(question.sql.encode(), question.params).fetchall()
        return {index for (index,) in found}
    except psycopg.Error:
        if len(rows) == 1:
            return set()
        return {n for n, row in enumerate(rows) if _answer(connection, made, [row], now)}


def request_of(world: World, text: str) -> RuleRequest:
    chance = world.chance
    query = {} if chance.random() < 0.2 else {"q": chance.choice(["u1", "pub", "", "5", "hel%"])}
    if text:
        query["filter"] = text
    headers = {"x_key": chance.choice(["u2", "draft"])} if chance.random() < 0.5 else {}
    return RuleRequest(principal=world.principal(), query=query, headers=headers)


ROUNDS = 60
DELETIONS = 40


@pytest.mark.timeout(300)
def test_random_rules_admit_the_subscribers_that_the_reference_admits(database_url: str) -> None:
    """Whether decided in the process, by keys that PostgreSQL returns or pair by pair."""
    start = secrets.randbits(32)
    world = World(database_url, Random(start))
    with world.connection:
        for seed in range(start, start + ROUNDS):
            world.chance.seed(seed)
            rule = world.rule()
            fault = _round(world, rule)
            assert not fault, f"seed {start}, round {seed - start}: {rule}\n{fault}"


@pytest.mark.timeout(300)
def test_deletes_are_evaluated_as_of_before_their_transaction(database_url: str) -> None:
    """Changes of related rows by the same commit don't count.

    The reference is evaluated before it.
    """
    start = secrets.randbits(32)
    world = World(database_url, Random(start))
    tables = reachable_tables(world.collections)
    with world.connection:
        for seed in range(start, start + DELETIONS):
            world.chance.seed(seed)
            world.refill()
            rule = world.rule(related=0.9, depth=1)
            made = _asked(world, rule)
            if made is None:
                continue
            changes = world.transaction()
            fault = _compared(world, made, BeforeState(changes, tables))
            assert not fault, f"seed {start}, round {seed - start}: {rule}\n{changes}\n{fault}"


@dataclass
class Round:
    """Rows and subscribers, and the reference's verdicts on them."""

    rows: list[Row]
    now: datetime
    index: PredicateIndex[CallerMember]
    expected: dict[CallerMember, set[int]]


def _round(world: World, rule: str) -> str:
    """Return the difference between engine and reference, or an empty text."""
    made = _asked(world, rule)
    if made is None:
        return ""
    fault = _compared(world, made, None)
    for member in made.expected:
        made.index.remove(member)
    return fault or ("something was left in the index" if made.index else "")


def _asked(world: World, rule: str) -> Round | None:
    """Evaluate the reference query; return None if the rule is refused."""
    chance = world.chance
    planner = RuleCompiler(world.collections)
    made = Round([world.post() for _ in range(12)], datetime.now(UTC), PredicateIndex(), {})
    filters = ["", "", *(world.filter() for _ in range(2))]
    for _ in range(14):
        request = request_of(world, chance.choice(filters))
        own = world.own_row(request.principal) if chance.random() < 0.5 else None
        try:
            wanted = asked(world, rule, request, made.rows, made.now)
        except RuleError:
            return None
        bound = planner.bind_caller(world.collections["posts"], rule, request, own)
        if isinstance(bound, DenyAll):
            assert not wanted, f"{rule} of {request}: {wanted}, the engine has {bound}"
            continue
        member = CallerMember(request, bound.specialization, bound.values)
        made.index.add(member)
        made.expected[member] = wanted
    return made


def _compared(world: World, made: Round, before_state: BeforeState | None) -> str:
    for among in (None, list(made.expected)):
        found = evaluate_rows(
            world.connection,
            made.index,
            made.rows,
            made.now,
            among=among,
            before_state=before_state,
        )
        for n, hits in enumerate(found):
            for member, wanted in made.expected.items():
                if (member in hits) != (n in wanted):
                    return (
                        f"{member.request}\n{made.rows[n]}\n"
                        f"by paths {member.specialization.paths}\nvalues {member.values}\n"
                        f"reference says {n in wanted}"
                    )
    return ""
