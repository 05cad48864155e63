"""Lists the tables that the query role may not read in full.

A rule evaluated without the rows that a privilege or a policy hides could deny what it should
allow, or allow what it should deny. The service and the commands ``check``, ``init`` and
``explain`` therefore refuse such tables.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from psycopg import AsyncConnection

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName, quote_identifier, quote_table_name
from pgrealtime.errors import SetupError

_POLICY_APPLIES = """
EXISTS (SELECT FROM pg_catalog.unnest(p.polroles) r
        WHERE r = 0 OR pg_catalog.pg_has_role(r, 'USAGE'))
"""

POLICIES_SHOW_ALL_ROWS: Final = f"""
EXISTS (SELECT FROM pg_catalog.pg_policy p
        WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('r', '*')
          AND {_POLICY_APPLIES}
          AND pg_catalog.pg_get_expr(p.polqual, p.polrelid) = 'true')
AND NOT EXISTS (SELECT FROM pg_catalog.pg_policy p
                WHERE p.polrelid = c.oid AND NOT p.polpermissive AND p.polcmd IN ('r', '*')
                  AND {_POLICY_APPLIES})
"""  # noqa: S608 (constant text)
"""SQL condition: the policies of table ``c`` let the current role read every row.

True if a permissive policy says USING (true) and no restrictive policy narrows it.
"""

_PRIVILEGES_QUERY = f"""
SELECT n.nspname, c.relname, current_user,
       pg_catalog.has_schema_privilege(n.oid, 'USAGE')
         AND pg_catalog.has_table_privilege(c.oid, 'SELECT'),
       pg_catalog.row_security_active(c.oid) AND NOT ({POLICIES_SHOW_ALL_ROWS})
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = ANY (%(oids)s::oid[])
ORDER BY n.nspname, c.relname
"""  # noqa: S608 (constant text)

_ROW_SECURITY_QUERY = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_class c
               WHERE c.oid = ANY (%(oids)s::oid[]) AND pg_catalog.row_security_active(c.oid))
"""


async def read_privilege_errors(
    connection: AsyncConnection[Any], tables: Iterable[Table]
) -> Mapping[TableName, SetupError]:
    """Return an error for each table that the role may not read, or only through policies."""
    oids = [table.oid for table in tables]
    rows = await (await connection.execute(_PRIVILEGES_QUERY, {"oids": oids})).fetchall()
    return {
        (name := TableName(schema, table)): _policy_error(name, role)
        if is_readable
        else _grant_error(name, role)
        for schema, table, role, is_readable, is_filtered in rows
        if is_filtered or not is_readable
    }


async def has_row_security(connection: AsyncConnection[Any], tables: Iterable[Table]) -> bool:
    """Return whether row security applies to the role on any of the tables."""
    oids = [table.oid for table in tables]
    row = await (await connection.execute(_ROW_SECURITY_QUERY, {"oids": oids})).fetchone()
    return row is not None and row[0] is True


def _grant_error(name: TableName, role: str) -> SetupError:
    schema, grantee = quote_identifier(name.schema), quote_identifier(role)
    return SetupError(
        f'role "{role}" may not read "{name}"',
        hint=f"GRANT USAGE ON SCHEMA {schema} TO {grantee};"
        f" GRANT SELECT ON {quote_table_name(name)} TO {grantee};",
        code="select_not_granted",
    )


def _policy_error(name: TableName, role: str) -> SetupError:
    grantee = quote_identifier(role)
    return SetupError(
        f'row security hides rows of "{name}" from role "{role}"',
        detail="Rules would be evaluated without the rows that its policies hide, so that queries"
        " on the table are refused instead.",
        hint=f"Run as a superuser: ALTER ROLE {grantee} BYPASSRLS;"
        f" or as the table's owner: CREATE POLICY pgrealtime ON {quote_table_name(name)} FOR SELECT"
        f" TO {grantee} USING (true);",
        code="row_security",
    )
