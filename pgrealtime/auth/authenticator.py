"""From an ``Authorization`` header to a caller. Every route that needs a caller calls this.

A token is checked against each issuer's keys, then as a token of our login. Its user is read from
the users table each time (``auth.account``), so that a deleted user's token is refused, as is that
of one whom the collection's ``auth_rule`` doesn't admit.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from types import MappingProxyType
from typing import Protocol

import msgspec
import structlog

from pgrealtime.auth.account import Account, AccountLoader, UserCollection
from pgrealtime.auth.keys import KeySource, key_source
from pgrealtime.auth.principal import AuthRecord, Caller, Guest, Superuser
from pgrealtime.auth.record import digest_token_key
from pgrealtime.auth.token import (
    Claims,
    Token,
    VerificationKey,
    check_issuer_and_audience,
    check_times,
    claim_values,
    id_from_claim,
    is_superuser,
    login_claims,
)
from pgrealtime.auth.verified_tokens import VerifiedTokens
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, derive_collection_id
from pgrealtime.config.model import AuthConfig, CollectionLoginConfig, Config, IssuerConfig
from pgrealtime.errors import AuthError, ConfigError, ConfigProblem

log = structlog.get_logger(__name__)

_NO_LOGINS: Mapping[str, CollectionLoginConfig] = MappingProxyType({})
_NO_RULE_COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthenticatedCaller:
    """A caller with the verified token."""

    caller: Caller
    token: Token
    is_login_token: bool
    """Whether our login made it, or a PocketBase with the same secrets."""
    account: Account | None
    """Whose row the caller was made of; None if there is none."""


class AdmitsUsers(Protocol):
    """Decides about users by their collections' ``auth_rule``; see ``reads.admission``."""

    def columns_of(self, collection: Collection) -> tuple[str, ...]:
        """Return the columns that a row must have to be decided about."""

    async def admits(self, collection: Collection, row: Row) -> bool:
        """Return whether a user is admitted, or raise ``DatabaseUnreachableError``."""


