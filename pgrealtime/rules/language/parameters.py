"""What a rule leaves open: where each value comes from, its class, and its forms in SQL.

A translation depends on the classes (``Shape``) of its parameters, never on their values. So one
translation serves every subscriber whose values have the same classes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal
from enum import Enum, auto
from typing import Self, TypeAlias

from pgrealtime.auth.principal import AuthRecord, Guest, Superuser
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.syntax import double_or_exact_integer

Number: TypeAlias = float | int | Decimal
"""Exact unless it is a float: those are double precision, infinity and NaN."""
Scalar: TypeAlias = str | float | int | None
"""A parameter's value: None is absent or NULL, a bool counts as the integer it is in SQLite."""

SUPERUSERS_COLLECTION_ID = "pbc_3142635823"
"""Id of PocketBase's collection of superusers, the same in every installation."""


@dataclass(frozen=True, slots=True)
class LiteralParameter:
    """A literal of the text, known with it."""

    value: str | float


@dataclass(frozen=True, slots=True)
class LiftedLiteral:
    """The n-th literal of a text that was compiled without its literals."""

    index: int


@dataclass(frozen=True, slots=True)
class RequestValue:
    """A constant of ``@request``: ``("query", "k")``, ``("auth", "id")``, ``("context",)``."""

    path: tuple[str, ...]
    is_read_as_number: bool = False
    """It bears the name of a number field, so a text that is a number becomes one."""
    is_lower: bool = False
    is_isset: bool = False
    """Not the value, but 1 or 0 for whether there is one."""


class Macro(Enum):
    """A moment or a part of one, UTC; taken once per batch of changes."""

    NOW = "@now"
    YESTERDAY = "@yesterday"
    TOMORROW = "@tomorrow"
    TODAY_START = "@todayStart"
    TODAY_END = "@todayEnd"
    MONTH_START = "@monthStart"
    MONTH_END = "@monthEnd"
    YEAR_START = "@yearStart"
    YEAR_END = "@yearEnd"
    SECOND = "@second"
    MINUTE = "@minute"
    HOUR = "@hour"
    DAY = "@day"
    MONTH = "@month"
    YEAR = "@year"
    WEEKDAY = "@weekday"


Parameter: TypeAlias = LiteralParameter | LiftedLiteral | RequestValue | Macro


@dataclass(frozen=True, slots=True)
class CallerColumn:
    """A column of the subscriber's own row, handed over in text form."""

    name: str
    """Empty: not a column, but NULL if there is no such row."""


MACROS: dict[str, Macro] = {macro.value: macro for macro in Macro}


class ParameterClass(Enum):
    """The class of a parameter's value: all that a translation depends on."""

    ABSENT = auto()
    """No value: a missing key, anything of a guest."""
    EMPTY = auto()
    """The empty text."""
    TEXT = auto()
    """Any other text that doesn't look like a number."""
    DANGLING_ESCAPE = auto()
    """Such a text whose LIKE pattern would end within an escape, and so can match nothing."""
    NUMERIC_TEXT = auto()
    """A text that looks like a number."""
    FLOAT = auto()
    """A float."""
    INTEGER = auto()
    """An integer; flags are such, and whole numbers that no double holds."""

    @property
    def is_empty(self) -> bool:
        """Known to be NULL or the empty text before anything runs."""
        return self in {ParameterClass.ABSENT, ParameterClass.EMPTY}

    @property
    def is_number(self) -> bool:
        """A number, not a text that looks like one."""
        return self in {ParameterClass.FLOAT, ParameterClass.INTEGER}


class SqlForm(Enum):
    """How a value is handed to Postgres."""

    TEXT = "text"
    """Text as SQLite shows the value: ``5.0`` for the float, ``5`` for the integer."""
    NUMBER = "number"
    """Text of the number with all its digits, which fits numeric and double precision."""
    PATTERN = "pattern"
    """LIKE pattern: the text between two ``%`` with its wildcards escaped, or as it is."""
    UUID = "uuid"
    """Text if it is a canonical uuid, else NULL: compares as the text would, for an index."""
    INTEGER = "integer"
    """Text if it is a canonical 64-bit integer, else NULL."""
    JSON = "json"
    """Text of a JSON container with its keys in jsonb's order; other texts as they are."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A placeholder's content."""

    parameter: Parameter | CallerColumn
    form: SqlForm


