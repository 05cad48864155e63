"""Comparisons of single values in the process, exactly as the translated SQL makes them. For local.

A value is None, a number or a text, as SQLite has it. An ``int`` is one of Postgres's integers, a
``float`` a double precision; a bool never gets here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

from pgrealtime.rules import parameters
from pgrealtime.rules.parse import Op
from pgrealtime.rules.values import LONGEST_NUMBER, NUMERIC

Scalar: TypeAlias = str | float | int | None

_LOOKS_NUMERIC = re.compile(NUMERIC[1:-1], re.ASCII)


class UndecidedError(Exception):
    """Only Postgres knows what this value means; a signal within the room, never shown."""


# --- equality and order


def equal(one: Scalar, other: Scalar) -> bool | None:
    """Return ``=``: unknown if a side is NULL, false if one is a number and the other a text."""
    if one is None or other is None:
        return None
    return same(one, other)


def same(one: Scalar, other: Scalar) -> bool:
    """Return ``IS``: NULL is NULL, and so is NaN NaN."""
    match one, other:
        case str(), str():
            return one == other
        case ((int() | float()), (int() | float())):
            one, other = _alike(one, other)
            return one == other or (one != one and other != other)  # noqa: PLR0124 (NaN)
        case _:
            return one is None and other is None


def is_blank(value: Scalar) -> bool:
    """Return ``X = '' OR X IS NULL``."""
    return value is None or value == ""


def ordered(op: Op, one: Scalar, other: Scalar) -> bool | None:
    """Return an order: code points for texts, NaN above all numbers, numbers below texts."""
    if one is None or other is None:
        return None
    if isinstance(one, str) or isinstance(other, str):
        if isinstance(one, str) and isinstance(other, str):
            return _in_order(op, one < other, one == other)
        return (op in _LESS) == isinstance(other, str)
    one, other = _alike(one, other)
    if math.isnan(one) or math.isnan(other):
        return _in_order(op, not math.isnan(one), math.isnan(one) and math.isnan(other))
    return _in_order(op, one < other, one == other)


_LESS = frozenset({Op.LT, Op.LE})


def _in_order(op: Op, is_less: bool, is_same: bool) -> bool:  # noqa: FBT001 (both are results)
    match op:
        case Op.LT:
            return is_less and not is_same
        case Op.LE:
            return is_less or is_same
        case Op.GT:
            return not is_less and not is_same
        case _:
            return not is_less or is_same


def _alike(one: float, other: float) -> tuple[float, float]:
    """Two integers compare exactly; with a double, an integer becomes the nearest double."""
    if type(one) is type(other):
        return one, other
    return float(one), float(other)


# --- conversion


def to_number(value: Scalar) -> Scalar:
    """Return the number of a text that looks like one; anything else as it is."""
    if isinstance(value, str) and len(value) < LONGEST_NUMBER and _LOOKS_NUMERIC.fullmatch(value):
        return float(value)
    return value


def number_text(number: float) -> str:
    """Return a number column's text, as ``values.number_text`` does.

    Raises:
        UndecidedError: It would have an exponent, or is none.
    """
    if number.is_integer() and abs(number) < _WHOLE:
        return str(int(number))
    return float_text(number)


def float_text(number: float) -> str:
    """Return a float's text, as ``values.float_text`` does.

    Raises:
        UndecidedError: As above.
    """
    if number == 0:
        return "0.0"
    if not _TINY <= abs(number) < _HUGE:
        raise UndecidedError
    return parameters.number_text(number)


_TINY, _HUGE, _WHOLE = 1e-4, 1e15, 1e18


def lower(text: str) -> str:
    """Return the text with ASCII letters in lower case, which is all that COLLATE "C" knows."""
    return text.lower() if text.isascii() else text.translate(_LOWER)


_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


# --- LIKE


@lru_cache(maxsize=4096)
def like(pattern: str) -> Callable[[str], bool]:
    """Return what tells whether a text matches the pattern, ASCII letters alike.

    Segment by segment, the leftmost place of each: never the exponential or even the quadratic
    search of one regular expression per pattern, which a client could choose.
    """
    first, *middle = [_Segment(segment) for segment in _segments(lower(pattern))]
    if not middle:
        return lambda text: len(text) == first.length and first.is_at(lower(text), 0)
    last = middle.pop()

    def matches(text: str) -> bool:
        text = lower(text)
        end = len(text) - last.length
        if end < first.length or not first.is_at(text, 0) or not last.is_at(text, end):
            return False
        start = first.length
        for segment in middle:
            found = segment.find(text, start, end)
            if found < 0:
                return False
            start = found + segment.length
        return True

    return matches


class _Segment:
    """What stands between two ``%``: characters, None for any one."""

    __slots__ = ("_plain", "_regex", "length")

    def __init__(self, characters: tuple[str | None, ...]) -> None:
        self.length = len(characters)
        self._plain: str | None = None
        self._regex: re.Pattern[str] | None = None
        known = [one for one in characters if one is not None]
        if len(known) == len(characters):
            self._plain = "".join(known)
        else:
            parts = ("." if one is None else re.escape(one) for one in characters)
            self._regex = re.compile("".join(parts), re.DOTALL)

    def is_at(self, text: str, start: int) -> bool:
        """Whether it stands there."""
        if self._plain is not None:
            return text.startswith(self._plain, start)
        assert self._regex is not None
        return self._regex.match(text, start) is not None

    def find(self, text: str, start: int, end: int) -> int:
        """Return the first place in between where it stands, or -1."""
        if self._plain is not None:
            return text.find(self._plain, start, end)
        assert self._regex is not None
        found = self._regex.search(text, start, end)
        return -1 if found is None else found.start()


def _segments(pattern: str) -> list[tuple[str | None, ...]]:
    segments: list[tuple[str | None, ...]] = []
    current: list[str | None] = []
    characters = iter(pattern)
    for one in characters:
        match one:
            case "%":
                segments.append(tuple(current))
                current = []
            case "_":
                current.append(None)
            case "\\":
                escaped = next(characters, None)
                if escaped is None:  # an error in Postgres, if the search gets so far
                    raise UndecidedError
                current.append(escaped)
            case _:
                current.append(one)
    segments.append(tuple(current))
    return segments
