"""Enrichment of records, the same for LIVE connections and for those that catch up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from pgrealtime.auth.principal import AuthRecord, Caller, Superuser
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changelog.memory import Changelog
from pgrealtime.changes import Change, Delete, Insert, Row, TableName, Transaction, Update, WholeRow
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.names import configured_table_names
from pgrealtime.config.model import CollectionConfig
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.hub import Hub
from pgrealtime.hub.state.progress import HubSettings
from pgrealtime.lsn import LSN, Xid
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.rule_queries.executor import QueryExecutor
from tests.topics import topic
from tests.unit.hub.harness import DEADLINE, MemorySink

SCHEMA = """
CREATE TABLE people (
  id text PRIMARY KEY, email text, "emailVisibility" boolean, role text, name text);
CREATE TABLE tags (id int PRIMARY KEY, label text);
CREATE TABLE posts (id int PRIMARY KEY, title text, author text);
CREATE TABLE post_tags (post int, tag int, PRIMARY KEY (post, tag));
INSERT INTO people VALUES
  ('ann', 'ann@x', false, 'admin', 'Ann'), ('bob', 'bob@x', false, '', 'Bob'),
  ('cid', 'cid@x', true, '', 'Cid');
INSERT INTO tags VALUES (1, 'one'), (2, 'two');
INSERT INTO posts VALUES (1, 'first', 'ann'), (2, 'second', 'bob'), (3, 'third', NULL);
INSERT INTO post_tags VALUES (1, 2), (1, 1), (2, 1);
"""

FAR = 1 << 50
"""Beyond the server's own positions, so that every topic receives it."""

COLLECTIONS: dict[str, dict[str, Any]] = {
    "people": {
        "type": "auth",
        "list_rule": "",
        "view_rule": '@request.auth.id != ""',
        "manage_rule": '@request.auth.role = "admin" && name != "Ann"',
    },
    "tags": {"list_rule": "", "view_rule": ""},
    "posts": {
        "list_rule": "",
        "view_rule": "",
        "relations": {
            "author": {"collection": "people"},
            "tags": {
                "collection": "tags",
                "through": "public.post_tags",
                "source": "post",
                "target": "tag",
            },
        },
    },
}

PEOPLE = TableName("public", "people")
POSTS = TableName("public", "posts")
ROWS: dict[TableName, dict[str, Row]] = {
    POSTS: {
        "1": {"id": "1", "title": "first", "author": "ann"},
        "2": {"id": "2", "title": "second", "author": "bob"},
        "3": {"id": "3", "title": "third", "author": None},
    },
    PEOPLE: {
        name: {
            "id": name,
            "email": f"{name}@x",
            "emailVisibility": "t" if name == "cid" else "f",
            "role": "admin" if name == "ann" else "",
            "name": name.title(),
        }
        for name in ("ann", "bob", "cid")
    },
}


def update(table: TableName, record_id: str) -> Update:
    row = ROWS[table][record_id]
    return Update(table, row, WholeRow(row))


def caller_of(name: str) -> Caller:
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id=name)
    return Caller(record)


@dataclass
class Stage:
    """A hub on a real database, with a changelog that the test writes."""

    hub: Hub
    changelog: Changelog
    _end: int = FAR

    async def listen(
        self, *topics: str, caller: Caller, position: str | None = None
    ) -> tuple[Connection, MemorySink]:
        sink = MemorySink()
        connection = self.hub.open_connection(
            sink, address="", last_event_id=None, position=position
        )
        await self.hub.subscribe(connection.id, topics, caller, "")
        return connection, sink

    def commit(self, *changes: Change) -> None:
        self._end += 100
        # The first transaction of every database: visible to every snapshot.
        made = Transaction(Xid(3), LSN(self._end), 0, changes, 100)
        self.changelog.append(made)
        self.hub.wake()

    async def settled(self) -> None:
        async with asyncio.timeout(DEADLINE):
            while self.hub.head < self.changelog.end_cursor:
                self.hub.progressed.clear()
                await self.hub.progressed.wait()


