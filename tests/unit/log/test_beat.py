"""What replicas of different versions hear of each other."""

from __future__ import annotations

import msgspec
import pytest

from pgrealtime.changes import TableName
from pgrealtime.errors import LogMessageError
from pgrealtime.log.beat import Beat, Presence, decode, encode
from pgrealtime.log.message import WIRE_VERSION
from pgrealtime.lsn import LSN

BEAT = Beat(
    term=3,
    salt=5,
    tag="abcdef",
    sequence=7,
    head_lsn=LSN(20),
    wal_end=LSN(30),
    deaf_seconds=0.5,
    is_streaming=True,
)
PRESENCE = Presence(
    tag="abcdef",
    program="1.2.3",
    digest="d",
    connections=2,
    head_lsn=LSN(20),
    tables=(TableName("public", "posts"),),
)


@pytest.mark.parametrize("said", [BEAT, PRESENCE], ids=["beat", "presence"])
def test_what_a_later_version_says_more_is_left_out(said: Beat | Presence) -> None:
    """It owns the log, or is there, all the same: an earlier one doesn't take over from it."""
    later = [WIRE_VERSION + 1, *msgspec.to_builtins(said)[1:], {"more": 1}]
    heard = decode(msgspec.msgpack.encode(later), type(said))
    assert heard == msgspec.structs.replace(said, version=WIRE_VERSION + 1)
    assert decode(encode(said), type(said)) == said


@pytest.mark.parametrize("payload", [b"", b"not one", msgspec.msgpack.encode([1, "x"])])
def test_what_is_no_beat_is_told_apart(payload: bytes) -> None:
    with pytest.raises(LogMessageError):
        decode(payload, Beat)
