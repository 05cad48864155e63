from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.bus.seal import (
    FRESH_MS,
    MAX_MESSAGE_BYTES,
    Envelope,
    Kind,
    Opener,
    derive_key,
    seal,
    unpack,
)
from pgrealtime.errors import BusError

KEY = derive_key("a secret of more than thirty-two characters", "app")
PART = 500
NOW = 1_800_000_000_000
REQUEST = Envelope(kind=Kind.REQUEST, message_id=b"m" * 16, sender="sender", recipient="holder")
ANSWER = Envelope(kind=Kind.ANSWER, message_id=b"m" * 16, sender="sender", recipient="holder")
NOISE = random.Random(1).randbytes(100_000)
"""Doesn't get smaller."""


def sealed(data: bytes = b"text", envelope: Envelope = REQUEST, key: bytes = KEY) -> list[bytes]:
    return seal(key, envelope, data, now_ms=NOW, part_bytes=PART)


def opener(
    key: bytes = KEY, tag: str = "holder", *, awaits: Callable[[bytes], bool] = lambda _: True
) -> Opener:
    return Opener(key, tag, awaits)


def open_all(by: Opener, parts: list[bytes]) -> tuple[Envelope, bytes] | None:
    """Return the message that the last part completes, and no other."""
    opened = None
    for part in parts:
        assert opened is None
        opened = by.open(part, now_ms=NOW)
    return None if opened is None else (opened.envelope, unpack(opened.content))


def code_of(by: Opener, part: bytes, now_ms: int = NOW) -> str:
    with pytest.raises(BusError) as raised:
        by.open(part, now_ms=now_ms)
    return raised.value.error_code


def code_of_content(content: bytes) -> str:
    with pytest.raises(BusError) as raised:
        unpack(content)
    return raised.value.error_code


@pytest.mark.parametrize("envelope", [REQUEST, ANSWER])
@given(data=st.binary(max_size=3000), order=st.randoms(use_true_random=False))
def test_a_message_arrives_as_it_was_in_any_order(
    envelope: Envelope, data: bytes, order: random.Random
) -> None:
    parts = sealed(data, envelope)
    order.shuffle(parts)
    assert open_all(opener(), parts) == (envelope, data)
    assert max(map(len, parts)) <= PART


def test_messages_may_come_interleaved() -> None:
    other = replace(REQUEST, message_id=b"o" * 16)
    by = opener()
    mixed = [
        part for pair in zip(sealed(NOISE), sealed(NOISE, other), strict=True) for part in pair
    ]
    found = [opened for part in mixed if (opened := by.open(part, now_ms=NOW)) is not None]
    assert [(one.envelope, unpack(one.content)) for one in found] == [
        (REQUEST, NOISE),
        (other, NOISE),
    ]


def test_nothing_of_it_can_be_read() -> None:
    """It carries a token, and any role of the database may listen."""
    parts = sealed(b"Bearer eyJhbGciOi" * 100)
    assert not any(b"eyJ" in part for part in parts)
    assert len(set(parts)) == len(parts)


def test_a_large_message_is_compressed() -> None:
    topics = b"".join(b"posts/%d?filter=author = 5" % n for n in range(4000))
    assert sum(map(len, sealed(topics))) < len(topics) / 3
    assert open_all(opener(), sealed(topics)) == (REQUEST, topics)


@pytest.mark.parametrize("offset", [0, 1, 2, 5, 7, 9, 15, 16, 22, 37, 38, -1])
def test_a_change_of_any_byte_is_noticed(offset: int) -> None:
    (part,) = sealed()
    forged = bytearray(part)
    forged[offset] ^= 1
    assert code_of(opener(), bytes(forged)) in ("call_unsealed", "call_malformed")


@pytest.mark.parametrize(
    ("by", "part"),
    [
        (opener(derive_key("another secret of thirty-two characters", "app")), sealed()[0]),
        (opener(derive_key("a secret of more than thirty-two characters", "other")), sealed()[0]),
        (opener(tag="nobody"), sealed()[0]),
        (opener(), sealed(NOISE, replace(REQUEST, recipient="nobody"))[0]),
    ],
    ids=["secret", "name", "sent on", "for another"],
)
def test_what_is_sealed_for_others_is_not_opened(by: Opener, part: bytes) -> None:
    """Two clusters with one name, and a message that somebody sends on to another process."""
    assert code_of(by, part) == "call_unsealed"


