"""Logs users in by password on an existing users table, and renews their tokens.

Between ``api.login`` and ``auth.account``. The response to a failed login and its time are the
same for an unknown identity, an account without a usable hash and a wrong password, so that
accounts can't be enumerated.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import structlog

from pgrealtime.auth.account import Account, AccountLoader, UserCollection
from pgrealtime.auth.authenticator import AuthenticatedCaller, require_account
from pgrealtime.auth.password_verifier import PasswordVerifier
from pgrealtime.auth.passwords import StoredHash, dummy_hash_for, has_cost_of, scheme_name_of
from pgrealtime.auth.token import make_login_token
from pgrealtime.config.model import CollectionLoginConfig, LoginConfig
from pgrealtime.errors import AuthError
from pgrealtime.fairness import client_network

log = structlog.get_logger(__name__)

_UNUSABLE_PASSWORD_PREFIX = "!"  # noqa: S105 (of a hash)
"""Of a hash that means "no password", in Django as in Unix."""

_MAX_LOGGED_KINDS = 100
"""Distinct log entries about unsupported hashes, per process."""


_RateKey: TypeAlias = tuple[str, ...]
"""Network and identity, or network and account."""

_MAX_RATE_KEYS = 20_000
"""Keys remembered, some megabytes. Beyond, the one unused for longest is forgotten: an attacker
needs as many networks or identities to reset the key of another account."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginAttempt:
    """Submitted credentials; those of a request without a body are the defaults."""

    identity: str = ""
    password: str = field(default="", repr=False)
    identity_field: str = ""
    """The only field to look the identity up in; empty for all configured fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginSession:
    """A user who has logged in or renewed the token."""

    account: Account
    """Has the whole row."""
    token: str = field(repr=False)


class RateLimiter:
    """A token bucket for each key: ``per_minute`` attempts when full, and refilled in a minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._used: OrderedDict[_RateKey, tuple[float, float]] = OrderedDict()
        """Attempts used, and the monotonic second for which that was computed."""

    def try_acquire(self, key: _RateKey, now: float) -> bool:
        """Use one attempt of the key; False if none is left. ``now`` is monotonic seconds."""
        # Counted before the result is known, so that parallel attempts count too.
        used, since = self._used.get(key, (0.0, now))
        used = max(0.0, used - (now - since) * self._per_minute / 60.0)
        is_admitted = used + 1.0 <= self._per_minute
        self._used[key] = (used + 1.0 if is_admitted else used, now)
        # After a refusal too: hammering keeps the key from being forgotten.
        self._used.move_to_end(key)
        if len(self._used) > _MAX_RATE_KEYS:
            self._used.popitem(last=False)
        return is_admitted

    def reset(self, key: _RateKey) -> None:
        """Refill the key's bucket, after the right password."""
        self._used.pop(key, None)


