"""Rules are evaluated on the server that the URL names; a dead pooled connection fails no query."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgrealtime.config.model import DatabaseConfig
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.rule_queries.executor import QueryExecutor
from tests.wire import wire


@asynccontextmanager
async def pool_of(url: str, size: int) -> AsyncIterator[QueryPool]:
    pool = QueryPool(url, statement_timeout=0.5, min_size=size, max_size=size, timeout=2.0)
    async with pool:
        await pool.wait()
        yield pool


async def answer(pool: QueryPool) -> object:
    async with pool.connection() as connection:
        return await (await connection.execute("SELECT 1")).fetchone()


async def test_a_url_that_asks_for_a_session_that_may_write_leads_to_the_primary(
    database_url: str,
) -> None:
    """URLs with several hosts do that; the pool's own sessions are read-only."""
    url = make_conninfo(database_url, target_session_attrs="read-write")
    async with open_query_pool(DatabaseConfig(url=url, wait_for=0)) as pool:
        assert await answer(pool) == (1,)


async def test_after_a_restart_of_the_server_the_first_question_is_answered(
    database_url: str,
) -> None:
    """All pooled connections are dead at once."""
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin,
        pool_of(database_url, 8) as pool,
    ):
        await admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        began = time.monotonic()
        assert await answer(pool) == (1,)

    assert time.monotonic() - began < 1.0


async def test_statements_are_not_compiled_to_machine_code(database_url: str) -> None:
    """The compiler takes seconds for a large rule, and no timeout ends it."""
    explain = "EXPLAIN ANALYZE SELECT count(*) FROM pg_class WHERE oid > 5"
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin:
        compile_all = sql.SQL("ALTER DATABASE {} SET jit_above_cost TO 0")
        await admin.execute(compile_all.format(sql.Identifier(admin.info.dbname)))
    async with pool_of(database_url, 1) as pool, QueryExecutor(pool).read_session(()) as session:
        lines = await session.fetch_texts(explain, {})

    assert lines
    assert not [line for (line,) in lines if line is not None and line.startswith("JIT")]


async def test_an_answer_that_never_comes_is_an_error_and_the_next_one_comes(
    database_url: str,
) -> None:
    """A network that drops every packet reports no error."""
    async with wire(database_url) as way, pool_of(way.url(database_url), 1) as pool:
        assert await answer(pool) == (1,)
        way.silence()
        began = time.monotonic()
        with pytest.raises(psycopg.OperationalError):
            await answer(pool)
        assert time.monotonic() - began < 5.0
        way.mend()
        assert await answer(pool) == (1,)


async def test_all_connections_are_free_again_after_their_users_were_cancelled(
    database_url: str,
) -> None:
    """A client that disconnects during its call cancels the queries of that call."""
    async with pool_of(database_url, 2) as pool, AsyncExitStack() as stack:
        tasks = [asyncio.create_task(answer(pool)) for _ in range(50)]
        stack.callback(lambda: [task.cancel() for task in tasks])
        await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

        answers = await asyncio.gather(*(answer(pool) for _ in range(4)))
        assert answers == [(1,)] * 4


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancellation_that_comes_with_a_connection_is_not_lost(
    database_url: str, turns: int
) -> None:
    """So many turns of the loop after it became free. A task that goes on never ends."""
    async with pool_of(database_url, 1) as pool:

        async def ask_and_go_on() -> None:
            await answer(pool)
            await asyncio.Event().wait()

        async with pool.session():
            task = asyncio.create_task(ask_and_go_on())
            for _ in range(10):
                await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=1.0)

        assert task.cancelled()
        assert await answer(pool) == (1,)


async def test_a_cancellation_while_a_dead_connection_is_checked_takes_none_away(
    database_url: str,
) -> None:
    async with pool_of(database_url, 1) as pool:
        async with pool.session() as connection:
            pid = connection.info.backend_pid
        async with await psycopg.AsyncConnection.connect(database_url) as other:
            await other.execute("SELECT pg_terminate_backend(%s, 1000)", [pid])
        for _ in range(3):
            task = asyncio.create_task(answer(pool))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

        assert await answer(pool) == (1,)


WAITING_WAL = """
SELECT pg_current_wal_insert_lsn()::text,
  pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn() > 24  -- the header of a page
"""


async def _read_in_a_connection(pool: QueryPool) -> None:
    async with pool.connection() as connection:
        await connection.execute("SELECT FROM public.docs")


async def _read_in_a_session(pool: QueryPool) -> None:
    async with QueryExecutor(pool).read_session(frozenset()) as reading:
        await reading.fetch_texts("SELECT body FROM public.docs", {})


@pytest.mark.parametrize("read", [_read_in_a_connection, _read_in_a_session])
async def test_what_a_question_writes_to_the_wal_is_on_its_way_to_the_stream(
    database_url: str, read: Callable[[QueryPool], Awaitable[None]]
) -> None:
    """A SELECT prunes pages, which writes WAL.

    Proving that a row is current waits until all WAL is decoded.
    """
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin,
        pool_of(database_url, 1) as pool,
    ):
        await admin.execute(
            "CREATE TABLE docs (id int, body text) WITH (autovacuum_enabled = off);"
            "INSERT INTO docs SELECT n, repeat('x', 100) FROM generate_series(1, 10) n"
        )
        for number in range(500):
            await admin.execute(
                "UPDATE docs SET body = repeat('y', 100) WHERE id = %s", [number % 10 + 1]
            )
            await read(pool)
            row = await (await admin.execute(WAITING_WAL)).fetchone()
            assert row is not None
            if row[1]:
                break
        else:
            pytest.fail("no page was pruned")
        async with asyncio.timeout(2.0):
            flushed = "SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn"
            while await (await admin.execute(flushed, [row[0]])).fetchone() != (True,):
                await asyncio.sleep(0.02)
