"""Rows by key, and query results in the text forms that the stream has.

Whatever reads the rows of given ids builds its statement here: live rows, related records, the
callers' accounts, ``explain``. Values are returned as PostgreSQL prints them, whatever their types,
because rules and records are evaluated on texts of the same form as in the replication stream.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from psycopg import sql

from pgrealtime.catalog.model import Column, Table, native_key_type
from pgrealtime.fairness import YieldTimer
from pgrealtime.postgres.pool import DatabaseConnection

TextRow: TypeAlias = tuple[str | None, ...]


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
    # Without the driver's loaders, which would make numbers and dates of the texts.
    get_value, columns = result.get_value, range(result.nfields)
    rows: list[TextRow] = []
    yield_timer = YieldTimer()
    for row in range(result.ntuples):
        values = [None if (v := get_value(row, n)) is None else v.decode() for n in columns]
        rows.append(tuple(values))
        if yield_timer.is_due():
            await yield_timer.pause()
    return rows


def identifier(*names: str) -> sql.Identifier:
    """Return the quoted name for a statement that psycopg runs with parameters.

    psycopg takes every ``%`` of such a statement for the start of a placeholder, also between
    quotes.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in names))
