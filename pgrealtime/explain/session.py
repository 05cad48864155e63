"""How ``explain`` asks Postgres: in one snapshot, read only, each question bounded in time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.catalog.keys import canonical_id, native_key_type
from pgrealtime.catalog.naming import identifier
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.errors import DatabaseUnreachableError, SetupError
from pgrealtime.explain.text import HIDDEN_TEXT, ConditionVerdict, format_value
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import DatabaseConnection, QueryPool
from pgrealtime.rules.engine.batch_query import Question
from pgrealtime.rules.sql.breakdown import MAX_SHOWN_VALUES, HiddenValue, KnownValue, OperandValue
from pgrealtime.rules.sql.reference import SqlQuery

_ROW_QUERY = sql.SQL(
    "SELECT {columns} FROM {table}"
    " WHERE {key} OPERATOR(pg_catalog.=) %(id)s::pg_catalog.text::{type}"
)


@asynccontextmanager
async def open_explain_session(pool: QueryPool) -> AsyncIterator[ExplainSession]:
    """Open a snapshot to ask in: the pool's transactions have one each.

    Raises:
        DatabaseUnreachableError: The connection breaks, or there is none.
    """
    try:
        async with pool.connection() as connection:
            yield ExplainSession(connection)
    except (psycopg.OperationalError, PoolTimeout) as error:
        raise DatabaseUnreachableError(
            "the database doesn't answer", detail=message_without_values(error)
        ) from error


class ExplainSession:
    """Asks in one snapshot; a question that fails leaves it as it was."""

    def __init__(self, connection: DatabaseConnection) -> None:
        self._connection = connection

    async def fetch_rows(self, query: SqlQuery) -> list[tuple[object, ...]] | ConditionVerdict:
        """Return the result, or why there is none."""
        try:
            async with self._connection.transaction():
                cursor = await self._connection.execute(query.sql.encode(), query.params)
                return await cursor.fetchall()
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            # Without what may show a value of the row.
            return ConditionVerdict(None, message_without_values(error))

    async def fetch_verdict(self, query: SqlQuery) -> ConditionVerdict:
        """Return what a condition is."""
        match await self.fetch_rows(query):
            case ConditionVerdict() as fault:
                return fault
            case [(bool() | None as value,)]:
                return ConditionVerdict(value)
            case other:
                raise AssertionError(f"a condition of one row has one value, not {len(other)}")

    async def fetch_row_by_id(self, collection: Collection, record_id: str) -> Row | None:
        """Return the record's row in the stream's text forms.

        Raises:
            SetupError: The table can't be read.
        """
        wanted = canonical_id(record_id, collection.key.type)
        if wanted is None:
            return None
        names = [column.name for column in collection.table.columns]
        key, native = identifier(collection.key.name), native_key_type(collection.key.type)
        query = _ROW_QUERY.format(
            columns=sql.SQL(", ").join(map(identifier, names)),
            table=identifier(*collection.table.name),
            key=key if native else sql.SQL("{}::pg_catalog.text").format(key),
            type=identifier("pg_catalog", native or "text"),
        )
        try:
            result = (await self._connection.execute(query, {"id": wanted})).pgresult
        except (psycopg.DataError, UnicodeEncodeError):
            return None  # no text of this database
        except psycopg.ProgrammingError as error:
            raise SetupError(
                f'"{collection.table.name}" can\'t be read',
                detail=message_without_values(error),
                hint="pgrealtime check says what is missing.",
                code="select_not_granted",
            ) from error
        assert result is not None  # an executed query has one
        if not result.ntuples:
            return None
        values = [result.get_value(0, n) for n in range(result.nfields)]
        texts = [None if value is None else value.decode() for value in values]
        return dict(zip(names, texts, strict=True))

    async def answer_question(self, inquiry: Question) -> None:
        """Put a question of the engine, its parts if it fails."""
        question = inquiry.sql_query()
        if question is None:
            return
        match await self.fetch_rows(question):
            case ConditionVerdict():
                for part in inquiry.split():
                    await self.answer_question(part)
            case rows:
                inquiry.accept(rows)

    async def format_operand(self, operand: OperandValue) -> str:
        """Return the values of a comparison's side, for people."""
        match operand.value:
            case HiddenValue():
                return HIDDEN_TEXT
            case KnownValue(value):
                return format_value(value)
            case SqlQuery() as question:
                found = await self.fetch_rows(question)
        if isinstance(found, ConditionVerdict):
            return f"not to be had ({found.failure})"
        values = sorted(
            _format_operand_value(text, is_number, is_flag=operand.is_boolean)
            for text, is_number in found
        )
        more = ["and more"] if len(values) > MAX_SHOWN_VALUES else []
        return ", ".join([*values[:MAX_SHOWN_VALUES], *more])


def _format_operand_value(text: object, is_number: object, *, is_flag: bool) -> str:
    if text is None:
        return "null"
    if is_flag:
        return format_value(text == "1")
    return str(text) if is_number else format_value(str(text))
