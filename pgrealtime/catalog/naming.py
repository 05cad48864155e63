"""Quoted names of tables and columns: for psycopg's statements, and for SQL as text."""

from __future__ import annotations

from psycopg import sql

from pgrealtime.changes import TableName


def identifier(*names: str) -> sql.Identifier:
    """Return a name, quoted, for a statement that is run with parameters.

    psycopg takes each ``%`` of such a statement for the beginning of a parameter, quoted or not.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in names))


def quote_identifier(name: str) -> str:
    """Return the name as a quoted SQL identifier, for SQL that is shown or run as text."""
    return '"' + name.replace('"', '""') + '"'


def quote_table_name(name: TableName) -> str:
    """Return schema and name, both quoted."""
    return f"{quote_identifier(name.schema)}.{quote_identifier(name.name)}"
