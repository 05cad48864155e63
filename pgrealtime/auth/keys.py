"""The keys that verify an issuer's tokens: configured ones, or a JWKS fetched from the issuer.

Used by ``auth.authenticator``; ``service`` runs the fetching as a task.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import aiohttp
import jwt
import msgspec
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pgrealtime.auth.token import Token, VerificationKey
from pgrealtime.config.model import Algorithm, IssuerConfig
from pgrealtime.errors import AuthError

log = structlog.get_logger(__name__)

_REFRESH_SECONDS = 600.0
"""How long a key that the issuer has withdrawn is accepted at most."""
_RETRY_SECONDS = 15.0
_UNKNOWN_KID_SECONDS = 60.0
"""Minimum time between two fetches for an unknown ``kid``, which any client can invent."""
_FETCH_TIMEOUT_SECONDS = 5.0
_MAX_JWKS_BYTES = 1 << 20
_MIN_RSA_BITS = 2048
"""RFC 7518, section 3.3."""


class ConfiguredKeySource:
    """Constant keys of the configuration, whatever the token's ``kid``."""

    def __init__(self, keys: Iterable[VerificationKey]) -> None:
        self._keys = tuple(keys)

    async def keys_for(self, token: Token) -> Sequence[VerificationKey]:
        """Return the keys with the token's algorithm."""
        return [key for key in self._keys if key.algorithm == token.algorithm]

    async def run(self) -> None:
        """Return at once."""


