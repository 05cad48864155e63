"""Random rules give the same rows in the real PocketBase, the reference query and the engine.

The seed is fresh in every run and named by a failure. ``PGREALTIME_SEED`` repeats a run,
``PGREALTIME_RULES`` and ``PGREALTIME_FUNCTION_RULES`` make it longer.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio

from pgrealtime.errors import RuleUnsupportedError
from tests.conformance import rules_pocketbase
from tests.conformance.random_rules import RandomRules
from tests.conformance.rules_corpus import Answer, Case, Corpus, Refused, Way, load
from tests.conformance.rules_pocketbase import CorpusPocketBase

FUNCTIONS = int(os.environ.get("PGREALTIME_FUNCTION_RULES") or 200)
"""Comparisons of functions that engine and reference evaluate."""
SEED = int(os.environ.get("PGREALTIME_SEED") or secrets.randbelow(10**9))
RULES = int(os.environ.get("PGREALTIME_RULES") or 40)

AUTHS = ("guest", "users/uann", "users/ubob", "users/ucat", "staff/sjoe")

LIST_RULES: Mapping[str, tuple[str | None, ...]] = {
    "users": (
        *("", "", None, "verified = true", "level > 0 || @request.auth.id = id"),
        *("groups.name ?= 'Red'", "team.open = true", "posts_via_author.views > 0"),
        "manager.name != 'Ann' && @collection.teams.name ?= 'Red'",
    ),
    "teams": ("", "", None, "open = true", "members.id ?= @request.auth.id", "lead.name = 'Ann'"),
    "comments": ("", "", None, "approved = true", "author.name = 'Ann'", "likes.level > 0"),
    "profiles": ("", "", None, "points > 5"),
    "posts": ("", "published = true", "reviewers.level ?> 0"),
}


@pytest_asyncio.fixture
async def pocketbase(tmp_path: Path) -> AsyncIterator[CorpusPocketBase]:
    async with rules_pocketbase.running(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def corpus(database_url: str) -> AsyncIterator[Corpus]:
    loaded = await load(database_url)
    yield loaded
    loaded.connection.close()


def _differing(
    corpus: Corpus, case: Mapping[str, object], shown: tuple[str, ...] | None
) -> list[tuple[Way, Answer]]:
    """Return the ways that show something else; an explicit refusal is no wrong answer."""
    answers = [(way, corpus.answer(case, way)) for way in Way]
    return [(way, answer) for way, answer in answers if not _is_same(answer, shown)]


def _is_same(answer: Answer, shown: tuple[str, ...] | None) -> bool:
    match answer:
        case Refused(error):
            return shown is None or isinstance(error, RuleUnsupportedError)
        case ids:
            return ids == shown


@pytest.mark.timeout(600)
async def test_random_rules_show_what_pocketbase_shows(
    corpus: Corpus, pocketbase: CorpusPocketBase
) -> None:
    """Constructs in all combinations give a subscriber the same rows, or the same refusal."""
    made = RandomRules(SEED)
    for _ in range(RULES):
        collection = made.pick("posts", "posts", "posts", "users", "teams", "comments")
        rule, auth, query = made.rule(collection), made.pick(*AUTHS), made.query()
        shown = await pocketbase.show(collection, rule, auth, query)
        case = {"collection": collection, "rule": rule, "auth": auth, "query": query, "headers": {}}
        assert not _differing(corpus, case, shown), (SEED, case, shown)


@pytest.mark.timeout(600)
async def test_functions_compared_with_any_literal_show_what_pocketbase_shows(
    corpus: Corpus, pocketbase: CorpusPocketBase
) -> None:
    """In rules and filters, on either side, with texts that look like numbers or nearly do.

    The servers read the clock a few milliseconds apart, so comparisons with the current time are
    evaluated a few times.
    """
    made = RandomRules(SEED)
    for _ in range(RULES):
        case = _function_case(made)
        for name in LIST_RULES:  # rows that a filter joins obey their own list rule
            await pocketbase.set_rule(name, "")
        for left in reversed(range(5 if "'now'" in str(case) else 1)):
            shown = await pocketbase.show(
                case["collection"], case["rule"], case["auth"], case["query"]
            )
            differing = _differing(corpus, case, shown)
            assert left or not differing, (SEED, case, shown)
            if not differing:
                break


@pytest.mark.timeout(600 + FUNCTIONS)
async def test_functions_compared_with_any_literal_mean_one_thing(corpus: Corpus) -> None:
    """Engine and reference agree, also in what they refuse."""
    made = RandomRules(SEED)
    for _ in range(FUNCTIONS):
        case = _function_case(made)
        now = datetime.now(UTC)
        answers = [corpus.answer(case, way, now) for way in Way]
        texts = [str(one.error) if isinstance(one, Refused) else one for one in answers]
        assert texts == texts[:1] * len(texts), (SEED, case, texts)


def _function_case(made: RandomRules) -> Case:
    collection = made.pick("posts", "posts", "posts", "users", "teams", "comments")
    is_filter = made.pick("rule", "filter") == "filter"
    text = made.function_rule(collection, is_filter=is_filter)
    return {
        "collection": collection,
        "rule": "" if is_filter else text,
        "auth": made.pick(*AUTHS),
        "query": {"filter": text} if is_filter else made.query(),
        "headers": {},
    }


@pytest.mark.timeout(600)
async def test_random_texts_are_rules_where_pocketbase_takes_them(
    corpus: Corpus, pocketbase: CorpusPocketBase
) -> None:
    """Texts at the edge of the language are accepted or refused alike, and mean the same."""
    made = RandomRules(SEED)
    for _ in range(RULES):
        text = made.near_rule()
        shown = await pocketbase.show("posts", text, "guest", {})
        case = {"collection": "posts", "rule": text, "auth": "guest", "query": {}, "headers": {}}
        assert not _differing(corpus, case, shown), (SEED, case, shown)


@pytest.mark.timeout(600)
async def test_random_filters_show_what_pocketbase_shows(
    corpus: Corpus, pocketbase: CorpusPocketBase
) -> None:
    """A filter finds what its sender may list, whatever the other collections' rules are."""
    made = RandomRules(SEED)
    random = Random(SEED)
    for _ in range(RULES):
        collection = made.pick("posts", "posts", "users", "teams", "comments")
        rules = {name: random.choice(some) for name, some in LIST_RULES.items()}
        rules[collection] = ""
        auth = made.pick(*AUTHS)
        query = {"filter": made.rule(collection, 1, is_filter=True)}
        for name, rule in rules.items():
            await pocketbase.set_rule(name, rule)
        shown = await pocketbase.show(collection, "", auth, query)
        case = {
            "collection": collection,
            "rule": "",
            "auth": auth,
            "query": query,
            "headers": {},
            "others": rules,
        }
        assert not _differing(corpus, case, shown), (SEED, case, shown)
