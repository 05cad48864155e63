"""What a decoder says, wal2json or pgoutput alike: the words between it and the assembler."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, TypeAlias

from msgspec import Struct

from pgrealtime.catalog.model import ReplicaIdentity, Table
from pgrealtime.changes import Delete, Insert, Row, RowShape, TableName, Update
from pgrealtime.lsn import LSN, Xid


class Begin(Struct, frozen=True, gc=False):
    """A transaction starts. Its id is the top-level one, also for rows of a subtransaction."""

    xid: Xid


class RowChange(Struct, frozen=True, gc=False):
    """One row's change, already under the root's name."""

    change: Insert | Update | Delete
    leaf: TableName | None
    """The partition that holds the row, or held it; None if the table isn't partitioned."""
    overhead_bytes: int = 0
    """Bytes of memory that it takes beyond those of its payload. wal2json's names and types take
    as much in the payload as dicts and strings do in memory."""
    shape: RowShape | None = None


class Truncated(Struct, frozen=True, gc=False):
    """Tables emptied by one statement, under their roots' names."""

    tables: tuple[TableName, ...]


class Commit(Struct, frozen=True, gc=False):
    """The transaction that began is whole."""

    end_lsn: LSN
    commit_time_us: int
    """Microseconds since the Unix epoch, by the server's clock."""


Message: TypeAlias = Begin | RowChange | Truncated | Commit


class Decoder(Protocol):
    """Turns the payloads of one stream into messages; may keep what the stream told earlier."""

    def decode(self, payload: memoryview) -> Message | None:
        """Return what one payload says; None if it concerns no transaction or no table of ours.

        The payload may be a view of a buffer that is reused: nothing of it is kept.

        Raises:
            UnexpectedMessageError: The payload is not of the decoder's format.
        """


class StreamedTable(Struct, frozen=True):
    """A table as it appears in the stream: under its own name, or a leaf of a partitioned one."""

    root: TableName
    """The name its changes go by."""
    leaf: TableName | None
    """Its own name where that is another. A leaf may order its columns differently."""
    column_names: tuple[str, ...]
    """The root's columns in order."""
    has_full_identity: bool
    """Whether the old row is logged whole."""
    identity_column_count: int
    """How many columns of the old row are logged."""

    def order_columns(self, row: Row) -> Row:
        """Return the row in the root's column order; columns that the catalogue lacks come last."""
        ordered = {name: row[name] for name in self.column_names if name in row}
        return ordered if len(ordered) == len(row) else ordered | row

    def is_whole_row(self, old: Row, column_count: int) -> bool:
        """Whether an old image is the whole row and not a key, where the decoder doesn't say.

        Args:
            old: What was logged.
            column_count: Columns that the row has.

        Its width counts too: a leaf may log more than its siblings, and the identity may have been
        changed since the catalogue was read.
        """
        return len(old) >= column_count and (
            self.has_full_identity or len(old) > self.identity_column_count
        )


def streamed_tables_by_name(tables: Collection[Table]) -> Mapping[TableName, StreamedTable]:
    """Return how each table, and each leaf of a partitioned one, appears in the stream."""
    return {
        name: StreamedTable(
            root=table.name,
            leaf=None if name == table.name else name,
            column_names=tuple(column.name for column in table.columns),
            has_full_identity=table.replica_identity is ReplicaIdentity.FULL,
            identity_column_count=len(table.replica_identity_columns),
        )
        for table in tables
        for name in (table.name, *table.leaves)
    }
