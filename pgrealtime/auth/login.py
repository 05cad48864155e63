"""Logging in on an existing users table: a password against the row, a token for who knows it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from pgrealtime.auth.account import Account, AccountLoader, UserCollection
from pgrealtime.auth.authenticator import AuthenticatedCaller
from pgrealtime.auth.password_verifier import PasswordVerifier
from pgrealtime.auth.passwords import StoredHash, dummy_hash_for, has_cost_of, scheme_name_of
from pgrealtime.auth.rate_limiter import RateLimiter
from pgrealtime.auth.token import make_login_token
from pgrealtime.config.model import CollectionLoginConfig, LoginConfig
from pgrealtime.errors import AuthError
from pgrealtime.networks import client_network

log = structlog.get_logger(__name__)

_UNUSABLE_PASSWORD_PREFIX = "!"  # noqa: S105 (of a hash)
"""How the hash begins of somebody who has no password, in Django as in Unix."""

_MAX_LOGGED_KINDS = 100
"""Kinds of hashes that can't be read and are told of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginAttempt:
    """What somebody claims to be and to know."""

    identity: str
    password: str = field(repr=False)
    identity_field: str = ""
    """The one field to look the identity up in; empty tries those configured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginSession:
    """Somebody who is logged in."""

    account: Account
    """With the whole row."""
    token: str = field(repr=False)


class LoginService:
    """Passwords to tokens, and tokens to newer ones.

    Args:
        config: ``auth.login``.
        accounts: Finds the rows.
        unix_clock: Unix seconds, for the ends of tokens.
        monotonic_clock: Monotonic seconds, for counting attempts.
    """

    def __init__(
        self,
        config: LoginConfig,
        accounts: AccountLoader,
        *,
        unix_clock: Callable[[], float] = time.time,
        monotonic_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._accounts = accounts
        self._unix_clock = unix_clock
        self._monotonic_clock = monotonic_clock
        self._attempt_limiter = RateLimiter(config.attempts_per_minute)
        self._refusal_log_limiter = RateLimiter(per_minute=1)
        self._password_verifier = PasswordVerifier()
        self._dummy_hashes: dict[tuple[str, str], StoredHash] = {}
        """By table and column, of the scheme and cost that most of its hashes had."""
        self._logged_unreadable: set[tuple[str, str]] = set()
        self.attempts_by_result: Counter[str] = Counter()
        """Attempts by password: ``ok``, or the code of the refusal."""

    async def log_in(
        self, users: UserCollection, attempt: LoginAttempt, address: str
    ) -> LoginSession:
        """Return the session of whoever knows the password; count and log who doesn't.

        An unknown identity, a user without a usable hash and a wrong password get the same answer
        after the same work.

        Args:
            users: Where people log in; ``login.password_hash`` is set.
            attempt: Checked for form already.
            address: Of the client. Failed attempts count against it and the identity together, and
                against it and the account: types and collations have many spellings of one text.

        Raises:
            AuthError: Code ``login_failed``, or ``login_refused``: too many attempts, or too many
                passwords being checked already.
            DatabaseUnreachableError: The users can't be looked up now.
            SetupError: The users table can't be read as configured.
        """
        try:
            session = await self._log_in(users, attempt, address)
        except AuthError as error:
            self.attempts_by_result[error.error_code] += 1
            self._log_refusal(users, error, address)
            raise
        self.attempts_by_result["ok"] += 1
        return session

    def _log_refusal(self, users: UserCollection, error: AuthError, address: str) -> None:
        """Log that somebody was refused, not as whom: people type passwords into the wrong field.

        Attempts beyond the limit cost little but their log entries, a millisecond each: of those
        one is logged per network and minute.
        """
        is_beyond = error.error_code == "login_refused"
        network = client_network(address)
        if is_beyond and not self._refusal_log_limiter.try_acquire(
            (network,), self._monotonic_clock()
        ):
            return
        log.info(
            "login.refused",
            collection=users.collection.name,
            code=error.error_code,
            address=address,
        )

    async def _log_in(
        self, users: UserCollection, attempt: LoginAttempt, address: str
    ) -> LoginSession:
        network = client_network(address)
        who = (network, attempt.identity.casefold())
        if not self._attempt_limiter.try_acquire(who, self._monotonic_clock()):
            raise AuthError("too many attempts", code="login_refused")
        decoy = await self._dummy_hash(users)
        account = await self._find_account(users, attempt)
        stored = None
        if account is not None:
            owner = (network, account.record.collection_id, account.record.id)
            # Answered as a wrong password: "too many attempts" at a spelling that was never tried
            # before would say that there is such an account.
            if self._attempt_limiter.try_acquire(owner, self._monotonic_clock()):
                stored = account.password_hash
        verdict = await self._password_verifier.verify(
            attempt.password, stored, decoy, network=network
        )
        if not verdict or account is None:
            if verdict is None and stored is not None:
                self._log_unreadable_hash(users, stored)
            raise AuthError("no such user, or another password", code="login_failed")
        self._attempt_limiter.reset(who)
        self._attempt_limiter.reset(owner)
        if stored is not None and not has_cost_of(stored, decoy):
            # Perhaps most are like that by now, which the table can say.
            self._dummy_hashes.pop(_hash_column_of(users), None)
        return LoginSession(account=account, token=self._make_token(account))

    async def _dummy_hash(self, users: UserCollection) -> StoredHash:
        """Return what is checked where there is no hash; the same work as of what most users have.

        It is asked for before anybody is looked up, or the first attempt would tell by its time.
        """
        place = _hash_column_of(users)
        if place not in self._dummy_hashes:
            hashes = await self._accounts.sample_password_hashes(users)
            if not hashes:
                return dummy_hash_for(())
            self._dummy_hashes.setdefault(place, dummy_hash_for(hashes))
        return self._dummy_hashes[place]

    def _log_unreadable_hash(self, users: UserCollection, stored: str) -> None:
        """Say once of each kind of hash that it lets nobody in."""
        if stored.startswith(_UNUSABLE_PASSWORD_PREFIX):
            return
        kind = users.collection.name, scheme_name_of(stored)
        if kind not in self._logged_unreadable and len(self._logged_unreadable) < _MAX_LOGGED_KINDS:
            self._logged_unreadable.add(kind)
            log.warning("login.hash_unreadable", collection=kind[0], scheme=kind[1])

    async def refresh_session(
        self, users: UserCollection, record_id: str, authenticated: AuthenticatedCaller
    ) -> LoginSession:
        """Return the session that goes on from a token that holds.

        Only a refreshable token of our own becomes a new one; any other comes back as it is.

        Args:
            users: Where the token's user is kept.
            record_id: Whom the token names.
            authenticated: What the token was found to be.

        Raises:
            AuthError: Code ``account_unknown``: the user has gone in this moment.
            DatabaseUnreachableError: The user can't be looked up now.
            SetupError: The users table can't be read as configured.
        """
        account = await self._accounts.load_whole_row(users, record_id)
        if account is None:
            raise AuthError("the token's user is unknown", code="account_unknown")
        is_renewed = (
            authenticated.is_login_token and authenticated.token.claims.get("refreshable") is True
        )
        token = self._make_token(account) if is_renewed else authenticated.token.text
        return LoginSession(account=account, token=token)

    @property
    def is_enabled(self) -> bool:
        """Whether anybody can log in here."""
        return self._config.enabled

    def replace_settings(self, config: LoginConfig) -> None:
        """Take another configuration; failed attempts go on counting."""
        if config.attempts_per_minute != self._config.attempts_per_minute:
            self._attempt_limiter = RateLimiter(config.attempts_per_minute)
        self._config = config

    def close(self) -> None:
        """Let the threads go; what they are at they finish."""
        self._password_verifier.close()

    async def _find_account(self, users: UserCollection, attempt: LoginAttempt) -> Account | None:
        """The user of that identity, by the first of the fields that has one.

        All fields are asked even so: how many were must not be seen from outside.
        """
        found: Account | None = None
        for name in _identity_fields_to_try(users.login, attempt):
            shown = users.collection.fields_by_name.get(name)
            if shown is not None and shown.column is not None:
                account = await self._accounts.find_by_value(users, shown.column, attempt.identity)
                found = found or account
        return found

    def _make_token(self, account: Account) -> str:
        key = account.token_key
        assert key is not None  # whoever has a password hash has a key
        return make_login_token(
            collection_id=account.record.collection_id,
            record_id=account.record.id,
            signing_key=key + self._config.secret,
            expires_at=int(self._unix_clock() + self._config.token_lifetime),
        )


def _hash_column_of(users: UserCollection) -> tuple[str, str]:
    return str(users.collection.table.name), users.login.password_hash


def _identity_fields_to_try(login: CollectionLoginConfig, attempt: LoginAttempt) -> tuple[str, ...]:
    """``email`` comes first for what looks like an address, and not at all for anything else."""
    if attempt.identity_field:
        return (attempt.identity_field,)
    others = tuple(name for name in login.identity if name != "email")
    is_address = "@" in attempt.identity.strip("@")
    return ("email", *others) if is_address and "email" in login.identity else others
