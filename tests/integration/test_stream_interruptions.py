"""Whatever ends or delays the stream, every loss is reported and nothing is left behind."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from uuid import uuid4

import pytest

from pgrealtime.changes import Insert, Transaction
from pgrealtime.config.model import ReplicationConfig
from pgrealtime.errors import PgRealtimeError, StreamInterruptedError
from pgrealtime.wal.stream import WalStream
from tests.lacking import lacking
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
from tests.wire import wire

TABLE = "CREATE TABLE t (id bigserial PRIMARY KEY, pad text)"
FLOOD = "INSERT INTO t (pad) SELECT repeat('x', 1000) FROM generate_series(1, 1000)"
FLOODS = 60
"""So many floods are more than the queue and the sockets hold."""

both = pytest.mark.parametrize("plugin", PLUGINS)


async def _end(stream: WalStream) -> tuple[int, PgRealtimeError]:
    """Read to the end; return the number of changes and the error that ended it."""
    count = 0
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            async for batch in stream:
                count += sum(len(one.changes) for one in batch if isinstance(one, Transaction))
    except PgRealtimeError as error:
        return count, error
    raise AssertionError


async def _walsender(connection: Connection, stream: WalStream) -> int:
    row = await (
        await connection.execute(
            "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", (stream.slot.name,)
        )
    ).fetchone()
    assert row is not None
    return int(row[0])


@both
async def test_a_terminated_walsender_is_reported_after_what_came_before(
    database_url: str, plugin: Plugin
) -> None:
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url, connection, plugin) as stream:
            await connection.execute("INSERT INTO t (pad) VALUES ('x')")
            await finish(connection)
            assert len(await read_to_finish(stream)) == 1
            pid = await _walsender(connection, stream)
            await connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
            count, error = await _end(stream)
            assert count == 0
            assert isinstance(error, StreamInterruptedError)
            assert (error.error_code, error.retryable) == ("stream_interrupted", True)
            with pytest.raises(StreamInterruptedError):
                await anext(stream)


async def test_a_failing_decoder_is_reported(database_url: str) -> None:
    """Here pgoutput's publication is dropped; whatever the cause, a new slot starts after it."""
    async with writer(database_url) as connection:
        if connection.info.server_version >= 180_000:
            pytest.skip("from 18 on a missing publication is silence")
        await connection.execute(TABLE)
        async with reading(database_url, connection, "pgoutput") as stream:
            await connection.execute("DROP PUBLICATION pgrealtime")
            await connection.execute("INSERT INTO t (pad) VALUES ('secret')")
            _, error = await _end(stream)
            assert isinstance(error, StreamInterruptedError)
            assert (error.error_code, error.retryable) == ("decoder_failed", True)
            assert "secret" not in str(error)


async def test_a_decoder_that_fails_at_once_is_reported_at_once(database_url: str) -> None:
    """Its error may arrive together with the answer that starts the stream."""
    slot = {"name": f"pgrealtime_{uuid4().hex[:8]}", "durable": True, "allow_unlimited_wal": True}
    config = ReplicationConfig.model_validate({"slot": slot})
    async with writer(database_url) as connection:
        if connection.info.server_version >= 180_000:
            pytest.skip("from 18 on a missing publication is silence")
        await connection.execute(TABLE)
        async with reading(database_url, connection, "pgoutput", config=config):
            await connection.execute("DROP PUBLICATION pgrealtime")
            await connection.execute("INSERT INTO t (pad) VALUES ('x')")
        for _ in range(20):
            async with reading(database_url, connection, "pgoutput", config=config) as stream:
                _, error = await _end(stream)
            assert error.error_code == "decoder_failed"


@both
async def test_held_up_delivery_ends_the_stream_in_time(database_url: str, plugin: Plugin) -> None:
    """A connection that isn't read can delay the server's checkpoints."""
    config = ReplicationConfig(max_pause=0.3)
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url, connection, plugin, config=config) as stream:
            for _ in range(FLOODS):
                await connection.execute(FLOOD)
            await until_true(
                connection,
                "SELECT NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = %s)",
                stream.slot.name,
            )
            count, error = await _end(stream)
            assert 0 < count < FLOODS * 1000
            assert isinstance(error, StreamInterruptedError)
            assert error.error_code == "delivery_held_up"


