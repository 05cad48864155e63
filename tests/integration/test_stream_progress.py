"""The server may remove WAL that the changelog keeps; its commits and shutdown never wait."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest

from pgrealtime.errors import StreamInterruptedError
from pgrealtime.wal.stream import WalStream
from tests.own_server import OwnServer
from tests.stream_reading import (
    DEADLINE_SECONDS,
    PLUGINS,
    Connection,
    Plugin,
    finish,
    read_to_finish,
    reading,
    until_true,
    writer,
)

TABLE = "CREATE TABLE t (id bigserial PRIMARY KEY, pad text)"
UNSEEN = "CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.u (id bigserial PRIMARY KEY)"
BRISK = "?options=-c%20wal_sender_timeout%3D3s"
"""Status updates each second, so that tests don't wait for the usual ten."""

both = pytest.mark.parametrize("plugin", PLUGINS)


async def _wal_end(connection: Connection) -> str:
    row = await (await connection.execute("SELECT pg_current_wal_insert_lsn()::text")).fetchone()
    assert row is not None
    return str(row[0])


async def _confirmed(connection: Connection, stream: WalStream, lsn: str) -> None:
    """Wait until the slot has passed the position."""
    await until_true(
        connection,
        "SELECT confirmed_flush_lsn >= %s FROM pg_replication_slots WHERE slot_name = %s",
        lsn,
        stream.slot.name,
    )


@both
async def test_slot_moves_with_what_is_kept(database_url: str, plugin: Plugin) -> None:
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url + BRISK, connection, plugin) as stream:
            await connection.execute("INSERT INTO t (pad) VALUES ('x')")
            await finish(connection)
            await read_to_finish(stream)
            await _confirmed(connection, stream, await _wal_end(connection))


@both
async def test_slot_moves_while_nothing_is_ours(database_url: str, plugin: Plugin) -> None:
    """Otherwise a quiet table in a busy database would retain its WAL."""
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        await connection.execute(UNSEEN)
        async with reading(database_url + BRISK, connection, plugin) as stream:
            await connection.execute(
                "INSERT INTO elsewhere.u SELECT generate_series(1, 1000);"
                "SELECT pg_logical_emit_message(true, 'x', 'y')"
            )
            await _confirmed(connection, stream, await _wal_end(connection))
            assert stream.wal_end > stream.slot.start_lsn


@both
async def test_slot_does_not_move_over_what_is_not_kept(database_url: str, plugin: Plugin) -> None:
    """After a crash it would be lost."""
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        await connection.execute(UNSEEN)
        async with reading(database_url + BRISK, connection, plugin) as stream:
            await connection.execute("INSERT INTO t (pad) VALUES ('kept')")
            batch = await anext(stream)
            stream.feedback.confirm(batch[-1].end_lsn)
            kept = await _wal_end(connection)
            await _confirmed(connection, stream, kept)
            await connection.execute("INSERT INTO t (pad) VALUES ('not kept')")
            unkept = await _wal_end(connection)
            batch = await anext(stream)
            for _ in range(3):
                await connection.execute("INSERT INTO elsewhere.u DEFAULT VALUES")
                await _received_again(stream)
            await until_true(
                connection,
                "SELECT confirmed_flush_lsn < %s FROM pg_replication_slots WHERE slot_name = %s",
                unkept,
                stream.slot.name,
            )
            stream.feedback.confirm(batch[-1].end_lsn)
            await _confirmed(connection, stream, unkept)


@both
async def test_a_quiet_stream_still_brings_keepalives(database_url: str, plugin: Plugin) -> None:
    """The health check depends on the time of the last message."""
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url + BRISK, connection, plugin) as stream:
            for _ in range(2):
                await _received_again(stream)
            assert time.monotonic() - stream.last_received_at < DEADLINE_SECONDS


