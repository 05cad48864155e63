from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from pgrealtime.catalog.model import (
    Catalog,
    Column,
    ForeignKey,
    ReplicaIdentity,
    Table,
    TableKind,
    Type,
    TypeKind,
)
from pgrealtime.changes import TableName
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.field_kinds import field_kind_of
from pgrealtime.collections.model import (
    Collection,
    Collections,
    Field,
    FieldKind,
    Junction,
    Relation,
    derive_collection_id,
)
from pgrealtime.collections.names import configured_table_names
from pgrealtime.errors import ConfigError, ConfigProblem
from tests.column_types import array_of, base_type
from tests.config_values import parse_config

# -- short constructors for catalogues


def domain_of(below: Type) -> Type:
    return Type(
        oid=0, schema="public", name="a_domain", kind=TypeKind.DOMAIN, category="U", domain_of=below
    )


MOOD = Type(oid=0, schema="public", name="mood", kind=TypeKind.ENUM, category="E")
ADDRESS = Type(oid=0, schema="public", name="address", kind=TypeKind.COMPOSITE, category="C")


def table(
    name: str, columns: Mapping[str, str | Type], *, key: tuple[str, ...] = ("id",), **more: Any
) -> Table:
    """Return a table in public; columns by name and type, the key's NOT NULL."""
    made = Table(
        oid=1,
        name=TableName("public", name),
        kind=TableKind.TABLE,
        columns=tuple(
            Column(
                name=column,
                attribute_number=number,
                type=base_type(type_) if isinstance(type_, str) else type_,
                not_null=column in key,
            )
            for number, (column, type_) in enumerate(columns.items(), start=1)
        ),
        primary_key=key,
        unique_keys=(key,) if key else (),
        replica_identity_columns=key,
    )
    return replace(made, **more)


def points(column: str, target: str, target_column: str = "id") -> ForeignKey:
    return ForeignKey(
        name=f"{column}_fkey",
        column_names=(column,),
        target=TableName("public", target),
        target_column_names=(target_column,),
    )


USERS = table("users", {"id": "uuid", "email": "text", "password_hash": "text"})
POSTS = table(
    "posts",
    {"id": "int8", "title": "text", "author_id": "uuid", "reviewers": array_of(base_type("uuid"))},
    foreign_keys=(points("author_id", "users"),),
)
LIKES = table(
    "likes",
    {"post_id": "int8", "user_id": "uuid"},
    key=("post_id", "user_id"),
    foreign_keys=(points("post_id", "posts"), points("user_id", "users")),
)


def built(configured: Mapping[str, Any], *tables: Table) -> Collections:
    catalog = Catalog(
        tables={one.name: one for one in tables}, server_version=170000, schemas=("public",)
    )
    return build_collections(parse_config({"collections": configured}).collections, catalog)


def problems_of(configured: Mapping[str, Any], *tables: Table) -> tuple[ConfigProblem, ...]:
    with pytest.raises(ConfigError) as caught:
        built(configured, *tables)
    return caught.value.problems


def field_of(collection: Collection, name: str) -> Field:
    return collection.fields_by_name[name]


# -- collections


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("base", "_mfas", "pbc_2279338944"),
        ("base", "_otps", "pbc_1638494021"),
        ("base", "_externalAuths", "pbc_2281828961"),
        ("base", "_authOrigins", "pbc_4275539003"),
        ("auth", "_superusers", "pbc_3142635823"),
    ],
)
def test_ids_are_derived_as_pocketbase_does(kind: str, name: str, expected: str) -> None:
    """Clients may subscribe by id. These are of a new PocketBase 0.40.6."""
    assert derive_collection_id(kind, name) == expected


def test_a_table_becomes_a_collection() -> None:
    posts = built({"posts": {"table": "posts", "list_rule": "", "view_rule": "id = 1"}}, POSTS)[
        "posts"
    ]

    assert (posts.name, posts.id, posts.type) == ("posts", "pbc_1125843985", "base")
    assert posts.table == POSTS
    assert posts.key == POSTS.columns[0]
    assert (posts.list_rule, posts.view_rule) == ("", "id = 1")
    assert [(one.name, one.kind, one.is_multiple) for one in posts.fields] == [
        ("id", FieldKind.TEXT, False),
        ("title", FieldKind.TEXT, False),
        ("author_id", FieldKind.TEXT, False),
        ("reviewers", FieldKind.TEXT, True),
    ]


