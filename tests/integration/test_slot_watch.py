"""How much WAL a slot may retain: warned of, then the slot is given up before a disk is full."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from pgrealtime.changelog.memory import Changelog, Gap
from pgrealtime.config.model import Config
from pgrealtime.feed.base import WantedTables
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.lsn import LSN, Cursor
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.service import slot_watch
from pgrealtime.service.streams import StreamOpener
from pgrealtime.wal import slot as slots
from tests.feed_follower import Follower
from tests.integration.test_stream_switch import OLD, Reading
from tests.own_server import OwnServer
from tests.program import Outcome, run_program
from tests.stream_reading import (
    DEADLINE_SECONDS,
    PLUGINS,
    Connection,
    Plugin,
    read_tables,
    until_true,
    writer,
)

MIB = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_watch, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(slots, "_WAIT_REPORT_SECONDS", 0.2)


@pytest.fixture
def server(server: OwnServer) -> OwnServer:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE old (id int PRIMARY KEY)")
        connection.execute("CREATE PUBLICATION pgrealtime FOR TABLE old")
    return server


@dataclass(frozen=True, slots=True)
class Room:
    """A reader as the service runs it, and what it logged."""

    read: Reading
    logged: list[MutableMapping[str, Any]]

    def said(self, event: str) -> list[MutableMapping[str, Any]]:
        return [entry for entry in self.logged if entry["event"] == event]

    async def until_said(self, event: str) -> MutableMapping[str, Any]:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not self.said(event):
                await asyncio.sleep(0.01)
        return self.said(event)[0]

    def gaps(self) -> list[str]:
        changelog = self.read.changelog
        entries = changelog.read(self.read.begun, changelog.end_cursor, 100)
        return [entry.reason for entry in entries if isinstance(entry, Gap)]

    async def until_delivered(self, connection: Connection, number: int) -> None:
        """Insert a row and wait for it; there is no gap from here on."""
        self.read.begun = self.read.changelog.end_cursor
        await connection.execute("INSERT INTO old VALUES (%s)", (number,))
        await self.read.follower.until(lambda: self.read.inserted(OLD) == [number])


@asynccontextmanager
async def reading(
    server: OwnServer, *, durable: bool, plugin: Plugin = "wal2json", limit: str = "64MiB"
) -> AsyncIterator[Room]:
    slot = {"name": "standing", "durable": durable, "allow_unlimited_wal": True}
    config = Config.model_validate(
        {
            "version": 1,
            "database": {"url": server.url},
            "replication": {"plugin": plugin, "slot": {**slot, "max_retained_wal": limit}},
        }
    )
    async with writer(server.url) as connection:
        tables = {table.name: table for table in await read_tables(connection)}
    wanted = WantedTables(tables={OLD: tables[OLD]})
    # Old entries stay in the changelog, so a durable slot is never confirmed.
    changelog = Changelog(LSN(0), max_bytes=1 << 30, max_age_seconds=1e9)
    follower = Follower(changelog, DEADLINE_SECONDS)
    intake = Intake(changelog, follower, max_size=1 << 30)
    with capture_logs() as logged:
        async with open_query_pool(config.database) as pool:
            streams = StreamOpener(config, pool)
            reader = ReplicationReader(
                partial(streams.open, wanted),
                intake,
                tables=[OLD],
                advance_slot=streams.advance_slot,
                is_durable=durable,
            )
            running = [
                asyncio.create_task(reader.run()),
                asyncio.create_task(reader.expire_periodically()),
            ]
            try:
                await follower.until(lambda: bool(follower.said))
                begun: Cursor = changelog.end_cursor
                yield Room(Reading(reader, intake, changelog, follower, begun), logged)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.wait(running)


async def write_wal(connection: Connection, segments: int) -> None:
    """Let the WAL grow by segments of 16 MiB; next to nothing is written."""
    for _ in range(segments):
        await connection.execute("SELECT pg_logical_emit_message(false, 'x', 'y'), pg_switch_wal()")


async def retained(connection: Connection) -> list[tuple[str, int]]:
    """Return each slot with the MiB that the server retains for it."""
    cursor = await connection.execute(
        "SELECT slot_name, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8 / 1048576"
        " FROM pg_replication_slots"
    )
    return [(name, size) for name, size in await cursor.fetchall()]


_ALL_IS_CONFIRMED = (
    "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn) < 1000000"
    " FROM pg_replication_slots"
)


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_durable_slot_beyond_the_limit_is_made_anew_and_the_gap_is_told(
    server: OwnServer, plugin: Plugin
) -> None:
    """Warned of once, at half; afterwards the server may remove the WAL."""
    async with (
        writer(server.url) as connection,
        reading(server, durable=True, plugin=plugin) as room,
    ):
        await room.until_delivered(connection, 1)
        await write_wal(connection, 3)
        warning = await room.until_said("slot.retained_wal_high")
        assert warning["limit"] == "replication.slot.max_retained_wal"
        assert warning["limit_bytes"] == 64 * MIB
        assert 32 * MIB <= warning["retained_bytes"] <= 64 * MIB
        # Nothing of the slot was confirmed: it isn't an open transaction that holds the WAL.
        assert warning["unconfirmed_bytes"] >= 32 * MIB
        assert not room.said("slot.given_up")

        await write_wal(connection, 3)
        given_up = await room.until_said("slot.given_up")
        assert given_up["reason"].endswith("more than replication.slot.max_retained_wal, 64.0 MiB")
        await room.read.follower.until(lambda: room.gaps() == ["slot_lost"])
        assert [(name, size < 17) for name, size in await retained(connection)] == [
            ("standing", True)
        ]
        # The WAL before the new slot is of no use to anybody now.
        await connection.execute("CHECKPOINT")
        cursor = await connection.execute(
            "SELECT count(*) FROM pg_ls_waldir() WHERE name <"
            " (SELECT pg_walfile_name(restart_lsn) FROM pg_replication_slots)"
            " AND name ~ '^[0-9A-F]{24}$'"
        )
        assert await cursor.fetchone() == (0,)
        await room.until_delivered(connection, 2)

    started = room.said("replication.started")
    assert [entry["replaced_slot"] is None for entry in started] == [True, False]
    assert started[1]["replaced_slot"].startswith("it retained ")
    assert len(room.said("slot.retained_wal_high")) == 1
    assert len(room.said("slot.given_up")) == 1


async def test_a_forgotten_transaction_costs_events_and_not_the_disk(server: OwnServer) -> None:
    """A temporary slot; a new one can be created only when that transaction ends."""
    async with (
        writer(server.url) as connection,
        reading(server, durable=False) as room,
        await psycopg.AsyncConnection.connect(server.url) as forgotten,
    ):
        await room.until_delivered(connection, 1)
        await forgotten.execute("CREATE TABLE unfinished ()")
        # The server notes that it is open, and that the slot needs what follows.
        await connection.execute("CHECKPOINT")
        for number in (2, 3):
            await write_wal(connection, 1)
            await room.until_delivered(connection, number)
            await until_true(connection, _ALL_IS_CONFIRMED)
        await write_wal(connection, 1)
        await room.until_said("slot.retained_wal_high")
        await write_wal(connection, 3)
        await room.until_said("slot.given_up")
        await room.until_said("slot.waiting")
        async with asyncio.timeout(DEADLINE_SECONDS):
            # The first reports may come before the server has begun to wait.
            while not (pids := room.said("slot.waiting")[-1]["pids"]):
                await asyncio.sleep(0.01)
        assert pids == (forgotten.info.backend_pid,)
        await write_wal(connection, 1)
        assert all(size < 40 for _, size in await retained(connection))
        await forgotten.rollback()
        await room.read.follower.until(lambda: room.gaps() == ["slot_lost"])
        await room.until_delivered(connection, 4)

    # What was confirmed follows the WAL: the warning says that a transaction holds it.
    (warning,) = room.said("slot.retained_wal_high")
    assert warning["unconfirmed_bytes"] < warning["retained_bytes"] / 2


def check(server: OwnServer, folder: Path) -> Outcome:
    file = folder / "pgrealtime.yaml"
    slot = "{name: standing, durable: true, allow_unlimited_wal: true, max_retained_wal: 64MiB}"
    file.write_text(
        f"database: {{url: {server.url}}}\n"
        f"replication: {{slot: {slot}}}\n"
        "collections: {old: {table: old, list_rule: ''}}\n"
    )
    outcome = run_program("check", "-c", str(file))
    assert outcome.code == 0
    return outcome


async def test_a_durable_slot_is_given_up_at_the_start_too(
    server: OwnServer, tmp_path: Path
) -> None:
    """The process was away for long. ``check`` says so before, and changes nothing."""
    async with writer(server.url) as connection:
        async with reading(server, durable=True) as room:
            await room.until_delivered(connection, 1)
        await until_true(connection, "SELECT NOT active FROM pg_replication_slots")
        await connection.execute("INSERT INTO old VALUES (2)")
        await write_wal(connection, 6)
        said = check(server, tmp_path).err
        assert 'replication.slot: the service will drop slot "standing" and create it anew' in said
        assert re.search(r"because it retained 9\d\.\d MiB of WAL", said)
        async with reading(server, durable=True, limit="0") as unlimited:
            assert not unlimited.said("replication.started")[0]["replaced_slot"]
        await until_true(connection, "SELECT NOT active FROM pg_replication_slots")
        async with reading(server, durable=True) as room:
            (started,) = room.said("replication.started")
            assert started["replaced_slot"].startswith("it retained ")
            await room.until_delivered(connection, 3)
        await until_true(connection, "SELECT NOT active FROM pg_replication_slots")
        assert check(server, tmp_path).err == ""
        assert [(name, size < 17) for name, size in await retained(connection)] == [
            ("standing", True)
        ]


async def test_what_the_server_is_about_to_remove_is_logged_once(server: OwnServer) -> None:
    """Its own limit is lower: warned of at half of that, then at what the server says."""
    # The WAL is removed by checkpoints; none comes before the test's own.
    server.configure(max_slot_wal_keep_size="48MB", max_wal_size="1GB", checkpoint_timeout="1h")
    async with (
        writer(server.url) as connection,
        reading(server, durable=True, limit="1GiB") as room,
    ):
        await room.until_delivered(connection, 1)
        await write_wal(connection, 2)
        warning = await room.until_said("slot.retained_wal_high")
        assert (warning["limit"], warning["limit_bytes"]) == ("max_slot_wal_keep_size", 48 * MIB)
        await write_wal(connection, 4)
        await room.until_said("slot.wal_unreserved")
        assert not room.gaps()
        while not room.gaps():
            await connection.execute("CHECKPOINT")
            await write_wal(connection, 1)
        await room.until_delivered(connection, 2)

    assert len(room.said("slot.wal_unreserved")) == 1
    assert room.said("replication.started")[1]["replaced_slot"] == (
        "the server invalidated it (wal_removed)"
    )
