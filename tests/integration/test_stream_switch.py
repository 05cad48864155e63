"""The set of streamed tables changes at some commit, and no change is missed or repeated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import psycopg
import pytest

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Table
from pgrealtime.changelog.memory import Changelog, Gap
from pgrealtime.changes import Insert, TableName, Transaction
from pgrealtime.config.model import ReplicationConfig
from pgrealtime.errors import SetupError
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.lsn import LSN, Cursor, parse_lsn
from pgrealtime.wal.stream import WalStream, open_stream
from tests.feed_follower import Follower
from tests.stream_reading import DEADLINE_SECONDS, Connection, writer

OLD = TableName("public", "old")
NEW = TableName("public", "new")
SCHEMA = "CREATE TABLE old (id int PRIMARY KEY); CREATE TABLE new (id int PRIMARY KEY)"


@dataclass
class Reading:
    reader: ReplicationReader
    intake: Intake
    changelog: Changelog
    follower: Follower
    begun: Cursor

    def inserted(self, table: TableName) -> list[int]:
        """Return the ids of a table in the changelog, in order."""
        entries = self.changelog.read(self.begun, self.changelog.end_cursor, 1 << 30)
        assert not any(isinstance(entry, Gap) for entry in entries)
        return [
            int(change.new["id"] or "")
            for entry in entries
            if isinstance(entry, Transaction)
            for change in entry.changes
            if isinstance(change, Insert) and change.table == table
        ]


async def never() -> None:
    raise AssertionError


Opening = Callable[[Sequence[Table]], Callable[[], AbstractAsyncContextManager[WalStream]]]


@asynccontextmanager
async def reading(opening: Opening, tables: Sequence[Table]) -> AsyncIterator[Reading]:
    changelog = Changelog(LSN(0), max_bytes=1 << 30, max_age_seconds=1e9)
    follower = Follower(changelog, DEADLINE_SECONDS)
    intake = Intake(changelog, follower, max_size=1 << 30)
    names = [table.name for table in tables]
    reader = ReplicationReader(opening(tables), intake, tables=names, advance_slot=never)
    running = asyncio.create_task(reader.run())
    try:
        await follower.until(lambda: bool(follower.said))
        yield Reading(reader, intake, changelog, follower, changelog.end_cursor)
    finally:
        running.cancel()
        await asyncio.wait([running])


def opening_at(url: str) -> Opening:
    config = ReplicationConfig(plugin="wal2json")
    return lambda tables: lambda: open_stream(url, config, tables, max_transaction_bytes=1 << 30)


async def _tables(connection: Connection) -> tuple[Table, Table]:
    await connection.execute(SCHEMA)
    catalog = await read_catalog(connection, names=[OLD, NEW])
    return catalog.tables[OLD], catalog.tables[NEW]


async def test_nothing_is_missed_or_repeated_over_twenty_switches_under_load(
    database_url: str,
) -> None:
    """Four writers commit throughout; each switch adds or removes the second table."""
    wanted = asyncio.Event()
    counts = [0, 0, 0, 0]

    async def write(place: int) -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as own:
            while not wanted.is_set():
                async with own.transaction():
                    row = {"id": place + 4 * counts[place]}
                    await own.execute("INSERT INTO old VALUES (%(id)s)", row)
                    await own.execute("INSERT INTO new VALUES (%(id)s)", row)
                counts[place] += 1

    async with writer(database_url) as connection:
        old, new = await _tables(connection)
        opening = opening_at(database_url)
        async with reading(opening, [old]) as room, asyncio.TaskGroup() as group:
            for place in range(4):
                group.create_task(write(place))
            for number in range(20):
                tables = [old] if number % 2 else [old, new]
                await room.reader.switch(opening(tables), [table.name for table in tables])
            wanted.set()
            total = None
            while total is None or total != sum(counts):
                total = sum(counts)
                await asyncio.sleep(0.05)  # until the writers have seen that they are done
            await room.follower.until(lambda: len(room.inserted(OLD)) >= total)

        received, of_new = room.inserted(OLD), room.inserted(NEW)

    assert sorted(received) == sorted(p + 4 * n for p in range(4) for n in range(counts[p]))
    assert 0 < len(of_new) < len(received)
    assert len(of_new) == len(set(of_new))
    assert [word.split()[0] for word in room.follower.said] == ["started"] + ["continued"] * 20


async def test_a_commit_after_the_switch_includes_the_new_table(database_url: str) -> None:
    """The new table is streamed when the call returns, not some time later."""
    async with writer(database_url) as connection:
        old, new = await _tables(connection)
        opening = opening_at(database_url)
        async with reading(opening, [old]) as room:
            await connection.execute("INSERT INTO new VALUES (1)")
            await room.reader.switch(opening([old, new]), [OLD, NEW])
            await connection.execute("INSERT INTO new VALUES (2)")
            await connection.execute("INSERT INTO old VALUES (3)")
            await room.follower.until(lambda: room.inserted(OLD) == [3])
            assert room.inserted(NEW) == [2]


async def test_a_quiet_database_does_not_hold_up_the_switch(database_url: str) -> None:
    """The earlier stream reaches its end without another commit."""
    async with writer(database_url) as connection:
        old, new = await _tables(connection)
        opening = opening_at(database_url)
        async with reading(opening, [old]) as room:
            began = time.monotonic()
            await room.reader.switch(opening([old, new]), [OLD, NEW])
            assert time.monotonic() - began < 5


async def test_after_a_switch_it_is_known_at_once_how_far_the_stream_has_come(
    database_url: str,
) -> None:
    """The proof for columns that the WAL left out needs that position.

    No commit has to come first.
    """
    async with writer(database_url) as connection:
        old, new = await _tables(connection)
        opening = opening_at(database_url)
        async with reading(opening, [old]) as room:
            await connection.execute("INSERT INTO old VALUES (1)")
            await room.follower.until(lambda: room.inserted(OLD) == [1])
            await room.reader.switch(opening([old, new]), [OLD, NEW])
            cursor = await connection.execute("SELECT pg_current_wal_insert_lsn()::text")
            row = await cursor.fetchone()
            assert row is not None
            assert await room.reader.wait_for_changelog(parse_lsn(row[0]))


async def test_a_stream_that_cannot_be_opened_leaves_the_one_of_now(database_url: str) -> None:
    async with writer(database_url) as connection:
        old, _ = await _tables(connection)
        opening = opening_at(database_url)
        await connection.execute("ALTER TABLE new REPLICA IDENTITY NOTHING")
        catalog = await read_catalog(connection, names=[NEW])
        async with reading(opening, [old]) as room:
            with pytest.raises(SetupError):
                await room.reader.switch(opening([old, catalog.tables[NEW]]), [OLD, NEW])
            await connection.execute("INSERT INTO old VALUES (1)")
            await room.follower.until(lambda: room.inserted(OLD) == [1])
            assert [word.split()[0] for word in room.follower.said] == ["started"]


async def test_a_stream_that_breaks_during_the_switch_is_a_gap(database_url: str) -> None:
    """The requested tables are streamed in any case, and the call doesn't wait for ever."""
    async with writer(database_url) as connection:
        old, new = await _tables(connection)
        opening = opening_at(database_url)
        async with reading(opening, [old]) as room:
            assert room.reader.stream is not None
            room.reader.stream.stop()
            await room.reader.switch(opening([old, new]), [OLD, NEW])
            await room.follower.until(lambda: len(room.follower.said) == 3)
            room.begun = room.changelog.end_cursor
            await connection.execute("INSERT INTO new VALUES (1)")
            await room.follower.until(lambda: room.inserted(NEW) == [1])
            first, *others = room.follower.said
            assert [word.split()[0] for word in others] == ["lost", "started"]
            assert others[-1].split()[1] != first.split()[1]
