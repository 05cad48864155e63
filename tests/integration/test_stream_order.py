"""Transactions come whole, in the order of their commits, each once."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
import uvloop

from pgrealtime.changes import Insert, OversizedTransaction, TableName, Transaction
from pgrealtime.lsn import parse_lsn
from tests.stream_reading import (
    DEADLINE_SECONDS,
    PLUGINS,
    Connection,
    Plugin,
    finish,
    read_to_finish,
    reading,
    writer,
)

T = TableName("public", "t")
TABLE = "CREATE TABLE t (id bigserial PRIMARY KEY, who int, n int, pad text)"

both = pytest.mark.parametrize("plugin", PLUGINS)


async def _whole(
    connection: Connection, url: str, plugin: Plugin, *script: str
) -> list[Transaction]:
    async with reading(url, connection, plugin) as stream:
        for statement in script:
            await connection.execute(statement.encode())
        await finish(connection)
        read = await read_to_finish(stream)
    assert all(isinstance(one, Transaction) for one in read)
    return [one for one in read if isinstance(one, Transaction)]


def _numbers(one: Transaction) -> list[str | None]:
    return [change.new["n"] for change in one.changes if isinstance(change, Insert)]


@both
async def test_concurrent_transactions_come_in_commit_order_and_whole(
    database_url: str, plugin: Plugin
) -> None:
    """The order is not that of their ids or of their writes."""

    async def write(number: int) -> None:
        async with await psycopg.AsyncConnection.connect(database_url) as own:
            for n in range(30):
                await own.execute("INSERT INTO t (who, n) VALUES (%s, %s)", (number, n))
                if n % 5 == 0:
                    await own.execute("SAVEPOINT s")
                await own.execute("INSERT INTO t (who, n) VALUES (%s, %s)", (number, n))
                await own.commit()

    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url, connection, plugin) as stream:
            async with asyncio.TaskGroup() as group:
                for number in range(6):
                    group.create_task(write(number), name=f"writer {number}")
            await finish(connection)
            read = await read_to_finish(stream)
    ends = [one.end_lsn for one in read]
    assert ends == sorted(set(ends))
    received: dict[str | None, list[str | None]] = {}
    for one in read:
        assert isinstance(one, Transaction)
        first, second = one.changes
        assert isinstance(first, Insert)
        assert isinstance(second, Insert)
        assert first.new["who"] == second.new["who"]
        assert first.new["n"] == second.new["n"]
        received.setdefault(first.new["who"], []).append(first.new["n"])
    assert received == {str(number): [str(n) for n in range(30)] for number in range(6)}


@both
async def test_long_transaction_comes_at_its_commit(database_url: str, plugin: Plugin) -> None:
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with (
            reading(database_url, connection, plugin) as stream,
            await psycopg.AsyncConnection.connect(database_url) as long,
        ):
            await long.execute("INSERT INTO t (n) VALUES (1)")
            await connection.execute("INSERT INTO t (n) VALUES (2)")
            await long.execute("INSERT INTO t (n) VALUES (3)")
            await long.commit()
            await finish(connection)
            read = await read_to_finish(stream)
    assert [_numbers(one) for one in read if isinstance(one, Transaction)] == [["2"], ["1", "3"]]
    assert read[0].xid > read[1].xid


@both
async def test_what_is_rolled_back_never_comes(database_url: str, plugin: Plugin) -> None:
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        read = await _whole(
            connection,
            database_url,
            plugin,
            "BEGIN; INSERT INTO t (n) VALUES (1); ROLLBACK",
            "BEGIN; INSERT INTO t (n) VALUES (2); SAVEPOINT s; INSERT INTO t (n) VALUES (3);"
            "ROLLBACK TO s; INSERT INTO t (n) VALUES (4); COMMIT",
        )
    assert [_numbers(one) for one in read] == [["2", "4"]]


@both
async def test_prepared_transaction_comes_when_it_is_committed(
    database_url: str, plugin: Plugin
) -> None:
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        gid = connection.info.dbname
        read = await _whole(
            connection,
            database_url,
            plugin,
            "BEGIN",
            "INSERT INTO t (n) VALUES (1)",
            f"PREPARE TRANSACTION '{gid}'",
            "INSERT INTO t (n) VALUES (2)",
            f"COMMIT PREPARED '{gid}'",
        )
    assert [_numbers(one) for one in read] == [["2"], ["1"]]


@both
async def test_position_and_time_are_those_of_the_commit(database_url: str, plugin: Plugin) -> None:
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url, connection, plugin) as stream:
            (before,) = await _one(connection, "SELECT pg_current_wal_insert_lsn()::text")
            await connection.execute("INSERT INTO t (n) VALUES (1)")
            (xid, time) = await _one(
                connection,
                "SELECT xmin::text, extract(epoch FROM clock_timestamp())::float8 FROM t",
            )
            (after,) = await _one(connection, "SELECT pg_current_wal_insert_lsn()::text")
            await finish(connection)
            (one,) = await read_to_finish(stream)
    assert isinstance(one, Transaction)
    assert parse_lsn(before) < one.end_lsn <= parse_lsn(after)
    assert str(one.xid) == xid
    assert 0 <= float(time) - one.commit_time_us / 1e6 < DEADLINE_SECONDS


async def _one(connection: Connection, query: str) -> tuple[str, ...]:
    row = await (await connection.execute(query.encode())).fetchone()
    assert row is not None
    return row


@both
async def test_transaction_beyond_the_bound_is_named_and_the_next_is_whole(
    database_url: str, plugin: Plugin
) -> None:
    async with writer(database_url) as connection:
        await connection.execute(TABLE)
        async with reading(database_url, connection, plugin, max_size=100_000) as stream:
            await connection.execute(
                "INSERT INTO t (n, pad) SELECT i, repeat('x', 100) FROM generate_series(1, 2000) i"
            )
            await connection.execute("INSERT INTO t (n) VALUES (1)")
            await finish(connection)
            large, small = await read_to_finish(stream)
    assert isinstance(large, OversizedTransaction)
    assert large.tables == {T}
    assert large.end_lsn < small.end_lsn
    assert isinstance(small, Transaction)
    assert _numbers(small) == ["1"]


@pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
@both
def test_flood_comes_whole_on_either_loop(
    database_url: str, plugin: Plugin, new_loop: object
) -> None:
    """More than all buffers between hold, in small and large transactions."""

    async def flood() -> list[int]:
        async with writer(database_url) as connection:
            await connection.execute(TABLE)
            async with reading(database_url, connection, plugin) as stream:
                for size in (1, 1, 30_000, 1, 5_000, 1):
                    await connection.execute(
                        "INSERT INTO t (n, pad) SELECT i, repeat('x', 300)"
                        " FROM generate_series(1, %s) i",
                        (size,),
                    )
                await finish(connection)
                read = await read_to_finish(stream)
        return [len(one.changes) for one in read if isinstance(one, Transaction)]

    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]  # either makes a loop
        assert runner.run(flood()) == [1, 1, 30_000, 1, 5_000, 1]
