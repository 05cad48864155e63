"""Hidden fields are for superusers.

No name in a client's request reads one or leads through one.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from pgrealtime.auth.principal import Caller, Superuser
from pgrealtime.changes import Insert, Row, TableName
from pgrealtime.config.model import CollectionConfig
from tests.attacks.held_stream import World, world_of
from tests.topics import topic

SCHEMA = """
CREATE TABLE people (
  id text PRIMARY KEY, email text, name text, role text, boss text REFERENCES people, info jsonb,
  spots point, born timestamptz);
CREATE TABLE tags (id text PRIMARY KEY, label text);
CREATE TABLE posts (
  id text PRIMARY KEY, author text REFERENCES people, reviewer text REFERENCES people,
  watchers text[], seen timestamptz);
CREATE TABLE post_tags (post text, tag text, PRIMARY KEY (post, tag));
INSERT INTO people VALUES ('boss', 'boss@x', 'Boss', 'chief', NULL, '{"k": 1}', '(1,2)', now()),
  ('ann', 'ann@x', 'Ann', 'clerk', 'boss', '{"k": 1}', '(1,2)', now());
INSERT INTO tags VALUES ('t', 'label');
INSERT INTO post_tags VALUES ('p1', 't'), ('p0', 't');
INSERT INTO posts VALUES ('p0', 'ann', 'boss', '{ann}', now());
"""

HIDDEN = {
    "people": ["role", "boss", "info", "spots", "born"],
    "posts": ["author", "watchers", "labels"],
}
LABELS = {"collection": "tags", "through": "public.post_tags", "source": "post", "target": "tag"}
RELATIONS = {"posts": {"watchers": {"collection": "people"}, "labels": LABELS}}


def configured() -> dict[str, CollectionConfig]:
    return {
        name: CollectionConfig.model_validate(
            {
                "table": f"public.{name}",
                "type": "auth" if name == "people" else "base",
                "list_rule": "",
                "view_rule": "",
                "fields": {"hide": HIDDEN.get(name, [])},
                "relations": RELATIONS.get(name, {}),
            }
        )
        for name in ("people", "tags", "posts")
    }


ROOT = Caller(Superuser("root"))

POST: Row = {"id": "p1", "author": "ann", "reviewer": "ann", "watchers": "{ann}", "seen": None}


async def received(world: World, *topics: str, caller: Caller | None = None) -> list[list[str]]:
    """Return what each of the topics receives of a new post, without its topic."""
    world.sinks.clear()
    for n, one in enumerate(topics):
        await world.listen(f"{n}", one, caller or Caller())
    await world.write("DELETE FROM posts WHERE id = 'p1'")
    statement = "INSERT INTO posts VALUES ('p1', 'ann', 'ann', '{ann}', NULL)"
    await world.stream(await world.write(statement, Insert(TableName("public", "posts"), POST)))
    return [world.data(f"{n}") for n in range(len(topics))]


PATHS = {
    "author": "nosuch",
    "author.boss": "nosuch.boss",
    "watchers": "nosuch",
    "labels": "nosuch",
    "reviewer.boss": "reviewer.nosuch",
    "reviewer.boss.boss": "reviewer.nosuch.boss",
    "reviewer.posts_via_author": "reviewer.posts_via_nosuch",
    "reviewer.posts_via_watchers": "reviewer.posts_via_nosuch",
    "reviewer.people_via_boss,reviewer": "reviewer.people_via_nosuch,reviewer",
    "reviewer,author": "reviewer,nosuch",
    "reviewer.POSTS_via_author": "reviewer.POSTS_via_nosuch",
    "reviewer.posts_via_reviewer.author": "reviewer.posts_via_reviewer.nosuch",
    " author . boss ": " nosuch . boss ",
}
"""Values of expand that a client may send, and the same with names that don't exist."""


