r"""wal2json's lines (format-version 2) into messages, on the way from the stream to the assembler.

Values come as PostgreSQL's text inside JSON strings, apart from two types that wal2json treats by
oid: boolean is a JSON literal, and bytea is hex without its ``\x``. Domains over them are text as
usual, having another oid. (wal2json.c, ``pg_decode_write_value``.)
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import TypeAlias

import msgspec
from msgspec import Struct

from pgrealtime.catalog.model import Table
from pgrealtime.changes import Delete, Insert, Key, Row, Update, WholeRow
from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN, Xid, parse_lsn
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

_ESCAPED = frozenset("\\,.*\"' \t\n\r\v\f")
"""What separates, ends or widens a name in ``add-tables``."""


class _Column(Struct, gc=False):
    name: str
    typeoid: int
    value: str | bool | None = None


class _Begin(Struct, tag_field="action", tag="B", gc=False):
    xid: int


class _Insert(Struct, tag_field="action", tag="I", gc=False):
    schema: str
    table: str
    columns: list[_Column]


class _Update(Struct, tag_field="action", tag="U", gc=False):
    schema: str
    table: str
    columns: list[_Column]
    identity: list[_Column]


class _Delete(Struct, tag_field="action", tag="D", gc=False):
    schema: str
    table: str
    identity: list[_Column]


class _Truncate(Struct, tag_field="action", tag="T", gc=False):
    schema: str
    table: str


class _Commit(Struct, tag_field="action", tag="C", gc=False):
    nextlsn: str
    timestamp: str


class _LogicalMessage(Struct, tag_field="action", tag="M", gc=False):
    """Of ``pg_logical_emit_message``: nothing of it is read."""


_Line: TypeAlias = _Begin | _Insert | _Update | _Delete | _Truncate | _Commit | _LogicalMessage

_LINE: msgspec.json.Decoder[_Line] = msgspec.json.Decoder(_Line)


class Wal2JsonDecoder:
    """Decodes the lines about some tables; keeps nothing between lines."""

    def __init__(self, tables: Collection[Table]) -> None:
        self._sources: dict[tuple[str, str], Source] = {
            (leaf.schema, leaf.name): source for leaf, source in sources(tables).items()
        }

    def decode(self, payload: memoryview | bytes) -> Message | None:
        """Return what one line says, as ``wal.message.Decoder`` has it."""
        try:
            line = _LINE.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _unreadable() from error
        match line:
            case _Insert() | _Update() | _Delete():
                source = self._sources.get((line.schema, line.table))
                return None if source is None else RowChange(_change(line, source), source.leaf)
            case _Begin(xid=xid):
                return Begin(Xid(xid))
            case _Commit(nextlsn=end, timestamp=time):
                return Commit(_lsn(end), _microseconds(time))
            case _Truncate():
                source = self._sources.get((line.schema, line.table))
                return None if source is None else Truncated((source.root,))
            case _LogicalMessage():
                return None


def _change(line: _Insert | _Update | _Delete, source: Source) -> Insert | Update | Delete:
    match line:
        case _Insert(columns=columns):
            return Insert(source.root, _ordered(_row(columns), source))
        case _Update(columns=columns, identity=identity):
            new, old = _row(columns), _row(identity)
            # Columns are missing that the update left in TOAST: FULL logs them in the old row,
            # the other identities do so for those of the key.
            if len(new) < len(source.names):
                new = source.in_order(old | new)
            return Update(source.root, _ordered(new, source), _image(old, source, len(new)))
        case _Delete(identity=identity):
            old = _row(identity)
            return Delete(source.root, _image(old, source, len(source.names)))


def _row(columns: list[_Column]) -> Row:
    return {
        column.name: _text(column) if column.typeoid in _TREATED else column.value  # type: ignore[misc]  # only these two come as anything but text
        for column in columns
    }


def _text(column: _Column) -> str | None:
    match column.value:
        case None:
            return None
        case True:
            return "t"
        case False:
            return "f"
        case str(digits):
            return "\\x" + digits


def _ordered(row: Row, source: Source) -> Row:
    return source.in_order(row) if source.is_leaf else row


def _image(old: Row, source: Source, width: int) -> Key | WholeRow:
    if source.is_whole(old, width):
        return WholeRow(_ordered(old, source))
    return Key(_ordered(old, source))


def _lsn(text: str) -> LSN:
    try:
        return parse_lsn(text)
    except ValueError as error:
        raise _unreadable() from error


def _microseconds(text: str) -> int:
    """Return a commit's time, printed as ``2026-11-24 12:37:04.08778+00``."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise _unreadable() from error
    # Not timestamp(): a float of today's microseconds has no digit to spare.
    return int(moment.replace(microsecond=0).timestamp()) * 1_000_000 + moment.microsecond


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
