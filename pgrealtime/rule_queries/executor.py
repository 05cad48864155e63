"""Runs the hub's queries: rules, live rows, snapshots. Read only, with time limits.

It opens the transactions and repeats what failed with the connection; ``rounds`` asks the questions
of rules in them, ``session`` is such a transaction for several questions, and ``live_rows`` reads
rows.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from collections.abc import Collection as Sized
from contextlib import asynccontextmanager, contextmanager

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.lsn import Xid
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.postgres.session import DatabaseOutage
from pgrealtime.rule_queries.live_rows import IncompleteRow, LiveRow, LiveRowReader
from pgrealtime.rule_queries.rounds import (
    BudgetedTransaction,
    PendingEvaluation,
    QuestionRounds,
    UnansweredQuestions,
)
from pgrealtime.rule_queries.session import ReadSession
from pgrealtime.rule_queries.slow_queries import TimeBudget
from pgrealtime.snapshot import ReadPoint

log = structlog.get_logger(__name__)

_STANDBYS_QUERY = "SELECT pg_catalog.current_setting('synchronous_standby_names')"


class QueryExecutor:
    """Asks PostgreSQL in transactions that bring their own settings.

    ``on_schema_mismatch`` is called when PostgreSQL refuses a query as if the schema were another,
    ``on_statement_seconds`` with the seconds that each statement about rules took. ``outage`` says
    whether the database is away, as far as questions tell.
    """

    def __init__(
        self,
        pool: QueryPool,
        *,
        on_schema_mismatch: Callable[[], None] = lambda: None,
        on_statement_seconds: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._pool = pool
        self.outage = DatabaseOutage()
        self._unanswered = UnansweredQuestions(on_schema_mismatch)
        self.unanswered_counts = self._unanswered.counts
        self._rounds = QuestionRounds(self._unanswered, on_statement_seconds)
        self._live_rows = LiveRowReader(pool, self.outage, self._unanswered)
        self._may_have_standbys = True

    async def fetch_read_point(self) -> ReadPoint:
        """Return a read point of after this call; raises ``DatabaseUnreachableError``."""
        with _database_errors():
            return await self._pool.fetch_read_point()

    async def verify_assumptions(self, assumptions: CatalogAssumptions) -> bool:
        """Return whether the catalogue confirms them; raises ``DatabaseUnreachableError``."""
        with _database_errors():
            roots, attributes = await self._pool.fetch_row(assumptions.statement())
        return assumptions.is_confirmed_by(roots, attributes)

    async def has_synchronous_standbys(self) -> bool:
        """Whether commits may wait for a standby, and so be decoded long before they are visible.

        Without an answer the last one holds; before the first, that they may.
        """
        try:
            self._may_have_standbys = await self._pool.fetch_row(_STANDBYS_QUERY) != ("",)
        except (psycopg.Error, PoolTimeout):
            log.debug("standbys.unknown")
        return self._may_have_standbys

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        """Answer an evaluation's questions; return the collections of which none could be asked.

        All are asked of one snapshot, which sees the events' transactions. What can't be answered
        is denied and counted; it never keeps another question from its answer. What is asked once
        the budget is spent is neither. The returned collections' rules are not at fault: their
        subscribers may miss events.
        """
        if not evaluation.questions():
            return frozenset()
        budget = budget or TimeBudget()
        for retry_delay in self.outage.retry_delays():
            questions = evaluation.questions()
            if not questions or budget.is_spent():
                return frozenset()
            began = time.perf_counter()
            # Bounds the wait for a connection and a snapshot, not the questions: these are bounded
            # by the statement timeout, and an answer that is nearly there is not thrown away.
            begin_timeout = asyncio.timeout(budget.max_seconds if budget.is_limited else None)
            try:
                async with begin_timeout, self._pool.session() as connection:
                    transaction = BudgetedTransaction(
                        self._pool, connection, evaluation.xids, budget
                    )
                    await transaction.begin()
                    _lift_timeout(begin_timeout)
                    if budget.is_limited:
                        budget.spend(time.perf_counter() - began)
                    await self._rounds.answer(transaction, evaluation, questions)
                    await transaction.finish()
                    self.outage.record_answer()
            except TimeoutError as error:
                if begin_timeout.expired():
                    budget.exhaust()
                    return frozenset()
                return self._deny(evaluation, error)
            except psycopg.Error as error:
                if retry_delay is None:
                    return self._deny(evaluation, error)
                await asyncio.sleep(retry_delay)
        return frozenset()

    def _deny(self, evaluation: PendingEvaluation, error: Exception) -> frozenset[str]:
        log.warning("rule_query.unanswered", error=message_without_values(error))
        return self._rounds.deny(evaluation)

    @asynccontextmanager
    async def read_session(
        self, xids: Sized[Xid], max_seconds: float | None = None
    ) -> AsyncIterator[ReadSession]:
        """Open a snapshot that sees the transactions, for several questions.

        ``max_seconds`` bounds the snapshot and all questions together; None leaves the timeout of
        each statement. Raises ``psycopg.Error`` (no connection, or it broke), ``PoolTimeout``
        (every connection is in use), ``TimeoutError`` (a transaction stays invisible, or the
        seconds are over).
        """
        budget = TimeBudget()
        if max_seconds is not None:
            budget = TimeBudget(is_limited=True, max_seconds=max_seconds)
        began, begin_timeout = time.perf_counter(), asyncio.timeout(max_seconds)
        async with begin_timeout, self._pool.session() as connection:
            transaction = BudgetedTransaction(self._pool, connection, xids, budget)
            await transaction.begin()
            _lift_timeout(begin_timeout)
            budget.spend(time.perf_counter() - began)
            yield ReadSession(transaction, self._rounds, self._unanswered)
            await transaction.finish()
            self.outage.record_answer()

    async def fetch_live_rows(
        self, images: Sequence[IncompleteRow]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return the columns that row images lack, as they are now; see ``LiveRowReader.fetch``."""
        return await self._live_rows.fetch(images)


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except (psycopg.Error, PoolTimeout) as error:
        raise DatabaseUnreachableError(
            "the database did not answer", detail=message_without_values(error)
        ) from error


def _lift_timeout(timeout: asyncio.Timeout) -> None:
    """Let a timeout no longer expire; raises ``TimeoutError`` if it has.

    ``asyncio.wait_for``, by which the pool waits, drops a cancellation that arrives together with
    the result (before Python 3.12). Then the timeout has expired and this task was not told.
    """
    if timeout.expired():
        raise TimeoutError("no snapshot in time")
    timeout.reschedule(None)
