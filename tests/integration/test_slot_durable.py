"""A durable slot: what it retains, when it advances, and what is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import yaml

from pgrealtime.catalog.model import Table
from pgrealtime.changelog.memory import Changelog, Gap
from pgrealtime.changes import TableName
from pgrealtime.config.model import ReplicationConfig
from pgrealtime.errors import (
    PgRealtimeError,
    SetupError,
    SlotBusyError,
    StreamInterruptedError,
)
from pgrealtime.feed import reader as feed_reader
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import OpenStream, ReplicationReader
from pgrealtime.lsn import LSN, parse_lsn
from pgrealtime.wal.publication import publication_sql
from pgrealtime.wal.slot_status import advance_slot, end_walsender
from pgrealtime.wal.stream import WalStream, dry_run_stream, open_stream
from tests.feed_follower import Follower
from tests.integration.test_stream_switch import NEW, OLD, Reading
from tests.own_server import OwnServer, own_server
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

both = pytest.mark.parametrize("plugin", PLUGINS)


def durable(name: str = "", *, plugin: str = "wal2json", **more: object) -> ReplicationConfig:
    slot = {
        "name": name or f"pgrealtime_{uuid4().hex[:8]}",
        "durable": True,
        "allow_unlimited_wal": True,
        **more,
    }
    return ReplicationConfig.model_validate({"plugin": plugin, "slot": slot})


async def prepared(connection: Connection) -> None:
    await connection.execute(
        "CREATE TABLE old (id int PRIMARY KEY); CREATE TABLE new (id int PRIMARY KEY);"
        "CREATE TABLE others (id int); ALTER TABLE others REPLICA IDENTITY FULL"
    )


async def confirmed(connection: Connection, config: ReplicationConfig) -> LSN:
    cursor = await connection.execute(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s",
        (config.slot.name,),
    )
    row = await cursor.fetchone()
    assert row is not None
    return parse_lsn(row[0])


@asynccontextmanager
async def reading(
    url: str, config: ReplicationConfig, connection: Connection, *, max_age: float = 1e9
) -> AsyncIterator[Reading]:
    """Read the table ``old`` as a process does."""
    async with reading_of(url, config, await old(connection), max_age=max_age) as room:
        yield room


async def old(connection: Connection) -> list[Table]:
    return [table for table in await read_tables(connection) if table.name == OLD]


@asynccontextmanager
async def reading_of(
    url: str, config: ReplicationConfig, tables: list[Table], *, max_age: float = 1e9
) -> AsyncIterator[Reading]:
    def opening() -> AbstractAsyncContextManager[WalStream]:
        return open_stream(url, config, tables, max_transaction_bytes=1 << 30)

    async def advance() -> None:
        async with writer(url) as connection:
            await advance_slot(connection, config.slot.name)

    changelog = Changelog(LSN(0), max_bytes=1 << 30, max_age_seconds=max_age)
    follower = Follower(changelog, DEADLINE_SECONDS)
    intake = Intake(changelog, follower, max_size=1 << 30)
    reader = ReplicationReader(opening, intake, tables=[OLD], advance_slot=advance)
    running = [asyncio.create_task(reader.run()), asyncio.create_task(reader.expire_periodically())]
    try:
        await follower.until(lambda: bool(follower.said))
        yield Reading(reader, intake, changelog, follower, changelog.end_cursor)
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)


@both
async def test_what_was_committed_without_us_comes_whole(database_url: str, plugin: Plugin) -> None:
    """What was not confirmed before comes again."""
    config = durable(plugin=plugin)
    async with writer(database_url) as connection:
        await prepared(connection)
        if plugin == "pgoutput":
            version = connection.info.server_version
            publication = publication_sql("pgrealtime", await old(connection), version)
            await connection.execute(publication.encode())
        async with reading(database_url, config, connection) as room:
            await connection.execute("INSERT INTO old VALUES (1)")
            await room.follower.until(lambda: room.inserted(OLD) == [1])
        async with connection.transaction():
            await connection.execute("INSERT INTO old VALUES (2)")
            await connection.execute("INSERT INTO old VALUES (3)")
        async with reading(database_url, config, connection) as room:
            await room.follower.until(lambda: room.inserted(OLD) == [1, 2, 3])
            await connection.execute("INSERT INTO old VALUES (4)")
            await room.follower.until(lambda: room.inserted(OLD) == [1, 2, 3, 4])


async def test_broken_stream_is_no_gap_and_repeats_nothing(database_url: str) -> None:
    config = durable()
    async with writer(database_url) as connection:
        await prepared(connection)
        async with reading(database_url, config, connection) as room:
            for number in range(1, 6):
                await connection.execute(f"INSERT INTO old VALUES ({number})".encode())
                await room.follower.until(lambda last=number: last in room.inserted(OLD))  # type: ignore[misc]
                await connection.execute(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                    " WHERE slot_name = %s",
                    (config.slot.name,),
                )
                await room.follower.until(lambda: room.follower.said.count("lost") == number)  # noqa: B023
                await room.follower.until(lambda: room.follower.said[-1] != "lost")
            assert room.inserted(OLD) == [1, 2, 3, 4, 5]
            assert len(set(room.follower.said) - {"lost"}) == 1, "its positions go on meaning it"


async def test_slot_moves_behind_what_clients_can_still_ask_for(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_reader, "_EXPIRE_SECONDS", 0.05)
    monkeypatch.setattr(feed_reader, "_MARK_SECONDS", 1e9)
    config = durable()
    async with writer(database_url) as connection:
        await prepared(connection)
        async with reading(database_url, config, connection) as room:
            begun = await confirmed(connection, config)
            await connection.execute("INSERT INTO old VALUES (1)")
            await room.follower.until(lambda: room.inserted(OLD) == [1])
            one = room.changelog.end_cursor.lsn
            await asyncio.sleep(3)  # a temporary slot would have moved after a second
            assert await confirmed(connection, config) == begun
        async with reading(database_url, config, connection, max_age=0.2) as room:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while await confirmed(connection, config) < one:
                    await asyncio.sleep(0.05)
            assert room.changelog.floor.lsn >= one
        await connection.execute("INSERT INTO old VALUES (2)")
        async with reading(database_url, config, connection) as room:
            await room.follower.until(lambda: room.inserted(OLD) == [2])


async def test_a_gap_that_is_let_go_takes_no_commit_along(database_url: str) -> None:
    """The gap lies between two commits, and the second one begins where the first one ends."""
    config, max_age = durable(), 1e9
    async with (
        writer(database_url) as connection,
        await psycopg.AsyncConnection.connect(database_url) as other,
    ):
        await prepared(connection)
        async with reading(database_url, config, connection, max_age=max_age) as room:
            await other.execute("INSERT INTO old VALUES (2)")
            await connection.execute("INSERT INTO old VALUES (1)")
            await room.follower.until(lambda: room.inserted(OLD) == [1])
            end = room.changelog.end_cursor.lsn
            room.intake.append_gap("schema", frozenset({NEW}))
            told_at = time.monotonic()
            while time.monotonic() == told_at:
                pass
            await other.commit()
            await room.follower.until(lambda: room.changelog.end_cursor.lsn > end + 1)
            assert room.reader.stream is not None
            room.changelog.expire(told_at + max_age, room.changelog.end_cursor)
            assert room.changelog.floor.lsn == end + 1
            async with asyncio.timeout(DEADLINE_SECONDS):
                while await confirmed(connection, config) < end:
                    await asyncio.sleep(0.01)  # advances once a second, without a notification
        async with reading(database_url, config, connection) as room:
            room.begun = room.changelog.floor
            await room.follower.until(lambda: room.inserted(OLD) == [2])


async def test_slot_moves_where_only_others_write(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would retain all the WAL of a busy database with one quiet table."""
    monkeypatch.setattr(feed_reader, "_EXPIRE_SECONDS", 0.05)
    monkeypatch.setattr(feed_reader, "_MARK_SECONDS", 0.1)
    config = durable()
    async with writer(database_url) as connection:
        await prepared(connection)
        async with reading(database_url, config, connection, max_age=0.5) as room:
            for number in range(3):
                await connection.execute("INSERT INTO others SELECT generate_series(1, 1000)")
                row = await (await connection.execute("SELECT pg_current_wal_lsn()")).fetchone()
                assert row is not None
                await until_true(
                    connection,
                    "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots"
                    " WHERE slot_name = %s",
                    row[0],
                    config.slot.name,
                )
                await connection.execute(f"INSERT INTO old VALUES ({number})".encode())
            await room.follower.until(lambda: room.changelog.end_cursor.lsn > 0)
            assert "lost" not in room.follower.said


