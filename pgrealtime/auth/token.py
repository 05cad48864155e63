"""Parses tokens and checks signature, times and claims. Pure; used by ``auth.authenticator``.

No claim is trusted before ``check_signature``. PyJWT verifies signatures; the claims are checked
here, because PyJWT reads the system's clock and accepts ``"17"`` as a time.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_args

import jwt
import msgspec
from jwt.algorithms import AllowedPublicKeys, HMACAlgorithm

from pgrealtime.auth.principal import ClaimValue
from pgrealtime.config.model import Algorithm, IssuerConfig
from pgrealtime.errors import AuthError

Claims: TypeAlias = Mapping[str, Any]

_ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
_BEARER_PREFIX = "bearer "
_MAX_UNIX_SECONDS = 253_402_300_799.0
"""The last second of the year 9999. Later times are cut to it: a JSON integer may be too large for
a float."""


class _AnyLengthHmac(HMACAlgorithm):
    """HS256 without PyJWT's warning for each token; ``config`` checks the secret's length."""

    # 256 bits are required (RFC 7518, section 3.2).
    def check_key_length(self, key: bytes) -> None:  # noqa: ARG002 (PyJWT's signature)
        return None


_JWS = jwt.PyJWS(algorithms=[name for name in _ALGORITHMS if name != "HS256"])
"""Has these four algorithms only, so ``alg: none`` does not exist here."""
_JWS.register_algorithm("HS256", _AnyLengthHmac(HMACAlgorithm.SHA256))


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A key and its only algorithm."""

    algorithm: Algorithm
    material: str | AllowedPublicKeys = field(repr=False)
    id: str | None = None
    """``kid``; None if the issuer doesn't name its keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A parsed token, not verified: it may be forged."""

    text: str = field(repr=False)
    algorithm: Algorithm
    key_id: str | None
    claims: Claims


def parse_token(authorization: str | None) -> Token:
    """Parse an ``Authorization`` header.

    Raises:
        AuthError: Code ``token_missing`` or ``token_malformed``.
    """
    if not authorization:
        raise AuthError("there is no token", code="token_missing")
    # "Bearer" is optional, in any case, with exactly one space after it (protocol, 3.5).
    has_scheme = authorization[: len(_BEARER_PREFIX)].lower() == _BEARER_PREFIX
    text = authorization[len(_BEARER_PREFIX) :] if has_scheme else authorization
    try:
        # Only to choose the key: nothing in here is trusted before ``check_signature``.
        parts = _JWS.decode_complete(text, options={"verify_signature": False})
        claims = msgspec.json.decode(parts["payload"])
    # RecursionError: any client may send claims nested thousands of levels deep.
    except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
        raise AuthError("the token is not a JSON Web Token", code="token_malformed") from error
    algorithm = parts["header"].get("alg")
    if algorithm not in _ALGORITHMS or not isinstance(claims, dict):
        raise AuthError(
            "the token is of a kind that is never accepted",
            detail=f"Accepted are {', '.join(_ALGORITHMS)} over a JSON object.",
            code="token_malformed",
        )
    return Token(text=text, algorithm=algorithm, key_id=parts["header"].get("kid"), claims=claims)


def check_signature(token: Token, key: VerificationKey) -> None:
    """Check that the token was signed with the key by the key's algorithm.

    Raises:
        AuthError: Code ``token_signature``.
    """
    try:
        # By the key's algorithm, never the token's ``alg``: otherwise an attacker could sign with
        # HS256 and the public key as secret (RFC 8725, section 3.1).
        _JWS.decode_complete(token.text, key.material, algorithms=[key.algorithm])
    except (jwt.PyJWTError, ValueError) as error:
        raise AuthError(
            "the signature of the token is not valid", code="token_signature"
        ) from error


