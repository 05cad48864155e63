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
from pgrealtime.rules.language.request import Request
from pgrealtime.rules.language.syntax import double_or_whole

Number: TypeAlias = float | int | Decimal
"""Exact unless it is a float: those are double precision, infinity and NaN."""
Scalar: TypeAlias = str | float | int | None
"""A parameter's value: None is absent or NULL, a bool counts as the integer it is in SQLite."""

SUPERUSERS_ID = "pbc_3142635823"
"""Id of PocketBase's collection of superusers, the same in every installation."""


@dataclass(frozen=True, slots=True)
class Literal:
    """A literal of the text, known with it."""

    value: str | float


@dataclass(frozen=True, slots=True)
class Lifted:
    """The n-th literal of a text that was compiled without its literals."""

    index: int


@dataclass(frozen=True, slots=True)
class RequestValue:
    """A constant of ``@request``: ``("query", "k")``, ``("auth", "id")``, ``("context",)``."""

    path: tuple[str, ...]
    as_number: bool = False
    """It bears the name of a number field, so a text that is a number becomes one."""
    is_lower: bool = False
    is_set: bool = False
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


Parameter: TypeAlias = Literal | Lifted | RequestValue | Macro


@dataclass(frozen=True, slots=True)
class AuthColumn:
    """A column of the subscriber's own row, handed over in text form."""

    name: str
    """Empty: not a column, but NULL if there is no such row."""


MACROS: dict[str, Macro] = {macro.value: macro for macro in Macro}


class Shape(Enum):
    """The class of a parameter's value: all that a translation depends on."""

    ABSENT = auto()
    """No value: a missing key, anything of a guest."""
    EMPTY = auto()
    """The empty text."""
    TEXT = auto()
    """Any other text that doesn't look like a number."""
    DANGLING = auto()
    """Such a text whose LIKE pattern would end within an escape, and so can match nothing."""
    NUMERIC = auto()
    """A text that looks like a number."""
    NUMBER = auto()
    """A float."""
    INTEGER = auto()
    """An integer; flags are such, and whole numbers that no double holds."""

    @property
    def is_empty(self) -> bool:
        """Known to be NULL or the empty text before anything runs."""
        return self in {Shape.ABSENT, Shape.EMPTY}

    @property
    def is_number(self) -> bool:
        """A number, not a text that looks like one."""
        return self in {Shape.NUMBER, Shape.INTEGER}


class Form(Enum):
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

    parameter: Parameter | AuthColumn
    form: Form


def value(
    parameter: Parameter, request: Request, now: datetime, literals: Sequence[str | float] = ()
) -> Scalar:
    """Return what the parameter stands for.

    Args:
        parameter: The parameter.
        request: The subscriber.
        now: The moment of the batch, with its zone.
        literals: What was lifted out of the text.
    """
    match parameter:
        case Literal(constant):
            return _cleaned(constant)
        case Lifted(index):
            return _cleaned(literals[index])
        case RequestValue():
            return _request_value(parameter, request)
        case Macro():
            return _macro(parameter, now.astimezone(UTC))


def shape(content: Scalar) -> Shape:
    """Return the class of the value."""
    match content:
        case None:
            return Shape.ABSENT
        case str():
            return _text_shape(content)
        case int():
            return Shape.INTEGER
        case float():
            return Shape.NUMBER


def static_shape(parameter: Parameter) -> Shape | None:
    """Return the class that the parameter has for everybody, or None if that differs."""
    match parameter:
        case Literal(constant):
            return shape(_cleaned(constant))
        case Macro():
            is_text = parameter in _MOMENTS
            return Shape.TEXT if is_text else Shape.INTEGER
        case Lifted() | RequestValue():
            return None


def render(content: Scalar, form: Form) -> Scalar:
    """Return the value as the placeholder of that form wants it."""
    if content is None:
        return None
    text = _sqlite_text(content)
    if text is None:
        return None
    match form:
        case Form.TEXT:
            return text
        case Form.NUMBER:
            return _spelt(number_of(content))
        case Form.PATTERN:
            return pattern(content)
        case Form.UUID:
            return text if _UUID.fullmatch(text) else None
        case Form.INTEGER:
            return text if _INTEGER.fullmatch(text) and int(text) in _BIGINT else None
        case Form.JSON:
            return json_text(text)


# --- texts and numbers as SQLite has them


