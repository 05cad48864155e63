"""Runs the statements of ``explain`` in one read-only snapshot, each with a time limit.

The rule engine's questions go through the same rounds as in the service; the reference query and
the parts of a rule are queried separately. A statement that fails is rolled back to a savepoint, so
that later statements still use the same snapshot.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import psycopg
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.catalog.model import canonical_id
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.errors import DatabaseUnreachableError, SetupError
from pgrealtime.explain.text import HIDDEN_TEXT, ConditionVerdict, format_value
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.postgres.rows import identifier, rows_by_key_statement
from pgrealtime.rule_queries import rounds
from pgrealtime.rules.sql.breakdown import MAX_SHOWN_VALUES, HiddenValue, KnownValue, OperandValue
from pgrealtime.rules.sql.reference import SqlQuery


@asynccontextmanager
async def open_explain_session(pool: QueryPool) -> AsyncIterator[ExplainSession]:
    """Open a read-only snapshot for the statements of one explanation.

    Raises:
        DatabaseUnreachableError: No connection can be made, or it is lost.
    """
    try:
        async with pool.session() as connection:
            transaction = rounds.BudgetedTransaction(pool, connection, (), keeps_snapshot=True)
            await transaction.begin()
            yield ExplainSession(transaction)
            await transaction.finish()
    except (psycopg.OperationalError, PoolTimeout) as error:
        raise DatabaseUnreachableError(
            "the database doesn't answer", detail=message_without_values(error)
        ) from error


class ExplainSession:
    """Runs statements in one snapshot; a statement that fails does not end it."""

    def __init__(self, transaction: rounds.BudgetedTransaction) -> None:
        self._transaction = transaction
        self._rounds = rounds.QuestionRounds(rounds.UnansweredQuestions(is_logged=False))

    async def fetch_rows(self, query: SqlQuery) -> list[tuple[object, ...]] | ConditionVerdict:
        """Return a query's rows, or why there are none."""
        try:
            return await self._transaction.fetch_values(query.sql, query.params)
        except psycopg.Error as error:
            if self._transaction.is_broken:
                raise
            await self._transaction.recover()
            # Without what may show a value of the row.
            return ConditionVerdict(None, message_without_values(error))

    async def fetch_verdict(self, query: SqlQuery) -> ConditionVerdict:
        """Return the value of a condition."""
        match await self.fetch_rows(query):
            case ConditionVerdict() as fault:
                return fault
            case [(bool() | None as value,)]:
                return ConditionVerdict(value)
            case other:
                raise AssertionError(f"a condition of one row has one value, not {len(other)}")

    async def fetch_is_found(
        self, statement: str, params: Mapping[str, object]
    ) -> ConditionVerdict:
        """Return whether a statement has rows. They aren't decoded, whatever their types."""
        try:
            rows = await self._transaction.fetch_texts(statement, params)
        except psycopg.Error as error:
            if self._transaction.is_broken:
                raise
            await self._transaction.recover()
            return ConditionVerdict(None, message_without_values(error))
        return ConditionVerdict(bool(rows))

    async def fetch_row_by_id(self, collection: Collection, record_id: str) -> Row | None:
        """Return the record's row in the stream's text forms.

        Raises:
            SetupError: The table can't be read.
        """
        wanted = canonical_id(record_id, collection.key.type)
        if wanted is None:
            return None
        names = tuple([column.name for column in collection.table.columns])
        statement = rows_by_key_statement(collection.table.name, collection.key, names)
        try:
            rows = await self._transaction.fetch_texts(statement, {"ids": [wanted]})
        except (psycopg.DataError, UnicodeEncodeError):
            return None  # the text can't be a value of this database
        except psycopg.ProgrammingError as error:
            raise SetupError(
                f'"{collection.table.name}" can\'t be read',
                detail=message_without_values(error),
                hint="Run pgrealtime check to see what is missing.",
                code="select_not_granted",
            ) from error
        return dict(zip(names, rows[0], strict=True)) if rows else None

    async def text_forms(
        self, collection: Collection, values: Mapping[str, object]
    ) -> Row | ConditionVerdict:
        """Return values of columns, given as JSON has them, in the stream's text forms.

        If the table can't have them: why.
        """
        statement = sql.SQL(
            "SELECT {} FROM pg_catalog.jsonb_populate_record(NULL::{}, %(row)s::pg_catalog.jsonb) r"
        ).format(
            sql.SQL(", ").join([identifier("r", name) for name in values]),
            identifier(*collection.table.name),
        )
        params = {"row": json.dumps(dict(values))}
        try:
            rows = await self._transaction.fetch_texts(statement.as_string(), params)
        except psycopg.Error as error:
            if self._transaction.is_broken:
                raise
            await self._transaction.recover()
            return ConditionVerdict(None, message_without_values(error))
        return dict(zip(values, rows[0], strict=True))

    async def answer_questions(self, evaluation: rounds.PendingEvaluation) -> None:
        """Answer the engine's questions; what can't be answered is denied."""
        await self._rounds.answer(self._transaction, evaluation)

    async def format_operand(self, operand: OperandValue) -> str:
        """Return the values of an operand as text."""
        match operand.value:
            case HiddenValue():
                return HIDDEN_TEXT
            case KnownValue(value):
                return format_value(value)
            case SqlQuery() as question:
                rows = await self.fetch_rows(question)
        if isinstance(rows, ConditionVerdict):
            return f"not available ({rows.failure})"
        values = sorted(
            _format_operand_value(text, is_number, is_flag=operand.is_boolean)
            for text, is_number in rows
        )
        more = ["and more"] if len(values) > MAX_SHOWN_VALUES else []
        return ", ".join([*values[:MAX_SHOWN_VALUES], *more])


def _format_operand_value(text: object, is_number: object, *, is_flag: bool) -> str:
    if text is None:
        return "null"
    if is_flag:
        return format_value(text == "1")
    return str(text) if is_number else format_value(str(text))
