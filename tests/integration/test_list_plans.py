"""Indexes serve lists: rule and order, and the joins of a rule, as PostgreSQL plans them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.compiler import BoundList, ListCompiler
from pgrealtime.rules.language.request import RuleRequest

_SCHEMA = """
CREATE TABLE teams (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), name text);
CREATE TABLE people (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(), name text, team uuid REFERENCES teams
);
CREATE TABLE notes (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  number bigint GENERATED ALWAYS AS IDENTITY,
  {owner},
  title text,
  created timestamptz NOT NULL DEFAULT now(),
  updated timestamptz(3) NOT NULL DEFAULT now()
);
INSERT INTO teams (name) SELECT 'team ' || n FROM generate_series(1, 20) n;
INSERT INTO people (name, team) SELECT 'one', id FROM teams, generate_series(1, 10);
INSERT INTO notes (owner, title, created, updated)
SELECT people.id, n || '', at, at
FROM people, generate_series(1, 100) n,
  LATERAL (SELECT timestamptz '2025-01-01' + n * interval '1 minute') AS written(at);
CREATE INDEX notes_owner ON notes (owner, created, id);
CREATE INDEX notes_owner_newest ON notes (owner, created DESC, id);
CREATE INDEX notes_created ON notes (created, id);
CREATE INDEX notes_updated ON notes (updated DESC, id DESC);
CREATE INDEX notes_title ON notes (title COLLATE "C" NULLS FIRST, created, id);
VACUUM ANALYZE teams, people, notes;
"""
_OWNERS = ("owner uuid REFERENCES people", "owner uuid NOT NULL REFERENCES people", "owner text")
_PAGE = {"limit": 30, "offset": 0, "max_joined_rows": 1_000_000}


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a plan."""

    kind: str
    index: str
    relation: str
    subplan: str


class Plans:
    """Plans of lists of the notes, as Ann reads them."""

    def __init__(self, pool: QueryPool, collections: Collections, ann: str) -> None:
        self._pool = pool
        self._compiler = ListCompiler(collections)
        self._collections = collections
        self.ann = ann

    async def page(self, rule: str, sort: str = "", filter_text: str = "") -> list[Node]:
        """Return the plan of the first page."""
        bound = await self._bound(rule, sort, filter_text)
        return await self._explain(bound.sql.page, {**bound.params, **_PAGE})

    async def count(self, rule: str, filter_text: str = "") -> list[Node]:
        """Return the plan of the count."""
        bound = await self._bound(rule, "", filter_text)
        return await self._explain(bound.sql.count, bound.params)

    async def view(self, rule: str) -> list[Node]:
        """Return the plan of a view."""
        bound = await self._bound(rule, "", "")
        return await self._explain(bound.sql.row, {**bound.params, "id": self.ann})

    async def _bound(self, rule: str, sort: str, filter_text: str) -> BoundList:
        people = self._collections["people"]
        ann = AuthRecord(collection_id=people.id, collection_name=people.name, id=self.ann)
        return await self._compiler.bind(
            self._collections["notes"],
            rule,
            RuleRequest(principal=ann),
            filter_text=filter_text,
            sort_text=sort,
        )

    async def _explain(self, statement: str, params: Mapping[str, Any]) -> list[Node]:
        async with self._pool.connection() as connection:
            explained = f"EXPLAIN (FORMAT JSON) {statement}".encode()
            (plan,) = await (await connection.execute(explained, params)).fetchone() or ((),)
        return list(_nodes(plan[0]["Plan"]))


def _nodes(plan: Mapping[str, Any]) -> Iterator[Node]:
    yield Node(
        plan["Node Type"],
        plan.get("Index Name", ""),
        plan.get("Relation Name", ""),
        plan.get("Subplan Name", ""),
    )
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


@pytest.fixture(params=_OWNERS, ids=["nullable", "not null", "text"])
async def plans(database_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Plans]:
    schema = _SCHEMA.replace("{owner}", request.param)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        for statement in schema.split(";"):
            await connection.execute(statement.encode())
        relation = {"relations": {"owner": {"collection": "people"}}}
        configured = {
            "teams": CollectionConfig.model_validate({"table": "teams", "list_rule": ""}),
            "people": CollectionConfig.model_validate(
                {
                    "table": "people",
                    "type": "auth",
                    "list_rule": "",
                    "relations": {"team": {"collection": "teams"}},
                }
            ),
            "notes": CollectionConfig.model_validate({"table": "notes", **relation}),
        }
        catalog = await read_catalog(connection, schemas=["public"])
        collections = build_collections(configured, catalog)
        row = await (await connection.execute("SELECT id::text FROM people LIMIT 1")).fetchone()
        assert row is not None
    async with QueryPool(database_url) as pool:
        yield Plans(pool, collections, row[0])


_MINE = "owner = @request.auth.id"
_OF_A_TEAM = 'owner.team.name = "team 7"'


def _indexes(nodes: Sequence[Node]) -> list[tuple[str, str]]:
    """Return kind and index of each node."""
    return [(node.kind, node.index) for node in nodes]


@pytest.mark.parametrize(
    ("rule", "sort", "index"),
    [
        (_MINE, "-created", "notes_owner_newest"),
        (_MINE, "created", "notes_owner"),
        (_MINE, "", "notes_owner"),
        ("@request.auth.id != ''", "", "notes_created"),
        ("", "-updated,-id", "notes_updated"),
        ("", "title", "notes_title"),
        ("", "id", "notes_pkey"),
    ],
)
async def test_index_serves_rule_and_order(plans: Plans, rule: str, sort: str, index: str) -> None:
    """However many rows there are, a page reads thirty: nothing is sorted or left out."""
    assert _indexes(await plans.page(rule, sort)) == [("Limit", ""), ("Index Scan", index)]


async def test_filter_of_a_client_is_served_as_a_rule_is(plans: Plans) -> None:
    """The usual list: what I own, written by the client under an open rule."""
    mine = await plans.page("", "-created", f'owner = "{plans.ann}"')

    assert _indexes(mine) == [("Limit", ""), ("Index Scan", "notes_owner_newest")]


async def test_index_finds_what_is_counted_and_viewed(plans: Plans) -> None:
    """The count of an owner's rows reads no others, and a view reads one."""
    counted = _indexes(await plans.count(_MINE))
    viewed = _indexes(await plans.view(_MINE))

    assert counted[0] == ("Aggregate", "")
    assert counted[-1][1] in ("notes_owner", "notes_owner_newest")
    assert viewed == [("Index Scan", "notes_pkey")]


@pytest.mark.parametrize(
    ("rule", "filter_text"),
    [
        (_OF_A_TEAM, ""),
        (f"{_OF_A_TEAM} || {_MINE}", ""),
        ("", _OF_A_TEAM),
        (_OF_A_TEAM, 'owner.name = "one"'),
    ],
)
async def test_single_relations_are_joined(plans: Plans, rule: str, filter_text: str) -> None:
    """No subplan is run for each row, in the page or the count: PostgreSQL chooses the order."""
    for nodes in (
        await plans.page(rule, "-created", filter_text),
        await plans.count(rule, filter_text),
    ):
        assert not [node for node in nodes if node.subplan], nodes
        assert sorted(node.relation for node in nodes if node.relation) == [
            "notes",
            "people",
            "teams",
        ]