async def test_other_tables_are_streamed_with_nothing_missed_or_repeated(database_url: str) -> None:
    """The stream is closed and reopened: a slot has one reader at a time."""
    config = durable()
    counts, is_over = [0, 0], asyncio.Event()

    async def write(place: int) -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as own:
            while not is_over.is_set():
                async with own.transaction():
                    row = {"id": place + 2 * counts[place]}
                    await own.execute("INSERT INTO old VALUES (%(id)s)", row)
                    await own.execute("INSERT INTO new VALUES (%(id)s)", row)
                counts[place] += 1

    async with writer(database_url) as connection:
        await prepared(connection)
        tables = {table.name: table for table in await read_tables(connection)}

        def opening(names: Sequence[TableName]) -> OpenStream:
            wanted = [tables[name] for name in names]
            return lambda: open_stream(database_url, config, wanted, max_transaction_bytes=1 << 30)

        async with reading(database_url, config, connection) as room:
            async with asyncio.TaskGroup() as group:
                for place in range(2):
                    group.create_task(write(place))
                for number in range(8):
                    names = [OLD] if number % 2 else [OLD, NEW]
                    await room.reader.switch(opening(names), names)
                    if NEW in names:
                        known = len(room.inserted(NEW))
                        await room.follower.until(lambda: len(room.inserted(NEW)) > known)  # noqa: B023
                is_over.set()
            await room.follower.until(lambda: len(room.inserted(OLD)) >= sum(counts))
            received, of_new = room.inserted(OLD), room.inserted(NEW)
    assert sorted(received) == sorted(p + 2 * n for p in range(2) for n in range(counts[p]))
    assert 0 < len(of_new) < len(received)
    assert len(of_new) == len(set(of_new))
    assert "lost" not in room.follower.said


