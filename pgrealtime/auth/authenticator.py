"""From an ``Authorization`` header to the caller: the one way into the program with an identity."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from types import MappingProxyType

import msgspec
import structlog

from pgrealtime.auth.account import Account, Accounts, Users
from pgrealtime.auth.keys import KeySource, key_source
from pgrealtime.auth.principal import AuthRecord, Caller, Guest, Superuser
from pgrealtime.auth.record import digest_of
from pgrealtime.auth.token import (
    Claims,
    Key,
    Token,
    check_purpose,
    check_signature,
    check_times,
    is_superuser,
    named_id,
    own_claims,
    read,
)
from pgrealtime.collections.model import Collections, collection_id
from pgrealtime.config.model import AuthConfig, CollectionLoginConfig, IssuerConfig, LoginConfig
from pgrealtime.errors import AuthError, ConfigError, Problem

log = structlog.get_logger(__name__)

_NO_LOGINS: Mapping[str, CollectionLoginConfig] = MappingProxyType({})
_NOTHING_ASKED: Mapping[str, tuple[str, ...]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller, with the token that said so."""

    caller: Caller
    token: Token
    is_own: bool
    """Whether it is a token of our own login, or of a PocketBase with the same secrets."""


class Authenticator:
    """Tells who a request comes from.

    Args:
        auth: The issuers whose tokens count, and the login.
        collections: Where the records that tokens name are kept. An issuer whose collection isn't
            among them has users without rows: its tokens alone say who they are.
        accounts: Loads the rows.
        logins: How people log in, by collection name.
        asked: Columns of people's rows that rules ask for, by collection name.
        clock: Unix seconds.

    Raises:
        ConfigError: A public key that can't be used.
    """

    def __init__(
        self,
        auth: AuthConfig,
        collections: Collections,
        accounts: Accounts,
        *,
        logins: Mapping[str, CollectionLoginConfig] = _NO_LOGINS,
        asked: Mapping[str, tuple[str, ...]] = _NOTHING_ASKED,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._accounts = accounts
        self._clock = clock
        self._issuers: tuple[tuple[IssuerConfig, KeySource], ...] = ()
        self._other_issuers = asyncio.Event()
        self._known_ids: set[str] = set()
        self.checks: Counter[str] = Counter()
        """Callers by what became of their tokens: ``accepted``, or the code of the refusal."""
        self.use(
            issuers_of(auth),
            auth.login,
            collections,
            logins=logins,
            asked=asked,
            allow_guests=auth.allow_guests,
        )

    def use(
        self,
        issuers: Iterable[tuple[IssuerConfig, KeySource]],
        login: LoginConfig,
        collections: Collections,
        *,
        logins: Mapping[str, CollectionLoginConfig] = _NO_LOGINS,
        asked: Mapping[str, tuple[str, ...]] = _NOTHING_ASKED,
        allow_guests: bool = True,
    ) -> None:
        """Take another configuration; keys fetched from issuers are kept.

        Args:
            issuers: Made by ``issuers_of``.
            login: Our own.
            collections: As in the constructor.
            logins: As in the constructor.
            asked: As in the constructor.
            allow_guests: Whether guests may subscribe.
        """
        self._allow_guests = allow_guests
        fetched = {_publication(issuer): source for issuer, source in self._issuers}
        self._issuers = tuple(
            (issuer, fetched.get(_publication(issuer), source) if issuer.jwks_url else source)
            for issuer, source in issuers
        )
        self._other_issuers.set()
        self._vouchers = {
            voucher: issuer for issuer, _ in self._issuers for voucher in _vouchers_of(issuer)
        }
        self._login = login
        self._users = {
            c.name: Users(
                collection=c,
                login=logins.get(c.name, CollectionLoginConfig()),
                asked=asked.get(c.name, ()),
            )
            for c in collections.values()
        }
        self._by_id = {users.collection.id: users for users in self._users.values()}
        self._by_folded_name = {name.lower(): users for name, users in self._users.items()}
        self._known_ids |= self._by_id.keys()

    def reconsider(self, caller: Caller) -> Caller:
        """The caller by the configuration of now: a guest if its token doesn't hold any more.

        The database isn't asked. Users whose collection is gone are gone with it (protocol, 8).
        """
        issuer = self._vouchers.get(caller.voucher or b"")
        match caller.principal:
            case Superuser():
                return caller if issuer is not None else Caller()
            case AuthRecord(collection_id=collection_id) as record:
                users = self._by_id.get(collection_id)
                if users is None:
                    return caller if self._is_without_row(record, issuer) else Caller()
                if not self._is_user(caller, users, issuer):
                    return Caller()
                name = users.collection.name
                return replace(caller, principal=replace(record, collection_name=name))
            case _:
                return caller

    def _is_without_row(self, record: AuthRecord, issuer: IssuerConfig | None) -> bool:
        is_by_issuer = issuer is not None and issuer.collection == record.collection_name
        return is_by_issuer and record.collection_id not in self._known_ids

    def _is_user(self, caller: Caller, users: Users, issuer: IssuerConfig | None) -> bool:
        if issuer is not None:
            return self._users.get(issuer.collection) is users
        return self._login.enabled and caller.voucher == _own_voucher(self._login, users)

    def users(self, name_or_id: str) -> Users | None:
        """The collection of that name or id, as tokens and the login's addresses name it.

        Unlike topics these don't mind the case of a name.
        """
        exact = self._users.get(name_or_id) or self._by_id.get(name_or_id)
        return exact or self._by_folded_name.get(name_or_id.lower())

    async def run(self) -> None:
        """Keep the issuers' published keys fresh, for ever."""
        while True:
            self._other_issuers.clear()
            async with asyncio.TaskGroup() as tasks:
                fetching = [
                    tasks.create_task(source.run(), name=f"auth.keys.{issuer.name}")
                    for issuer, source in self._issuers
                ]
                await self._other_issuers.wait()
                for task in fetching:
                    task.cancel()

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller; a guest if there is no token or anything is wrong with it.

        Args:
            authorization: The header's value, None if there was none.

        Raises:
            DatabaseUnreachableError: The token may hold, but its user can't be looked up now. That
                is not the token's fault, and answering "guest" would sign its owner out.
            SetupError: The users table can't be read as configured.
        """
        try:
            caller = (await self.identify(authorization)).caller
        except AuthError as error:
            self.checks[error.error_code] += 1
            if error.error_code != "token_missing":
                # Debug: anybody can make as many of these as they like.
                log.debug("auth.rejected", reason=error.error_code)
            return Caller()
        self.checks["accepted"] += 1
        return caller

    async def admit(self, authorization: str | None) -> Caller:
        """As ``authenticate``, for who wants to subscribe.

        Raises:
            AuthError: Code ``guest_refused``: guests aren't allowed.
            DatabaseUnreachableError: As above.
            SetupError: As above.
        """
        caller = await self.authenticate(authorization)
        if isinstance(caller.principal, Guest) and not self._allow_guests:
            raise AuthError("guests may not subscribe", code="guest_refused")
        return caller

    async def identify(self, authorization: str | None) -> Identity:
        """As ``authenticate``, but says why a token doesn't hold.

        Raises:
            AuthError: Its code is the reason; of several issuers' reasons the most telling one.
            DatabaseUnreachableError: As above.
            SetupError: As above.
        """
        token = read(authorization)
        refusals: list[AuthError] = []
        for issuer, source in self._issuers:
            try:
                key = await _check_keys(token, source)
                check_purpose(token.claims, issuer)
            except AuthError as refusal:
                refusals.append(refusal)
                continue
            expires_at = check_times(token.claims, now=self._clock(), leeway=issuer.leeway)
            caller = await self._caller(token.claims, issuer, expires_at)
            voucher = _voucher(
                issuer, key.material, is_superuser=isinstance(caller.principal, Superuser)
            )
            caller = replace(caller, voucher=voucher)
            return Identity(caller=caller, token=token, is_own=False)
        if self._login.enabled and not _is_by_known_issuer(refusals):
            return await self._own(token)
        raise _most_telling(refusals)

    async def _caller(
        self, claims: Claims, issuer: IssuerConfig, expires_at: float | None
    ) -> Caller:
        record_id = named_id(claims, issuer.id_claim)
        if is_superuser(claims, issuer):
            # Service keys of hosted databases name nobody.
            return Caller(Superuser(record_id or ""), expires_at)
        if record_id is None:
            raise AuthError(f'the token has no "{issuer.id_claim}"', code="token_id")
        users = self._users.get(issuer.collection)
        if users is None:
            record = _record_without_row(claims, issuer.collection, record_id)
            return Caller(record, expires_at)
        # A deleted user turns guest on open connections (protocol, 8); coming back with the same
        # token must not undo that.
        return caller_of(_known(await self._accounts.load(users, record_id)), expires_at)

    async def _own(self, token: Token) -> Identity:
        """The user of a login token. Its key has a part in the user's row, hence the order."""
        claims = own_claims(token)
        users = self.users(claims.collection)
        if users is None or not users.login.password_hash:
            raise AuthError("the token's users don't log in here", code="account_unknown")
        expires_at = check_times(token.claims, now=self._clock())
        account = _known(await self._accounts.load(users, claims.record_id))
        if account.token_key is None:
            raise AuthError("the token's user has no token key", code="token_signature")
        check_signature(token, Key("HS256", account.token_key + self._login.secret))
        caller = replace(
            caller_of(account, expires_at),
            voucher=_own_voucher(self._login, users),
            key_digest=digest_of(account.token_key),
        )
        return Identity(caller=caller, token=token, is_own=True)


def issuers_of(auth: AuthConfig) -> tuple[tuple[IssuerConfig, KeySource], ...]:
    """Each issuer with where its keys come from.

    Raises:
        ConfigError: A public key that can't be used.
    """
    sources: list[tuple[IssuerConfig, KeySource]] = []
    problems: list[Problem] = []
    for n, issuer in enumerate(auth.issuers):
        try:
            sources.append((issuer, key_source(issuer)))
        except AuthError as error:
            problems.append(Problem(f"auth.issuers.{n}.public_key", error.message))
    if problems:
        raise ConfigError(tuple(problems))
    return tuple(sources)


def _publication(issuer: IssuerConfig) -> tuple[object, ...]:
    """What published keys hang on."""
    return issuer.jwks_url, issuer.accepted_algorithms


def _vouchers_of(issuer: IssuerConfig) -> list[bytes]:
    """The vouchers of all tokens that the issuer can make: users' and superusers', per secret."""
    secrets = [secret for secret in (issuer.secret, issuer.previous_secret) if secret]
    return [
        _voucher(issuer, secret, is_superuser=is_superuser)
        for secret in secrets or [""]
        for is_superuser in (False, True)
    ]


def _voucher(issuer: IssuerConfig, material: object, *, is_superuser: bool) -> bytes:
    """What makes a token count, as a digest: the same as long as the configuration says the same.

    Args:
        issuer: Whose token it is.
        material: What checked it. Only secrets count, of public keys the configuration says which.
        is_superuser: Whether what makes a superuser matters.
    """
    secret = material if isinstance(material, str) else ""
    claims = issuer.superuser_when if is_superuser else None
    purpose = (issuer.issuer, issuer.audience, issuer.id_claim, claims)
    return _digest(secret, issuer.public_key, *_publication(issuer), *purpose)


def _own_voucher(login: LoginConfig, users: Users) -> bytes:
    columns = users.login.password_hash, users.login.token_key
    return _digest(login.secret, *columns, users.collection.auth_rule)


def _digest(*parts: object) -> bytes:
    return sha256(msgspec.json.encode(parts)).digest()


async def _check_keys(token: Token, source: KeySource) -> Key:
    for key in await source.keys_for(token):
        try:
            check_signature(token, key)
        except AuthError:
            continue
        return key
    raise AuthError("no issuer made this token", code="token_signature")


def _is_by_known_issuer(refusals: list[AuthError]) -> bool:
    return any(refusal.error_code != "token_signature" for refusal in refusals)


def _most_telling(refusals: list[AuthError]) -> AuthError:
    telling = (r for r in refusals if r.error_code != "token_signature")
    return next(telling, AuthError("no issuer made this token", code="token_signature"))


def _known(account: Account | None) -> Account:
    if account is None:
        raise AuthError("the token's user is unknown", code="account_unknown")
    return account


def caller_of(account: Account, expires_at: float | None) -> Caller:
    """The caller that a user is.

    Args:
        account: As the database has it.
        expires_at: When the token expires, Unix seconds; None if it never does.
    """
    return Caller(
        account.record,
        expires_at,
        reading=account.reading,
        own=tuple((name, account.row.get(name)) for name in account.users.asked),
    )


def _record_without_row(claims: Claims, collection: str, record_id: str) -> AuthRecord:
    """The plain fields from the token, where users are kept elsewhere (rules, section 17).

    ``verified`` is OpenID Connect's ``email_verified`` too.
    """
    email = claims.get("email")
    return AuthRecord(
        collection_id=collection_id("auth", collection),
        collection_name=collection,
        id=record_id,
        email=email if isinstance(email, str) else "",
        email_visibility=claims.get("emailVisibility") is True,
        verified=claims.get("verified", claims.get("email_verified")) is True,
    )
