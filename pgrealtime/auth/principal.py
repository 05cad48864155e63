"""The three kinds of callers, as rules and records see them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


@dataclass(frozen=True, slots=True)
class Guest:
    """Nobody in particular: no token, or one that doesn't hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthRecord:
    """A record of an auth collection. The six plain fields of ``@request.auth`` and no more."""

    collection_id: str
    collection_name: str
    id: str
    email: str = ""
    email_visibility: bool = False
    verified: bool = False


@dataclass(frozen=True, slots=True)
class Superuser:
    """Passes every rule, sees every field."""

    id: str
    """As the token names it; two superusers are the same caller only if it is equal."""


Principal: TypeAlias = Guest | AuthRecord | Superuser

GUEST = Guest()


def is_same_principal(first: Principal, second: Principal) -> bool:
    """Whether both are the same record, whatever token or state of it they carry."""
    match first, second:
        case AuthRecord(), AuthRecord():
            return (first.collection_id, first.id) == (second.collection_id, second.id)
        case _:
            return first == second


class ReadPointText(NamedTuple):
    """When a row was read, in Postgres's own words: what is newer may have changed it."""

    snapshot: str
    """``pg_current_snapshot()`` of the statement that read it."""
    insert_lsn: str
    """``pg_current_wal_insert_lsn()`` at that time or a little later."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from, and until when that holds."""

    principal: Principal = GUEST
    expires_at: float | None = None
    """Unix seconds at which the token expires; None for guests and tokens without an end."""
    token_key_digest: bytes | None = field(default=None, repr=False)
    """Of the user's token key, if that has signed the token, as with those of our login. When
    the row's key has another digest, connections opened with this one are nobody's. None for the
    tokens of issuers: an application that stores a new hash at a login doesn't end those."""
    trust_digest: bytes | None = field(default=None, repr=False, compare=False)
    """Of the configured key, and of what else is asked of tokens signed with it: when no issuer has
    this digest any more, the token is nobody's. None for guests."""
    read_point: ReadPointText | None = field(default=None, repr=False, compare=False)
    """When the principal's row was read; None if there is no row."""
    row_values: tuple[tuple[str, str | None], ...] = field(default=(), repr=False)
    """Columns of that row, in text form, which rules ask for under ``@request.auth``: those that
    the principal doesn't carry."""
    is_stale: bool = False
    """A guest for want of knowing better: its row changed in what no image of it has, so that it
    must be looked up anew."""

    @property
    def own_row(self) -> dict[str, str | None] | None:
        """``own`` as a row; None if rules ask for none of it."""
        return dict(self.row_values) or None


AccountKey: TypeAlias = tuple[str, str]
"""Name of an auth collection and id of a record in it."""


def account_of(caller: Caller) -> AccountKey | None:
    """Whose row makes the caller what it is; None for guests and superusers."""
    match caller.principal:
        case AuthRecord() as record:
            return record.collection_name, record.id
        case _:
            return None
