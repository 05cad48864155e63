"""Converts the text forms of columns to the values that SQLite would have. Called by operands.

Each converter gives what the SQL of ``rules.sql`` gives, or raises ``UndecidedError``. A text form
may be of another type than the catalogue says, since the stream can be ahead of it.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache

from pgrealtime.rules.language.sqlite_values import (
    INT64_END,
    JsonNumber,
    Number,
    compact_json,
    sqlite_float_text,
)
from pgrealtime.rules.memory import compare
from pgrealtime.rules.memory.compare import SqliteValue
from pgrealtime.text_forms import Element, flatten_array, parse_array


def parse_bool(text: str) -> int:
    """Return 1 or 0 of a boolean's text form."""
    return int(text.startswith("t"))


# --- numbers


def parse_numeric(text: str) -> Number:
    """Return the number of a numeric's text form."""
    if "." in text or len(text) > _MAX_INT_DIGITS:
        return Decimal(text)
    return float(text) if text[-1] in "Ny" else int(text)  # NaN, Infinity


_MAX_INT_DIGITS = 1000
"""Digits; Python makes no integer of very many."""


def trim_numeric_text(text: str) -> str:
    """Return a numeric's text without trailing zeros, as ``trim_scale`` makes it."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_double(text: str) -> float:
    """Return the double of a number's text form; undecided where PostgreSQL reports an error."""
    number = float(text)
    if number == 0 or math.isinf(number):
        digits = text.partition("e")[0]
        is_overflow = number != 0 and digits[-1].isdigit()
        is_underflow = number == 0 and digits.strip("-0.") != ""
        if is_overflow or is_underflow:
            raise compare.UndecidedError
    return number


def number_text(number: float) -> str:
    """Return a number column's text as ``sql.conversions.number_text_sql`` does."""
    if number.is_integer() and abs(number) < _MAX_WHOLE_FLOAT:
        return str(int(number))
    return float_text(number)


def float_text(number: float) -> str:
    """Return a float's text as ``float_text_sql``; undecided with an exponent or if not finite."""
    if number == 0:
        return "0.0"
    if not _MIN_PLAIN_FLOAT <= abs(number) < _MAX_PLAIN_FLOAT:
        raise compare.UndecidedError
    return sqlite_float_text(number)


_MIN_PLAIN_FLOAT, _MAX_PLAIN_FLOAT, _MAX_WHOLE_FLOAT = 1e-4, 1e15, 1e18


# --- dates


def _convert_date(text: str) -> str:
    if _DATE_TEXT.fullmatch(text) is None:
        raise compare.UndecidedError
    return f"{text} 00:00:00.000Z"


def _convert_timestamp(text: str) -> str:
    match = _TIMESTAMP_TEXT.fullmatch(text)
    if match is None:
        raise compare.UndecidedError
    return f"{match[1]}.{match[2] or '':0<3.3}Z"


def _convert_timestamptz(text: str) -> str:
    if not text.endswith("+00"):
        raise compare.UndecidedError
    return _convert_timestamp(text[:-3])


_DATE_TEXT = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_TIMESTAMP_TEXT = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,6}))?", re.ASCII)

DATE_CONVERTERS: Mapping[str, Callable[[str], str]] = {
    "date": _convert_date,
    "timestamp": _convert_timestamp,
    "timestamptz": _convert_timestamptz,
}
"""Type to what converts its text forms to PocketBase's dates. Years of other than four digits,
years before 1 and infinities are left to PostgreSQL."""


# --- arrays


_MIN_CACHED_LENGTH = 128
"""Characters of a text from which on the result of parsing it is cached: of one value, for the many
conditions that read it."""


def array_items(text: str, delimiter: str = ",") -> tuple[str | None, ...]:
    """Return the items of an array in text form, those of all dimensions in order."""
    if len(text) < _MIN_CACHED_LENGTH:
        return tuple(flatten_array(parse_array(text, delimiter)))
    compare.WORK_BUDGET.spend(len(text) / compare.CHARACTERS_PER_UNIT)
    return _cached_array_items(text, delimiter)


@lru_cache(maxsize=16)
def _cached_array_items(text: str, delimiter: str) -> tuple[str | None, ...]:
    return tuple(flatten_array(parse_array(text, delimiter)))


def array_json_converter(item_json: Callable[[str], str]) -> Callable[[str], str]:
    """Return what converts an array's text form to the JSON text that ``array_to_json`` makes.

    ``item_json`` converts an item's text form.
    """

    def dump(items: Sequence[Element]) -> str:
        dumped = (
            dump(item) if isinstance(item, list) else "null" if item is None else item_json(item)
            for item in items
        )
        return f"[{','.join(dumped)}]"

    cached_dump = lru_cache(maxsize=4)(lambda text: dump(parse_array(text)))

    def convert(text: str) -> str:
        compare.WORK_BUDGET.spend(len(text) / compare.CHARACTERS_PER_UNIT)
        return cached_dump(text)

    return convert


# --- json


def json_at_path(text: str | None, path: tuple[str, ...], *, is_as_text: bool) -> SqliteValue:
    """Return the value under the keys of a JSON document, as SQLite's ``json_extract`` does.

    With ``is_as_text`` numbers and booleans are texts, as SQLite prints them.

    Raises:
        UndecidedError: It isn't JSON, or its number has no exact text here.
    """
    if text is None:
        return None
    if len(text) < _MIN_CACHED_LENGTH:
        return _follow_json_path(text, path, is_as_text)
    compare.WORK_BUDGET.spend(len(text) / compare.CHARACTERS_PER_UNIT)
    return _cached_follow_json_path(text, path, is_as_text)


def _follow_json_path(text: str, path: tuple[str, ...], is_as_text: bool) -> SqliteValue:  # noqa: FBT001 (cached)
    node = _parsed_json(text)
    for key in path:
        node = _json_member(node, key)
    return _json_as_text(node) if is_as_text else _json_value(node)


_cached_follow_json_path = lru_cache(maxsize=64)(_follow_json_path)


@lru_cache(maxsize=64)
def _parsed_json(text: str) -> object:
    """Cached, since several comparisons read one document."""
    try:
        return json.loads(text, parse_int=JsonNumber, parse_float=JsonNumber)
    except (ValueError, RecursionError):
        raise compare.UndecidedError from None


_MAX_INDEX_DIGITS = 9


def _json_member(node: object, key: str) -> object:
    if not key.isdigit():
        return node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, list) or len(key) > _MAX_INDEX_DIGITS or int(key) >= len(node):
        return None
    return node[int(key)]


def _json_value(node: object) -> SqliteValue:
    match node:
        case bool():
            return int(node)
        case JsonNumber():
            return parse_numeric(node)
        case None | str():
            return node
        case _:
            return compact_json(node)


def _json_as_text(node: object) -> SqliteValue:
    match node:
        case bool():
            return str(int(node))
        case JsonNumber():
            return _json_number_text(node)
        case _:
            return _json_value(node)


def _json_number_text(digits: str) -> str:
    """Return a number's text; without a point it is an integer to SQLite, if 64 bits hold it."""
    if "." not in digits and -INT64_END < parse_numeric(digits) < INT64_END:
        return digits
    return float_text(parse_double(digits))
