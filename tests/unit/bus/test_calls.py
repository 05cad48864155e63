from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.bus.base import NoBus, draw_tag, tag_of
from pgrealtime.bus.calls import CallAnswer, ReachedLimit, SubscribeCall, decode, encode
from pgrealtime.errors import BusError, HolderGoneError

ID = "aB3dE6" + "x" * 34


@pytest.mark.parametrize(
    ("client_id", "tag"),
    [
        (ID, "aB3dE6"),
        (f"{ID}.00beef-0000000000000001-00000000", "aB3dE6"),
        (f"{ID}.\n", "aB3dE6"),
        (ID[:-1], None),
        (f"{ID}x", None),
        (f"{ID}\n", None),
        ("a-3dE6" + "x" * 34, None),
        ("é" + ID[1:], None),
        ("٣" + ID[1:], None),
        ("", None),
        (".", None),
    ],
)
def test_only_an_id_that_a_process_makes_has_a_tag(client_id: str, tag: str | None) -> None:
    """Anything may come as a client id; what isn't one asks no other process."""
    assert tag_of(client_id) == tag


def test_tags_are_drawn() -> None:
    """Two processes never have the same one."""
    tags = {draw_tag() for _ in range(1000)}
    assert len(tags) == 1000
    assert {tag_of(tag + "x" * 34) for tag in tags} == tags


async def test_a_process_that_is_alone_finds_no_other() -> None:
    with pytest.raises(HolderGoneError) as raised:
        await NoBus("aaaaaa").call("bbbbbb", b"")
    assert raised.value.error_code == "holder_gone"


_TEXTS = st.text(max_size=50)  # lone surrogates never get through the check of a body
_CALLS = st.builds(
    SubscribeCall,
    client_id=_TEXTS,
    address=_TEXTS,
    authorization=st.none() | st.text(st.characters(max_codepoint=127), max_size=50),
    topic_texts=st.lists(_TEXTS, max_size=5).map(tuple),
    wants_outcome=st.booleans(),
)


@given(_CALLS)
def test_a_call_arrives_as_it_was(call: SubscribeCall) -> None:
    assert decode(encode(call), SubscribeCall) == call


@pytest.mark.parametrize(
    "answer",
    [
        CallAnswer(),
        CallAnswer(outcome="caller=guest; mute=0"),
        CallAnswer(error_code="client_unknown"),
        CallAnswer(error_code="subscription_limit", limit=ReachedLimit(3, "views", 100)),
    ],
)
def test_an_answer_arrives_as_it_was(answer: CallAnswer) -> None:
    assert decode(encode(answer), CallAnswer) == answer


def test_a_header_that_is_no_text_can_be_passed_on() -> None:
    """HTTP allows any byte; no token has one beyond ASCII."""
    call = SubscribeCall(client_id=ID, address="::1", authorization="Bearer \udcff\xe9")
    assert decode(encode(call), SubscribeCall).authorization == "Bearer ??"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([2, ID, "::1"]),
        msgspec.msgpack.encode([1, ID]),
        msgspec.msgpack.encode([1, ID, 5]),
        msgspec.msgpack.encode({"version": 1}),
        msgspec.msgpack.encode([1, b"\xff", "::1"]),
    ],
)
def test_what_another_version_wrote_is_an_error_with_a_code(data: bytes) -> None:
    with pytest.raises(BusError) as raised:
        decode(data, SubscribeCall)
    assert raised.value.error_code == "call_unreadable"


def test_a_later_version_may_add_members_at_the_end() -> None:
    """Replicas of two versions run side by side while a new one is rolled out."""
    call = SubscribeCall(client_id=ID, address="::1", topic_texts=("posts/*",))
    more = msgspec.msgpack.encode([*msgspec.to_builtins(call), "new"])
    assert decode(more, SubscribeCall) == call
