r"""wal2json's lines (format-version 2) into messages, on the way from the stream to the assembler.

Values come as PostgreSQL's text inside JSON strings, apart from two types that wal2json treats by
oid: boolean is a JSON literal, and bytea is hex without its ``\x``. Domains over them are text as
usual, having another oid. (wal2json.c, ``pg_decode_write_value``.)
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from functools import reduce
from operator import or_
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from pgrealtime.catalog.model import Table
from pgrealtime.changes import Delete, Insert, Key, Row, Update, WholeRow
from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN, Xid
from pgrealtime.wal.message import (
    Begin,
    Commit,
    Message,
    RowChange,
    Source,
    Truncated,
    sources,
)

_BOOL = 16
_BYTEA = 17
_TREATED = frozenset((_BOOL, _BYTEA))

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_ESCAPED = frozenset("\\,.*\"' \t\n\r\v\f")
"""What separates, ends or widens a name in ``add-tables``."""


_Name = TypeVar("_Name", bound=str)


class _Column(Struct, Generic[_Name], gc=False):
    name: _Name
    typeoid: int
    value: str | bool | None = None


class _Begin(Struct, tag_field="action", tag="B", gc=False):
    xid: int


class _Insert(Struct, Generic[_Name], tag_field="action", tag="I", gc=False):
    schema: str
    table: str
    columns: list[_Column[_Name]]


class _Update(Struct, Generic[_Name], tag_field="action", tag="U", gc=False):
    schema: str
    table: str
    columns: list[_Column[_Name]]
    identity: list[_Column[_Name]]


class _Delete(Struct, Generic[_Name], tag_field="action", tag="D", gc=False):
    schema: str
    table: str
    identity: list[_Column[_Name]]


class _Truncate(Struct, tag_field="action", tag="T", gc=False):
    schema: str
    table: str


class _Commit(Struct, tag_field="action", tag="C", gc=False):
    nextlsn: str
    timestamp: str


class _LogicalMessage(Struct, tag_field="action", tag="M", gc=False):
    """Of ``pg_logical_emit_message``: nothing of it is read."""


_Line: TypeAlias = (
    _Begin | _Insert[str] | _Update[str] | _Delete[str] | _Truncate | _Commit | _LogicalMessage
)


def _line_decoder(name: Any) -> msgspec.json.Decoder[_Line]:
    """Return a decoder of lines in which columns have names of the given type."""
    with_names: tuple[Any, ...] = (_Insert, _Update, _Delete)
    kinds = (_Begin, *(kind[name] for kind in with_names), _Truncate, _Commit, _LogicalMessage)
    return msgspec.json.Decoder(reduce(or_, kinds))


_ANY_LINE = _line_decoder(str)


def _known_line_decoder(tables: Collection[Table]) -> msgspec.json.Decoder[_Line]:
    """Return a decoder that knows the columns' names, and refuses others.

    It gives the same string for the same name each time, so that the rows kept in the changelog
    share their keys.
    """
    names = sorted({column.name for table in tables for column in table.columns})
    return _line_decoder(Literal[tuple(names)]) if names else _ANY_LINE


class Wal2JsonDecoder:
    """Decodes the lines about some tables; keeps nothing between lines."""

    def __init__(self, tables: Collection[Table]) -> None:
        self._sources: dict[tuple[str, str], Source] = {
            (leaf.schema, leaf.name): source for leaf, source in sources(tables).items()
        }
        self._line = _known_line_decoder(tables)

    def decode(self, payload: memoryview | bytes) -> Message | None:
        """Return what one line says, as ``wal.message.Decoder`` has it."""
        try:
            line = self._line.decode(payload)
        except msgspec.ValidationError:
            line = _any_line(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _unreadable() from error
        # The commonest first: trying a class that doesn't fit costs as much as a column.
        match line:
            case _Insert():
                source = self._sources.get((line.schema, line.table))
                return None if source is None else RowChange(_insert(line, source), source.leaf)
            case _Update():
                source = self._sources.get((line.schema, line.table))
                return None if source is None else RowChange(_update(line, source), source.leaf)
            case _Begin(xid=xid):
                return Begin(Xid(xid))
            case _Commit(nextlsn=end, timestamp=time):
                return Commit(_lsn(end), _microseconds(time))
            case _Delete():
                source = self._sources.get((line.schema, line.table))
                return None if source is None else RowChange(_delete(line, source), source.leaf)
            case _Truncate():
                source = self._sources.get((line.schema, line.table))
                return None if source is None else Truncated((source.root,))
            case _LogicalMessage():
                return None


def _any_line(payload: memoryview | bytes) -> _Line:
    """Return a line in which a column is new, unless it isn't a line at all."""
    try:
        return _ANY_LINE.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable() from error


def _insert(line: _Insert[str], source: Source) -> Insert:
    new = _row(line.columns)
    return Insert(source.root, new if source.leaf is None else source.in_order(new))


def _update(line: _Update[str], source: Source) -> Update:
    new, old = _row(line.columns), _row(line.identity)
    if len(new) < len(source.names) or len(new) < len(old):
        # Columns are missing that the update left in TOAST: FULL logs them in the old row, the
        # other identities do so for those of the key.
        new = source.in_order(old | new)
    elif source.leaf is not None:
        new = source.in_order(new)
    return Update(source.root, new, _image(old, source, len(new)))


def _delete(line: _Delete[str], source: Source) -> Delete:
    return Delete(source.root, _image(_row(line.identity), source, len(source.names)))


def _row(columns: list[_Column[str]]) -> Row:
    return {
        column.name: _text(column) if column.typeoid in _TREATED else column.value  # type: ignore[misc]  # only these two come as anything but text
        for column in columns
    }


def _text(column: _Column[str]) -> str | None:
    match column.value:
        case None:
            return None
        case True:
            return "t"
        case False:
            return "f"
        case str(digits):
            return "\\x" + digits


def _image(old: Row, source: Source, width: int) -> Key | WholeRow:
    row = old if source.leaf is None else source.in_order(old)
    return WholeRow(row) if source.is_whole(row, width) else Key(row)


def _lsn(text: str) -> LSN:
    """Return the LSN, as ``parse_lsn`` does at five times the cost: twice per transaction."""
    high, _, low = text.partition("/")
    try:
        return LSN(int(high, 16) << 32 | int(low, 16))
    except ValueError as error:
        raise _unreadable() from error


def _microseconds(text: str) -> int:
    """Return a commit's time, printed as ``2026-11-24 12:37:04.08778+00``."""
    try:
        since = datetime.fromisoformat(text) - _EPOCH
    except (ValueError, TypeError) as error:
        raise _unreadable() from error
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _unreadable() -> UnexpectedMessageError:
    # The line is not quoted: it holds a row.
    return UnexpectedMessageError(
        "wal2json sent a line that can't be read",
        hint="Check that the server's wal2json is version 2.6 or newer.",
    )


def options(tables: Collection[Table]) -> dict[str, str]:
    """Return the options of START_REPLICATION that ``Wal2JsonDecoder`` counts on.

    Never among them are ``include-types`` and ``include-default``: both print broken JSON for
    some quoted names. An empty ``add-tables`` selects nothing, which is what no tables means.
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
        "numeric-data-types-as-string": "1",
        "add-msg-prefixes": "pgrealtime",
        "add-tables": ",".join(f"{_escape(leaf.schema)}.{_escape(leaf.name)}" for leaf in leaves),
    }


def _escape(name: str) -> str:
    return "".join(f"\\{c}" if c in _ESCAPED else c for c in name)
