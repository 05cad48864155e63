"""Compares and matches single values exactly as the translated SQL does. Called by ``conditions``.

A value is None, a number or a text, as in SQLite. An ``int`` or a ``Decimal`` is exact, as
PostgreSQL's integers and numerics are; a ``float`` is double precision, infinite or NaN. Python
compares numbers by their exact values, not by the nearest double. A bool is never passed.

Filters come from clients, so the work that they can cause is counted (``WorkBudget``).
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, TypeAlias

from pgrealtime.rules.language import sqlite_values
from pgrealtime.rules.language.sqlite_values import Number
from pgrealtime.rules.language.syntax import Op

SqliteValue: TypeAlias = str | Number | None

_LOOKS_NUMERIC = re.compile(sqlite_values.NUMERIC_TEXT_REGEX[1:-1], re.ASCII)


class UndecidedError(Exception):
    """The value can't be evaluated exactly in the process; PostgreSQL is asked. Never reported."""


# --- equality and order


def equals(left: SqliteValue, right: SqliteValue) -> bool | None:
    """Return ``=``: unknown if a side is NULL, false if one is a number and the other a text."""
    if left is None or right is None:
        return None
    return is_not_distinct(left, right)


def is_not_distinct(left: SqliteValue, right: SqliteValue) -> bool:
    """Return ``IS``: NULL is NULL, and NaN is NaN."""
    if isinstance(left, str) or left is None or isinstance(right, str) or right is None:
        return left == right
    return left == right or (_is_nan(left) and _is_nan(right))


def is_blank(value: SqliteValue) -> bool:
    """Return ``X = '' OR X IS NULL``."""
    return value is None or value == ""


_ORDERS: Mapping[Op, Callable[[Any, Any], bool]] = {
    Op.LT: operator.lt,
    Op.LE: operator.le,
    Op.GT: operator.gt,
    Op.GE: operator.ge,
}


def compare_order(op: Op, left: SqliteValue, right: SqliteValue) -> bool | None:
    """Return an order: texts by code points, NaN above all numbers, numbers below texts."""
    if left is None or right is None:
        return None
    compare = _ORDERS[op]
    if isinstance(left, str) or isinstance(right, str):
        is_left_text, is_right_text = isinstance(left, str), isinstance(right, str)
        both = is_left_text and is_right_text
        return compare(left, right) if both else compare(is_left_text, is_right_text)
    if _is_nan(left) or _is_nan(right):
        return compare(_is_nan(left), _is_nan(right))
    return compare(left, right)


def _is_nan(number: Number) -> bool:
    return number != number  # noqa: PLR0124 (unlike math.isnan for integers of any size)


# --- conversion


def number_if_numeric(value: SqliteValue) -> SqliteValue:
    """Return the number of a text that looks like one; anything else as it is."""
    if not isinstance(value, str) or len(value) >= sqlite_values.MAX_NUMERIC_TEXT_LENGTH:
        return value
    return Decimal(value) if _LOOKS_NUMERIC.fullmatch(value) else value


def nearest_double(value: SqliteValue) -> SqliteValue:
    """Return the nearest double of a number; undecided where PostgreSQL reports an error."""
    if value is None or isinstance(value, str | float):
        return value
    try:
        double = float(value)
    except OverflowError:
        raise UndecidedError from None
    if math.isinf(double) or (double == 0 and value != 0):
        raise UndecidedError
    return double


# --- work


@dataclass(slots=True)
class WorkBudget:
    """The work that the evaluation in progress may still do, in units of about a microsecond.

    There is one for the process: an evaluation never waits, so no two are in progress. The engine
    sets ``units_left`` before each.
    """

    units_left: float = math.inf

    def spend(self, units: float) -> None:
        """Count some work.

        Raises:
            UndecidedError: The budget is exhausted; PostgreSQL is asked.
        """
        self.units_left -= units
        if self.units_left < 0:
            raise UndecidedError


WORK_BUDGET = WorkBudget()

CHARACTERS_PER_UNIT = 512
"""Characters that are searched in a unit."""


# --- LIKE


