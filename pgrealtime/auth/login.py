"""Logging in on an existing users table: a password against the row, a token for who knows it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from pgrealtime.auth.account import Account, Accounts, Users
from pgrealtime.auth.attempts import Attempts
from pgrealtime.auth.authenticator import Identity
from pgrealtime.auth.password_threads import PasswordThreads
from pgrealtime.auth.passwords import StoredHash, costs_as, decoy_of, name_of
from pgrealtime.auth.token import make_own
from pgrealtime.config.model import CollectionLoginConfig, LoginConfig
from pgrealtime.errors import AuthError
from pgrealtime.networks import network_of

log = structlog.get_logger(__name__)

_DISABLED = "!"
"""How the hash begins of somebody who has no password, in Django as in Unix."""

_UNREAD = 100
"""Kinds of hashes that can't be read and are told of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What somebody claims to be and to know."""

    identity: str
    password: str = field(repr=False)
    identity_field: str = ""
    """The one field to look the identity up in; empty tries those configured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Somebody who is logged in."""

    account: Account
    """With the whole row."""
    token: str = field(repr=False)


class Login:
    """Passwords to tokens, and tokens to newer ones.

    Args:
        config: ``auth.login``.
        accounts: Finds the rows.
        clock: Unix seconds, for the ends of tokens.
        stopwatch: Monotonic seconds, for counting attempts.
    """

    def __init__(
        self,
        config: LoginConfig,
        accounts: Accounts,
        *,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._accounts = accounts
        self._clock = clock
        self._stopwatch = stopwatch
        self._attempts = Attempts(config.attempts_per_minute)
        self._refusals_logged = Attempts(per_minute=1)
        self._passwords = PasswordThreads()
        self._decoys: dict[tuple[str, str], StoredHash] = {}
        """By table and column, of the scheme and cost that most of its hashes had."""
        self._unread: set[tuple[str, str]] = set()
        self.results: Counter[str] = Counter()
        """Attempts by password: ``ok``, or the code of the refusal."""

    async def with_password(self, users: Users, attempt: Attempt, address: str) -> Session:
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
            session = await self._with_password(users, attempt, address)
        except AuthError as error:
            self.results[error.error_code] += 1
            self._log_refusal(users, error, address)
            raise
        self.results["ok"] += 1
        return session

    def _log_refusal(self, users: Users, error: AuthError, address: str) -> None:
        """Log that somebody was refused, not as whom: people type passwords into the wrong field.

        Attempts beyond the limit cost little but their log entries, a millisecond each: of those
        one is logged per network and minute.
        """
        is_beyond = error.error_code == "login_refused"
        network = network_of(address)
        if is_beyond and not self._refusals_logged.admit((network,), self._stopwatch()):
            return
        log.info(
            "login.refused",
            collection=users.collection.name,
            code=error.error_code,
            address=address,
        )

    async def _with_password(self, users: Users, attempt: Attempt, address: str) -> Session:
        network = network_of(address)
        who = (network, attempt.identity.casefold())
        if not self._attempts.admit(who, self._stopwatch()):
            raise AuthError("too many attempts", code="login_refused")
        decoy = await self._decoy(users)
        account = await self._find(users, attempt)
        stored = None
        if account is not None:
            owner = (network, account.record.collection_id, account.record.id)
            # Answered as a wrong password: "too many attempts" at a spelling that was never tried
            # before would say that there is such an account.
            if self._attempts.admit(owner, self._stopwatch()):
                stored = account.password_hash
        verdict = await self._passwords.check(attempt.password, stored, decoy, whose=network)
        if not verdict or account is None:
            if verdict is None and stored is not None:
                self._tell_unreadable(users, stored)
            raise AuthError("no such user, or another password", code="login_failed")
        self._attempts.forget(who)
        self._attempts.forget(owner)
        if stored is not None and not costs_as(stored, decoy):
            # Perhaps most are like that by now, which the table can say.
            self._decoys.pop(_place(users), None)
        return Session(account=account, token=self._token(account))

    async def _decoy(self, users: Users) -> StoredHash:
        """Return what is checked where there is no hash; the same work as of what most users have.

        It is asked for before anybody is looked up, or the first attempt would tell by its time.
        """
        place = _place(users)
        if place not in self._decoys:
            hashes = await self._accounts.hashes(users)
            if not hashes:
                return decoy_of(())
            self._decoys.setdefault(place, decoy_of(hashes))
        return self._decoys[place]

    def _tell_unreadable(self, users: Users, stored: str) -> None:
        """Say once of each kind of hash that it lets nobody in."""
        if stored.startswith(_DISABLED):
            return
        kind = users.collection.name, name_of(stored)
        if kind not in self._unread and len(self._unread) < _UNREAD:
            self._unread.add(kind)
            log.warning("login.hash_unreadable", collection=kind[0], scheme=kind[1])

    async def refresh(self, users: Users, record_id: str, identity: Identity) -> Session:
        """Return the session that goes on from a token that holds.

        Only a refreshable token of our own becomes a new one; any other comes back as it is.

        Args:
            users: Where the token's user is kept.
            record_id: Whom the token names.
            identity: What the token was found to be.

        Raises:
            AuthError: Code ``account_unknown``: the user has gone in this moment.
            DatabaseUnreachableError: The user can't be looked up now.
            SetupError: The users table can't be read as configured.
        """
        account = await self._accounts.read(users, record_id)
        if account is None:
            raise AuthError("the token's user is unknown", code="account_unknown")
        is_renewed = identity.is_own and identity.token.claims.get("refreshable") is True
        token = self._token(account) if is_renewed else identity.token.text
        return Session(account=account, token=token)

    @property
    def is_enabled(self) -> bool:
        """Whether anybody can log in here."""
        return self._config.enabled

    def use(self, config: LoginConfig) -> None:
        """Take another configuration; failed attempts go on counting."""
        if config.attempts_per_minute != self._config.attempts_per_minute:
            self._attempts = Attempts(config.attempts_per_minute)
        self._config = config

    def close(self) -> None:
        """Let the threads go; what they are at they finish."""
        self._passwords.close()

    async def _find(self, users: Users, attempt: Attempt) -> Account | None:
        """The user of that identity, by the first of the fields that has one.

        All fields are asked even so: how many were must not be seen from outside.
        """
        found: Account | None = None
        for name in _fields_to_try(users.login, attempt):
            shown = users.collection.by_name.get(name)
            if shown is not None and shown.column is not None:
                account = await self._accounts.find(users, shown.column, attempt.identity)
                found = found or account
        return found

    def _token(self, account: Account) -> str:
        key = account.token_key
        assert key is not None  # whoever has a password hash has a key
        return make_own(
            collection_id=account.record.collection_id,
            record_id=account.record.id,
            key=key + self._config.secret,
            expires_at=int(self._clock() + self._config.token_lifetime),
        )


def _place(users: Users) -> tuple[str, str]:
    return str(users.collection.table.name), users.login.password_hash


def _fields_to_try(login: CollectionLoginConfig, attempt: Attempt) -> tuple[str, ...]:
    """``email`` comes first for what looks like an address, and not at all for anything else."""
    if attempt.identity_field:
        return (attempt.identity_field,)
    others = tuple(name for name in login.identity if name != "email")
    is_address = "@" in attempt.identity.strip("@")
    return ("email", *others) if is_address and "email" in login.identity else others