@pytest.mark.parametrize("text", ["posts", "public.posts", 'public."posts"', '"public"."posts"'])
def test_a_table_is_named_with_or_without_schema_and_quotes(text: str) -> None:
    assert built({"p": {"table": text}}, POSTS)["p"].table == POSTS


def test_table_names_are_exact() -> None:
    """As in the catalogue, upper case and odd characters included."""
    odd = table('Odd."Name', {"id": "text"})
    assert built({"odd": {"table": 'public."Odd.""Name"'}}, odd)["odd"].table == odd
    assert problems_of({"p": {"table": "public.Posts"}}, POSTS) == (
        ConfigProblem(
            "collections.p.table",
            'there is no table "public.Posts"',
            'perhaps you meant "public.posts"',
        ),
    )


def test_an_unqualified_name_is_looked_up_in_the_schemas_in_their_order() -> None:
    other = replace(POSTS, name=TableName("app", "posts"))
    catalog = Catalog(
        tables={POSTS.name: POSTS, other.name: other},
        server_version=170000,
        schemas=("app", "public"),
    )
    config = parse_config({"collections": {"posts": {"table": "posts"}}}).collections
    assert build_collections(config, catalog)["posts"].table == other


def test_the_tables_to_read_are_those_named_and_those_of_junctions() -> None:
    config = parse_config(
        {
            "collections": {
                "posts": {
                    "table": "posts",
                    "relations": {"likes": {"collection": "users", "through": "app.likes"}},
                },
                "users": {"table": 'auth."Users"'},
            }
        }
    )
    assert configured_table_names(config.collections, ["public", "app"]) == (
        TableName("public", "posts"),
        TableName("app", "posts"),
        TableName("auth", "Users"),
        TableName("app", "likes"),
    )


# -- fields


@pytest.mark.parametrize(
    ("data_type", "expected"),
    [
        *((base_type(name), (FieldKind.TEXT, False)) for name in ("text", "varchar", "bpchar")),
        *((base_type(name), (FieldKind.TEXT, False)) for name in ("uuid", "inet", "interval")),
        *((base_type(name), (FieldKind.TEXT, False)) for name in ("money", "time", "int4range")),
        *((base_type(name), (FieldKind.NUMBER, False)) for name in ("int2", "int4", "int8")),
        *((base_type(name), (FieldKind.NUMBER, False)) for name in ("numeric", "float4", "float8")),
        (base_type("bool"), (FieldKind.BOOL, False)),
        *((base_type(name), (FieldKind.DATE, False)) for name in ("timestamptz", "date")),
        (base_type("timestamp"), (FieldKind.DATE, False)),
        *((base_type(name), (FieldKind.JSON, False)) for name in ("json", "jsonb")),
        (base_type("point"), (FieldKind.GEO_POINT, False)),
        (base_type("bytea"), (FieldKind.BYTES, False)),
        (ADDRESS, (FieldKind.COMPOSITE, False)),
        (MOOD, (FieldKind.TEXT, False)),
        (base_type("citext", schema="public"), (FieldKind.TEXT, False)),
        (base_type("bool", schema="public"), (FieldKind.TEXT, False)),
        (array_of(base_type("text")), (FieldKind.TEXT, True)),
        (array_of(base_type("int4")), (FieldKind.NUMBER, True)),
        (array_of(domain_of(base_type("int4"))), (FieldKind.NUMBER, True)),
        (domain_of(domain_of(base_type("timestamptz"))), (FieldKind.DATE, False)),
        (domain_of(array_of(base_type("bool"))), (FieldKind.BOOL, True)),
    ],
    ids=lambda value: value.name if isinstance(value, Type) else "",
)
def test_a_columns_type_says_the_kind_of_field(
    data_type: Type, expected: tuple[FieldKind, bool]
) -> None:
    assert field_kind_of(data_type) == expected


