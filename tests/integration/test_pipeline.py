"""Statements that are sent at once, on a real server and behind a pooler in transaction mode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, LiteralString, TypeAlias

import psycopg
import pytest

from pgrealtime.postgres.pipeline import Statement, is_error
from pgrealtime.postgres.pool import QueryConnection, QueryPool
from pgrealtime.postgres.rows import TextRow, texts_of
from pgrealtime.postgres.session import ReadTransaction
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.snapshot import parse_snapshot
from tests.pgbouncer import pgbouncer

EVIL: tuple[LiteralString, ...] = (
    "CREATE SCHEMA IF NOT EXISTS evil",
    "SET search_path = evil, public, pg_catalog",
    "SET DateStyle = 'German'",
    "SET TimeZone = 'Asia/Tokyo'",
    "SET standard_conforming_strings = off",
    "SET client_encoding = 'LATIN1'",
    "SET array_nulls = off",
)
SETTINGS = (
    "SELECT pg_catalog.current_setting('search_path'), pg_catalog.current_setting('DateStyle'),"
    " '2025-01-01 00:00:00+00'::timestamptz, pg_catalog.current_setting('transaction_read_only'),"
    " pg_catalog.current_setting('transaction_isolation'), %(text)s::text"
)
SET = ("pg_catalog, pg_temp", "ISO, MDY", "2025-01-01 00:00:00+00", "on", "repeatable read", "Żółć")
_Asked: TypeAlias = tuple[str, Mapping[str, object]]
TRIP: _Asked = ("SELECT 1", {})
WRONG: _Asked = ("SELECT 1 / %(zero)s::int", {"zero": 0})


@asynccontextmanager
async def one_connection(url: str, *, statement_timeout: float = 5.0) -> AsyncIterator[QueryPool]:
    pool = QueryPool(url, min_size=1, max_size=1, statement_timeout=statement_timeout)
    async with pool:
        await pool.wait()
        yield pool


async def fetch(pool: QueryPool, text: str, params: Mapping[str, object]) -> list[TextRow]:
    _, result = await pool.fetch(text, params)
    return await texts_of(result)


async def test_values_arrive_as_they_are(database_url: str) -> None:
    """Whatever a client sends: quotes, backslashes, percent signs, and placeholders of its own."""
    text = "a'b\"c\\d%e%(f)s$1{},NULL\n"
    async with one_connection(database_url) as pool:
        rows = await fetch(
            pool,
            "SELECT %(text)s::text, %(number)s::bigint + 1, %(none)s::text, %(text)s::text,"
            " '%%' || %(list)s::text[]::text, (%(list)s::text[])[1], %(list)s::text[] = '{}'",
            {"text": text, "number": 7, "none": None, "list": [text, None, "", "NULL"]},
        )
        empty = await fetch(pool, "SELECT cardinality(%(list)s::text[])", {"list": []})

    assert rows[0][:4] == (text, "8", None, text)
    assert rows[0][5:] == (text, "f")
    assert rows[0][4] is not None
    assert rows[0][4].startswith("%{")
    assert rows[0][4].endswith(',NULL,"","NULL"}')
    assert empty == [("0",)]


async def test_statement_that_the_socket_does_not_take_at_once(database_url: str) -> None:
    async with one_connection(database_url) as pool:
        for _ in range(3):
            length = "SELECT length(%(text)s::text), %(text)s::text"
            [row] = await fetch(pool, length, {"text": "x" * 20_000_000})
            assert (row[0], len(row[1] or "")) == ("20000000", 20_000_000)


@pytest.mark.parametrize("value", ["\0", "\ud800"])
async def test_value_that_cannot_be_sent_is_an_error(database_url: str, value: str) -> None:
    """A text with NUL would arrive cut off."""
    async with one_connection(database_url) as pool:
        with pytest.raises((psycopg.DataError, UnicodeEncodeError)):
            await fetch(pool, "SELECT %(value)s::text", {"value": value})

        assert await fetch(pool, *TRIP) == [("1",)]


async def test_nothing_is_run_after_an_error(database_url: str) -> None:
    """The transaction has failed; the connection is as good as before."""
    async with one_connection(database_url) as pool:
        for _ in range(3):
            async with pool.session() as connection:
                begin = pool.begin_statements()
                results = await connection.run(
                    [*begin, *(Statement(*asked) for asked in (TRIP, WRONG, TRIP))]
                )
                assert [is_error(result) for result in results] == [False] * len(begin) + [True]
                assert await texts_of(results[-2]) == [("1",)]
                await connection.rollback()

        with pytest.raises(psycopg.errors.UndefinedTable):
            await fetch(pool, "SELECT 1 FROM public.nothing", {})
        assert await fetch(pool, *TRIP) == [("1",)]


async def test_statements_are_prepared_and_few_are_kept(database_url: str) -> None:
    """What is asked for the second time is prepared; of clients' filters there is no end."""
    async with one_connection(database_url) as pool:
        counts: list[int] = []
        for number in range(150):
            for _ in range(3):
                assert await fetch(pool, f"SELECT {number}", {}) == [(str(number),)]
            kept = await fetch(pool, "SELECT count(*) FROM pg_prepared_statements", {})
            counts.append(int(kept[0][0] or 0))
        reused = [await fetch(pool, f"SELECT {number}", {}) for number in (149, 148, 0, 1)]

    assert counts[0] > 0
    assert 90 < max(counts) <= 100
    assert reused == [[("149",)], [("148",)], [("0",)], [("1",)]]


