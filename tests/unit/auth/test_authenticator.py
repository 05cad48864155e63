"""Callers of requests whose users have no rows: the claims alone identify them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.auth.account import AccountLoader
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.principal import AuthRecord, Caller, Superuser
from pgrealtime.collections.model import Collections, derive_collection_id
from pgrealtime.config.model import AuthConfig, IssuerConfig, LoginConfig
from pgrealtime.errors import AuthError, ConfigError
from pgrealtime.postgres.pool import QueryPool

SECRET = "a-secret-of-thirty-two-characters"
OTHER = "another-secret-of-enough-characters"
NOW = 1_000_000.0


def authenticator(*issuers: IssuerConfig, login: LoginConfig | None = None) -> Authenticator:
    """Return an authenticator without users tables.

    A query would fail, since the pool isn't open.
    """
    return Authenticator(
        AuthConfig(issuers=issuers, login=login or LoginConfig()),
        Collections(()),
        AccountLoader(QueryPool()),
        unix_clock=lambda: NOW,
    )


APP = IssuerConfig(
    name="app",
    secret=SECRET,
    issuer="https://app",
    audience="rt",
    leeway=5.0,
    superuser_when={"role": "service_role"},
)
CLAIMS: dict[str, Any] = {"iss": "https://app", "aud": "rt", "sub": "u1", "exp": NOW + 60}


def record(record_id: str, **fields: Any) -> AuthRecord:
    return AuthRecord(
        collection_id=derive_collection_id("auth", "users"),
        collection_name="users",
        id=record_id,
        **fields,
    )


async def test_users_without_rows_are_identified_by_their_tokens() -> None:
    """Rules, section 17: the plain fields come from the token."""
    claims = CLAIMS | {"email": "a@b.c", "email_verified": True, "emailVisibility": True}

    caller = await authenticator(APP).authenticate(jwt.encode(claims, SECRET))

    assert caller == Caller(
        record("u1", email="a@b.c", verified=True, email_visibility=True), NOW + 65
    )


@pytest.mark.parametrize("odd", [7, None, ["a@b.c"], {"a": 1}])
async def test_claims_of_another_type_say_nothing(odd: object) -> None:
    claims = CLAIMS | {"email": odd, "verified": odd, "emailVisibility": odd}

    caller = await authenticator(APP).authenticate(jwt.encode(claims, SECRET))

    assert caller.principal == record("u1")


async def test_the_first_issuer_that_made_the_token_decides() -> None:
    other = IssuerConfig(name="other", secret=OTHER, id_claim="user", collection="staff")
    both = authenticator(APP, other)

    app = await both.authenticate(jwt.encode(CLAIMS, SECRET))
    staff = await both.authenticate(jwt.encode({"user": 7}, OTHER))

    assert app.principal == record("u1")
    assert isinstance(staff.principal, AuthRecord)
    assert (staff.principal.collection_name, staff.principal.id) == ("staff", "7")
    assert staff.expires_at is None


async def test_a_superuser_is_made_by_claims() -> None:
    token = jwt.encode(CLAIMS | {"role": "service_role"}, SECRET)

    assert await authenticator(APP).authenticate(token) == Caller(Superuser("u1"), NOW + 65)


@pytest.mark.parametrize(
    ("claims", "secret", "code"),
    [
        ({}, OTHER, "token_signature"),
        ({"iss": "https://evil"}, SECRET, "token_issuer"),
        ({"aud": "web"}, SECRET, "token_audience"),
        ({"exp": NOW - 5}, SECRET, "token_expired"),
        ({"nbf": NOW + 6}, SECRET, "token_early"),
        ({"iat": NOW + 6}, SECRET, "token_early"),
        ({"sub": None}, SECRET, "token_id"),
        ({"sub": ""}, SECRET, "token_id"),
        ({"sub": True}, SECRET, "token_id"),
        ({"exp": "tomorrow"}, SECRET, "token_malformed"),
        ({"role": "service_role", "aud": "web"}, SECRET, "token_audience"),
    ],
)
async def test_whatever_is_wrong_the_caller_is_a_guest(
    claims: dict[str, Any], secret: str, code: str
) -> None:
    """There is no 401 (protocol, 3.5); only ``authenticate_token`` raises the reason."""
    token = jwt.encode(CLAIMS | claims, secret)

    assert await authenticator(APP).authenticate(token) == Caller()
    with pytest.raises(AuthError) as error:
        await authenticator(APP).authenticate_token(token)
    assert error.value.error_code == code
    assert token not in str(error.value)


async def test_the_log_has_the_reason_and_never_the_token() -> None:
    token = jwt.encode(CLAIMS | {"aud": "web"}, SECRET)

    with structlog.testing.capture_logs() as logs:
        await authenticator(APP).authenticate(token)
        await authenticator(APP).authenticate(None)

    assert logs == [{"event": "auth.rejected", "reason": "token_audience", "log_level": "debug"}]


async def test_without_issuers_every_caller_is_a_guest() -> None:
    assert await authenticator().authenticate(jwt.encode(CLAIMS, SECRET)) == Caller()


@pytest.mark.parametrize("login", [LoginConfig(), LoginConfig(enabled=True, secret="s")])
async def test_no_token_is_checked_with_an_empty_secret(login: LoginConfig) -> None:
    """A login that isn't configured must not count as one whose secret is the empty text."""
    claims = b'{"type":"auth","collectionId":"users","id":"u1"}'
    parts = [base64.urlsafe_b64encode(p).rstrip(b"=") for p in (b'{"alg":"HS256"}', claims)]
    signature = hmac.digest(b"", b".".join(parts), hashlib.sha256)
    parts.append(base64.urlsafe_b64encode(signature).rstrip(b"="))

    assert await authenticator(login=login).authenticate(b".".join(parts).decode()) == Caller()


