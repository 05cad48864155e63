r"""What one committed transaction did, the same whichever decoder told it.

Values are PostgreSQL's own text output under the settings pinned on the replication connection
(``wal.server``): booleans ``t`` and ``f``, bytea ``\x...``, dates ISO in UTC. None is SQL NULL. A
column that the WAL didn't carry (an unchanged TOASTed value, a generated column) is *absent* from
the row: absent and NULL are different things.

None of these values can be part of a cycle, so none is the garbage collector's business
(``gc=False``): it would walk through the whole changelog again and again.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct

from pgrealtime.lsn import LSN, Xid

Row: TypeAlias = dict[str, str | None]
"""Column name to text form, in the table's column order."""


class TableName(NamedTuple):
    """Schema and name, exact, unquoted."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


class Key(Struct, frozen=True, gc=False):
    """The old row's replica identity columns, all that DEFAULT or INDEX log of it."""

    row: Row


class WholeRow(Struct, frozen=True, gc=False):
    """The old row with every column, as REPLICA IDENTITY FULL logs it."""

    row: Row


OldImage: TypeAlias = Key | WholeRow


class Insert(Struct, frozen=True, gc=False):
    """A row that came to be."""

    table: TableName
    new: Row


class Update(Struct, frozen=True, gc=False):
    """A row that changed.

    With ``Key`` the old image holds the identity as it was, whether it changed or not.
    Values that FULL still knew were filled into ``new``; what is absent there is unknown.
    """

    table: TableName
    new: Row
    old: OldImage


class Delete(Struct, frozen=True, gc=False):
    """A row that went."""

    table: TableName
    old: OldImage


class Truncate(Struct, frozen=True, gc=False):
    """A table that was emptied; no rows are told."""

    table: TableName


Change: TypeAlias = Insert | Update | Delete | Truncate


NEVER_DESCRIBED = -1


class RowShape(Struct, frozen=True, gc=False, cache_hash=True):
    """What a row was made of when it was written: its columns and their types.

    A decoder gives the same object for rows alike, and so do the transactions of one stream.
    """

    table: TableName
    """The root's name, as changes have it."""
    leaf: TableName | None
    """The partition that the row is or was in; None if the table isn't partitioned."""
    columns: tuple[tuple[str, int], ...]
    """Names and type oids; without those of which the WAL carried no value."""
    description_count: int = 0
    """How often the stream described the partition anew, which it does after a DETACH, among
    others; ``NEVER_DESCRIBED`` where it describes no tables, as wal2json."""


class Transaction(Struct, frozen=True, gc=False):
    """All that one commit did to the streamed tables, in order.

    The ordinal of a change is its 1-based index in ``changes``, counted before any rule is asked.
    """

    xid: Xid
    end_lsn: LSN
    """End of the commit record: rises strictly along the stream."""
    commit_time_us: int
    """Microseconds since the Unix epoch, by the server's clock; 0 if the decoder didn't say."""
    changes: tuple[Change, ...]
    size_bytes: int
    """Bytes of memory it takes, about; what the changelog is bounded by."""
    row_shapes: tuple[RowShape, ...] = ()
    """Those that its rows have, each once."""


class OversizedTransaction(Struct, frozen=True, gc=False):
    """A transaction that was larger than the bound and so was not kept: a gap of its tables."""

    xid: Xid
    end_lsn: LSN
    commit_time_us: int
    tables: frozenset[TableName]


Action: TypeAlias = Literal["create", "update", "delete"]
