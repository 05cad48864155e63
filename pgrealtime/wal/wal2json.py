r"""Decodes wal2json's lines (format-version 2) to messages, for ``wal.stream``. Pure.

A line is a JSON object. Values are PostgreSQL's text in JSON strings, except for two types that
wal2json recognizes by oid: boolean is a JSON literal, bytea is hex without its ``\x``. Domains over
them have other oids and so are ordinary text. (wal2json.c, ``pg_decode_write_value``.)
"""

from collections.abc import Collection
from datetime import UTC, datetime
from functools import reduce
from operator import or_
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from pgrealtime.catalog.model import Table
from pgrealtime.changes import NEVER_DESCRIBED, Delete, Insert, Key, Row, RowShape, Update, WholeRow
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

_BOOL = 16
_BYTEA = 17
_CONVERTED_TYPES = frozenset((_BOOL, _BYTEA))

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_CHARACTERS_TO_ESCAPE = frozenset("\\,.*\"' \t\n\r\v\f")
"""Characters that separate or end a name in ``add-tables``, or are wildcards in it."""


_Name = TypeVar("_Name", bound=str)


# Members that a class doesn't list (lsn, xid, pk, prefix) are skipped by msgspec without being
# built.
class _Column(Struct, Generic[_Name], gc=False):
    name: _Name
    # Instead of the type's name, see ``start_replication_options``.
    typeoid: int
    value: str | bool | None = None


class _Begin(Struct, tag_field="action", tag="B", gc=False):
    xid: int


class _Insert(Struct, Generic[_Name], tag_field="action", tag="I", gc=False):
    schema: _Name
    table: _Name
    columns: list[_Column[_Name]]


class _Update(Struct, Generic[_Name], tag_field="action", tag="U", gc=False):
    schema: _Name
    table: _Name
    columns: list[_Column[_Name]]
    # Where the WAL has no old row, wal2json prints the identity columns of the new one, which are
    # unchanged then (wal2json.c, ``pg_decode_write_change``).
    identity: list[_Column[_Name]]


class _Delete(Struct, Generic[_Name], tag_field="action", tag="D", gc=False):
    schema: _Name
    table: _Name
    identity: list[_Column[_Name]]


class _Truncate(Struct, tag_field="action", tag="T", gc=False):
    schema: str
    table: str


class _Commit(Struct, tag_field="action", tag="C", gc=False):
    # The end of the commit record; the member "lsn" is where it begins.
    nextlsn: str
    timestamp: str


class _LogicalMessage(Struct, tag_field="action", tag="M", gc=False):
    """Of ``pg_logical_emit_message``; ignored."""


_Line: TypeAlias = (
    _Begin | _Insert[str] | _Update[str] | _Delete[str] | _Truncate | _Commit | _LogicalMessage
)


def _line_decoder(name: Any) -> msgspec.json.Decoder[_Line]:
    """Return a decoder of lines whose tables and columns have names of the given type."""
    # "action" is the first member of every line: msgspec knows the class before it reads the rest.
    with_names: tuple[Any, ...] = (_Insert, _Update, _Delete)
    kinds = (_Begin, *(kind[name] for kind in with_names), _Truncate, _Commit, _LogicalMessage)
    return msgspec.json.Decoder(reduce(or_, kinds))


_ANY_LINE = _line_decoder(str)


def _line_decoder_of_tables(tables: Collection[Table]) -> msgspec.json.Decoder[_Line]:
    """Return a decoder that accepts the names in these tables only."""
    # msgspec returns the same string object for a literal each time: the rows in the changelog
    # share their keys, and a string is hashed once.
    names = {column.name for table in tables for column in table.columns}
    names.update(part for name in streamed_tables_by_name(tables) for part in name)
    return _line_decoder(Literal[tuple(sorted(names))]) if names else _ANY_LINE


_MAX_SHAPES = 1000
"""Shapes cached per table. Updates that leave TOASTed values alone make several, ALTER TABLE
others."""