def test_a_public_key_that_cannot_be_used_is_named() -> None:
    with pytest.raises(ConfigError, match=r"auth\.issuers\.1\.public_key"):
        authenticator(APP, IssuerConfig(name="idp", public_key="nonsense"))


@given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
async def test_no_header_raises(text: str) -> None:
    """Any header makes at least a guest; the limits of HTTP aren't relied on."""
    assert await authenticator(APP).authenticate(text) == Caller()


@given(st.binary(), st.binary(), st.binary())
async def test_no_segments_raise(header: bytes, payload: bytes, signature: bytes) -> None:
    parts = [
        base64.urlsafe_b64encode(part).rstrip(b"=").decode()
        for part in (header, payload, signature)
    ]

    assert await authenticator(APP).authenticate(".".join(parts)) == Caller()


_CLAIM = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.lists(st.text())
)


@given(st.dictionaries(st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "role"]), _CLAIM))
async def test_no_claims_raise(claims: dict[str, Any]) -> None:
    """An issuer's claims may have any type; none makes a caller a superuser by accident."""
    payload = json.dumps(CLAIMS | claims).encode()
    caller = await authenticator(APP).authenticate(jwt.PyJWS().encode(payload, SECRET, "HS256"))

    assert isinstance(caller, Caller)
    assert not isinstance(caller.principal, Superuser)


async def test_a_verified_token_expires_all_the_same() -> None:
    """Of a token that was seen before, only the signature is taken as checked."""
    now = NOW
    made = Authenticator(
        AuthConfig(issuers=(APP,)),
        Collections(()),
        AccountLoader(QueryPool()),
        unix_clock=lambda: now,
    )
    token = jwt.encode(CLAIMS, SECRET)

    before = await made.authenticate(token)
    now = NOW + 100
    after = await made.authenticate(token)

    assert (before.principal, after) == (record("u1"), Caller())


async def test_a_verified_token_is_refused_once_the_secret_is_another() -> None:
    """A reload with another secret ends all sessions of the old one."""
    made = authenticator(APP)
    token = jwt.encode(CLAIMS, SECRET)
    before = await made.authenticate(token)

    changed = APP.model_copy(update={"secret": OTHER})
    made.replace_settings(AuthConfig(issuers=(changed,)), Collections(()))

    assert before.principal == record("u1")
    assert await made.authenticate(token) == Caller()
