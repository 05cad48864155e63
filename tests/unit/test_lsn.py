"""Positions: their text, their order, and texts that are none."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.lsn import (
    END_ORDINAL,
    LSN,
    Cursor,
    Position,
    format_lsn,
    format_position,
    parse_lsn,
    parse_position,
)

LSNS = st.integers(min_value=0, max_value=(1 << 64) - 1).map(LSN)
CURSORS = st.builds(Cursor, LSNS, st.integers(min_value=0, max_value=END_ORDINAL))


@pytest.mark.parametrize(
    ("text", "lsn"),
    [
        ("0/0", 0),
        ("16/B374D848", 0x16_B374_D848),
        ("16/b374d848", 0x16_B374_D848),
        ("0/00000010", 16),
        ("FFFFFFFF/FFFFFFFF", (1 << 64) - 1),
    ],
)
def test_an_lsn_is_read_as_postgres_prints_it(text: str, lsn: int) -> None:
    assert parse_lsn(text) == lsn


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "0",
        "0/",
        "/0",
        "0/0/0",
        "0/G",
        "0x1/0",
        " 0/0",
        "0/0 ",
        "-1/0",
        "0/100000000",
        "\u0660/\u0660",
    ],
)
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        parse_lsn(text)


@pytest.mark.parametrize("lsn", [-1, 1 << 64])
def test_what_needs_more_than_64_bits_is_never_printed(lsn: int) -> None:
    with pytest.raises(ValueError, match="not a 64-bit LSN"):
        format_lsn(LSN(lsn))


@given(LSNS)
def test_an_lsn_survives_its_text(lsn: LSN) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


def test_a_position_is_three_hexadecimal_parts_of_fixed_width() -> None:
    """What a browser keeps as its last event id; changing it strands everyone who comes back."""
    position = Position("00c0de", Cursor(LSN(0x16_B374_D848), 3))
    assert format_position(position) == "00c0de-00000016b374d848-00000003"


@given(st.text("0123456789abcdef", min_size=6, max_size=6), CURSORS)
def test_a_position_survives_its_text(epoch: str, cursor: Cursor) -> None:
    position = Position(epoch, cursor)
    assert parse_position(format_position(position)) == position


@given(CURSORS, CURSORS)
def test_text_order_is_stream_order(one: Cursor, other: Cursor) -> None:
    """Positions of one epoch can be compared wherever they are kept, as plain text."""
    texts = format_position(Position("000000", one)), format_position(Position("000000", other))
    assert (texts[0] < texts[1]) is (one < other)


@given(CURSORS, CURSORS)
def test_a_position_that_awaits_a_resync_lies_behind_itself_and_before_the_next(
    one: Cursor, other: Cursor
) -> None:
    """So a client that compares texts skips nothing by it, and resumes from the same cursor."""
    plain, marked = Position("000000", one), Position("000000", one, awaits_resync=True)
    assert parse_position(format_position(marked)) == marked
    assert format_position(plain) < format_position(marked)
    if one < other:
        assert format_position(marked) < format_position(Position("000000", other))


def test_a_transaction_begins_before_its_changes_and_ends_after_them() -> None:
    lsn = LSN(32)
    places = [
        Cursor(lsn, 0),
        Cursor(lsn, 1),
        Cursor(lsn, 2),
        Cursor(lsn, END_ORDINAL),
        Cursor(LSN(33), 0),
    ]
    assert all(one < other for one, other in pairwise(places))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "--",
        "00c0de",
        "00c0de-00000016b374d848",
        "00c0de-00000016b374d848-00000003-",
        "00c0de-00000016B374D848-00000003",
        "00c0de-00000016b374d84-000000003",
        "00c0dg-00000016b374d848-00000003",
        "00c0de-00000016b374d848-0000000\u0663",
        " 0c0de-00000016b374d848-00000003",
        "0x00de-00000016b374d848-00000003",
        "00c0de_00000016b374d848_00000003",
    ],
)
def test_a_text_of_another_form_is_no_position(text: str) -> None:
    """It comes from the network: anything but our own form is as good as none."""
    assert parse_position(text) is None
