"""Arbitrary texts as rules and filters: each is refused with a position in the text, or decided.

They are mutated from the rules corpus and generated from nothing. Each run takes a fresh seed,
which a failure names; ``PGREALTIME_FUZZ_SEED`` repeats it and ``PGREALTIME_FUZZ_SECONDS`` extends
the run.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from random import Random

import psycopg
import pytest
from psycopg import errors

from pgrealtime.auth.principal import Superuser
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.resolve import resolve_filter
from pgrealtime.rules.sql.reference import (
    ReferenceQuery,
    auth_collection_of,
    check_rule,
    reference_query,
)
from tests.conformance.rules_corpus import CORPUS, Case, Corpus, Refused, Way, cases, expected, load

SECONDS = float(os.environ.get("PGREALTIME_FUZZ_SECONDS", "4"))
SEED = int(os.environ.get("PGREALTIME_FUZZ_SEED", secrets.randbelow(1 << 32)))
MARK = "zqmark"
"""A text that is nowhere in the schema: if SQL contains it, a value was interpolated."""
SLOWEST_SECONDS = 1.0
LONGEST = 3500
"""Characters of a filter, and of a rule that must be processed in bounded time."""
LEAST = 10
"""Texts of each outcome that a run must have had to prove anything."""
_KINDS = ("refused", "decided")

_TOKENS = (
    *("&&", "||", "(", ")", "=", "!=", "~", "!~", ">", ">=", "<", "<=", "?=", "?!=", "?~", "?>="),
    *("''", '""', "0", "-1", "1e999", "-1e999", "1e-999", "0x10", "1_000", "NaN", "9" * 400),
    *("true", "false", "null", "@now", "@todayStart", "@request.auth.id", "@request.query.q"),
    *("@request.body.x:isset", "@request.headers.x_y", "@collection.comments.id", ":each"),
    *(":length", ":lower", ":excerpt", "geoDistance(1,2,3,4)", "strftime('%Y', created)"),
    *(
        "geoDistance(",
        "strftime(",
        "id",
        "id.id",
        "x_via_y",
        "//",
        "// c\n",
        "\\",
        "%",
        "%s",
        "%(p0)s",
    ),
    *("\0", "\ud800", "\udfff", "\u00a0", "\u2003", "\u2028", "\ufeff", "\u200b", "\x85", "\x1c"),
    *("é", "İ", "\U0001f600", "\t", "\n", "\r\n", "$1", "$$", ";", "--", "/*", "'", '"', "`", "."),
    *(f"'{MARK}'", f'"{MARK}\\""', f"'{MARK}%'", f"{MARK}", f"@{MARK}", f"'{MARK}' = '{MARK}'"),
    f"'{MARK}; DROP TABLE x; --'",
)


def texts(random: Random, known: list[str]) -> Iterator[str]:
    """Yield texts without end."""
    while True:
        match random.randrange(12):
            case 0:
                yield "".join(chr(random.randrange(256)) for _ in range(random.randrange(80)))
            case 1:
                yield random.randbytes(random.randrange(80)).decode(errors="surrogateescape")
            case 2:
                yield " ".join(random.choices(_TOKENS, k=random.randrange(1, 12)))
            case 3:
                depth = random.choice((3, 50, 400, 3000))
                end = random.choice((depth, depth - 1, depth + 1))
                yield "(" * depth + random.choice(known) + ")" * end
            case 4:
                joined = random.choice(("&&", "||", "&& (", ") ||", " "))
                yield joined.join(random.choices(known, k=random.choice((2, 5, 30, 220))))
            case 5:
                yield f"id = '{random.choice(_TOKENS) * random.choice((1, 50, 5000))}'"
            case _:
                yield _mutated(random, random.choice(known), random.choice(known))


def _mutated(random: Random, text: str, other: str) -> str:
    for _ in range(random.randrange(1, 5)):
        begin, end = sorted(random.choices(range(len(text) + 1), k=2))
        match random.randrange(7):
            case 0:
                text = text[:begin] + text[end:]
            case 1:
                text = text[:begin] + random.choice(_TOKENS) + text[begin:]
            case 2:
                text = text[:begin] + random.choice(_TOKENS) + text[end:]
            case 3:
                text = text[:end] + text[begin:]
            case 4:
                text = text[:begin] + other[: random.randrange(len(other) + 1)]
            case 5:
                text = f"({text}) {random.choice(('&&', '||'))} ({other})"
            case _:
                text = text.replace(random.choice("=~.'\"&|() "), random.choice(_TOKENS), 1)
    return text


def _fed(case: Case, text: str, *, is_filter: bool) -> Case:
    query = dict(case["query"])
    if is_filter:
        query["filter"] = text
    return {**case, "rule": case["rule"] if is_filter else text, "query": query}


def _asked(corpus: Corpus, case: Case, way: Way) -> object:
    """Return the answer, or the kind of value that PostgreSQL raised an error for."""
    try:
        answer = corpus.answer(case, way)
    except (errors.DataError, errors.QueryCanceled) as error:
        return type(error)
    return "refused" if isinstance(answer, Refused) else answer


@pytest.mark.timeout(SECONDS + 60)
async def test_any_text_is_refused_with_a_place_or_decided(database_url: str) -> None:
    """In bounded time, by SQL that PostgreSQL accepts and that contains nothing of the text."""
    corpus = await load(database_url)
    random = Random(SEED)
    all_cases = [case for case in cases(CORPUS) if expected(case) is not None]
    known = [t for c in all_cases for t in (c["rule"], c["query"].get("filter")) if t]
    deadline = time.monotonic() + SECONDS
    outcomes: Counter[str] = Counter()
    with corpus.connection:
        corpus.connection.execute("SET statement_timeout = '500ms'")
        for text in texts(random, known):
            case, is_filter = random.choice(all_cases), random.random() < 0.5
            said = f"PGREALTIME_FUZZ_SEED={SEED}: {case['collection']}, {case['auth']}: {text!r}"
            fed = _fed(case, text, is_filter=is_filter)
            outcomes[_look(corpus, fed, text, said[:3000], is_filter=is_filter)] += 1
            # On a slow machine it takes longer, not fewer texts; pytest's timeout is the bound.
            if time.monotonic() > deadline and min(outcomes[kind] for kind in _KINDS) > LEAST:
                break
    print(f"\nfuzz: seed {SEED}, {dict(outcomes)}")  # noqa: T201 (what a run was worth)

    assert all(outcomes[kind] > LEAST for kind in _KINDS)


def _look(corpus: Corpus, case: Case, text: str, said: str, *, is_filter: bool) -> str:
    """Process the text with all that reads rules; return the outcome."""
    made, spent = _timed(corpus, case, text, is_filter=is_filter)
    if len(text) <= LONGEST and spent >= SLOWEST_SECONDS:
        # Measured again: a full garbage collection takes as long, whatever the text.
        made, spent = _timed(corpus, case, text, is_filter=is_filter)
        assert spent < SLOWEST_SECONDS, f"{spent:.1f} s: {said}"
    if isinstance(made, RuleError):
        assert 0 <= made.start <= made.end <= len(text), f"{made.start}-{made.end}: {said}"
        return "refused"
    if isinstance(made, ReferenceQuery):
        assert MARK not in made.sql, said
    try:
        asked = [_asked(corpus, case, way) for way in (Way.REFERENCE, Way.ENGINE)]
    except psycopg.Error as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{said}") from error
    if any(isinstance(one, type) for one in asked):
        return "not a value"
    assert asked[0] == asked[1], f"{asked}\n{said}"
    return "decided" if isinstance(made, ReferenceQuery) else "denied"


def _timed(
    corpus: Corpus, case: Case, text: str, *, is_filter: bool
) -> tuple[AdmitAll | DenyAll | ReferenceQuery | RuleError, float]:
    began = time.process_time()
    made = _made(corpus, case, text, is_filter=is_filter)
    return made, time.process_time() - began


def _made(
    corpus: Corpus, case: Case, text: str, *, is_filter: bool
) -> AdmitAll | DenyAll | ReferenceQuery | RuleError:
    collection = corpus.collections[case["collection"]]
    request = corpus._request(case)
    try:
        if is_filter:
            auth = auth_collection_of(corpus.collections, request)
            is_superuser = isinstance(request.principal, Superuser)
            resolve_filter(text, corpus.collections, collection, auth, is_superuser=is_superuser)
        else:
            check_rule(corpus.collections, collection, text)
    except RuleError as error:
        return error
    RuleCompiler(corpus.collections).bind_caller(collection, case["rule"], request)
    return reference_query(corpus.collections, collection, case["rule"], request)