@asynccontextmanager
async def open_stage(database_url: str, seconds: float = 2.0) -> AsyncIterator[Stage]:
    configured = {
        name: CollectionConfig.model_validate({"table": f"public.{name}", **more})
        for name, more in COLLECTIONS.items()
    }
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection,
        QueryPool(database_url, statement_timeout=seconds) as pool,
    ):
        await connection.execute(SCHEMA.encode())
        names = configured_table_names(configured, ["public"])
        collections = build_collections(
            configured, await read_catalog(connection, schemas=["public"], names=names)
        )
        changelog = Changelog(LSN(FAR), max_bytes=1_000_000, max_age_seconds=300)
        hub = Hub(changelog, QueryExecutor(pool), collections, HubSettings())
        hub.stream_started("abcdef")
        task = asyncio.create_task(hub.run())
        try:
            yield Stage(hub, changelog)
        finally:
            task.cancel()
            for one in list(hub.connections):
                hub.remove_connection(one)
            await asyncio.gather(task, return_exceptions=True)


def records(sink: MemorySink) -> list[dict[str, Any]]:
    data = [json.loads(data) for _, event, data in sink.events() if event != "PB_CONNECT"]
    return [one["record"] for one in data]


TOPICS = (
    "posts/*",
    topic("posts/*", expand="author,tags"),
    topic(
        "posts/*", expand="author,tags,nope", fields="id,tags,expand.author.email,expand.tags.label"
    ),
    topic("posts/1", expand="tags.posts_via_tags.author"),
    "people/*",
    topic("people/*", expand="posts_via_author"),
)

CALLERS = {
    "guest": Caller(),
    "ann": caller_of("ann"),
    "bob": caller_of("bob"),
    "root": Caller(Superuser("root")),
}


async def test_reading_on_shows_what_live_connections_were_shown(database_url: str) -> None:
    """Related records, junction ids and e-mail addresses are the same for each caller."""
    async with open_stage(database_url) as stage:
        live = {}
        for name, caller in CALLERS.items():
            live[name] = (await stage.listen(*TOPICS, caller=caller))[1]
        positions = {}
        for name, caller in CALLERS.items():
            connection, sink = await stage.listen("PB_CURSOR", caller=caller, position="")
            positions[name] = connection.position.decode()
            stage.hub.remove_connection(connection)
        stage.commit(*(update(POSTS, n) for n in "123"), update(PEOPLE, "bob"))
        stage.commit(update(PEOPLE, "ann"), update(PEOPLE, "cid"))
        stage.commit(Insert(POSTS, ROWS[POSTS]["1"]), Delete(POSTS, WholeRow(ROWS[POSTS]["2"])))
        await stage.settled()
        read_on = {}
        for name, caller in CALLERS.items():
            _, sink = await stage.listen(*TOPICS, caller=caller, position=positions[name])
            await sink.wait_for(len(live[name].events()))
            read_on[name] = sink

        for name in CALLERS:
            shown = [records(sink) for sink in (live[name], read_on[name])]
            assert len(shown[0]) > 20
            in_order = [sorted(map(json.dumps, part)) for part in shown]
            assert in_order[0] == in_order[1], name


async def test_a_record_shows_the_ids_of_its_junction_table(database_url: str) -> None:
    """PocketBase keeps such a list in the record.

    Here it comes from the junction's current rows.
    """
    async with open_stage(database_url) as stage:
        _, sink = await stage.listen("posts/*", caller=Caller())
        stage.commit(*(update(POSTS, n) for n in "123"))
        await sink.wait_for(4)

        assert [one["tags"] for one in records(sink)] == [["1", "2"], ["1"], []]


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("guest", [None, None, "cid@x"]),
        ("bob", [None, "bob@x", "cid@x"]),
        # Ann sees her own address as its owner: the manage rule is about others.
        ("ann", ["ann@x", "bob@x", "cid@x"]),
        ("root", ["ann@x", "bob@x", "cid@x"]),
    ],
)
async def test_addresses_are_shown_to_their_owners_and_managers(
    database_url: str, name: str, seen: list[str | None]
) -> None:
    async with open_stage(database_url) as stage:
        _, sink = await stage.listen("people/*", caller=CALLERS[name])
        stage.commit(*(update(PEOPLE, one) for one in ("ann", "bob", "cid")))
        await sink.wait_for(4)

        assert [one.get("email") for one in records(sink)] == seen


