"""Quotes the names of schemas, tables, columns and roles for SQL."""

from pgrealtime.changes import TableName


def quote_identifier(name: str) -> str:
    """Return the name as SQL text, always in double quotes."""
    return '"' + name.replace('"', '""') + '"'


def quote_table_name(name: TableName) -> str:
    """Return schema and table as SQL text, each in double quotes."""
    return f"{quote_identifier(name.schema)}.{quote_identifier(name.name)}"
