"""An operand in SQL, and SQLite's conversions between its numbers and texts.

``operands`` makes them, ``conditions`` compares them. ``language.sqlite_values`` converts
parameters' values in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlglot import exp

from pgrealtime.rules.language.parameters import Parameter, ParameterClass, SqlForm
from pgrealtime.rules.language.sqlite_values import MAX_NUMERIC_TEXT_LENGTH, NUMERIC_TEXT_REGEX
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.joins import Scope, Translation
from pgrealtime.rules.sql.nodes import Sql


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlOperand:
    """The value of an operand in SQL.

    SQLite types values, PostgreSQL types columns. So a value is a pair of expressions, number and
    text, of which at most one is not NULL in any row; where the type is known there is only one.
    """

    number: Sql | None = None
    """Numeric or an integer type, which are exact, or double precision."""
    text: Sql | None = None
    make_text: Callable[[], Sql]
    """Makes the value as text, of whatever type it is; long for numbers, and seldom needed."""
    parameter: Parameter | None = None
    """Of a constant: its class tells a conversion whether it looks like a number."""

    @classmethod
    def of_text(cls, text: Sql) -> SqlOperand:
        """Return an operand that is a text in every row."""
        return cls(text=text, make_text=lambda: text)

    @classmethod
    def of_number(cls, number: Sql) -> SqlOperand:
        """Return an operand that is a number in every row, whose text is that of PostgreSQL."""
        return cls(number=number, make_text=lambda: nodes.cast(number, nodes.TEXT))

    @property
    def as_text(self) -> Sql:
        """The value as text, for LIKE and for conversions."""
        return self.make_text()


def convert_to_number(operand: SqlOperand, scope: Scope) -> SqlOperand:
    """Return the operand with texts that look like numbers turned into numbers."""
    if operand.text is None:
        return operand
    if operand.parameter is not None:
        class_ = scope.translation.parameter_classes[operand.parameter]
        if class_ is not ParameterClass.NUMERIC_TEXT:
            return operand
        number = bound_number(operand.parameter, scope)
        return SqlOperand(number=number, make_text=operand.make_text)
    number, text = _split_numeric_text(operand.text)
    if operand.number is not None:
        number = nodes.coalesce(operand.number, number)
    return replace(operand, number=number, text=text, parameter=None)


def convert_to_double(operand: SqlOperand) -> SqlOperand:
    """Return the operand with its exact numbers as double precision."""
    if operand.number is None:
        return operand
    return replace(operand, number=nodes.cast(operand.number, nodes.DOUBLE))


def bound_number(parameter: Parameter, scope: Scope) -> Sql:
    """Return the placeholder of a parameter that is a number or looks like one."""
    return nodes.cast(scope.translation.bind(parameter, SqlForm.NUMBER), nodes.NUMERIC)


def convert_to_text(operand: SqlOperand) -> SqlOperand:
    """Return the operand with numbers turned into texts."""
    if operand.number is None:
        return operand
    return replace(operand, number=None, text=operand.as_text)


def _split_numeric_text(text: Sql) -> tuple[Sql, Sql]:
    """Return the number of a text that looks like one, and the text if it doesn't."""
    is_numeric = nodes.matches_regex(text, NUMERIC_TEXT_REGEX)
    is_short = nodes.binary(exp.LT, nodes.call("length", text), MAX_NUMERIC_TEXT_LENGTH)
    number = nodes.case((is_short, nodes.case((is_numeric, nodes.cast(text, nodes.NUMERIC)))))
    rest = nodes.case(
        (is_short, nodes.case((is_numeric, nodes.null()), default=text)), default=text
    )
    return number, rest


def leading_number(text: Sql) -> Sql:
    """Return the number that a text begins with, NULL if it begins with none."""
    digits = nodes.string(r"^[ \t\n\v\f\r]*([+-]?(?:[0-9]{1,200}(?:\.[0-9]{0,99})?|\.[0-9]{1,99}))")
    return nodes.cast(nodes.call("substring", text, digits), nodes.DOUBLE)