@both
async def test_stream_outlives_the_servers_patience(database_url: str, plugin: Plugin) -> None:
    """Without status updates the server would end a connection after wal_sender_timeout."""
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        url = database_url + "?options=-c%20wal_sender_timeout%3D1s"
        async with reading(url, connection, plugin) as stream:
            await until_true(
                connection,
                "SELECT now() - backend_start > interval '2.5 s' FROM pg_stat_replication"
                " WHERE pid = (SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s)",
                stream.slot.name,
            )
            await finish(connection)
            assert await read_to_finish(stream) == []


@both
async def test_stream_is_never_a_synchronous_standby(server: OwnServer, plugin: Plugin) -> None:
    """Commits would wait for this stream, and count as safe because of it."""
    async with writer(server.url) as connection:
        await connection.execute("SET synchronous_commit = local")
        await connection.execute(TABLE)
        await connection.execute(UNSEEN)
        await connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await connection.execute("SELECT pg_reload_conf()")
        await _commits_wait(server.url, connection)
        async with reading(server.url + BRISK, connection, plugin) as stream:
            for table in ("t", "elsewhere.u"):
                await finish(connection)
                await read_to_finish(stream)
                await _confirmed(connection, stream, await _wal_end(connection))
                async with await psycopg.AsyncConnection.connect(server.url) as waiting:
                    commit = asyncio.create_task(_insert(waiting, table), name="waiting commit")
                    await until_true(connection, SOMEBODY_WAITS)
                    if table == "t":
                        batch = await anext(stream)  # decoded before any snapshot sees it
                        stream.feedback.confirm(batch[-1].end_lsn)
                    for _ in range(4):
                        await _received_again(stream)
                        await until_true(connection, WE_ARE_ASYNCHRONOUS)
                    assert not commit.done()
                    await connection.execute(
                        "SELECT pg_cancel_backend(%s)", (waiting.info.backend_pid,)
                    )
                    await asyncio.wait_for(commit, DEADLINE_SECONDS)


async def _commits_wait(url: str, watching: Connection) -> None:
    """Return once commits wait for standbys: when the checkpointer has processed the reload."""
    async with await psycopg.AsyncConnection.connect(url) as probing:
        while True:
            commit = asyncio.create_task(_insert(probing, "elsewhere.u"), name="probing commit")
            while not commit.done():
                cursor = await watching.execute(SOMEBODY_WAITS)
                if await cursor.fetchone() == (True,):
                    pid = probing.info.backend_pid
                    await watching.execute("SELECT pg_cancel_backend(%s)", (pid,))
                    await asyncio.wait_for(commit, DEADLINE_SECONDS)
                    return
                await asyncio.sleep(0.01)  # the server doesn't signal it


SOMEBODY_WAITS = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')"
WE_ARE_ASYNCHRONOUS = "SELECT flush_lsn IS NULL AND sync_state = 'async' FROM pg_stat_replication"


async def _received_again(stream: WalStream) -> None:
    before = stream.last_received_at
    async with asyncio.timeout(DEADLINE_SECONDS):
        while stream.last_received_at <= before:
            await asyncio.sleep(0.05)


async def _insert(connection: Connection, table: str) -> None:
    await connection.execute(f"INSERT INTO {table} DEFAULT VALUES".encode())
    await connection.commit()


@both
@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "not kept"])
async def test_server_shuts_down_at_once(
    server: OwnServer,
    plugin: Plugin,
    is_kept: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    async with writer(server.url) as connection:
        await connection.execute(TABLE)
        async with reading(server.url, connection, plugin) as stream:
            await connection.execute("INSERT INTO t (pad) SELECT 'x' FROM generate_series(1, 1000)")
            batch = await anext(stream)
            if is_kept:
                stream.feedback.confirm(batch[-1].end_lsn)
            started = time.monotonic()
            stopping = asyncio.to_thread(server.control, "stop", "--mode=fast", timeout=20.0)
            async with asyncio.TaskGroup() as group:
                group.create_task(stopping, name="stop")
                with pytest.raises(StreamInterruptedError):
                    await anext(stream)
            assert time.monotonic() - started < 5
