"""Texts that a collation takes for equal are different to rules, relations and filters.

The same rows twice: in columns that compare bytes, and in columns of a nondeterministic collation,
to which ``ádmin``, ``ADMIN`` and ``admin`` are equal and an invisible hyphen is ignored. Reference
query and engine give the same answer for both.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

import psycopg
import pytest

from pgrealtime.auth.principal import GUEST, AuthRecord, Principal
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionConfig, RelationConfig
from pgrealtime.errors import RuleError
from pgrealtime.expand.relation_sql import RelationQuery
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query
from tests.engine_driving import CallerMember, evaluate_rows

SECONDS = float(os.environ.get("PGREALTIME_FUZZ_SECONDS", "10"))
SETUP = """
CREATE COLLATION nd (provider = icu, locale = 'und-u-ks-level1', deterministic = false);
CREATE SCHEMA bytes;
CREATE SCHEMA loose;
CREATE DOMAIN bytes.word AS text COLLATE "C";
CREATE DOMAIN loose.word AS text COLLATE nd;
"""
TABLES = """
CREATE TABLE {schema}.users (
  id text COLLATE {collation} PRIMARY KEY, name text COLLATE {collation}, "group" {schema}.word,
  friends text[] COLLATE {collation}
);
CREATE TABLE {schema}.labels (id varchar(40) COLLATE {collation} PRIMARY KEY, name {schema}.word);
CREATE TABLE {schema}.posts (
  id text COLLATE {collation} PRIMARY KEY, author text COLLATE {collation}, title {schema}.word,
  code char(8) COLLATE {collation}, readers text[] COLLATE {collation}, words {schema}.word[],
  label varchar(40) COLLATE {collation}, views int, note varchar COLLATE {collation}
);
CREATE TABLE {schema}.notes (
  id text COLLATE {collation} PRIMARY KEY, post text COLLATE {collation}, by {schema}.word,
  about text[] COLLATE {collation}, kind text COLLATE {collation}
);
CREATE TABLE {schema}.post_labels (
  post text COLLATE {collation}, label varchar(40) COLLATE {collation}
);
"""
SOFT = "\N{SOFT HYPHEN}"
ADMINS = ["admin", "ádmin", "ADMIN", f"ad{SOFT}min"]
BOBS = ["bob", "bób", "Bob"]
WORDS = [*ADMINS, *BOBS, "", SOFT, "5", f"5{SOFT}"]
COLUMNS = {
    "users": ("id", "name", "group", "friends"),
    "labels": ("id", "name"),
    "posts": ("id", "author", "title", "code", "readers", "words", "label", "views", "note"),
    "notes": ("id", "post", "by", "about", "kind"),
    "post_labels": ("post", "label"),
}
PATHS = (
    *("author", "title", "code", "label", "note", "id", "readers", "words", "labels", "views"),
    *("author.id", "author.name", "author.group", "author.friends:each", "label.name"),
    *("readers:each", "words:each", "labels:each", "readers.name", "labels.name", "readers.id"),
    *("notes_via_post.by", "notes_via_post.kind", "notes_via_about.kind", "notes_via_post.id"),
    *("author.posts_via_readers.title", "author.posts_via_author.id", "label.posts_via_labels.id"),
    *("author:length", "readers:length", "title:lower", "readers:each", "author:lower"),
    *("strftime('%Y', title)", "@collection.users.name", "@collection.notes.about:each"),
)
REQUEST = (
    *("@request.auth.id", "@request.auth.name", "@request.auth.group", "@request.auth.friends"),
    *("@request.auth.friends:each", "@request.auth.friends.name", "@request.query.q"),
    "@request.auth.posts_via_author.id",
)
OPERATORS = ("=", "=", "=", "!=", "?=", "?=", "?!=", "<", ">=", "~", "!~", "?~", "?>")


@dataclass(frozen=True)
class Twin:
    """One of two schemas that hold the same rows."""

    connection: psycopg.Connection
    collections: Collections
    posts: Sequence[Row]
    users: Sequence[Row]

    def admitted(self, rule: str, request: RuleRequest, ask: str) -> frozenset[int] | str:
        """Return the posts that are admitted, or that the rule is refused."""
        posts, now = self.collections["posts"], datetime.now(UTC)
        try:
            if ask == "reference":
                made = reference_query(self.collections, posts, rule, request)
                match made:
                    case AdmitAll():
                        return frozenset(range(len(self.posts)))
                    case DenyAll():
                        return frozenset()
                    case ReferenceQuery():
                        question = made.sql_query(self.posts, now)
                        found = self.connection.execute(question.sql.encode(), question.params)
                        return frozenset(index for (index,) in found)
            bound = RuleCompiler(self.collections).bind_caller(
                posts, rule, request, self._own(request, ask)
            )
        except RuleError as error:
            return str(error)
        if isinstance(bound, DenyAll):
            return frozenset()
        member = CallerMember(request, bound.specialization, bound.values)
        index: PredicateIndex[CallerMember] = PredicateIndex()
        index.add(member)
        hits = evaluate_rows(self.connection, index, self.posts, now)
        return frozenset(n for n, some in enumerate(hits) if member in some)

    def _own(self, request: RuleRequest, ask: str) -> Row | None:
        principal = request.principal
        if ask != "knowing" or not isinstance(principal, AuthRecord):
            return None
        return next((row for row in self.users if row["id"] == principal.id), None)


def _shown(connection: psycopg.Connection, schema: str, table: str) -> list[Row]:
    query = f'SELECT * FROM {schema}.{table} ORDER BY id COLLATE "C"'
    result = connection.execute(query.encode()).pgresult
    assert result is not None
    names = [(result.fname(n) or b"").decode() for n in range(result.nfields)]
    return [
        {
            name: None if (raw := result.get_value(place, n)) is None else raw.decode()
            for n, name in enumerate(names)
        }
        for place in range(result.ntuples)
    ]


def configured(schema: str) -> dict[str, CollectionConfig]:
    def table(name: str, **relations: RelationConfig) -> CollectionConfig:
        return CollectionConfig(
            table=f"{schema}.{name}",
            type="auth" if name == "users" else "base",
            list_rule="",
            relations=relations,
        )

    users, posts = RelationConfig(collection="users"), RelationConfig(collection="posts")
    through = RelationConfig(
        collection="labels", through=f"{schema}.post_labels", source="post", target="label"
    )
    label = RelationConfig(collection="labels")
    return {
        "users": table("users", friends=users),
        "labels": table("labels"),
        "posts": table("posts", author=users, readers=users, label=label, labels=through),
        "notes": table("notes", post=posts, about=posts),
    }


async def _collections(url: str, schema: str) -> Collections:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        catalog = await read_catalog(connection, schemas=[schema])
    return build_collections(configured(schema), catalog)


def _rows(chance: Random) -> dict[str, list[tuple[object, ...]]]:
    """Return rows whose keys differ in both collations, and whose other columns don't."""

    def some() -> list[str]:
        return chance.choices(WORDS, k=chance.randint(0, 3))

    def word() -> str | None:
        return chance.choice([*WORDS, None])

    posts: list[tuple[object, ...]] = [
        (f"p{n}", word(), word(), word(), some(), some(), word(), chance.choice([5, None]), "x")
        for n in range(12)
    ]
    posts += [(one, one, one, one, [one], [one], one, 5, one) for one in ("admin", "bob")]
    return {
        "users": [(one, word(), word(), some()) for one in ("admin", "bob", "carol")],
        "labels": [(one, word()) for one in ("admin", "5")],
        "posts": posts,
        "notes": [
            (f"n{n}", chance.choice(["p1", "p2", "P3", *ADMINS]), word(), some(), word())
            for n in range(12)
        ],
        "post_labels": [
            (chance.choice(["p1", "P2", *ADMINS]), chance.choice(["admin", "Admin", "5"]))
            for _ in range(12)
        ],
    }


