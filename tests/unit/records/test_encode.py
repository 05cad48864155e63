"""Whole records: members, order, hidden fields. The first two tests are from recordings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from pgrealtime.catalog.model import Column, Table, TableKind
from pgrealtime.changes import Row, TableName
from pgrealtime.collections.model import Collection, Field, FieldKind, Relation
from pgrealtime.records.encode import View, compile_encoder, unencodable_column
from tests.column_types import TEXT, array_of, base_type

SUPERUSER = View(sees_hidden=True, sees_email=True)


def field(name: str, kind: FieldKind, type_name: str = "text", **more: Any) -> Field:
    data_type = base_type(type_name)
    if more.get("is_multiple"):
        data_type = array_of(data_type)
    column = Column(name=more.pop("column", name), attribute_number=1, type=data_type)
    return Field(name=name, column=column, kind=kind, type=data_type, **more)


def collection(
    *fields: Field, name: str = "posts", id_: str = "pbc_posts0000001", type_: str = "base"
) -> Collection:
    key = Column(name="id", attribute_number=1, type=TEXT)
    return Collection(
        name=name,
        id=id_,
        type=type_,
        table=Table(oid=1, name=TableName("public", name), kind=TableKind.TABLE, columns=(key,)),
        key=key,
        fields=(Field(name="id", column=key, kind=FieldKind.TEXT, type=TEXT), *fields),
    )


POSTS = collection(
    field("title", FieldKind.TEXT),
    field("body", FieldKind.TEXT),
    field("views", FieldKind.NUMBER, "float8"),
    field("active", FieldKind.BOOL, "bool"),
    field("published", FieldKind.DATE, "timestamptz"),
    field("meta", FieldKind.JSON, "json"),
    field("loc", FieldKind.GEO_POINT, "point"),
    field("kind", FieldKind.TEXT, is_select=True),
    field("tags", FieldKind.TEXT, is_multiple=True, is_select=True),
    field("doc", FieldKind.FILE),
    field("pics", FieldKind.FILE, is_multiple=True),
    field("author", FieldKind.RELATION, relation=Relation(collection_name="members")),
    field(
        "editors",
        FieldKind.RELATION,
        is_multiple=True,
        relation=Relation(collection_name="members"),
    ),
    field("link", FieldKind.TEXT),
    field("mail", FieldKind.TEXT),
    field("secret", FieldKind.TEXT, is_hidden=True),
)

FULL: Row = {
    "id": "postfull0000001",
    "title": "Full 2",
    "body": "<p>a & b</p>",
    "views": "12.5",
    "active": "t",
    "published": "2024-02-03 04:05:06.789+00",
    "meta": '{"z": 1, "a": [1, 2, {"k": "v"}]}',
    "loc": "(12.34,-56.78)",
    "kind": "news",
    "tags": "{red,blue}",
    "doc": "readme_k3v9q1x7zz.txt",
    "pics": "{one_aaaaaaaaaa.png,two_bbbbbbbbbb.png}",
    "author": "memberann000001",
    "editors": "{memberann000001,memberben000001}",
    "link": "https://example.com/a?b=1&c=2",
    "mail": "info@example.com",
    "secret": "hush",
}

FULL_RECORD = (
    '{"active":true,"author":"memberann000001","body":"<p>a & b</p>",'
    '"collectionId":"pbc_posts0000001","collectionName":"posts","doc":"readme_k3v9q1x7zz.txt",'
    '"editors":["memberann000001","memberben000001"],"id":"postfull0000001","kind":"news",'
    '"link":"https://example.com/a?b=1&c=2","loc":{"lon":12.34,"lat":-56.78},'
    '"mail":"info@example.com","meta":{"z":1,"a":[1,2,{"k":"v"}]},'
    '"pics":["one_aaaaaaaaaa.png","two_bbbbbbbbbb.png"],"published":"2024-02-03 04:05:06.789Z",'
    '"tags":["red","blue"],"title":"Full 2","views":12.5}'
)

EMPTY_RECORD = (
    '{"active":false,"author":"","body":"","collectionId":"pbc_posts0000001",'
    '"collectionName":"posts","doc":"","editors":[],"id":"postempty000001","kind":"","link":"",'
    '"loc":{"lon":0,"lat":0},"mail":"","meta":null,"pics":[],"published":"","tags":[],"title":"",'
    '"views":0}'
)


def test_full_row_is_the_recorded_record() -> None:
    """Recording ``field_types_full``, byte for byte."""
    assert compile_encoder(POSTS, nulls="null", view=View())(FULL).decode() == FULL_RECORD
    assert compile_encoder(POSTS, nulls="zero", view=View())(FULL).decode() == FULL_RECORD


def test_row_of_nulls_is_the_recorded_record_with_zero_values() -> None:
    """Recording ``field_types_empty``, byte for byte."""
    row: Row = {**dict.fromkeys(FULL), "id": "postempty000001"}
    assert compile_encoder(POSTS, nulls="zero", view=View())(row).decode() == EMPTY_RECORD


def test_null_is_null_unless_zero_values_are_asked_for() -> None:
    row: Row = {**dict.fromkeys(FULL), "id": "p1"}
    record = json.loads(compile_encoder(POSTS, nulls="null", view=View())(row))
    always = {"id": "p1", "collectionId": "pbc_posts0000001", "collectionName": "posts"}
    assert record == {**dict.fromkeys(FULL.keys() - {"secret"}), **always}


def test_members_are_in_byte_order_whatever_the_column_order() -> None:
    """Upper case before lower, ASCII before the rest; not by the column's name."""
    names = [
        "é",
        "collectionIx",
        "a b",
        "a",
        "Z",
        "z",
        "_",
        "expanded",
        "collectionNameX",
        "\U0001f600",
        "\uffff",
    ]
    columns = collection(*(field(n, FieldKind.TEXT, column=f"c{i}") for i, n in enumerate(names)))
    row: Row = {"id": "1", **{f"c{i}": "x" for i in range(len(names))}}
    members = list(json.loads(compile_encoder(columns, nulls="null", view=View())(row)))
    assert members == sorted(
        [*names, "id", "collectionId", "collectionName"], key=lambda name: name.encode()
    )


