"""Names of tables and columns in statements with parameters. For whoever makes such."""

from __future__ import annotations

from psycopg import sql


def identifier(*names: str) -> sql.Identifier:
    """Return a name, quoted, for a statement that is run with parameters.

    psycopg takes each ``%`` of such a statement for the beginning of a parameter, quoted or not.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in names))
