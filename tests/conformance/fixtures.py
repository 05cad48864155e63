"""The data every recording starts from: collections, rows and accounts as PocketBase names them."""

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
    """Of a select: its options."""
    collection_id: str = ""
    """Of a relation: where it points."""
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
    """Stored as it is: no upload, no validation."""


class Account(_Part, frozen=True, kw_only=True):
    """Somebody who can log in."""

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
    """All of it."""

    superuser: SuperuserAccount
    accounts: dict[str, Account]
    collections: tuple[FixtureCollection, ...]
    rows: tuple[FixtureRow, ...]

    def collection(self, name_or_id: str) -> FixtureCollection:
        """The collection of that name or id."""
        return next(c for c in self.collections if name_or_id in {c.name, c.id})

    def account_id(self, account: Account) -> str:
        """The id of the account's record."""
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
