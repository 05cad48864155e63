"""Numbers and texts as SQLite prints, converts and matches them. Read by all of ``rules``.

PocketBase evaluates rules in SQLite, so what a number looks like as text, which texts are numbers,
and which pattern LIKE gets are SQLite's. ``sql.conversions`` does the same in SQL; tests compare
both with SQLite.
"""

import json
import math
import re
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal
from typing import Self, TypeAlias

Number: TypeAlias = float | int | Decimal
"""Exact unless it is a float: those are double precision, infinity and NaN."""
Scalar: TypeAlias = str | float | int | None
"""A parameter's value: None is absent or NULL, a bool counts as the integer it is in SQLite."""

PASSWORD_HASH_PREFIX = "$2a$"  # noqa: S105 (of any hash)
"""Replaces a secret that the table doesn't hold: the beginning of every password hash."""
INT64_END = 1 << 63
"""From here on SQLite keeps whole numbers as floats too."""

# --- numbers of texts

NUMERIC_TEXT_REGEX = (
    r"^[ \t\n\v\f\r]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?[ \t\n\v\f\r]*$"
)
"""A text in a column that SQLite's numeric affinity would turn into a number, as far as PostgreSQL
and Python can: a larger exponent would need memory without bound."""
MAX_NUMERIC_TEXT_LENGTH = 200
_NUMERIC_TEXT = re.compile(
    r"[ \t\n\v\f\r]*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[ \t\n\v\f\r]*", re.ASCII
)
_WHOLE_NUMBER = re.compile(r"[ \t\n\v\f\r]*[+-]?[0-9]+[ \t\n\v\f\r]*")
_MAX_SHORT_NUMBER_LENGTH = 30
_EXACT_DOUBLE_DIGITS = 15
"""All whole numbers of so many digits are doubles."""


def looks_numeric(text: str) -> bool:
    """Return whether SQLite's numeric affinity would turn the text into a number."""
    return _NUMERIC_TEXT.fullmatch(text) is not None


def exact_number(value: str | float) -> Number | None:
    """Return exactly the number that a number, or a text that looks like one, stands for.

    A double stands for the shortest decimal that reads back as it, or for the whole number that it
    is. What no double reaches is infinite or 0, as in SQLite. None is for NaN.
    """
    match value:
        case str() if len(value) <= _MAX_SHORT_NUMBER_LENGTH and _WHOLE_NUMBER.fullmatch(value):
            return int(value)
        case str():
            double = float(value)
            if math.isinf(double):
                return double
            return Decimal(value) if double else 0
        case int():
            return int(value)
        case float() if value.is_integer():
            return int(value)
        case float() if math.isfinite(value):
            return Decimal(repr(value))
        case float():
            return None if math.isnan(value) else value


def double_or_exact_integer(number_text: str, double: float) -> float:
    """Return the double that PocketBase reads a number as, or the integer if no double equals it.

    A rule that names an id must not mean the neighbouring one.
    """
    digits = number_text.lstrip("+-0")
    if len(digits) <= _EXACT_DOUBLE_DIGITS or not digits.isdigit():
        return double
    whole = int(digits)
    return double if int(abs(double)) == whole else -whole if number_text.startswith("-") else whole


# --- texts of numbers

_MIN_PLAIN_EXPONENT, _MAX_PLAIN_EXPONENT = -5, 17
"""From these on numbers are printed with an exponent."""
_TO_18_DIGITS = Context(prec=18, rounding=ROUND_HALF_EVEN)
_TO_17_DIGITS = Context(prec=17, rounding=ROUND_HALF_UP)


def sqlite_text(value: str | float) -> str | None:
    """Return the value as SQLite turns it to text; None for NaN, which SQLite stores as NULL."""
    match value:
        case str():
            return value
        case float() if math.isnan(value):
            return None
        case int():
            return str(int(value))
        case float():
            return sqlite_float_text(value)


def sqlite_float_text(number: float) -> str:
    """Return the float as SQLite turns it to text, always with a point.

    15 digits if they read back as the same number, else 17; with an exponent from 1e17 on and
    below 1e-4. (Seen in PocketBase 0.40's SQLite, which rounds to 18 digits on the way to 17; the
    SQLite of older ones never showed more than 15.)
    """
    if math.isinf(number):
        return "Inf" if number > 0 else "-Inf"
    if number == 0:
        return "0.0"
    rounded = Decimal(f"{number:.14e}")
    if float(rounded) != number:
        rounded = _TO_17_DIGITS.plus(_TO_18_DIGITS.create_decimal(number))
    if _MIN_PLAIN_EXPONENT < rounded.adjusted() < _MAX_PLAIN_EXPONENT:
        return _with_decimal_point(f"{rounded:f}")
    digits, exponent = f"{rounded:.16e}".split("e")
    return f"{_with_decimal_point(digits)}e{int(exponent):+03d}"


