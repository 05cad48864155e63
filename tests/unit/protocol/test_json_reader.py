"""JSON as PocketBase takes it: what is refused, what is kept, what is passed over."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.protocol.json_reader import MAX_TOKENS, JsonError, JsonRangeError, JsonReader

JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def read(reader: JsonReader) -> object:
    """Build the value, as a caller that wants everything would."""
    match reader.peek():
        case b"{":
            return {name: read(reader) for name in reader.members()}
        case b"[":
            return [read(reader) for _ in reader.elements()]
        case b'"':
            return reader.read_string()
        case b"t" | b"f":
            return reader.read_boolean()
        case b"n":
            return None if reader.consume_null() else reader.read_string()
        case _:
            return reader.read_number()


@given(value=JSON, ascii_only=st.booleans())
def test_every_value_reads_as_it_was_written(value: object, ascii_only: bool) -> None:  # noqa: FBT001 (hypothesis)
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    reader = JsonReader(text)

    assert read(reader) == value
    reader.expect_end()


@given(value=JSON)
def test_skipping_ends_where_reading_does(value: object) -> None:
    reader = JsonReader(json.dumps([value, "after"]).encode())
    steps = reader.elements()

    next(steps)
    reader.skip()
    next(steps)

    assert reader.read_string() == "after"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"\xef\xbb\xbf{}",
        b"\x0b{}",
        b"{",
        b"[1,]",
        b"[,1]",
        b"[1 2]",
        b"[1}",
        b'{"a"}',
        b'{"a" 1}',
        b'{"a":1,}',
        b"{'a':1}",
        b"{a:1}",
        b'{"a":1,"a":2}',
        b'{"a":1,"\\u0061":2}',
        b'{"x":{"a":1,"a":2}}',
        b"nul",
        b"True",
        b"NaN",
        b"Infinity",
        b"01",
        b"+1",
        b".5",
        b"1.",
        b"1e",
        b"-",
        b"0x10",
        b'"',
        b'"\n"',
        b'"\\q"',
        b'"\\u12"',
        b'"\\ud800"',
        b'"\\ude00\\ud83d"',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b"[" * 10_001 + b"]" * 10_001,
        b"[" + b"1," * MAX_TOKENS + b"1]",
    ],
)
def test_fault_is_found_whether_wanted_or_skipped(text: bytes) -> None:
    """Unknown members are passed over, but a text that isn't JSON is refused all the same."""
    reader = JsonReader(text)

    with pytest.raises(JsonError):  # noqa: PT012 (the fault may sit at either call)
        reader.skip()
        reader.expect_end()


def test_nesting_goes_as_deep_as_in_pocketbase() -> None:
    JsonReader(b"[" * 10_000 + b"]" * 10_000).skip()


def test_number_beyond_doubles_matters_only_when_wanted() -> None:
    JsonReader(b"1e999").skip()
    with pytest.raises(JsonRangeError):
        JsonReader(b"1e999").read_number()


def test_what_follows_the_value_is_the_callers_business() -> None:
    reader = JsonReader(b'{"a":1} trailing \xff')
    reader.skip()

    with pytest.raises(JsonError):
        reader.expect_end()
