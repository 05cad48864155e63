"""Values of parameters, their classes and their forms."""

from __future__ import annotations

import math
import sqlite3
from datetime import UTC, datetime, timedelta, timezone

import pytest

from pgrealtime.auth.principal import AuthRecord, Superuser
from pgrealtime.rules.language.parameters import (
    LiftedLiteral,
    LiteralParameter,
    Macro,
    Parameter,
    ParameterClass,
    RequestValue,
    SqlForm,
    fixed_parameter_class,
    parameter_class,
    parameter_value,
    to_sql_value,
)
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import (
    Scalar,
    json_in_jsonb_order,
    like_pattern,
    looks_numeric,
    sqlite_float_text,
)

NOW = datetime(2024, 2, 29, 23, 5, 7, 89_999, tzinfo=UTC)


@pytest.mark.parametrize(
    ("macro", "expected"),
    [
        (Macro.NOW, "2024-02-29 23:05:07.089Z"),
        (Macro.YESTERDAY, "2024-02-28 23:05:07.089Z"),
        (Macro.TOMORROW, "2024-03-01 23:05:07.089Z"),
        (Macro.TODAY_START, "2024-02-29 00:00:00.000Z"),
        (Macro.TODAY_END, "2024-02-29 23:59:59.999Z"),
        (Macro.MONTH_START, "2024-02-01 00:00:00.000Z"),
        (Macro.MONTH_END, "2024-02-29 23:59:59.999Z"),
        (Macro.YEAR_START, "2024-01-01 00:00:00.000Z"),
        (Macro.YEAR_END, "2024-12-31 23:59:59.999Z"),
        (Macro.SECOND, 7),
        (Macro.MINUTE, 5),
        (Macro.HOUR, 23),
        (Macro.DAY, 29),
        (Macro.MONTH, 2),
        (Macro.YEAR, 2024),
        (Macro.WEEKDAY, 4),
    ],
)
def test_macro_is_taken_in_utc(macro: Macro, expected: str | int) -> None:
    """In whatever time zone the service runs; its class is the same at all times."""
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5)))
    found = parameter_value(macro, RuleRequest(), elsewhere)
    assert found == expected
    assert fixed_parameter_class(macro) is parameter_class(found)


def test_weekday_of_a_sunday_is_0() -> None:
    assert parameter_value(Macro.WEEKDAY, RuleRequest(), datetime(2024, 3, 3, tzinfo=UTC)) == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ParameterClass.ABSENT),
        ("", ParameterClass.EMPTY),
        (" ", ParameterClass.TEXT),
        ("abc", ParameterClass.TEXT),
        ("5", ParameterClass.NUMERIC_TEXT),
        (" 5.0 ", ParameterClass.NUMERIC_TEXT),
        ("-.5e1", ParameterClass.NUMERIC_TEXT),
        ("0x5", ParameterClass.TEXT),
        ("5a", ParameterClass.TEXT),
        ("1_0", ParameterClass.TEXT),
        ("inf", ParameterClass.TEXT),
        ("\u0665", ParameterClass.TEXT),
        ("a\\", ParameterClass.TEXT),
        ("%\\", ParameterClass.DANGLING_ESCAPE),
        ("%\\\\", ParameterClass.TEXT),
        (5.0, ParameterClass.FLOAT),
        (math.nan, ParameterClass.FLOAT),
        (5, ParameterClass.INTEGER),
        (False, ParameterClass.INTEGER),
    ],
)
def test_shape_is_all_that_a_translation_sees(content: Scalar, expected: ParameterClass) -> None:
    assert parameter_class(content) is expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a_b", "%a\\_b%"),
        ("a\\b", "%a\\\\b%"),
        ("a\\_b", "%a\\_b%"),
        ("a\\%b", "%a\\%b%"),
        ("a_b%", "a_b%"),
        ("a\\\\%", "a\\\\%"),
        ("", "%%"),
        (5.0, "%5%"),
        (1.5, "%1.5%"),
        (-0.0, "%-0%"),
        (0.30000000000000004, "%0.30000000000000004%"),
        (1e21, "%1000000000000000000000%"),
        (1e-7, "%0.0000001%"),
        (2026, "%2026%"),
        (True, "%true%"),
    ],
)
def test_constant_becomes_a_pattern_once(content: str | float, expected: str) -> None:
    """A text with an unescaped ``%`` is a pattern already; any other is searched literally."""
    assert like_pattern(content) == expected


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (5.0, "5.0"),
        (-0.0, "0.0"),
        (0.1, "0.1"),
        (0.30000000000000004, "0.30000000000000004"),
        (1 / 3, "0.33333333333333332"),
        (0.1 + 0.7, "0.79999999999999993"),
        (4.35, "4.35"),
        (100000000000000.1, "100000000000000.09"),
        (1e10, "10000000000.0"),
        (1e16, "10000000000000000.0"),
        (1e17, "1.0e+17"),
        (1.2345678901234568e17, "1.2345678901234568e+17"),
        (1e-4, "0.0001"),
        (1e-5, "1.0e-05"),
        (1.5e300, "1.5e+300"),
    ],
)
def test_number_is_shown_as_sqlite_shows_it(number: float, text: str) -> None:
    """15 or 17 digits and always a point: that is what ``title = 5`` compares with.

    The texts are what PocketBase 0.40.6 was seen to make of the numbers.
    """
    assert sqlite_float_text(number) == text


