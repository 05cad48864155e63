"""The pool of read-only connections for rules, accounts and snapshots; ``service.build`` opens it.

A pooled connection may be dead without any error. One that the server closed is discarded when it
is taken from the pool, and one that gives no answer is shut down: a network or proxy that drops all
packets never reports an error.

Every transaction brings its own settings. A setting of the session would not do: a pooler in
transaction mode (PgBouncer's ``pool_mode = transaction``) runs each transaction in some session of
the server, with what its last user set there, and accepts no settings at connect.
"""

import asyncio
import math
import os
import select
import socket
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, LiteralString, TypeAlias, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq.abc import PGresult
from psycopg.rows import TupleRow
from psycopg.sql import Composed, Literal
from psycopg_pool import AsyncConnectionPool

from pgrealtime.catalog.model import Table
from pgrealtime.catalog.privileges import POLICIES_SHOW_ALL_ROWS, has_row_security
from pgrealtime.postgres.pipeline import (
    PreparedStatements,
    Statement,
    exchange,
    raise_if_error,
    values_of,
)
from pgrealtime.snapshot import ReadPoint, parse_read_point

_T = TypeVar("_T")

_GRACE_SECONDS = 1.0
"""For the answer to arrive after the server has ended the statement itself."""


class QueryConnection(psycopg.AsyncConnection[TupleRow]):
    """A connection that is closed when an answer takes much longer than ``answer_seconds``."""

    answer_seconds = 60.0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._prepared_statements: PreparedStatements | None = PreparedStatements()
        self.has_streamed = False
        """Whether the last query was streamed. libpq goes on to receive row by row what is sent
        next in a pipeline, which then is an empty statement."""

    def disable_prepare(self) -> None:
        """Prepare no statements."""
        self._prepared_statements = None

    async def run(self, statements: Sequence[Statement]) -> list[PGresult]:
        """Run statements in one round trip; see ``pipeline.exchange``."""
        if self.has_streamed:
            statements = [Statement(""), *statements]
            self.has_streamed = False
        return await self.wait(exchange(self.pgconn, statements, self._prepared_statements))

    async def wait(self, gen: PQGen[_T], *args: Any, **more: Any) -> _T:
        """Wait as the driver does, and shut the socket down if no answer comes in time.

        Raises:
            psycopg.OperationalError: No answer came.
        """
        wait_seconds = self.answer_seconds + _GRACE_SECONDS
        # Shutting down makes the socket readable: the driver finds the connection lost.
        hang_up = asyncio.get_running_loop().call_later(wait_seconds, self._shut_down_socket)
        try:
            return await super().wait(gen, *args, **more)
        finally:
            hang_up.cancel()

    def _shut_down_socket(self) -> None:
        # Not a cancel: that would ask the same server and wait for its answer. The duplicated file
        # descriptor lets Python close its socket object without closing libpq's.
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)


DatabaseConnection: TypeAlias = QueryConnection

_TRANSACTION_SETTINGS: Final = {
    # With another schema before pg_catalog even "=" could be a user's operator. Temporary types and
    # tables are searched first unless pg_temp is listed (PostgreSQL docs, "search_path").
    "search_path": "pg_catalog, pg_temp",
    "role": None,
    "row_security": "off",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "TimeZone": "UTC",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    # Otherwise backslashes in statements are escapes, and NULL in array parameters is a text.
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    # Statements have hundreds of expressions and run for milliseconds. Compiling them takes seconds
    # each time, in which PostgreSQL heeds no timeout.
    "jit": "off",
}
"""The meaning of a rule and the text forms of values must not depend on the settings of the role or
the database, nor on those that another client of the pooler left in the session. None is a
setting's default."""

_BEGIN_SQL: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
COMMIT: Final = Statement("COMMIT")


def _settings_sql() -> str:
    """Return the columns of a SELECT that makes all settings: a dozen statements take longer.

    They end with the transaction, so a pooler's next client doesn't inherit them.
    """
    timeout = "%(timeout)s"
    values = {
        name: "NULL" if value is None else Literal(value).as_string()
        for name, value in _TRANSACTION_SETTINGS.items()
    } | {"statement_timeout": timeout, "lock_timeout": timeout}
    calls = [f"pg_catalog.set_config('{name}', {value}, true)" for name, value in values.items()]
    return ", ".join(calls)