@pytest.fixture
def twins(database_url: str) -> Iterator[tuple[Twin, Twin, Random]]:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 (shown if it fails)
    chance = Random(seed)
    pins = "-c DateStyle=ISO -c TimeZone=UTC -c extra_float_digits=1 -c search_path=pg_catalog"
    rows = _rows(chance)
    with psycopg.connect(database_url, autocommit=True) as setup:
        setup.execute(SETUP)
        for schema, collation in (("bytes", '"C"'), ("loose", "public.nd")):
            setup.execute(TABLES.format(schema=schema, collation=collation).encode())
            for name, some in rows.items():
                marks = ", ".join(["%s"] * len(COLUMNS[name]))
                insert = f"INSERT INTO {schema}.{name} VALUES ({marks})"
                setup.cursor().executemany(insert.encode(), some)
    with psycopg.connect(database_url, autocommit=True, options=pins) as connection:
        made = [
            Twin(
                connection,
                asyncio.run(_collections(database_url, schema)),
                _shown(connection, schema, "posts"),
                _shown(connection, schema, "users"),
            )
            for schema in ("bytes", "loose")
        ]
        yield made[0], made[1], chance


def requests(twin: Twin) -> list[RuleRequest]:
    def principal(name: str) -> Principal:
        return AuthRecord(
            collection_id=twin.collections["users"].id, collection_name="users", id=name
        )

    people = [GUEST, *map(principal, [*ADMINS, "bob", "Bob"])]
    return [RuleRequest(principal=one, query={"q": "ádmin"}) for one in people]


