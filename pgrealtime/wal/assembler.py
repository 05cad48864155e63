"""Assembles a decoder's messages to whole transactions, for ``wal.stream``. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from pgrealtime.catalog.model import Table
from pgrealtime.changes import (
    DIGEST,
    RECORD_ID_COLUMN,
    Change,
    Delete,
    Insert,
    OversizedTransaction,
    Row,
    RowShape,
    TableName,
    Transaction,
    Truncate,
    Update,
    digest_id,
    join_id,
)
from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import Xid
from pgrealtime.wal.message import Begin, Commit, Message, RowChange, TruncateMessage

RecordKeys = Mapping[TableName, tuple[str, ...]]
"""By table the columns that identify a record; a move between partitions leaves them unchanged.
Several make an id that rows get (``_RecordIds``), of their values or, after ``DIGEST``, a digest.
"""

_RecordKey = tuple[TableName, tuple[str | None, ...]]


class TransactionAssembler:
    """Collects the changes between a begin and its commit, in bounded memory.

    Of a transaction larger than ``max_bytes`` only the table names are kept. A delete in one
    partition and an insert into another with the same record key are an UPDATE that moved the row,
    and become an ``Update``.
    """

    def __init__(
        self, *, max_bytes: int, record_keys: RecordKeys, default_keys: RecordKeys | None = None
    ) -> None:
        self._max_bytes = max_bytes
        self._record_keys = {**(default_keys or {}), **record_keys}
        self._record_ids = {
            name: _RecordIds(columns) for name, columns in record_keys.items() if len(columns) > 1
        }
        self._xid: Xid | None = None
        self._changes: list[Change] = []
        self._size_bytes = 0
        self._last_shape: RowShape | None = None
        """Of the last row: most rows have the same, and comparing by identity is fast."""
        self._shapes: dict[RowShape, None] = {}
        self._oversized_tables: set[TableName] | None = None
        self._partition_deletes: dict[_RecordKey, tuple[int, TableName]] = {}
        """Deletes in partitions: index in ``_changes``, and the leaf."""

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction has begun and not committed."""
        return self._xid is not None

    def feed(
        self, message: Message, payload_bytes: int
    ) -> Transaction | OversizedTransaction | None:
        """Add the next message; return the transaction it completes, None if that has no changes.

        Raises:
            UnexpectedMessageError: The message can't follow the one before.
        """
        self._size_bytes += payload_bytes
        match message:
            case RowChange(change=change, leaf=leaf, overhead_bytes=overhead) if (
                self._xid is not None
            ):
                self._size_bytes += overhead
                shape = message.shape
                if self._record_ids and (ids := self._record_ids.get(change.table)) is not None:
                    self._size_bytes += ids.add_to(change, shape)
                    shape = None if shape is None else ids.extend_shape(shape)
                if shape is not self._last_shape and shape is not None:
                    self._last_shape = shape
                    self._shapes[shape] = None
                if self._size_bytes > self._max_bytes:
                    self._drop_rows().add(change.table)
                elif leaf is None:
                    self._changes.append(change)
                else:
                    self._add_partition_change(change, leaf)
                return None
            case Commit() if self._xid is not None:
                return self._finish(self._xid, message)
            case Begin(xid=xid) if self._xid is None:
                self._xid, self._size_bytes = xid, payload_bytes
                return None
            case TruncateMessage(tables=tables) if self._xid is not None:
                if self._size_bytes > self._max_bytes:
                    self._drop_rows().update(tables)
                else:
                    self._add_truncates(tables)
                return None
            case _:
                where = "inside" if self.is_in_transaction else "outside"
                raise UnexpectedMessageError(f"{type(message).__name__} came {where} a transaction")

    def _drop_rows(self) -> set[TableName]:
        """Drop the rows of a transaction that is too large; return the set of its tables."""
        if self._oversized_tables is None:
            self._oversized_tables = {change.table for change in self._changes}
            self._changes, self._partition_deletes = [], {}
        return self._oversized_tables

    def _add_truncates(self, tables: tuple[TableName, ...]) -> None:
        """Add each table once per run of truncates: of a partitioned one each leaf is sent."""
        last = takewhile(lambda change: isinstance(change, Truncate), reversed(self._changes))
        run = {truncate.table for truncate in last}
        for table in tables:
            if table not in run:
                run.add(table)
                self._changes.append(Truncate(table))

    def _add_partition_change(self, change: Insert | Update | Delete, leaf: TableName) -> None:
        key = self._record_key(change)
        deleted = None if key is None else self._partition_deletes.pop(key, None)
        match change:
            case Insert(table=table, new=new) if deleted is not None and deleted[1] != leaf:
                index, _ = deleted
                delete = self._changes[index]
                assert isinstance(delete, Delete)
                self._changes[index] = Update(table, new, delete.old)
                return
            case Delete() if key is not None:
                self._partition_deletes[key] = len(self._changes), leaf
            case _:
                pass
        self._changes.append(change)

    def _record_key(self, change: Insert | Update | Delete) -> _RecordKey | None:
        """Return table and key of the changed record; None if the image doesn't have the key."""
        row = change.old.row if isinstance(change, Delete) else change.new
        values = tuple(row.get(name) for name in self._record_keys.get(change.table, ()))
        return None if not values or None in values else (change.table, values)

    def _finish(self, xid: Xid, commit: Commit) -> Transaction | OversizedTransaction | None:
        changes, tables, size = self._changes, self._oversized_tables, self._size_bytes
        shapes = tuple(self._shapes)
        self._xid, self._changes, self._partition_deletes = None, [], {}
        self._oversized_tables, self._last_shape, self._shapes = None, None, {}
        if tables is not None:
            return OversizedTransaction(
                xid, commit.end_lsn, commit.commit_time_us, frozenset(tables)
            )
        if not changes:
            return None
        return Transaction(xid, commit.end_lsn, commit.commit_time_us, tuple(changes), size, shapes)


