r"""Decodes pgoutput's messages (protocol 1, text) to those of ``wal.message``. Pure.

Source: PostgreSQL documentation, "Logical Replication Message Formats". Values are PostgreSQL's
text output in client_encoding (UTF8), so none is converted. Integers are big-endian, strings end
with a zero byte:

    Begin 'B'     final:int64 time:int64 xid:int32
    Commit 'C'    flags:int8 commit:int64 end:int64 time:int64
    Relation 'R'  oid:int32 schema name identity:int8 count:int16, then per column
                  flags:int8 (1: of the identity) name type:int32 modifier:int32
    Insert 'I'    oid:int32 'N' row
    Update 'U'    oid:int32 ['K' or 'O' row] 'N' row
    Delete 'D'    oid:int32 'K' or 'O' row
    Truncate 'T'  count:int32 options:int8 oid:int32 ...

A row is count:int16, then per column 'n' (NULL), 'u' (unchanged in TOAST) or 't' length:int32 text.
"""

import struct
from collections.abc import Collection

from msgspec import Struct

from pgrealtime.catalog.model import Table
from pgrealtime.changes import (
    Delete,
    Insert,
    Key,
    OldImage,
    Row,
    RowShape,
    TableName,
    Update,
    WholeRow,
    quote_identifier,
)
from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN, Xid
from pgrealtime.wal.message import (
    Begin,
    Commit,
    Message,
    RowChange,
    StreamedTable,
    TruncateMessage,
    streamed_tables_by_name,
)
from pgrealtime.wal.wire import UNIX_EPOCH_OFFSET

# "!" is big-endian without padding; "x" skips the message's letter.
_BEGIN = struct.Struct("!xQqI")
_COMMIT = struct.Struct("!xBQQq")
_RELATION_ID = struct.Struct("!xI")
_TRUNCATE = struct.Struct("!xIB")
_COLUMN_COUNT = struct.Struct("!H")
_COLUMN_TYPE = struct.Struct("!Ii")  # and its modifier
_LENGTH = struct.Struct("!I")

# The letter and the oid.
_AFTER_RELATION_ID = 5
# 'b', a value in binary form, comes only if the option "binary" is on.
_TEXT, _NULL, _UNCHANGED = b"tnu"
_KEY_IMAGE, _OLD_IMAGE, _NEW_IMAGE = b"KON"
_ROW_BYTES, _VALUE_BYTES = 250, 60
"""Bytes of memory that a row, and each of its values, takes beyond the payload; a test measures
them."""


class _Relation(Struct, frozen=True):
    """A table by its last Relation message."""

    streamed_table: StreamedTable
    column_names: tuple[str, ...]
    """In the order of a row's values."""
    identity_names: tuple[str, ...]
    overhead_bytes: int
    """Of one row, see ``RowChange``."""
    shape: RowShape


class PgoutputDecoder:
    """Implements ``wal.message.Decoder``. Keeps the descriptions of tables, sent before rows."""

    def __init__(self, tables: Collection[Table]) -> None:
        self._tables_by_name = streamed_tables_by_name(tables)
        # A publication has tables, not names: a renamed table is streamed further.
        self._tables_by_oid = {table.oid: self._tables_by_name[table.name] for table in tables}
        self._relations: dict[int, _Relation] = {}

    def decode(self, payload: memoryview | bytes) -> Message | None:
        """Return the payload's message, see ``wal.message.Decoder``."""
        data = bytes(payload)
        try:
            if row_change := _ROW_CHANGES.get(data[0]):
                relation = self._relations.get(_RELATION_ID.unpack_from(data)[0])
                return None if relation is None else row_change(data, relation)
            match data[:1]:
                case b"B":
                    return Begin(Xid(_BEGIN.unpack_from(data)[2]))
                case b"C":
                    _, _, end, time = _COMMIT.unpack_from(data)
                    return Commit(LSN(end), time + UNIX_EPOCH_OFFSET)
                case b"R":
                    self._read_relation(data)
                    return None
                case b"T":
                    return self._truncate(data)
                # Types, origins and logical messages.
                case b"Y" | b"O" | b"M":
                    return None
                case letter:
                    raise ValueError(letter)  # noqa: TRY301 (as all that can't be read)
        except (struct.error, LookupError, ValueError) as error:
            # Doesn't quote the payload, which has a row's values.
            raise UnexpectedMessageError("pgoutput sent a message that can't be read") from error

    def _read_relation(self, data: bytes) -> None:
        # Sent before the first row of a table, and again after its definition or the publication
        # changed. From then on rows have the new columns.
        (oid,) = _RELATION_ID.unpack_from(data)
        schema, offset = _read_string(data, _AFTER_RELATION_ID)
        name, offset = _read_string(data, offset)
        offset += 1  # the replica identity's letter
        (count,) = _COLUMN_COUNT.unpack_from(data, offset)
        offset += _COLUMN_COUNT.size
        names: list[str] = []
        types: list[int] = []
        key: list[str] = []
        for _ in range(count):
            # With replica identity FULL every column has this flag.
            is_key = data[offset] & 1
            column, offset = _read_string(data, offset + 1)
            types.append(_COLUMN_TYPE.unpack_from(data, offset)[0])
            offset += _COLUMN_TYPE.size
            names.append(column)
            if is_key:
                key.append(column)
        # The schema pg_catalog is sent as an empty name; no streamed table is in it.
        source = self._tables_by_oid.get(oid) or self._tables_by_name.get(TableName(schema, name))
        if source is None:
            self._relations.pop(oid, None)
        else:
            overhead = _ROW_BYTES + _VALUE_BYTES * count
            before = self._relations.get(oid) if source.leaf is not None else None
            descriptions = 0 if before is None else before.shape.description_count + 1
            columns = tuple(zip(names, types, strict=True))
            shape = RowShape(source.root, source.leaf, columns, descriptions)
            self._relations[oid] = _Relation(source, tuple(names), tuple(key), overhead, shape)

    def _truncate(self, data: bytes) -> TruncateMessage | None:
        # Options: 1 is CASCADE, 2 RESTART IDENTITY. Each truncated table is listed, also by
        # CASCADE.
        count, _ = _TRUNCATE.unpack_from(data)
        oids = struct.unpack_from(f"!{count}I", data, _TRUNCATE.size)
        known = (self._relations.get(oid) for oid in oids)
        tables = tuple(relation.streamed_table.root for relation in known if relation is not None)
        return TruncateMessage(tables) if tables else None


