"""The value of a parameter for a request and a time, and its forms as a bound value of SQL."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from pgrealtime.auth.principal import AuthRecord, Guest, Superuser
from pgrealtime.rules.language.parameters import (
    LiftedLiteral,
    LiteralParameter,
    Macro,
    Parameter,
    RequestValue,
    SqlForm,
)
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import (
    LoweredNumber,
    Scalar,
    ascii_lower,
    double_or_exact_integer,
    exact_number,
    json_in_jsonb_order,
    like_pattern,
    replace_unstorable,
    sqlite_text,
    storable,
)


def parameter_value(
    parameter: Parameter, request: RuleRequest, now: datetime, literals: Sequence[str | float] = ()
) -> Scalar:
    """Return the parameter's value.

    Args:
        parameter: The parameter.
        request: The caller's request.
        now: The time of the batch, with its zone.
        literals: The literals that were lifted out of the filter.
    """
    match parameter:
        case LiteralParameter(value):
            return storable(value)
        case LiftedLiteral(index):
            return storable(literals[index])
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
_SUPERUSERS_COLLECTION_ID = "pbc_3142635823"
"""Id of PocketBase's collection of superusers, the same in every installation."""


def _request_value(parameter: RequestValue, request: RuleRequest) -> Scalar:
    value = _request_member(parameter.path, request)
    if parameter.is_isset:
        return int(value is not None)
    if isinstance(value, str):
        value = replace_unstorable(value)
        if parameter.is_read_as_number:
            value = _go_number_or_text(value)
    if not parameter.is_lower or value is None:
        return value
    text = sqlite_text(value)
    if text is None:
        return None
    lowered = ascii_lower(text)
    is_float = isinstance(value, float)
    return LoweredNumber(lowered, like_pattern(value).lower()) if is_float else lowered


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
    fields: dict[str, Scalar]
    match request.principal:
        case Guest():
            return None
        case AuthRecord() as record:
            fields = {
                "id": record.id,
                "collectionId": record.collection_id,
                "collectionName": record.collection_name,
                "email": record.email,
                "emailVisibility": record.email_visibility,
                "verified": record.verified,
            }
        case Superuser(id):
            fields = {
                "id": id,
                "collectionId": _SUPERUSERS_COLLECTION_ID,
                "collectionName": "_superusers",
                "email": "",
                "emailVisibility": False,
                "verified": True,
            }
    return fields[field]


# --- values of a time


class MacroValues:
    """Values of macros for one batch of rows, each computed when it is first read."""

    __slots__ = ("_compute", "_values")

    def __init__(self, compute: Callable[[Macro], Scalar]) -> None:
        self._compute = compute
        self._values: dict[Macro, Scalar] = {}

    def __getitem__(self, macro: Macro) -> Scalar:
        if macro not in self._values:
            self._values[macro] = self._compute(macro)
        return self._values[macro]


def macro_values_at(now: datetime) -> MacroValues:
    """Return the values of macros at a time, which has its zone."""
    return MacroValues(lambda macro: _macro_value(macro, now.astimezone(UTC)))


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
    """Return the time as PocketBase writes dates."""
    return f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d}Z"


def _last_millisecond_before(when: datetime) -> str:
    return _date_text(when - timedelta(milliseconds=1))


# --- forms

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_CANONICAL_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_BIGINT_RANGE = range(-(1 << 63), 1 << 63)


def to_sql_value(value: Scalar, form: SqlForm) -> Scalar:
    """Return the value as a placeholder of that form takes it."""
    text = None if value is None else sqlite_text(value)
    if value is None or text is None:
        return None
    match form:
        case SqlForm.TEXT:
            return text
        case SqlForm.NUMBER:
            number = exact_number(value)
            # PostgreSQL's spelling of an infinite numeric.
            return None if number is None else str(number).replace("inf", "Infinity")
        case SqlForm.PATTERN:
            return like_pattern(value)
        case SqlForm.UUID:
            return text if _UUID.fullmatch(text) else None
        case SqlForm.INTEGER:
            is_bigint = _CANONICAL_INTEGER.fullmatch(text) and int(text) in _BIGINT_RANGE
            return text if is_bigint else None
        case SqlForm.JSON:
            return json_in_jsonb_order(text)