def test_what_types_can_not_say_the_configuration_does() -> None:
    files = table(
        "files",
        {
            "id": "text",
            "file": "text",
            "files": array_of(base_type("text")),
            "place": "jsonb",
            "state": "text",
            "number": "int8",
        },
    )
    types = {
        "file": "file",
        "files": "file",
        "place": "geoPoint",
        "state": "select",
        "number": "text",
    }
    fields = built({"f": {"table": "files", "fields": {"types": types}}}, files)["f"].fields
    assert [(one.name, one.kind, one.is_multiple, one.is_select) for one in fields] == [
        ("id", FieldKind.TEXT, False, False),
        ("file", FieldKind.FILE, False, False),
        ("files", FieldKind.FILE, True, False),
        ("place", FieldKind.GEO_POINT, False, False),
        ("state", FieldKind.TEXT, False, True),
        ("number", FieldKind.TEXT, False, False),
    ]


def test_fields_are_left_out_hidden_and_renamed() -> None:
    config = {
        "table": "posts",
        "fields": {
            "include": ["title", "author_id"],
            "hide": ["author"],
            "rename": {"author_id": "author"},
        },
    }
    fields = built({"posts": config}, POSTS)["posts"].fields
    assert [(one.name, one.is_hidden) for one in fields] == [
        ("id", False),
        ("title", False),
        ("author", True),
    ]


def test_the_key_is_shown_as_id_whatever_its_name() -> None:
    tags = table("tags", {"tag_no": "int4", "label": "text"}, key=("tag_no",))
    assert [one.name for one in built({"tags": {"table": "tags"}}, tags)["tags"].fields] == [
        "id",
        "label",
    ]


def test_a_unique_column_can_be_the_id() -> None:
    events = table(
        "events",
        {"at": "date", "no": "int4", "slug": "text"},
        key=("at", "no"),
        unique_keys=(("at", "no"), ("slug",)),
        replica_identity=ReplicaIdentity.FULL,
        replica_identity_columns=("at", "no", "slug"),
    )
    slug = replace(events.columns[2], not_null=True)
    events = replace(events, columns=(*events.columns[:2], slug))
    collection = built({"events": {"table": "events", "id": "slug"}}, events)["events"]
    assert collection.key == slug
    assert [one.name for one in collection.fields] == ["at", "no", "id"]


def test_the_id_of_several_key_columns_is_one_more_column_and_they_are_fields() -> None:
    """What reads the table, junctions included, goes on as if it had the column."""
    likes = built({"likes": {"table": "likes"}, "users": {"table": "users"}}, LIKES, USERS)["likes"]

    assert [(one.name, one.kind.value) for one in likes.fields] == [
        ("post_id", "number"),
        ("user_id", "relation"),
        ("id", "text"),
    ]
    assert likes.key.id_sources == ("post_id", "user_id")
    assert likes.key == likes.table.id_column
    assert likes.has_unique_key
    assert [one.column.name for one in likes.order] == ["post_id", "user_id"]


def test_auth_collections_keep_secrets_and_know_pocketbases_fields() -> None:
    people = table(
        "people",
        {
            "id": "text",
            "email": "text",
            "email_visibility": "bool",
            "verified": "bool",
            "password_hash": "text",
            "tokenKey": "text",
            "pin": "text",
        },
    )
    auth = built(
        {"people": {"table": "people", "type": "auth", "login": {"token_key": "pin"}}}, people
    )["people"]
    assert [(one.name, one.is_secret, one.is_hidden) for one in auth.fields] == [
        ("id", False, False),
        ("email", False, False),
        ("emailVisibility", False, False),
        ("verified", False, False),
        ("password_hash", True, True),
        ("tokenKey", True, True),
        ("pin", True, True),
    ]
    base = built({"people": {"table": "people"}}, people)["people"]
    assert field_of(base, "email_visibility").kind is FieldKind.BOOL
    assert not any(one.is_secret for one in base.fields)


# -- relations


