"""The replication protocol's payloads, byte for byte as the documentation lays them out."""

from __future__ import annotations

import pytest

from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN, parse_lsn
from pgrealtime.wal.wire import PrimaryKeepalive, StandbyStatusUpdate, format_status, parse_message


def test_data_is_what_follows_its_header() -> None:
    message = memoryview(b"w" + bytes(24) + b"payload")

    assert parse_message(message) == memoryview(b"payload")


@pytest.mark.parametrize("asks", [False, True])
def test_keepalive_tells_the_end_and_whether_it_wants_an_answer(asks: bool) -> None:  # noqa: FBT001 (a parameter of the test)
    message = memoryview(b"k" + bytes.fromhex("00000016b374d848") + bytes(8) + bytes([asks]))

    assert parse_message(message) == PrimaryKeepalive(parse_lsn("16/B374D848"), asks)


@pytest.mark.parametrize("message", [b"", b"x" + bytes(40), b"k" + bytes(10)])
def test_other_messages_are_refused(message: bytes) -> None:
    with pytest.raises(UnexpectedMessageError):
        parse_message(memoryview(message))


def test_status_says_written_flushed_applied_clock_and_reply() -> None:
    status = StandbyStatusUpdate(LSN(0x1234), LSN(0x12), reply_requested=True)

    # PostgreSQL's clock starts 946,684,800 s after Unix's.
    assert format_status(status, 946_684_800_000_000 + 5) == bytes.fromhex(
        "72 0000000000001234 0000000000000012 0000000000000012 0000000000000005 01"
    )