@pytest.mark.parametrize(
    ("content", "form", "expected"),
    [
        (5.0, SqlForm.TEXT, "5.0"),
        (5, SqlForm.TEXT, "5"),
        (True, SqlForm.TEXT, "1"),
        (" 5 ", SqlForm.NUMBER, "5"),
        (5.0, SqlForm.NUMBER, "5"),
        (0.1, SqlForm.NUMBER, "0.1"),
        ("9007199254740993", SqlForm.NUMBER, "9007199254740993"),
        ("1e999", SqlForm.NUMBER, "Infinity"),
        ("1e-999", SqlForm.NUMBER, "0"),
        (math.nan, SqlForm.NUMBER, None),
        (math.nan, SqlForm.TEXT, None),
        (
            "00000000-0000-0000-0000-00000000000a",
            SqlForm.UUID,
            "00000000-0000-0000-0000-00000000000a",
        ),
        ("00000000-0000-0000-0000-00000000000A", SqlForm.UUID, None),
        ("7", SqlForm.INTEGER, "7"),
        ("07", SqlForm.INTEGER, None),
        ("-0", SqlForm.INTEGER, None),
        ("9223372036854775807", SqlForm.INTEGER, "9223372036854775807"),
        ("9223372036854775808", SqlForm.INTEGER, None),
        (5.0, SqlForm.WHOLE, "5"),
        (" 5e0 ", SqlForm.WHOLE, "5"),
        (5.5, SqlForm.WHOLE, None),
        (5.5, SqlForm.FLOOR, "5"),
        (-5.5, SqlForm.FLOOR, "-6"),
        (5.5, SqlForm.CEILING, "6"),
        ("9223372036854775808", SqlForm.WHOLE, None),
        ("9223372036854775808", SqlForm.CEILING, "9223372036854775807"),
        ("-1e999", SqlForm.FLOOR, "-9223372036854775808"),
        (math.nan, SqlForm.FLOOR, None),
        (None, SqlForm.PATTERN, None),
    ],
)
def test_value_is_handed_over_in_the_form_asked_for(
    content: Scalar, form: SqlForm, expected: Scalar
) -> None:
    """A text that isn't of the key's type becomes NULL, which matches nothing, and no error."""
    assert to_sql_value(content, form) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"bb":1,"a":{"d":1.50,"c":"x"}}', '{"a":{"c":"x","d":1.50},"bb":1}'),
        ('[{"b":null,"a":true}]', '[{"a":true,"b":null}]'),
        ('{"b": 1, "a": 2}', '{"b": 1, "a": 2}'),
        ("[1,", "[1,"),
        ("[" * 100_000, "[" * 100_000),
        ('"x"', '"x"'),
    ],
)
def test_json_text_has_its_keys_in_the_order_of_jsonb(text: str, expected: str) -> None:
    """Jsonb has an order of keys of its own; only a compact text can equal a container."""
    assert json_in_jsonb_order(text) == expected