_BEGIN_READING_SQL: Final = (
    "SELECT pg_catalog.pg_current_snapshot()::pg_catalog.text,"
    " pg_catalog.pg_current_wal_insert_lsn()::pg_catalog.text, " + _settings_sql()
)
"""The LSN is read while the snapshot is held: it lies behind every commit that this sees."""

_ROW_SECURITY_SQL: Final = f"""
SELECT pg_catalog.set_config('row_security', 'on', true)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE (n.nspname, c.relname) IN ({{tables}})
    AND pg_catalog.row_security_active(c.oid) AND NOT ({POLICIES_SHOW_ALL_ROWS}))
"""  # noqa: S608 (text of ours)

_BACKEND_PID_QUERY = "SELECT pg_catalog.pg_backend_pid()"


def read_point_of(result: PGresult) -> ReadPoint:
    """Return the read point that the statements of ``begin_statements`` read."""
    snapshot, insert_lsn = result.get_value(0, 0), result.get_value(0, 1)
    assert snapshot is not None
    assert insert_lsn is not None
    return parse_read_point(snapshot.decode(), insert_lsn.decode())


class QueryPool(AsyncConnectionPool[DatabaseConnection]):
    """A pool whose connections are alive, in read-only transactions that bring their settings.

    ``timeout`` is the wait for a free connection; by default the statement timeout.
    """

    def __init__(
        self,
        conninfo: str = "",
        *,
        statement_timeout: float = 2.0,
        min_size: int = 1,
        max_size: int = 4,
        timeout: float | None = None,
    ) -> None:
        class _Connection(QueryConnection):
            answer_seconds = statement_timeout

        super().__init__(
            conninfo,
            min_size=min_size,
            max_size=max_size,
            timeout=max(statement_timeout, 1.0) if timeout is None else timeout,
            connection_class=_Connection,
            # The driver would deallocate our prepared statements together with its own.
            kwargs={"autocommit": True, "prepare_threshold": None},
            configure=_disable_prepare_behind_pooler,
            open=False,
            name="queries",
        )
        self.statement_timeout = statement_timeout
        self._row_security_sql = ""

    def enable_row_security_for(self, tables: Collection[tuple[str, str]]) -> None:
        """Turn row security on in transactions, if the tables' policies show the role every row.

        Each transaction checks the policies anew. If one of them hides rows, row security stays
        off: PostgreSQL then refuses to read a table with policies, and hides no rows from rules.

        ``tables`` are schemas and names of all that are queried; none turns it off for good.
        """
        names = [f"({Literal(s).as_string()}, {Literal(t).as_string()})" for s, t in tables]
        text = _ROW_SECURITY_SQL.format(tables=", ".join(names))
        self._row_security_sql = text if names else ""

    async def configure_row_security(self, tables: Collection[Table]) -> None:
        """Enable row security in every transaction if it applies to any of the tables.

        Until PostgreSQL has answered, and if it doesn't, each transaction finds out by itself.

        Raises:
            psycopg.Error: PostgreSQL didn't answer.
            PoolTimeout: No connection became free in time.
        """
        # First the safe form, then perhaps the short one: no transaction in between goes without a
        # check.
        self.enable_row_security_for([table.name for table in tables])
        async with self.connection() as connection:
            if not await has_row_security(connection, tables):
                self.enable_row_security_for(())

    def begin_statements(self, timeout_seconds: float = math.inf) -> list[Statement]:
        """Return the statements that begin a transaction; ``read_point_of`` their first result.

        ``timeout_seconds`` shortens the configured statement timeout. All but BEGIN have rows.
        """
        timeout = {"timeout": self._timeout_text(timeout_seconds)}
        statements = [Statement(_BEGIN_SQL), Statement(_BEGIN_READING_SQL, timeout)]
        if self._row_security_sql:
            statements.append(Statement(self._row_security_sql))
        return statements

    def _timeout_text(self, seconds: float) -> str:
        """Return a timeout in milliseconds, at most the configured one."""
        return str(max(1, round(min(seconds, self.statement_timeout) * 1000)))

    @asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncIterator[DatabaseConnection]:  # noqa: ASYNC109 (the library's)
        """Yield a connection in a transaction, which ends with the block.

        Raises:
            PoolTimeout: No connection became free in time.
            psycopg.Error: The transaction can't begin.
        """
        async with self.session(timeout) as connection:
            raise_if_error((await connection.run(self.begin_statements()))[-1])
            yield connection
            await connection.commit()

    @asynccontextmanager
    async def session(self, timeout: float | None = None) -> AsyncIterator[DatabaseConnection]:  # noqa: ASYNC109 (the library's)
        """Yield a connection outside a transaction, for callers that begin several.

        Raises:
            PoolTimeout: No connection became free in time.
        """
        connection = await self.getconn(timeout)
        try:
            yield connection
        except BaseException:
            # The library's own block also commits, which takes two waits where there is nothing to.
            with suppress(psycopg.Error):
                await connection.rollback()
            raise
        finally:
            await self.putconn(connection)

    async def fetch_row(self, query: LiteralString | Composed) -> TupleRow:
        """Return the row of a query without parameters, in one round trip.

        Raises:
            PoolTimeout: No connection became free in time.
            psycopg.Error: There is no answer.
        """
        text = query.as_string() if isinstance(query, Composed) else query
        (row,) = values_of((await self._run([Statement(text)]))[-1])
        return row

    async def fetch(
        self, statement: str, params: Mapping[str, object]
    ) -> tuple[ReadPoint, PGresult]:
        """Return a query's result and its snapshot, in one round trip.

        Raises:
            PoolTimeout: No connection became free in time.
            psycopg.Error: The query fails.
            UnicodeEncodeError: A value can't be encoded.
        """
        results = await self._run([Statement(statement, params)])
        return read_point_of(results[0]), results[-1]

    async def fetch_read_point(self) -> ReadPoint:
        """Return a read point whose snapshot is taken after this call, in one round trip.

        Raises:
            PoolTimeout: No connection became free in time.
            psycopg.Error: There is no answer.
        """
        return read_point_of((await self._run([]))[0])

    async def _run(self, statements: Sequence[Statement]) -> list[PGresult]:
        """Run statements in a transaction of their own, in one round trip."""
        async with self.session() as connection:
            results = await connection.run([*self.begin_statements(), *statements, COMMIT])
            raise_if_error(results[-1])
        return results

    async def getconn(self, timeout: float | None = None) -> DatabaseConnection:  # noqa: ASYNC109 (the library's)
        """Return a connection that is alive.

        Raises:
            PoolTimeout: No connection became free in time.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        while True:
            connection = await super().getconn(max(deadline - time.monotonic(), 0.0))
            # The library waits with ``asyncio.wait_for``, which in Python 3.11 loses a cancellation
            # that comes as the wait ends.
            if task.cancelling() > cancellations:
                await self.putconn(connection)
                raise asyncio.CancelledError
            # After a restart of the server all pooled connections are dead at once, and each query
            # that took one would fail. The library's own ``check`` waits a second after each that
            # it finds dead.
            try:
                is_alive = await _is_alive(connection)
            except asyncio.CancelledError:
                await self.putconn(connection)
                raise
            if is_alive:
                return connection
            await self.putconn(connection)  # the pool replaces it by another


async def _is_alive(connection: DatabaseConnection) -> bool:
    """Whether the connection is alive; without a round trip if nothing waits to be read."""
    if connection.closed:
        return False
    # A connection that the server closed is readable: an error message, or the end of the stream.
    # Not ``select``, which fails for descriptors from 1024 on.
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    if not waiting.poll(0):
        return True
    try:
        await QueryPool.check_connection(connection)
    except psycopg.Error:
        return False
    return True


async def _disable_prepare_behind_pooler(connection: DatabaseConnection) -> None:
    """Keep the driver from preparing statements behind a pooler in transaction mode."""
    # Behind a pooler the next transaction may run in another session, which hasn't prepared the
    # statement. A pooler is recognized by the process id that it gives its client: it has to make
    # one up, because cancel requests come by it.
    cursor = await connection.execute(_BACKEND_PID_QUERY)
    if await cursor.fetchone() != (connection.info.backend_pid,):
        connection.disable_prepare()
