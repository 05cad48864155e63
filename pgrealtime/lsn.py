"""Positions: the LSN as Postgres prints it, and the cursor that orders what clients receive."""

from __future__ import annotations

from typing import NamedTuple, NewType

LSN = NewType("LSN", int)
"""A byte position in the WAL, 64 bits."""

Xid = NewType("Xid", int)
"""A 32-bit transaction id as the stream has it: wraps, neither ordered nor unique over time."""

_LSN_LIMIT = 1 << 64


class Cursor(NamedTuple):
    """A place in the stream: the end of a commit, and how many of its changes lie behind.

    Tuple order is stream order. ``Cursor(lsn, 0)`` stands before the first change of the
    transaction that ends at ``lsn``; ``Cursor(lsn, n)`` after its n-th (1-based) change.
    ``END_ORDINAL`` as ordinal stands after the whole transaction, however many changes it has.
    """

    lsn: LSN
    ordinal: int


END_ORDINAL = 0xFFFF_FFFF
"""Ordinal after every change of a transaction; the largest that the wire form can hold."""


def parse_lsn(text: str) -> LSN:
    """Return the LSN that Postgres prints as two hexadecimal halves, such as ``16/B374D848``.

    Raises:
        ValueError: The text isn't of that form.
    """
    high, slash, low = text.partition("/")
    if not slash or not _is_half(high) or not _is_half(low):
        raise ValueError(f"not an LSN: {text!r}")
    return LSN(int(high, 16) << 32 | int(low, 16))


def _is_half(text: str) -> bool:
    return 0 < len(text) <= 8 and all(c in "0123456789abcdefABCDEF" for c in text)  # noqa: PLR2004 (32 bits)


def format_lsn(lsn: LSN) -> str:
    """Return the LSN as Postgres prints it."""
    if not 0 <= lsn < _LSN_LIMIT:
        raise ValueError(f"not a 64-bit LSN: {lsn}")
    return f"{lsn >> 32:X}/{lsn & 0xFFFF_FFFF:X}"


class Position(NamedTuple):
    """A cursor together with the epoch it is valid in; what a client keeps and sends back."""

    epoch: str
    """Six lower case hexadecimal digits: digest of system, timeline, database and tables."""
    cursor: Cursor


_WIDTHS = (6, 16, 8)


def format_position(position: Position) -> str:
    """Return ``EPOCH-LSN-ORDINAL``, fixed width lower case hex, so that text order is order."""
    return f"{position.epoch}-{position.cursor.lsn:016x}-{position.cursor.ordinal:08x}"


def parse_position(text: str) -> Position | None:
    """Return the position that ``format_position`` printed, or None for any other text."""
    parts = text.split("-")
    if tuple(map(len, parts)) != _WIDTHS:
        return None
    if not all(c in "0123456789abcdef" for part in parts for c in part):
        return None
    return Position(parts[0], Cursor(LSN(int(parts[1], 16)), int(parts[2], 16)))
