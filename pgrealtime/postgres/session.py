"""A read-only transaction whose snapshot sees given transactions, bounded in time.

Questions about rules, related records and live rows are asked in one, because what they read must
not be older than the event they are asked for.
"""

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum

import psycopg
from psycopg.pq.abc import PGresult

from pgrealtime.lsn import Xid
from pgrealtime.postgres.pipeline import Statement, is_error, raise_if_error, values_of
from pgrealtime.postgres.pool import COMMIT, DatabaseConnection, QueryPool, read_point_of
from pgrealtime.postgres.rows import TextRow, stream_texts, texts_of
from pgrealtime.snapshot import ReadPoint

TIMEOUT_ERRORS = (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable)
"""``lock_timeout`` equals ``statement_timeout``, and PostgreSQL reports the lock's of two equal."""

_UNAVAILABLE_SQLSTATES = ("08", "57P", "53300")
"""Classes of errors: connections, the server's end or start, too many connections."""
_VISIBILITY_TIMEOUT_SECONDS = 5.0
_VISIBILITY_RETRY_SECONDS = 0.005


def is_connection_error(error: Exception) -> bool:
    """Whether an error is the connection's and not the statement's."""
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        return error.sqlstate.startswith(_UNAVAILABLE_SQLSTATES)
    return isinstance(error, psycopg.OperationalError)


def visibility_retry_delays() -> Iterator[float]:
    """Yield the seconds to wait after each snapshot that doesn't see a commit, until too late."""
    deadline = time.monotonic() + _VISIBILITY_TIMEOUT_SECONDS
    while time.monotonic() <= deadline:
        yield _VISIBILITY_RETRY_SECONDS


class _State(Enum):
    BEGINNING = "beginning"
    """The next statement begins the transaction in the same round trip."""
    RUNNING = "running"
    ENDED = "ended"


