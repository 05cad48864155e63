"""Issuers and tokens of a service under test: one issuer per auth collection."""

from __future__ import annotations

import time
from collections.abc import Iterable

import jwt

from pgrealtime.config.model import AuthConfig, IssuerConfig
from tests.e2e.service import SECRET


def auth_config(collections: Iterable[str]) -> AuthConfig:
    """Return an issuer for each of the auth collections; ``role: admin`` makes superusers."""
    return AuthConfig(
        issuers=tuple(
            IssuerConfig(
                name=name,
                secret=f"{SECRET} {name}",
                collection=name,
                superuser_when={"role": "admin"},
            )
            for name in collections
        )
    )


def signed_token(collection: str, record_id: str, **claims: object) -> str:
    """Return a token of the collection's issuer, valid for an hour."""
    made = {"sub": record_id, "exp": time.time() + 3600, **claims}
    return jwt.encode(made, f"{SECRET} {collection}", algorithm="HS256")