class _CachedShape(Struct, frozen=True):
    """A shape in the forms that rows are compared with and converted by."""

    shape: RowShape
    names: list[str]
    oids: list[int]
    converted_names: tuple[str, ...]
    """Columns whose values aren't text."""


class _TableReader:
    """Reads rows of a streamed table; caches the shapes that they had."""

    def __init__(self, streamed_table: StreamedTable) -> None:
        self.streamed_table = streamed_table
        self._last_shape = _cached_shape(streamed_table, ())
        self._shapes: dict[tuple[tuple[str, int], ...], _CachedShape] = {}

    def read_row(self, columns: list[_Column[str]]) -> tuple[Row, RowShape]:
        """Return a row and its shape."""
        row: dict[str, Any] = {column.name: column.value for column in columns}
        known = self._last_shape
        # Compared as lists: hashing costs more, and most rows have the shape of the one before.
        if [column.typeoid for column in columns] != known.oids or [*row] != known.names:
            known = self._last_shape = self._shape_of(columns)
        for name in known.converted_names:
            value = row[name]
            row[name] = "t" if value is True else _convert_value(value)
        return row, known.shape

    def _shape_of(self, columns: list[_Column[str]]) -> _CachedShape:
        types = tuple([(column.name, column.typeoid) for column in columns])
        known = self._shapes.get(types)
        if known is None:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            known = self._shapes[types] = _cached_shape(self.streamed_table, types)
        return known


def _cached_shape(source: StreamedTable, types: tuple[tuple[str, int], ...]) -> _CachedShape:
    return _CachedShape(
        RowShape(source.root, source.leaf, types, NEVER_DESCRIBED),
        [name for name, _ in types],
        [oid for _, oid in types],
        tuple(name for name, oid in types if oid in _CONVERTED_TYPES),
    )


class Wal2JsonDecoder:
    """Implements ``wal.message.Decoder``. Keeps nothing between lines but the rows' shapes."""

    def __init__(self, tables: Collection[Table]) -> None:
        self._tables = {
            (leaf.schema, leaf.name): _TableReader(source)
            for leaf, source in streamed_tables_by_name(tables).items()
        }
        self._line_decoder = _line_decoder_of_tables(tables)

    def decode(self, payload: memoryview | bytes) -> Message | None:
        """Return the line's message, see ``wal.message.Decoder``."""
        try:
            try:
                line = self._line_decoder.decode(payload)
            except msgspec.ValidationError:
                # It may have a name that the catalogue didn't have when it was read.
                line = _ANY_LINE.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _unreadable_line_error() from error
        # The commonest class first: each failed attempt costs as much as reading a column.
        match line:
            case _Insert():
                table = self._tables.get((line.schema, line.table))
                return None if table is None else _insert(line, table)
            case _Update():
                table = self._tables.get((line.schema, line.table))
                return None if table is None else _update(line, table)
            case _Begin(xid=xid):
                return Begin(Xid(xid))
            case _Commit(nextlsn=end, timestamp=time):
                return Commit(_parse_lsn(end), _parse_commit_time_us(time))
            case _Delete():
                table = self._tables.get((line.schema, line.table))
                return None if table is None else _delete(line, table)
            case _Truncate():
                table = self._tables.get((line.schema, line.table))
                return None if table is None else TruncateMessage((table.streamed_table.root,))
            case _LogicalMessage():
                return None


def _insert(line: _Insert[str], table: _TableReader) -> RowChange:
    source = table.streamed_table
    new, shape = table.read_row(line.columns)
    change = Insert(source.root, new if source.leaf is None else source.order_columns(new))
    return RowChange(change, source.leaf, 0, shape)


