"""A few collections made of plain values, for tests that need no server."""

from __future__ import annotations

from dataclasses import replace

from pgrealtime.catalog.model import Column, Table, TableKind, Type, TypeKind
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind, Relation


def _type(oid: int, name: str, category: str) -> Type:
    return Type(oid=oid, schema="pg_catalog", name=name, kind=TypeKind.BASE, category=category)


_TEXT = _type(25, "text", "S")
_TYPES = {
    FieldKind.TEXT: _TEXT,
    FieldKind.RELATION: _TEXT,
    FieldKind.NUMBER: _type(23, "int4", "N"),
    FieldKind.BOOL: _type(16, "bool", "B"),
    FieldKind.DATE: _type(1184, "timestamptz", "D"),
    FieldKind.JSON: _type(3802, "jsonb", "U"),
    FieldKind.GEO_POINT: _type(600, "point", "G"),
    FieldKind.BYTES: _type(17, "bytea", "U"),
}
_TEXTS = replace(_type(1009, "_text", "A"), kind=TypeKind.ARRAY, element=_TEXT)


def field(
    name: str,
    kind: FieldKind = FieldKind.TEXT,
    *,
    to: str | None = None,
    is_multiple: bool = False,
    is_hidden: bool = False,
    is_select: bool = False,
) -> Field:
    """Return a field with a column of its name."""
    type_ = _TEXTS if is_multiple else _TYPES[kind]
    return Field(
        name=name,
        column=Column(name=name, attribute_number=1, type=type_),
        kind=kind,
        type=type_,
        is_multiple=is_multiple,
        is_hidden=is_hidden,
        is_select=is_select,
        relation=None if to is None else Relation(collection_name=to),
    )


def one(name: str, to: str) -> Field:
    """Return a single relation."""
    return field(name, FieldKind.RELATION, to=to)


def many(name: str, to: str) -> Field:
    """Return a relation to several."""
    return field(name, FieldKind.RELATION, to=to, is_multiple=True)


def collection(
    name: str, *fields: Field, kind: str = "base", list_rule: str | None = ""
) -> Collection:
    """Return a collection with these fields and an id."""
    own = (field("id"), *fields)
    columns = tuple(one.column for one in own if one.column is not None)
    return Collection(
        name=name,
        id=f"pbc_{name}",
        type=kind,
        table=Table(
            oid=1,
            name=TableName("public", name),
            kind=TableKind.TABLE,
            columns=columns,
            primary_key=("id",),
            unique_keys=(("id",),),
        ),
        key=columns[0],
        fields=own,
        list_rule=list_rule,
    )


USERS = collection(
    "users",
    field("email"),
    field("emailVisibility", FieldKind.BOOL),
    field("name"),
    field("level", FieldKind.NUMBER),
    field("pin", is_hidden=True),
    one("manager", "users"),
    many("groups", "teams"),
    kind="auth",
)
TEAMS = collection("teams", field("name"), one("lead", "users"))
POSTS = collection(
    "posts",
    field("title"),
    field("true"),
    field("views", FieldKind.NUMBER),
    field("published", FieldKind.BOOL),
    field("pub_date", FieldKind.DATE),
    field("data", FieldKind.JSON),
    field("loc", FieldKind.GEO_POINT),
    field("blob", FieldKind.BYTES),
    field("status", is_select=True),
    field("tags", is_multiple=True),
    field("internal", is_hidden=True),
    one("author", "users"),
    many("reviewers", "users"),
)
COMMENTS = collection("comments", one("post", "posts"), field("score", FieldKind.NUMBER))
LOCKED = collection("secrets", one("post", "posts"), list_rule=None)
COLLECTIONS = Collections((USERS, TEAMS, POSTS, COMMENTS, LOCKED))
