"""From an ``Authorization`` header to the caller: the one way into the program with an identity."""

from __future__ import annotations

import time
from collections.abc import Callable
from zlib import crc32

from pgrealtime.auth.account import Accounts, Users
from pgrealtime.auth.principal import AuthRecord, Caller, Principal, Superuser
from pgrealtime.auth.token import (
    Claims,
    Key,
    Token,
    check_purpose,
    check_signature,
    check_times,
    is_superuser,
    named_id,
    read,
)
from pgrealtime.collections import Collections
from pgrealtime.config import AuthConfig, IssuerConfig
from pgrealtime.errors import AuthError


class Authenticator:
    """Tells who a request comes from.

    Args:
        auth: The issuers whose tokens count.
        collections: Where the records that tokens name are kept. An issuer whose collection isn't
            among them has users without rows: its tokens alone say who they are.
        accounts: Loads the rows.
        clock: Unix seconds.
    """

    def __init__(
        self,
        auth: AuthConfig,
        collections: Collections,
        accounts: Accounts,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._issuers = tuple((issuer, _keys(issuer)) for issuer in auth.issuers)
        self._users = {c.name: Users(collection=c) for c in collections.values()}
        self._accounts = accounts
        self._clock = clock

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller; a guest if there is no token or anything is wrong with it.

        Args:
            authorization: The header's value, None if there was none.

        Raises:
            DatabaseUnreachableError: The token holds, and its user can't be looked up now. That
                is not the token's fault, and answering "guest" would sign its owner out.
            SetupError: The users table can't be read as configured.
        """
        try:
            return await self.check(authorization)
        except AuthError:
            return Caller()

    async def check(self, authorization: str | None) -> Caller:
        """As ``authenticate``, but says why a token doesn't hold.

        Raises:
            AuthError: With a code for the reason; where there are several issuers, the reason of
                the one that came furthest.
        """
        token = read(authorization)
        refusals: list[AuthError] = []
        for issuer, keys in self._issuers:
            try:
                _check_keys(token, keys)
                check_purpose(token.claims, issuer)
            except AuthError as refusal:
                refusals.append(refusal)
                continue
            expires_at = check_times(token.claims, now=self._clock(), leeway=issuer.leeway)
            return Caller(await self._principal(token.claims, issuer), expires_at)
        raise _best(refusals)

    async def _principal(self, claims: Claims, issuer: IssuerConfig) -> Principal:
        record_id = named_id(claims, issuer.id_claim)
        if is_superuser(claims, issuer):
            # Service keys of hosted databases name nobody.
            return Superuser(record_id or "")
        if record_id is None:
            raise AuthError(f'the token has no "{issuer.id_claim}"', code="token_id")
        users = self._users.get(issuer.collection)
        if users is None:
            return _record_without_row(claims, issuer.collection, record_id)
        account = await self._accounts.load(users, record_id)
        if account is None:
            # A deleted user turns guest on open connections (protocol, 8); coming back with the
            # same token must not undo that.
            raise AuthError("the token's user is unknown", code="account_unknown")
        return account.record


def _keys(issuer: IssuerConfig) -> tuple[Key, ...]:
    secrets = (issuer.secret, issuer.previous_secret)
    return tuple(Key("HS256", secret) for secret in secrets if secret)


def _check_keys(token: Token, keys: tuple[Key, ...]) -> None:
    for key in keys:
        try:
            return check_signature(token, key)
        except AuthError:
            continue
    raise AuthError("no key of the issuer made this signature", code="token_signature")


def _best(refusals: list[AuthError]) -> AuthError:
    beyond_signature = (r for r in refusals if r.error_code != "token_signature")
    nobody = AuthError("no issuer made this token", code="token_signature")
    return next(beyond_signature, nobody)


def _record_without_row(claims: Claims, collection: str, record_id: str) -> AuthRecord:
    """The plain fields from the token, where users are kept elsewhere (rules, section 17).

    ``@request.auth`` has these fields and no other; ``verified`` is OpenID Connect's
    ``email_verified`` too.
    """
    email = claims.get("email")
    return AuthRecord(
        collection_id=f"pbc_{crc32(f'auth{collection}'.encode())}",
        collection_name=collection,
        id=record_id,
        email=email if isinstance(email, str) else "",
        email_visibility=claims.get("emailVisibility") is True,
        verified=claims.get("verified", claims.get("email_verified")) is True,
    )