async def test_a_filter_is_part_of_managing(database_url: str) -> None:
    """The manage rule is evaluated with the subscription's filter (protocol, 6.5)."""
    async with open_stage(database_url) as stage:
        topics = [topic("people/*", filter=text) for text in ('name = "Bob"', 'name != "Bob"')]
        _, sink = await stage.listen(*topics, caller=CALLERS["ann"])
        stage.commit(update(PEOPLE, "bob"), update(PEOPLE, "cid"))
        await sink.wait_for(3)

        assert [(one["id"], one.get("email")) for one in records(sink)] == [
            ("bob", "bob@x"),
            ("cid", "cid@x"),
        ]


WAITING = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ~ 'post_tags'
"""


@asynccontextmanager
async def locked(database_url: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Lock the junction table; yield a connection that can find and cancel the waiting queries."""
    async with (
        await psycopg.AsyncConnection.connect(database_url) as holder,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as watch,
    ):
        await holder.execute("LOCK TABLE post_tags IN ACCESS EXCLUSIVE MODE")
        yield watch
        await holder.rollback()


async def waiter(watch: psycopg.AsyncConnection[Any]) -> int:
    async with asyncio.timeout(DEADLINE):
        while not (row := await (await watch.execute(WAITING)).fetchone()):
            await asyncio.sleep(0.01)
    return int(row[0])


def event_names(sink: MemorySink) -> list[str]:
    return [event.partition("?")[0] for _, event, _ in sink.events()[1:]]


async def test_enrichment_is_read_again_when_its_connection_breaks(database_url: str) -> None:
    """A broken connection is no failure of the query; the next connection answers it."""
    async with open_stage(database_url) as stage:
        topics = ["posts/*", topic("posts/*", expand="tags"), "PB_RESYNC"]
        _, sink = await stage.listen(*topics, caller=Caller())
        async with locked(database_url) as watch:
            stage.commit(update(POSTS, "1"))
            pid = await waiter(watch)
            await watch.execute("SELECT pg_terminate_backend(%s)", (pid,))
        await sink.wait_for(3)

        assert event_names(sink) == ["posts/*", "posts/*"]
        assert [one["tags"] for one in records(sink)] == [["1", "2"], ["1", "2"]]
        assert [len(one["expand"]["tags"]) for one in records(sink) if "expand" in one] == [2]


async def test_enrichment_that_cannot_be_read_is_a_gap(database_url: str) -> None:
    """A lock outlasts two attempts.

    Only connections that would have been shown the data are notified.
    """
    async with open_stage(database_url, seconds=0.2) as stage:
        _, sink = await stage.listen("posts/*", "PB_RESYNC", caller=Caller())
        _, other = await stage.listen("people/*", "PB_RESYNC", caller=Caller())
        async with locked(database_url):
            stage.commit(update(POSTS, "1"), update(PEOPLE, "cid"))
            await sink.wait_for(3)
        stage.commit(update(POSTS, "2"), update(PEOPLE, "cid"))
        await sink.wait_for(4)
        await other.wait_for(3)

        assert event_names(sink) == ["posts/*", "PB_RESYNC", "posts/*"]
        assert event_names(other) == ["people/*", "people/*"]


async def test_an_expand_that_fails_is_a_gap_for_topics_that_request_it(database_url: str) -> None:
    """Their topics may share a group with topics without expand."""
    async with open_stage(database_url, seconds=0.2) as stage:
        expanding = topic("tags/*", expand="posts_via_tags")
        _, sink = await stage.listen(expanding, "PB_RESYNC", caller=Caller())
        _, other = await stage.listen("tags/*", "PB_RESYNC", caller=Caller())
        row: Row = {"id": "1", "label": "one"}
        change = Update(TableName("public", "tags"), row, WholeRow(row))
        async with locked(database_url):
            stage.commit(change)
            await sink.wait_for(3)
        stage.commit(change)
        await sink.wait_for(4)
        await other.wait_for(3)

        assert event_names(sink) == ["tags/*", "PB_RESYNC", "tags/*"]
        assert event_names(other) == ["tags/*", "tags/*"]
