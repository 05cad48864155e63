"""SQLite's ``strftime`` in PostgreSQL: time values, modifiers and format letters.

Neither PostgreSQL nor a library has it: SQLite's reading of dates, its calendar with a year 0, its
rounding and its range are reproduced here for exactness' sake, and the tests compare the results
with SQLite. Times are timestamps without zone, in UTC, of whole milliseconds. What SQLite can't
read is NULL, as in SQLite. What can't be done exactly is refused when the rule is compiled.
(SQLite documentation, "Date And Time Functions".)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from sqlglot import exp

from pgrealtime.collections.model import FieldKind
from pgrealtime.errors import RuleUnsupportedError
from pgrealtime.rules.language.parameters import LiteralParameter, Macro, SqlForm
from pgrealtime.rules.language.predicate import FieldValue, Modifier, Term
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.joins import Scope
from pgrealtime.rules.sql.nodes import Sql

_DATE = r"(?!0000)[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-4]):[0-5][0-9](:[0-5][0-9](\.[0-9]+)?)?"
_BLANK = r"[ \t\n\v\f\r]"
_ZONE = rf"{_BLANK}*([Zz]|[+-](0[0-9]|1[0-4]):[0-5][0-9])?{_BLANK}*"
_TIME_VALUE = rf"^({_DATE}[ \t\n\v\f\rT]*({_TIME}{_ZONE})?|{_TIME}{_ZONE})$"
"""The dates that SQLite reads, except years before 1."""

_END_JULIAN_DAY = 5373484.5
_FIRST_UNIX, _END_UNIX = -210866760000, 253402300800
_DAY_SECONDS = 86400
_NUMBER_MODIFIERS = {"unixepoch", "julianday", "auto"}
_SHIFT_MODIFIER = re.compile(
    rf"([+-]?(?:\d+\.?\d*|(?<=[+-])\.\d+)(?:[eE][+-]?\d+)?){_BLANK}+"
    r"(day|hour|minute|second|month|year)s?",
    re.ASCII,
)
_WEEKDAY_MODIFIER = re.compile(
    rf"weekday {_BLANK}*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?){_BLANK}*", re.ASCII
)
_UNITS = {
    "second": (1, 4.6427e11),
    "minute": (60, 7.7379e9),
    "hour": (3600, 1.2897e8),
    "day": (_DAY_SECONDS, 5373485.0),
    "month": (30 * _DAY_SECONDS, 176546.0),
    "year": (365 * _DAY_SECONDS, 14713.0),
}
"""The seconds of a unit, for a fraction of one; and the shift that leaves SQLite's range from every
time, and is NULL."""
_CALENDAR_UNITS = ("month", "year")
"""SQLite computes these by the calendar, so the time must be in its range before and after."""
_SUBSECOND_MODIFIERS = frozenset({"subsec", "subsecond"})
"""With these the seconds since 1970 have three decimals."""
_MAX_FORMAT_LENGTH = 250
_SHIFTED_BY_DAYS = 300 * 146097
"""120,000 years. The calendar repeats every 400 years, weekdays too, so modifiers can be applied
that much later, where no intermediate result leaves PostgreSQL's range."""
_RANGE = "4714-11-24 12:00:00 BC", "10000-01-01"
_SHIFTED_RANGE = "115287-11-24 12:00:00", "130000-01-01"
_SHIFTED_YEARS = "115287-01-01", "130000-01-01"
"""SQLite's range; the same so much later, of Julian days, and of calendar years."""


def translate_time(
    scope: Scope,
    *,
    time: Term | None,
    number: Sql | None,
    text: Sql | None,
    modifiers: Sequence[str],
) -> Sql:
    """Return the time that a time value and its modifiers denote, or NULL; no value is now.

    ``number`` is the value's, NULL where it is a text: a Julian day, or what a modifier says.

    Raises:
        RuleUnsupportedError: A modifier depends on the server's time zone or isn't supported.
    """
    rest = list(modifiers)
    base = rest.pop(0).lower() if rest and rest[0].lower() in _NUMBER_MODIFIERS else ""
    start = _time_value_timestamp(scope, time, number, text, base)
    let = scope.translation.let
    if not rest:
        return let(start, partial(_if_within, bounds=_RANGE))
    cycles = _interval(_SHIFTED_BY_DAYS)
    start = nodes.binary(exp.Add, start, cycles)
    for modifier in map(str.lower, rest):
        start = let(start, partial(_apply_modifier, modifier=modifier))
        if modifier.rstrip("s").endswith(_CALENDAR_UNITS):
            start = let(start, partial(_if_within, bounds=_SHIFTED_YEARS))
    start = let(start, partial(_if_within, bounds=_SHIFTED_RANGE))
    return nodes.binary(exp.Sub, start, cycles)


