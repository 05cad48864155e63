"""The demo's application: reads and writes its tables by plain SQL; doesn't use pgrealtime."""

import json
from collections.abc import Mapping
from typing import Any, Final, LiteralString

from psycopg import AsyncClientCursor, AsyncConnection

_ROWS_QUERY: LiteralString = """
SELECT json_build_object(
  'people', (SELECT json_agg(u ORDER BY u.id) FROM users u),
  'projects', (SELECT coalesce(json_agg(p ORDER BY p.id), '[]') FROM (
     SELECT id::text, name, public, owner FROM projects) p),
  'members', (SELECT coalesce(json_agg(m ORDER BY m.id), '[]') FROM (
     SELECT id::text, project_id::text AS project, user_id AS user FROM members) m),
  'tasks', (SELECT coalesce(json_agg(t ORDER BY t.number), '[]') FROM (
     SELECT id AS number, id::text, project_id::text AS project, title, assignee_id AS assignee,
            done
     FROM tasks) t))::text
"""

STATEMENTS: Final[Mapping[str, LiteralString]] = {
    "finish": "UPDATE tasks SET done = %(done)s, updated = now() WHERE id = %(id)s",
    "assign": "UPDATE tasks SET assignee_id = %(user)s, updated = now() WHERE id = %(id)s",
    "add": "INSERT INTO tasks (project_id, title) VALUES (%(id)s, %(title)s)",
    "drop": "DELETE FROM tasks WHERE id = %(id)s",
    "publish": "UPDATE projects SET public = %(public)s WHERE id = %(id)s",
    "join": "INSERT INTO members (project_id, user_id) VALUES (%(id)s, %(user)s)"
    " ON CONFLICT DO NOTHING",
    "leave": "DELETE FROM members WHERE project_id = %(id)s AND user_id = %(user)s",
}
"""The operations, by name. Each is one statement, and so one transaction."""


class Application:
    """Runs queries and operations on one connection, which is in autocommit."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def fetch_tables(self) -> dict[str, Any]:
        """Return all rows by table, the users as ``people``, named as in the records."""
        cursor = await self._connection.execute(_ROWS_QUERY)
        row = await cursor.fetchone()
        assert row is not None
        rows: dict[str, Any] = json.loads(row[0])
        return rows

    async def execute(self, name: str, params: Mapping[str, object]) -> tuple[str, str | None]:
        """Run one of the ``STATEMENTS`` in a transaction of its own.

        Return its SQL with the values filled in, and the id of the row that changed, if any.

        Raises:
            KeyError: There is no such statement, or a value is missing.
            psycopg.DataError, psycopg.IntegrityError: A value doesn't fit.
        """
        statement = STATEMENTS[name]
        async with AsyncClientCursor(self._connection) as cursor:
            text = cursor.mogrify(statement, params)
            await cursor.execute(statement + " RETURNING id::text", params)
            row = await cursor.fetchone()
        return f"{text};", None if row is None else row[0]