def parameter_value(
    parameter: Parameter, request: RuleRequest, now: datetime, literals: Sequence[str | float] = ()
) -> Scalar:
    """Return what the parameter stands for.

    Args:
        parameter: The parameter.
        request: The subscriber.
        now: The moment of the batch, with its zone.
        literals: What was lifted out of the text.
    """
    match parameter:
        case LiteralParameter(constant):
            return _storable(constant)
        case LiftedLiteral(index):
            return _storable(literals[index])
        case RequestValue():
            return _request_value(parameter, request)
        case Macro():
            return _macro_value(parameter, now.astimezone(UTC))


def parameter_class(content: Scalar) -> ParameterClass:
    """Return the class of the value."""
    match content:
        case None:
            return ParameterClass.ABSENT
        case str():
            return _text_class(content)
        case int():
            return ParameterClass.INTEGER
        case float():
            return ParameterClass.FLOAT


def fixed_parameter_class(parameter: Parameter) -> ParameterClass | None:
    """Return the class that the parameter has for everybody, or None if that differs."""
    match parameter:
        case LiteralParameter(constant):
            return parameter_class(_storable(constant))
        case Macro():
            is_text = parameter in _DATE_MACROS
            return ParameterClass.TEXT if is_text else ParameterClass.INTEGER
        case LiftedLiteral() | RequestValue():
            return None


def to_sql_value(content: Scalar, form: SqlForm) -> Scalar:
    """Return the value as the placeholder of that form wants it."""
    if content is None:
        return None
    text = _sqlite_text(content)
    if text is None:
        return None
    match form:
        case SqlForm.TEXT:
            return text
        case SqlForm.NUMBER:
            return _number_digits(exact_number(content))
        case SqlForm.PATTERN:
            return like_pattern(content)
        case SqlForm.UUID:
            return text if _UUID.fullmatch(text) else None
        case SqlForm.INTEGER:
            return (
                text if _CANONICAL_INTEGER.fullmatch(text) and int(text) in _BIGINT_RANGE else None
            )
        case SqlForm.JSON:
            return json_in_jsonb_order(text)


# --- texts and numbers as SQLite has them


_NUMERIC_TEXT = re.compile(
    r"[ \t\n\v\f\r]*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[ \t\n\v\f\r]*", re.ASCII
)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_CANONICAL_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_GO_FLOAT = re.compile(
    r"[+-]?(?:\d(?:_?\d)*\.?(?:\d(?:_?\d)*)?|\.\d(?:_?\d)*)(?:[eE][+-]?\d(?:_?\d)*)?"
    r"|[+-]?inf(?:inity)?|nan",
    re.ASCII | re.IGNORECASE,
)
_MIN_PLAIN_EXPONENT, _MAX_PLAIN_EXPONENT = -5, 17
"""From these on numbers are written with an exponent."""
_BIGINT_RANGE = range(-(1 << 63), 1 << 63)


def exact_number(content: str | float) -> Number | None:
    """Return the number that a number, or a text that looks like one, stands for: exactly.

    A double stands for the shortest decimal that reads back as it, or for the whole number that it
    is. What no double reaches is infinite or 0, as in SQLite. None is for NaN.
    """
    match content:
        case str():
            return _exact_number_of_text(content)
        case int():
            return int(content)
        case float() if content.is_integer():
            return int(content)
        case float() if math.isfinite(content):
            return Decimal(repr(content))
        case float():
            return None if math.isnan(content) else content


def _exact_number_of_text(text: str) -> Number:
    if len(text) <= _MAX_SHORT_NUMBER_LENGTH and _WHOLE_NUMBER.fullmatch(text):
        return int(text)
    double = float(text)
    if math.isinf(double):
        return double
    return Decimal(text) if double else 0


_MAX_SHORT_NUMBER_LENGTH = 30
_WHOLE_NUMBER = re.compile(r"[ \t\n\v\f\r]*[+-]?[0-9]+[ \t\n\v\f\r]*")


def _number_digits(number: Number | None) -> str | None:
    match number:
        case None:
            return None
        case float():
            return str(number).replace("inf", "Infinity")
        case _:
            return str(number)


