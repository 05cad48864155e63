"""The CopyData payloads of the streaming replication protocol. Pure; used by ``wal.stream``.

Source: PostgreSQL documentation, "Streaming Replication Protocol". All integers are big-endian.

    XLogData             'w' start:int64 end:int64 clock:int64, then the decoder's output
    Primary keepalive    'k' end:int64 clock:int64 reply:byte
    Standby status       'r' written:int64 flushed:int64 applied:int64 clock:int64 reply:byte
"""

import struct
from typing import NamedTuple

from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN

_XLOG_DATA = ord("w")
# The letter and three int64.
_XLOG_HEADER_BYTES = 25
_PRIMARY_KEEPALIVE = ord("k")
# Positions are unsigned (XLogRecPtr), clocks signed: microseconds since 2000-01-01 UTC, negative
# before.
_KEEPALIVE = struct.Struct("!cQqB")
_STATUS = struct.Struct("!cQQQqB")

UNIX_EPOCH_OFFSET = 946_684_800_000_000
"""Microseconds from the Unix epoch to PostgreSQL's, 2000-01-01 UTC."""


class PrimaryKeepalive(NamedTuple):
    """The server's sign of life and how far it has read."""

    wal_end: LSN
    """Everything before it was decoded, and what concerns this stream was sent."""
    reply_requested: bool
    """The server wants a status update at once."""


class StandbyStatusUpdate(NamedTuple):
    """The positions that the server is informed of."""

    written: LSN
    flushed: LSN
    """The confirmed flush LSN: the server may remove WAL up to it. 0 leaves it unchanged."""
    reply_requested: bool = False
    """Asks the server for a keepalive at once."""


def parse_message(data: memoryview) -> memoryview | PrimaryKeepalive:
    """Return the decoder's output, a view of the same buffer, or a keepalive.

    Raises:
        UnexpectedMessageError: The payload is neither of them.
    """
    if data and data[0] == _XLOG_DATA:
        # The header's positions are the change's, which may lie before changes already sent:
        # transactions are sent in the order of their commits, and their changes interleave in the
        # WAL. Only the end of a commit is in stream order, and the decoder's output has it.
        return data[_XLOG_HEADER_BYTES:]
    if len(data) >= _KEEPALIVE.size and data[0] == _PRIMARY_KEEPALIVE:
        _, end, _, reply = _KEEPALIVE.unpack_from(data)
        return PrimaryKeepalive(LSN(end), bool(reply))
    raise UnexpectedMessageError(
        "the server sent something that is no replication message",
        detail=f"It begins with {bytes(data[:1])!r} and has {len(data)} bytes.",
    )


def format_status(status: StandbyStatusUpdate, now_us: int) -> bytes:
    """Return the payload of a status update; ``now_us`` is in microseconds since the Unix epoch.

    The applied position is sent equal to the flushed one.
    """
    # Applied is sent equal to flushed: only synchronous_commit = remote_apply waits for it, and
    # what is kept here needs no further step to be visible.
    return _STATUS.pack(
        b"r",
        status.written,
        status.flushed,
        status.flushed,
        now_us - UNIX_EPOCH_OFFSET,
        status.reply_requested,
    )
