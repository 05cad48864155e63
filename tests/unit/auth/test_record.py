"""The caller that a row makes, and the changed caller when its row changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.auth.record import auth_record_of, digest_token_key, token_key_of, update_caller
from pgrealtime.catalog.model import Column, Table, TableKind, Type
from pgrealtime.changes import Row, TableName
from pgrealtime.collections.model import Collection, Field, FieldKind
from pgrealtime.config.model import CollectionLoginConfig
from pgrealtime.errors import AuthError
from tests.column_types import TEXT, base_type

BOOL = base_type("bool", oid=16, category="B")
CHAR = base_type("bpchar", oid=1042)


def column(name: str, number: int, type_: Type = TEXT) -> Column:
    return Column(name=name, attribute_number=number, type=type_)


def users(key_type: Type = TEXT, verified: Type = BOOL) -> Collection:
    columns = (
        column("id", 1, key_type),
        column("mail", 2),
        column("visible", 3, BOOL),
        column("verified", 4, verified),
        column("hash", 5),
        column("key", 6),
    )
    names = {"mail": "email", "visible": "emailVisibility"}
    fields = tuple(
        Field(
            name=names.get(c.name, c.name),
            column=c,
            kind=FieldKind.BOOL if c.type is BOOL else FieldKind.TEXT,
            type=c.type,
        )
        for c in columns
    )
    table = Table(oid=1, name=TableName("public", "users"), kind=TableKind.TABLE, columns=columns)
    return Collection(
        name="users", id="c1", type="auth", table=table, key=columns[0], fields=fields
    )


ROW: Row = {"id": "u1", "mail": "a@b.c", "visible": "t", "verified": "f", "hash": "h", "key": "k"}
ANN = AuthRecord(
    collection_id="c1", collection_name="users", id="u1", email="a@b.c", email_visibility=True
)
LOGIN = CollectionLoginConfig(password_hash="hash", token_key="key")


def test_the_plain_fields_are_found_by_their_names() -> None:
    assert auth_record_of(users(), ROW) == ANN


def test_null_is_empty_or_false() -> None:
    row: Row = {"id": "u1", "mail": None, "visible": None, "verified": None}

    assert auth_record_of(users(), row) == AuthRecord(
        collection_id="c1", collection_name="users", id="u1"
    )


def test_only_a_boolean_verifies() -> None:
    """A text "t" may mean anything."""
    assert auth_record_of(users(verified=TEXT), {**ROW, "verified": "t"}).verified is False


def test_padding_is_no_part_of_an_id() -> None:
    assert auth_record_of(users(key_type=CHAR), {**ROW, "id": "u1  "}).id == "u1"


def test_a_row_without_a_key_makes_no_caller() -> None:
    with pytest.raises(AuthError):
        auth_record_of(users(), {"id": None})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, "k"),
        ({**ROW, "key": None}, "h"),
        ({**ROW, "key": ""}, "h"),
        ({**ROW, "key": None, "hash": None}, None),
        ({**ROW, "key": "", "hash": ""}, None),
    ],
)
def test_a_user_has_a_key_of_its_own_or_none(row: Row, expected: str | None) -> None:
    assert token_key_of(LOGIN, row) == expected


SIGNED = Caller(ANN, 1000.0, digest_token_key("k"))


def test_a_changed_row_changes_its_caller() -> None:
    """Roles and addresses take effect at the next event (protocol, 8)."""
    row = {**ROW, "mail": "new@b.c", "verified": "t", "hash": "other"}

    assert update_caller(SIGNED, users(), LOGIN, row) == replace(
        SIGNED, principal=replace(ANN, email="new@b.c", verified=True)
    )


def test_a_changed_token_key_makes_a_guest() -> None:
    """PocketBase changes it with every password and address; the token is invalid then."""
    assert update_caller(SIGNED, users(), LOGIN, {**ROW, "key": "k2"}) == Caller()
    assert update_caller(SIGNED, users(), LOGIN, {**ROW, "key": None}) == Caller()


def test_without_a_token_key_a_changed_password_makes_a_guest() -> None:
    login = CollectionLoginConfig(password_hash="hash")
    caller = Caller(ANN, None, digest_token_key("h"))

    assert update_caller(caller, users(), login, ROW) == caller
    assert update_caller(caller, users(), login, {**ROW, "hash": "h2"}) == Caller()


def test_tokens_made_elsewhere_do_not_depend_on_the_row() -> None:
    caller = Caller(ANN, 1000.0)

    assert update_caller(caller, users(), LOGIN, {**ROW, "key": "k2", "hash": "h2"}) == caller


def test_what_the_wal_left_out_is_unchanged() -> None:
    assert update_caller(SIGNED, users(), LOGIN, {"id": "u1", "verified": "t"}) == replace(
        SIGNED, principal=replace(ANN, verified=True)
    )


@pytest.mark.parametrize("name", ["mail", "visible", "verified", "hash", "key"])
def test_a_generated_column_is_not_unchanged_because_no_image_has_it(name: str) -> None:
    """Otherwise former rights would stay.

    A generated token key matters only to tokens that it signed.
    """
    table = users().table
    columns = tuple(replace(c, is_generated=c.name == name) for c in table.columns)
    fields = tuple(replace(f, column=c) for f, c in zip(users().fields, columns, strict=True))
    made = replace(users(), table=replace(table, columns=columns), fields=fields)
    image = {column: value for column, value in ROW.items() if column != name}
    foreign = replace(SIGNED, token_key_digest=None)
    is_secret = name in {"hash", "key"}

    assert update_caller(SIGNED, made, LOGIN, image) == Caller(is_stale=True)
    assert update_caller(foreign, made, LOGIN, image) == (
        foreign if is_secret else Caller(is_stale=True)
    )
    assert update_caller(SIGNED, made, LOGIN, ROW) == SIGNED


def test_a_generated_column_that_rules_ask_for_is_known_no_more() -> None:
    table = users().table
    columns = tuple(replace(c, is_generated=c.name == "hash") for c in table.columns)
    made = replace(users(), table=replace(table, columns=columns))
    caller = replace(SIGNED, token_key_digest=None, row_values=(("mail", "a@b.c"), ("hash", "h")))

    assert update_caller(caller, made, LOGIN, {"id": "u1"}).row_values == (("mail", "a@b.c"),)
    assert update_caller(caller, made, LOGIN, ROW).row_values == caller.row_values


def test_a_caller_does_not_print_its_digest() -> None:
    assert "digest" not in repr(SIGNED)


def test_what_rules_ask_of_the_row_changes_with_it() -> None:
    """Another role applies from the next event on, also if only rules read it."""
    caller = replace(SIGNED, row_values=(("mail", "a@b.c"), ("hash", None)))

    assert update_caller(caller, users(), LOGIN, {**ROW, "mail": "n@b.c"}).row_values == (
        ("mail", "n@b.c"),
        ("hash", "h"),
    )
    assert update_caller(caller, users(), LOGIN, {"id": "u1"}).row_values == caller.row_values