async def test_what_the_decoder_fails_at_for_ever_is_passed_over_and_a_gap(
    database_url: str,
) -> None:
    """A publication didn't exist at one change.

    Up to PostgreSQL 17 no new stream gets past that.
    """
    config = durable(plugin="pgoutput")
    async with writer(database_url) as connection:
        if connection.info.server_version >= 180_000:
            pytest.skip("from 18 on a missing publication is silence")
        await prepared(connection)
        publish = publication_sql("pgrealtime", await old(connection), 0).encode()
        await connection.execute(publish)
        async with reading(database_url, config, connection) as room:
            await connection.execute("INSERT INTO old VALUES (1)")
            await room.follower.until(lambda: room.inserted(OLD) == [1])
            async with connection.transaction():
                await connection.execute("DROP PUBLICATION pgrealtime")
                await connection.execute("INSERT INTO old VALUES (2)")
            await connection.execute(publish)
            await room.follower.until(lambda: _gaps(room) == ["slot_lost"])
            room.begun = room.changelog.end_cursor
            await connection.execute("INSERT INTO old VALUES (3)")
            await room.follower.until(lambda: room.inserted(OLD) == [3])
            failures = room.follower.said.count("lost")

    assert failures == feed_reader._MAX_DECODER_FAILURES


def _gaps(room: Reading) -> list[str]:
    entries = room.changelog.read(room.begun, room.changelog.end_cursor, 100)
    return [entry.reason for entry in entries if isinstance(entry, Gap)]