def _with_decimal_point(digits: str) -> str:
    """Return a decimal without trailing zeros, but with one digit behind its point."""
    trimmed = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return trimmed if "." in trimmed else f"{trimmed}.0"


def _shortest_decimal(number: float) -> str:
    """Return the shortest decimal that reads back as the same number, without an exponent."""
    match number:
        case bool():
            return str(number).lower()
        case int():
            return str(number)
        case _ if math.isfinite(number):
            return f"{Decimal(repr(number)):f}".removesuffix(".0")
        case _:
            return "NaN" if math.isnan(number) else sqlite_float_text(number).replace("I", "+I")


# --- texts


def storable(value: str | float) -> str | float:
    """Return a value that PostgreSQL can hold.

    Of a text NUL and unpaired surrogates are replaced by U+FFFD, as Go does or nearly.
    """
    if not isinstance(value, str):
        return value
    if not value.isascii():
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value.replace("\0", "\ufffd")


def ascii_lower(text: str) -> str:
    """Return the text with its ASCII letters in lower case, which is all that COLLATE "C" folds."""
    return text.lower() if text.isascii() else text.translate(_ASCII_LOWER)


_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


class LoweredNumber(str):
    """A number made text by ``:lower``; as a LIKE pattern it is still the number."""

    __slots__ = ("pattern",)
    pattern: str

    def __new__(cls, text: str, pattern: str) -> Self:
        """Return the text, with the LIKE pattern of the number."""
        made = super().__new__(cls, text)
        made.pattern = pattern
        return made


def like_pattern(value: str | float) -> str:
    """Return the LIKE pattern of a constant, as PocketBase's ``wrapLikeParams`` makes it.

    A text with an unescaped ``%`` is a pattern already. Any other is searched literally; a number
    in its shortest decimal form.
    """
    if isinstance(value, LoweredNumber):
        return value.pattern
    text = value if isinstance(value, str) else _shortest_decimal(value)
    if _UNESCAPED_PERCENT.search(text) is not None:
        return text
    # A backslash before each of \ % _ that has none before it yet.
    escaped = re.sub(r"\\([\\%_])|([\\%_])", lambda match: "\\" + (match[1] or match[2]), text)
    return f"%{escaped}%"


_UNESCAPED_PERCENT = re.compile(r"(?<!\\)(?:\\\\)*%")
"""A ``%`` behind an even number of backslashes."""


# --- json


class JsonNumber(str):
    """A number of a JSON text, with the digits that it has there."""

    __slots__ = ()


class _ObjectMembers(list[tuple[str, object]]):
    """The members of a JSON object in the text's order, a name that is repeated included."""

    __slots__ = ()


def json_in_jsonb_order(text: str) -> str:
    """Return a compact JSON container with its keys in jsonb's order; any other text as it is.

    jsonb doesn't keep the order of keys, and a container is compared by its text. A text with
    blanks between its tokens stays as it is: it equals no container, in PocketBase neither.
    """
    if text[:1] not in {"{", "["}:
        return text
    try:
        parsed = json.loads(
            text, object_pairs_hook=_ObjectMembers, parse_int=JsonNumber, parse_float=JsonNumber
        )
        return compact_json(parsed, is_sorted=True) if compact_json(parsed) == text else text
    except (ValueError, RecursionError):
        return text


def compact_json(node: object, *, is_sorted: bool = False) -> str:
    """Return parsed JSON as text without blanks, its members as they are or in jsonb's order."""
    match node:
        case _ObjectMembers() | dict():
            members = list(node.items() if isinstance(node, dict) else node)
            if is_sorted:
                members = sorted(dict(members).items(), key=_jsonb_key_order)
            spaced = (
                f"{compact_json(name)}:{compact_json(item, is_sorted=is_sorted)}"
                for name, item in members
            )
            return "{" + ",".join(spaced) + "}"
        case list():
            return "[" + ",".join(compact_json(item, is_sorted=is_sorted) for item in node) + "]"
        case JsonNumber():
            return node
        case _:
            return json.dumps(node, ensure_ascii=False)


def _jsonb_key_order(member: tuple[str, object]) -> tuple[int, bytes]:
    """Return what jsonb sorts by: shorter keys first, then by bytes."""
    name = member[0].encode("utf-8", "replace")
    return len(name), name
