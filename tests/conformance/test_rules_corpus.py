"""Reference query and engine show, on a real PostgreSQL, what PocketBase was recorded to show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.columns_of_ways import columns_without_way
from tests.conformance.rules_corpus import CORPUS, Way, cases, evaluate_cases, load

REFUSED: frozenset[str] = frozenset()
"""Cases that may be refused although PocketBase decides them: none."""


FOUND = CORPUS.parent / "more-rules"
"""Cases in the corpus' form, recorded from PocketBase 0.40.6 where a difference was found."""


every_way = pytest.mark.parametrize("way", Way, ids=lambda way: way.name.lower())


@every_way
@pytest.mark.timeout(600)
async def test_what_differed_once_is_decided_as_recorded(database_url: str, way: Way) -> None:
    """Each case differed from PocketBase once, and was corrected."""
    corpus = await load(database_url)
    try:
        report = evaluate_cases(corpus, cases(FOUND), way)
    finally:
        corpus.connection.close()

    assert (report.wrong, report.refused) == ((), ())


@every_way
@pytest.mark.timeout(600)
async def test_every_recorded_case_is_decided_as_recorded(database_url: str, way: Way) -> None:
    """A record is visible to exactly the subscribers that PocketBase shows it to.

    ``PGREALTIME_RULES_CORPUS`` names another folder with a ``cases.json`` over the same data.
    """
    folder = os.environ.get("PGREALTIME_RULES_CORPUS")
    corpus = await load(database_url)
    try:
        report = evaluate_cases(corpus, cases(Path(folder) if folder else CORPUS), way)
    finally:
        corpus.connection.close()
    print(f"\nrules corpus: {report}")  # noqa: T201 (the counts are wanted even when all is well)

    assert report.wrong == ()
    assert folder is not None or set(report.refused) == REFUSED


async def test_ways_name_each_column_of_other_rows_that_the_sql_reads(database_url: str) -> None:
    """Of every rule of the corpus: a mirror isn't told of changes of a column that is forgotten."""
    corpus = await load(database_url)
    try:
        asked = [*cases(CORPUS), *cases(FOUND)]
        if os.environ.get("PGREALTIME_SLOW") != "1":  # the random ones
            asked = [case for case in asked if "random" not in case["constructs"]]
        bound = dict(corpus.specializations(asked))
    finally:
        corpus.connection.close()
    missing = {
        rule: names
        for rule, (specialization, collections) in bound.items()
        if (names := columns_without_way(specialization, collections))
    }

    assert not missing
    assert len(bound) > 400
