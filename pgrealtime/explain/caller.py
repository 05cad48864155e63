"""Who ``explain`` is asked about: a caller as the service would have it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

from pgrealtime.auth.account import Accounts
from pgrealtime.auth.authenticator import Authenticator, caller_of
from pgrealtime.auth.principal import AuthRecord, Caller, Guest, Superuser
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import Config
from pgrealtime.errors import AuthError
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.rules.engine.plan import columns_asked

_LAST_SECOND = 253_402_300_799.0
"""Of the year 9999, and of what a date can show."""


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whoever sends this token."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class User:
    """A record of an auth collection, as if it had a token that holds."""

    collection: str
    """Name or id."""
    id: str


Who: TypeAlias = Bearer | User | Guest | Superuser


async def introduced(
    config: Config, collections: Collections, pool: QueryPool, who: Who
) -> tuple[Caller, list[str]]:
    """Return the caller as the service would have it, and who that is."""
    logins = {name: collection.login for name, collection in config.collections.items()}
    accounts = Accounts(pool)
    authenticator = Authenticator(
        config.auth, collections, accounts, logins=logins, asked=columns_asked(collections)
    )
    match who:
        case Guest():
            return Caller(), ["guest"]
        case Superuser():
            return Caller(who), ["superuser"]
        case User():
            caller = await _user(authenticator, accounts, who)
            return caller, [_name(caller)]
        case Bearer(token):
            return await _bearer(authenticator, token)


async def _bearer(authenticator: Authenticator, token: str) -> tuple[Caller, list[str]]:
    try:
        caller = (await authenticator.identify(token)).caller
    except AuthError as refusal:
        return Caller(), ["guest", f"the token is refused: {refusal.error_code}: {refusal.message}"]
    if caller.expires_at is None:
        return caller, [f"{_name(caller)} (token without an end)"]
    end = datetime.fromtimestamp(min(caller.expires_at, _LAST_SECOND), UTC)
    return caller, [f"{_name(caller)} (token good until {end:%Y-%m-%d %H:%M:%S} UTC)"]


def _name(caller: Caller) -> str:
    match caller.principal:
        case AuthRecord(collection_name=name, id=record_id) if caller.reading is None:
            return f"{name}/{record_id}, by the token alone"
        case AuthRecord(collection_name=name, id=record_id):
            return f"{name}/{record_id}"
        case Superuser():
            return "superuser"
        case Guest():
            return "guest"


async def _user(authenticator: Authenticator, accounts: Accounts, who: User) -> Caller:
    users = authenticator.users(who.collection)
    if users is None or users.collection.type != "auth":
        raise AuthError(
            f'there is no auth collection "{who.collection}"',
            hint="Set type: auth for the collection that --user names.",
            code="user_unknown",
        )
    account = await accounts.load(users, who.id)
    if account is None:
        name = users.collection.name
        raise AuthError(f'"{name}" has no record "{who.id}"', code="user_unknown")
    return caller_of(account, None)
