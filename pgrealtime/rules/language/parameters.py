"""The parameters of a rule: what a value comes from, its class, the value, its forms in SQL.

``resolve`` makes them of a rule's text. A translation depends on the classes of its parameters,
never on their values, so one translation serves all callers whose values have the same classes.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from operator import attrgetter
from typing import TypeAlias

from pgrealtime.auth.principal import AuthRecord, Guest, Principal, Superuser
from pgrealtime.rules.language import sqlite_values
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import Number, Scalar


@dataclass(frozen=True, slots=True)
class LiteralParameter:
    """A literal of the rule's text."""

    value: str | float


@dataclass(frozen=True, slots=True)
class LiftedLiteral:
    """The n-th literal of a filter that was compiled without its literals."""

    index: int


@dataclass(frozen=True, slots=True)
class RequestValue:
    """A value of ``@request``: ``("query", "k")``, ``("auth", "id")``, ``("context",)``."""

    path: tuple[str, ...]
    is_read_as_number: bool = False
    """It has the name of a number field, so a text that is a number becomes one."""
    is_lower: bool = False
    is_isset: bool = False
    """Not the value, but 1 or 0 for whether there is one."""


class Macro(Enum):
    """A time or a part of one, in UTC; the same for a whole batch of changes."""

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
    """A column of the caller's own row, given in text form."""

    name: str
    """Empty: not a column, but NULL if there is no such row."""


MACROS: dict[str, Macro] = {macro.value: macro for macro in Macro}


class ParameterClass(Enum):
    """The class of a parameter's value: all that a translation depends on."""

    ABSENT = auto()
    """No value: a missing key, or anything of a guest."""
    EMPTY = auto()
    """The empty text."""
    TEXT = auto()
    """Any other text that doesn't look like a number."""
    DANGLING_ESCAPE = auto()
    """Such a text whose LIKE pattern would end within an escape, and so matches nothing."""
    NUMERIC_TEXT = auto()
    """A text that looks like a number."""
    FLOAT = auto()
    INTEGER = auto()
    """Booleans are integers, and so are whole numbers that no double holds."""

    @property
    def is_empty(self) -> bool:
        """Whether every value of the class is NULL or the empty text."""
        return self in {ParameterClass.ABSENT, ParameterClass.EMPTY}

    @property
    def is_number(self) -> bool:
        """Whether every value of the class is a number, not a text that looks like one."""
        return self in {ParameterClass.FLOAT, ParameterClass.INTEGER}


class SqlForm(Enum):
    """How a value is bound in SQL."""

    TEXT = "text"
    """Text as SQLite prints the value: ``5.0`` for the float, ``5`` for the integer."""
    NUMBER = "number"
    """Text of the number with all its digits, which fits numeric and double precision."""
    PATTERN = "pattern"
    """LIKE pattern: the text between two ``%`` with its wildcards escaped, or as it is."""
    UUID = "uuid"
    """Text if it is a canonical uuid, else NULL: compares as the text would, for an index."""
    INTEGER = "integer"
    """Text if it is a canonical 64-bit integer, else NULL; likewise."""
    WHOLE = "whole"
    """The number if it is a 64-bit integer, else NULL: equals what the number equals, likewise."""
    FLOOR = "floor"
    """The largest 64-bit integer that isn't above the number, or the least of all."""
    CEILING = "ceiling"
    """The least 64-bit integer that isn't below the number, or the largest of all."""
    JSON = "json"
    """Text of a JSON container with its keys in jsonb's order; other texts as they are."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The parameter and form that a placeholder is bound to."""

    parameter: Parameter | CallerColumn
    form: SqlForm


def parameter_class(value: Scalar) -> ParameterClass:
    """Return the class of the value."""
    match value:
        case None:
            return ParameterClass.ABSENT
        case "":
            return ParameterClass.EMPTY
        case str() if sqlite_values.looks_numeric(value):
            return ParameterClass.NUMERIC_TEXT
        case str():
            pattern = sqlite_values.like_pattern(value)
            is_dangling = (len(pattern) - len(pattern.rstrip("\\"))) % 2
            return ParameterClass.DANGLING_ESCAPE if is_dangling else ParameterClass.TEXT
        case int():
            return ParameterClass.INTEGER
        case float():
            return ParameterClass.FLOAT


def fixed_parameter_class(parameter: Parameter) -> ParameterClass | None:
    """Return the class that the parameter has for every request, or None if that differs."""
    match parameter:
        case LiteralParameter(value):
            return parameter_class(sqlite_values.storable(value))
        case Macro():
            any_time = datetime(2000, 1, 1, tzinfo=UTC)
            return parameter_class(_macro_value(parameter, any_time))
        case LiftedLiteral() | RequestValue():
            return None


def parameter_value(
    parameter: Parameter, request: RuleRequest, now: datetime, literals: Sequence[str | float] = ()
) -> Scalar:
    """Return the parameter's value for a request at a time, which has its zone.

    ``literals`` are those that were lifted out of the filter.
    """
    match parameter:
        case LiteralParameter(value):
            return sqlite_values.storable(value)
        case LiftedLiteral(index):
            return sqlite_values.storable(literals[index])
        case RequestValue():
            return _request_value(parameter, request)
        case Macro():
            return _macro_value(parameter, now.astimezone(UTC))


# --- values of a request

