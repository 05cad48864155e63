"""Which history the entries of the changelog belong to: epochs and eras. Pure."""

import hashlib
from collections.abc import Iterable

from msgspec import Struct

from pgrealtime.changes import TableName


class SystemIdentity(Struct, frozen=True, kw_only=True):
    """Identifies the WAL that positions belong to: cluster, timeline and database."""

    system_id: str
    timeline: int
    database_name: str


class Era(Struct, frozen=True, kw_only=True):
    """What all entries belong to until the next era: one history of one set of tables."""

    system: SystemIdentity
    tables: tuple[TableName, ...]
    """The streamed ones, sorted."""
    restore_count: int = 0
    """How often the history changed while the system identity didn't."""
    plugin: str = ""
    """The decoder."""

    @property
    def epoch(self) -> str:
        """The six hexadecimal digits that all positions of the era share."""
        names = [f"{table.schema}\0{table.name}" for table in self.tables]
        system = self.system
        text = "\n".join([system.system_id, str(system.timeline), system.database_name, *names])
        for _ in range(self.restore_count + 1):
            text = hashlib.blake2s(text.encode(), digest_size=3).hexdigest()
        return text


def make_era(
    system: SystemIdentity, tables: Iterable[TableName], *, restore_count: int = 0, plugin: str = ""
) -> Era:
    """Return an era of tables in any order."""
    return Era(
        system=system, tables=tuple(sorted(tables)), restore_count=restore_count, plugin=plugin
    )