def _time_value_timestamp(
    scope: Scope, time: Term | None, number: Sql | None, text: Sql | None, base: str
) -> Sql:
    let, bind = scope.translation.let, scope.translation.bind
    if time is None:
        return let(bind(Macro.NOW, SqlForm.TEXT), _parse_time_text)
    is_number_wanted = base in {"unixepoch", "julianday"}
    assert number is not None
    assert text is not None
    match time:
        case FieldValue(modifier=Modifier.WHOLE | Modifier.EACH, field=field) if (
            field.kind is FieldKind.DATE
        ):
            return nodes.null(nodes.TIMESTAMP) if is_number_wanted else let(text, _parse_time_text)
    from_number = let(number, partial(_number_timestamp, base=base))
    if is_number_wanted:
        return from_number
    is_now = nodes.binary(exp.EQ, nodes.call("lower", nodes.collate_c(text)), "now")
    # "now" is the time of the batch, also in a column.
    now_or_text = nodes.case((is_now, bind(Macro.NOW, SqlForm.TEXT)), default=text)
    return nodes.coalesce(from_number, let(now_or_text, _parse_time_text))


def _parse_time_text(text: Sql) -> Sql:
    """Return the time that a text spells; days beyond the month's end are of the next month."""

    def part(regex: str, default: str) -> Sql:
        return nodes.coalesce(nodes.call("substring", text, regex), default)

    year = nodes.cast(part(r"^([0-9]{4})-", "2000"), "int")
    month = nodes.cast(part(r"^[0-9]{4}-([0-9]{2})", "01"), "int")
    day = nodes.cast(part(r"^[0-9]{4}-[0-9]{2}-([0-9]{2})", "01"), "int")
    hour = nodes.cast(part(r"([0-9]{2}):[0-9]{2}", "00"), "int")
    minute = nodes.cast(part(r"[0-9]{2}:([0-9]{2})", "00"), "int")
    second = nodes.cast(part(r"[0-9]{2}:[0-9]{2}:([0-9]{2}(?:\.[0-9]+)?)", "00"), nodes.DOUBLE)
    # More than 999 milliseconds aren't rounded to the next second.
    last = nodes.binary(exp.Add, nodes.call("floor", second), nodes.cast("0.999", nodes.DOUBLE))
    seconds = _round_to_milliseconds(nodes.call("least", second, last))
    zone = nodes.cast(part(rf"([+-][0-9]{{2}}:[0-9]{{2}}){_BLANK}*$", "00:00"), "interval")
    first = nodes.call("make_timestamp", year, month, 1, 0, 0, 0)
    days = nodes.binary(exp.Sub, day, 1)
    since = nodes.call("make_interval", 0, 0, 0, days, hour, minute, seconds)
    parsed = nodes.binary(exp.Sub, nodes.binary(exp.Add, first, since), zone)
    return nodes.case((nodes.matches_regex(text, _TIME_VALUE), parsed))


def _round_to_milliseconds(seconds: Sql) -> Sql:
    """Return seconds rounded to whole milliseconds as SQLite rounds them."""
    scaled = nodes.binary(exp.Mul, seconds, 1000)
    whole = nodes.call("floor", nodes.binary(exp.Add, scaled, nodes.cast("0.5", nodes.DOUBLE)))
    return nodes.binary(exp.Div, whole, nodes.cast(1000, nodes.DOUBLE))


def _number_timestamp(number: Sql, base: str) -> Sql:
    """Return the time of a Julian day, or of seconds since 1970."""
    julian = nodes.binary(exp.Mul, number, _DAY_SECONDS * 1000)
    since_epoch = nodes.binary(exp.Mul, number, 1000)
    unix = nodes.binary(exp.Add, since_epoch, -_FIRST_UNIX * 1000)
    end_julian, end_unix = (nodes.cast(str(e), nodes.DOUBLE) for e in (_END_JULIAN_DAY, _END_UNIX))
    from_julian = _if_between(number, 0, end_julian, _after_julian_day_zero(julian))
    from_unix = _if_between(number, _FIRST_UNIX, end_unix, _after_julian_day_zero(unix))
    match base:
        case "unixepoch":
            return from_unix
        case "auto":
            return nodes.coalesce(from_julian, from_unix)
        case _:
            return from_julian