@pytest.mark.parametrize("fields", [None, "*,expand.*", "expand.author.name,expand.reviewer.*"])
async def test_a_hidden_relation_expands_as_one_that_does_not_exist(
    database_url: str, fields: str | None
) -> None:
    """The record is the same to the byte; superusers receive all relations."""
    more = {} if fields is None else {"fields": fields}
    texts = [topic("posts/*", expand=text, **more) for pair in PATHS.items() for text in pair]
    async with world_of(database_url, SCHEMA, configured()) as world:
        found = await received(world, *texts)
        roots = await received(world, *texts, caller=ROOT)

    assert all(len(events) == 1 for events in found + roots)
    assert found[::2] == found[1::2]
    assert all("clerk" not in event and "chief" not in event for (event,) in found)
    same = [
        text
        for text, one, other in zip(PATHS, roots[::2], roots[1::2], strict=True)
        if one == other
    ]
    assert fields or same == []


async def test_pocketbase_s_way_is_a_choice(database_url: str) -> None:
    """PocketBase expands a hidden relation for every caller.

    The conformance suite compares its bytes.
    """
    async with world_of(database_url, SCHEMA, configured(), hidden_fields="pocketbase") as world:
        found = await received(world, *(topic("posts/*", expand=text) for text in PATHS))

    shown: list[dict[str, Any]] = [json.loads(event)["record"] for (event,) in found]
    assert shown[0]["expand"]["author"]["name"] == "Ann"
    assert shown[4]["expand"]["reviewer"]["expand"]["boss"]["name"] == "Boss"
    assert all(record.get("expand") for record in shown if record is not shown[1])
    assert all("author" not in record and "role" not in str(record) for record in shown)


FILTERS = [
    "author = 'ann'",
    "author != 'x'",
    "author.name = 'Ann'",
    "author:lower = 'ann'",
    "reviewer.role = 'clerk'",
    "reviewer.role:lower != 'x'",
    "reviewer.role ?~ 'c'",
    "reviewer.boss = 'boss'",
    "reviewer.boss.name = 'Boss'",
    "reviewer.boss.boss.id = ''",
    "reviewer.info.k = 1",
    "reviewer.info != ''",
    "reviewer.spots.lon = 1",
    "geoDistance(reviewer.spots.lon, reviewer.spots.lat, 1, 2) < 1000",
    "strftime('%Y', reviewer.born) != ''",
    "watchers:each ?= 'ann'",
    "watchers:length = 1",
    "watchers.name ?= 'Ann'",
    "labels.label ?= 'label'",
    "labels:length = 1",
    "reviewer.posts_via_author.id ?!= ''",
    "reviewer.posts_via_watchers.id ?!= ''",
    "reviewer.people_via_boss.name = ''",
    "id = 'p1' || author = 'x'",
    "reviewer.password != 'x'",
    "reviewer.tokenKey != 'x'",
]


@pytest.mark.parametrize("hidden", ["strict", "pocketbase"])
async def test_no_filter_asks_about_a_hidden_field(database_url: str, hidden: str) -> None:
    """The filter is refused like one with an unknown name, whether it would be true or not."""
    texts = [
        topic("posts/*", filter=text) for text in (*FILTERS, "reviewer.name = 'Ann'", "nosuch = 1")
    ]
    async with world_of(database_url, SCHEMA, configured(), hidden_fields=hidden) as world:
        *refused, control, unknown = await received(world, *texts)

    assert len(control) == 1
    assert [one for one, events in zip(FILTERS, refused, strict=True) if events] == []
    assert unknown == []


_OF_ALL = {"collectionId", "collectionName"}


async def test_no_choice_of_fields_shows_a_hidden_one(database_url: str) -> None:
    texts = ["*", "author", "labels,watchers", "*,author:excerpt(9)", "expand.reviewer.role"]
    queries = [topic("posts/*", fields=text, expand="reviewer") for text in texts]
    async with world_of(database_url, SCHEMA, configured()) as world:
        found = await received(world, *queries)

    for (event,) in found:
        record = json.loads(event)["record"]
        assert record.keys() <= {*_OF_ALL, "id", "reviewer", "seen", "expand"}
        assert "clerk" not in event
