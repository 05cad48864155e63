"""How ``explain`` asks Postgres: in one snapshot, read only, each question bounded in time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.catalog.keys import canonical_id, native_name
from pgrealtime.catalog.naming import identifier
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.errors import DatabaseUnreachableError, SetupError
from pgrealtime.explain.text import HIDDEN, Truth, shown
from pgrealtime.observe.redact import without_values
from pgrealtime.postgres.pool import Connection, QueryPool
from pgrealtime.rules.engine.batch_query import Inquiry
from pgrealtime.rules.sql.breakdown import MOST_VALUES, Masked, Side, Told
from pgrealtime.rules.sql.reference import Question

_ROW = sql.SQL(
    "SELECT {columns} FROM {table}"
    " WHERE {key} OPERATOR(pg_catalog.=) %(id)s::pg_catalog.text::{type}"
)


@asynccontextmanager
async def snapshot(pool: QueryPool) -> AsyncIterator[Asking]:
    """Open a snapshot to ask in: the pool's transactions have one each.

    Raises:
        DatabaseUnreachableError: The connection breaks, or there is none.
    """
    try:
        async with pool.connection() as connection:
            yield Asking(connection)
    except (psycopg.OperationalError, PoolTimeout) as error:
        raise DatabaseUnreachableError(
            "the database doesn't answer", detail=without_values(error)
        ) from error


class Asking:
    """Asks in one snapshot; a question that fails leaves it as it was."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def rows(self, question: Question) -> list[tuple[object, ...]] | Truth:
        """Return the result, or why there is none."""
        try:
            async with self._connection.transaction():
                cursor = await self._connection.execute(question.sql.encode(), question.params)
                return await cursor.fetchall()
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            # Without what may show a value of the row.
            return Truth(None, without_values(error))

    async def truth(self, question: Question) -> Truth:
        """Return what a condition is."""
        match await self.rows(question):
            case Truth() as fault:
                return fault
            case [(bool() | None as value,)]:
                return Truth(value)
            case other:
                raise AssertionError(f"a condition of one row has one value, not {len(other)}")

    async def row(self, collection: Collection, record_id: str) -> Row | None:
        """Return the record's row in the stream's text forms.

        Raises:
            SetupError: The table can't be read.
        """
        wanted = canonical_id(record_id, collection.key.type)
        if wanted is None:
            return None
        names = [column.name for column in collection.table.columns]
        key, native = identifier(collection.key.name), native_name(collection.key.type)
        query = _ROW.format(
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
                detail=without_values(error),
                hint="pgrealtime check says what is missing.",
                code="select_not_granted",
            ) from error
        assert result is not None  # an executed query has one
        if not result.ntuples:
            return None
        values = [result.get_value(0, n) for n in range(result.nfields)]
        texts = [None if value is None else value.decode() for value in values]
        return dict(zip(names, texts, strict=True))

    async def put(self, inquiry: Inquiry) -> None:
        """Put a question of the engine, its parts if it fails."""
        question = inquiry.question()
        if question is None:
            return
        match await self.rows(question):
            case Truth():
                for part in inquiry.split():
                    await self.put(part)
            case rows:
                inquiry.take(rows)

    async def told(self, side: Side) -> str:
        """Return the values of a comparison's side, for people."""
        match side.value:
            case Masked():
                return HIDDEN
            case Told(value):
                return shown(value)
            case Question() as question:
                found = await self.rows(question)
        if isinstance(found, Truth):
            return f"not to be had ({found.fault})"
        values = sorted(_value(text, is_number, is_flag=side.is_flag) for text, is_number in found)
        more = ["and more"] if len(values) > MOST_VALUES else []
        return ", ".join([*values[:MOST_VALUES], *more])


def _value(text: object, is_number: object, *, is_flag: bool) -> str:
    if text is None:
        return "null"
    if is_flag:
        return shown(text == "1")
    return str(text) if is_number else shown(str(text))
