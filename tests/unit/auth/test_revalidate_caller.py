"""Callers of open connections after the configuration was replaced."""

from __future__ import annotations

from typing import Any

import jwt
import pytest

from pgrealtime.auth.account import AccountLoader
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.principal import Caller
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import AuthConfig, IssuerConfig
from pgrealtime.postgres.pool import QueryPool

SECRET = "a-secret-of-thirty-two-characters"
OTHER = "another-secret-of-enough-characters"
NONE = Collections(())


def issuer(**said: Any) -> IssuerConfig:
    return IssuerConfig(
        **{"name": "app", "secret": SECRET, "superuser_when": {"role": "root"}, **said}
    )


async def known(*issuers: IssuerConfig, **claims: str) -> tuple[Authenticator, Caller]:
    authenticator = Authenticator(AuthConfig(issuers=issuers), NONE, AccountLoader(QueryPool()))
    caller = await authenticator.authenticate(jwt.encode({"sub": "u1", **claims}, SECRET))
    assert caller != Caller()
    return authenticator, caller


def use(authenticator: Authenticator, *issuers: IssuerConfig) -> None:
    authenticator.replace_settings(AuthConfig(issuers=issuers), NONE)


HOLDS = [
    issuer(),
    issuer(name="renamed"),
    issuer(leeway="5s"),
    issuer(secret=OTHER, previous_secret=SECRET),
]
FALLS = [
    issuer(secret=OTHER),
    issuer(issuer="https://app"),
    issuer(audience="rt"),
    issuer(id_claim="user"),
]


@pytest.mark.parametrize("role", ["user", "root"])
@pytest.mark.parametrize("after", HOLDS)
async def test_a_caller_whose_token_is_still_valid_stays(after: IssuerConfig, role: str) -> None:
    """The secret may move to ``previous_secret`` without logging users out."""
    authenticator, caller = await known(issuer(), role=role)

    use(authenticator, issuer(name="first", secret=OTHER), after)

    assert authenticator.revalidate_caller(caller) == caller


@pytest.mark.parametrize("role", ["user", "root"])
@pytest.mark.parametrize("after", FALLS)
async def test_a_caller_whose_token_no_issuer_accepts_is_a_guest(
    after: IssuerConfig, role: str
) -> None:
    authenticator, caller = await known(issuer(), role=role)

    use(authenticator, after)

    assert authenticator.revalidate_caller(caller) == Caller()


async def test_what_makes_a_superuser_matters_to_superusers_alone() -> None:
    after = issuer(superuser_when={"role": "service_role"})
    for role in ("user", "root"):
        authenticator, caller = await known(issuer(), role=role)
        use(authenticator, after)

        assert authenticator.revalidate_caller(caller) == (caller if role == "user" else Caller())


async def test_without_its_issuer_a_caller_is_a_guest() -> None:
    authenticator, caller = await known(issuer())

    use(authenticator)

    assert authenticator.revalidate_caller(caller) == Caller()


async def test_an_issuer_of_another_collection_has_other_users() -> None:
    authenticator, caller = await known(issuer())

    use(authenticator, issuer(collection="staff"))

    assert authenticator.revalidate_caller(caller) == Caller()


async def test_a_guest_stays_one() -> None:
    authenticator, _ = await known(issuer())

    assert authenticator.revalidate_caller(Caller()) == Caller()
