"""A few collections made of plain values, for tests that need no server."""

from __future__ import annotations

from pgrealtime.catalog.model import Column, Table, TableKind
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind, Relation
from tests.column_types import TEXT, TEXTS, base_type

_TYPES = {
    FieldKind.TEXT: TEXT,
    FieldKind.RELATION: TEXT,
    FieldKind.NUMBER: base_type("int4", oid=23, category="N"),
    FieldKind.BOOL: base_type("bool", oid=16, category="B"),
    FieldKind.DATE: base_type("timestamptz", oid=1184, category="D"),
    FieldKind.JSON: base_type("jsonb", oid=3802, category="U"),
    FieldKind.GEO_POINT: base_type("point", oid=600, category="G"),
    FieldKind.BYTES: base_type("bytea", oid=17, category="U"),
}


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
    type_ = TEXTS if is_multiple else _TYPES[kind]
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