def _insert(data: bytes, relation: _Relation) -> RowChange:
    new, _ = _read_row(data, _AFTER_RELATION_ID + 1, relation.column_names)
    source = relation.streamed_table
    change = Insert(source.root, _in_root_order(new, source))
    return RowChange(change, source.leaf, relation.overhead_bytes, relation.shape)


def _update(data: bytes, relation: _Relation) -> RowChange:
    source, offset, old = relation.streamed_table, _AFTER_RELATION_ID, None
    if data[offset] != _NEW_IMAGE:
        # 'O' with FULL; 'K' only if a column of the identity changed.
        old, offset = _read_old_image(data, offset, relation)
    new, _ = _read_row(data, offset + 1, relation.column_names)
    if old is None:
        # The WAL has the identity only if it changed.
        old = Key({name: new[name] for name in relation.identity_names})
    elif len(new) < len(relation.column_names):
        # Unchanged TOASTed values are missing. The old image has them: all with FULL, those
        # of the identity otherwise.
        known = old.row | new
        new = {name: known[name] for name in relation.column_names if name in known}
    overhead = relation.overhead_bytes * (2 if isinstance(old, WholeRow) else 1)
    change = Update(source.root, _in_root_order(new, source), old)
    return RowChange(change, source.leaf, overhead, relation.shape)


def _delete(data: bytes, relation: _Relation) -> RowChange:
    old, _ = _read_old_image(data, _AFTER_RELATION_ID, relation)
    source = relation.streamed_table
    return RowChange(Delete(source.root, old), source.leaf, relation.overhead_bytes, relation.shape)


_ROW_CHANGES = {ord("I"): _insert, ord("U"): _update, ord("D"): _delete}


def _read_string(data: bytes, offset: int) -> tuple[str, int]:
    end = data.index(0, offset)
    return data[offset:end].decode(), end + 1


def _read_old_image(data: bytes, offset: int, relation: _Relation) -> tuple[OldImage, int]:
    row, end = _read_row(data, offset + 1, relation.column_names)
    source = relation.streamed_table
    if data[offset] == _OLD_IMAGE:
        return WholeRow(_in_root_order(row, source)), end
    if data[offset] == _KEY_IMAGE:
        # The other columns are sent as NULL, whatever their values.
        key = {name: row[name] for name in relation.identity_names}
        return Key(_in_root_order(key, source)), end
    raise ValueError(data[offset])


def _read_row(data: bytes, offset: int, names: tuple[str, ...]) -> tuple[Row, int]:
    """Return the row at the offset, without unchanged TOASTed values, and the offset after it."""
    (count,) = _COLUMN_COUNT.unpack_from(data, offset)
    if count != len(names):
        raise ValueError(count)
    offset += _COLUMN_COUNT.size
    row: Row = {}
    for name in names:
        kind = data[offset]
        offset += 1
        if kind == _TEXT:
            start = offset + 4
            offset = start + _LENGTH.unpack_from(data, offset)[0]
            row[name] = data[start:offset].decode()
        elif kind == _NULL:
            row[name] = None
        elif kind != _UNCHANGED:
            raise ValueError(kind)
    return row, offset


def _in_root_order(row: Row, table: StreamedTable) -> Row:
    return row if table.leaf is None else table.order_columns(row)


def start_replication_options(publication: str) -> dict[str, str]:
    """Return the options of START_REPLICATION that ``PgoutputDecoder`` requires."""
    # Version 1 has whole transactions only; 2 adds streaming of large ones before their commit, 3
    # two-phase commits. The names are a list of identifiers: without quotes folded to lower case.
    return {"proto_version": "1", "publication_names": quote_identifier(publication)}
