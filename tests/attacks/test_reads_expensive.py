"""The most expensive reads that a guest may ask for delay nothing else, and fill no memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import product

import pytest

from tests.attacks.reading import reading
from tests.bench.machine import resident_kilobytes

SCHEMA = """
CREATE TABLE a (id text PRIMARY KEY, n int NOT NULL, bs text[] NOT NULL, c text,
                created timestamptz NOT NULL DEFAULT now());
CREATE TABLE b (id text PRIMARY KEY, n int NOT NULL, ays text[] NOT NULL, a text);
INSERT INTO a (id, n, bs, c) SELECT 'a' || i, i, ARRAY(
  SELECT 'b' || (i * 7 + k * 13) % 1000 FROM generate_series(1, 20) k), 'b' || i
  FROM generate_series(0, 999) i;
INSERT INTO b SELECT 'b' || i, i, ARRAY(
  SELECT 'a' || (i * 11 + k * 17) % 1000 FROM generate_series(1, 20) k), 'a' || i % 3
  FROM generate_series(0, 999) i;
"""
COLLECTIONS = {
    "a": {
        "table": "a",
        "list_rule": "",
        "view_rule": "",
        "relations": {"bs": {"collection": "b"}, "c": {"collection": "b"}},
    },
    "b": {
        "table": "b",
        "list_rule": "",
        "view_rule": "",
        "relations": {"ays": {"collection": "a"}, "a": {"collection": "a"}},
    },
}
MAX_PAUSE_SECONDS = 0.8
"""Of the event loop in one piece, on a machine with other work; it is some hundredths alone."""


@dataclass(slots=True)
class Pauses:
    """How long the event loop ran nothing else."""

    seconds: list[float] = field(default_factory=list)


@asynccontextmanager
async def watching() -> AsyncIterator[Pauses]:
    """Measure the pauses of the loop while the context is open."""
    pauses = Pauses()

    async def watch() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            pauses.seconds.append(time.monotonic() - began)

    task = asyncio.create_task(watch())
    try:
        yield pauses
    finally:
        task.cancel()


def _joined(text: str, join: str) -> str:
    return join.join(text.replace("N", str(n)) for n in range(190))[:3400].rpartition(join)[0]


STEPS = (("bs", "b_via_a", "c"), ("ays", "a", "a_via_c", "a_via_bs"))
PATHS = product(*STEPS, *STEPS)
READS = {
    "expand a dense graph": ({"expand": "bs.ays.bs.ays.bs.ays", "perPage": "1000"}, 400),
    "expand many paths": ({"expand": ",".join(map(".".join, PATHS)), "perPage": "1000"}, 400),
    "dates": ({"filter": _joined("created > 'N'", "||")}, 200),
    "json texts": ({"filter": _joined("bs.ays.bs.ays.bs.ays.n?!=N", "&&")}, 200),
    "sort by many": ({"sort": ",".join(["bs.ays.bs.ays.n"] * 8)}, 400),
    "fields": ({"fields": ",".join(f"f{n}" for n in range(4000)), "perPage": "1000"}, 200),
}


@pytest.mark.parametrize("name", READS)
async def test_no_read_holds_the_event_loop(database_url: str, name: str) -> None:
    """Expanding many paths did for 18 seconds, and took a gigabyte."""
    query, expected = READS[name]
    async with reading(database_url, SCHEMA, COLLECTIONS) as reader:
        await reader.ids("a", perPage="1000", expand="c")
        async with watching() as pauses:
            status, _ = await reader.get("a/records", **query)

    assert status == expected
    assert max(pauses.seconds) < MAX_PAUSE_SECONDS


async def test_rows_that_are_much_larger_than_what_is_shown_of_them_fill_no_memory(
    database_url: str,
) -> None:
    """A thousand megabytes of rows are given up after the first 64, whatever ``fields`` says."""
    schema = """CREATE TABLE pages (id text PRIMARY KEY, html text NOT NULL);
    INSERT INTO pages SELECT i, repeat('x', 1000000) FROM generate_series(1, 1000) i"""
    collections = {"pages": {"table": "pages", "list_rule": ""}}
    async with reading(database_url, schema, collections) as reader:
        await reader.ids("pages", perPage="1")
        before, highest = resident_kilobytes(os.getpid()), 0
        listing = asyncio.create_task(reader.get("pages/records", perPage="1000", fields="id"))
        while not listing.done():
            highest = max(highest, resident_kilobytes(os.getpid()))
            await asyncio.sleep(0.002)
        status, _ = await listing
        assert await reader.ids("pages", perPage="60", fields="id", skipTotal="1")

    assert status == 400
    assert highest - before < 250_000
