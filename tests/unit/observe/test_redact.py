"""What must not be readable in a log, in every place where it could occur."""

from __future__ import annotations

import jwt
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.errors import AuthError
from pgrealtime.observe.redact import (
    REDACTED,
    describe_exception,
    describe_traceback,
    redact,
    redact_text,
)

TOKEN = jwt.encode({"id": "u1"}, "k" * 32, algorithm="HS256")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"refused {TOKEN}", "refused [hidden]"),
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer [hidden]"),
        ("Basic dXNlcjpwYXNz", "Basic [hidden]"),
        ("postgresql://ann:s3cret@db:5432/app", "postgresql://ann:[hidden]@db:5432/app"),
        ("postgresql://ann:p@ss/w@db/app", "postgresql://ann:[hidden]@db/app"),
        ("postgresql://db/app", "postgresql://db/app"),
        ("http://127.0.0.1:8090/api/realtime", "http://127.0.0.1:8090/api/realtime"),
        ("host=db password=s3cret user=ann", "host=db password=[hidden] user=ann"),
        (r"password = 'a \' b' user=ann", "password = [hidden] user=ann"),
        ("GET /file?token=abc.def&thumb=1", "GET /file?token=[hidden]&thumb=1"),
        ("APP_JWT_SECRET=xyz", "APP_JWT_SECRET=[hidden]"),
        ("the token expired", "the token expired"),
        ("16/B374D848", "16/B374D848"),
    ],
)
def test_secrets_in_a_text_are_hidden_and_the_rest_is_not(text: str, shown: str) -> None:
    assert redact_text(text) == shown


@given(st.text(), st.text())
def test_a_token_is_hidden_whatever_surrounds_it(before: str, after: str) -> None:
    assert TOKEN not in redact_text(f"{before} {TOKEN} {after}")


@given(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=8).filter(str.isalnum))
def test_the_password_of_a_url_is_never_shown(password: str) -> None:
    assert redact_text(f"postgresql://u:{password}@h/d") == f"postgresql://u:{REDACTED}@h/d"


@pytest.mark.parametrize(
    "key", ["token", "Authorization", "previous_secret", "token_key", "password_hash", "set-cookie"]
)
def test_a_key_that_names_a_secret_hides_its_value(key: str) -> None:
    assert redact("anything", key=key) == REDACTED
    assert redact(["any", "thing"], key=key) == REDACTED


@pytest.mark.parametrize("value", [5, 0.5, True, None])
def test_a_number_under_such_a_key_is_no_secret(value: object) -> None:
    """``token_lifetime=432000`` is useful in a log."""
    assert redact(value, key="token_lifetime") is value


@pytest.mark.parametrize("key", ["topic", "slot", "tokenizer", "monkey", "passwords_checked"])
def test_other_keys_hide_nothing(key: str) -> None:
    assert redact("value", key=key) == "value"


def test_secrets_are_found_at_any_depth() -> None:
    value = {"issuers": [{"name": "app", "secret": "abc"}], "urls": ("http://u:p@h/",)}
    assert redact(value) == {
        "issuers": [{"name": "app", "secret": REDACTED}],
        "urls": [f"http://u:{REDACTED}@h/"],
    }


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("odd"), "ValueError: odd"),
        (TimeoutError(), "TimeoutError"),
        (ValueError(f"bad {TOKEN}"), "ValueError: bad [hidden]"),
        (ValueError("\x1b[31mred\r\n"), "ValueError: \\x1b[31mred\\x0d\n"),
        (AuthError("no"), "pgrealtime.errors.AuthError: auth_failed: no"),
        (
            psycopg.errors.UniqueViolation("Key (email)=(ann@example.com) already exists."),
            "psycopg.errors.UniqueViolation: SQLSTATE 23505",
        ),
        (
            psycopg.OperationalError("connection to server at 127.0.0.1 failed"),
            "psycopg.OperationalError: connection to server at 127.0.0.1 failed",
        ),
    ],
)
def test_an_exception_is_logged_without_what_it_quotes(error: Exception, text: str) -> None:
    assert describe_exception(error) == text


_ROW = {"email": "ann@example.com"}


def _fail(row: dict[str, str]) -> None:
    secret_local = row["email"] + "!"
    try:
        raise psycopg.errors.CheckViolation(f"Failing row contains ({secret_local}).")
    except psycopg.Error as error:
        raise ExceptionGroup("two", [KeyError("a"), ValueError("b")]) from error


def test_a_traceback_has_causes_and_groups_but_no_local_variables() -> None:
    """Local variables hold rows and tokens."""
    with pytest.raises(ExceptionGroup) as raised:
        _fail(_ROW)
    text = describe_traceback(raised.value)
    assert "ann@example.com" not in text
    assert "psycopg.errors.CheckViolation: SQLSTATE 23514\n" in text
    assert "The above exception was the direct cause of the following exception" in text
    assert "ExceptionGroup: two (2 sub-exceptions)\n  [1]\n  KeyError: 'a'\n" in text
    assert text.endswith("  [2]\n  ValueError: b")
    assert text.count("in _fail") == 2


def test_a_context_is_logged_unless_it_was_suppressed() -> None:
    def fail(*, suppress: bool) -> None:
        try:
            raise KeyError("first")
        except KeyError:
            if suppress:
                raise ValueError("second") from None
            raise ValueError("second")  # noqa: B904 (the context is what is tested)

    with pytest.raises(ValueError, match="second") as raised:
        fail(suppress=False)
    assert "KeyError: 'first'" in describe_traceback(raised.value)
    with pytest.raises(ValueError, match="second") as raised:
        fail(suppress=True)
    assert "first" not in describe_traceback(raised.value).replace('raise KeyError("first")', "")


def test_exceptions_that_cause_each_other_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert describe_traceback(one).count("ValueError: one") == 1