_NUMERIC = re.compile(
    r"[ \t\n\v\f\r]*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[ \t\n\v\f\r]*", re.ASCII
)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_GO_FLOAT = re.compile(
    r"[+-]?(?:\d(?:_?\d)*\.?(?:\d(?:_?\d)*)?|\.\d(?:_?\d)*)(?:[eE][+-]?\d(?:_?\d)*)?"
    r"|[+-]?inf(?:inity)?|nan",
    re.ASCII | re.IGNORECASE,
)
_TINY_EXPONENT, _WIDE_EXPONENT = -5, 17
"""From these on numbers are written with an exponent."""
_BIGINT = range(-(1 << 63), 1 << 63)


def number_of(content: str | float) -> Number | None:
    """Return the number that a number, or a text that looks like one, stands for: exactly.

    A double stands for the shortest decimal that reads back as it, or for the whole number that it
    is. What no double reaches is infinite or 0, as in SQLite. None is for NaN.
    """
    match content:
        case str():
            return _number_of_text(content)
        case int():
            return int(content)
        case float() if content.is_integer():
            return int(content)
        case float() if math.isfinite(content):
            return Decimal(repr(content))
        case float():
            return None if math.isnan(content) else content


def _number_of_text(text: str) -> Number:
    if len(text) <= _SHORT and _WHOLE.fullmatch(text):
        return int(text)
    double = float(text)
    if math.isinf(double):
        return double
    return Decimal(text) if double else 0


_SHORT = 30
_WHOLE = re.compile(r"[ \t\n\v\f\r]*[+-]?[0-9]+[ \t\n\v\f\r]*")


def _spelt(number: Number | None) -> str | None:
    match number:
        case None:
            return None
        case float():
            return str(number).replace("inf", "Infinity")
        case _:
            return str(number)


def looks_numeric(text: str) -> bool:
    """Whether SQLite's numeric affinity would turn the text into a number."""
    return _NUMERIC.fullmatch(text) is not None


def number_text(number: float) -> str:
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
    if _TINY_EXPONENT < shown.adjusted() < _WIDE_EXPONENT:
        return _pointed(f"{shown:f}")
    digits, exponent = f"{shown:.16e}".split("e")
    return f"{_pointed(digits)}e{int(exponent):+03d}"


_TO_18_DIGITS = Context(prec=18, rounding=ROUND_HALF_EVEN)
_TO_17_DIGITS = Context(prec=17, rounding=ROUND_HALF_UP)


def _pointed(digits: str) -> str:
    """Return a decimal without trailing zeros, but with one digit behind its point."""
    trimmed = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return trimmed if "." in trimmed else f"{trimmed}.0"


def pattern(content: str | float) -> str:
    """Return the LIKE pattern of a constant.

    A text with an unescaped ``%`` is one already. Any other is looked for as it stands; a number
    in its shortest decimal form.
    """
    if isinstance(content, _LoweredNumber):
        return content.pattern
    text = content if isinstance(content, str) else _decimal(content)
    if _has_wildcard(text):
        return text
    return f"%{_escape(text)}%"


def json_text(text: str) -> str:
    """Return a compact JSON container as jsonb would order it; any other text as it is.

    jsonb forgets the order of keys, and SQL compares with its own. A text with blanks between its
    tokens stays as it is: it equals no container, in PocketBase neither.
    """
    if text[:1] not in {"{", "["}:
        return text
    try:
        parsed = json.loads(
            text, object_pairs_hook=_Members, parse_int=_Number, parse_float=_Number
        )
        return _compact(parsed, is_sorted=True) if _compact(parsed) == text else text
    except (ValueError, RecursionError):
        return text


class _Number(str):
    """A number of a JSON text, as written there."""

    __slots__ = ()


class _Members(list[tuple[str, object]]):
    """The members of a JSON object, in the text's order."""

    __slots__ = ()


def _compact(node: object, *, is_sorted: bool = False) -> str:
    match node:
        case _Members():
            members = sorted(dict(node).items(), key=_jsonb_order) if is_sorted else node
            shown = (
                f"{_compact(name)}:{_compact(item, is_sorted=is_sorted)}" for name, item in members
            )
            return "{" + ",".join(shown) + "}"
        case list():
            return "[" + ",".join(_compact(item, is_sorted=is_sorted) for item in node) + "]"
        case _Number():
            return node
        case _:
            return json.dumps(node, ensure_ascii=False)


def _jsonb_order(member: tuple[str, object]) -> tuple[int, bytes]:
    name = member[0].encode("utf-8", "replace")
    return len(name), name


