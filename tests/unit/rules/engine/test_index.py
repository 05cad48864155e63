"""The index: the members that it finds for a row, and its content after they are removed."""

from __future__ import annotations

import gc
import json
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.changes import Row
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import BoundPredicate, Specialization
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.language import sqlite_values
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import Scalar, json_in_jsonb_order
from pgrealtime.rules.memory import operands
from pgrealtime.rules.memory.compare import WORK_BUDGET
from tests.unit.rules.schema import COLLECTIONS, POSTS

NOW = datetime(2024, 5, 6, tzinfo=UTC)
LOCAL = (
    "author = @request.auth.id",
    "author = @request.auth.id || title = @request.query.q",
    "(author = @request.auth.id || tags:each ?= @request.auth.id) && status ~ 'pub'",
    "author != @request.auth.id && views > 1",
    "title < @request.query.q || title >= @request.auth.id",
    "views > @request.query.n && title != @request.query.q",
    "tags:each != @request.auth.id",
    "title ~ @request.query.q || published = 1",
    "author = @request.auth.id && title = @request.query.q && views <= @request.query.n",
    "tags:each ?= @request.auth.id && tags:each ?= @request.query.q",
    "reviewers:each ?= @request.auth.id || reviewers:length = @request.query.n",
    "data.a = @request.query.q || data.a > @request.query.n",
)
"""Rules that are evaluated in the process, with every kind of path."""


@dataclass(eq=False, slots=True)
class Member:
    specialization: Specialization
    values: tuple[Scalar, ...]


