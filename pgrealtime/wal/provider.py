"""Recognizes hosted servers by their roles, and knows what each calls the settings that decide.

Hosted servers have no superuser: what ``ALTER SYSTEM`` does elsewhere is a parameter of theirs.
``check`` names the provider; errors about the set-up have its words as their hint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, LiteralString

from psycopg import AsyncConnection

from pgrealtime.changes import quote_identifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """What an operator does instead of what a superuser would."""

    name: str
    wal_level: str
    """How logical WAL is turned on."""
    setting: str
    """Where another setting, ``{name}``, is changed."""
    replication: str = "ALTER ROLE {role} REPLICATION;"
    """SQL that lets a role read the stream."""
    undo_replication: str = "ALTER ROLE {role} NOREPLICATION;"
    administrator: str
    """Who runs that."""
    note: str = ""
    """What else is special there."""

    def replication_hint(self, role: str) -> str:
        """Return how a role is allowed to read the stream."""
        sql = self.replication.format(role=quote_identifier(role))
        return f"Run as {self.administrator}: {sql}"

    def setting_hint(self, name: str, value: str) -> str:
        """Return how a setting gets a value."""
        return f"{self.setting.format(name=name)} Such as {value}."


_PROVIDERS: Final[Mapping[str, Provider]] = MappingProxyType(
    {
        "rds_superuser": Provider(
            name="Amazon RDS",
            wal_level="Set rds.logical_replication to 1 in a parameter group of your own (Aurora:"
            " a cluster parameter group), and reboot the instance.",
            setting="Set {name} in the parameter group of the instance (Aurora: of the cluster).",
            replication="GRANT rds_replication TO {role};",
            undo_replication="REVOKE rds_replication FROM {role};",
            administrator="the master user",
        ),
        "alloydbsuperuser": Provider(
            name="AlloyDB",
            wal_level="Set the flag alloydb.logical_decoding to on, which restarts the instance.",
            setting="Set the flag {name} of the instance.",
            administrator="postgres",
        ),
        "cloudsqlsuperuser": Provider(
            name="Google Cloud SQL",
            wal_level="Set the flag cloudsql.logical_decoding to on, which restarts the instance.",
            setting="Set the flag {name} of the instance.",
            administrator="postgres",
        ),
        "azure_pg_admin": Provider(
            name="Azure Database for PostgreSQL",
            wal_level="Set the server parameter wal_level to logical, and restart the server.",
            setting="Set the server parameter {name}.",
            administrator="the server's administrator",
        ),
        "supabase_admin": Provider(
            name="Supabase",
            wal_level="It is logical on Supabase, unless it was changed: supabase"
            " postgres-config update --config wal_level=logical",
            setting="supabase postgres-config update --config {name}=VALUE",
            administrator="postgres",
            note="take the direct connection string, not the pooler's",
        ),
        "neon_superuser": Provider(
            name="Neon",
            wal_level="Enable logical replication in the project's settings in Neon's console; it"
            " restarts the computes and can't be taken back.",
            setting="Neon sets {name} itself.",
            administrator="a role that was made in Neon's console",
            note="take the direct URL, without -pooler; slots that nothing reads for 40 hours are"
            " removed",
        ),
    }
)
"""By the role that it is recognized by."""

MAY_REPLICATE: Final[LiteralString] = """
(r.rolreplication OR r.rolsuper OR EXISTS (
  SELECT FROM pg_catalog.pg_roles g
  WHERE g.rolname IN ('rds_replication', 'neon_superuser')
    AND pg_catalog.pg_has_role(r.oid, g.oid, 'MEMBER')))
"""
"""SQL condition: role ``r`` may read the replication stream, by its attribute or a provider's role.
"""

_ROLES_QUERY: Final = """
SELECT r.rolname FROM pg_catalog.unnest(%s::pg_catalog.text[]) WITH ORDINALITY known (name, n)
JOIN pg_catalog.pg_roles r ON r.rolname = known.name ORDER BY known.n LIMIT 1
"""


async def read_provider(connection: AsyncConnection[Any]) -> Provider | None:
    """Return who hosts the server, None if nothing tells that anybody does."""
    cursor = await connection.execute(_ROLES_QUERY, (list(_PROVIDERS),))
    row = await cursor.fetchone()
    return None if row is None else _PROVIDERS[row[0]]