def looks_numeric(text: str) -> bool:
    """Whether SQLite's numeric affinity would turn the text into a number."""
    return _NUMERIC_TEXT.fullmatch(text) is not None


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
    shown = Decimal(f"{number:.14e}")
    if float(shown) != number:
        shown = _TO_17_DIGITS.plus(_TO_18_DIGITS.create_decimal(number))
    if _MIN_PLAIN_EXPONENT < shown.adjusted() < _MAX_PLAIN_EXPONENT:
        return _with_decimal_point(f"{shown:f}")
    digits, exponent = f"{shown:.16e}".split("e")
    return f"{_with_decimal_point(digits)}e{int(exponent):+03d}"


_TO_18_DIGITS = Context(prec=18, rounding=ROUND_HALF_EVEN)
_TO_17_DIGITS = Context(prec=17, rounding=ROUND_HALF_UP)


def _with_decimal_point(digits: str) -> str:
    """Return a decimal without trailing zeros, but with one digit behind its point."""
    trimmed = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return trimmed if "." in trimmed else f"{trimmed}.0"


def like_pattern(content: str | float) -> str:
    """Return the LIKE pattern of a constant.

    A text with an unescaped ``%`` is one already. Any other is looked for as it stands; a number
    in its shortest decimal form.
    """
    if isinstance(content, _LoweredNumber):
        return content.pattern
    text = content if isinstance(content, str) else _shortest_decimal(content)
    if _has_wildcard(text):
        return text
    return f"%{_escape_wildcards(text)}%"


def json_in_jsonb_order(text: str) -> str:
    """Return a compact JSON container as jsonb would order it; any other text as it is.

    jsonb forgets the order of keys, and SQL compares with its own. A text with blanks between its
    tokens stays as it is: it equals no container, in PocketBase neither.
    """
    if text[:1] not in {"{", "["}:
        return text
    try:
        parsed = json.loads(
            text, object_pairs_hook=_ObjectMembers, parse_int=_NumberToken, parse_float=_NumberToken
        )
        return _compact_json(parsed, is_sorted=True) if _compact_json(parsed) == text else text
    except (ValueError, RecursionError):
        return text


class _NumberToken(str):
    """A number of a JSON text, as written there."""

    __slots__ = ()


class _ObjectMembers(list[tuple[str, object]]):
    """The members of a JSON object, in the text's order."""

    __slots__ = ()


def _compact_json(node: object, *, is_sorted: bool = False) -> str:
    match node:
        case _ObjectMembers():
            members = sorted(dict(node).items(), key=_jsonb_key_order) if is_sorted else node
            shown = (
                f"{_compact_json(name)}:{_compact_json(item, is_sorted=is_sorted)}"
                for name, item in members
            )
            return "{" + ",".join(shown) + "}"
        case list():
            return "[" + ",".join(_compact_json(item, is_sorted=is_sorted) for item in node) + "]"
        case _NumberToken():
            return node
        case _:
            return json.dumps(node, ensure_ascii=False)


def _jsonb_key_order(member: tuple[str, object]) -> tuple[int, bytes]:
    name = member[0].encode("utf-8", "replace")
    return len(name), name