def test_a_column_that_is_not_in_the_row_is_not_in_the_record() -> None:
    """Unknown isn't NULL: nothing is made up for it."""
    row = {name: value for name, value in FULL.items() if name not in {"meta", "views"}}
    record = json.loads(compile_encoder(POSTS, nulls="zero", view=View())(row))
    assert record == {
        name: value
        for name, value in json.loads(FULL_RECORD).items()
        if name not in {"meta", "views"}
    }


def test_hidden_fields_are_for_superusers() -> None:
    """Also if a client requests one by name."""
    seen = compile_encoder(POSTS, nulls="null", view=SUPERUSER)(FULL)
    assert json.loads(seen) == {**json.loads(FULL_RECORD), "secret": "hush"}

    picked = View(fields="secret,title")
    assert compile_encoder(POSTS, nulls="null", view=picked)(FULL) == b'{"title":"Full 2"}'


USERS = collection(
    field("name", FieldKind.TEXT),
    field("email", FieldKind.TEXT),
    field("emailVisibility", FieldKind.BOOL, "bool", column="email_visible"),
    field("password", FieldKind.TEXT, is_secret=True, is_hidden=True),
    field("tokenKey", FieldKind.TEXT, is_secret=True),
    name="users",
    id_="_pb_users_auth_",
    type_="auth",
)
USER: Row = {
    "id": "u1",
    "name": "Ann",
    "email": "ann@example.com",
    "email_visible": "f",
    "password": "$2a$10$hash",
    "tokenKey": "key",
}


def shown(users: Collection, row: Row, view: View) -> Mapping[str, Any]:
    record: Mapping[str, Any] = json.loads(compile_encoder(users, nulls="zero", view=view)(row))
    return record


def test_secrets_are_in_no_record() -> None:
    for view in (SUPERUSER, replace(SUPERUSER, fields="*,password,tokenKey"), View()):
        assert {"password", "tokenKey"}.isdisjoint(shown(USERS, USER, view))


