"""Comparisons of single values; integration tests compare them with PostgreSQL's."""

from __future__ import annotations

import math
import time
import tracemalloc
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import (
    WORK_BUDGET,
    SqliteValue,
    UndecidedError,
    compare_order,
    is_not_distinct,
    like_matcher,
    nearest_double,
    number_if_numeric,
)
from pgrealtime.rules.memory.text_values import number_text, parse_numeric


def naive(pattern: str, text: str) -> bool:
    """Return whether the pattern matches, by LIKE's definition, character by character."""
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
    assert like_matcher(pattern)(text) == naive(pattern, text)


@pytest.mark.parametrize(
    ("pattern", "text", "is_like"),
    [
        ("ab%ba", "aba", False),  # the ends may not share a character
        ("ab%ba", "abba", True),
        ("ab%ba", "ab-ba", True),
        ("a%a", "a", False),
        ("a_%_a", "abca", True),
        ("a_%_a", "aba", False),
        ("ab%b%ba", "abba", False),
        ("ab%b%ba", "abbba", True),
    ],
)
def test_the_parts_of_a_pattern_follow_one_another(
    pattern: str, text: str, *, is_like: bool
) -> None:
    assert like_matcher(pattern)(text) is naive(pattern, text) is is_like


def test_a_pattern_that_backtracks_is_no_weapon() -> None:
    """A client chooses the pattern, and all other callers wait while it is matched."""
    matches = like_matcher("%" + "a%_" * 400 + "%b")
    text = "a" * 20_000
    start = time.process_time()

    assert not matches(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("pattern", ["%" + "a_" * 1500 + "b%", "%" + "a" * 1500 + "_b%"])
def test_a_pattern_that_nearly_fits_everywhere_is_counted_and_left_to_postgres(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each position of the text is compared for each ``_``: 9,000 times 1,500."""
    monkeypatch.setattr(WORK_BUDGET, "units_left", 2000.0)
    start = time.process_time()

    with pytest.raises(UndecidedError):
        like_matcher(pattern)("a" * 9_000)
    assert time.process_time() - start < 0.5


def test_a_text_is_made_lower_case_once_for_many_patterns() -> None:
    """Lower-casing took most of the time where many filters read a long text."""
    text = "Ä" * 1_000_000
    assert not like_matcher("%0%")(text)
    start = time.process_time()

    assert not any(like_matcher(f"%x{n}%")(text) for n in range(200))
    assert time.process_time() - start < 2


def test_long_patterns_are_not_kept() -> None:
    """A column's value can be the pattern (``title ~ body``), another one in each row."""
    tracemalloc.start()
    try:
        for number in range(300):
            assert not like_matcher(f"%{number:06}{'x' * 100_000}%")("a")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert kept < 5_000_000


def test_a_pattern_that_ends_in_its_escape_is_not_ours_to_judge() -> None:
    with pytest.raises(UndecidedError):
        like_matcher("%a\\")


NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats())
VALUES = st.one_of(st.none(), NUMBERS, st.text("a5 .", max_size=3))


@given(VALUES, VALUES)
def test_any_two_values_have_exactly_one_order(
    one: float | str | None, other: float | str | None
) -> None:
    """NaN included: above every number and equal to itself."""
    orders = [compare_order(Op.LT, one, other), compare_order(Op.GT, one, other)]
    if one is None or other is None:
        assert orders == [None, None]
    else:
        assert [*orders, is_not_distinct(one, other)].count(True) == 1
        assert compare_order(Op.LE, one, other) == (not orders[1])
        assert compare_order(Op.GE, one, other) == (not orders[0])


WIDE = 9007199254740993
"""No double equals this number; the nearest is one less."""


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (WIDE - 1, WIDE),
        (float(WIDE), WIDE),
        (WIDE, float(WIDE + 1)),
        (Decimal(f"{WIDE}.1"), Decimal(f"{WIDE}.2")),
        (WIDE, Decimal(f"{WIDE}.00000000000000000001")),
        (10**29, 10**29 + 1),
        (
            parse_numeric("12345678901234567890123456788"),
            number_if_numeric(" 12345678901234567890123456789"),
        ),
        (parse_numeric("1" * 2000), parse_numeric("1" * 1999 + "2")),
        (parse_numeric("1" * 2000), math.inf),
        (-math.inf, -(10**400)),
        (parse_numeric("0.1"), parse_numeric("0.10000000000000000001")),
        (parse_numeric("Infinity"), parse_numeric("NaN")),
        (number_if_numeric("9" * 198), number_if_numeric("9" * 199)),
        (number_if_numeric("9" * 199), "9" * 200),  # of so many digits it stays a text, as in SQL
    ],
    ids=range(14),
)
def test_large_numbers_differ_in_their_last_digit(less: SqliteValue, more: SqliteValue) -> None:
    """In every operator, and as keys of an index."""
    assert not is_not_distinct(less, more)
    assert {less, more} != {less}
    assert [compare_order(op, less, more) for op in ORDERS] == [True, True, False, False]
    assert [compare_order(op, more, less) for op in ORDERS] == [False, False, True, True]


ORDERS = (Op.LT, Op.LE, Op.GT, Op.GE)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (WIDE, parse_numeric(f"{WIDE}.000")),
        (WIDE, number_if_numeric(f"{WIDE}.0")),
        (float(WIDE - 1), number_if_numeric(str(WIDE - 1))),
        (10**20, 1e20),
        (parse_numeric("1.50"), number_if_numeric("15e-1")),
        (parse_numeric("1" * 2000), parse_numeric("1" * 2000)),
    ],
    ids=range(6),
)
def test_one_large_number_is_one_however_it_is_written(
    one: SqliteValue, other: SqliteValue
) -> None:
    assert is_not_distinct(one, other)
    assert {one} == {other}
    assert [compare_order(op, one, other) for op in ORDERS] == [False, True, False, True]


@pytest.mark.parametrize(
    "number", [10**400, -(10**400), Decimal("1e-400"), parse_numeric("1" * 2000)]
)
def test_a_number_beyond_all_doubles_is_none(number: SqliteValue) -> None:
    """PostgreSQL reports an error where a double would have to be one."""
    with pytest.raises(UndecidedError):
        nearest_double(number)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (123456789012345680.0, "123456789012345680"),
        (-99999999999999984.0, "-99999999999999984"),
        (999999999999999.5, "999999999999999.5"),
        (1e18, None),
        (1000000000000000.5, None),
        (1e-5, None),
    ],
)
def test_a_double_is_shown_with_the_digits_that_are_sure(number: float, shown: str | None) -> None:
    if shown is None:
        with pytest.raises(UndecidedError):
            number_text(number)
    else:
        assert number_text(number) == shown


FIVE = "\N{ARABIC-INDIC DIGIT FIVE}"


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5.0), (" 5.0\n", 5.0), ("1e1", 10.0), (".5", 0.5), ("5a", "5a"), ("", ""), (FIVE, FIVE)],
)
def test_a_text_that_looks_like_a_number_is_one(text: str, number: float | str) -> None:
    assert number_if_numeric(text) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_shown_or_left_to_postgres(number: float) -> None:
    try:
        shown = number_text(number)
    except UndecidedError:
        assert number == 0 or not 1e-4 <= abs(number) < 1e15
    else:
        assert float(shown) == pytest.approx(number)
