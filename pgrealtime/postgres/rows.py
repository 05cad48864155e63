"""Rows by key, and query results in the text forms that the stream has.

Whatever reads the rows of given ids builds its statement here: live rows, related records, the
callers' accounts, ``explain``. Values are returned as PostgreSQL prints them, whatever their types,
because rules and records are evaluated on texts of the same form as in the replication stream.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import TypeAlias

import psycopg
from psycopg import sql
from psycopg.adapt import AdaptersMap
from psycopg.pq.abc import PGresult
from psycopg.types.string import TextLoader

from pgrealtime.catalog.model import Column, Table, native_key_type
from pgrealtime.fairness import YieldTimer
from pgrealtime.postgres.pool import DatabaseConnection

TextRow: TypeAlias = tuple[str | None, ...]


class RowsTooLargeError(Exception):
    """A query's rows have more characters than wanted; its transaction has failed."""


def rows_by_key_statement(
    table: Table,
    key: Column,
    columns: Iterable[str],
    *extra: sql.Composable,
    compares_own_type: bool = False,
) -> sql.Composed:
    """Return the SELECT of the rows whose key is in the parameter ``ids``, a list of texts.

    Ids are compared in the key's built-in type, so that the primary key's index is used. A key of
    another type (citext, enum; a domain counts as what it is made of) is compared as text: exactly,
    but without the index. ``compares_own_type`` compares by the operator of its own type, so that
    an enum's index is used (citext is compared as text all the same): only for ids read from
    the table, since an enum refuses what is no value of it. The table is ``t`` in the extra
    expressions.
    """
    native, base = native_key_type(key.type), key.type.base
    type_ = identifier(base.schema, base.name)
    name: sql.Composable = identifier("t", key.name)
    if native is None and not compares_own_type:
        type_ = identifier("pg_catalog", "text")
        name = sql.SQL("{}::pg_catalog.text").format(name)
    return sql.SQL(
        "SELECT {selected} FROM {table} t"
        " WHERE {key} OPERATOR(pg_catalog.=) ANY (%(ids)s::pg_catalog.text[]::{type}[])"
    ).format(
        selected=sql.SQL(", ").join([*(identifier("t", column) for column in columns), *extra]),
        table=identifier(*table.name),
        key=name,
        type=type_,
    )


async def fetch_texts(
    connection: DatabaseConnection,
    statement: sql.SQL | sql.Composed | bytes,
    params: Mapping[str, object],
) -> list[TextRow]:
    """Return a query's rows as PostgreSQL prints them.

    Raises:
        psycopg.Error: The query fails.
        UnicodeEncodeError: A parameter can't be encoded.
    """
    result = (await connection.execute(statement, params)).pgresult
    assert result is not None  # an executed query has one
    rows: list[TextRow] = []
    yield_timer = YieldTimer()
    for row in iterate_texts(result):
        rows.append(row)
        if yield_timer.is_due():
            await yield_timer.pause()
    return rows


def iterate_texts(result: PGresult) -> Iterator[TextRow]:
    """Yield a result's rows as PostgreSQL prints them."""
    # Without the driver's loaders, which would make numbers and dates of the texts.
    get_value, columns = result.get_value, range(result.nfields)
    for row in range(result.ntuples):
        yield tuple([None if (v := get_value(row, n)) is None else v.decode() for n in columns])


async def stream_texts(
    connection: DatabaseConnection,
    statement: bytes,
    params: Mapping[str, object],
    *,
    max_characters: int,
) -> list[TextRow]:
    """Return a query's rows as ``fetch_texts``, received one by one and not all at once.

    It is planned each time: the driver prepares nothing that it streams.

    Raises:
        RowsTooLargeError: They have more than ``max_characters``; the query is cancelled.
        psycopg.Error: The query fails.
    """
    rows: list[TextRow] = []
    size, yield_timer = 0, YieldTimer()
    stream = _TextCursor(connection).stream(statement, params)
    assert isinstance(stream, AsyncGenerator)  # closing it cancels the query
    async with aclosing(stream):
        async for row in stream:
            rows.append(row)
            size += sum(len(text) for text in row if text is not None)
            if size > max_characters:
                raise RowsTooLargeError
            if yield_timer.is_due():
                await yield_timer.pause()
    return rows


def _adapters_for_texts() -> AdaptersMap:
    adapters = AdaptersMap(psycopg.adapters)
    for type_ in adapters.types:
        for oid in filter(None, (type_.oid, type_.array_oid)):
            adapters.register_loader(oid, TextLoader)
    return adapters


_TEXT_ADAPTERS = _adapters_for_texts()


class _TextCursor(psycopg.AsyncCursor[TextRow]):
    """Loads each value as its text, as the driver does only for types that it doesn't know."""

    @property
    def adapters(self) -> AdaptersMap:
        return _TEXT_ADAPTERS


def identifier(*names: str) -> sql.Identifier:
    """Return the quoted name for a statement that psycopg runs with parameters.

    psycopg takes every ``%`` of such a statement for the start of a placeholder, also between
    quotes.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in names))