def like_matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that matches texts with a LIKE pattern, ASCII letters without case.

    It searches the leftmost occurrence of each segment between two ``%``. A regular expression per
    pattern would search in quadratic or exponential time for patterns that a client can choose.
    What comes near that here (a segment with many ``_`` that nearly matches everywhere) is counted
    as work, until it is left to PostgreSQL.
    """
    if len(pattern) > CHARACTERS_PER_UNIT:  # it can be a column's value, another one in each row
        WORK_BUDGET.spend(len(pattern) / 32)
        return _cached_long_matcher(pattern)
    if plain := _SUBSTRING_PATTERN.fullmatch(pattern):
        part = sqlite_values.ascii_lower(plain[1])
        return lambda text: part in _shared_lower(text)
    return _cached_matcher(pattern)


_SUBSTRING_PATTERN = re.compile(r"%([^%_\\]*)%")
"""What nearly all patterns are. They can differ per caller, so a cache couldn't hold them."""


def _compile_pattern(pattern: str) -> Callable[[str], bool]:
    first, *middle = _split_pattern(sqlite_values.ascii_lower(pattern))
    if not middle:
        return lambda text: len(text) == first.length and first.matches_at(_shared_lower(text), 0)
    last = middle.pop()

    def matches(text: str) -> bool:
        text = _shared_lower(text)
        end = len(text) - last.length
        if end < first.length or not first.matches_at(text, 0) or not last.matches_at(text, end):
            return False
        start = first.length
        for segment in middle:
            position = segment.find(text, start, end)
            if position < 0:
                return False
            start = position + segment.length
        return True

    return matches


_cached_matcher = lru_cache(maxsize=4096)(_compile_pattern)
_cached_long_matcher = lru_cache(maxsize=4)(_compile_pattern)


def _shared_lower(text: str) -> str:
    """Return the text in lower case; cached if it is long, for the many patterns of one row."""
    if len(text) < CHARACTERS_PER_UNIT:
        return sqlite_values.ascii_lower(text)
    WORK_BUDGET.spend(len(text) / CHARACTERS_PER_UNIT)
    return _cached_lower(text)


_cached_lower = lru_cache(maxsize=4)(sqlite_values.ascii_lower)


class _Segment:
    """The part of a pattern between two ``%``: runs without ``_``, their offsets, its length."""

    __slots__ = ("_longest_run", "_other_runs", "length")

    def __init__(self, parts_of_runs: Sequence[tuple[int, list[str]]], length: int) -> None:
        self.length = length
        runs = [(start, "".join(parts)) for start, parts in parts_of_runs]
        self._longest_run = max(runs, key=lambda run: len(run[1]), default=(0, ""))
        self._other_runs = [run for run in runs if run is not self._longest_run]

    def matches_at(self, text: str, start: int) -> bool:
        offset, run = self._longest_run
        return text.startswith(run, start + offset) and self._other_runs_match(text, start)

    def _other_runs_match(self, text: str, start: int) -> bool:
        for count, (offset, run) in enumerate(self._other_runs):
            if not text.startswith(run, start + offset):
                WORK_BUDGET.spend((count + 2) / 3)
                return False
        if self._other_runs:
            WORK_BUDGET.spend(len(self._other_runs) / 3)
        return True

    def find(self, text: str, start: int, end: int) -> int:
        """Return its first position between ``start`` and ``end``, or -1."""
        offset, run = self._longest_run
        WORK_BUDGET.spend(0.25)
        if not run:
            return start if start + self.length <= end else -1
        last = end - self.length + offset + len(run)
        position = start
        while True:
            run_position = text.find(run, position + offset, last)
            if run_position < 0:
                return -1
            WORK_BUDGET.spend(len(run) / CHARACTERS_PER_UNIT)
            position = run_position - offset
            if self._other_runs_match(text, position):
                return position
            position += 1


_PATTERN_TOKEN = re.compile(r"\\.?|%|_|[^\\%_]+", re.DOTALL)


def _split_pattern(pattern: str) -> list[_Segment]:
    segments: list[_Segment] = []
    runs: list[tuple[int, list[str]]] = []
    length = 0
    is_within = False
    for symbol in _PATTERN_TOKEN.findall(pattern):
        match symbol:
            case "%":
                segments.append(_Segment(runs, length))
                runs, length, is_within = [], 0, False
            case "_":
                length += 1
                is_within = False
            case "\\":  # an error in PostgreSQL, if its search gets so far
                raise UndecidedError
            case _:
                characters = symbol[1:] if symbol[0] == "\\" else symbol
                if not is_within:
                    runs.append((length, []))
                runs[-1][1].append(characters)
                length += len(characters)
                is_within = True
    segments.append(_Segment(runs, length))
    return segments