ANN = AuthRecord(
    collection_id="c1", collection_name="users", id="a", email="A@x", email_visibility=True
)


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (LiteralParameter("x\0"), "x\ufffd"),
        (LiteralParameter("\ud800"), "\ufffd"),
        (LiftedLiteral(1), "two"),
        (RequestValue(("context",)), "realtime"),
        (RequestValue(("method",)), "GET"),
        (RequestValue(("query", "n")), "5.50"),
        (RequestValue(("query", "n"), is_read_as_number=True), 5.5),
        (RequestValue(("query", "n"), is_read_as_number=True, is_lower=True), "5.5"),
        (RequestValue(("query", "k"), is_read_as_number=True), "ÄbC"),
        (RequestValue(("query", "k"), is_lower=True), "Äbc"),
        (RequestValue(("query", "big"), is_read_as_number=True), "1e999"),
        (RequestValue(("query", "nope")), None),
        (RequestValue(("query", "nope"), is_lower=True), None),
        (RequestValue(("query", "nope"), is_isset=True), 0),
        (RequestValue(("query", "k"), is_isset=True), 1),
        (RequestValue(("query", "k", "deeper")), None),
        (RequestValue(("body", "k")), None),
        (RequestValue(("headers", "x_token")), "t"),
        (RequestValue(("auth", "email")), "A@x"),
        (RequestValue(("auth", "emailVisibility")), True),
        (RequestValue(("auth", "collectionName")), "users"),
    ],
)
def test_value_comes_from_the_subscription(parameter: Parameter, expected: Scalar) -> None:
    request = RuleRequest(
        principal=ANN, query={"n": "5.50", "k": "ÄbC", "big": "1e999"}, headers={"x_token": "t"}
    )
    found = parameter_value(parameter, request, NOW, ("one", "two"))
    assert found == expected
    assert isinstance(found, type(expected))


def test_lowered_number_is_a_text_and_as_a_pattern_the_number() -> None:
    """``title ~ @request.query.views:lower`` searches 5, and ``title =`` compares with 5.0."""
    parameter = RequestValue(("query", "views"), is_read_as_number=True, is_lower=True)
    found = parameter_value(parameter, RuleRequest(query={"views": "5"}), NOW)
    assert (to_sql_value(found, SqlForm.TEXT), to_sql_value(found, SqlForm.PATTERN)) == (
        "5.0",
        "%5%",
    )


@pytest.mark.parametrize("field", ["id", "email", "verified", "collectionId"])
def test_guest_has_no_plain_fields_and_a_superuser_has(field: str) -> None:
    parameter = RequestValue(("auth", field))
    assert parameter_value(parameter, RuleRequest(), NOW) is None
    assert parameter_value(parameter, RuleRequest(principal=Superuser("s")), NOW) is not None


def test_what_looks_numeric_is_what_sqlite_takes_for_a_number() -> None:
    """SQLite is the oracle: a text that it takes for a number equals that number."""
    texts = ["5", " 5", "5 ", "\t5\n", "+5", "-5", "5.", ".5", ".", "5e1", "5e", "e1", "5a", "",
             " ", "0x5", "1e+5", "--5", "5 5", "\u00a05", "\v5\f", "1_0", "inf", "nan"]  # fmt: skip
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (n NUMERIC)")
    for text in texts:
        connection.execute("DELETE FROM t")
        connection.execute("INSERT INTO t VALUES (?)", [text])
        (kind,) = connection.execute("SELECT typeof(n) FROM t").fetchone()
        assert looks_numeric(text) is (kind != "text"), text
    connection.close()
