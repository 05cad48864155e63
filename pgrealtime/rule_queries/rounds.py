"""Answers the questions of an evaluation in one transaction, round by round.

The rule engine says what it must know (``Evaluation.questions``), continues with the answers
(``resume``), and may then ask more. Whatever evaluates rules puts its questions through
``QuestionRounds``: the executor and the read sessions of the service, and ``explain``.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import psycopg
import structlog

from pgrealtime.lsn import Xid
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import DatabaseConnection, QueryPool
from pgrealtime.postgres.session import TIMEOUT_ERRORS, ReadTransaction
from pgrealtime.rule_queries.slow_queries import CircuitBreakers, TimeBudget
from pgrealtime.rules.engine.batch_query import Question
from pgrealtime.rules.engine.formula import Test
from pgrealtime.rules.engine.index_keys import RemoteKey
from pgrealtime.rules.sql.reference import SqlQuery

log = structlog.get_logger(__name__)

_TOLERATED_TIMEOUTS_PER_TRANSACTION = 3
"""Of all questions of one batch together."""
_SHORT_TIMEOUT_DIVISOR = 20
"""After that many the batch's other questions have a twentieth of the timeout each: those that
aren't slow need no more, and many that are slow together would delay everything behind them."""
_MAX_LOGGED_REASONS = 1000


class PendingEvaluation(Protocol):
    """An ``Evaluation`` of the rule engine: questions to answer, in rounds."""

    @property
    def xids(self) -> Collection[Xid]:
        """The transactions that the answering snapshot must see."""

    def questions(self) -> list[Question]:
        """Return what must be asked now; nothing if all is known."""

    def resume(self) -> None:
        """Continue once the questions have been asked."""


class UnansweredQuestions:
    """Counts what was denied for want of an answer, and logs each reason once."""

    def __init__(
        self, on_schema_mismatch: Callable[[], None] = lambda: None, *, is_logged: bool = True
    ) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """By collection and kind: ``timeout`` and ``error`` count statements; ``suspended``,
        ``unknown_rows``, ``unreachable`` and ``rows_unread`` what was not asked."""
        self._on_schema_mismatch = on_schema_mismatch
        self._is_logged = is_logged
        self._logged_reasons: set[tuple[str, str]] = set()

    def log_once(self, collection: str, reason: str) -> None:
        """Log a reason once; how often something was denied is counted."""
        known = self._logged_reasons
        if (collection, reason) not in known and len(known) < _MAX_LOGGED_REASONS:
            known.add((collection, reason))
            if self._is_logged:
                log.error("rule.error", collection=collection, error=reason)

    def log_error(self, collection: str, error: psycopg.Error) -> None:
        """Log what a statement failed with, without the values that PostgreSQL quotes."""
        self.log_once(collection, message_without_values(error))
        self.check_schema_mismatch(error)

    def log_suspension(self, collection: str, seconds: float) -> None:
        """Log that a rule's question is not asked for some seconds."""
        if self._is_logged:
            log.warning("rule.suspended", collection=collection, seconds=seconds)

    def check_schema_mismatch(self, error: Exception) -> None:
        """Report an error that may mean that the schema has changed."""
        if isinstance(error, (psycopg.ProgrammingError, psycopg.NotSupportedError)):
            self._on_schema_mismatch()


class BudgetedTransaction(ReadTransaction):
    """A read transaction with a budget of seconds for all its statements together."""

    def __init__(
        self,
        pool: QueryPool,
        connection: DatabaseConnection,
        xids: Collection[Xid],
        budget: TimeBudget | None = None,
        *,
        keeps_snapshot: bool = False,
    ) -> None:
        super().__init__(pool, connection, xids, keeps_snapshot=keeps_snapshot)
        self.budget = budget or TimeBudget()
        self.timeouts_left = _TOLERATED_TIMEOUTS_PER_TRANSACTION
        """Statements that may still time out before a timeout opens its subject's breaker at once,
        and the others' timeouts are shortened (unless the snapshot is kept: a timeout is set as a
        transaction begins)."""

    @property
    def statement_seconds(self) -> float:
        """What a statement of the transaction that begins next may take."""
        seconds = super().statement_seconds
        if self.timeouts_left < 0:
            seconds /= _SHORT_TIMEOUT_DIVISOR
        return min(seconds, self.budget.max_seconds) if self.budget.is_limited else seconds