@both
async def test_delivery_held_up_for_a_while_loses_nothing(
    database_url: str, plugin: Plugin
) -> None:
    """Status updates are sent during a pause longer than wal_sender_timeout.

    The time-out need not be whole seconds.
    """
    config = ReplicationConfig(max_pause=DEADLINE_SECONDS)
    url = database_url + "?options=-c%20wal_sender_timeout%3D900ms"
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(url, connection, plugin, config=config) as stream:
            for _ in range(FLOODS):
                await connection.execute(FLOOD)
            await finish(connection)
            await until_true(
                connection,
                "SELECT clock_timestamp() > %s::timestamptz + interval '2.5 s'",
                await _now(connection),
            )
            assert stream._batch_bytes < 16 * 1024 * 1024
            read = await read_to_finish(stream)
            assert [len(one.changes) for one in read if isinstance(one, Transaction)] == (
                [1000] * FLOODS
            )


async def _now(connection: Connection) -> str:
    row = await (await connection.execute("SELECT clock_timestamp()::text")).fetchone()
    assert row is not None
    return str(row[0])


@both
async def test_slow_consumer_gets_everything(database_url: str, plugin: Plugin) -> None:
    """Many pauses, none of them long."""
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url, connection, plugin) as stream:
            for _ in range(FLOODS):
                await connection.execute(FLOOD)
            await finish(connection)
            ids: list[str | None] = []
            async with asyncio.timeout(DEADLINE_SECONDS):
                while len(ids) < FLOODS * 1000:
                    for one in await anext(stream):
                        assert isinstance(one, Transaction)
                        ids += [
                            change.new["id"]
                            for change in one.changes
                            if isinstance(change, Insert) and "pad" in change.new
                        ]
                    await asyncio.sleep(0.05)  # being slow is the point
            assert ids == [str(number) for number in range(1, FLOODS * 1000 + 1)]


@both
async def test_cancelled_reader_leaves_nothing_behind(database_url: str, plugin: Plugin) -> None:
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        opened = asyncio.Event()
        pids: list[int] = []

        async def read() -> None:
            async with reading(database_url, connection, plugin) as stream:
                pids.append(await _walsender(connection, stream))
                opened.set()
                await anext(stream)

        task = asyncio.create_task(read(), name="read")
        await asyncio.wait_for(opened.wait(), DEADLINE_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_true(
            connection, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)", pids[0]
        )


@both
async def test_keeping_what_did_not_come_on_this_stream_is_refused(
    database_url: str, plugin: Plugin
) -> None:
    """The server would accept that position, and remove everything before it without an error."""
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url, connection, plugin) as stream:
            await finish(connection)
            batch = await anext(stream)
            with pytest.raises(ValueError, match="nothing was received beyond"):
                stream.feedback.confirm(type(batch[-1].end_lsn)(batch[-1].end_lsn + 1))


@pytest.fixture
def tls_url(server: OwnServer) -> str:
    """The URL of a server that uses TLS."""
    openssl = shutil.which("openssl") or lacking("no openssl to make a certificate with")
    data = server.folder / "data"
    subprocess.run(
        [
            *(openssl, "req", "-new", "-x509", "-nodes", "-batch", "-subj", "/CN=localhost"),
            *("-keyout", data / "server.key", "-out", data / "server.crt"),
        ],
        check=True,
        capture_output=True,
    )
    for name in ("server.key", "server.crt"):
        (data / name).chmod(0o600)
        shutil.chown(data / name, data.owner(), data.group())
    server.configure(ssl="on")
    return server.url + "?sslmode=require"


@both
async def test_flood_over_tls_comes_whole(tls_url: str, plugin: Plugin) -> None:
    """Bytes can wait inside the TLS layer, where the socket doesn't signal them."""
    async with writer(tls_url) as connection:
        await connection.execute(TABLE)
        async with reading(tls_url, connection, plugin) as stream:
            for _ in range(20):
                await connection.execute(FLOOD)
            await finish(connection)
            read = await read_to_finish(stream)
    assert [len(one.changes) for one in read if isinstance(one, Transaction)] == [1000] * 20


@both
async def test_a_server_that_says_nothing_any_more_is_given_up(
    server: OwnServer, plugin: Plugin
) -> None:
    """A network or a proxy that drops everything reports no error."""
    server.configure(wal_sender_timeout="3s")
    async with wire(server.url) as way, writer(server.url) as connection:
        await connection.execute(TABLE)
        async with reading(way.url(server.url), connection, plugin) as stream:
            await asyncio.sleep(5)  # longer than that, with no changes: the stream goes on
            await connection.execute("INSERT INTO t (pad) VALUES ('a')")
            assert len(await anext(stream)) == 1
            way.silence()
            _, error = await _end(stream)

    assert isinstance(error, StreamInterruptedError)
    assert error.message == "the server has sent nothing for 3 s"
