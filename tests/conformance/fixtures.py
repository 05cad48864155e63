"""The data that every recording starts from.

Collections, rows and accounts, named as in PocketBase.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

FieldType = Literal[
    "text",
    "editor",
    "email",
    "url",
    "number",
    "bool",
    "date",
    "autodate",
    "json",
    "geoPoint",
    "select",
    "file",
    "relation",
]


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    pass


class FixtureField(_Part, frozen=True, kw_only=True):
    """A field of its own that a collection has."""

    name: str
    type: FieldType
    hidden: bool = False
    max_select: int = 1
    values: tuple[str, ...] = ()
    """The options of a select."""
    collection_id: str = ""
    """The target collection of a relation."""
    cascade_delete: bool = False
    on_create: bool = False
    on_update: bool = False

    @property
    def is_multiple(self) -> bool:
        return self.max_select > 1


class FixtureCollection(_Part, frozen=True, kw_only=True):
    """A collection with its rules."""

    id: str
    name: str
    type: Literal["base", "auth"]
    list_rule: str | None
    view_rule: str | None
    manage_rule: str | None = None
    fields: tuple[FixtureField, ...]


class FixtureRow(_Part, frozen=True, kw_only=True):
    """A record, by member names."""

    collection: str
    data: dict[str, Any]
    raw: bool = False
    """True if the row is stored as it is: no upload, no validation."""


class Account(_Part, frozen=True, kw_only=True):
    """A user that can log in."""

    collection: str
    identity: str
    password: str


class SuperuserAccount(_Part, frozen=True, kw_only=True):
    """The one superuser."""

    email: str
    password: str


SUPERUSERS = "_superusers"
"""PocketBase's collection of superusers."""


class Fixtures(_Part, frozen=True, kw_only=True):
    """All collections, rows and accounts of a recording."""

    superuser: SuperuserAccount
    accounts: dict[str, Account]
    collections: tuple[FixtureCollection, ...]
    rows: tuple[FixtureRow, ...]

    def collection(self, name_or_id: str) -> FixtureCollection:
        """Return the collection of that name or id."""
        return next(c for c in self.collections if name_or_id in {c.name, c.id})

    def account_id(self, account: Account) -> str:
        """Return the id of the account's record."""
        return next(
            str(row.data["id"])
            for row in self.rows
            if row.collection == account.collection and row.data.get("email") == account.identity
        )


def load_fixtures(path: Path) -> Fixtures:
    """Return the fixtures in a file.

    Raises:
        msgspec.ValidationError: A member is missing, unknown or of the wrong type.
    """
    return msgspec.json.decode(path.read_bytes(), type=Fixtures)
