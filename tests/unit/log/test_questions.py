"""What replicas say to each other is read as it was written, and nothing else is."""

import msgspec
import pytest

from pgrealtime.changes import TableName
from pgrealtime.errors import LogMessageError, PgRealtimeError, SetupError
from pgrealtime.log.beat import DEAF_SECONDS, Beat, Presence, decode, encode
from pgrealtime.log.questions import (
    Answer,
    GapQuestion,
    PositionQuestion,
    Question,
    TablesQuestion,
    decode_answer,
    decode_question,
    refusal,
)
from pgrealtime.lsn import LSN

POSTS = TableName("public", "posts")
BEAT = Beat(
    term=3,
    salt=7,
    tag="abcdef",
    sequence=9,
    head_lsn=LSN(100),
    wal_end=LSN(200),
    deaf_seconds=0.5,
    is_streaming=True,
)


@pytest.mark.parametrize(
    "question",
    [
        PositionQuestion(LSN(5)),
        TablesQuestion((POSTS,), ((POSTS, ("id",)),)),
        GapQuestion("schema", (POSTS,)),
    ],
    ids=["position", "tables", "gap"],
)
def test_a_question_is_read_as_it_was_asked(question: Question) -> None:
    assert decode_question(msgspec.msgpack.encode(question)) == question


def test_the_owners_error_is_raised_where_it_was_asked() -> None:
    answer = decode_answer(
        msgspec.msgpack.encode(refusal(SetupError("no such table", hint="Make it.", code="gone")))
    )
    with pytest.raises(PgRealtimeError, match="no such table") as raised:
        answer.raise_error()
    assert (raised.value.error_code, raised.value.hint) == ("gone", "Make it.")
    Answer(sequence=3).raise_error()


def test_beats_and_presence_are_read_as_they_were_said() -> None:
    presence = Presence(
        tag="abcdef", program="1", digest="d", connections=2, head_lsn=LSN(1), tables=(POSTS,)
    )
    assert decode(encode(BEAT), Beat) == BEAT
    assert decode(encode(presence), Presence) == presence


@pytest.mark.parametrize("payload", [b"", b"\x01", b"text", b"\x93\x09\x02\x03"])
def test_what_is_neither_is_refused(payload: bytes) -> None:
    for read in (decode_question, decode_answer, lambda said: decode(said, Beat)):
        with pytest.raises(LogMessageError):
            read(payload)


@pytest.mark.parametrize(
    ("term", "deaf_seconds", "is_valid"),
    [(3, 0.0, True), (4, 0.0, False), (2, 0.0, True), (3, DEAF_SECONDS, False)],
    ids=["of the term", "of an earlier one", "of a later one", "deaf"],
)
def test_a_beat_shows_an_owner(term: int, deaf_seconds: float, *, is_valid: bool) -> None:
    beat = msgspec.structs.replace(BEAT, deaf_seconds=deaf_seconds)
    assert beat.is_valid(term) is is_valid