@pytest.mark.parametrize(
    ("visible", "view", "is_shown"),
    [
        ("t", View(), True),
        ("f", View(), False),
        (None, View(), False),
        ("f", View(sees_email=True), True),
        ("f", View(sees_hidden=True), False),
        ("f", View(fields="email"), False),
        ("t", View(fields="email"), True),
    ],
)
def test_email_is_shown_if_visible_or_to_callers_that_may_see_it(
    visible: str | None, view: View, *, is_shown: bool
) -> None:
    """Otherwise the member is missing, not empty."""
    record = shown(USERS, {**USER, "email_visible": visible}, view)
    assert record.get("email") == ("ann@example.com" if is_shown else None)
    assert ("email" in record) == is_shown


def test_email_stays_unseen_while_its_visibility_is_unknown() -> None:
    row = {name: value for name, value in USER.items() if name != "email_visible"}
    assert "email" not in shown(USERS, row, View())

    fields = tuple(one for one in USERS.fields if one.name != "emailVisibility")
    assert "email" not in shown(replace(USERS, fields=fields), USER, View())


def test_email_of_a_base_collection_is_a_field_like_others() -> None:
    contacts = replace(USERS, type="base")
    assert shown(contacts, USER, View())["email"] == "ann@example.com"


def test_junction_relations_and_expand_are_passed_in_addition_to_the_row() -> None:
    """Ids as in a column: none empty, none twice. Without them the members are left out."""
    editors = Field(
        name="editors",
        column=None,
        kind=FieldKind.RELATION,
        type=TEXT,
        is_multiple=True,
        relation=Relation(collection_name="members"),
    )
    posts = collection(editors, field("zip", FieldKind.TEXT))
    encode = compile_encoder(posts, nulls="null", view=View())
    row: Row = {"id": "p1", "zip": "z"}
    head = b'{"collectionId":"pbc_posts0000001","collectionName":"posts",'

    assert encode(row) == head + b'"id":"p1","zip":"z"}'
    assert (
        encode(row, {"editors": ["a", "b", "a", ""]}, b'{"editors":[{"id":"a"}]}')
        == head + b'"editors":["a","b"],"expand":{"editors":[{"id":"a"}]},"id":"p1","zip":"z"}'
    )
    assert encode(row, {"editors": []}) == head + b'"editors":[],"id":"p1","zip":"z"}'
    assert row == {"id": "p1", "zip": "z"}, "the caller's row is left alone"


def test_fields_reach_into_what_a_column_holds() -> None:
    """Numbers keep their spelling, also when picked."""
    row: Row = {**FULL, "meta": '{"a": {"x": 1.50, "y": 2}, "b": 1}'}
    view = View(fields="title:excerpt(4,true), meta.a.x, loc.lat, expand.author.name, tags, nope")
    encode = compile_encoder(POSTS, nulls="null", view=view)
    assert encode(row, expand=b'{"author":{"id":"1","name":"Ann"},"editors":[]}') == (
        b'{"expand":{"author":{"name":"Ann"}},"loc":{"lat":-56.78},"meta":{"a":{"x":1.50}},'
        b'"tags":["red","blue"],"title":"Full..."}'
    )
    assert encode({**FULL, "meta": None}) == (
        b'{"loc":{"lat":-56.78},"meta":null,"tags":["red","blue"],"title":"Full..."}'
    )


def test_fields_that_cannot_be_read_count_as_none() -> None:
    for text in ("title:nope(1)", "title:excerpt(", "'title", ""):
        encode = compile_encoder(POSTS, nulls="null", view=View(fields=text))
        assert encode(FULL).decode() == FULL_RECORD


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"title": "x", "views": "1.5", "published": "2026-01-31 12:00:00+00"}, ""),
        ({"title": "x", "views": "1.5", "loc": "nowhere"}, "loc"),
        ({"title": "x", "views": "one"}, "views"),
    ],
)
def test_the_column_that_cannot_be_shown_is_found(row: dict[str, str | None], column: str) -> None:
    """The log names it: it is all that the operator learns of a record that isn't delivered."""
    assert unencodable_column(POSTS, {"id": "a", **row}, nulls="null") == column