class JwksKeySource:
    """A JSON Web Key Set, fetched periodically. After a failed fetch the old keys stay valid."""

    def __init__(
        self,
        issuer: IssuerConfig,
        *,
        refresh_seconds: float = _REFRESH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._refresh_seconds = refresh_seconds
        self._clock = clock
        self._keys: tuple[VerificationKey, ...] = ()
        self._next_unknown_kid_fetch_at = clock()
        self._fetch_task: asyncio.Task[bool] | None = None

    async def keys_for(self, token: Token) -> Sequence[VerificationKey]:
        """Return the matching keys, after a fetch if none matches (one a minute at most)."""
        keys = self._matching_keys(token)
        # A key that was rotated in is fetched when the first token names it. A token made up by an
        # attacker causes a fetch a minute at most, and none with an algorithm the issuer never
        # uses.
        if keys or token.algorithm not in self._issuer.accepted_algorithms:
            return keys
        if self._clock() >= self._next_unknown_kid_fetch_at:
            self._next_unknown_kid_fetch_at = self._clock() + _UNKNOWN_KID_SECONDS
            self._start_or_join_fetch()
        if self._fetch_task is not None:
            # Shielded: a cancelled caller must not cancel the fetch that others await.
            await asyncio.shield(self._fetch_task)
        return self._matching_keys(token)

    async def run(self) -> None:
        """Fetch periodically until cancelled; after a failure, sooner."""
        while True:
            is_fresh = await asyncio.shield(self._start_or_join_fetch())
            await asyncio.sleep(self._refresh_seconds if is_fresh else _RETRY_SECONDS)

    def _matching_keys(self, token: Token) -> Sequence[VerificationKey]:
        return [
            key
            for key in self._keys
            if key.algorithm == token.algorithm
            # A missing ``kid`` excludes no key: it is optional (RFC 7515, section 4.1.4), and each
            # signature is checked.
            and (key.id is None or token.key_id is None or key.id == token.key_id)
        ]

    def _start_or_join_fetch(self) -> asyncio.Task[bool]:
        if self._fetch_task is None:
            self._fetch_task = asyncio.create_task(self._fetch_keys(), name="auth.jwks")
            self._fetch_task.add_done_callback(self._on_fetched)
        return self._fetch_task

    def _on_fetched(self, _: asyncio.Task[bool]) -> None:
        self._fetch_task = None

    async def _fetch_keys(self) -> bool:
        try:
            keys = parse_jwks(await _download(self._issuer.jwks_url), self._issuer)
        except (aiohttp.ClientError, TimeoutError, ValueError, AuthError) as error:
            # ValueError: a host that is no name, perhaps of a redirect.
            reason = error.message if isinstance(error, AuthError) else type(error).__name__
            name, kept = self._issuer.name, len(self._keys)
            log.warning("jwks.failed", issuer=name, reason=reason, kept=kept)
            return False
        # Replaced as a whole: a withdrawn key is no longer accepted.
        self._keys = keys
        log.info("jwks.refreshed", issuer=self._issuer.name, keys=len(keys))
        return True


KeySource: TypeAlias = ConfiguredKeySource | JwksKeySource
"""The keys of one issuer."""


def key_source(issuer: IssuerConfig) -> KeySource:
    """Return the key source of the issuer's configuration.

    Raises:
        AuthError: Code ``key_invalid``: the PEM text is not a usable key.
    """
    if issuer.jwks_url:
        return JwksKeySource(issuer)
    if issuer.public_key:
        return ConfiguredKeySource([_require_accepted(parse_pem(issuer.public_key), issuer)])
    # The previous one, so that a secret can be replaced while tokens signed with it are in use.
    secrets = (issuer.secret, issuer.previous_secret)
    return ConfiguredKeySource([VerificationKey("HS256", secret) for secret in secrets if secret])


async def _download(url: str) -> bytes:
    timeout = aiohttp.ClientTimeout(total=_FETCH_TIMEOUT_SECONDS)
    async with (
        # A session per fetch: fetches are rare, and nothing is left to close at shutdown.
        aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session,
        session.get(url, headers={"Accept": "application/json"}) as response,
    ):
        text = b""
        async for chunk in response.content.iter_any():
            text += chunk
            # Content-Length may be absent or wrong, so bytes are counted as they arrive.
            if len(text) > _MAX_JWKS_BYTES:
                raise AuthError("the key set is larger than 1 MiB", code="key_invalid")
    return text


def parse_pem(text: str) -> VerificationKey:
    """Return the public key in a PEM text, with its algorithm.

    Raises:
        AuthError: Code ``key_invalid``.
    """
    try:
        public_key = load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise AuthError("not a public key in PEM form", code="key_invalid") from error
    return _key_with_algorithm(public_key)


def parse_jwks(text: bytes, issuer: IssuerConfig) -> tuple[VerificationKey, ...]:
    """Return the keys of a JSON Web Key Set that can verify this issuer's tokens.

    Raises:
        AuthError: Code ``key_invalid``: it has no such key, or isn't a key set.
    """
    try:
        entries = msgspec.json.decode(text)["keys"]
        keys = [_parse_jwk(entry, issuer) for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AuthError("the response is not a key set", code="key_invalid") from error
    usable = tuple(key for key in keys if key is not None)
    if not usable:
        raise AuthError("the key set has no usable key", code="key_invalid")
    return usable


_ALGORITHM_BY_KEY_TYPE: dict[object, Algorithm] = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}
"""Without ``oct``, a shared secret: once published, it lets every client sign tokens."""


def _parse_jwk(entry: Any, issuer: IssuerConfig) -> VerificationKey | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("kty"), str):
        return None
    algorithm = _ALGORITHM_BY_KEY_TYPE.get(entry["kty"])
    # A key for encryption must not verify signatures (RFC 7517, section 4.2).
    if algorithm is None or entry.get("use", "sig") != "sig":
        return None
    key_id = entry.get("kid")
    try:
        key = _require_accepted(_key_with_algorithm(jwt.PyJWK(entry, algorithm).key), issuer)
    # A set may have keys for other purposes or of newer kinds: one that can't be used is left out
    # (RFC 7517, section 5). Which errors PyJWT raises depends on what is broken.
    except (jwt.PyJWTError, AuthError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if entry.get("alg", key.algorithm) != key.algorithm:
        return None
    return VerificationKey(key.algorithm, key.material, key_id if isinstance(key_id, str) else None)


def _key_with_algorithm(public_key: object) -> VerificationKey:
    """Return the key with the algorithm that its type determines; a token never chooses it."""
    match public_key:
        case RSAPublicKey(key_size=bits) if bits >= _MIN_RSA_BITS:
            return VerificationKey("RS256", public_key)
        case RSAPublicKey():
            raise AuthError("an RSA key must have at least 2048 bits", code="key_invalid")
        # ES256 is P-256 alone (RFC 7518, section 3.4).
        case EllipticCurvePublicKey(curve=SECP256R1()):
            return VerificationKey("ES256", public_key)
        case Ed25519PublicKey():
            return VerificationKey("EdDSA", public_key)
        case _:
            raise AuthError(
                "not a public key for RS256, ES256 or EdDSA with Ed25519", code="key_invalid"
            )


def _require_accepted(key: VerificationKey, issuer: IssuerConfig) -> VerificationKey:
    if key.algorithm not in issuer.accepted_algorithms:
        accepted = ", ".join(issuer.accepted_algorithms)
        message = f"a key for {key.algorithm}, where {accepted} is required"
        raise AuthError(message, code="key_invalid")
    return key