def test_foreign_keys_between_collections_are_relations() -> None:
    posts = built({"posts": {"table": "posts"}, "people": {"table": "users"}}, POSTS, USERS)[
        "posts"
    ]
    author = field_of(posts, "author_id")
    assert (author.kind, author.relation) == (
        FieldKind.RELATION,
        Relation(collection_name="people"),
    )


def test_foreign_keys_to_no_collection_or_no_id_are_plain_columns() -> None:
    by_email = replace(POSTS, foreign_keys=(points("author_id", "users", "email"),))
    config = {"posts": {"table": "posts"}, "users": {"table": "users"}}
    assert field_of(built(config, by_email, USERS)["posts"], "author_id").relation is None
    alone = built({"posts": {"table": "posts"}}, POSTS)
    assert field_of(alone["posts"], "author_id").relation is None


def test_an_array_of_ids_is_a_relation_if_the_configuration_says_so() -> None:
    config = {
        "posts": {"table": "posts", "relations": {"reviewers": {"collection": "users"}}},
        "users": {"table": "users"},
    }
    reviewers = field_of(built(config, POSTS, USERS)["posts"], "reviewers")
    assert (reviewers.kind, reviewers.is_multiple) == (FieldKind.RELATION, True)
    assert reviewers.relation == Relation(collection_name="users")


def test_a_junction_table_is_a_relation_and_finds_its_columns_by_itself() -> None:
    config: dict[str, Any] = {
        "posts": {
            "table": "posts",
            "relations": {"liked_by": {"collection": "users", "through": "likes"}},
            "fields": {"hide": ["liked_by"]},
        },
        "users": {"table": "users"},
    }
    expected = Field(
        name="liked_by",
        column=None,
        kind=FieldKind.RELATION,
        type=LIKES.columns[1].type,
        is_multiple=True,
        is_hidden=True,
        relation=Relation(
            collection_name="users",
            junction=Junction(table=LIKES, source_column="post_id", target_column="user_id"),
        ),
    )
    assert built(config, POSTS, USERS, LIKES)["posts"].fields[-1] == expected

    config["posts"]["relations"]["liked_by"] |= {"source": "post_id", "target": "user_id"}
    without_keys = replace(LIKES, foreign_keys=())
    found = built(config, POSTS, USERS, without_keys)["posts"].fields[-1].relation
    assert found is not None
    assert found.junction == Junction(
        table=without_keys, source_column="post_id", target_column="user_id"
    )


def test_a_junction_from_a_table_to_itself_needs_its_columns() -> None:
    follows = table(
        "follows",
        {"who": "uuid", "whom": "uuid"},
        key=("who", "whom"),
        foreign_keys=(points("who", "users"), points("whom", "users")),
    )
    relation = {"collection": "users", "through": "follows"}
    config = {"users": {"table": "users", "relations": {"follows": relation}}}
    message = 'more than one foreign key of "public.follows" points to "users"'
    assert problems_of(config, USERS, follows) == (
        ConfigProblem("collections.users.relations.follows.source", message, "name the column"),
        ConfigProblem("collections.users.relations.follows.target", message, "name the column"),
    )


# -- tables that can't be served, and the remedy


