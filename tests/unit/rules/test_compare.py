"""Comparisons of single values; that Postgres makes them alike is proved on a server."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.rules.compare import (
    WORK,
    UndecidedError,
    like,
    number_text,
    ordered,
    same,
    to_number,
)
from pgrealtime.rules.parse import Op


def naive(pattern: str, text: str) -> bool:
    """LIKE as it is defined, character by character."""
    if not pattern:
        return not text
    head, rest = pattern[0], pattern[1:]
    match head:
        case "%":
            return naive(rest, text) or (bool(text) and naive(pattern, text[1:]))
        case "_":
            return bool(text) and naive(rest, text[1:])
        case "\\":
            return bool(text) and text[0].lower() == rest[0].lower() and naive(rest[1:], text[1:])
        case _:
            return bool(text) and text[0].lower() == head.lower() and naive(rest, text[1:])


patterns = st.lists(st.sampled_from(["%", "_", "a", "B", "\\%", "\\_", "\\\\"]), max_size=8)


@given(patterns.map("".join), st.text("aAbB%_\\", max_size=8))
def test_like_is_what_its_definition_says(pattern: str, text: str) -> None:
    assert like(pattern)(text) == naive(pattern, text)


def test_a_pattern_that_backtracks_is_no_weapon() -> None:
    """A client chooses the pattern, and everybody waits while it is matched."""
    matches = like("%" + "a%_" * 400 + "%b")
    text = "a" * 20_000
    start = time.process_time()

    assert not matches(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("pattern", ["%" + "a_" * 1500 + "b%", "%" + "a" * 1500 + "_b%"])
def test_a_pattern_that_nearly_fits_everywhere_is_counted_and_left_to_postgres(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place of the text is looked at for each of its characters: 9,000 times 1,500."""
    monkeypatch.setattr(WORK, "left", 2000.0)
    start = time.process_time()

    with pytest.raises(UndecidedError):
        like(pattern)("a" * 9_000)
    assert time.process_time() - start < 0.5


def test_a_text_is_made_lower_case_once_for_many_patterns() -> None:
    """That took longest of all where many filters read a long text."""
    text = "Ä" * 1_000_000
    assert not like("%0%")(text)
    start = time.process_time()

    assert not any(like(f"%x{n}%")(text) for n in range(200))
    assert time.process_time() - start < 2


def test_a_pattern_that_ends_in_its_escape_is_not_ours_to_judge() -> None:
    with pytest.raises(UndecidedError):
        like("%a\\")


NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats())
VALUES = st.one_of(st.none(), NUMBERS, st.text("a5 .", max_size=3))


@given(VALUES, VALUES)
def test_any_two_values_stand_in_exactly_one_order(
    one: float | str | None, other: float | str | None
) -> None:
    """NaN too: above every number and equal to itself."""
    orders = [ordered(Op.LT, one, other), ordered(Op.GT, one, other)]
    if one is None or other is None:
        assert orders == [None, None]
    else:
        assert [*orders, same(one, other)].count(True) == 1
        assert ordered(Op.LE, one, other) == (not orders[1])
        assert ordered(Op.GE, one, other) == (not orders[0])


FIVE = "\N{ARABIC-INDIC DIGIT FIVE}"


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5.0), (" 5.0\n", 5.0), ("1e1", 10.0), (".5", 0.5), ("5a", "5a"), ("", ""), (FIVE, FIVE)],
)
def test_a_text_that_looks_like_a_number_is_one(text: str, number: float | str) -> None:
    assert to_number(text) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_shown_or_left_to_postgres(number: float) -> None:
    try:
        shown = number_text(number)
    except UndecidedError:
        assert number == 0 or not 1e-4 <= abs(number) < 1e15
    else:
        assert float(shown) == pytest.approx(number)