async def test_cancelled_caller_leaves_a_usable_connection(database_url: str) -> None:
    """A client that disconnects ends its query."""
    async with one_connection(database_url, statement_timeout=60.0) as pool:
        task = asyncio.create_task(fetch(pool, "SELECT pg_sleep(50)::text", {}))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert await asyncio.wait_for(fetch(pool, *TRIP), 10) == [("1",)]


async def test_statement_timeout_holds_for_each_statement(database_url: str) -> None:
    async with one_connection(database_url, statement_timeout=0.3) as pool:
        with pytest.raises(psycopg.errors.QueryCanceled):
            await fetch(pool, "SELECT pg_sleep(5)::text", {})

        assert await fetch(pool, *TRIP) == [("1",)]


async def test_lost_connection_is_an_error_and_is_replaced(database_url: str) -> None:
    async with one_connection(database_url) as pool:
        terminate = "SELECT pg_terminate_backend(pg_backend_pid())::text"
        with pytest.raises(psycopg.OperationalError):
            await asyncio.wait_for(fetch(pool, terminate, {}), 10)

        assert await asyncio.wait_for(fetch(pool, *TRIP), 10) == [("1",)]


async def test_settings_are_those_of_the_transaction_alone(database_url: str) -> None:
    """A pooler's next client must not inherit them."""
    async with one_connection(database_url) as pool:
        for _ in range(3):  # not prepared, then prepared
            assert await fetch(pool, SETTINGS, {"text": "Żółć"}) == [SET]
        async with pool.session() as connection:
            cursor = await connection.execute("SHOW search_path")
            assert await cursor.fetchone() == ('"$user", public',)


async def test_pooled_session_with_the_settings_of_another_client(database_url: str) -> None:
    """Its settings are replaced before anything is read, and nothing is prepared in it."""
    with pgbouncer(database_url, sessions=1) as pooler:
        async with one_connection(pooler) as pool:
            for _ in range(4):
                with psycopg.connect(pooler, autocommit=True, prepare_threshold=None) as other:
                    for statement in EVIL:
                        other.execute(statement)
                assert await fetch(pool, SETTINGS, {"text": "Żółć"}) == [SET]
            prepared = await fetch(pool, "SELECT name FROM pg_prepared_statements", {})
            async with QueryExecutor(pool).read_session(()) as session:
                assert await session.fetch_texts_once(*TRIP) == [("1",)]
                assert await session.fetch_texts_once(*TRIP, is_last=True) == [("1",)]

    assert prepared == []


