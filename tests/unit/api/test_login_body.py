"""Bodies of login calls. The conformance tests compare their parsing with PocketBase's."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.api.error_responses import RequestRefusedError
from pgrealtime.api.login_body import check_login_body, parse_login_body
from pgrealtime.auth.login import LoginAttempt

TYPES = [
    "application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=b",
    "text/plain",
    "",
]


@given(st.sampled_from(TYPES), st.binary(), st.binary())
def test_any_body_is_a_call_or_refused(content_type: str, body: bytes, query: bytes) -> None:
    """No body is an internal error."""
    with contextlib.suppress(RequestRefusedError):
        assert isinstance(parse_login_body(content_type, body, query), LoginAttempt)


@given(st.text(), st.text(), st.text())
def test_what_passes_has_a_length_that_can_be_tried(
    identity: str, password: str, name: str
) -> None:
    """Only identities and passwords within the limits reach the database."""
    attempt = LoginAttempt(identity=identity, password=password, identity_field=name)
    with contextlib.suppress(RequestRefusedError):
        check_login_body(attempt, ["email"])
        assert 1 <= len(identity.encode()) <= 255
        assert 1 <= len(password.encode()) <= 255
        assert name in {"", "email"}


def test_all_faults_of_a_login_are_reported_at_once() -> None:
    """Each faulty member of the body has its own fault."""
    with pytest.raises(RequestRefusedError) as error:
        check_login_body(LoginAttempt(password="x" * 256, identity_field="name"), ["email"])

    assert set(error.value.error_response.member_faults) == {
        "identity",
        "password",
        "identityField",
    }


def test_a_password_is_not_printed() -> None:
    """Neither in logs nor in tracebacks."""
    assert "hush" not in repr(LoginAttempt(identity="ann", password="hush"))
