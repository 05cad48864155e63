"""Tokens checked with their keys and the clock; made by PyJWT, by node's crypto, and by hand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import shutil
import subprocess
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.auth.token import (
    Token,
    VerificationKey,
    check_issuer_and_audience,
    check_signature,
    check_times,
    claim_values,
    id_from_claim,
    is_superuser,
    parse_token,
)
from pgrealtime.config.model import IssuerConfig
from pgrealtime.errors import AuthError

SECRET = "a-secret-of-thirty-two-characters"
KEY = VerificationKey("HS256", SECRET)


def code_of(error: pytest.ExceptionInfo[AuthError]) -> str:
    return error.value.error_code


def raw(header: bytes, payload: bytes, secret: str = SECRET) -> str:
    """Return a token of exactly these bytes, correctly signed."""
    parts = [base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, payload)]
    signature = hmac.digest(secret.encode(), b".".join(parts), hashlib.sha256)
    parts.append(base64.urlsafe_b64encode(signature).rstrip(b"="))
    return b".".join(parts).decode()


HEADER = b'{"alg":"HS256","typ":"JWT"}'


@pytest.mark.parametrize("prefix", ["", "Bearer ", "bearer ", "BEARER ", "bEaReR "])
def test_a_token_is_read_with_and_without_its_scheme(prefix: str) -> None:
    """The SDKs send the bare token, other clients the scheme (protocol, 3.5)."""
    token = parse_token(prefix + jwt.encode({"sub": "u1"}, SECRET))

    check_signature(token, KEY)
    assert token.claims == {"sub": "u1"}


@pytest.mark.parametrize(
    "prefix", ["Bearer  ", "Basic ", "Token ", "Bearer\t", "Bearer", " ", "Bearer Bearer "]
)
def test_any_other_prefix_makes_the_token_invalid(prefix: str) -> None:
    with pytest.raises(AuthError) as error:
        parse_token(prefix + jwt.encode({"sub": "u1"}, SECRET))

    assert code_of(error) == "token_malformed"


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_header_is_no_token(nothing: str | None) -> None:
    with pytest.raises(AuthError) as error:
        parse_token(nothing)

    assert code_of(error) == "token_missing"


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (b'{"alg":"none","typ":"JWT"}', b'{"sub":"u1"}'),
        (b'{"alg":"None"}', b'{"sub":"u1"}'),
        (b'{"alg":"HS512"}', b'{"sub":"u1"}'),
        (b'{"alg":"hs256"}', b'{"sub":"u1"}'),
        (b'{"alg":["HS256"]}', b'{"sub":"u1"}'),
        (b'{"typ":"JWT"}', b'{"sub":"u1"}'),
        (b'{"alg":"HS256","b64":false,"crit":["b64"]}', b'{"sub":"u1"}'),
        (b'{"alg":"HS256","crit":["exp"]}', b'{"sub":"u1"}'),
        (b'{"alg":"HS256","kid":7}', b'{"sub":"u1"}'),
        (b"[" * 4000, b"{}"),
        (HEADER, b"[" * 4000),
        (HEADER, b'["sub"]'),
        (HEADER, b'"u1"'),
        (HEADER, b'{"sub":"u1","exp":NaN}'),
        (HEADER, b'{"sub":"u1","exp":Infinity}'),
        (HEADER, b'{"sub":"\\ud800"}'),
        (HEADER, b'{"sub":"\xff"}'),
        (b"\xff", b"{}"),
        (b"", b""),
    ],
)
def test_a_rightly_signed_oddity_is_malformed(header: bytes, payload: bytes) -> None:
    """A signature doesn't excuse a malformed token.

    Each of these was once a vulnerability somewhere.
    """
    with pytest.raises(AuthError) as error:
        parse_token(raw(header, payload))

    assert code_of(error) == "token_malformed"


@given(st.text())
def test_any_text_is_a_token_or_an_auth_error(text: str) -> None:
    with contextlib.suppress(AuthError):
        assert isinstance(parse_token(text), Token)


@given(st.lists(st.binary(max_size=64), min_size=2, max_size=4), st.booleans())
def test_any_segments_are_a_token_or_an_auth_error(segments: list[bytes], has_header: bool) -> None:  # noqa: FBT001 (hypothesis passes by keyword)
    parts = [HEADER, *segments] if has_header else segments
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts).decode()
    try:
        token = parse_token(text)
    except AuthError:
        return
    with pytest.raises(AuthError):
        check_signature(token, KEY)


@given(st.data())
def test_no_bit_of_a_token_can_change(data: st.DataObject) -> None:
    text = jwt.encode({"sub": "u1", "exp": 2_000_000_000}, SECRET)
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("ABCxyz019-_.=~ é"))
    changed = text[:place] + other + text[place + 1 :]
    if changed == text:
        return
    with pytest.raises(AuthError):
        check_signature(parse_token(changed), KEY)


@pytest.mark.parametrize("secret", ["short", "0", "12345", "ä" * 20, '"quoted"', " "])
def test_any_secret_that_an_application_has_chosen_serves(secret: str) -> None:
    check_signature(
        parse_token(raw(HEADER, b'{"sub":"u1"}', secret)), VerificationKey("HS256", secret)
    )


def test_another_secret_makes_another_signature() -> None:
    with pytest.raises(AuthError) as error:
        check_signature(parse_token(jwt.encode({"sub": "u1"}, SECRET + "x")), KEY)

    assert code_of(error) == "token_signature"


@pytest.mark.skipif(shutil.which("node") is None, reason="node isn't installed")
def test_a_token_of_another_maker_is_read_alike() -> None:
    """Tokens of PyJWT alone would compare the library with itself."""
    script = """
        const { createHmac } = require("node:crypto");
        const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
        const claims = { sub: "ü-1", exp: 4102444800 };
        const head = part({ typ: "JWT", alg: "HS256" }) + "." + part(claims);
        const sign = createHmac("sha256", process.argv[1]).update(head).digest("base64url");
        process.stdout.write(head + "." + sign);
    """
    made = subprocess.run(
        ["node", "-e", script, SECRET], capture_output=True, text=True, check=True, timeout=30
    )

    token = parse_token(f"Bearer {made.stdout}")

    check_signature(token, KEY)
    assert token.claims == {"sub": "ü-1", "exp": 4102444800}


@pytest.mark.parametrize(
    ("claims", "leeway", "expected"),
    [
        ({}, 0, None),
        ({"exp": 1001}, 0, 1001),
        ({"exp": 1000.5}, 0, 1000.5),
        ({"exp": 995}, 10, 1005),
        ({"nbf": 1000, "iat": 1000}, 0, None),
        ({"nbf": 1010, "iat": 1010}, 10, None),
        ({"exp": 10**400}, 0, 253_402_300_799),
    ],
)
def test_a_token_holds_until_its_end(
    claims: dict[str, Any], leeway: float, expected: float | None
) -> None:
    assert check_times(claims, now=1000, leeway=leeway) == expected


@pytest.mark.parametrize(
    ("claims", "leeway", "code"),
    [
        ({"exp": 1000}, 0, "token_expired"),
        ({"exp": 0}, 0, "token_expired"),
        ({"exp": -(10**400)}, 0, "token_expired"),
        ({"exp": 990}, 10, "token_expired"),
        ({"nbf": 1000.5}, 0, "token_early"),
        ({"iat": 1011}, 10, "token_early"),
        ({"exp": "1001"}, 0, "token_malformed"),
        ({"exp": None}, 0, "token_malformed"),
        ({"exp": True}, 0, "token_malformed"),
        ({"nbf": []}, 0, "token_malformed"),
    ],
)
def test_a_token_outside_its_time_is_refused(
    claims: dict[str, Any], leeway: float, code: str
) -> None:
    """``exp`` equal to now is past (protocol, 9.3), and what is no number is no time."""
    with pytest.raises(AuthError) as error:
        check_times(claims, now=1000, leeway=leeway)

    assert code_of(error) == code


ISSUER = IssuerConfig(name="app", secret=SECRET, issuer="https://app", audience="rt")


@pytest.mark.parametrize("audience", ["rt", ["other", "rt"]])
def test_a_token_for_us_may_be_for_others_too(audience: str | list[str]) -> None:
    check_issuer_and_audience({"iss": "https://app", "aud": audience}, ISSUER)


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"aud": "rt"}, "token_issuer"),
        ({"iss": "https://app/", "aud": "rt"}, "token_issuer"),
        ({"iss": ["https://app"], "aud": "rt"}, "token_issuer"),
        ({"iss": "https://app"}, "token_audience"),
        ({"iss": "https://app", "aud": "rt2"}, "token_audience"),
        ({"iss": "https://app", "aud": ["r", "t"]}, "token_audience"),
        ({"iss": "https://app", "aud": {"rt": 1}}, "token_audience"),
    ],
)
def test_a_token_of_others_or_for_others_is_refused(claims: dict[str, Any], code: str) -> None:
    with pytest.raises(AuthError) as error:
        check_issuer_and_audience(claims, ISSUER)

    assert code_of(error) == code


def test_what_is_not_configured_is_not_asked_for() -> None:
    """Hosted issuers put an audience into every token."""
    check_issuer_and_audience({"aud": "authenticated"}, IssuerConfig(name="app", secret=SECRET))


@pytest.mark.parametrize(
    ("wanted", "claims", "expected"),
    [
        ({"role": "service_role"}, {"role": "service_role"}, True),
        ({"role": "service_role"}, {"role": "user"}, False),
        ({"role": "service_role"}, {}, False),
        ({"role": "x", "admin": True}, {"role": "x", "admin": True}, True),
        ({"role": "x", "admin": True}, {"role": "x"}, False),
        ({"admin": True}, {"admin": 1}, False),
        ({"admin": True}, {"admin": "true"}, False),
        ({"level": 1}, {"level": True}, False),
        ({"level": 1}, {"level": 1}, True),
        ({"role": "x"}, {"role": ["x"]}, False),
        ({}, {"role": "service_role"}, False),
        ({}, {}, False),
    ],
)
def test_a_superuser_has_every_claim_exactly(
    wanted: dict[str, str | int | bool],
    claims: dict[str, Any],
    expected: bool,  # noqa: FBT001 (a column of the table)
) -> None:
    """An empty configuration makes no token a superuser's, rather than every one."""
    issuer = IssuerConfig(name="app", secret=SECRET, superuser_when=wanted)

    assert is_superuser(claims, issuer) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("u1", "u1"),
        (7, "7"),
        (0, "0"),
        ("", None),
        (True, None),
        (1.0, None),
        (None, None),
        (["u1"], None),
    ],
)
def test_an_id_is_a_text_or_an_integer(value: object, expected: str | None) -> None:
    assert id_from_claim({"sub": value}, "sub") == expected


