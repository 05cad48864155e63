"""Bodies of logins; that they are read as PocketBase reads them is proved against it elsewhere."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.api.error_responses import RequestRefusedError
from pgrealtime.api.login_body import LoginBody, check_login_body, parse_login_body

TYPES = [
    "application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=b",
    "text/plain",
    "",
]


@given(st.sampled_from(TYPES), st.binary(), st.binary())
def test_any_body_is_a_call_or_refused(content_type: str, body: bytes, query: bytes) -> None:
    with contextlib.suppress(RequestRefusedError):
        assert isinstance(parse_login_body(content_type, body, query), LoginBody)


@given(st.text(), st.text(), st.text())
def test_what_passes_has_a_length_that_can_be_tried(
    identity: str, password: str, name: str
) -> None:
    call = LoginBody(identity, password, name)
    with contextlib.suppress(RequestRefusedError):
        check_login_body(call, ["email"])
        assert 1 <= len(identity.encode()) <= 255
        assert 1 <= len(password.encode()) <= 255
        assert name in {"", "email"}


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(RequestRefusedError) as error:
        check_login_body(LoginBody("", "x" * 256, "name"), ["email"])

    assert set(error.value.error_response.member_faults) == {
        "identity",
        "password",
        "identityField",
    }


def test_a_password_is_not_printed() -> None:
    assert "hush" not in repr(LoginBody("ann", "hush"))
