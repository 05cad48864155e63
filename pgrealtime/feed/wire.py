"""Frames as bytes: msgpack, each frame readable without those before it. Pure.

A frame is ``[kind, ...]``. Tables and columns stand once in a frame, as *shapes*: a table with the
columns that are present, so that an absent column and NULL stay different. Rows
that are read again share their keys in memory, as those of the decoders do.

| frame | bytes |
|---|---|
| era | ``[1, system, tables, restore count, plugin, start LSN, is restart, is continuation]`` |
| entries | ``[2, shapes, row shapes, entries]`` |
| away | ``[3]`` |

| entry | bytes |
|---|---|
| transaction | ``[0, xid, end LSN, commit time, size, changes, numbers of row shapes]`` |
| oversized transaction | ``[1, xid, end LSN, commit time, tables]`` |
| gap | ``[2, end LSN, reason, tables or nil]`` |
| watermark | ``[3, end LSN]`` |

A change is ``[kind, number of its shape, values]``, an update has also shape and values of the old
row.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from pgrealtime.changelog.memory import Entry, Gap, Watermark
from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Key,
    OversizedTransaction,
    Row,
    RowShape,
    TableName,
    Transaction,
    Truncate,
    Update,
    WholeRow,
)
from pgrealtime.errors import FrameError
from pgrealtime.feed.frames import AwayFrame, EntriesFrame, EraFrame, Frame
from pgrealtime.history import Era, SystemIdentity

WIRE_VERSION: Final = 1
"""Of the bytes below. A process reads its own version and refuses a higher one."""

_ERA, _ENTRIES, _AWAY = 1, 2, 3
_TRANSACTION, _OVERSIZED, _GAP, _WATERMARK = 0, 1, 2, 3
_INSERT, _UPDATE_BY_KEY, _UPDATE_OF_ROW, _DELETE_BY_KEY, _DELETE_OF_ROW, _TRUNCATE = range(6)
_MAX_INTERNED: Final = 10_000
"""Shapes that are kept as one object each; then all are forgotten, and kept anew."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()

_Shape = tuple[TableName, tuple[str, ...]]


def encode_frame(frame: Frame) -> bytes:
    """Return a frame's bytes."""
    match frame:
        case EraFrame():
            era, system = frame.era, frame.era.system
            whence = (system.system_id, system.timeline, system.database_name)
            what = (era.tables, era.restore_count, era.plugin)
            how = (frame.start_lsn, frame.is_restart, frame.is_continuation)
            return _encoder.encode((_ERA, whence, *what, *how))
        case EntriesFrame():
            return encode_entries(frame.entries)
        case AwayFrame():
            return _encoder.encode((_AWAY,))


def encode_entries(entries: Iterable[Entry]) -> bytes:
    """Return the bytes of an ``EntriesFrame``."""
    shapes: dict[_Shape, int] = {}
    row_shapes: dict[RowShape, int] = {}
    encoded = [_encode_entry(entry, shapes, row_shapes) for entry in entries]
    tables = [(*table, *columns) for table, columns in shapes]
    listed = [(each.table, each.leaf, each.columns, each.description_count) for each in row_shapes]
    return _encoder.encode((_ENTRIES, tables, listed, encoded))


def _encode_entry(
    entry: Entry, shapes: dict[_Shape, int], row_shapes: dict[RowShape, int]
) -> tuple[object, ...]:
    match entry:
        case Transaction():
            head = (_TRANSACTION, entry.xid, entry.end_lsn, entry.commit_time_us, entry.size_bytes)
            changes = [_encode_change(change, shapes) for change in entry.changes]
            numbers = [row_shapes.setdefault(shape, len(row_shapes)) for shape in entry.row_shapes]
            return (*head, changes, numbers)
        case OversizedTransaction():
            tables = sorted(entry.tables)
            return (_OVERSIZED, entry.xid, entry.end_lsn, entry.commit_time_us, tables)
        case Gap():
            named = None if entry.tables is None else sorted(entry.tables)
            return (_GAP, entry.end_lsn, entry.reason, named)
        case Watermark():
            return (_WATERMARK, entry.end_lsn)


def _encode_change(change: Change, shapes: dict[_Shape, int]) -> tuple[object, ...]:
    table = change.table
    if isinstance(change, Truncate):
        return (_TRUNCATE, shapes.setdefault((table, ()), len(shapes)), ())
    if isinstance(change, Delete):
        row = change.old.row
        kind = _DELETE_BY_KEY if isinstance(change.old, Key) else _DELETE_OF_ROW
    else:
        row, kind = change.new, _INSERT
    number = shapes.setdefault((table, tuple(row)), len(shapes))
    if not isinstance(change, Update):
        return (kind, number, tuple(row.values()))
    kind = _UPDATE_BY_KEY if isinstance(change.old, Key) else _UPDATE_OF_ROW
    old = change.old.row
    old_number = shapes.setdefault((table, tuple(old)), len(shapes))
    return (kind, number, tuple(row.values()), old_number, tuple(old.values()))