def _update(line: _Update[str], table: _TableReader) -> RowChange:
    source = table.streamed_table
    new, shape = table.read_row(line.columns)
    old = _identity_row(line.identity)
    # An unchanged TOASTed value is left out of the line (``pg_decode_write_tuple``).
    if len(new) < len(source.column_names) or len(new) < len(old):
        # The old image has such values, inlined when it was logged (heapam.c,
        # ``ExtractReplicaIdentity``): all with FULL, those of the identity otherwise.
        if any(name not in new for name in old):
            missing = [column for column in line.identity if column.name not in new]
            _, shape = table.read_row([*line.columns, *missing])
        new = source.order_columns(old | new)
    elif source.leaf is not None:
        new = source.order_columns(new)
    change = Update(source.root, new, _old_image(old, source, len(new)))
    return RowChange(change, source.leaf, 0, shape)


def _delete(line: _Delete[str], table: _TableReader) -> RowChange:
    source = table.streamed_table
    old, shape = table.read_row(line.identity)
    change = Delete(source.root, _old_image(old, source, len(source.column_names)))
    return RowChange(change, source.leaf, 0, shape)


def _identity_row(columns: list[_Column[str]]) -> Row:
    """Return an old image without looking up its shape."""
    return {
        column.name: _convert_value(column.value)
        if column.typeoid in _CONVERTED_TYPES
        else column.value  # type: ignore[misc]  # only these two come as anything but text
        for column in columns
    }


def _convert_value(value: str | bool | None) -> str | None:  # noqa: FBT001 (JSON's)
    """Return PostgreSQL's text of a boolean or a bytea."""
    if isinstance(value, bool):
        return "t" if value else "f"
    return None if value is None else "\\x" + value


def _old_image(old: Row, table: StreamedTable, column_count: int) -> Key | WholeRow:
    row = old if table.leaf is None else table.order_columns(old)
    return WholeRow(row) if table.is_whole_row(row, column_count) else Key(row)


def _parse_lsn(text: str) -> LSN:
    """Return the LSN, unlike ``parse_lsn`` without checking its form: five times faster."""
    high, _, low = text.partition("/")
    try:
        return LSN(int(high, 16) << 32 | int(low, 16))
    except ValueError as error:
        raise _unreadable_line_error() from error


def _parse_commit_time_us(text: str) -> int:
    """Return a commit's time from its text, such as ``2026-11-24 12:37:04.08778+00``."""
    try:
        # PostgreSQL cuts trailing zeros; since 3.11 Python reads a fraction of any length. The
        # offset is that of the pinned TimeZone, UTC.
        since = datetime.fromisoformat(text) - _EPOCH
    except (ValueError, TypeError) as error:
        raise _unreadable_line_error() from error
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _unreadable_line_error() -> UnexpectedMessageError:
    # Doesn't quote the line, which has a row's values.
    return UnexpectedMessageError(
        "wal2json sent a line that can't be read",
        hint="Check that the server's wal2json is version 2.6 or newer.",
    )


def start_replication_options(tables: Collection[Table]) -> dict[str, str]:
    """Return the options of START_REPLICATION that ``Wal2JsonDecoder`` requires.

    Not ``include-types`` or ``include-default``, which print invalid JSON for some quoted names.
    Without tables ``add-tables`` is empty and selects nothing.
    """
    leaves = sorted(leaf for table in tables for leaf in (table.leaves or (table.name,)))
    return {
        "format-version": "2",
        "include-lsn": "1",
        "include-xids": "1",
        "include-timestamp": "1",
        "include-pk": "1",
        "include-types": "0",
        "include-type-oids": "1",
        # Otherwise they are JSON numbers; NaN and infinity are null (``pg_decode_write_value``).
        "numeric-data-types-as-string": "1",
        # A prefix that nobody uses: applications' logical messages, perhaps large, aren't sent.
        "add-msg-prefixes": "pgrealtime",
        "add-tables": ",".join(
            f"{_escape_name(leaf.schema)}.{_escape_name(leaf.name)}" for leaf in leaves
        ),
    }


def _escape_name(name: str) -> str:
    # Unescaped, a comma would end the name, and "*" select all tables of the schema.
    return "".join(f"\\{c}" if c in _CHARACTERS_TO_ESCAPE else c for c in name)
