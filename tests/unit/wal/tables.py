"""Tables as read from a catalogue."""

from __future__ import annotations

from pgrealtime.catalog.model import ReplicaIdentity, Table, TableKind
from pgrealtime.changes import TableName
from tests.column_types import text_columns


def table(
    name: str,
    columns: str,
    *,
    key: str = "id",
    identity: ReplicaIdentity = ReplicaIdentity.DEFAULT,
    leaves: tuple[str, ...] = (),
    oid: int = 1000,
) -> Table:
    """Return a table in schema public. Names of columns and of the key are separated by blanks."""
    names = tuple(columns.split())
    whole = identity is ReplicaIdentity.FULL
    return Table(
        oid=oid,
        name=TableName("public", name),
        kind=TableKind.PARTITIONED if leaves else TableKind.TABLE,
        columns=text_columns(*names),
        primary_key=tuple(key.split()),
        replica_identity=identity,
        replica_identity_columns=names if whole else tuple(key.split()),
        leaves=tuple(TableName("public", leaf) for leaf in leaves),
    )