_BPCHAR_OID = 1042
_ID_BYTES = 100
"""Memory of an id, beyond its characters."""


@dataclass(frozen=True, slots=True)
class _RecordIds:
    """Adds the id that no column holds to the rows of a table."""

    columns: tuple[str, ...]
    _shapes: dict[int, tuple[RowShape, RowShape]] = field(default_factory=dict)
    """By its identity a shape, which is kept alive for it, and the same with the id."""

    def add_to(self, change: Change, shape: RowShape | None) -> int:
        """Add the id to the change's rows; return how many bytes it takes."""
        size = 0
        padded = () if shape is None else {n for n, oid in shape.columns if oid == _BPCHAR_OID}
        rows = (
            *((change.new,) if isinstance(change, (Insert, Update)) else ()),
            *((change.old.row,) if isinstance(change, (Update, Delete)) else ()),
        )
        for row in rows:
            if (record_id := self._id_of(row, padded)) is not None:
                row[RECORD_ID_COLUMN] = record_id
                size += _ID_BYTES + len(record_id)
        return size

    def _id_of(self, row: Row, padded: Collection[str]) -> str | None:
        if self.columns[0] == DIGEST:
            return digest_id(row, self.columns[1:])
        values: list[str] = []
        for name in self.columns:
            value = row.get(name)
            if value is None:
                return None
            values.append(value.rstrip(" ") if name in padded else value)
        return join_id(values)

    def extend_shape(self, shape: RowShape) -> RowShape:
        """Return the shape with the id, the same object for the same shape."""
        known = self._shapes.get(id(shape))
        if known is None:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            columns = (*shape.columns, (RECORD_ID_COLUMN, _TEXT_OID))
            extended = RowShape(shape.table, shape.leaf, columns, shape.description_count)
            known = self._shapes[id(shape)] = shape, extended
        return known[1]


_TEXT_OID = 25
_MAX_SHAPES = 1000


def default_record_keys(tables: Collection[Table]) -> RecordKeys:
    """Return the primary key of each table that has one.

    They make no id. A partitioned table's primary key contains its partition key, so few moves
    leave it unchanged: the caller should override it with a narrower key where it knows one.
    """
    return {table.name: table.primary_key for table in tables if table.primary_key}
