"""Puts the hub's questions to Postgres: rules, live rows, snapshots. Read only, bounded in time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import asynccontextmanager

import psycopg
import structlog
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.catalog.naming import identifier
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Xid, parse_lsn
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.outage import DatabaseOutage
from pgrealtime.postgres.pool import DatabaseConnection, QueryPool
from pgrealtime.rule_queries.live_rows import LiveRow
from pgrealtime.rule_queries.session import PendingEvaluation
from pgrealtime.rule_queries.slow_queries import CircuitBreakers, TimeBudget
from pgrealtime.rules.engine.batch_query import Question
from pgrealtime.rules.engine.index_keys import RemoteKey
from pgrealtime.rules.engine.test import Test
from pgrealtime.rules.sql.reference import SqlQuery
from pgrealtime.snapshot import SNAPSHOT_QUERY, Snapshot, parse_snapshot

log = structlog.get_logger(__name__)

_LIVE_ROWS_QUERY = sql.SQL(
    "SELECT s.snapshot, s.reach, t.xmin::text, t.{key}{columns}"
    " FROM (SELECT pg_catalog.pg_current_snapshot()::text AS snapshot,"
    " pg_catalog.pg_current_wal_insert_lsn()::text AS reach) s"
    " LEFT JOIN {table} t ON t.{key} = ANY(%(keys)s::text[]::{type}[])"
)
"""The position is read while the snapshot is held: it lies behind every commit that this sees."""
_EXISTING_COLUMNS_QUERY = """
SELECT attname FROM pg_catalog.pg_attribute
WHERE attrelid = pg_catalog.to_regclass(%s) AND attnum > 0 AND NOT attisdropped
"""
_UNREADABLE_SECONDS = 5.0
"""A table whose rows could not be read in time isn't asked again before that."""

_STANDBYS_QUERY = "SELECT pg_catalog.current_setting('synchronous_standby_names')"


def _ignore() -> None:
    pass


def _ignore_seconds(_seconds: float) -> None:
    pass


_SESSION_SNAPSHOT_QUERY = (
    "SELECT pg_catalog.pg_current_snapshot()::pg_catalog.text,"
    " pg_catalog.pg_current_wal_insert_lsn()::pg_catalog.text"
)
_VISIBILITY_TIMEOUT_SECONDS = 5.0
_VISIBILITY_RETRY_SECONDS = 0.005
_TOLERATED_TIMEOUTS_PER_SESSION = 3
"""Time-outs of all questions of one batch together that are borne."""
_SHORT_TIMEOUT_DIVISOR = 20
"""After that many the other questions of the batch have a twentieth of the time each: those that
aren't slow need no more, and many that are slow together hold everybody up."""
_MAX_LOGGED_REASONS = 1000
"""Different reasons that are logged."""


