"""Messages of the streaming replication protocol, byte for byte as PostgreSQL documents them."""

from __future__ import annotations

import pytest

from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN, parse_lsn
from pgrealtime.wal.wire import PrimaryKeepalive, StandbyStatusUpdate, format_status, parse_message


def test_data_is_what_follows_its_header() -> None:
    """XLogData has a header of 25 bytes."""
    message = memoryview(b"w" + bytes(24) + b"payload")

    assert parse_message(message) == memoryview(b"payload")


@pytest.mark.parametrize("is_reply_requested", [False, True])
def test_keepalive_has_wal_end_and_reply_request(is_reply_requested: bool) -> None:  # noqa: FBT001 (a parameter of the test)
    """It has the end of the WAL, and whether a reply is requested."""
    message = memoryview(
        b"k" + bytes.fromhex("00000016b374d848") + bytes(8) + bytes([is_reply_requested])
    )

    assert parse_message(message) == PrimaryKeepalive(parse_lsn("16/B374D848"), is_reply_requested)


@pytest.mark.parametrize("message", [b"", b"x" + bytes(40), b"k" + bytes(10)])
def test_other_messages_are_refused(message: bytes) -> None:
    """Empty messages, unknown types, and messages that are too short."""
    with pytest.raises(UnexpectedMessageError):
        parse_message(memoryview(message))


def test_status_says_written_flushed_applied_clock_and_reply() -> None:
    """Applied is the same as flushed."""
    status = StandbyStatusUpdate(LSN(0x1234), LSN(0x12), reply_requested=True)

    # PostgreSQL's clock starts 946,684,800 s after Unix's.
    assert format_status(status, 946_684_800_000_000 + 5) == bytes.fromhex(
        "72 0000000000001234 0000000000000012 0000000000000012 0000000000000005 01"
    )
