"""The messages of a decoder, wal2json or pgoutput alike, for ``wal.assembler``. Pure."""

from collections.abc import Collection, Mapping
from typing import Protocol, TypeAlias

from msgspec import Struct

from pgrealtime.catalog.model import ReplicaIdentity, Table
from pgrealtime.changes import RECORD_ID_COLUMN, Delete, Insert, Row, RowShape, TableName, Update
from pgrealtime.lsn import LSN, Xid


class Begin(Struct, frozen=True, gc=False):
    """A transaction begins. ``xid`` is the top-level id, also for rows of a subtransaction."""

    xid: Xid


class RowChange(Struct, frozen=True, gc=False):
    """A row changed; the change has the root table's name."""

    change: Insert | Update | Delete
    leaf: TableName | None
    """The partition that has or had the row; None if the table isn't partitioned."""
    overhead_bytes: int = 0
    """Bytes of memory beyond the size of the payload. 0 with wal2json, whose names and types take
    as much in the payload as dicts and strings in memory."""
    shape: RowShape | None = None


class TruncateMessage(Struct, frozen=True, gc=False):
    """One statement truncated tables; they have the root tables' names."""

    tables: tuple[TableName, ...]


class Commit(Struct, frozen=True, gc=False):
    """The transaction is complete."""

    end_lsn: LSN
    commit_time_us: int
    """Microseconds since the Unix epoch, by the server's clock."""


Message: TypeAlias = Begin | RowChange | TruncateMessage | Commit


class Decoder(Protocol):
    """Decodes the payloads of one stream, in order; may keep descriptions that they contain."""

    def decode(self, payload: memoryview) -> Message | None:
        """Return the payload's message; None if it concerns no streamed table or transaction.

        Keeps no reference to the payload, which may be a view of a buffer that is reused.

        Raises:
            UnexpectedMessageError: The payload can't be read.
        """


class StreamedTable(Struct, frozen=True):
    """A table as the stream names it: an ordinary one, or a leaf of a partitioned one."""

    root: TableName
    """The name that its changes get."""
    leaf: TableName | None
    """Its own name if it is a partition, whose columns may have another order."""
    column_names: tuple[str, ...]
    has_full_identity: bool
    identity_column_count: int
    """How many columns of the old row the WAL has."""

    def order_columns(self, row: Row) -> Row:
        """Return the row in the root's column order, columns unknown to the catalogue last."""
        ordered = {name: row[name] for name in self.column_names if name in row}
        return ordered if len(ordered) == len(row) else ordered | row

    def is_whole_row(self, old: Row, column_count: int) -> bool:
        """Whether an old image is the whole row and not a key, where the stream doesn't tell.

        Its width matters too: a leaf may have another replica identity than its siblings, and it
        may have changed since the catalogue was read.
        """
        return len(old) >= column_count and (
            self.has_full_identity or len(old) > self.identity_column_count
        )


def streamed_tables_by_name(tables: Collection[Table]) -> Mapping[TableName, StreamedTable]:
    """Return the tables by their names in the stream: those of leaves for partitioned ones."""
    return {
        name: StreamedTable(
            root=table.name,
            leaf=None if name == table.name else name,
            column_names=tuple(c.name for c in table.columns if not c.id_sources),
            has_full_identity=table.replica_identity is ReplicaIdentity.FULL,
            identity_column_count=len(
                [name for name in table.replica_identity_columns if name != RECORD_ID_COLUMN]
            ),
        )
        for table in tables
        for name in (table.name, *table.leaves)
    }
