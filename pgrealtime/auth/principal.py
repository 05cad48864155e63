"""Who makes a request: guest, auth record or superuser, and how long that is valid.

Made by ``auth.authenticator``, changed by the stream (``auth.record.update_caller``), read by rules
and records.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

from pgrealtime.snapshot import ReadPoint


@dataclass(frozen=True, slots=True)
class Guest:
    """A caller without a token, or with one that isn't valid."""


ClaimValue: TypeAlias = str | int | float | None
"""A claim as rules compare it: booleans as 1 and 0, objects and lists as JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthRecord:
    """A record of an auth collection: the six fields that ``@request.auth`` always has."""

    collection_id: str
    collection_name: str
    id: str
    email: str = ""
    email_visibility: bool = False
    verified: bool = False
    claims: tuple[tuple[str, ClaimValue], ...] = ()
    """Name in rules and value of configured claims of the token, which no row has."""


@dataclass(frozen=True, slots=True)
class Superuser:
    """A caller for whom every rule is true and no field hidden."""

    id: str
    """Of the token; superusers with different ids are different callers."""


Principal: TypeAlias = Guest | AuthRecord | Superuser

GUEST = Guest()


def is_same_principal(first: Principal, second: Principal) -> bool:
    """Whether both are the same record or superuser, with whatever values of its fields."""
    if isinstance(first, AuthRecord) and isinstance(second, AuthRecord):
        return (first.collection_id, first.id) == (second.collection_id, second.id)
    return first == second


@dataclass(frozen=True, slots=True)
class Caller:
    """A principal with what decides how long it is valid."""

    principal: Principal = GUEST
    expires_at: float | None = None
    """Unix seconds at which the token expires; None for guests and tokens without ``exp``."""
    token_key_digest: bytes | None = field(default=None, repr=False)
    """Digest of the user's token key, for tokens of our login, which it signs. When the row has
    another key, the caller becomes a guest. None for tokens of issuers, which stay valid when an
    application stores a new password hash."""
    trust_digest: bytes | None = field(default=None, repr=False, compare=False)
    """Digest of the configured key that verified the token and of the claims required with it.
    When no issuer has this digest any more, the caller becomes a guest. None for guests."""
    read_point: ReadPoint | None = field(default=None, repr=False, compare=False)
    """Of the statement that read the principal's row; None if there is no row. What that statement
    could not see may have changed the row."""
    row_values: tuple[tuple[str, str | None], ...] = field(default=(), repr=False)
    """Name and text of further columns of the row that rules read as ``@request.auth``."""
    is_stale: bool = False
    """A guest until its row is read again: the row changed in columns that the WAL doesn't have."""

    @property
    def own_row(self) -> dict[str, str | None] | None:
        """``row_values`` as a row; None if rules read none."""
        return dict(self.row_values) or None


AccountKey: TypeAlias = tuple[str, str]
"""Name of an auth collection and id of a record in it."""


def account_of(caller: Caller) -> AccountKey | None:
    """Return the account of a caller; None for guests and superusers."""
    record = caller.principal
    return (record.collection_name, record.id) if isinstance(record, AuthRecord) else None