async def test_second_process_waits_and_takes_over(database_url: str) -> None:
    """Without a gap: it begins at the LSN that the first one confirmed."""
    config = durable()
    async with writer(database_url) as connection:
        await prepared(connection)
        async with reading(database_url, config, connection) as first:
            tables = await old(connection)
            with pytest.raises(SlotBusyError) as refused:
                async with open_stream(database_url, config, tables, max_transaction_bytes=1000):
                    pass
            assert refused.value.retryable
            second = asyncio.create_task(_first_of(database_url, config, tables))
            await connection.execute("INSERT INTO old VALUES (1)")
            await first.follower.until(lambda: first.inserted(OLD) == [1])
            assert not second.done()
        await connection.execute("INSERT INTO old VALUES (2)")
        assert await second == [1, 2]


async def test_tables_that_could_not_be_had_are_not_read_later_either(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller was informed that nothing changes, also if the slot was dropped meanwhile."""
    monkeypatch.setattr(feed_reader, "_REOPEN_SECONDS", 0.5)
    config = durable()
    is_taken, is_over = asyncio.Event(), asyncio.Event()

    async def take() -> None:
        while not is_taken.is_set():
            with suppress(SlotBusyError):
                async with open_stream(database_url, config, [new], max_transaction_bytes=1000):
                    is_taken.set()
                    await is_over.wait()

    @asynccontextmanager
    async def late() -> AsyncIterator[WalStream]:
        await is_taken.wait()
        async with open_stream(
            database_url, config, [new], max_transaction_bytes=1 << 30
        ) as stream:
            yield stream

    async with writer(database_url) as connection:
        await prepared(connection)
        (new,) = [table for table in await read_tables(connection) if table.name == NEW]
        async with reading(database_url, config, connection) as room:
            other = asyncio.create_task(take())
            with pytest.raises(SlotBusyError):
                await room.reader.switch(late, [NEW])
            is_over.set()
            await other
            await connection.execute("INSERT INTO new VALUES (1)")
            await connection.execute("INSERT INTO old VALUES (1)")
            await room.follower.until(lambda: room.changelog.end_cursor > room.begun)
            received = room.inserted(OLD), room.inserted(NEW)
            said = room.follower.said

    assert received == ([1], [])
    assert [word.partition(" ")[0] for word in said] == ["started", "lost", "started"]
    assert said[0] == said[2]


async def _first_of(url: str, config: ReplicationConfig, tables: list[Table]) -> list[int]:
    async with reading_of(url, config, tables) as room:
        await room.follower.until(lambda: len(room.inserted(OLD)) == 2)
        return room.inserted(OLD)


# --- what is refused, and what is made anew


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server() as made:
        yield made


@pytest.fixture
def plain(server: OwnServer) -> Iterator[OwnServer]:
    """The server as it was made, without slots."""
    server.configure()
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        connection.execute("CREATE TABLE old (id int PRIMARY KEY)")
    yield server
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(_END_READERS)
        connection.execute(_DROP_SLOTS)


# A walsender may take a while to see that its client has gone.
_END_READERS = """
SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots
WHERE active_pid IS NOT NULL
"""
_DROP_SLOTS = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"


async def refusal(url: str, config: ReplicationConfig) -> PgRealtimeError:
    """Return the error of opening the stream.

    A rehearsal gives the same one and leaves nothing behind.
    """
    async with writer(url) as connection:
        tables = await old(connection)
        before = await slots(connection)
        with pytest.raises(PgRealtimeError) as rehearsed:
            await dry_run_stream(url, config, tables)
        with pytest.raises(PgRealtimeError) as opened:
            async with open_stream(url, config, tables, max_transaction_bytes=1000):
                pass
        assert str(rehearsed.value) == str(opened.value)
        assert await slots(connection) == before
    return opened.value


async def slots(connection: Connection) -> list[str]:
    rows = await (await connection.execute("SELECT slot_name FROM pg_replication_slots")).fetchall()
    return [name for (name,) in rows]


async def test_unlimited_wal_is_refused_with_what_bounds_it(plain: OwnServer) -> None:
    config = durable("standing", allow_unlimited_wal=False)
    error = await refusal(plain.url, config)
    assert isinstance(error, SetupError)
    assert error.error_code == "wal_unlimited"
    statements = error.hint.removeprefix("Run as a superuser: ").partition(" Or set")[0]
    async with writer(plain.url) as connection:
        for statement in statements.split(";"):
            if statement.strip():
                await connection.execute(statement.strip().encode())
        async with reading(plain.url, config, connection):
            assert await slots(connection) == ["standing"]
        await connection.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")


@pytest.mark.parametrize(
    ("making", "said"),
    [
        ("pg_create_physical_replication_slot('standing')", "a physical slot"),
        ("pg_create_logical_replication_slot('standing', 'test_decoding')", "of test_decoding"),
        ("pg_create_logical_replication_slot('standing', 'pgoutput')", "of pgoutput"),
    ],
)
async def test_slot_of_that_name_that_is_not_ours_to_read_is_refused(
    plain: OwnServer, making: str, said: str
) -> None:
    async with writer(plain.url) as connection:
        await connection.execute(f"SELECT {making}".encode())
    error = await refusal(plain.url, durable("standing"))
    assert error.error_code == "slot_unfit"
    assert said in error.detail
    assert "pgrealtime slot drop standing" in error.hint


async def test_slot_of_another_database_is_refused(plain: OwnServer) -> None:
    url = plain.url.removesuffix("/postgres") + "/another"
    with psycopg.connect(plain.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE another")
    try:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SELECT pg_create_logical_replication_slot('standing', 'wal2json')")
        error = await refusal(plain.url, durable("standing"))
        assert error.error_code == "slot_unfit"
        assert "database another" in error.detail
    finally:
        with psycopg.connect(plain.url, autocommit=True) as connection:
            connection.execute("DROP DATABASE another")


async def test_a_lost_slot_is_made_anew_and_the_gap_is_reported(plain: OwnServer) -> None:
    """The server removed its WAL, as configured; no operator has to act."""
    plain.configure(max_slot_wal_keep_size="1MB", max_wal_size="32MB", min_wal_size="32MB")
    config = durable("standing", allow_unlimited_wal=False)
    async with writer(plain.url) as connection, reading(plain.url, config, connection) as room:
        await connection.execute("INSERT INTO old VALUES (1)")
        await room.follower.until(lambda: room.inserted(OLD) == [1])
        while "standing" in await lasting(connection):
            await connection.execute(
                "SELECT pg_switch_wal(), pg_logical_emit_message(false, 'x', 'y')"
            )
            await connection.execute("CHECKPOINT")
        await room.follower.until(lambda: room.follower.said[-1].startswith("started"))
        await room.follower.until(lambda: room.follower.said.count("lost") == 1)
        await room.follower.until(lambda: len(room.follower.said) == 3)
        assert _gaps(room) == ["slot_lost"]
        room.begun = room.changelog.end_cursor
        await connection.execute("INSERT INTO old VALUES (2)")
        await room.follower.until(lambda: room.inserted(OLD) == [2])


async def lasting(connection: Connection) -> list[str]:
    """Return the slots that can still be read."""
    cursor = await connection.execute(
        "SELECT slot_name FROM pg_replication_slots WHERE wal_status <> 'lost'"
    )
    return [name for (name,) in await cursor.fetchall()]


async def test_standbys_have_the_slot_if_they_shall(plain: OwnServer) -> None:
    """Also a slot that was created without failover."""
    failover = "SELECT to_jsonb(s) ->> 'failover' FROM pg_replication_slots s"
    async with writer(plain.url) as connection:
        if connection.info.server_version < 170000:
            assert (await refusal(plain.url, durable("standing", failover=True))).error_code == (
                "failover_unsupported"
            )
            return
        async with reading(plain.url, durable("standing"), connection):
            assert await (await connection.execute(failover)).fetchone() == ("false",)
        async with reading(plain.url, durable("standing", failover=True), connection):
            assert await (await connection.execute(failover)).fetchone() == ("true",)
        await connection.execute(_END_READERS)
        await connection.execute(_DROP_SLOTS)
        async with reading(plain.url, durable("standing", failover=True), connection):
            assert await (await connection.execute(failover)).fetchone() == ("true",)


# --- the operator's commands


def _pgrealtime(folder: Path, url: str, *arguments: str) -> Outcome:
    file = folder / "pgrealtime.yaml"
    slot = {"durable": True, "allow_unlimited_wal": True, "name": "standing"}
    settings = {
        "version": 1,
        "database": {"url": url},
        "replication": {"plugin": "wal2json", "slot": slot},
        "collections": {"old": {"table": "public.old", "list_rule": ""}},
    }
    file.write_text(yaml.safe_dump(settings))
    return run_program(*arguments, "-c", str(file))


def test_slots_are_listed_and_dropped(plain: OwnServer, tmp_path: Path) -> None:
    listed = tmp_path, plain.url, "slot", "list"
    assert _pgrealtime(*listed) == (0, "there are no slots\n", "")
    with psycopg.connect(plain.url, autocommit=True) as connection:
        for name in ("standing", "standing_1", "elsewhere"):
            connection.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [name])
        code, output, _ = _pgrealtime(*listed)
        assert code == 0
        assert [line.partition(":")[0] for line in output.splitlines()] == [
            "standing",
            "standing_1",
        ]
        assert 'durable, wal2json, database "postgres", inactive' in output
        assert _pgrealtime(tmp_path, plain.url, "slot", "drop", "standing")[0] == 0
        code, _, errors = _pgrealtime(tmp_path, plain.url, "slot", "drop", "elsewhere")
        assert (code, errors.partition(":")[0]) == (2, "slot_unknown")
        left = connection.execute(
            "SELECT slot_name FROM pg_replication_slots ORDER BY 1"
        ).fetchall()
    assert left == [("elsewhere",), ("standing_1",)]


def test_check_leaves_no_slot(plain: OwnServer, tmp_path: Path) -> None:
    code, _, errors = _pgrealtime(tmp_path, plain.url, "check")
    assert code == 0, errors
    with psycopg.connect(plain.url, autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM pg_replication_slots").fetchone() == (0,)


@both
async def test_a_stream_may_begin_behind_what_was_confirmed(
    database_url: str, plugin: Plugin
) -> None:
    """Where another process goes on, which knows what the last one read: exactly behind it."""
    config = durable(plugin=plugin)
    async with writer(database_url) as connection:
        await prepared(connection)
        tables = await old(connection)
        await connection.execute(
            publication_sql("pgrealtime", tables, connection.info.server_version).encode()
        )
        ends: list[LSN] = []
        async with open_stream(database_url, config, tables, max_transaction_bytes=1000) as stream:
            for n in (1, 2, 3):
                await connection.execute("INSERT INTO old VALUES (%s)", [n])
            while len(ends) < 3:
                ends += [entry.end_lsn for entry in await anext(stream)]
        async with open_stream(
            database_url, config, tables, max_transaction_bytes=1000, start_lsn=ends[1]
        ) as stream:
            assert stream.slot.start_lsn == ends[1]
            assert [entry.end_lsn for entry in await anext(stream)] == ends[2:]


async def test_a_walsender_that_holds_the_slot_for_a_paused_process_is_ended(
    database_url: str,
) -> None:
    """It would for ``wal_sender_timeout``, a minute; nothing happens if nobody reads the slot."""
    config = durable()
    async with writer(database_url) as connection:
        await prepared(connection)
        tables = await old(connection)
        async with open_stream(database_url, config, tables, max_transaction_bytes=1000) as stream:
            assert await end_walsender(connection, config.slot.name)
            with pytest.raises(StreamInterruptedError):
                await anext(stream)
        assert await end_walsender(connection, config.slot.name)
        async with open_stream(database_url, config, tables, max_transaction_bytes=1000):
            pass