@pytest.mark.parametrize(
    ("claims", "value"),
    [
        ({"tenant": "acme"}, "acme"),
        ({"tenant": 7}, 7),
        ({"tenant": 7.5}, 7.5),
        ({"tenant": True}, 1),
        ({"tenant": ["a", "é"]}, '["a","é"]'),
        ({"tenant": {"b": 1}}, '{"b":1}'),
        ({"tenant": None}, None),
        ({}, None),
    ],
)
def test_a_configured_claim_is_given_to_rules_by_its_type(
    claims: dict[str, Any], value: object
) -> None:
    issuer = IssuerConfig(name="app", secret="s" * 32, claims={"org": "tenant"})

    assert claim_values(claims, issuer) == (("org", value),)


@pytest.mark.parametrize(
    ("claims", "value"),
    [
        ({"app": {"org": "acme"}}, "acme"),
        ({"app.org": "whole", "app": {"org": "nested"}}, "whole"),
        ({"app": "text"}, None),
        ({"app": {"org": {"id": 1}}}, '{"id":1}'),
    ],
)
def test_a_claim_within_an_object_is_named_with_dots(claims: dict[str, Any], value: object) -> None:
    issuer = IssuerConfig(name="app", secret="s" * 32, claims={"org": "app.org"})

    assert claim_values(claims, issuer) == (("org", value),)