def test_a_request_is_no_answer_and_an_answer_no_request() -> None:
    (part,) = sealed(envelope=ANSWER)
    turned = bytearray(part)
    turned[1] = Kind.REQUEST
    assert code_of(opener(), bytes(turned)) == "call_unsealed"


@pytest.mark.parametrize("data", [b"", b"x", b"x" * 54, bytes(200), b"\xff" * 7000])
def test_what_was_never_sealed_is_not_opened(data: bytes) -> None:
    assert code_of(opener(), data) in ("call_malformed", "call_unsealed")


def test_a_request_that_is_sent_again_is_refused() -> None:
    """It would put back the topics that the client had before."""
    by = opener()
    (part,) = sealed()
    assert by.open(part, now_ms=NOW) is not None
    assert code_of(by, part) == "call_replayed"
    assert code_of(by, part, NOW + FRESH_MS - 1) == "call_replayed"
    assert code_of(by, part, NOW + FRESH_MS) == "call_stale"


def test_a_request_from_the_future_is_remembered_until_it_is_stale() -> None:
    by = opener()
    (part,) = sealed()
    assert by.open(part, now_ms=NOW - FRESH_MS + 1) is not None
    assert code_of(by, part, NOW + FRESH_MS - 1) == "call_replayed"
    assert code_of(opener(), part, NOW - FRESH_MS) == "call_stale"


def test_what_is_remembered_is_forgotten() -> None:
    by = opener()
    for n in range(100):
        envelope = replace(REQUEST, message_id=n.to_bytes(16, "big"))
        (part,) = seal(KEY, envelope, b"", now_ms=NOW + n * 1000, part_bytes=PART)
        by.open(part, now_ms=NOW + n * 1000)
    assert len(by._seen) == FRESH_MS / 1000


def test_an_answer_is_opened_while_it_is_waited_for() -> None:
    """However long the call took; an answer to another call fits none."""
    (part,) = sealed(envelope=ANSWER)
    assert opener().open(part, now_ms=NOW + 2 * FRESH_MS) is not None
    assert code_of(opener(awaits=lambda id_: id_ != b"m" * 16), part) == "call_replayed"


def test_a_part_that_is_sent_again_takes_no_place() -> None:
    by = opener()
    parts = sealed(NOISE)
    assert by.open(parts[0], now_ms=NOW) is None
    assert code_of(by, parts[0]) == "call_replayed"
    assert open_all(by, parts[1:]) == (REQUEST, NOISE)
    assert code_of(by, parts[0]) == "call_replayed"


def test_incomplete_messages_are_bounded_and_forgotten() -> None:
    by, refused = opener(), 0
    for n in range(300):
        envelope = replace(REQUEST, message_id=n.to_bytes(16, "big"))
        first, _ = seal(KEY, envelope, NOISE, now_ms=NOW, part_bytes=99_000)
        try:
            by.open(first, now_ms=NOW)
        except BusError as error:
            assert error.error_code == "call_too_large"  # noqa: PT017 (others are accepted)
            refused += 1
    assert refused == 300 - 16 * 1024 * 1024 // (99_000 - 54)
    assert by.open(sealed()[0], now_ms=NOW) is not None
    (late,) = seal(KEY, REQUEST, b"", now_ms=NOW + FRESH_MS, part_bytes=PART)
    by.open(late, now_ms=NOW + FRESH_MS)
    assert (by._incomplete, by._collected_bytes) == ({}, 0)


def test_what_becomes_too_large_when_it_is_inflated_is_refused() -> None:
    """A thousandth of the memory that it would take is enough to send it."""
    largest = bytes(MAX_MESSAGE_BYTES)
    assert open_all(opener(), sealed(largest)) == (REQUEST, largest)
    assert code_of_content(b"\x01" + zlib.compress(largest + b"x")) == "call_too_large"
    assert code_of_content(b"\x01" + zlib.compress(largest * 50)) == "call_too_large"
    assert code_of_content(b"\x00" + largest + b"x") == "call_too_large"


@pytest.mark.parametrize(
    "content", [b"", b"\x01", b"\x01abc", b"\x01" + zlib.compress(b"x")[:-5], b"\x02"]
)
def test_content_that_can_t_be_inflated_is_refused(content: bytes) -> None:
    assert code_of_content(content) == "call_malformed"