class LoginService:
    """Checks passwords, makes and renews tokens."""

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
        """By table and column, with the commonest scheme and cost of the column's hashes."""
        self._logged_unreadable: set[tuple[str, str]] = set()
        self.attempts_by_result: Counter[str] = Counter()
        """Counts by ``ok`` or the error's code."""

    async def log_in(
        self, users: UserCollection, attempt: LoginAttempt, address: str
    ) -> LoginSession:
        """Log in by password; count and log the result.

        Raises:
            AuthError: Code ``login_failed``, or ``login_refused``: too many attempts, or too many
                passwords being checked. Others as ``AccountLoader.load``.
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
        """Log a refusal; of attempts beyond the limit one per network and minute."""
        # Without the identity: users type passwords into the wrong field. Such attempts cost little
        # apart from the log entry, which takes a millisecond.
        key, now = (client_network(address),), self._monotonic_clock()
        is_beyond = error.error_code == "login_refused"
        if not is_beyond or self._refusal_log_limiter.try_acquire(key, now):
            collection, code = users.collection.name, error.error_code
            log.info("login.refused", collection=collection, code=code, address=address)

    async def _log_in(
        self, users: UserCollection, attempt: LoginAttempt, address: str
    ) -> LoginSession:
        network = client_network(address)
        # By network too: otherwise anybody could lock out a user by guessing in vain.
        by_identity = (network, attempt.identity.casefold())
        if not self._attempt_limiter.try_acquire(by_identity, self._monotonic_clock()):
            raise AuthError("too many attempts", code="login_refused")
        # Before the account is looked up: the first attempt's time would show that it exists.
        dummy_hash = await self._dummy_hash(users)
        account = await self._find_account(users, attempt)
        stored = None
        if account is not None:
            # Limited by account too, since types and collations have many spellings of one text.
            # Refused as a wrong password: "too many attempts" for a spelling that was never tried
            # would show that the account exists.
            by_account = (network, account.record.collection_id, account.record.id)
            if self._attempt_limiter.try_acquire(by_account, self._monotonic_clock()):
                stored = account.password_hash
        verdict = await self._password_verifier.verify(
            attempt.password, stored, dummy_hash, network=network
        )
        if not verdict or account is None:
            if verdict is None and stored is not None:
                self._log_unreadable_hash(users, stored)
            raise AuthError("unknown user or wrong password", code="login_failed")
        # Of this identity and account alone: a known password must not help to guess another's.
        self._attempt_limiter.reset(by_identity)
        self._attempt_limiter.reset(by_account)
        if stored is not None and not has_cost_of(stored, dummy_hash):
            # The application may have changed the cost: sample the table again.
            self._dummy_hashes.pop(_hash_column_of(users), None)
        return LoginSession(account=account, token=self._make_token(account))

    async def _dummy_hash(self, users: UserCollection) -> StoredHash:
        """Return the hash that is checked where an account has none, from a sample of the table."""
        hash_column = _hash_column_of(users)
        if hash_column not in self._dummy_hashes:
            hashes = await self._accounts.sample_password_hashes(users)
            # Not cached: the table may be empty or unreadable at the moment.
            if not hashes:
                return dummy_hash_for(())
            # Not assigned: another attempt may have set it meanwhile, and both must check the same.
            self._dummy_hashes.setdefault(hash_column, dummy_hash_for(hashes))
        return self._dummy_hashes[hash_column]

    def _log_unreadable_hash(self, users: UserCollection, stored: str) -> None:
        """Log once per collection and scheme that its hashes can't be checked."""
        if stored.startswith(_UNUSABLE_PASSWORD_PREFIX):
            return
        # Not the hash, which may be a password in the clear.
        kind = users.collection.name, scheme_name_of(stored)
        if kind not in self._logged_unreadable and len(self._logged_unreadable) < _MAX_LOGGED_KINDS:
            self._logged_unreadable.add(kind)
            log.warning("login.hash_unreadable", collection=kind[0], scheme=kind[1])

    async def refresh_session(
        self, users: UserCollection, record_id: str, authenticated: AuthenticatedCaller
    ) -> LoginSession:
        """Return the session of a valid token: a new token if it is ours and refreshable.

        Raises:
            AuthError: Code ``account_unknown``: the user has been deleted. Others as
                ``AccountLoader.load``.
        """
        # Read again: the user may have been deleted since the token was checked.
        account = require_account(await self._accounts.load_whole_row(users, record_id))
        token = authenticated.token
        is_renewed = authenticated.is_login_token and token.claims.get("refreshable") is True
        text = self._make_token(account) if is_renewed else token.text
        return LoginSession(account=account, token=text)

    @property
    def is_enabled(self) -> bool:
        """Whether the configuration allows logging in."""
        return self._config.enabled

    def replace_settings(self, config: LoginConfig) -> None:
        """Replace the configuration; attempts stay counted if their limit is unchanged."""
        if config.attempts_per_minute != self._config.attempts_per_minute:
            self._attempt_limiter = RateLimiter(config.attempts_per_minute)
        self._config = config

    def close(self) -> None:
        """Stop the threads; running checks finish."""
        self._password_verifier.close()

    async def _find_account(self, users: UserCollection, attempt: LoginAttempt) -> Account | None:
        """Return the account with that identity in the first field that has one."""
        # All fields are queried, also after a match: the number of queries would show in the time.
        found_account: Account | None = None
        for name in _identity_fields_to_try(users.login, attempt):
            column = users.collection.column_of(name)
            if column is not None:
                account = await self._accounts.find_by_value(users, column, attempt.identity)
                found_account = found_account or account
        return found_account

    def _make_token(self, account: Account) -> str:
        key = account.token_key
        assert key is not None  # an account with a password hash has one
        return make_login_token(
            collection_id=account.record.collection_id,
            record_id=account.record.id,
            signing_key=key + self._config.secret,
            expires_at=int(self._unix_clock() + self._config.token_lifetime),
        )


def _hash_column_of(users: UserCollection) -> tuple[str, str]:
    return str(users.collection.table.name), users.login.password_hash


def _identity_fields_to_try(login: CollectionLoginConfig, attempt: LoginAttempt) -> tuple[str, ...]:
    """Return the fields in order: ``email`` first for an e-mail address, otherwise not at all."""
    if attempt.identity_field:
        return (attempt.identity_field,)
    others = tuple(name for name in login.identity if name != "email")
    is_address = "@" in attempt.identity.strip("@")
    return ("email", *others) if is_address and "email" in login.identity else others