@pytest.mark.parametrize(
    "rule",
    [
        "tags:each != reviewers:each && tags:each = reviewers:each",
        "(tags:each != 'x' || tags:each = 'y') && tags:each > reviewers:each",
    ],
)
def test_what_holds_for_all_items_is_found_out_once(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each combination of the items that the comparisons share."""
    bound = RuleCompiler(COLLECTIONS).bind_caller(POSTS, rule, RuleRequest())
    assert isinstance(bound, BoundPredicate)
    row = dict.fromkeys(column.name for column in POSTS.table.columns)
    lists = {
        name: "{" + ",".join(f"{name}{n:02}" for n in range(20)) + "}"
        for name in ("tags", "reviewers")
    }
    monkeypatch.setattr(WORK_BUDGET, "units_left", 10_000.0)

    evaluated: RowEvaluation[Member] = RowEvaluation(
        {**row, **lists}, frozenset(), MacroValues(NOW)
    )
    assert evaluated.evaluate(bound.specialization.formula, bound.values) is not None
    assert WORK_BUDGET.units_left > 8_000  # 400 pairs for all of it, and 400 for what is searched


@pytest.mark.parametrize("blanks", ["", " " * 5000], ids=["cached", "too-long"])
def test_a_json_literal_is_parsed_within_the_budget(
    blanks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each combination of list items: a client chooses both."""
    parses: list[str] = []

    def parse(text: str) -> str:
        parses.append(text)
        return json_in_jsonb_order(text)

    monkeypatch.setattr(sqlite_values, "json_in_jsonb_order", parse)
    operands._cached_ordered_json.cache_clear()
    rule = "tags:each ?~ 'a' && (tags:each ?~ 'zz' || data = @request.query.q)"
    document = json.dumps({f"k{n:03}": n for n in range(200)}, separators=(",", ":")) + blanks
    request = RuleRequest(query={"q": document})
    bound = RuleCompiler(COLLECTIONS).bind_caller(POSTS, rule, request)
    assert isinstance(bound, BoundPredicate)
    row = dict.fromkeys(column.name for column in POSTS.table.columns)
    row |= {"tags": "{" + ",".join(f"a{n}" for n in range(200)) + "}", "data": "{}"}
    monkeypatch.setattr(WORK_BUDGET, "units_left", 2_000.0)

    for _ in range(2):
        RowEvaluation[Member](row, frozenset(), MacroValues(NOW)).evaluate(
            bound.specialization.formula, bound.values
        )
    assert parses
    assert len(parses) * len(document) / 8 < 4_000


def make_members(rule: str, count: int, chance: Random) -> Iterator[Member]:
    compiler = RuleCompiler(COLLECTIONS)
    for _ in range(count):
        principal = AuthRecord(
            collection_id="pbc_users", collection_name="users", id=f"u{chance.randrange(5)}"
        )
        query = {
            "q": chance.choice(["", "a", "u1", "5", "b%"]),
            "n": chance.choice(["0", "2", "x"]),
        }
        bound = compiler.bind_caller(POSTS, rule, RuleRequest(principal=principal, query=query))
        if isinstance(bound, BoundPredicate):
            yield Member(bound.specialization, bound.values)


def post(chance: Random) -> Row:
    def some() -> str:
        return "{" + ",".join(chance.choices(["u0", "u1", "u2", "a"], k=chance.randrange(3))) + "}"

    return {
        **dict.fromkeys((column.name for column in POSTS.table.columns), None),
        "id": "r",
        "author": chance.choice(["u0", "u1", "u2", "", None]),
        "title": chance.choice(["a", "b", "u1", "5", "", None]),
        "status": chance.choice(["pub", "PUBLIC", "draft", None]),
        "views": chance.choice(["0", "1", "2", "5", None]),
        "published": chance.choice(["t", "f", None]),
        "tags": some(),
        "reviewers": some(),
        "data": chance.choice(['{"a": "u1"}', '{"a": 2}', "[]", None]),
    }


def found(index: PredicateIndex[Member], row: Row) -> set[Member]:
    evaluated: RowEvaluation[Member] = RowEvaluation(row, frozenset(), MacroValues(NOW))
    evaluated.evaluate_index(index)
    assert not evaluated.has_open_tests
    return set(evaluated.hits)


def tried(members: list[Member], row: Row) -> set[Member]:
    """Return the matches of all members, tested without any index."""
    evaluated: RowEvaluation[Member] = RowEvaluation(row, frozenset(), MacroValues(NOW))
    return {one for one in members if evaluated.evaluate(one.specialization.formula, one.values)}


@pytest.mark.parametrize("rule", LOCAL)
def test_a_row_finds_exactly_the_members_that_it_matches(rule: str) -> None:
    """Every path finds the same as testing all, while members are added and removed."""
    seed = Random().randrange(1 << 32)
    chance = Random(seed)
    index: PredicateIndex[Member] = PredicateIndex()
    members = list(make_members(rule, 40, chance))
    for member in members:
        index.add(member)
    while members:
        for _ in range(8):
            row = post(chance)
            assert found(index, row) == tried(members, row), (seed, row)
        for _ in range(min(7, len(members))):
            index.remove(members.pop(chance.randrange(len(members))))

    assert not index, seed


def one_each(count: int, rule: str = "author = @request.auth.id") -> list[Member]:
    compiler = RuleCompiler(COLLECTIONS)
    made = []
    for n in range(count):
        principal = AuthRecord(collection_id="pbc_users", collection_name="users", id=f"u{n}")
        bound = compiler.bind_caller(POSTS, rule, RuleRequest(principal=principal))
        assert isinstance(bound, BoundPredicate)
        made.append(Member(bound.specialization, bound.values))
    return made


def test_a_subscriber_takes_few_bytes() -> None:
    """Its index entry and its values; the specialization is shared."""
    count = 20_000
    warm = one_each(1)
    gc.collect()
    tracemalloc.start()
    members = one_each(count)
    index: PredicateIndex[Member] = PredicateIndex()
    for member in members:
        index.add(member)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert taken / count < 400
    assert warm


@pytest.mark.parametrize(
    "rule",
    [
        "author = @request.auth.id",
        "author = @request.auth.id || title = @request.auth.id",
        "(author = @request.auth.id || tags:each ?= @request.auth.id) && status ~ 'pub'",
        "author = @request.auth.id && title != @request.auth.id",
    ],
)
def test_the_cost_of_a_row_does_not_grow_with_the_number_of_members(rule: str) -> None:
    """Sixteen times the subscribers with equal matches: less than three times the time."""
    rows = [{**post(Random(n)), "author": f"u{n}", "tags": f"{{u{n}}}"} for n in range(200)]

    def cost(count: int) -> float:
        index: PredicateIndex[Member] = PredicateIndex()
        for member in one_each(count, rule):
            index.add(member)
        best = float("inf")
        for _ in range(7):
            start = time.process_time()
            for row in rows:
                found(index, row)
            best = min(best, time.process_time() - start)
        return best

    assert cost(16 * 1000) < 3 * cost(1000)
