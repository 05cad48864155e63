"""Lists and records are answered as PocketBase was recorded to answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conformance.records_corpus import (
    CORPUS,
    Case,
    Report,
    by_rules,
    load,
    read,
    replay,
    replay_sdk,
    serving,
)

EXCUSES = {
    "system": "PocketBase's own collections, which this program doesn't have",
    "page:overflow": "PocketBase's offset wraps around, and shows page 1 again",
    "json-text": "jsonb has forgotten the order of a container's members",
    "order:insertion": "PostgreSQL has no order of insertion",
    "sort-0529": "sparse is a view in PocketBase and a table here, which has a default order",
    "sort-0701": "PocketBase's plan reads another joined row first",
}
"""Why cases may differ, by tag or name."""
MOST_EXCUSED = 0.01
"""Of all cases."""


@pytest.mark.timeout(900)
async def test_every_recorded_request_is_answered_as_recorded(database_url: str) -> None:
    """Status, headers and body; calls of the SDK by what it sends and returns.

    ``PGREALTIME_RECORDS_CORPUS`` names another folder; a file that it lacks is taken from ours.
    """
    folder = Path(os.environ.get("PGREALTIME_RECORDS_CORPUS") or CORPUS)
    cases = read(folder, "cases.json")
    load(database_url)
    total = Report()
    for name, of_set in by_rules(cases).items():
        rules = read(folder, "rules.json")[name]
        async with serving(database_url, folder, rules) as address:
            total.add(await replay(address, _with("request", of_set), EXCUSES))
            if calls := _with("sdk", of_set):
                total.add(await replay_sdk(address, calls, EXCUSES))
    print(f"\nrecords corpus: {total}")  # noqa: T201 (the counts are wanted even when all is well)

    assert total.wrong == []
    assert len(total.right) + len(total.excused) == len(cases)
    assert len(total.excused) <= MOST_EXCUSED * len(cases)


def _with(kind: str, cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if kind in case]
