"""Numbers that no double represents stay distinct, wherever a rule or a filter compares them.

Users have ids that are neighbours beyond 2^53, or that differ in the last of thirty digits, each
with a row of their own. Reference query and engine are compared: by its index, in the process and
by PostgreSQL, with the subscriber's own row at hand and without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import psycopg
import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionConfig, FieldsConfig, RelationConfig
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query
from tests.engine_driving import CallerMember, evaluate_rows

SETUP = """
CREATE DOMAIN account AS int8;
CREATE TABLE users (
  id int8 PRIMARY KEY, n8 int8, n30 numeric(30), fine numeric(40, 20), dom account, label text,
  several int8[], doc jsonb
);
CREATE TABLE posts (
  id text PRIMARY KEY, own8 int8, own30 numeric(30), fine numeric(40, 20), dom account, label text,
  named int8, several int8[], many numeric(30)[], doc jsonb, js json, price money, x xid8
);
CREATE TABLE members (id text PRIMARY KEY, post text, user8 int8, user30 numeric(30), doc jsonb);
"""
IDS = [
    *(9007199254740991, 9007199254740992, 9007199254740993, 9007199254740994),
    *(-9007199254740996, -9007199254740997, 9223372036854775806, 9223372036854775807),
]


def wide(user: int) -> int:
    """Return the user's number of 29 digits."""
    return user * 10**10 + 1


def fine(user: int) -> str:
    """Return a number of as many digits, most of them after its point."""
    return f"{user}.00000000000000000001"


@dataclass(frozen=True)
class World:
    connection: psycopg.Connection
    collections: Collections
    posts: list[Row]
    users: dict[int, Row]

    def request(self, user: int) -> RuleRequest:
        principal = AuthRecord(
            collection_id=self.collections["users"].id, collection_name="users", id=str(user)
        )
        return RuleRequest(principal=principal, query={"own8": str(user), "q": str(user)})


def shown(connection: psycopg.Connection, table: str) -> list[Row]:
    result = connection.execute(f"SELECT * FROM public.{table} ORDER BY 1").pgresult
    assert result is not None
    return [
        {
            (result.fname(n) or b"").decode(): None
            if (raw := result.get_value(place, n)) is None
            else raw.decode()
            for n in range(result.nfields)
        }
        for place in range(result.ntuples)
    ]


async def configured(url: str) -> Collections:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        catalog = await read_catalog(connection, schemas=["public"])
    return build_collections(
        {
            "users": CollectionConfig(table="public.users", type="auth", list_rule=""),
            "posts": CollectionConfig(
                table="public.posts", list_rule="", fields=FieldsConfig(types={"named": "text"})
            ),
            "members": CollectionConfig(
                table="public.members",
                list_rule="",
                relations={"post": RelationConfig(collection="posts")},
            ),
        },
        catalog,
    )


@pytest.fixture
def world(database_url: str) -> Iterator[World]:
    pins = "-c DateStyle=ISO -c TimeZone=UTC -c extra_float_digits=1 -c search_path=pg_catalog"
    with psycopg.connect(database_url, autocommit=True) as setup:
        setup.execute(SETUP)
        for n, user in enumerate(IDS):
            doc = f'{{"own": {user}, "wide": {wide(user)}}}'
            setup.execute(
                "INSERT INTO users VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                [user, user, wide(user), fine(user), user, str(user), [user], doc],
            )
            setup.execute(
                "INSERT INTO posts VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                [
                    *(f"p{n}", user, wide(user), fine(user), user, str(user), user, [user]),
                    *([wide(user)], doc, doc, str(n), str(abs(user))),
                ],
            )
            setup.execute(
                "INSERT INTO members VALUES (%s, %s, %s, %s, %s)",
                [f"m{n}", f"p{n}", user, wide(user), doc],
            )
    with psycopg.connect(database_url, autocommit=True, options=pins) as connection:
        users = {int(row["id"] or 0): row for row in shown(connection, "users")}
        made = asyncio.run(configured(database_url))
        yield World(connection, made, shown(connection, "posts"), users)