class Authenticator:
    """Returns the caller of a request.

    ``logins`` and ``rule_columns`` (columns of users' rows that rules read) are by collection name.
    An issuer whose collection isn't among ``collections`` has users without rows, known by the
    claims of their tokens only.

    Raises:
        ConfigError: A public key can't be used.
    """

    def __init__(
        self,
        auth: AuthConfig,
        collections: Collections,
        accounts: AccountLoader,
        *,
        logins: Mapping[str, CollectionLoginConfig] = _NO_LOGINS,
        rule_columns: Mapping[str, tuple[str, ...]] = _NO_RULE_COLUMNS,
        admission: AdmitsUsers | None = None,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._accounts = accounts
        self._admission = admission
        self._unix_clock = unix_clock
        self._issuers: tuple[tuple[IssuerConfig, KeySource], ...] = ()
        self._issuers_replaced = asyncio.Event()
        self._verified_tokens = VerifiedTokens()
        # Ids of collections that existed under any configuration so far.
        self._past_collection_ids: set[str] = set()
        self.checks_by_result: Counter[str] = Counter()
        """Counts of authentications by ``accepted`` or the error's code."""
        self.replace_settings(auth, collections, logins=logins, rule_columns=rule_columns)

    def replace_settings(
        self,
        auth: AuthConfig,
        collections: Collections,
        *,
        logins: Mapping[str, CollectionLoginConfig] = _NO_LOGINS,
        rule_columns: Mapping[str, tuple[str, ...]] = _NO_RULE_COLUMNS,
    ) -> None:
        """Replace the configuration, as the constructor does, keeping fetched keys."""
        issuers = _key_sources_of(auth)
        self._auth = auth
        # A key set stays known over a reload, or all its tokens would be refused until it is
        # fetched.
        fetched = {_jwks_identity(issuer): source for issuer, source in self._issuers}
        self._issuers = tuple(
            (issuer, fetched.get(_jwks_identity(issuer), source) if issuer.jwks_url else source)
            for issuer, source in issuers
        )
        self._issuers_replaced.set()
        self._users_by_name = {
            c.name: UserCollection(
                collection=c,
                login=logins.get(c.name, CollectionLoginConfig()),
                rule_columns=rule_columns.get(c.name, ()),
                admission_columns=() if self._admission is None else self._admission.columns_of(c),
            )
            for c in collections.values()
        }
        by_name = self._users_by_name
        self._users_by_id = {users.collection.id: users for users in by_name.values()}
        self._issuer_by_trust_digest = {
            digest: issuer
            for issuer, _ in self._issuers
            for digest in _trust_digests_of(issuer, by_name.get(issuer.collection))
        }
        self._users_by_folded_name = {name.lower(): users for name, users in by_name.items()}
        self._past_collection_ids |= self._users_by_id.keys()

    def revalidate_caller(self, caller: Caller) -> Caller:
        """Return the caller under the present configuration; a guest if its token became invalid.

        The database isn't read.
        """
        issuer = self._issuer_by_trust_digest.get(caller.trust_digest or b"")
        match caller.principal:
            case Superuser():
                return caller if issuer is not None else Caller()
            case AuthRecord(collection_id=collection_id) as record:
                users = self._users_by_id.get(collection_id)
                if users is None:
                    # Without its collection a user is a guest (protocol, 8), unless the issuer's
                    # users never had one.
                    is_rowless = issuer is not None and issuer.collection == record.collection_name
                    has_left = collection_id in self._past_collection_ids
                    return caller if is_rowless and not has_left else Caller()
                if not self._is_still_trusted(caller, users, issuer):
                    return Caller()
                name = users.collection.name
                return replace(caller, principal=replace(record, collection_name=name))
            case _:
                return caller

    def _is_still_trusted(
        self, caller: Caller, users: UserCollection, issuer: IssuerConfig | None
    ) -> bool:
        if issuer is not None:
            return self._users_by_name.get(issuer.collection) is users
        login = self._auth.login
        return login.enabled and caller.trust_digest == _login_trust_digest(login.secret, users)

    def find_user_collection(self, name_or_id: str) -> UserCollection | None:
        """Return the collection of a token or of a login route, by name (case ignored) or id."""
        exact = self._users_by_name.get(name_or_id) or self._users_by_id.get(name_or_id)
        return exact or self._users_by_folded_name.get(name_or_id.lower())

    async def run(self) -> None:
        """Refresh the issuers' keys until cancelled; restart when the issuers are replaced."""
        while True:
            self._issuers_replaced.clear()
            async with asyncio.TaskGroup() as tasks:
                fetching = [
                    tasks.create_task(source.run(), name=f"auth.keys.{issuer.name}")
                    for issuer, source in self._issuers
                ]
                await self._issuers_replaced.wait()
                for task in fetching:
                    task.cancel()

    async def authenticate(self, authorization: str | None) -> Caller:
        """Return the caller; a guest without a valid token.

        Raises:
            DatabaseUnreachableError: The token's user can't be read now. A guest instead would log
                out a user whose token may be valid.
            SetupError: The users table can't be read as configured.
        """
        try:
            authenticated = await self.authenticate_token(authorization)
            await self.require_admission(authenticated)
        except AuthError as error:
            self.checks_by_result[error.error_code] += 1
            if error.error_code != "token_missing":
                # Debug level: any client can cause any number of these.
                log.debug("auth.rejected", reason=error.error_code)
            return Caller()
        self.checks_by_result["accepted"] += 1
        return authenticated.caller

    async def require_admission(self, authenticated: AuthenticatedCaller) -> None:
        """Check that the user is admitted by the collection's ``auth_rule``.

        Raises:
            AuthError: Code ``account_refused``.
            DatabaseUnreachableError: The rule can't be evaluated now.
        """
        account, admission = authenticated.account, self._admission
        if (
            account is not None
            and admission is not None
            and not await admission.admits(account.users.collection, account.row)
        ):
            raise AuthError("the auth_rule refuses the token's user", code="account_refused")

    async def authenticate_subscriber(self, authorization: str | None) -> Caller:
        """As ``authenticate``, for a subscribe call.

        Raises:
            AuthError: Code ``guest_refused``: the caller is a guest, and guests aren't allowed.
        """
        caller = await self.authenticate(authorization)
        if isinstance(caller.principal, Guest) and not self._auth.allow_guests:
            raise AuthError("guests may not subscribe", code="guest_refused")
        return caller

    async def authenticate_token(self, authorization: str | None) -> AuthenticatedCaller:
        """As ``authenticate``, but raises an error for an invalid or missing token.

        Raises:
            AuthError: Why the token is invalid; of several issuers' errors the most specific one.
        """
        token = self._verified_tokens.parse(authorization)
        refusals: list[AuthError] = []
        for issuer, source in self._issuers:
            try:
                # The signature first: claims that anybody may have made up get no answer.
                key = await self._find_signing_key(authorization, token, source)
                check_issuer_and_audience(token.claims, issuer)
            except AuthError as refusal:
                refusals.append(refusal)
                continue
            # Outside the ``try``: with this issuer's signature no other issuer need be asked.
            expires_at = check_times(token.claims, now=self._unix_clock(), leeway=issuer.leeway)
            caller, account = await self._caller_of_claims(token.claims, issuer, expires_at, key)
            return AuthenticatedCaller(
                caller=caller, token=token, is_login_token=False, account=account
            )
        # A token that an issuer signed, but that was refused, is not tried as one of ours.
        for error in refusals:
            if error.error_code != "token_signature":
                raise error
        if self._auth.login.enabled:
            return await self._authenticate_login_token(authorization, token)
        raise _unknown_signer_error()

    async def _find_signing_key(
        self, authorization: str | None, token: Token, source: KeySource
    ) -> VerificationKey:
        for key in await source.keys_for(token):
            try:
                self._verified_tokens.check_signature(authorization, token, key)
            # Several keys may have no ``kid``: after a change of keys only one of them fits.
            except AuthError:
                continue
            return key
        raise _unknown_signer_error()

    async def _caller_of_claims(
        self,
        claims: Claims,
        issuer: IssuerConfig,
        expires_at: float | None,
        key: VerificationKey,
    ) -> tuple[Caller, Account | None]:
        record_id = id_from_claim(claims, issuer.id_claim)
        is_super = is_superuser(claims, issuer)
        users = self._users_by_name.get(issuer.collection)
        digest = _trust_digest(issuer, key.material, users, is_superuser=is_super)
        if is_super:
            # Service keys of hosted databases have no id.
            return Caller(Superuser(record_id or ""), expires_at, trust_digest=digest), None
        if record_id is None:
            raise AuthError(f'the token has no "{issuer.id_claim}"', code="token_id")
        values = claim_values(claims, issuer)
        if users is None:
            record = record_of_claims(claims, issuer.collection, record_id)
            record = replace(record, claims=values)
            return Caller(record, expires_at, trust_digest=digest), None
        # Open connections of a deleted user become guests (protocol, 8). The same token on a new
        # connection must not undo that.
        account = require_account(await self._accounts.load(users, record_id))
        record = replace(account.record, claims=values) if values else account.record
        caller = caller_of_account(account, expires_at, record=record, trust_digest=digest)
        return caller, account

    async def _authenticate_login_token(
        self, authorization: str | None, token: Token
    ) -> AuthenticatedCaller:
        """Verify a token of our login: its key is partly in the user's row, which is read first."""
        collection_name_or_id, record_id = login_claims(token)
        users = self.find_user_collection(collection_name_or_id)
        # Where nobody can log in, no token is valid, though the rows may have a token key.
        if users is None or not users.login.password_hash:
            raise AuthError(
                "the collection of the token's user has no login", code="account_unknown"
            )
        expires_at = check_times(token.claims, now=self._unix_clock())
        account = require_account(await self._accounts.load(users, record_id))
        if account.token_key is None:
            raise AuthError("the token's user has no token key", code="token_signature")
        # As in PocketBase (protocol, 9.3): when the user's part changes, the user's tokens become
        # invalid.
        secret = self._auth.login.secret
        key = VerificationKey("HS256", account.token_key + secret)
        self._verified_tokens.check_signature(authorization, token, key)
        caller = caller_of_account(
            account,
            expires_at,
            trust_digest=_login_trust_digest(secret, users),
            token_key_digest=digest_token_key(account.token_key),
        )
        return AuthenticatedCaller(caller=caller, token=token, is_login_token=True, account=account)


def _key_sources_of(auth: AuthConfig) -> list[tuple[IssuerConfig, KeySource]]:
    """Return each issuer with its key source; raise an error with all keys that can't be used."""
    sources: list[tuple[IssuerConfig, KeySource]] = []
    problems: list[ConfigProblem] = []
    for n, issuer in enumerate(auth.issuers):
        try:
            sources.append((issuer, key_source(issuer)))
        except AuthError as error:
            problems.append(ConfigProblem(f"auth.issuers.{n}.public_key", error.message))
    if problems:
        raise ConfigError(tuple(problems))
    return sources


def _jwks_identity(issuer: IssuerConfig) -> tuple[object, ...]:
    """Return what identifies the keys that an issuer publishes."""
    return issuer.jwks_url, issuer.accepted_algorithms


def _trust_digests_of(issuer: IssuerConfig, users: UserCollection | None) -> list[bytes]:
    """Return the trust digests of all valid tokens of the issuer."""
    secrets = [secret for secret in (issuer.secret, issuer.previous_secret) if secret]
    return [
        _trust_digest(issuer, secret, users, is_superuser=is_superuser)
        for secret in secrets or [""]
        for is_superuser in (False, True)
    ]


def _trust_digest(
    issuer: IssuerConfig, key_material: object, users: UserCollection | None, *, is_superuser: bool
) -> bytes:
    """Return a digest of the configuration that makes a token valid (``Caller.trust_digest``)."""
    # A public key is in the issuer's configuration already. The secret may be the previous one:
    # when that is removed, its tokens become invalid and others stay valid.
    secret = key_material if isinstance(key_material, str) else ""
    # Only for superusers: requiring other claims of them makes no user's token invalid.
    claims = issuer.superuser_when if is_superuser else None
    # Whoever was admitted by another rule must be admitted anew.
    auth_rule = "" if users is None or is_superuser else users.collection.auth_rule
    purpose = (issuer.issuer, issuer.audience, issuer.id_claim, claims, auth_rule)
    return _digest(secret, issuer.public_key, *_jwks_identity(issuer), *purpose)


def _login_trust_digest(secret: str, users: UserCollection) -> bytes:
    columns = users.login.password_hash, users.login.token_key
    return _digest(secret, *columns, users.collection.auth_rule)


def _digest(*parts: object) -> bytes:
    # As JSON: joined texts could be equal with other borders. A digest, so that no secret is kept
    # with each connection.
    return sha256(msgspec.json.encode(parts)).digest()


def _unknown_signer_error() -> AuthError:
    return AuthError("no issuer made this token", code="token_signature")


def require_account(account: Account | None) -> Account:
    """Return the account of a token's user, or raise an error where there is none."""
    if account is None:
        raise AuthError("the token's user is unknown", code="account_unknown")
    return account


def caller_of_account(
    account: Account,
    expires_at: float | None,
    *,
    record: AuthRecord | None = None,
    trust_digest: bytes | None = None,
    token_key_digest: bytes | None = None,
) -> Caller:
    """Return the caller of a token, in Unix seconds valid until ``expires_at`` (None: forever).

    ``record`` is the account's with the token's claims, if it has any.
    """
    return Caller(
        record or account.record,
        expires_at,
        token_key_digest,
        trust_digest,
        read_point=account.read_point,
        row_values=tuple((name, account.row.get(name)) for name in account.users.rule_columns),
    )


def record_of_claims(claims: Claims, collection: str, record_id: str) -> AuthRecord:
    """Return the record of a user without a row, from the claims (rules, section 17)."""
    email = claims.get("email")
    return AuthRecord(
        collection_id=derive_collection_id("auth", collection),
        collection_name=collection,
        id=record_id,
        email=email if isinstance(email, str) else "",
        email_visibility=claims.get("emailVisibility") is True,
        # OpenID Connect's name is the second.
        verified=claims.get("verified", claims.get("email_verified")) is True,
    )


def issuer_key_problems(config: Config) -> tuple[ConfigProblem, ...]:
    """Return which public keys can't be used."""
    try:
        _key_sources_of(config.auth)
    except ConfigError as error:
        return error.problems
    return ()
