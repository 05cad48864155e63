"""Comparisons of single values in the process, exactly as the translated SQL makes them. For local.

A value is None, a number or a text, as SQLite has it. An ``int`` or a ``Decimal`` is exact, as
Postgres's integers and numerics are, a ``float`` a double precision, infinite or NaN. Python
compares them by what they are, not by the nearest double; a bool never gets here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import TypeAlias

from pgrealtime.rules.language import parameters
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.sql.operands import LONGEST_NUMBER, NUMERIC

Scalar: TypeAlias = parameters.Scalar
Number: TypeAlias = float | int | Decimal
Comparable: TypeAlias = str | Number | None

_LOOKS_NUMERIC = re.compile(NUMERIC[1:-1], re.ASCII)


class UndecidedError(Exception):
    """Only Postgres knows what this value means; a signal within the room, never shown."""


# --- equality and order


def equal(one: Comparable, other: Comparable) -> bool | None:
    """Return ``=``: unknown if a side is NULL, false if one is a number and the other a text."""
    if one is None or other is None:
        return None
    return same(one, other)


def same(one: Comparable, other: Comparable) -> bool:
    """Return ``IS``: NULL is NULL, and so is NaN NaN."""
    if isinstance(one, str) or one is None or isinstance(other, str) or other is None:
        return one == other
    return one == other or (_is_nan(one) and _is_nan(other))


def is_blank(value: Comparable) -> bool:
    """Return ``X = '' OR X IS NULL``."""
    return value is None or value == ""


def ordered(op: Op, one: Comparable, other: Comparable) -> bool | None:
    """Return an order: code points for texts, NaN above all numbers, numbers below texts."""
    if one is None or other is None:
        return None
    if isinstance(one, str) or isinstance(other, str):
        if isinstance(one, str) and isinstance(other, str):
            return _in_order(op, one < other, one == other)
        return (op in _LESS) == isinstance(other, str)
    if _is_nan(one) or _is_nan(other):
        return _in_order(op, not _is_nan(one), _is_nan(one) and _is_nan(other))
    return _in_order(op, one < other, one == other)


def _is_nan(number: Number) -> bool:
    return number != number  # noqa: PLR0124 (unlike math.isnan for integers of any size)


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


# --- conversion


def to_number(value: Comparable) -> Comparable:
    """Return the number of a text that looks like one; anything else as it is."""
    if isinstance(value, str) and len(value) < LONGEST_NUMBER and _LOOKS_NUMERIC.fullmatch(value):
        return Decimal(value)
    return value


def exact(text: str) -> Number:
    """Return the number of a numeric's text form."""
    if "." in text or len(text) > _LONG:
        return Decimal(text)
    return float(text) if text[-1] in "Ny" else int(text)  # NaN, Infinity


_LONG = 1000
"""Digits; Python makes no integer of very many."""