@pytest.mark.parametrize(
    ("faulty", "config", "problem"),
    [
        (
            replace(POSTS, kind=TableKind.VIEW),
            {},
            ConfigProblem(
                "table",
                '"public.posts" is a view: it sends no changes',
                "set stream: false to read it only",
            ),
        ),
        (
            replace(POSTS, kind=TableKind.MATERIALIZED_VIEW),
            {},
            ConfigProblem(
                "table",
                '"public.posts" is a materialized view: it sends no changes',
                "set stream: false to read it only",
            ),
        ),
        (
            replace(POSTS, kind=TableKind.FOREIGN),
            {},
            ConfigProblem(
                "table",
                '"public.posts" is a foreign table: it sends no changes',
                "set stream: false to read it only",
            ),
        ),
        (
            replace(POSTS, partition_of=TableName("public", "all_posts")),
            {},
            ConfigProblem(
                "table",
                '"public.posts" is a partition of "public.all_posts"',
                "set table: public.all_posts",
            ),
        ),
        (
            replace(POSTS, is_unlogged=True),
            {},
            ConfigProblem(
                "table",
                '"public.posts" is unlogged: it sends no changes',
                'ALTER TABLE "public"."posts" SET LOGGED;',
            ),
        ),
        (
            replace(POSTS, replica_identity=ReplicaIdentity.NOTHING, replica_identity_columns=()),
            {},
            ConfigProblem(
                "table",
                '"public.posts" has REPLICA IDENTITY NOTHING: its updates and deletes name no row',
                'ALTER TABLE "public"."posts" REPLICA IDENTITY DEFAULT;',
            ),
        ),
        (
            table("posts", {"id": "int8"}, key=()),
            {},
            ConfigProblem(
                "table",
                '"public.posts" has no primary key: its updates and deletes name no row'
                ' (id: "*" sends its creates alone)',
                'ALTER TABLE "public"."posts" ADD PRIMARY KEY ("id");',
            ),
        ),
        (
            table("posts", {"a b": "int8"}, key=(), unique_keys=(("a b",),)),
            {},
            ConfigProblem(
                "table",
                '"public.posts" has no primary key: its updates and deletes name no row'
                ' (id: "*" sends its creates alone)',
                'ALTER TABLE "public"."posts" ADD PRIMARY KEY ("a b");',
            ),
        ),
        (
            table("posts", {"title": "text"}, key=()),
            {},
            ConfigProblem(
                "table",
                '"public.posts" has no primary key: its updates and deletes name no row'
                ' (id: "*" sends its creates alone)',
                'ALTER TABLE "public"."posts" ADD COLUMN "id" bigint'
                " GENERATED ALWAYS AS IDENTITY PRIMARY KEY;",
            ),
        ),
        (
            table("posts", {"a": "int8", "record id": "int8"}, key=("a", "record id")),
            {},
            ConfigProblem(
                "id",
                'its column "record id" has the name of the id of several columns',
                "set id to a column, or rename that one",
            ),
        ),
        (
            replace(
                table("posts", {"a": "int8", "b": "int8"}, key=("a", "b")),
                replica_identity=ReplicaIdentity.INDEX,
                replica_identity_columns=("a",),
            ),
            {},
            ConfigProblem(
                "id",
                'the replica identity of "public.posts" lacks a part of its key: a, b:'
                " deletes would not identify the record",
                'ALTER TABLE "public"."posts" REPLICA IDENTITY FULL;',
            ),
        ),
        (
            table("posts", {"id": "int8", "tenant": "int8"}, key=("tenant", "id")),
            {},
            ConfigProblem(
                "fields",
                "two fields are named \"id\": the record's, of the key's columns, and a column's",
                "rename the column, as fields.rename: {id: number}",
            ),
        ),
        (
            replace(table("posts", {"id": "int8"}, key=()), kind=TableKind.PARTITIONED),
            {},
            ConfigProblem(
                "table",
                '"public.posts" has no primary key: its updates and deletes name no row'
                ' (id: "*" sends its creates alone)',
                'ALTER TABLE "public"."posts" ADD PRIMARY KEY ("id");',
            ),
        ),
        (
            POSTS,
            {"id": "titel"},
            ConfigProblem(
                "id", 'there is no column "titel" in "public.posts"', 'perhaps you meant "title"'
            ),
        ),
        (
            POSTS,
            {"id": "title", "fields": {"rename": {"id": "no"}}},
            ConfigProblem(
                "id",
                'column "title" is not unique by itself',
                'ALTER TABLE "public"."posts" ADD UNIQUE ("title");',
            ),
        ),
        (
            replace(POSTS, unique_keys=(("title",),)),
            {"id": "title", "fields": {"rename": {"id": "no"}}},
            ConfigProblem(
                "id",
                'column "title" may be NULL',
                'ALTER TABLE "public"."posts" ALTER COLUMN "title" SET NOT NULL;',
            ),
        ),
        (
            replace(POSTS, replica_identity_columns=(), leaves=(TableName("public", "posts_1"),)),
            {},
            ConfigProblem(
                "id",
                'the replica identity of "public.posts" lacks "id":'
                " deletes would not identify the record",
                'ALTER TABLE "public"."posts_1" REPLICA IDENTITY FULL;',
            ),
        ),
    ],
)
def test_a_table_that_can_not_be_served_is_refused_with_what_mends_it(
    faulty: Table, config: Mapping[str, Any], problem: ConfigProblem
) -> None:
    """Its changes would be lost silently, or not identify their record."""
    expected = replace(problem, path=f"collections.posts.{problem.path}")
    assert problems_of({"posts": {"table": "posts", **config}}, faulty) == (expected,)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"fields": {"include": ["titel"]}},
            ConfigProblem(
                "fields.include",
                'there is no column "titel" in "public.posts"',
                'perhaps you meant "title"',
            ),
        ),
        (
            {"fields": {"rename": {"autor_id": "author"}}},
            ConfigProblem(
                "fields.rename.autor_id",
                'there is no column "autor_id" in "public.posts"',
                'perhaps you meant "author_id"',
            ),
        ),
        (
            {"fields": {"rename": {"id": "key"}}},
            ConfigProblem("fields.rename.id", 'the key is always shown as "id"'),
        ),
        (
            {"fields": {"rename": {"title": "author_id"}}},
            ConfigProblem("fields", 'two fields are named "author_id"', "rename one of them"),
        ),
        (
            {"fields": {"rename": {"title": "expand"}}},
            ConfigProblem(
                "fields",
                'a field can\'t be named "expand": every record has that member',
                "rename it",
            ),
        ),
        (
            {"fields": {"rename": {"title": "the title"}}},
            ConfigProblem(
                "fields",
                'a field can\'t be named "the title": names are made of letters, digits and'
                " underscores",
                "rename it",
            ),
        ),
        ({"fields": {"hide": ["id"]}}, ConfigProblem("fields.hide", "the id can't be hidden")),
        (
            {"fields": {"rename": {"author_id": "author"}, "hide": ["author_id"]}},
            ConfigProblem(
                "fields.hide", 'there is no field "author_id"', 'the column is shown as "author"'
            ),
        ),
        (
            {"fields": {"include": ["title"], "hide": ["author_id"]}},
            ConfigProblem(
                "fields.hide",
                'there is no field "author_id"',
                "fields.include leaves the column out",
            ),
        ),
        (
            {"fields": {"types": {"title": "number"}}},
            ConfigProblem(
                "fields.types.title",
                'its column can\'t be shown as "number"',
                "possible are text, editor, email, url, select, file",
            ),
        ),
        (
            {"fields": {"types": {"titel": "text"}}},
            ConfigProblem(
                "fields.types.titel", 'there is no field "titel"', 'perhaps you meant "title"'
            ),
        ),
        (
            {"relations": {"title": {"collection": "userz"}}},
            ConfigProblem(
                "relations.title.collection",
                'there is no collection "userz"',
                'perhaps you meant "users"',
            ),
        ),
        (
            {"relations": {"author": {"collection": "users"}}},
            ConfigProblem(
                "relations.author", 'there is no field "author"', 'perhaps you meant "author_id"'
            ),
        ),
        (
            {"relations": {"author_id": {"collection": "users", "source": "x"}}},
            ConfigProblem(
                "relations.author_id",
                "source and target are columns of a junction table",
                "set through too",
            ),
        ),
        (
            {"relations": {"title": {"collection": "users", "through": "likes"}}},
            ConfigProblem("relations.title", 'a column is shown as "title" already'),
        ),
        (
            {"relations": {"l": {"collection": "users", "through": "like"}}},
            ConfigProblem(
                "relations.l.through", 'there is no table "like"', 'perhaps you meant "likes"'
            ),
        ),
        (
            {"relations": {"l": {"collection": "users", "through": "likes", "target": "user"}}},
            ConfigProblem(
                "relations.l.target",
                'there is no column "user" in "public.likes"',
                'perhaps you meant "user_id"',
            ),
        ),
        (
            {"collection_id": "users"},
            ConfigProblem("collection_id", "another collection has this id or name"),
        ),
        (
            {"table": "users"},
            ConfigProblem("table", 'collection "users" shows "public.users" already'),
        ),
        (
            {"table": "a.b.c"},
            ConfigProblem("table", "not a table's name: write it as schema.table"),
        ),
        (
            {"login": {"password_hash": "title", "identity": ["title"]}},
            ConfigProblem("login", "nobody logs in to a base collection", "set type: auth"),
        ),
        (
            {"manage_rule": "title = 'x'"},
            ConfigProblem(
                "manage_rule", "a base collection has no e-mail addresses to show", "set type: auth"
            ),
        ),
        (
            {"auth_rule": None},
            ConfigProblem("auth_rule", "nobody logs in to a base collection", "set type: auth"),
        ),
        (
            {"type": "auth", "login": {"password_hash": "hash", "identity": ["title"]}},
            ConfigProblem("login.password_hash", 'there is no column "hash" in "public.posts"'),
        ),
        (
            {"type": "auth", "login": {"password_hash": "title", "identity": ["titel"]}},
            ConfigProblem(
                "login.identity", 'there is no field "titel"', 'perhaps you meant "title"'
            ),
        ),
        (
            {"type": "auth", "fields": {"rename": {"title": "verified"}}},
            ConfigProblem(
                "fields",
                '"verified" of an auth collection must be a bool column',
                "rename it, or leave it out",
            ),
        ),
    ],
)
def test_names_that_nothing_answers_to_are_problems_with_the_nearest_name(
    config: Mapping[str, Any], problem: ConfigProblem
) -> None:
    expected = replace(problem, path=f"collections.posts.{problem.path}")
    posts = {"table": "posts", **config}
    found = problems_of({"users": {"table": "users"}, "posts": posts}, POSTS, USERS, LIKES)
    assert found == (expected,)