def differing(twins: tuple[Twin, Twin, Random], rule: str, asked: Sequence[RuleRequest]) -> str:
    plain, loose, _ = twins
    for request in asked:
        for ask in ("reference", "knowing", "without"):
            wanted = plain.admitted(rule, request, ask)
            found = loose.admitted(rule, request, ask)
            if found != wanted:
                return f"{rule} of {request}: {ask}: {found}, not {wanted}"
    return ""


NAMED = (
    "author = @request.auth.id",
    "author != @request.auth.id",
    "readers:each ?= @request.auth.id",
    "readers.id ?= @request.auth.id",
    "words:each ?= 'admin'",
    "words:each = 'admin'",
    "labels:each ?= 'admin'",
    "labels.id ?= 'admin'",
    "labels.name ?= @request.auth.name",
    "label = 'admin'",
    "code = 'admin'",
    "title = 'admin' || note = 'admin'",
    "author.name = @request.auth.name",
    "author = ''",
    "words:each ?= ''",
    "notes_via_post.by ?= @request.auth.id",
    "notes_via_about.kind ?= 'admin'",
    "@collection.notes.by ?= @request.auth.id && @collection.notes.post ?= id",
    "@request.auth.friends:each ?= author",
    "@request.auth.friends.id ?= author.id",
    "@request.auth.posts_via_readers.id ?= id",
    "views = words:each || views ?> words:each",
    "author.posts_via_author.title ?= 'bob'",
)


def test_no_rule_takes_one_name_for_another(twins: tuple[Twin, Twin, Random]) -> None:
    """Covers relations, items, joins, junction tables and keys that PostgreSQL returns."""
    asked = requests(twins[0])
    faults = [fault for rule in NAMED if (fault := differing(twins, rule, asked))]
    assert not faults, "\n".join(faults)


@pytest.mark.timeout(300)
def test_random_rules_mean_the_same_under_any_collation(twins: tuple[Twin, Twin, Random]) -> None:
    """Every path with every operator and operand."""
    chance, asked = twins[2], requests(twins[0])
    literals = [f"'{word}'" for word in WORDS]
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        parts = [
            f"{chance.choice(PATHS)} {chance.choice(OPERATORS)}"
            f" {chance.choice([*PATHS, *REQUEST, *literals, *literals])}"
            for _ in range(chance.randint(1, 2))
        ]
        rule = chance.choice([" && ", " || "]).join(parts)
        fault = differing(twins, rule, chance.sample(asked, 2))
        assert not fault, fault


@pytest.mark.parametrize(
    ("table", "match"), [("notes", "post"), ("notes", "about"), ("posts", "label")]
)
def test_no_record_is_expanded_instead_of_another(
    twins: tuple[Twin, Twin, Random], table: str, match: str
) -> None:
    """Records that reference another are found by its exact id."""

    def linked(twin: Twin) -> list[tuple[str, str]]:
        owner = twin.collections[table]
        column = owner.table.find_column(match)
        assert column is not None
        linking = RelationQuery(
            table=owner.table,
            match_column=column,
            result_column=owner.key,
            source=owner,
            is_collection_table=True,
            limit=100,
        )
        ids = [*ADMINS, *BOBS, "p1", "p2", "p3", "5"]
        return sorted(twin.connection.execute(linking.statement.encode(), {"ids": ids}).fetchall())

    assert linked(twins[1]) == linked(twins[0])