def _after_julian_day_zero(milliseconds: Sql) -> Sql:
    """Return the time so long after the Julian day 0 began, in whole milliseconds."""
    half = nodes.cast("0.5", nodes.DOUBLE)
    rounded = nodes.call("floor", nodes.binary(exp.Add, milliseconds, half))
    since_epoch = nodes.binary(exp.Add, nodes.cast(rounded, nodes.BIGINT), _FIRST_UNIX * 1000)
    a_day = _DAY_SECONDS * 1000
    # An interval's seconds are doubles, which can't hold the milliseconds of thousands of years.
    days = nodes.cast(nodes.call("div", nodes.cast(since_epoch, "numeric"), a_day), "int")
    rest = nodes.call("mod", since_epoch, a_day)
    seconds = nodes.binary(exp.Div, rest, nodes.cast(1000, nodes.DOUBLE))
    epoch = nodes.cast("1970-01-01", nodes.TIMESTAMP)
    return nodes.binary(exp.Add, epoch, _interval(days, seconds))


def _interval(days: nodes.Operand, *seconds: nodes.Operand) -> Sql:
    """Return so many days, and seconds if any are given."""
    rest = (0, 0, *seconds) if seconds else ()
    return nodes.call("make_interval", 0, 0, 0, days, *rest)


def _apply_modifier(start: Sql, modifier: str) -> Sql:
    """Return the time changed by one modifier, which is in lower case."""
    if modifier in {*_SUBSECOND_MODIFIERS, "ceiling"}:
        return start
    if modifier in {"start of day", "start of month", "start of year"}:
        unit = modifier.removeprefix("start of ")
        return _if_within(start, _SHIFTED_RANGE, nodes.call("date_trunc", unit, start))
    if weekday := _WEEKDAY_MODIFIER.fullmatch(modifier):
        wanted = float(weekday[1])
        is_day = 0 <= wanted < 7 and wanted.is_integer()  # noqa: PLR2004 (days of a week)
        if not is_day:
            return nodes.null(nodes.TIMESTAMP)
        ahead = nodes.binary(exp.Sub, int(wanted) + 7, _date_part("dow", start))
        days = _interval(nodes.call("mod", ahead, 7))
        return _if_within(start, _SHIFTED_RANGE, nodes.binary(exp.Add, start, days))
    if shift := _SHIFT_MODIFIER.fullmatch(modifier):
        later = _shift(start, float(shift[1]), shift[2])
        is_calendar = shift[2] in _CALENDAR_UNITS
        return _if_within(start, _SHIFTED_RANGE, later) if is_calendar else later
    if modifier in {"utc", "localtime", "floor"} or re.match(r"[+-]?\d+[-:]", modifier):
        raise RuleUnsupportedError(
            f'modifier "{modifier}" of strftime is not supported', start=0, end=0
        )
    return nodes.null(nodes.TIMESTAMP)


def _shift(start: Sql, amount: float, unit: str) -> Sql:
    """Return the time some units later. Months keep the day's number, also beyond their end."""
    unit_seconds, too_far = _UNITS[unit]
    if abs(amount) >= too_far:
        return nodes.null(nodes.TIMESTAMP)
    half = math.copysign(0.5, amount)
    if unit in _CALENDAR_UNITS:
        count = int(amount) * (12 if unit == "year" else 1)
        month = nodes.call("date_trunc", "month", start)
        rest = nodes.binary(exp.Sub, start, month)
        later = nodes.call("make_interval", 0, count)
        start = nodes.binary(exp.Add, nodes.binary(exp.Add, month, later), rest)
        amount -= int(amount)
    rounded = int(amount * 1000.0 * unit_seconds + half)
    days, milliseconds = divmod(rounded, _DAY_SECONDS * 1000)
    return nodes.binary(exp.Add, start, _interval(days, str(milliseconds / 1000)))


def _if_within(start: Sql, bounds: tuple[str, str], result: Sql | None = None) -> Sql:
    """Return the result, or else the time itself, if the time is in a half-open range, else NULL.

    Only in ``_SHIFTED_RANGE`` can SQLite compute the calendar day of a time.
    """
    first, end = (nodes.cast(bound, nodes.TIMESTAMP) for bound in bounds)
    return _if_between(start, first, end, start if result is None else result)


def _if_between(value: Sql, low: nodes.Operand, high: nodes.Operand, result: Sql) -> Sql:
    is_low, is_high = nodes.binary(exp.GTE, value, low), nodes.binary(exp.LT, value, high)
    return nodes.case((is_low, nodes.case((is_high, result))))


# --- letters