def _clean(text: str) -> str:
    """What Postgres can't hold, NUL and lone surrogates, becomes what Go makes of it or near."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", "\ufffd")


def _cleaned(content: str | float) -> str | float:
    return _clean(content) if isinstance(content, str) else content


def _sqlite_text(content: str | float) -> str | None:
    match content:
        case str():
            return content
        case float() if math.isnan(content):
            return None
        case int():
            return str(int(content))
        case float():
            return number_text(content)


def _decimal(number: float) -> str:
    """Shortest decimal that reads back as the same number, without an exponent."""
    match number:
        case bool():
            return str(number).lower()
        case int():
            return str(number)
        case _ if math.isfinite(number):
            return f"{Decimal(repr(number)):f}".removesuffix(".0")
        case _:
            return "NaN" if math.isnan(number) else number_text(number).replace("I", "+I")


def _has_wildcard(text: str) -> bool:
    """Whether a ``%`` stands behind an even number of backslashes."""
    return re.search(r"(?<!\\)(?:\\\\)*%", text) is not None


def _escape(text: str) -> str:
    r"""Put ``\`` before each ``\``, ``%``, ``_`` that has none before it yet."""
    return re.sub(r"\\([\\%_])|([\\%_])", lambda found: "\\" + (found[1] or found[2]), text)


def _text_shape(text: str) -> Shape:
    if not text:
        return Shape.EMPTY
    if looks_numeric(text):
        return Shape.NUMERIC
    made = pattern(text)
    trailing = len(made) - len(made.rstrip("\\"))
    return Shape.DANGLING if trailing % 2 else Shape.TEXT


# --- the subscriber and the moment


def _request_value(parameter: RequestValue, request: Request) -> Scalar:
    content = _looked_up(parameter.path, request)
    if parameter.is_set:
        return int(content is not None)
    if isinstance(content, str):
        content = _clean(content)
        if parameter.as_number:
            content = _go_number(content)
    if not parameter.is_lower or content is None:
        return content
    lowered = _ascii_lower(_sqlite_text(content))
    if isinstance(content, float) and lowered is not None:
        return _LoweredNumber(lowered, pattern(content).lower())
    return lowered


class _LoweredNumber(str):
    """A number made text by ``:lower``; as a pattern it is still the number."""

    __slots__ = ("pattern",)
    pattern: str

    def __new__(cls, text: str, as_pattern: str) -> Self:
        made = super().__new__(cls, text)
        made.pattern = as_pattern
        return made


def _go_number(text: str) -> str | float:
    """Return the number that Go reads, or the text; a number beyond all doubles is a text."""
    if _GO_FLOAT.fullmatch(text) is None:
        return text
    number = float(text)
    is_too_large = math.isinf(number) and "n" not in text.lower()
    return text if is_too_large else double_or_whole(text.replace("_", ""), number)


def _looked_up(path: tuple[str, ...], request: Request) -> Scalar:
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
            return _plain_field(field, request)
        case _:
            return None


def _plain_field(field: str, request: Request) -> Scalar:
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
                "collectionId": SUPERUSERS_ID,
                "collectionName": "_superusers",
                "email": "",
                "emailVisibility": False,
                "verified": True,
            }
            return fixed[field]


def _ascii_lower(text: str | None) -> str | None:
    return None if text is None else text.translate(_LOWER)


_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}

_MOMENTS = {
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


def _macro(macro: Macro, now: datetime) -> str | int:
    day = timedelta(days=1)
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    month = today.replace(day=1)
    year = month.replace(month=1)
    values: dict[Macro, str | int] = {
        Macro.NOW: _moment(now),
        Macro.YESTERDAY: _moment(now - day),
        Macro.TOMORROW: _moment(now + day),
        Macro.TODAY_START: _moment(today),
        Macro.TODAY_END: _last_before(today + day),
        Macro.MONTH_START: _moment(month),
        Macro.MONTH_END: _last_before((month + 31 * day).replace(day=1)),
        Macro.YEAR_START: _moment(year),
        Macro.YEAR_END: _last_before((year + 366 * day).replace(day=1, month=1)),
        Macro.SECOND: now.second,
        Macro.MINUTE: now.minute,
        Macro.HOUR: now.hour,
        Macro.DAY: now.day,
        Macro.MONTH: now.month,
        Macro.YEAR: now.year,
        Macro.WEEKDAY: now.isoweekday() % 7,
    }
    return values[macro]


def _moment(when: datetime) -> str:
    """Return the moment as PocketBase writes dates."""
    return f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d}Z"


def _last_before(when: datetime) -> str:
    return _moment(when - timedelta(milliseconds=1))
