"""Payloads of CopyData in the streaming replication protocol, between libpq and the stream."""

from __future__ import annotations

import struct
from typing import NamedTuple

from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN

_XLOG_DATA = ord("w")
_XLOG_HEADER_BYTES = 25
_PRIMARY_KEEPALIVE = ord("k")
_KEEPALIVE = struct.Struct("!cQqB")
_STATUS = struct.Struct("!cQQQqB")

UNIX_EPOCH_OFFSET = 946_684_800_000_000
"""Microseconds from the Unix epoch to PostgreSQL's, 2000-01-01 UTC."""


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


def parse_message(data: memoryview) -> memoryview | PrimaryKeepalive:
    """Return what one CopyData payload from the server holds: decoder output, or a keepalive.

    XLogData's own header is passed over: its positions are those of the change, which may lie
    before others that were sent; what counts is the end of a commit, and the decoder tells that.
    Decoder output is a view into the same buffer.

    Source: PostgreSQL documentation, "Streaming Replication Protocol".

    Raises:
        UnexpectedMessageError: It is of neither form.
    """
    if data and data[0] == _XLOG_DATA:
        return data[_XLOG_HEADER_BYTES:]
    if len(data) >= _KEEPALIVE.size and data[0] == _PRIMARY_KEEPALIVE:
        _, end, _, reply = _KEEPALIVE.unpack_from(data)
        return PrimaryKeepalive(LSN(end), bool(reply))
    raise UnexpectedMessageError(
        "the server sent something that is no replication message",
        detail=f"It begins with {bytes(data[:1])!r} and has {len(data)} bytes.",
    )


def format_status(status: StandbyStatusUpdate, now_us: int) -> bytes:
    """Return the CopyData payload of a status update.

    Args:
        status: The positions. What is applied is said to be what is flushed.
        now_us: Microseconds since the Unix epoch.
    """
    return _STATUS.pack(
        b"r",
        status.written,
        status.flushed,
        status.flushed,
        now_us - UNIX_EPOCH_OFFSET,
        status.reply_requested,
    )
