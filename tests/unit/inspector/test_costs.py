"""A look costs the events little, and nobody pays for looks that nobody takes."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import FrameType
from typing import cast

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import Config
from pgrealtime.inspector.answers import Changes, Connections, Receivers, States, Topics
from pgrealtime.inspector.inspector import Inspector
from pgrealtime.postgres.pool import QueryPool
from tests.loop_work import measuring_work
from tests.topics import topic
from tests.unit.hub.harness import COLLECTIONS, HubHarness, insert, open_harness

MANY = 10_000 if os.environ.get("PGREALTIME_SLOW") else 2_000


NO_POOL = cast(QueryPool, None)  # asked by explanations only


def inspector_of(harness: HubHarness) -> Inspector:
    return Inspector(
        harness.hub,
        harness.changelog,
        harness.database,
        NO_POOL,
        config=Config,
        problems=tuple,
    )


def caller(number: int) -> Caller:
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id=f"p{number}")
    return Caller(record)


@asynccontextmanager
async def many_connections(collections: Collections) -> AsyncIterator[HubHarness]:
    """Each with a topic that all have, one of a record and one with a filter of its own value."""
    async with open_harness(
        collections=collections, max_connections=MANY + 1, max_size=1 << 30
    ) as harness:
        for number in range(50):
            harness.commit(*(insert(f"r{number}x{n}") for n in range(100)))
        await harness.until_delivered()
        for number in range(MANY):
            connection, sink = harness.connect(address=f"10.{number >> 8}.{number & 255}.1")
            mine = topic("posts/*", filter=f"title = 'value {number}'")
            topics = ("posts/*", f"notes/n{number}", mine)
            await harness.subscribe(connection, *topics, caller=caller(number))
            sink.forget()
        await harness.until_caught_up()
        yield harness


QUERIES: Mapping[str, Mapping[str, str]] = {
    "states": {},
    "connections": {"limit": "500"},
    "connections found": {"search": "notes/n1999", "limit": "100"},
    "topics": {},
    "changes": {"limit": "500"},
    "changes found": {"search": "nothing like it"},
    "receivers": {"limit": "500"},
    "collections": {},
    "sql": {"collection": "posts"},
}


@pytest.mark.timeout(600)
async def test_a_look_with_many_connections_holds_up_no_event(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measured in processor time; written out with PGREALTIME_SLOW."""
    told = {}
    async with many_connections(COLLECTIONS) as harness:
        inspector = inspector_of(harness)
        newest = await inspector.look("changes", {"limit": "1"})
        assert isinstance(newest, Changes)
        change = {"lsn": newest.rows[0].lsn, "ordinal": str(newest.rows[0].ordinal)}
        for name, query in QUERIES.items():
            view = name.split()[0]
            asked = {**query, **change} if view == "receivers" else query
            with measuring_work() as pieces:
                task = asyncio.create_task(inspector.look(view, asked))
                told[name] = await task
            if MANY > 2000:
                with capsys.disabled():
                    sys.stdout.write(
                        f"\n{name:18} {max(pieces):.4f} s in a piece, {sum(pieces):.3f} s in all"
                    )
            assert max(pieces) < 0.05, name
    states, everyone, found = told["states"], told["connections"], told["connections found"]
    assert isinstance(states, States)
    assert states.by_state == {"live": MANY}
    assert isinstance(everyone, Connections)
    assert (everyone.total, everyone.matching, len(everyone.rows)) == (MANY, MANY, 500)
    assert isinstance(found, Connections)
    assert found.rows[0].caller in {f"people/p{n}" for n in range(1999, 19999)}
    topics, receivers = told["topics"], told["receivers"]
    assert isinstance(topics, Topics)
    assert [(row.subscriptions, row.groups, row.found_by) for row in topics.rows] == [
        (MANY, 1, "everyone"),
        (MANY, MANY, "record"),
        (MANY, MANY, "index"),
    ]
    assert isinstance(receivers, Receivers)
    assert (receivers.subscriptions, len(receivers.rows)) == (MANY, 500)


async def test_while_nobody_looks_no_line_of_it_runs() -> None:
    """Events are delivered as if there were no page."""
    called: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _arg: object) -> None:
        if event == "call":
            called[str(frame.f_globals.get("__name__"))] += 1

    async with open_harness() as harness:
        inspector = inspector_of(harness)
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        tasks = len(asyncio.all_tasks())
        sys.setprofile(note)
        threading.setprofile(note)
        try:
            for number in range(20):
                harness.commit(insert(f"r{number}"))
            await sink.wait_for(21)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        assert len(asyncio.all_tasks()) == tasks
        assert called["pgrealtime.hub.dispatcher"] > 20
        assert [name for name in called if name.startswith("pgrealtime.inspector")] == []
        assert isinstance(await inspector.look("states", {}), States)