def exact_text(text: str) -> str:
    """Return a numeric's text without trailing zeros, as ``trim_scale`` makes it."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def as_double(value: Comparable) -> Comparable:
    """Return the nearest double of a number; anything else as it is.

    Raises:
        UndecidedError: There is none: Postgres reports an error.
    """
    if value is None or isinstance(value, str | float):
        return value
    try:
        double = float(value)
    except OverflowError:
        raise UndecidedError from None
    if math.isinf(double) or (double == 0 and value != 0):
        raise UndecidedError
    return double


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


# --- work


class Work:
    """What the evaluation under way may still cost; one for all, since none waits for anything.

    Attributes:
        left: Units of about a microsecond. Whoever evaluates sets it before.
    """

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = math.inf

    def spend(self, units: float) -> None:
        """Count some work.

        Raises:
            UndecidedError: It was more than it may be: Postgres has to decide.
        """
        self.left -= units
        if self.left < 0:
            raise UndecidedError


WORK = Work()

_PER_UNIT = 512
"""Characters that are gone through in a unit."""


# --- LIKE


def like(pattern: str) -> Callable[[str], bool]:
    """Return what tells whether a text matches the pattern, ASCII letters alike.

    Segment by segment, the leftmost place of each: never the exponential or even the quadratic
    search of one regular expression per pattern, which a client could choose. What comes near it
    (a segment with many ``_`` that nearly fits everywhere) is counted, and left to Postgres.
    """
    if len(pattern) > _PER_UNIT:  # it may be a column's value, another one in each row
        WORK.spend(len(pattern) / 32)
        return _long_matcher(pattern)
    if plain := _CONTAINED.fullmatch(pattern):
        part = lower(plain[1])
        return lambda text: part in _lowered(text)
    return _matcher(pattern)


_CONTAINED = re.compile(r"%([^%_\\]*)%")
"""The pattern that nearly all are. Of as many as there are subscribers not all can be kept."""


def _made(pattern: str) -> Callable[[str], bool]:
    first, *middle = _segments(lower(pattern))
    if not middle:
        return lambda text: len(text) == first.length and first.is_at(_lowered(text), 0)
    last = middle.pop()

    def matches(text: str) -> bool:
        text = _lowered(text)
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


_matcher, _long_matcher = lru_cache(maxsize=4096)(_made), lru_cache(maxsize=4)(_made)


def _lowered(text: str) -> str:
    """Return the text in lower case; of a long one that is found out once for many patterns."""
    if len(text) < _PER_UNIT:
        return lower(text)
    WORK.spend(len(text) / _PER_UNIT)
    return _lowered_before(text)


_lowered_before = lru_cache(maxsize=4)(lower)


class _Segment:
    """What stands between two ``%``.

    Args:
        runs: Characters, by where they begin.
        length: With every ``_``.
    """

    __slots__ = ("_anchor", "_others", "length")

    def __init__(self, runs: Sequence[tuple[int, str]], length: int) -> None:
        self.length = length
        self._anchor = max(runs, key=lambda run: len(run[1]), default=(0, ""))
        self._others = [run for run in runs if run is not self._anchor]

    def is_at(self, text: str, start: int) -> bool:
        """Whether it stands there."""
        offset, run = self._anchor
        return text.startswith(run, start + offset) and self._fits(text, start)

    def _fits(self, text: str, start: int) -> bool:
        """Whether all stands there but for the anchor."""
        for count, (offset, run) in enumerate(self._others):
            if not text.startswith(run, start + offset):
                WORK.spend((count + 2) / 3)
                return False
        if self._others:
            WORK.spend(len(self._others) / 3)
        return True

    def find(self, text: str, start: int, end: int) -> int:
        """Return the first place in between where it stands, or -1."""
        offset, run = self._anchor
        WORK.spend(0.25)
        if not run:
            return start if start + self.length <= end else -1
        last = end - self.length + offset + len(run)
        place = start
        while True:
            found = text.find(run, place + offset, last)
            if found < 0:
                return -1
            WORK.spend(len(run) / _PER_UNIT)
            place = found - offset
            if self._fits(text, place):
                return place
            place += 1


_SYMBOL = re.compile(r"\\.?|%|_|[^\\%_]+", re.DOTALL)


def _segments(pattern: str) -> list[_Segment]:
    segments: list[_Segment] = []
    runs: list[tuple[int, list[str]]] = []
    length = 0
    is_within = False
    for symbol in _SYMBOL.findall(pattern):
        match symbol:
            case "%":
                segments.append(_segment(runs, length))
                runs, length, is_within = [], 0, False
            case "_":
                length += 1
                is_within = False
            case "\\":  # an error in Postgres, if the search gets so far
                raise UndecidedError
            case _:
                characters = symbol[1:] if symbol[0] == "\\" else symbol
                if not is_within:
                    runs.append((length, []))
                runs[-1][1].append(characters)
                length += len(characters)
                is_within = True
    segments.append(_segment(runs, length))
    return segments


def _segment(runs: Sequence[tuple[int, list[str]]], length: int) -> _Segment:
    return _Segment([(start, "".join(parts)) for start, parts in runs], length)