def check_times(claims: Claims, *, now: float, leeway: float = 0.0) -> float | None:
    """Check that the token is valid now; return the Unix second at which it expires, or None.

    Times are Unix seconds. The returned one includes ``leeway``, by which clocks may differ.

    Raises:
        AuthError: Code ``token_expired``, ``token_early`` or ``token_malformed``.
    """
    expires, starts, issued = [_time_claim(claims, name) for name in ("exp", "nbf", "iat")]
    # An ``exp`` of this very second is past (protocol, 9.3).
    if expires is not None and not now < expires + leeway:
        raise AuthError("the token has expired", code="token_expired")
    if any(time is not None and time > now + leeway for time in (starts, issued)):
        raise AuthError("the token is not valid yet", code="token_early")
    return None if expires is None else expires + leeway


def _time_claim(claims: Claims, name: str) -> float | None:
    if name not in claims:
        return None
    value = claims[name]
    # In Python True is the integer 1.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AuthError(f'"{name}" of the token is not a number', code="token_malformed")
    return float(max(-_MAX_UNIX_SECONDS, min(value, _MAX_UNIX_SECONDS)))


def check_issuer_and_audience(claims: Claims, issuer: IssuerConfig) -> None:
    """Check ``iss`` and ``aud`` against the configuration.

    Raises:
        AuthError: Code ``token_issuer`` or ``token_audience``.
    """
    if issuer.issuer and claims.get("iss") != issuer.issuer:
        raise AuthError("the token is of another issuer", code="token_issuer")
    # One audience or a list (RFC 7519, section 4.1.3). Without a configured one it is ignored:
    # hosted issuers put one into every token.
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    if issuer.audience and issuer.audience not in audiences:
        raise AuthError("the token is for another audience", code="token_audience")


def is_superuser(claims: Claims, issuer: IssuerConfig) -> bool:
    """Whether all claims that make a superuser are present and equal, type included."""
    wanted = issuer.superuser_when
    # ``all`` of no claims is true: everybody would be a superuser. Types count since 1 == True.
    if not wanted:
        return False
    for name, value in wanted.items():
        if type(claims.get(name)) is not type(value) or claims[name] != value:
            return False
    return True


def id_from_claim(claims: Claims, claim: str) -> str | None:
    """Return the id in the claim as text, also of an integer; None if there is none."""
    match claims.get(claim):
        # Also an int in Python.
        case bool():
            return None
        case int(number):
            return str(number)
        case str(text) if text:
            return text
        case _:
            return None


def claim_values(claims: Claims, issuer: IssuerConfig) -> tuple[tuple[str, ClaimValue], ...]:
    """Return the configured claims by their names in rules; one that is missing is None."""
    return tuple((name, _claim_value(claims, claim)) for name, claim in issuer.claims.items())


def _claim_value(claims: Claims, claim: str) -> ClaimValue:
    # A claim's own name may have dots: OpenID Connect suggests URLs.
    value: object = claims.get(claim)
    if value is None and "." in claim:
        value = claims
        for name in claim.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
    match value:
        case None | str() | float():
            return value
        case int():
            return int(value)
        case _:
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def login_claims(token: Token) -> tuple[str, str]:
    """Return id or name of the auth collection, and the user's id, of a login token.

    It is one that PocketBase would accept as auth token (protocol, 9.3).

    Raises:
        AuthError: Code ``token_signature``: it has another type or algorithm.
    """
    claims = token.claims
    match claims.get("type"), claims.get("collectionId"), claims.get("id"):
        # PocketBase has other types, such as "verification" and "file", which are no logins.
        # Padding, which PyJWT accepts, isn't allowed (RFC 7515, section 2).
        case "auth", str(collection), str(record_id) if (
            token.algorithm == "HS256" and "=" not in token.text
        ):
            return collection, record_id
        case _:
            raise AuthError("no issuer made this token", code="token_signature")


def make_login_token(
    *, collection_id: str, record_id: str, signing_key: str, expires_at: int
) -> str:
    """Return a signed login token, byte for byte as PocketBase makes it.

    ``signing_key`` is the user's token key and the login secret, concatenated.
    """
    claims = {
        "collectionId": collection_id,
        "exp": expires_at,
        "id": record_id,
        "refreshable": True,
        "type": "auth",
    }
    return _JWS.encode(msgspec.json.encode(claims), signing_key, algorithm="HS256")