OWN = (
    "own8 = @request.auth.id",
    "@request.auth.id = own8",
    "own8 ?= @request.auth.id && label != 'x'",
    "own8 = @request.auth.n8",
    "own8 = @request.auth.dom",
    "own8 >= @request.auth.id && own8 <= @request.auth.id",
    "own8 >= @request.auth.n8 && own8 <= @request.auth.n8",
    "own8:lower = @request.auth.id",
    "own8 = @request.query.own8",
    "own8 = @request.query.q",
    "dom = @request.auth.id",
    "dom = @request.auth.n8",
    "own30 = @request.auth.n30",
    "own30 >= @request.auth.n30 && own30 <= @request.auth.n30",
    "own30:lower = @request.auth.n30:lower",
    "own30 ~ @request.auth.n30",
    "fine = @request.auth.fine",
    "fine >= @request.auth.fine && fine <= @request.auth.fine",
    "fine != @request.auth.n8 && own8 = @request.auth.n8",
    "label = @request.auth.n8:lower",
    "label >= @request.auth.n8 && label <= @request.auth.n8",
    "own8 >= @request.auth.label && own8 <= @request.auth.label",
    "named = @request.auth.id",
    "several:each = @request.auth.id",
    "several:each ?= @request.auth.n8",
    "several:each ?= @request.auth.several:each",
    "many:each ?= @request.auth.n30",
    "many:each = @request.auth.n30",
    "doc.own = @request.auth.n8",
    "doc.own = @request.auth.doc.own",
    "doc.wide = @request.auth.n30",
    "js.own = @request.auth.n8",
    "doc.wide >= @request.auth.doc.wide && doc.wide <= @request.auth.doc.wide",
    "label = doc.own && own8 = @request.auth.doc.own",
    "label = @request.auth.doc.own",
    "members_via_post.user8 = @request.auth.id",
    "members_via_post.user8 ?= @request.auth.n8",
    "members_via_post.user30 ?= @request.auth.n30",
    "members_via_post.doc.own ?= @request.auth.doc.own",
    "@collection.members.user8 ?= @request.auth.id && @collection.members.post ?= id",
    "@collection.members.user8 ?= own8 && @collection.members.user8 ?= @request.auth.n8",
    "@collection.members.doc.own ?= @request.auth.n8 && @collection.members.post ?= id",
    "@collection.users.n8 ?= own8 && @collection.users.id ?= @request.auth.id",
    "@collection.users.n30 ?= own30 && @collection.users.id ?= @request.auth.id",
    "x = @request.auth.id || (own8 < 0 && own8 = @request.auth.id)",
)
"""Rules that show each user the own row and no other."""
OTHERS = (
    "own8 != @request.auth.id",
    "own8 != @request.auth.n8",
    "own8 < @request.auth.id || own8 > @request.auth.n8",
    "own30 != @request.auth.n30",
    "fine != @request.auth.fine",
    "several:each != @request.auth.id",
    "doc.own != @request.auth.n8",
    "members_via_post.user8 != @request.auth.id",
)
"""Rules that show each user all rows but the own one."""


def admitted(world: World, rule: str, text: str) -> dict[str, dict[int, set[int]]]:
    """Return, per way of evaluation and user, the rows that rule and filter admit."""
    now = datetime.now(UTC)
    posts = world.collections["posts"]
    ways: dict[str, dict[int, set[int]]] = {"the reference": {}}
    requests = {user: world.request(user) for user in world.users}
    if text:
        requests = {
            user: replace(request, query={**request.query, "filter": text.format(user)})
            for user, request in requests.items()
        }
    for user, request in requests.items():
        made = reference_query(world.collections, posts, rule, request)
        assert isinstance(made, ReferenceQuery), (rule, text, made)
        question = made.sql_query(world.posts, now)
        found = world.connection.execute(question.sql.encode(), question.params).fetchall()
        ways["the reference"][user] = {index for (index,) in found}
    for name, is_known in (("knowing the user's row", True), ("without the user's row", False)):
        index: PredicateIndex[CallerMember] = PredicateIndex()
        askers = {}
        planner = RuleCompiler(world.collections)
        for user, request in requests.items():
            own = world.users[user] if is_known else None
            bound = planner.bind_caller(posts, rule, request, own)
            assert not isinstance(bound, DenyAll), (rule, text, bound)
            askers[user] = CallerMember(request, bound.specialization, bound.values)
            index.add(askers[user])
        for how, among in (("by the index", None), ("one by one", list(askers.values()))):
            hits = evaluate_rows(world.connection, index, world.posts, now, among=among)
            ways[f"{how}, {name}"] = {
                user: {n for n, some in enumerate(hits) if asker in some}
                for user, asker in askers.items()
            }
    return ways


def _check(world: World, rule: str, text: str = "", *, is_own: bool = True) -> None:
    for way, shown_to in admitted(world, rule, text).items():
        for user, rows in shown_to.items():
            own = {n for n, row in enumerate(world.posts) if row["own8"] == str(user)}
            wanted = own if is_own else set(range(len(world.posts))) - own
            assert rows == wanted, (rule, text, way, user, [world.posts[n] for n in rows ^ wanted])


def test_no_user_receives_the_rows_of_a_neighbour_by_number(world: World) -> None:
    """A rule that compares identities shows each user the own row, whatever the types."""
    for rule in OWN:
        _check(world, rule)


def test_a_rule_for_all_others_is_as_exact(world: World) -> None:
    for rule in OTHERS:
        _check(world, rule, is_own=False)


@pytest.mark.parametrize(
    "text",
    [
        "own8 = {0}",
        "own8 = '{0}'",
        "own8 = ' {0} '",
        "own8 = '{0}.0'",
        "own8 >= {0} && own8 <= '{0}'",
        "dom = {0}",
        "several:each ?= {0}",
        "several:each = '{0}'",
        "doc.own = {0}",
        "members_via_post.user8 ?= {0}",
        "fine != {0} && own8 = {0}",
        "(fine > {0} || fine < {0}) && own8 = '{0}'",
        "label = '{0}'",
    ],
)
def test_a_filter_names_one_number(world: World, text: str) -> None:
    """A literal means the number that it spells, also where no double equals it."""
    _check(world, "label != ''", text)