class QueryExecutor:
    """Asks in transactions that bring their settings.

    Args:
        pool: Where to ask.
        on_schema_mismatch: Told when Postgres refuses a query as if the schema were another.
        on_statement_seconds: Told how many seconds each statement took that asked about rules.
    """

    def __init__(
        self,
        pool: QueryPool,
        *,
        on_schema_mismatch: Callable[[], None] = _ignore,
        on_statement_seconds: Callable[[float], None] = _ignore_seconds,
    ) -> None:
        self._pool = pool
        self._on_schema_mismatch = on_schema_mismatch
        self._on_statement_seconds = on_statement_seconds
        self.unanswered_counts: Counter[tuple[str, str]] = Counter()
        """What had no answer, by collection and why: ``timeout`` and ``error`` count statements,
        ``suspended``, ``unknown_rows`` and ``unreachable`` what was not put."""
        self._logged_reasons: set[tuple[str, str]] = set()
        self._unreadable_until: dict[str, float] = {}
        """By collection, until when its rows aren't read: a statement took too long."""
        self._may_have_standbys = True
        self.outage = DatabaseOutage(time.monotonic)
        """Whether the database is away, as far as questions tell."""
        self._breakers: CircuitBreakers[Test | RemoteKey] = CircuitBreakers(time.monotonic)

    async def fetch_snapshot(self) -> tuple[str, str, bool]:
        """Return the row of ``SNAPSHOT_QUERY``.

        Raises:
            DatabaseUnreachableError: There was no answer.
        """
        try:
            snapshot, insert_lsn, is_in_recovery = await self._pool.fetch_row(SNAPSHOT_QUERY)
        except (psycopg.Error, PoolTimeout) as error:
            raise DatabaseUnreachableError(
                "the database gave no snapshot", detail=message_without_values(error)
            ) from error
        return snapshot, insert_lsn, is_in_recovery

    async def verify_assumptions(self, assumptions: CatalogAssumptions) -> bool:
        """Return whether the catalogue says what is believed of tables.

        Raises:
            DatabaseUnreachableError: There was no answer.
        """
        try:
            roots, attributes = await self._pool.fetch_row(assumptions.statement())
        except (psycopg.Error, PoolTimeout) as error:
            raise DatabaseUnreachableError(
                "the catalogue can't be asked", detail=message_without_values(error)
            ) from error
        return assumptions.is_confirmed_by(roots, attributes)

    async def has_synchronous_standbys(self) -> bool:
        """Whether commits may wait for a standby, and so be decoded long before they are visible.

        A database that doesn't answer has the answer of before; at first, that they may.
        """
        try:
            self._may_have_standbys = await self._pool.fetch_row(_STANDBYS_QUERY) != ("",)
        except (psycopg.Error, PoolTimeout):
            log.debug("standbys.unknown")
        return self._may_have_standbys

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        """Put what the judging wants to know, until nothing is left.

        All of it is asked of one snapshot, in which the events' transactions are visible. Whatever
        can't be answered is denied and counted; it never keeps another from its answer.

        Args:
            evaluation: What wants to know.
            budget: What is asked once it is spent is neither answered nor denied; None is no
                bound but the time-out of each statement.

        Returns:
            The collections whose rows nobody could be asked about: that is not their rules'
            fault, and who depends on those may miss something.
        """
        budget = budget or TimeBudget()
        for patience in self.outage.retry_delays():
            inquiries = evaluation.questions()
            if not inquiries or budget.is_spent():
                return frozenset()
            began = time.perf_counter()
            begins_within = asyncio.timeout(budget.max_seconds if budget.is_limited else None)
            try:
                async with begins_within, self._pool.session() as connection:
                    session = _ReadTransaction(self._pool, connection, evaluation.xids, budget)
                    await session.begin()
                    begins_within.reschedule(None)
                    if budget.is_limited:
                        budget.spend(time.perf_counter() - began)
                    self.outage.record_answer()
                    await self.answer_questions_in(session, evaluation, inquiries)
                    await session.end()
            except TimeoutError as error:
                if begins_within.expired():
                    budget.exhaust()
                    return frozenset()
                return self._deny_all(evaluation, error)
            except psycopg.Error as error:
                if patience is None:
                    return self._deny_all(evaluation, error)
                await asyncio.sleep(patience)
        return frozenset()

    def _deny_all(self, evaluation: PendingEvaluation, error: Exception) -> frozenset[str]:
        log.warning("questions.unanswered", error=message_without_values(error))
        about: set[str] = set()
        while inquiries := evaluation.questions():
            about.update(inquiry.collection_name for inquiry in inquiries)
            evaluation.resume()
        for name in about:
            self.unanswered_counts[name, "unreachable"] += 1
        return frozenset(about)

    @asynccontextmanager
    async def read_session(
        self, xids: Sized[Xid], max_seconds: float | None = None
    ) -> AsyncIterator[PooledReadSession]:
        """Open a snapshot in which the transactions are visible, for several questions.

        Args:
            xids: The transactions.
            max_seconds: That the snapshot and all questions may take together; None is no bound but
                the time-out of each statement.

        Raises:
            psycopg.Error: There is none to be had; or the connection broke.
            PoolTimeout: Every connection is in use.
            TimeoutError: A transaction stays invisible, or the seconds are over.
        """
        budget = (
            TimeBudget()
            if max_seconds is None
            else TimeBudget(is_limited=True, max_seconds=max_seconds)
        )
        began, begins_within = time.perf_counter(), asyncio.timeout(max_seconds)
        async with begins_within, self._pool.session() as connection:
            session = _ReadTransaction(self._pool, connection, xids, budget)
            await session.begin()
            begins_within.reschedule(None)
            budget.spend(time.perf_counter() - began)
            self.outage.record_answer()
            yield PooledReadSession(self, session)
            await session.end()

    async def answer_questions_in(
        self,
        transaction: _ReadTransaction,
        evaluation: PendingEvaluation,
        questions: Sequence[Question],
    ) -> None:
        """Put what is to be known, in a session that has begun.

        Raises:
            psycopg.Error: The connection broke.
        """
        budget = transaction.budget
        while questions and not budget.is_spent():
            # The slow ones last: they use up the time-outs that are tolerated.
            for inquiry in sorted(questions, key=self._has_timed_out):
                inquiry.is_postponed = not await self._ask_or_split(transaction, inquiry)
            evaluation.resume()
            questions = evaluation.questions()

    def _has_timed_out(self, question: Question) -> bool:
        return self._breakers.has_timed_out(question.subject)

    async def _ask_or_split(self, transaction: _ReadTransaction, question: Question) -> bool:
        """Put an inquiry; if it fails its parts, so that only what can't be answered is denied.

        Returns:
            Whether it was answered or denied; else the session's budget is spent.
        """
        if transaction.budget.is_spent():
            return False
        if self._breakers.is_open(question.subject):
            self.unanswered_counts[question.collection_name, "suspended"] += 1
            return True
        if await self._ask_whole(transaction, question):
            return True
        if transaction.budget.is_spent():
            return False
        parts: Iterator[Question] = question.split()
        are_put = [await self._ask_or_split(transaction, part) for part in parts]
        return all(are_put)

    async def _ask_whole(self, transaction: _ReadTransaction, inquiry: Question) -> bool:
        """Put one statement, if it can be made; return whether there is nothing left to ask.

        A value that nobody thought of, a text that can't be encoded, is as one that Postgres
        refuses: the parts are put, and who it is about is denied alone.
        """
        try:
            question = inquiry.sql_query()
            if question is not None:
                return await self._run(transaction, inquiry, question)
        except (psycopg.Error, TimeoutError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 (see above)
            self.unanswered_counts[inquiry.collection_name, "error"] += 1
            self._log_reason_once(inquiry.collection_name, type(error).__name__)
            await transaction.restart()
            return False
        self._record_denial(
            inquiry, "rows it reads were touched by the transaction and aren't known"
        )
        return True

    async def _run(
        self, transaction: _ReadTransaction, question: Question, sql_query: SqlQuery
    ) -> bool:
        """Put one statement; return whether it was answered."""
        try:
            question.accept(await self._execute_timed(transaction, sql_query))
        except psycopg.Error as error:
            if transaction.is_broken:
                raise
            is_late = isinstance(error, _TIMEOUT_ERRORS)
            if is_late and transaction.budget.is_limited:
                transaction.budget.exhaust()  # not the time-out: it will be asked again
                return False
            self.unanswered_counts[question.collection_name, "timeout" if is_late else "error"] += 1
            self.report_error(question.collection_name, error)
            if is_late:
                transaction.timeouts_left -= 1
                self._record_timeout(question, is_tolerated=transaction.timeouts_left >= 0)
            await transaction.restart()
            return False
        return True

    async def _execute_timed(
        self, transaction: _ReadTransaction, sql_query: SqlQuery
    ) -> list[tuple[object, ...]]:
        began = time.perf_counter()
        try:
            return await transaction.fetch_answer(sql_query)
        finally:
            seconds = time.perf_counter() - began
            transaction.budget.spend(seconds)
            self._on_statement_seconds(seconds)

    def _record_timeout(self, question: Question, *, is_tolerated: bool) -> None:
        seconds = self._breakers.record_timeout(question.subject, is_tolerated=is_tolerated)
        if seconds:
            log.warning("rule.suspended", collection=question.collection_name, seconds=seconds)

    def report_error(self, collection: str, error: psycopg.Error) -> None:
        """Say what a question failed with."""
        self._log_reason_once(collection, message_without_values(error))
        self._report_schema_mismatch(error)

    def _record_denial(self, question: Question, reason: str) -> None:
        self.unanswered_counts[question.collection_name, "unknown_rows"] += 1
        self._log_reason_once(question.collection_name, reason)

    def _log_reason_once(self, collection: str, reason: str) -> None:
        """Log a reason once; how often something was denied is counted."""
        if (collection, reason) not in self._logged_reasons and len(
            self._logged_reasons
        ) < _MAX_LOGGED_REASONS:
            self._logged_reasons.add((collection, reason))
            log.error("rule.error", collection=collection, error=reason)

    async def fetch_live_rows(
        self, events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return what the tables hold now of columns that the events' rows lack.

        Every snapshot sees the events' transactions. A record that is gone leaves its key out, and
        a column that is gone itself.

        Returns:
            The rows by collection name and id, and the collections whose rows couldn't be read.
        """
        unread: set[str] = set()
        wanted: defaultdict[str, list[Event]] = defaultdict(list)
        for event in events:
            wanted[event.collection.name].append(event)
        found: dict[tuple[str, str], LiveRow] = {}
        for name, concerned in wanted.items():
            try:
                rows = await self._fetch_live_rows_with_retries(concerned)
            except (psycopg.Error, PoolTimeout, TimeoutError) as error:
                log.warning("live_row.failed", collection=name, error=message_without_values(error))
                self.unanswered_counts[name, "rows_unread"] += 1
                unread.add(name)
                continue
            found.update({(name, record_id): row for record_id, row in rows.items()})
        return found, frozenset(unread)

    async def _fetch_live_rows_with_retries(self, events: Sequence[Event]) -> dict[str, LiveRow]:
        """Read rows of one collection; where another attempt may succeed, make it.

        Raises:
            psycopg.Error: None did.
            TimeoutError: A commit stays invisible, or the table could not be read a moment ago.
        """
        collection = events[0].collection
        if time.monotonic() < self._unreadable_until.get(collection.name, 0.0):
            raise TimeoutError("the table couldn't be read in time a moment ago")
        lacking = frozenset[str]().union(*(event.missing_columns for event in events))
        columns = [column.name for column in collection.table.columns if column.name in lacking]
        is_repeated = False
        for patience in self.outage.retry_delays():
            try:
                rows = await self._fetch_visible_live_rows(events, columns)
            except psycopg.errors.UndefinedColumn as error:
                self._report_schema_mismatch(error)
                if is_repeated:
                    raise
                existing = await self._fetch_existing_columns(collection)
                columns = [name for name in columns if name in existing]
                is_repeated = True
            except _TIMEOUT_ERRORS:
                if is_repeated:
                    self._unreadable_until[collection.name] = time.monotonic() + _UNREADABLE_SECONDS
                    raise
                is_repeated = True
            except psycopg.Error as error:
                self._report_schema_mismatch(error)
                if patience is None or not _is_connection_error(error):
                    raise
                await asyncio.sleep(patience)
            else:
                self.outage.record_answer()
                return rows
        raise TimeoutError("the table changes all the time")  # pragma: no cover

    async def _fetch_existing_columns(self, collection: Collection) -> frozenset[str]:
        """Return the columns that the table has now."""
        name = sql.Identifier(*collection.table.name).as_string()
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_EXISTING_COLUMNS_QUERY, (name,))
            return frozenset([column async for (column,) in cursor])

    async def _fetch_visible_live_rows(
        self, events: Sequence[Event], columns: Sequence[str]
    ) -> dict[str, LiveRow]:
        """Read rows in a snapshot that sees the events' transactions.

        Raises:
            TimeoutError: One stays invisible.
        """
        xids = {event.xid for event in events}
        ids = list({event.record_id: None for event in events})
        deadline = time.monotonic() + _VISIBILITY_TIMEOUT_SECONDS
        while True:
            snapshot, rows = await self._query_live_rows(events[0].collection, ids, columns)
            if all(snapshot.sees(xid) for xid in xids):
                return rows
            if time.monotonic() > deadline:
                raise TimeoutError("a commit stays invisible")
            await asyncio.sleep(_VISIBILITY_RETRY_SECONDS)

    def _report_schema_mismatch(self, error: Exception) -> None:
        if isinstance(error, (psycopg.ProgrammingError, psycopg.NotSupportedError)):
            self._on_schema_mismatch()

    async def _query_live_rows(
        self, collection: Collection, ids: list[str], columns: Sequence[str]
    ) -> tuple[Snapshot, dict[str, LiveRow]]:
        key_type = collection.key.type.base
        query = _LIVE_ROWS_QUERY.format(
            key=identifier(collection.key.name),
            columns=sql.SQL("").join(
                sql.SQL(", t.{}").format(identifier(name)) for name in columns
            ),
            table=identifier(*collection.table.name),
            type=identifier(key_type.schema, key_type.name),
        )
        async with self._pool.connection() as connection:
            cursor = await connection.execute(query, {"keys": ids})
            result = cursor.pgresult
            # At least one row comes, be it without a record.
            assert result is not None
            snapshot = parse_snapshot((result.get_value(0, 0) or b"").decode())
            reach = parse_lsn((result.get_value(0, 1) or b"").decode())
            rows: dict[str, LiveRow] = {}
            for place in range(result.ntuples):
                # Raw text: the same form as in the stream, whatever the column's type.
                xid, key, *values = (
                    None if value is None else value.decode()
                    for value in (result.get_value(place, n) for n in range(2, result.nfields))
                )
                if xid is not None:
                    row: Row = dict(zip(columns, values, strict=True))
                    rows[key or ""] = LiveRow(int(xid), row, snapshot, reach)
            return snapshot, rows


class PooledReadSession:
    """One snapshot to read in; after an error a younger one.

    Attributes:
        has_failed: Whether a query had no answer, or not in time, though it should have had one.
    """

    def __init__(self, executor: QueryExecutor, transaction: _ReadTransaction) -> None:
        self._executor = executor
        self._transaction = transaction
        self.has_failed = False

    @property
    def snapshot(self) -> Snapshot:
        """Which transactions are seen."""
        return self._transaction.snapshot

    @property
    def insert_lsn(self) -> LSN:
        """Where the WAL ended when the snapshot was there: all that it sees commits before."""
        return self._transaction.insert_lsn

    async def fetch_texts(
        self, statement: sql.Composed, params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]] | None:
        """Return the rows in the stream's text forms; None if the query fails.

        One that takes too long is put once more: a lock may be gone by then.

        Raises:
            psycopg.Error: The connection broke.
            TimeoutError: The reading's seconds are over.
        """
        budget = self._transaction.budget
        for is_last in (self.has_failed, True):
            began = time.perf_counter()
            try:
                found = await self._transaction.fetch_texts(statement, params)
            except psycopg.Error as error:
                if self._transaction.is_broken:
                    raise
                if budget.is_limited and isinstance(error, _TIMEOUT_ERRORS):
                    raise TimeoutError from error
                self._executor.report_error("", error)
                await self._transaction.restart()
                if isinstance(error, psycopg.errors.InsufficientPrivilege):
                    return None  # the operator's wish, or told at the start
                if is_last or not isinstance(error, _TIMEOUT_ERRORS):
                    break
            else:
                budget.spend(time.perf_counter() - began)
                self._raise_if_spent()
                return found
        self.has_failed = True
        return None

    async def answer_questions(self, evaluation: PendingEvaluation) -> None:
        """Put what is to be known, until nothing is left; what can't be answered is denied.

        Raises:
            psycopg.Error: The connection broke.
            TimeoutError: The reading's seconds are over.
        """
        await self._executor.answer_questions_in(
            self._transaction, evaluation, evaluation.questions()
        )
        self._raise_if_spent()

    def _raise_if_spent(self) -> None:
        if self._transaction.budget.is_spent():
            raise TimeoutError


def _is_connection_error(error: Exception) -> bool:
    """Whether the error is the connection's and not the statement's."""
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        return error.sqlstate.startswith(_UNAVAILABLE_SQLSTATES)
    return isinstance(error, psycopg.OperationalError)


_UNAVAILABLE_SQLSTATES = ("08", "57P", "53300")
"""Classes of errors: connections, the server's end or start, too many connections."""


_TIMEOUT_ERRORS = (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable)
"""Of two equal time-outs, Postgres tells of the lock's."""


class _ReadTransaction:
    """One read-only transaction after another, each seeing the events' transactions.

    Attributes:
        timeouts_left: Statements that may still run into the time-out before their rule is
            suspended at once, and the others are hurried.
        budget: For all statements together.
        snapshot: What is seen.
        insert_lsn: Where the WAL ended when the snapshot was there.
    """

    def __init__(
        self,
        pool: QueryPool,
        connection: DatabaseConnection,
        xids: Sized[Xid],
        budget: TimeBudget,
    ) -> None:
        self.budget = budget
        self._pool = pool
        self._connection = connection
        self._xids = xids
        self.timeouts_left = _TOLERATED_TIMEOUTS_PER_SESSION
        self.snapshot = Snapshot(0, 0, frozenset())
        self.insert_lsn = LSN(0)

    @property
    def is_broken(self) -> bool:
        """Whether the connection is of no use any more."""
        return self._connection.closed

    async def begin(self) -> None:
        """Take a snapshot that sees the transactions.

        A commit can be in the stream before anybody sees it: then ask again.

        Raises:
            TimeoutError: One stays invisible.
        """
        deadline = time.monotonic() + _VISIBILITY_TIMEOUT_SECONDS
        while True:
            begin = self._pool.begin_sql(self._statement_seconds())
            cursor = await self._connection.execute(f"{begin}; {_SESSION_SNAPSHOT_QUERY}".encode())
            await cursor.set_result(-1)
            row = await cursor.fetchone()
            assert row is not None
            self.snapshot, self.insert_lsn = parse_snapshot(row[0]), parse_lsn(row[1])
            if all(self.snapshot.sees(xid) for xid in self._xids):
                return
            await self.end()
            if time.monotonic() > deadline:
                raise TimeoutError("a commit stays invisible")
            await asyncio.sleep(_VISIBILITY_RETRY_SECONDS)

    def _statement_seconds(self) -> float:
        """Return what a statement may take."""
        seconds = self._pool.statement_timeout
        if self.timeouts_left < 0:
            seconds /= _SHORT_TIMEOUT_DIVISOR
        return min(seconds, self.budget.max_seconds) if self.budget.is_limited else seconds

    async def fetch_texts(
        self, statement: sql.Composed, params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]]:
        """Return the rows as texts, of the same form as in the stream whatever their types."""
        result = (await self._connection.execute(statement, params)).pgresult
        assert result is not None  # an executed query has one
        return [
            tuple(
                [
                    None if value is None else value.decode()
                    for value in (result.get_value(place, n) for n in range(result.nfields))
                ]
            )
            for place in range(result.ntuples)
        ]

    async def fetch_answer(self, sql_query: SqlQuery) -> list[tuple[object, ...]]:
        """Return the answer."""
        cursor = await self._connection.execute(sql_query.sql.encode(), sql_query.params)
        return await cursor.fetchall()

    async def end(self) -> None:
        """Leave the transaction, whatever state it is in; one that failed is rolled back.

        A SELECT may write to the WAL, as it prunes pages. After a COMMIT the server flushes that
        soon, after a ROLLBACK with the next commit of anybody: until then the stream would not
        come to where a later snapshot finds the end of the WAL.
        """
        await self._connection.execute("COMMIT")

    async def restart(self) -> None:
        """Go on after an error, with a younger snapshot."""
        await self.end()
        await self.begin()