def format_time(scope: Scope, timestamp: Sql, layout: str, modifiers: Sequence[str]) -> Sql:
    """Return the time in SQLite's format; NULL for a format that SQLite refuses.

    The modifiers are applied already, but some change what a letter prints.

    Raises:
        RuleUnsupportedError: The format has the Julian day, or is too long.
    """
    if len(layout) > _MAX_FORMAT_LENGTH:
        raise RuleUnsupportedError(
            f"the format of strftime is longer than {_MAX_FORMAT_LENGTH} characters", start=0, end=0
        )
    has_subseconds = any(modifier.lower() in _SUBSECOND_MODIFIERS for modifier in modifiers)

    def concatenated(start: Sql) -> Sql:
        pieces: list[nodes.Operand] = []
        for plain, letter in re.findall(r"([^%]+)|%(.?)", layout, re.DOTALL):
            if plain:
                pieces.append(scope.translation.bind(LiteralParameter(plain), SqlForm.TEXT))
            elif letter == "%":
                pieces.append("%")
            elif letter == "J":
                raise RuleUnsupportedError(
                    'format "%J" of strftime is not supported', start=0, end=0
                )
            else:
                made = _format_letter(start, letter, has_subseconds=has_subseconds)
                if made is None:
                    return nodes.null()
                pieces.append(made)
        text = nodes.concatenate(*pieces) if pieces else ""
        return nodes.case((nodes.is_null(start), nodes.null()), default=text)

    return scope.translation.let(timestamp, concatenated)


_TO_CHAR_LETTERS = {
    "d": "DD",
    "f": "SS.MS",
    "H": "HH24",
    "I": "HH12",
    "j": "DDD",
    "m": "MM",
    "M": "MI",
    "p": "AM",
    "P": "am",
    "R": "HH24:MI",
    "S": "SS",
    "T": "HH24:MI:SS",
    "u": "ID",
    "V": "IW",
}
"""Letters that are a format of PostgreSQL's ``to_char``."""
_BLANK_PADDED_LETTERS = {"e": "FMDD", "k": "FMHH24", "l": "FMHH12"}
"""Those padded with a blank instead of a zero."""


def _format_letter(start: Sql, letter: str, *, has_subseconds: bool) -> Sql | None:
    if layout := _TO_CHAR_LETTERS.get(letter):
        return nodes.call("to_char", start, layout)
    if layout := _BLANK_PADDED_LETTERS.get(letter):
        return nodes.call("lpad", nodes.call("to_char", start, layout), 2)
    if letter == "s" and has_subseconds:
        return nodes.call("to_char", _date_part("epoch", start), "FM999999999990.000")
    make = _COMPUTED_LETTERS.get(letter)
    return None if make is None else make(start)


def _date_part(field: str, start: Sql) -> Sql:
    part = nodes.call("date_part", field, start)
    return part if field == "epoch" else nodes.cast(part, "int")


def _whole_epoch_seconds(start: Sql) -> Sql:
    seconds = nodes.call("floor", _date_part("epoch", start))
    return nodes.cast(nodes.cast(seconds, nodes.BIGINT), nodes.TEXT)


def _iso_week_thursday(start: Sql) -> Sql:
    """Return a time in the year that the ISO week belongs to: its Thursday."""
    days = nodes.binary(exp.Sub, 4, _date_part("isodow", start))
    return nodes.binary(exp.Add, start, _interval(days))


def _astronomical_year(start: Sql) -> Sql:
    """Return the year. SQLite has a year 0; to PostgreSQL it is 1 BC and -1."""
    year = _date_part("year", start)
    is_before = nodes.binary(exp.LT, year, 0)
    return nodes.case((is_before, nodes.binary(exp.Add, year, 1)), default=year)


def _year(start: Sql) -> Sql:
    """Return the year in four characters, including a sign."""
    return _signed(_astronomical_year(start), "FM9000", "FM0000")


def _year_of_century(start: Sql) -> Sql:
    """Return the year's last two digits, with a sign if it is before 0."""
    return _signed(nodes.call("mod", _astronomical_year(start), 100), "FM90", "FM00")


def _signed(year: Sql, negative_layout: str, layout: str) -> Sql:
    is_signed = nodes.binary(exp.LT, year, 0)
    return nodes.call("to_char", year, nodes.case((is_signed, negative_layout), default=layout))


def _week(start: Sql, days_since_first: Sql) -> Sql:
    """Return the week of the year, 00 before the first such weekday of the year."""
    end_of_week = nodes.binary(exp.Add, _date_part("doy", start), 6)
    days = nodes.binary(exp.Sub, end_of_week, days_since_first)
    week = nodes.call("div", nodes.cast(days, "numeric"), 7)
    return nodes.call("to_char", week, "FM00")


_COMPUTED_LETTERS: Mapping[str, Callable[[Sql], Sql]] = {
    "F": lambda start: nodes.concatenate(_year(start), nodes.call("to_char", start, "-MM-DD")),
    "g": lambda start: _year_of_century(_iso_week_thursday(start)),
    "G": lambda start: _year(_iso_week_thursday(start)),
    "s": _whole_epoch_seconds,
    "U": lambda start: _week(start, _date_part("dow", start)),
    "w": lambda start: nodes.cast(_date_part("dow", start), nodes.TEXT),
    "W": lambda start: _week(start, nodes.binary(exp.Sub, _date_part("isodow", start), 1)),
    "Y": _year,
}
"""Letters that are computed."""