class QuestionRounds:
    """Puts questions to PostgreSQL; splits what fails, denies what can't be answered."""

    def __init__(
        self,
        unanswered: UnansweredQuestions,
        on_statement_seconds: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._unanswered = unanswered
        self._on_statement_seconds = on_statement_seconds
        self._breakers: CircuitBreakers[Test | RemoteKey] = CircuitBreakers(time.monotonic)

    async def answer(
        self,
        transaction: BudgetedTransaction,
        evaluation: PendingEvaluation,
        questions: Sequence[Question] | None = None,
    ) -> None:
        """Answer an evaluation's questions until there are none left, or the budget is spent.

        ``questions`` is the first round, if the evaluation was asked for it already. Raises
        ``psycopg.Error`` if the connection broke.
        """
        if questions is None:
            questions = evaluation.questions()
        was_slow = self._breakers.has_timed_out
        while questions and not transaction.budget.is_spent():
            # Those that were slow before come last: they use up the timeouts that are tolerated.
            for question in sorted(questions, key=lambda one: was_slow(one.subject)):
                question.is_postponed = not await self._ask_or_split(transaction, question)
            evaluation.resume()
            questions = evaluation.questions()

    def deny(self, evaluation: PendingEvaluation) -> frozenset[str]:
        """Deny all that an evaluation would ask; return the collections that it is about."""
        names: set[str] = set()
        while questions := evaluation.questions():
            names.update(question.subject.collection.name for question in questions)
            evaluation.resume()
        for name in names:
            self._unanswered.counts[name, "unreachable"] += 1
        return frozenset(names)

    async def _ask_or_split(self, transaction: BudgetedTransaction, question: Question) -> bool:
        """Ask a question and, if that fails, its parts; return False if the budget was spent."""
        if transaction.budget.is_spent():
            return False
        if self._breakers.is_open(question.subject):
            self._unanswered.counts[question.subject.collection.name, "suspended"] += 1
            return True
        if await self._ask(transaction, question):
            return True
        if transaction.budget.is_spent():
            return False
        # ``split`` takes over the answers of each part before it yields the next.
        are_done = [await self._ask_or_split(transaction, part) for part in question.split()]
        return all(are_done)

    async def _ask(self, transaction: BudgetedTransaction, question: Question) -> bool:
        """Ask with one statement, if it can be made; return whether nothing is left to ask."""
        name = question.subject.collection.name
        try:
            sql_query = question.sql_query()
            if sql_query is not None:
                return await self._run(transaction, question, sql_query)
        except (psycopg.Error, TimeoutError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 (such as a text that can't be encoded)
            # As if PostgreSQL refused it: the parts are asked, and the one that has it is denied.
            self._unanswered.counts[name, "error"] += 1
            self._unanswered.log_once(name, type(error).__name__)
            await transaction.recover()
            return False
        self._unanswered.counts[name, "unknown_rows"] += 1
        self._unanswered.log_once(
            name, "it reads rows that the transaction changed, whose earlier state is unknown"
        )
        return True

    async def _run(
        self, transaction: BudgetedTransaction, question: Question, sql_query: SqlQuery
    ) -> bool:
        """Run the statement; return whether it was answered."""
        try:
            question.accept(await self._execute_timed(transaction, sql_query))
        except psycopg.Error as error:
            if transaction.is_broken:
                raise
            await self._handle_error(transaction, question, error)
            return False
        return True

    async def _execute_timed(
        self, transaction: BudgetedTransaction, sql_query: SqlQuery
    ) -> list[tuple[object, ...]]:
        began = time.perf_counter()
        try:
            return await transaction.fetch_values(sql_query.sql, sql_query.params)
        finally:
            seconds = time.perf_counter() - began
            transaction.budget.spend(seconds)
            self._on_statement_seconds(seconds)

    async def _handle_error(
        self, transaction: BudgetedTransaction, question: Question, error: psycopg.Error
    ) -> None:
        """Count the error of a statement, and continue in another transaction."""
        name, is_timeout = question.subject.collection.name, isinstance(error, TIMEOUT_ERRORS)
        if is_timeout and transaction.budget.is_limited:
            # Not a timeout of the subject: it is retried with a budget of its own.
            transaction.budget.exhaust()
            return
        self._unanswered.counts[name, "timeout" if is_timeout else "error"] += 1
        self._unanswered.log_error(name, error)
        if is_timeout:
            transaction.timeouts_left -= 1
            is_tolerated = transaction.timeouts_left >= 0
            seconds = self._breakers.record_timeout(question.subject, is_tolerated=is_tolerated)
            if seconds:
                self._unanswered.log_suspension(name, seconds)
        await transaction.recover()
