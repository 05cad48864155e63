"""Resolves the caller given to ``explain`` as the service would authenticate it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

from pgrealtime.auth.account import Account, AccountLoader
from pgrealtime.auth.authenticator import Authenticator, caller_of_account
from pgrealtime.auth.principal import AuthRecord, Caller, Guest, Superuser
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import Config
from pgrealtime.errors import AuthError
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.admission import Admission
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rules.rule_set import caller_columns_read_by_rules

_MAX_TIMESTAMP = 253_402_300_799.0
"""The end of the year 9999, the last that ``datetime`` can show."""


@dataclass(frozen=True, slots=True)
class BearerToken:
    """A caller identified by a token."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NamedUser:
    """A record of an auth collection, as if it had sent a valid token."""

    collection_name_or_id: str
    record_id: str


CallerSpec: TypeAlias = BearerToken | NamedUser | Guest | Superuser


async def resolve_caller(
    config: Config, collections: Collections, pool: QueryPool, spec: CallerSpec
) -> tuple[Caller, list[str]]:
    """Return the caller, and lines that describe it."""
    logins = {name: collection.login for name, collection in config.collections.items()}
    accounts = AccountLoader(pool)
    admission = Admission(QueryExecutor(pool), collections)
    authenticator = Authenticator(
        config.auth,
        collections,
        accounts,
        logins=logins,
        rule_columns=caller_columns_read_by_rules(collections),
        admission=admission,
    )
    match spec:
        case Guest():
            return Caller(), ["guest"]
        case Superuser():
            return Caller(spec), ["superuser"]
        case NamedUser():
            account = await _find_user(authenticator, accounts, spec)
            caller = caller_of_account(account, None)
            name = _describe_caller(caller)
            if not await admission.admits(account.users.collection, account.row):
                return Caller(), ["guest", f"the auth_rule doesn't admit {name}"]
            return caller, [name]
        case BearerToken(token):
            return await _resolve_token(authenticator, token)


async def _resolve_token(authenticator: Authenticator, token: str) -> tuple[Caller, list[str]]:
    try:
        authenticated = await authenticator.authenticate_token(token)
        await authenticator.require_admission(authenticated)
        caller = authenticated.caller
    except AuthError as refusal:
        return Caller(), ["guest", f"the token is refused: {refusal.error_code}: {refusal.message}"]
    if caller.expires_at is None:
        return caller, [f"{_describe_caller(caller)} (token does not expire)"]
    end = datetime.fromtimestamp(min(caller.expires_at, _MAX_TIMESTAMP), UTC)
    return caller, [f"{_describe_caller(caller)} (token valid until {end:%Y-%m-%d %H:%M:%S} UTC)"]


def _describe_caller(caller: Caller) -> str:
    match caller.principal:
        case AuthRecord(collection_name=name, id=record_id) if caller.read_point is None:
            return f"{name}/{record_id}, from the token alone"
        case AuthRecord(collection_name=name, id=record_id):
            return f"{name}/{record_id}"
        case Superuser():
            return "superuser"
        case Guest():
            return "guest"


async def _find_user(
    authenticator: Authenticator, accounts: AccountLoader, spec: NamedUser
) -> Account:
    users = authenticator.find_user_collection(spec.collection_name_or_id)
    if users is None or users.collection.type != "auth":
        raise AuthError(
            f'there is no auth collection "{spec.collection_name_or_id}"',
            hint="Set type: auth for the collection that --user names.",
            code="user_unknown",
        )
    account = await accounts.load(users, spec.record_id)
    if account is None:
        name = users.collection.name
        raise AuthError(f'"{name}" has no record "{spec.record_id}"', code="user_unknown")
    return account