class ReadTransaction:
    """One read-only transaction on a connection; ``recover`` continues after an error.

    ``keeps_snapshot`` lets ``recover`` continue in the same snapshot, by a savepoint, not in a
    younger one. Then there is nothing to wait for: the read point is not read, and ``xids``, which
    the snapshot must see, has to be empty.
    """

    def __init__(
        self,
        pool: QueryPool,
        connection: DatabaseConnection,
        xids: Collection[Xid],
        *,
        keeps_snapshot: bool = False,
    ) -> None:
        self._pool = pool
        self._connection = connection
        self._xids = xids
        self._keeps_snapshot = keeps_snapshot
        self._read_point: ReadPoint | None = None
        self._state = _State.ENDED
        self._is_begin_refused = False

    @property
    def is_broken(self) -> bool:
        """Whether the connection can't be used any more, or no transaction can begin on it."""
        return self._connection.closed or self._is_begin_refused

    @property
    def statement_seconds(self) -> float:
        """What a statement of the transaction that begins next may take."""
        return self._pool.statement_timeout

    @property
    def read_point(self) -> ReadPoint:
        """Which transactions are seen, and where the WAL ended when the snapshot was taken.

        What is seen commits before that. There is none before the first statement of a transaction
        that needs to see none.
        """
        assert self._read_point is not None
        return self._read_point

    async def begin(self) -> None:
        """Take a snapshot that sees the transactions; if there are none, with the next statement.

        Raises:
            TimeoutError: A transaction stays invisible.
            psycopg.Error: The transaction can't begin.
        """
        if self._keeps_snapshot:
            begin = self._pool.begin_statements(self.statement_seconds)
            results = await self._connection.run([*begin, Statement("SAVEPOINT question")])
            raise_if_error(results[-1])
            self._state = _State.RUNNING
            return
        self._state = _State.BEGINNING
        if not self._xids:
            return
        # A commit can be in the stream before any snapshot sees it: PostgreSQL writes the commit
        # record first and then removes the transaction from the list of those that run.
        for retry_delay in visibility_retry_delays():
            if await self.try_begin():
                return
            await asyncio.sleep(retry_delay)
        raise TimeoutError("a commit stays invisible")

    async def try_begin(self) -> bool:
        """Take a snapshot; return whether it sees the transactions, else leave it again."""
        self._state = _State.BEGINNING
        await self._run([])
        if all(self.read_point.snapshot.sees(xid) for xid in self._xids):
            return True
        await self.finish()
        return False

    async def fetch_read_point(self) -> ReadPoint:
        """Return the read point; begin the transaction if it hasn't begun."""
        if self._state is _State.BEGINNING:
            await self._run([])
        return self.read_point

    async def fetch_texts(
        self, statement: str, params: Mapping[str, object], *, is_last: bool = False
    ) -> list[TextRow]:
        """Return a query's rows in the stream's text forms; ``is_last`` ends the transaction."""
        return await texts_of(await self._fetch(statement, params, is_last=is_last))

    async def stream_texts(
        self, statement: bytes, params: Mapping[str, object], *, max_characters: int
    ) -> list[TextRow]:
        """As ``fetch_texts``, within a size; see ``rows.stream_texts``."""
        await self.fetch_read_point()
        return await stream_texts(
            self._connection, statement, params, max_characters=max_characters
        )

    async def fetch_values(
        self, statement: str, params: Mapping[str, object]
    ) -> list[tuple[object, ...]]:
        """Return a query's rows as the driver's values."""
        return values_of(await self._fetch(statement, params))

    async def finish(self) -> None:
        """Leave the transaction, whatever state it is in; one that failed is rolled back."""
        # Not a ROLLBACK: a SELECT may write WAL, as it prunes pages. After a COMMIT the server
        # flushes that soon, after a ROLLBACK only with the next commit of any session: until then
        # the stream would not reach the insert LSN that a later snapshot reads.
        if self._state is _State.RUNNING:
            await self._connection.run([COMMIT])
        self._state = _State.ENDED

    async def recover(self) -> None:
        """Continue after an error, in a younger snapshot or, if it is kept, in the same one."""
        if self._keeps_snapshot:
            await self._connection.execute("ROLLBACK TO SAVEPOINT question")
        else:
            await self.finish()
            await self.begin()

    async def _fetch(
        self, statement: str, params: Mapping[str, object], *, is_last: bool = False
    ) -> PGresult:
        asked = [Statement(statement, params)]
        return await self._run([*asked, COMMIT] if is_last else asked, is_last=is_last)

    async def _run(self, statements: Sequence[Statement], *, is_last: bool = False) -> PGresult:
        """Run statements, after those that begin the transaction; return the last with rows."""
        assert self._state is not _State.ENDED
        begin: list[Statement] = []
        if self._state is _State.BEGINNING:
            begin = self._pool.begin_statements(self.statement_seconds)
        results = await self._connection.run([*begin, *statements])
        if begin:
            self._is_begin_refused = any(map(is_error, results[: len(begin) - 1]))
        if begin and not self._is_begin_refused:
            self._read_point = read_point_of(results[0])
            self._state = _State.RUNNING
        raise_if_error(results[-1])
        if is_last:
            self._state = _State.ENDED
        return results[-1]


_MAX_RETRY_SECONDS = 10.0
"""A restart takes less; and what waits for an answer delays all that follows it."""
CONNECTION_RETRY_DELAYS = (0.0, 0.1, 0.5, None)
"""Seconds before a query is retried on another connection that may also fail; None: no more."""
_FIRST_RETRY_DELAYS = (0.0, 0.1)
_RETRY_DELAY_SECONDS = 0.5


class DatabaseOutage:
    """Since when no query has been answered, which bounds the retries of all queries together.

    The executor and the reader of live rows share one; readiness asks it too.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    @property
    def is_ongoing(self) -> bool:
        """Whether the last query failed because the database was away."""
        return self._since is not None

    def record_answer(self) -> None:
        """Record that the database has answered."""
        self._since = None

    def retry_delays(self) -> Iterator[float | None]:
        """Yield the seconds to wait before another attempt; None after the last one.

        Advance it before each attempt. Once an outage has lasted too long no query waits, until
        the database has answered one.
        """
        # A broken connection says nothing about the next one, so the first attempts follow at once.
        yield from _FIRST_RETRY_DELAYS
        if self._since is None:
            self._since = time.monotonic()
        while time.monotonic() - self._since < _MAX_RETRY_SECONDS:
            yield _RETRY_DELAY_SECONDS
        yield None
