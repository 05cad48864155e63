"""A row of a users table as the caller it makes. The same for a row asked for and one streamed."""

from __future__ import annotations

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.changes import Row
from pgrealtime.collections import Collection, FieldKind
from pgrealtime.errors import AuthError


def auth_record(collection: Collection, row: Row) -> AuthRecord:
    """The six plain fields of ``@request.auth`` from a row image.

    ``email``, ``emailVisibility`` and ``verified`` are found by the names of the fields; one that
    the collection doesn't have, or that is NULL, is empty or false. A visible e-mail address is an
    explicit choice: without an ``emailVisibility`` field nobody made it (rules, section 17).

    Raises:
        AuthError: Code ``account_unknown``: the row has no key, as under an outer join.
    """
    key = row.get(collection.key.name)
    if key is None:
        raise AuthError("the row has no id", code="account_unknown")
    if collection.key.type.base.name == "bpchar":
        # Padding is no part of a char(n): casts and comparisons drop it.
        key = key.rstrip(" ")
    return AuthRecord(
        collection_id=collection.id,
        collection_name=collection.name,
        id=key,
        email=_value(collection, row, "email") or "",
        email_visibility=_flag(collection, row, "emailVisibility"),
        verified=_flag(collection, row, "verified"),
    )


def _value(collection: Collection, row: Row, name: str) -> str | None:
    field = collection.by_name.get(name)
    return None if field is None or field.column is None else row.get(field.column.name)


def _flag(collection: Collection, row: Row, name: str) -> bool:
    field = collection.by_name.get(name)
    is_bool = field is not None and field.kind is FieldKind.BOOL
    return is_bool and _value(collection, row, name) == "t"
