"""Payloads of CopyData in the streaming replication protocol, between libpq and the stream."""

from __future__ import annotations

import struct
from typing import NamedTuple, TypeAlias

from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN

_XLOG_DATA = struct.Struct("!cQQq")
_KEEPALIVE = struct.Struct("!cQqB")
_STATUS = struct.Struct("!cQQQqB")

UNIX_EPOCH_OFFSET = 946_684_800_000_000
"""Microseconds from the Unix epoch to PostgreSQL's, 2000-01-01 UTC."""


class XLogData(NamedTuple):
    """What the decoder says, and where in the WAL it stands."""

    start: LSN
    """The change's own position; of a commit the end of its record."""
    payload: memoryview
    """A view into the buffer it came in: gone with the next read."""


class PrimaryKeepalive(NamedTuple):
    """The server is alive."""

    wal_end: LSN
    """Everything before it has been decoded, and sent where it was for us."""
    reply_requested: bool
    """The server wants a status update at once."""


class StandbyStatusUpdate(NamedTuple):
    """What we tell the server of our progress."""

    written: LSN
    flushed: LSN
    """Up to here the server may forget; 0 leaves that as it is."""
    reply_requested: bool = False
    """Asks the server for a keepalive at once."""


ServerMessage: TypeAlias = XLogData | PrimaryKeepalive


def parse_message(data: memoryview) -> ServerMessage:
    """Return what one CopyData payload from the server holds.

    Source: PostgreSQL documentation, "Streaming Replication Protocol".

    Raises:
        UnexpectedMessageError: It is of neither form.
    """
    kind = bytes(data[:1])
    if kind == b"w" and len(data) >= _XLOG_DATA.size:
        _, start, _, _ = _XLOG_DATA.unpack_from(data)
        return XLogData(LSN(start), data[_XLOG_DATA.size :])
    if kind == b"k" and len(data) >= _KEEPALIVE.size:
        _, end, _, reply = _KEEPALIVE.unpack_from(data)
        return PrimaryKeepalive(LSN(end), bool(reply))
    raise UnexpectedMessageError(
        "the server sent something that is no replication message",
        detail=f"Its kind is {kind!r}, its length {len(data)} bytes.",
    )


def format_status(status: StandbyStatusUpdate, clock: int) -> bytes:
    """Return the CopyData payload of a status update.

    Args:
        status: The positions. What is applied is said to be what is flushed.
        clock: Microseconds since the Unix epoch.
    """
    return _STATUS.pack(
        b"r",
        status.written,
        status.flushed,
        status.flushed,
        clock - UNIX_EPOCH_OFFSET,
        status.reply_requested,
    )
