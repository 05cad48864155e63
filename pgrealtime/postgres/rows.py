"""Rows by key, and query results in the text forms that the stream has.

Whatever reads the rows of given ids builds its statement here: live rows, related records, the
callers' accounts, ``explain``. Values are returned as PostgreSQL prints them, whatever their types,
because rules and records are evaluated on texts of the same form as in the replication stream.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import lru_cache
from typing import Final, LiteralString, TypeAlias

import psycopg
from psycopg import sql
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.pq.abc import PGresult
from psycopg.types.string import TextLoader

from pgrealtime.catalog.model import Column, Table, native_key_type
from pgrealtime.catalog.record_ids import id_expression, part_conditions, table_with_id
from pgrealtime.changes import RECORD_ID_COLUMN, TableName
from pgrealtime.fairness import YieldTimer
from pgrealtime.postgres.pool import DatabaseConnection

TextRow: TypeAlias = tuple[str | None, ...]


_MAX_STATEMENTS: Final = 1024


class RowsTooLargeError(Exception):
    """A query's rows have more characters than wanted; its transaction has failed."""


@lru_cache(_MAX_STATEMENTS)
def rows_by_key_statement(
    table: TableName,
    key: Column,
    columns: tuple[str, ...],
    *extra: LiteralString,
    compares_own_type: bool = False,
) -> str:
    """Return the SELECT of the rows whose key is in the parameter ``ids``, a list of texts.

    Ids are compared in the key's built-in type, so that the primary key's index is used. A key of
    another type (citext, enum; a domain counts as what it is made of) is compared as text: exactly,
    but without the index. ``compares_own_type`` compares by the operator of its own type, so that
    an enum's index is used (citext is compared as text all the same): only for ids read from
    the table, since an enum refuses what is no value of it. The table is ``t`` in the extra
    expressions. Ids that are computed must be canonical; see ``catalog.record_ids``.
    """
    if key.id_sources:
        return _rows_by_computed_id_statement(table, key, columns, extra)
    native, base = native_key_type(key.type), key.type.base
    type_ = identifier(base.schema, base.name)
    name: sql.Composable = identifier("t", key.name)
    if native is None and not compares_own_type:
        type_ = identifier("pg_catalog", "text")
        name = sql.SQL("{}::pg_catalog.text").format(name)
    statement = sql.SQL(
        "SELECT {selected} FROM {table} t"
        " WHERE {key} OPERATOR(pg_catalog.=) ANY (%(ids)s::pg_catalog.text[]::{type}[])"
    ).format(
        selected=sql.SQL(", ").join(
            [*(identifier("t", column) for column in columns), *map(sql.SQL, extra)]
        ),
        table=identifier(*table),
        key=name,
        type=type_,
    )
    return statement.as_string()


def _rows_by_computed_id_statement(
    table: TableName, key: Column, columns: tuple[str, ...], extra: tuple[LiteralString, ...]
) -> str:
    computed = sql.SQL(id_expression(key, "t"))
    wanted = sql.SQL("k.id OPERATOR(pg_catalog.=) {}").format(computed)
    parts = map(sql.SQL, part_conditions(key, "t", "k.id"))
    statement = sql.SQL(
        "SELECT {selected} FROM"
        " (SELECT DISTINCT u.id FROM pg_catalog.unnest(%(ids)s::pg_catalog.text[]) u(id)) k"
        " JOIN {table} t ON {condition}"
    ).format(
        selected=sql.SQL(", ").join(
            [
                *(
                    computed if column == RECORD_ID_COLUMN else identifier("t", column)
                    for column in columns
                ),
                *map(sql.SQL, extra),
            ]
        ),
        table=identifier(*table),
        condition=sql.SQL(" AND ").join([*parts, wanted]),
    )
    return statement.as_string()


def row_source(table: Table) -> sql.Composable:
    """Return the table for a statement's FROM, with the computed id if it has one."""
    if table.id_column is None:
        return identifier(*table.name)
    return sql.SQL(table_with_id(table))


async def texts_of(result: PGresult) -> list[TextRow]:
    """Return a result's rows as PostgreSQL prints them."""
    # Without the driver's own loaders, which would make numbers and dates of the texts.
    transformer = Transformer(_TEXTS)
    transformer.set_pgresult(result)
    rows: list[TextRow] = []
    yield_timer = YieldTimer()
    for first in range(0, result.ntuples, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, result.ntuples)
        rows += transformer.load_rows(first, last, tuple)
        if yield_timer.is_due():
            await yield_timer.pause()
    return rows


async def stream_texts(
    connection: DatabaseConnection,
    statement: bytes,
    params: Mapping[str, object],
    *,
    max_characters: int,
) -> list[TextRow]:
    """Return a query's rows as PostgreSQL prints them, received one by one and not all at once.

    It is planned each time: the driver prepares nothing that it streams.

    Raises:
        RowsTooLargeError: They have more than ``max_characters``; the query is cancelled.
        psycopg.Error: The query fails.
    """
    connection.has_streamed = True
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


def _text_loaders() -> AdaptersMap:
    adapters = AdaptersMap()
    adapters.register_loader(0, TextLoader)  # of every type without a loader, and none has one
    return adapters


_TEXTS: Final = _text_loaders()
_ROWS_AT_ONCE: Final = 50


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
