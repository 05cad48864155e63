"""WAL positions, cursors that order changes, and the positions that clients receive and submit."""

import re
from typing import NamedTuple, NewType

LSN = NewType("LSN", int)
"""A byte position in the WAL, 64 bits."""

Xid = NewType("Xid", int)
"""A 32-bit transaction id: it wraps around, so it is neither ordered nor unique over time."""

_LSN_LIMIT = 1 << 64
_LSN_TEXT = re.compile(r"([0-9a-fA-F]{1,8})/([0-9a-fA-F]{1,8})")


class Cursor(NamedTuple):
    """A point between two changes of the stream: the end LSN of a commit and a change's ordinal.

    Tuple order is stream order. ``Cursor(lsn, 0)`` is before the first change of the transaction
    that ends at ``lsn``, ``Cursor(lsn, n)`` after its n-th (1-based) change, ``Cursor(lsn,
    END_ORDINAL)`` after the transaction, however many changes it has.
    """

    lsn: LSN
    ordinal: int


END_ORDINAL = 0xFFFF_FFFF
"""Ordinal after every change of a transaction: the largest of the client's form."""


def parse_lsn(text: str) -> LSN:
    """Parse an LSN as PostgreSQL prints it: two hexadecimal halves, such as ``16/B374D848``.

    Raises:
        ValueError: The text has another form.
    """
    halves = _LSN_TEXT.fullmatch(text)
    if halves is None:
        raise ValueError(f"not an LSN: {text!r}")
    return LSN(int(halves[1], 16) << 32 | int(halves[2], 16))


def format_lsn(lsn: LSN) -> str:
    """Return the LSN as PostgreSQL prints it."""
    if not 0 <= lsn < _LSN_LIMIT:
        raise ValueError(f"not a 64-bit LSN: {lsn}")
    return f"{lsn >> 32:X}/{lsn & 0xFFFF_FFFF:X}"


class Position(NamedTuple):
    """A cursor and the epoch it is valid in: the id of an SSE message, submitted to resume."""

    epoch: str
    """Six lower case hexadecimal digits: digest of system, timeline, database and tables."""
    cursor: Cursor
    awaits_resync: bool = False
    """Whether a mirror of the connection was about to be told to load anew. It is complete up to
    the cursor all the same if the client has its mirrors loaded anew on resuming."""


_WIDTHS = (6, 16, 8)
_RESYNC_MARK = "-r"
"""After a position's text: it sorts behind that position and before every later one."""


def format_position(position: Position) -> str:
    """Return ``EPOCH-LSN-ORDINAL``: lower case hex of fixed width, so texts sort as cursors."""
    mark = _RESYNC_MARK if position.awaits_resync else ""
    return f"{position.epoch}-{position.cursor.lsn:016x}-{position.cursor.ordinal:08x}{mark}"


def parse_position(text: str) -> Position | None:
    """Return the position that ``format_position`` printed, or None for any other text."""
    unmarked = text.removesuffix(_RESYNC_MARK)
    parts = unmarked.split("-")
    if tuple(map(len, parts)) != _WIDTHS:
        return None
    if not all(c in "0123456789abcdef" for part in parts for c in part):
        return None
    cursor = Cursor(LSN(int(parts[1], 16)), int(parts[2], 16))
    return Position(parts[0], cursor, awaits_resync=unmarked != text)
