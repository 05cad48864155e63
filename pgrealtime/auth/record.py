"""Makes a caller from a row of a users table, be it read (``auth.account``) or streamed (hub)."""

from dataclasses import replace
from hashlib import sha256

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, FieldKind, unpadded_id
from pgrealtime.config.model import CollectionLoginConfig
from pgrealtime.errors import AuthError


def auth_record_of(collection: Collection, row: Row) -> AuthRecord:
    """Return the auth record of a row.

    ``email``, ``emailVisibility`` and ``verified`` are the columns of the fields with these names;
    missing or NULL they are empty or false, so that an address is visible only by an explicit
    choice (rules, section 17).

    Raises:
        AuthError: Code ``account_unknown``: the key is NULL, as under an outer join.
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
    """Return the user's part of the key that signs login tokens; None if no token can be valid.

    A table without that column, or a row where it is empty, uses the password hash: an empty
    part would leave all such users with the same signing key.
    """
    return row.get(login.token_key) or row.get(login.password_hash) or None


def digest_token_key(key: str) -> bytes:
    """Return what a caller keeps of a token key: enough to see it change, not to sign with."""
    return sha256(key.encode()).digest()


def update_caller(
    caller: Caller, collection: Collection, login: CollectionLoginConfig, row: Row
) -> Caller:
    """Return the caller after its row was updated; a guest if its token key changed.

    A column that the new image lacks is unchanged, except a generated one, which the WAL never
    has: if the caller needs one, it becomes stale (``Caller.is_stale``).
    """
    assert isinstance(caller.principal, AuthRecord)
    secrets = login.secret_columns if caller.token_key_digest is not None else ()
    known_row = _row_of_record(collection, caller.principal)
    if any(n in collection.generated_columns and n not in row for n in (*known_row, *secrets)):
        return Caller(is_stale=True)
    is_key_known = all(name in row for name in login.secret_columns)
    if caller.token_key_digest is not None and is_key_known:
        # Changing password or token key ends the sessions, as in PocketBase.
        key = token_key_of(login, row)
        if key is None or digest_token_key(key) != caller.token_key_digest:
            return Caller()
    whole = {**known_row, **row}
    own = tuple(
        (name, row.get(name, known))
        for name, known in caller.row_values
        if name in row or name not in collection.generated_columns
    )
    record = replace(auth_record_of(collection, whole), claims=caller.principal.claims)
    return replace(caller, principal=record, row_values=own)


def _row_of_record(collection: Collection, record: AuthRecord) -> Row:
    """Return the columns from which the record was made."""
    values = {
        "email": record.email,
        "emailVisibility": "t" if record.email_visibility else "f",
        "verified": "t" if record.verified else "f",
    }
    columns = ((collection.column_of(name), value) for name, value in values.items())
    known = {column.name: value for column, value in columns if column is not None}
    return {collection.key.name: record.id, **known}


def _field_value(collection: Collection, row: Row, name: str) -> str | None:
    column = collection.column_of(name)
    return None if column is None else row.get(column.name)


def _bool_field_value(collection: Collection, row: Row, name: str) -> bool:
    field = collection.fields_by_name.get(name)
    is_bool = field is not None and field.kind is FieldKind.BOOL
    return is_bool and _field_value(collection, row, name) == "t"
