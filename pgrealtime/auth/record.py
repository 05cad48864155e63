"""A row of a users table as the caller it makes. The same for a row asked for and one streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, FieldKind, unpadded_id
from pgrealtime.config.model import CollectionLoginConfig
from pgrealtime.errors import AuthError


def auth_record_of(collection: Collection, row: Row) -> AuthRecord:
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
    return AuthRecord(
        collection_id=collection.id,
        collection_name=collection.name,
        id=unpadded_id(collection, key),
        email=_field_value(collection, row, "email") or "",
        email_visibility=_bool_field_value(collection, row, "emailVisibility"),
        verified=_bool_field_value(collection, row, "verified"),
    )


def token_key_of(login: CollectionLoginConfig, row: Row) -> str | None:
    """The user's own part of the key that signs login tokens; None: no token is the user's.

    Rows that never got a token key have their password hash instead, as tables without that
    column: an empty one would leave all those users with one and the same signing key.
    """
    return row.get(login.token_key) or row.get(login.password_hash) or None


def digest_token_key(key: str) -> bytes:
    """What a caller carries of a token key: enough to see it change, of no use to anybody else."""
    return sha256(key.encode()).digest()


def update_caller(
    caller: Caller, collection: Collection, login: CollectionLoginConfig, row: Row
) -> Caller:
    """The caller as the new image of its row makes it; a guest if its token key is another.

    A lost one (``Caller.is_lost``) if the image doesn't have what its principal or key is made of.

    Args:
        caller: Whose principal is the record of this row.
        collection: Of the record.
        login: How its people log in.
        row: The new image. Columns that the WAL left out are unchanged, generated ones aside, which
            no image has: what they are now is not known, and so asked for again.
    """
    assert isinstance(caller.principal, AuthRecord)
    if any(name not in row for name in _required_generated_columns(caller, collection, login)):
        return Caller(is_stale=True)
    is_key_known = all(name in row for name in login.secret_columns)
    if caller.token_key_digest is not None and is_key_known:
        key = token_key_of(login, row)
        if key is None or digest_token_key(key) != caller.token_key_digest:
            return Caller()
    whole = {**_row_of_record(collection, caller.principal), **row}
    own = tuple(
        (name, row.get(name, known))
        for name, known in caller.row_values
        if name in row or not _is_generated(collection, name)
    )
    return replace(caller, principal=auth_record_of(collection, whole), row_values=own)


def _required_generated_columns(
    caller: Caller, collection: Collection, login: CollectionLoginConfig
) -> Iterator[str]:
    """Yield the generated columns among those that the caller can't be without."""
    assert isinstance(caller.principal, AuthRecord)
    secret = login.secret_columns if caller.token_key_digest is not None else ()
    for name in (*_row_of_record(collection, caller.principal), *secret):
        if _is_generated(collection, name):
            yield name


def _is_generated(collection: Collection, name: str) -> bool:
    column = collection.table.find_column(name)
    return column is not None and column.is_generated


def _row_of_record(collection: Collection, record: AuthRecord) -> Row:
    """The columns that the record was made of."""
    values = {
        "email": record.email,
        "emailVisibility": "t" if record.email_visibility else "f",
        "verified": "t" if record.verified else "f",
    }
    shown = ((collection.fields_by_name.get(name), value) for name, value in values.items())
    columns = {f.column.name: value for f, value in shown if f is not None and f.column is not None}
    return {collection.key.name: record.id, **columns}


def _field_value(collection: Collection, row: Row, name: str) -> str | None:
    field = collection.fields_by_name.get(name)
    return None if field is None or field.column is None else row.get(field.column.name)


def _bool_field_value(collection: Collection, row: Row, name: str) -> bool:
    field = collection.fields_by_name.get(name)
    is_bool = field is not None and field.kind is FieldKind.BOOL
    return is_bool and _field_value(collection, row, name) == "t"