def _replace_unstorable(text: str) -> str:
    """What Postgres can't hold, NUL and lone surrogates, becomes what Go makes of it or near."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", "\ufffd")


def _storable(content: str | float) -> str | float:
    return _replace_unstorable(content) if isinstance(content, str) else content


def _sqlite_text(content: str | float) -> str | None:
    match content:
        case str():
            return content
        case float() if math.isnan(content):
            return None
        case int():
            return str(int(content))
        case float():
            return sqlite_float_text(content)


def _shortest_decimal(number: float) -> str:
    """Shortest decimal that reads back as the same number, without an exponent."""
    match number:
        case bool():
            return str(number).lower()
        case int():
            return str(number)
        case _ if math.isfinite(number):
            return f"{Decimal(repr(number)):f}".removesuffix(".0")
        case _:
            return "NaN" if math.isnan(number) else sqlite_float_text(number).replace("I", "+I")


def _has_wildcard(text: str) -> bool:
    """Whether a ``%`` stands behind an even number of backslashes."""
    return re.search(r"(?<!\\)(?:\\\\)*%", text) is not None


def _escape_wildcards(text: str) -> str:
    r"""Put ``\`` before each ``\``, ``%``, ``_`` that has none before it yet."""
    return re.sub(r"\\([\\%_])|([\\%_])", lambda found: "\\" + (found[1] or found[2]), text)


def _text_class(text: str) -> ParameterClass:
    if not text:
        return ParameterClass.EMPTY
    if looks_numeric(text):
        return ParameterClass.NUMERIC_TEXT
    made = like_pattern(text)
    trailing = len(made) - len(made.rstrip("\\"))
    return ParameterClass.DANGLING_ESCAPE if trailing % 2 else ParameterClass.TEXT


# --- the subscriber and the moment


def _request_value(parameter: RequestValue, request: RuleRequest) -> Scalar:
    content = _request_member(parameter.path, request)
    if parameter.is_isset:
        return int(content is not None)
    if isinstance(content, str):
        content = _replace_unstorable(content)
        if parameter.is_read_as_number:
            content = _go_number_or_text(content)
    if not parameter.is_lower or content is None:
        return content
    lowered = _ascii_lower(_sqlite_text(content))
    if isinstance(content, float) and lowered is not None:
        return _LoweredNumber(lowered, like_pattern(content).lower())
    return lowered


class _LoweredNumber(str):
    """A number made text by ``:lower``; as a pattern it is still the number."""

    __slots__ = ("pattern",)
    pattern: str

    def __new__(cls, text: str, as_pattern: str) -> Self:
        made = super().__new__(cls, text)
        made.pattern = as_pattern
        return made


def _go_number_or_text(text: str) -> str | float:
    """Return the number that Go reads, or the text; a number beyond all doubles is a text."""
    if _GO_FLOAT.fullmatch(text) is None:
        return text
    number = float(text)
    is_too_large = math.isinf(number) and "n" not in text.lower()
    return text if is_too_large else double_or_exact_integer(text.replace("_", ""), number)


def _request_member(path: tuple[str, ...], request: RuleRequest) -> Scalar:
    match path:
        case ("context",):
            return request.context
        case ("method",):
            return request.method
        case ("query", key):
            return request.query.get(key)
        case ("headers", key):
            return request.headers.get(key)
        case ("auth", field):
            return _principal_field(field, request)
        case _:
            return None


def _principal_field(field: str, request: RuleRequest) -> Scalar:
    match request.principal:
        case Guest():
            return None
        case AuthRecord() as record:
            own: dict[str, Scalar] = {
                "id": record.id,
                "collectionId": record.collection_id,
                "collectionName": record.collection_name,
                "email": record.email,
                "emailVisibility": record.email_visibility,
                "verified": record.verified,
            }
            return own[field]
        case Superuser(id):
            fixed: dict[str, Scalar] = {
                "id": id,
                "collectionId": SUPERUSERS_COLLECTION_ID,
                "collectionName": "_superusers",
                "email": "",
                "emailVisibility": False,
                "verified": True,
            }
            return fixed[field]


def _ascii_lower(text: str | None) -> str | None:
    return None if text is None else text.translate(_ASCII_LOWER)


_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}

_DATE_MACROS = {
    Macro.NOW,
    Macro.YESTERDAY,
    Macro.TOMORROW,
    Macro.TODAY_START,
    Macro.TODAY_END,
    Macro.MONTH_START,
    Macro.MONTH_END,
    Macro.YEAR_START,
    Macro.YEAR_END,
}
"""The macros that are texts; the others are integers."""


def _macro_value(macro: Macro, now: datetime) -> str | int:
    day = timedelta(days=1)
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    month = today.replace(day=1)
    year = month.replace(month=1)
    values: dict[Macro, str | int] = {
        Macro.NOW: _date_text(now),
        Macro.YESTERDAY: _date_text(now - day),
        Macro.TOMORROW: _date_text(now + day),
        Macro.TODAY_START: _date_text(today),
        Macro.TODAY_END: _last_millisecond_before(today + day),
        Macro.MONTH_START: _date_text(month),
        Macro.MONTH_END: _last_millisecond_before((month + 31 * day).replace(day=1)),
        Macro.YEAR_START: _date_text(year),
        Macro.YEAR_END: _last_millisecond_before((year + 366 * day).replace(day=1, month=1)),
        Macro.SECOND: now.second,
        Macro.MINUTE: now.minute,
        Macro.HOUR: now.hour,
        Macro.DAY: now.day,
        Macro.MONTH: now.month,
        Macro.YEAR: now.year,
        Macro.WEEKDAY: now.isoweekday() % 7,
    }
    return values[macro]


def _date_text(when: datetime) -> str:
    """Return the moment as PocketBase writes dates."""
    return f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d}Z"


def _last_millisecond_before(when: datetime) -> str:
    return _date_text(when - timedelta(milliseconds=1))