def double_or_null(operand: SqlOperand, scope: Scope, *, is_double: bool) -> Sql:
    """Return the operand's number as a double, NULL if it is a text that looks like none.

    A number beyond all doubles is NULL too: no function that takes one could use it.
    """
    number = convert_to_number(operand, scope).number
    if number is None:
        return nodes.null(nodes.DOUBLE)
    if is_double:
        return number

    def body(value: Sql) -> Sql:
        limit = nodes.cast("1e300", nodes.NUMERIC)
        not_tiny = nodes.call("round", value, 300)
        return nodes.case((is_magnitude_below(value, limit), nodes.cast(not_tiny, nodes.DOUBLE)))

    return scope.translation.let(nodes.cast(number, nodes.NUMERIC), body)


# --- numbers as SQLite prints them

_MAX_DOUBLE_IN_INT64 = 9223372036854774784
"""From the next double on SQLite keeps whole numbers as floats too."""


def number_text_sql(translation: Translation, number: Sql) -> Sql:
    """Return a number column's text: a whole number is an integer to SQLite, without a point."""

    def body(value: Sql) -> Sql:
        whole = nodes.cast(nodes.cast(value, nodes.BIGINT), nodes.TEXT)
        is_whole = nodes.binary(exp.EQ, value, nodes.call("trunc", value))
        is_integer = nodes.case(
            (is_magnitude_below(value, _MAX_DOUBLE_IN_INT64), is_whole), default=False
        )
        return nodes.case((is_integer, whole), default=float_text_sql(translation, value))

    return translation.let(number, body)


def float_text_sql(translation: Translation, number: Sql) -> Sql:
    """Return a float's text, as ``sqlite_values.sqlite_float_text`` does."""

    def body(value: Sql) -> Sql:
        is_negative = nodes.binary(exp.LT, value, 0)
        infinite = nodes.case((is_negative, "-Inf"), default="Inf")
        return nodes.case(
            (nodes.is_null(value), nodes.null()),
            (nodes.binary(exp.EQ, value, 0), "0.0"),
            (
                is_magnitude_below(value, "Infinity"),
                translation.let(_float_digits(value), _digits_as_text),
            ),
            default=infinite,
        )

    return translation.let(number, body)


_DIGITS_17 = "9.9999999999999999EEEE"
_DIGITS_18 = "9.99999999999999999EEEE"


def is_magnitude_below(number: Sql, limit: nodes.Operand) -> Sql:
    """Return ``abs(number) < limit``."""
    return nodes.binary(exp.LT, nodes.call("abs", number), limit)


def _float_digits(number: Sql) -> Sql:
    """Return the finite number with the digits that SQLite shows, as numeric."""
    short = nodes.cast(number, "numeric")
    reads_back = nodes.binary(exp.EQ, nodes.cast(short, nodes.DOUBLE), number)
    # Beyond this a number rounded to 15 digits may be none any more.
    is_safe = is_magnitude_below(number, "1e308")
    is_short = nodes.case((is_safe, reads_back), default=False)
    printed = nodes.call("to_char", number, _DIGITS_18)
    mantissa, exponent = (nodes.call("split_part", printed, "e", part) for part in (1, 2))
    rounded = nodes.cast(nodes.call("round", nodes.cast(mantissa, "numeric"), 16), nodes.TEXT)
    long = nodes.cast(nodes.concatenate(rounded, "e", exponent), "numeric")
    return nodes.case((is_short, short), default=long)


def _digits_as_text(digits: Sql) -> Sql:
    """Return digits as text: plain if they are of common size, else with an exponent."""
    decimal = nodes.cast(nodes.call("trim_scale", digits), nodes.TEXT)
    has_no_point = nodes.binary(exp.EQ, nodes.call("strpos", decimal, "."), 0)
    plain = nodes.case((has_no_point, nodes.concatenate(decimal, ".0")), default=decimal)
    printed = nodes.call("ltrim", nodes.call("to_char", digits, _DIGITS_17))
    wide = nodes.call("regexp_replace", printed, r"(\.[0-9]+?)0*e", r"\1e")
    return nodes.case(
        (is_magnitude_below(digits, "0.0001"), wide),
        (is_magnitude_below(digits, 10**17), plain),
        default=wide,
    )