async def test_reads_take_as_few_round_trips_as_possible(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginning, settings, snapshot and end of a transaction are none of their own."""
    async with one_connection(database_url) as pool:
        executor = QueryExecutor(pool)
        trips = 0
        for name in ("run", "execute"):
            method = getattr(QueryConnection, name)

            def counted(*arguments: object, _method: Any = method) -> object:
                nonlocal trips
                trips += 1
                return _method(*arguments)

            monkeypatch.setattr(QueryConnection, name, counted)
        await fetch(pool, *TRIP)
        account, trips = trips, 0
        async with executor.read_session(()) as session:
            await session.fetch_texts_once(*TRIP, is_last=True)
            read_point = await session.fetch_read_point()
        alone, trips = trips, 0
        async with executor.read_session(()) as session:
            await session.fetch_texts_once(*TRIP)
            await session.fetch_texts_once(*TRIP, is_last=True)

    assert (account, alone, trips) == (1, 1, 2)
    assert read_point.snapshot.xmax > 0
    assert read_point.insert_lsn > 0


async def test_read_point_of_a_session_that_asks_nothing(database_url: str) -> None:
    async with (
        one_connection(database_url) as pool,
        QueryExecutor(pool).read_session(()) as session,
    ):
        read_point = await session.fetch_read_point()
        assert await session.fetch_read_point() == read_point
        assert await session.fetch_texts_once(*TRIP, is_last=True) == [("1",)]

    assert read_point.insert_lsn > 0


async def test_one_snapshot_for_all_statements_of_a_session(database_url: str) -> None:
    """What commits between a page and its total is in neither."""
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as writer,
        one_connection(database_url) as pool,
    ):
        await writer.execute("CREATE TABLE docs AS SELECT 1 AS n")
        count: _Asked = ("SELECT count(*), pg_current_snapshot()::text FROM public.docs", {})
        async with QueryExecutor(pool).read_session(()) as session:
            first = await session.fetch_texts_once(*count)
            await writer.execute("INSERT INTO docs VALUES (2)")
            assert await session.fetch_texts_once(*count, is_last=True) == first
            snapshot = (await session.fetch_read_point()).snapshot

        assert first is not None
        assert first[0][0] == "1"
        assert parse_snapshot(first[0][1] or "") == snapshot


@pytest.mark.parametrize("count", [0, 3])
async def test_total_of_a_page_that_was_streamed(database_url: str, count: int) -> None:
    """Libpq would receive the total as if it were streamed too."""
    async with one_connection(database_url) as pool:
        for _ in range(3):
            async with QueryExecutor(pool).read_session(()) as session:
                page = await session.fetch_texts_once(
                    "SELECT generate_series(1, %(n)s::int)", {"n": count}, max_characters=99
                )
                assert len(page or []) == count
                assert await session.fetch_texts_once(*TRIP, is_last=True) == [("1",)]


async def test_failed_read_has_no_rows_and_the_session_goes_on(database_url: str) -> None:
    """Then a younger snapshot is read, as after every error."""
    async with one_connection(database_url) as pool:
        for is_last in (True, False):
            async with QueryExecutor(pool).read_session(()) as session:
                assert await session.fetch_texts_once(*WRONG, is_last=is_last) is None
                assert await session.fetch_texts_once(*WRONG, is_last=True) is None
                assert await session.fetch_texts_once(*TRIP, is_last=True) == [("1",)]

        assert await fetch(pool, *TRIP) == [("1",)]


async def test_transaction_that_cannot_begin_is_an_error(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a query that failed: another answer would tell a client that its filter is wrong."""
    async with one_connection(database_url) as pool:
        broken = [*pool.begin_statements(), Statement(*WRONG)]
        monkeypatch.setattr(pool, "begin_statements", lambda *_: broken)
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with QueryExecutor(pool).read_session(()) as session:
                await session.fetch_texts_once(*TRIP)
        monkeypatch.undo()

        assert await fetch(pool, *TRIP) == [("1",)]


async def test_prepared_statements_are_usable_after_every_kind_of_end(database_url: str) -> None:
    """The driver deallocates all statements after a ROLLBACK, if it has prepared any."""
    async with one_connection(database_url) as pool:
        executor = QueryExecutor(pool)
        for _ in range(3):
            async with pool.connection() as connection:
                for _ in range(10):  # so often that the driver would prepare it
                    await connection.execute("SELECT 2")
            async with executor.read_session(()) as session:
                assert await session.fetch_texts_once(*TRIP) == [("1",)]
                assert await session.fetch_texts_once(*WRONG) is None
            with suppress(LookupError):
                async with executor.read_session(()) as session:
                    assert await session.fetch_texts_once(*TRIP) == [("1",)]
                    raise LookupError
            with pytest.raises(psycopg.errors.DivisionByZero):
                await fetch(pool, *WRONG)
            with pytest.raises(psycopg.errors.DivisionByZero):
                async with pool.connection() as connection:
                    await connection.execute("SELECT 1 / 0")
            async with pool.session() as connection:
                transaction = ReadTransaction(pool, connection, (), keeps_snapshot=True)
                await transaction.begin()
                for _ in range(2):
                    with pytest.raises(psycopg.errors.DivisionByZero):
                        await transaction.fetch_texts(*WRONG)
                    await transaction.recover()
                assert await transaction.fetch_texts(*TRIP) == [("1",)]
                await transaction.finish()
            assert await fetch(pool, *TRIP) == [("1",)]


async def test_statement_whose_result_type_has_changed_fails_once(database_url: str) -> None:
    """A prepared statement isn't planned again when a column's type is altered."""
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin,
        one_connection(database_url) as pool,
    ):
        await admin.execute("CREATE TABLE docs AS SELECT 1 AS n")
        read: _Asked = ("SELECT n FROM public.docs", {})
        for _ in range(3):
            assert await fetch(pool, *read) == [("1",)]
        await admin.execute("ALTER TABLE docs ALTER n TYPE text")
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            await fetch(pool, *read)

        assert await fetch(pool, *read) == [("1",)]


async def test_statements_that_another_deallocated_are_prepared_anew(database_url: str) -> None:
    """One request fails, and the next does not."""
    async with one_connection(database_url) as pool:
        for _ in range(3):
            assert await fetch(pool, *TRIP) == [("1",)]
        async with pool.session() as connection:
            await connection.execute("DEALLOCATE ALL")
        with pytest.raises(psycopg.errors.InvalidSqlStatementName):
            await fetch(pool, *TRIP)

        for _ in range(3):
            assert await fetch(pool, *TRIP) == [("1",)]
