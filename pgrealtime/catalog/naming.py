"""Quotes the names of schemas, tables, columns and roles for SQL."""

from __future__ import annotations

from psycopg import sql

from pgrealtime.changes import TableName


def identifier(*names: str) -> sql.Identifier:
    """Return the quoted name for a statement that psycopg runs with parameters.

    psycopg takes every ``%`` of such a statement for the start of a placeholder, also between
    quotes.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in names))


def quote_identifier(name: str) -> str:
    """Return the name as SQL text, always in double quotes."""
    return '"' + name.replace('"', '""') + '"'


def quote_table_name(name: TableName) -> str:
    """Return schema and table as SQL text, each in double quotes."""
    return f"{quote_identifier(name.schema)}.{quote_identifier(name.name)}"
