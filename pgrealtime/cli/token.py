"""``pgrealtime token make``: a token for development, by an issuer of the configuration."""

from __future__ import annotations

import time

import jwt

from pgrealtime.config.model import AuthConfig, IssuerConfig
from pgrealtime.errors import AuthError
from pgrealtime.spelling import nearest_name


def make_token(config: AuthConfig, collection: str, record_id: str, *, lifetime: float) -> str:
    """Return a token that names the record, signed with the secret of an issuer of its collection.

    Args:
        config: With the issuers.
        collection: Name of the auth collection.
        record_id: Whether there is such a record nobody looks up here.
        lifetime: Seconds from now.

    Raises:
        AuthError: No issuer that has a secret makes tokens of the collection.
    """
    issuer = _signing_issuer(config, collection)
    claims: dict[str, object] = {issuer.id_claim: record_id, "exp": int(time.time() + lifetime)}
    if issuer.issuer:
        claims["iss"] = issuer.issuer
    if issuer.audience:
        claims["aud"] = issuer.audience
    return jwt.encode(claims, issuer.secret, algorithm="HS256")


def _signing_issuer(config: AuthConfig, collection: str) -> IssuerConfig:
    signing = [issuer for issuer in config.issuers if issuer.secret]
    for issuer in signing:
        if issuer.collection == collection:
            return issuer
    meant = nearest_name(collection, {issuer.collection for issuer in signing})
    raise AuthError(
        f'no issuer of the configuration can sign tokens of "{collection}"',
        detail="Only one with a secret can; a public key or a JWKS can but check.",
        hint="Add one to auth.issuers, or sign in and use the token that you get."
        if meant is None
        else f'Perhaps you meant "{meant}".',
        code="token_unsigned",
    )
