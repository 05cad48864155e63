"""What workers together want of the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace

import pytest

from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.changes import TableName
from pgrealtime.errors import PgRealtimeError, StreamInterruptedError
from pgrealtime.feed.base import FeedStatus, WantedTables
from pgrealtime.workers import shared_tables
from pgrealtime.workers.shared_tables import GapRequests, SharedTables
from tests.unit.hub.harness import COLLECTIONS

TABLES = {one.table.name: one.table for one in COLLECTIONS.values()}
POSTS, NOTES, PEOPLE = (COLLECTIONS[name].table.name for name in ("posts", "notes", "people"))
KEYS = {POSTS: ("id",)}


class RecordingFeed:
    """Keeps what it is asked for."""

    status = FeedStatus(is_connected=True, changes_received=0, breaks={})

    def __init__(self) -> None:
        self.wanted: list[WantedTables] = []
        self.gaps: list[tuple[str, frozenset[TableName]]] = []
        self.fails = False

    async def run(self) -> None:
        raise AssertionError

    async def catch_up(self) -> None:
        raise AssertionError

    async def wait_for_changelog(self, lsn: int) -> bool:
        raise AssertionError(lsn)

    async def want(self, wanted: WantedTables) -> None:
        if self.fails:
            raise StreamInterruptedError("no")
        self.wanted.append(wanted)

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        self.gaps.append((reason, tables))

    async def check_publication(self) -> None:
        raise AssertionError


class Shared:
    """The tables of a catalogue that tests change."""

    def __init__(self) -> None:
        self.feed = RecordingFeed()
        self.tables: dict[TableName, Table] = dict(TABLES)
        self.wanted = SharedTables(
            self.feed, self.read, WantedTables(tables={POSTS: TABLES[POSTS]}, record_keys=KEYS)
        )

    async def read(self, names: Collection[TableName]) -> Catalog:
        found = {name: table for name, table in self.tables.items() if name in names}
        return Catalog(tables=found, server_version=170_000, schemas=("public",))

    async def want(self, worker: int, *names: TableName) -> bool:
        return await self.wanted.want(worker, names, {})

    @property
    def streamed(self) -> list[set[TableName]]:
        return [{*one.tables} for one in self.feed.wanted]


async def test_the_stream_is_switched_once_for_all() -> None:
    """A reload is applied by one worker after the other."""
    shared = Shared()
    assert not await shared.want(1, POSTS)
    assert not await shared.want(2, POSTS)
    assert await shared.want(1, POSTS, NOTES)
    assert not await shared.want(2, POSTS, NOTES)
    assert shared.streamed == [{POSTS, NOTES}]
    assert shared.feed.wanted[-1].record_keys == KEYS


async def test_a_table_is_streamed_while_anybody_wants_it() -> None:
    shared = Shared()
    for worker in (1, 2):
        await shared.want(worker, POSTS, NOTES)
    assert not await shared.want(1, NOTES)
    assert await shared.want(2, NOTES)
    assert shared.streamed == [{POSTS, NOTES}, {NOTES}]
    await shared.want(1, PEOPLE)
    shared.wanted.forget(1)
    assert await shared.want(2, NOTES)
    assert shared.streamed[2:] == [{NOTES, PEOPLE}, {NOTES}]


async def test_a_changed_table_is_read_anew() -> None:
    """Who asks first has it switched; the others find it done."""
    shared = Shared()
    await shared.want(1, POSTS)
    shared.tables[POSTS] = replace(TABLES[POSTS], oid=4711)
    assert await shared.want(1, POSTS)
    assert not await shared.want(2, POSTS)
    assert shared.feed.wanted[-1].tables[POSTS].oid == 4711


async def test_a_table_that_is_gone_is_an_error_for_who_wants_it() -> None:
    """Not for the others, who will find out by themselves."""
    shared = Shared()
    await shared.want(1, POSTS, NOTES)
    del shared.tables[NOTES]
    with pytest.raises(PgRealtimeError, match="notes"):
        await shared.want(2, NOTES)
    assert await shared.want(2, POSTS)
    assert shared.streamed[-1] == {POSTS}


async def test_a_failed_switch_changes_nothing() -> None:
    shared = Shared()
    await shared.want(1, POSTS)
    shared.feed.fails = True
    with pytest.raises(StreamInterruptedError):
        await shared.want(1, POSTS, NOTES)
    shared.feed.fails = False
    assert not await shared.want(2, POSTS)


async def test_workers_that_ask_for_the_same_gap_get_one() -> None:
    """When the last one has asked: a worker that isn't so far doesn't know the table yet."""
    feed = RecordingFeed()
    gaps, tables = GapRequests(feed, lambda: 2), frozenset({POSTS})
    gaps.ask(1, "schema", tables)
    gaps.ask(1, "schema", tables)
    assert not feed.gaps
    gaps.ask(2, "schema", tables)
    assert feed.gaps == [("schema", tables)]
    gaps.ask(1, "schema", frozenset({NOTES}))
    gaps.ask(2, "schema", tables)
    assert len(feed.gaps) == 1


async def test_a_gap_waits_for_no_worker_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_tables, "_GAP_SECONDS", 0.01)
    feed = RecordingFeed()
    gaps = GapRequests(feed, lambda: 2)
    gaps.ask(1, "schema", frozenset({POSTS}))
    async with asyncio.timeout(5):
        while not feed.gaps:
            await asyncio.sleep(0.005)
    assert feed.gaps == [("schema", frozenset({POSTS}))]