_GO_FLOAT = re.compile(
    r"[+-]?(?:\d(?:_?\d)*\.?(?:\d(?:_?\d)*)?|\.\d(?:_?\d)*)(?:[eE][+-]?\d(?:_?\d)*)?"
    r"|[+-]?inf(?:inity)?|nan",
    re.ASCII | re.IGNORECASE,
)
"""What Go's ``strconv.ParseFloat`` reads, hexadecimal numbers excepted."""
_SUPERUSER = AuthRecord(
    collection_id="pbc_3142635823", collection_name="_superusers", id="", verified=True
)
"""A superuser's ``@request.auth``. The collection's id is the same in every installation."""


def _request_value(parameter: RequestValue, request: RuleRequest) -> Scalar:
    value = _request_member(parameter.path, request)
    if parameter.is_isset:
        return int(value is not None)
    value = None if value is None else sqlite_values.storable(value)
    if isinstance(value, str) and parameter.is_read_as_number:
        value = _go_number_or_text(value)
    if not parameter.is_lower or value is None:
        return value
    text = sqlite_values.sqlite_text(value)
    if text is None:
        return None
    lowered = sqlite_values.ascii_lower(text)
    if not isinstance(value, float):
        return lowered
    return sqlite_values.LoweredNumber(lowered, sqlite_values.like_pattern(value).lower())


def _go_number_or_text(text: str) -> str | float:
    """Return the number that Go reads, or the text; a number beyond all doubles is a text."""
    if _GO_FLOAT.fullmatch(text) is None:
        return text
    number = float(text)
    is_too_large = math.isinf(number) and "n" not in text.lower()
    if is_too_large:
        return text
    return sqlite_values.double_or_exact_integer(text.replace("_", ""), number)


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
        case ("body", key):
            return None if request.body is None else request.body.get(key)
        case ("auth", field):
            return _principal_field(field, request.principal)
        case _:
            return None


PRINCIPAL_FIELDS: dict[str, Callable[[AuthRecord], Scalar]] = {
    "id": attrgetter("id"),
    "collectionId": attrgetter("collection_id"),
    "collectionName": attrgetter("collection_name"),
    "email": attrgetter("email"),
    "emailVisibility": attrgetter("email_visibility"),
    "verified": attrgetter("verified"),
}
"""The fields of ``@request.auth`` that are known from the authentication, without a query."""


def _principal_field(field: str, principal: Principal) -> Scalar:
    match principal:
        case Guest():
            return None
        case Superuser(id):
            record = replace(_SUPERUSER, id=id)
        case AuthRecord():
            record = principal
    if field in PRINCIPAL_FIELDS:
        return PRINCIPAL_FIELDS[field](record)
    return dict(record.claims).get(field)


# --- values of a time


class MacroValues(dict[Macro, Scalar]):
    """Values of macros at a time, which has its zone, each computed when it is first read."""

    def __init__(self, now: datetime) -> None:
        super().__init__()
        self._now = now.astimezone(UTC)

    def __missing__(self, macro: Macro) -> Scalar:
        self[macro] = value = _macro_value(macro, self._now)
        return value


def _macro_value(macro: Macro, now: datetime) -> str | int:
    day, millisecond = timedelta(days=1), timedelta(milliseconds=1)
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    month = today.replace(day=1)
    year = month.replace(month=1)
    values: dict[Macro, str | int] = {
        Macro.NOW: _date_text(now),
        Macro.YESTERDAY: _date_text(now - day),
        Macro.TOMORROW: _date_text(now + day),
        Macro.TODAY_START: _date_text(today),
        Macro.TODAY_END: _date_text(today + day - millisecond),
        Macro.MONTH_START: _date_text(month),
        Macro.MONTH_END: _date_text((month + 31 * day).replace(day=1) - millisecond),
        Macro.YEAR_START: _date_text(year),
        Macro.YEAR_END: _date_text((year + 366 * day).replace(day=1, month=1) - millisecond),
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
    """Return the time as PocketBase writes dates."""
    return f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d}Z"


# --- forms

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_CANONICAL_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_BIGINT_RANGE = range(-(1 << 63), 1 << 63)


def to_sql_value(value: Scalar, form: SqlForm) -> Scalar:
    """Return the value as a placeholder of that form takes it."""
    text = None if value is None else sqlite_values.sqlite_text(value)
    if value is None or text is None:
        return None
    match form:
        case SqlForm.TEXT:
            return text
        case SqlForm.NUMBER:
            number = sqlite_values.exact_number(value)
            # PostgreSQL's spelling of an infinite numeric.
            return None if number is None else str(number).replace("inf", "Infinity")
        case SqlForm.PATTERN:
            return sqlite_values.like_pattern(value)
        case SqlForm.UUID:
            return text if _UUID.fullmatch(text) else None
        case SqlForm.INTEGER:
            is_bigint = _CANONICAL_INTEGER.fullmatch(text) and int(text) in _BIGINT_RANGE
            return text if is_bigint else None
        case SqlForm.WHOLE | SqlForm.FLOOR | SqlForm.CEILING:
            return _whole_number(sqlite_values.exact_number(value), form)
        case SqlForm.JSON:
            return sqlite_values.json_in_jsonb_order(text)


def _whole_number(number: Number | None, form: SqlForm) -> str | None:
    if number is None:
        return None
    # An infinite number has no floor.
    below = max(min(number, _BIGINT_RANGE[-1]), _BIGINT_RANGE[0])
    whole = math.ceil(below) if form is SqlForm.CEILING else math.floor(below)
    return None if form is SqlForm.WHOLE and whole != number else str(whole)


CALLER_ID_PARAMETER = RequestValue(("auth", "id"))
"""The id of the caller's own row."""