@pytest.mark.parametrize("name", ["a b", "", "a/b", "été", "posts_via_author"])
def test_collection_names_must_fit_topics_and_rules(name: str) -> None:
    (problem,) = problems_of({name: {"table": "posts"}}, POSTS)
    assert problem.path == f"collections.{name}"


def test_all_problems_are_reported_at_once() -> None:
    config = {
        "posts": {"table": "post"},
        "users": {"table": "users", "fields": {"hide": ["emial"]}},
    }
    assert [problem.path for problem in problems_of(config, POSTS, USERS)] == [
        "collections.posts.table",
        "collections.users.fields.hide",
    ]


# -- the default order of lists


def order_of(config: Mapping[str, Any], *tables: Table) -> list[str]:
    order = built({"posts": {"table": "posts", **config}}, *tables)["posts"].order
    return [("-" if one.is_descending else "") + one.column.name for one in order]


CREATED = {"created_at": "timestamptz"}


def not_null(nullable: Table) -> Table:
    columns = tuple(replace(column, not_null=True) for column in nullable.columns)
    return replace(nullable, columns=columns)


@pytest.mark.parametrize(
    ("posts", "config", "wanted"),
    [
        (table("posts", {"id": "int8", **CREATED}), {}, ["id"]),
        (table("posts", {"id": "uuid", "n": "int4"}), {}, ["id"]),
        (table("posts", {"id": "uuid", **CREATED}), {}, ["id"]),
        (not_null(table("posts", {"id": "uuid", **CREATED})), {}, ["created_at", "id"]),
        (table("posts", {"id": "int8", "n": "int4"}), {"order": ["-n"]}, ["-n", "id"]),
        (table("posts", {"id": "int8", "n": "int4"}), {"order": ["-id", "n"]}, ["-id", "n"]),
    ],
)
def test_lists_have_a_total_order(
    posts: Table, config: Mapping[str, Any], wanted: list[str]
) -> None:
    assert order_of(config, posts) == wanted


@pytest.mark.parametrize("name", ["nope", "tags", "doc"])
def test_an_order_names_fields_of_one_value(name: str) -> None:
    posts = table("posts", {"id": "int8", "tags": array_of(base_type("text")), "doc": "jsonb"})

    (problem,) = problems_of({"posts": {"table": "posts", "order": [name]}}, posts)
    assert problem.path == "collections.posts.order"
