"""``pgrealtime explain`` compared with what PocketBase was recorded to show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

from pgrealtime.auth.principal import GUEST, Superuser
from pgrealtime.config.model import CollectionConfig, Config, DatabaseConfig
from pgrealtime.errors import RuleError
from pgrealtime.explain.caller import CallerSpec, NamedUser
from pgrealtime.explain.explain import explain_delivery
from pgrealtime.rules.sql.breakdown import ClauseGroup, RuleFragment, fragment_queries, split_rule
from tests.conformance.rules_corpus import CORPUS, Case, Corpus, cases, configured, expected, load

_EVERY = 20
"""One in so many cases is explained whole: each takes some twenty statements."""


def _config(url: str, case: Case) -> Config:
    schema = json.loads((CORPUS / "schema.json").read_text(encoding="utf-8"))
    shown: dict[str, CollectionConfig] = {}
    others = case.get("others", {})
    for one in schema["collections"]:
        name = one["name"]
        rule = case["rule"] if name == case["collection"] else others.get(name, "")
        shown[name] = configured(one).model_copy(update={"list_rule": rule})
    database = DatabaseConfig(url=url, statement_timeout=20.0)
    return Config(version=1, database=database, collections=shown)


def _caller(auth: str) -> CallerSpec:
    match auth.split("/"):
        case ["guest"]:
            return GUEST
        case ["superuser"]:
            return Superuser("root")
        case [collection, record_id]:
            return NamedUser(collection, record_id)
        case _:
            raise AssertionError(auth)


def _topic(case: Case) -> str:
    options = {"query": case["query"], "headers": case["headers"]}
    return f"{case['collection']}/*?options={quote(json.dumps(options))}"


def _sampled() -> Iterator[tuple[Case, str, bool]]:
    """Yield cases with one record that is shown and one that isn't, where there are such."""
    for n, case in enumerate(cases(CORPUS)):
        wanted = expected(case)
        if n % _EVERY or wanted is None:
            continue
        yield from ((case, one, True) for one in wanted[:1])
        others = (one for one in _ids(case["collection"]) if one not in wanted)
        yield from ((case, one, False) for one in (next(others, None),) if one is not None)


def _ids(collection: str) -> list[str]:
    seed = json.loads((CORPUS / "seed.json").read_text(encoding="utf-8"))
    return sorted(record["id"] for record in seed[collection])


@pytest.mark.timeout(600)
async def test_explain_says_what_was_recorded(database_url: str) -> None:
    """The verdict is PocketBase's; reference, engine and the clauses agree on it."""
    corpus = await load(database_url)
    corpus.connection.close()
    wrong: list[str] = []
    asked_for = 0
    for case, record_id, is_shown in _sampled():
        explanation = await explain_delivery(
            _config(database_url, case), _caller(case["auth"]), _topic(case), record_id
        )
        asked_for += 1
        if explanation.is_delivered is not is_shown or any(
            line.startswith("BUG") for line in explanation.lines
        ):
            wrong.append("\n".join([case["id"], *explanation.lines]))

    assert wrong == []
    assert asked_for > 120


@pytest.mark.timeout(600)
async def test_parts_say_together_what_the_rule_says(database_url: str) -> None:
    """A clause evaluated alone means what it means in its rule.

    The exception are conjunctions of ``?`` comparisons: each may be satisfied by another related
    row, so all clauses are true and the whole isn't.
    """
    corpus = await load(database_url)
    odd: list[str] = []
    joined = 0
    try:
        for verdict, parts, join, case in _verdicts(corpus):
            joined += 1
            together = all(parts) if join.is_conjunction else any(parts)
            is_one_row = join.is_conjunction and together and "?" in join.text(" ")
            if verdict != together and not is_one_row:
                odd.append(f"{case['id']} {join.text(' ')}: {verdict} of {parts}")
    finally:
        corpus.connection.close()

    assert odd == []
    assert joined > 300


def _verdicts(corpus: Corpus) -> Iterator[tuple[bool, list[bool], ClauseGroup, Case]]:
    """Yield verdicts of a join and of each of its clauses on a row, for a sample of the cases."""
    compound = [case for case in cases(CORPUS) if _joined(case["rule"])]
    for case in compound[::_EVERY]:
        for row in corpus.rows[case["collection"]]:
            for join in _joined(case["rule"]):
                with suppress(RuleError):
                    verdict, *parts = (
                        _truth(corpus, case, row, one) for one in (join, *join.fragments)
                    )
                    yield verdict, parts, join, case


def _joined(rule: str | None) -> list[ClauseGroup]:
    try:
        return list(_joins(split_rule(rule or "")))
    except RuleError:
        return []


def _joins(piece: RuleFragment) -> Iterator[ClauseGroup]:
    if isinstance(piece, ClauseGroup):
        yield piece
        for part in piece.fragments:
            yield from _joins(part)


def _truth(corpus: Corpus, case: Case, row: Any, piece: RuleFragment) -> bool:
    now = datetime.now(UTC)
    made = fragment_queries(
        piece,
        corpus.collections,
        corpus.collections[case["collection"]],
        request=corpus._request(case),
        row=row,
        now=now,
        is_filter=False,
    )
    question = made.reference_query.truth_query(row, now)
    try:
        ((verdict,),) = corpus.connection.execute(question.sql.encode(), question.params)
    except psycopg.DataError:
        return False
    return bool(verdict)