class FrameDecoder:
    """Reads frames; equal tables, column names and row shapes of all of them are one object."""

    def __init__(self) -> None:
        self._shapes: dict[_Shape, _Shape] = {}
        self._row_shapes: dict[RowShape, RowShape] = {}

    def decode(self, data: bytes | memoryview) -> Frame:
        """Return the frame of the bytes.

        Raises:
            FrameError: They are no frame of this program's version.
        """
        try:
            kind, *rest = _decoder.decode(data)
            if kind == _ERA:
                return _decode_era(rest)
            if kind == _ENTRIES:
                return self._decode_entries(*rest)
            if kind == _AWAY:
                return AwayFrame()
        except (msgspec.DecodeError, TypeError, ValueError, IndexError) as error:
            raise FrameError("a frame can't be decoded", detail=type(error).__name__) from error
        raise FrameError("a frame can't be decoded", detail=f"It is of kind {kind!r:.40}.")

    def _decode_entries(
        self, shapes: Sequence[Any], row_shapes: Sequence[Any], entries: Sequence[Any]
    ) -> EntriesFrame:
        known = [self._intern(TableName(*each[:2]), tuple(each[2:])) for each in shapes]
        described = [self._intern_row_shape(*listed) for listed in row_shapes]
        return EntriesFrame(tuple(_decode_entry(entry, known, described) for entry in entries))

    def _intern(self, table: TableName, columns: tuple[str, ...]) -> _Shape:
        if len(self._shapes) >= _MAX_INTERNED:
            self._shapes.clear()
        return self._shapes.setdefault((table, columns), (table, columns))

    def _intern_row_shape(
        self, table: Sequence[str], leaf: Sequence[str] | None, columns: Sequence[Any], count: int
    ) -> RowShape:
        shape = RowShape(
            TableName(*table),
            None if leaf is None else TableName(*leaf),
            tuple((name, type_oid) for name, type_oid in columns),
            count,
        )
        if len(self._row_shapes) >= _MAX_INTERNED:
            self._row_shapes.clear()
        return self._row_shapes.setdefault(shape, shape)


def _decode_era(encoded: Sequence[Any]) -> EraFrame:
    system, tables, restore_count, plugin, start_lsn, is_restart, is_continuation = encoded
    system_id, timeline, database_name = system
    era = Era(
        system=SystemIdentity(system_id=system_id, timeline=timeline, database_name=database_name),
        tables=tuple(TableName(*table) for table in tables),
        restore_count=restore_count,
        plugin=plugin,
    )
    return EraFrame(era, start_lsn, is_restart, is_continuation)


def _decode_entry(
    encoded: Sequence[Any], shapes: Sequence[_Shape], row_shapes: Sequence[RowShape]
) -> Entry:
    kind, *rest = encoded
    if kind == _TRANSACTION:
        xid, end_lsn, commit_time, size, listed, numbers = rest
        changes = tuple([_decode_change(change, shapes) for change in listed])
        described = tuple([row_shapes[number] for number in numbers])
        return Transaction(xid, end_lsn, commit_time, changes, size, described)
    if kind == _OVERSIZED:
        xid, end_lsn, commit_time, tables = rest
        return OversizedTransaction(xid, end_lsn, commit_time, _table_set(tables))
    if kind == _GAP:
        end_lsn, reason, tables = rest
        return Gap(end_lsn, reason, None if tables is None else _table_set(tables))
    if kind == _WATERMARK:
        return Watermark(*rest)
    raise ValueError(kind)


def _decode_change(encoded: Sequence[Any], shapes: Sequence[_Shape]) -> Change:
    kind, number, values, *old_row = encoded
    table, columns = shapes[number]
    row: Row = dict(zip(columns, values, strict=True))
    if kind == _INSERT:
        return Insert(table, row)
    if kind in (_UPDATE_BY_KEY, _UPDATE_OF_ROW):
        old_number, old_values = old_row
        old: Row = dict(zip(shapes[old_number][1], old_values, strict=True))
        return Update(table, row, Key(old) if kind == _UPDATE_BY_KEY else WholeRow(old))
    if kind == _DELETE_BY_KEY:
        return Delete(table, Key(row))
    if kind == _DELETE_OF_ROW:
        return Delete(table, WholeRow(row))
    if kind == _TRUNCATE:
        return Truncate(table)
    raise ValueError(kind)


def _table_set(tables: Sequence[Sequence[str]]) -> frozenset[TableName]:
    return frozenset(TableName(*table) for table in tables)
