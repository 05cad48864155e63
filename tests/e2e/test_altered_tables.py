"""Tables are altered while the program runs: rows committed right afterwards arrive correctly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.listener import Caller, Listener, Message, listener
from tests.e2e.service import SECRET, Service, service, token

SCHEMA = """
CREATE TABLE posts (
  id text PRIMARY KEY, title text, n int, data jsonb, done bool, day date, at timestamptz
);
CREATE TABLE places (id text PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE places_a PARTITION OF places FOR VALUES FROM ('a') TO ('b');
CREATE TABLE places_b PARTITION OF places FOR VALUES FROM ('b') TO ('c');
CREATE TABLE marks (id text PRIMARY KEY);
CREATE TABLE people (id text PRIMARY KEY);
CREATE TABLE trip_people (
  trip text, person text REFERENCES people, PRIMARY KEY (trip, person)
);
CREATE TYPE spot AS (north int, name text);
CREATE TABLE trips (id text PRIMARY KEY, stops spot[]);
INSERT INTO people VALUES ('ann'), ('bob');
ALTER TABLE trip_people REPLICA IDENTITY FULL;
ALTER TABLE trips REPLICA IDENTITY FULL;
INSERT INTO posts VALUES ('0', 't', 1, '{"a": 1}', true, '2026-11-28', '2026-11-28 12:00+00');
ALTER TABLE posts REPLICA IDENTITY FULL;
"""
OPEN = {"list_rule": "", "view_rule": ""}
COLLECTIONS: dict[str, Any] = {
    "posts": {"table": "posts", **OPEN},
    "places": {"table": "places", **OPEN},
    "marks": {"table": "marks", **OPEN},
    "trips": {"table": "trips", **OPEN},
}
PUBLICATION = (
    # By name a partition stays published when it is detached.
    "CREATE PUBLICATION pgrealtime FOR TABLE posts, places_a, places_b, marks, trips;"
)


@asynccontextmanager
async def serving(database_url: str, directory: Path, plugin: str) -> AsyncIterator[Service]:
    async with service(
        database_url,
        directory,
        schema=SCHEMA + (PUBLICATION if plugin == "pgoutput" else ""),
        collections=COLLECTIONS,
        sections={"replication": {"plugin": plugin}},
    ) as running:
        yield running


async def received(to: Listener, running: Service) -> list[Message]:
    """Return what was received of everything that is committed by now."""
    await running.write.execute("INSERT INTO marks VALUES (gen_random_uuid()::text)")
    messages: list[Message] = []
    while not messages or messages[-1].event != "marks/*":
        messages += await to.take(1)
    return messages[:-1]


def shown(message: Message, field: str) -> object:
    assert message.event == "posts/*", message
    return message.data["record"][field]


either_plugin = pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])


ALTER = """
ALTER TABLE posts ALTER data TYPE text, ALTER done TYPE text, ALTER day TYPE text,
  ALTER at TYPE text, ALTER title TYPE int USING 1, ALTER n TYPE bool USING true
"""
NEW = (
    """data = 'not JSON', done = 'maybe', day = 'some day', at = 'at noon', title = 7, n = false"""
)
SHOWN = {
    "data": "not JSON",
    "done": "maybe",
    "day": "some day",
    "at": "at noon",
    "title": 7,
    "n": False,
}


@either_plugin
@pytest.mark.parametrize("is_one_commit", [False, True], ids=["apart", "together"])
async def test_rows_right_after_a_change_of_types_are_shown_by_the_new_ones(
    database_url: str, tmp_path: Path, plugin: str, *, is_one_commit: bool
) -> None:
    """One row from before and one from after; nothing is lost or a gap."""
    statements = (
        ALTER,
        f"UPDATE posts SET {NEW} WHERE id = '0'",
        "INSERT INTO posts SELECT '1', title, n, data, done, day, at FROM posts",
    )
    async with (
        serving(database_url, tmp_path, plugin) as running,
        listener(running.address, "posts/*", "marks/*", "PB_RESYNC") as guest,
    ):
        await running.write.execute("UPDATE posts SET title = title")
        assert [shown(one, "id") for one in await received(guest, running)] == ["0"]
        if is_one_commit:
            await running.write.execute(";".join(statements).encode())
        else:
            for statement in statements:
                await running.write.execute(statement.encode())
        messages = await received(guest, running)

    for message, record_id in zip(messages, ("0", "1"), strict=True):
        assert {name: shown(message, name) for name in SHOWN} == SHOWN
        assert shown(message, "id") == record_id


@either_plugin
async def test_rows_right_after_a_column_is_renamed_are_shown_under_its_new_name(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    async with (
        serving(database_url, tmp_path, plugin) as running,
        listener(running.address, "posts/*", "marks/*", "PB_RESYNC") as guest,
    ):
        await running.write.execute("ALTER TABLE posts RENAME title TO headline")
        await running.write.execute("INSERT INTO posts (id, headline) VALUES ('1', 'h')")
        (message,) = await received(guest, running)

    assert shown(message, "headline") == "h"
    assert "title" not in message.data["record"]


@either_plugin
async def test_rows_between_two_changes_of_type_are_shown_or_a_gap(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """The catalogue may be read only after the second change: then the first row is a gap."""
    async with (
        serving(database_url, tmp_path, plugin) as running,
        listener(running.address, "posts/*", "marks/*", "PB_RESYNC") as guest,
    ):
        async with running.write.transaction():
            await running.write.execute("ALTER TABLE posts ALTER n TYPE text")
            await running.write.execute("INSERT INTO posts (id, n) VALUES ('1', 'many')")
            await running.write.execute("ALTER TABLE posts ALTER n TYPE bool USING true")
            await running.write.execute("INSERT INTO posts (id, n) VALUES ('2', false)")
        await running.write.execute("INSERT INTO posts (id, n) VALUES ('3', false)")
        gap, after = await received(guest, running)

    assert (gap.event, gap.data) == ("PB_RESYNC", {"collections": ["posts"], "reason": "schema"})
    assert (shown(after, "id"), shown(after, "n")) == ("3", False)


@either_plugin
async def test_rows_before_a_change_of_type_are_a_gap_for_clients_that_resume(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """The schema in force can't reproduce how they were shown."""
    async with serving(database_url, tmp_path, plugin) as running:
        async with listener(running.address, "posts/*", "marks/*", "PB_CURSOR") as first:
            await running.write.execute("UPDATE posts SET title = 'a'")
            messages = await received(first, running)
            (position,) = [one.id for one in messages if one.event == "posts/*"]
        await running.write.execute("UPDATE posts SET title = 'b'")
        await running.write.execute("ALTER TABLE posts ALTER data TYPE text")
        await running.write.execute("INSERT INTO posts (id, data) VALUES ('1', 'x')")
        await running.process.wait_logged("schema.changed")
        back = Caller(headers={"Last-Event-ID": position})
        async with listener(
            running.address, "posts/*", "marks/*", "PB_RESYNC", caller=back
        ) as again:
            assert (
                await received(again, running) == []
            )  # up to the first mark, which is missed as well
            gap, after = await received(again, running)

    assert (gap.event, gap.data) == ("PB_RESYNC", {"collections": ["posts"], "reason": "schema"})
    assert shown(after, "data") == "x"


@either_plugin
async def test_rows_of_a_detached_partition_are_not_the_tables_any_more(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """The decoder pgoutput describes the relation anew before its next row.

    For wal2json the catalogue is queried.
    """
    async with (
        serving(database_url, tmp_path, plugin) as running,
        listener(running.address, "places/*", "marks/*", "PB_RESYNC") as guest,
    ):
        await running.write.execute("INSERT INTO places VALUES ('a1'), ('b1')")
        before = await received(guest, running)
        assert [one.data["record"]["id"] for one in before] == ["a1", "b1"]
        await running.write.execute("ALTER TABLE places DETACH PARTITION places_a")
        await running.write.execute("INSERT INTO places_a VALUES ('a secret')")
        await running.write.execute("INSERT INTO places VALUES ('b2')")
        messages = await received(guest, running)

    events = {one.event for one in messages}
    assert events <= {"PB_RESYNC", "places/*"}
    assert "PB_RESYNC" in events
    assert "a secret" not in str(messages)


@either_plugin
async def test_attributes_of_a_composite_have_the_names_that_they_have_by_then(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """The stream has the values only, and the column's type stays the same."""
    async with (
        serving(database_url, tmp_path, plugin) as running,
        listener(running.address, "trips/*", "marks/*", "PB_RESYNC") as guest,
    ):
        shown_as: list[object] = []
        for statement in (
            "INSERT INTO trips VALUES ('1', '{\"(1,a)\"}')",
            "ALTER TYPE spot ADD ATTRIBUTE east int",
            "INSERT INTO trips VALUES ('2', '{\"(1,b,2)\"}')",
            "ALTER TYPE spot RENAME ATTRIBUTE north TO up",
            "INSERT INTO trips VALUES ('3', '{\"(1,c,2)\"}')",
            "ALTER TYPE spot DROP ATTRIBUTE up",
            "INSERT INTO trips VALUES ('4', '{\"(d,2)\"}')",
        ):
            await running.write.execute(statement.encode())
            if statement.startswith("INSERT"):
                shown_as += [one.data["record"]["stops"] for one in await received(guest, running)]

    assert shown_as == [
        [{"north": 1, "name": "a"}],
        [{"north": 1, "name": "b", "east": 2}],
        [{"up": 1, "name": "c", "east": 2}],
        [{"name": "d", "east": 2}],
    ]


LINKED = "CREATE PUBLICATION pgrealtime FOR TABLE people, marks, trips, trip_people;"
RENAME = "ALTER TABLE trip_people RENAME person TO who"
RETYPE = "ALTER TABLE trip_people ALTER person TYPE varchar(40)"


@either_plugin
@pytest.mark.parametrize(
    ("statements", "received_ids"),
    [pytest.param((RETYPE,), ["t"], id="another-type"), pytest.param((RENAME,), [], id="renamed")],
)
async def test_a_deleted_record_is_evaluated_with_links_whose_table_was_altered(
    database_url: str,
    tmp_path: Path,
    plugin: str,
    statements: tuple[str, ...],
    received_ids: list[str],
) -> None:
    """Users that it was linked to receive its delete or a gap; others receive nothing.

    A configured column that no longer exists locks the collection.
    """
    through = {"collection": "people", "through": "trip_people", "source": "trip"}
    collections: dict[str, dict[str, Any]] = {
        "people": {"table": "people", "type": "auth"},
        "marks": {"table": "marks", **OPEN},
        "trips": {
            "table": "trips",
            "relations": {"people": {**through, "target": "person"}},
            "list_rule": "people.id ?= @request.auth.id",
        },
    }
    auth = {"issuers": [{"name": "app", "secret": SECRET, "collection": "people"}]}
    topics = ("trips/*", "marks/*", "PB_RESYNC")
    async with (
        service(
            database_url,
            tmp_path,
            schema=SCHEMA + (LINKED if plugin == "pgoutput" else ""),
            collections=collections,
            sections={"replication": {"plugin": plugin}, "auth": auth},
        ) as running,
        listener(running.address, *topics, token=token("ann")) as ann,
        listener(running.address, *topics, token=token("bob")) as bob,
    ):
        async with running.write.transaction():
            await running.write.execute("INSERT INTO trips VALUES ('t')")
            await running.write.execute("INSERT INTO trip_people VALUES ('t', 'ann')")
        await received(ann, running)
        await bob.take(1)
        for statement in statements:
            await running.write.execute(statement.encode())
        async with running.write.transaction():
            await running.write.execute("DELETE FROM trip_people")
            await running.write.execute("DELETE FROM trips")
        events = await received(ann, running)
        others = await received(bob, running)

    assert [one.data["record"]["id"] for one in events if one.event == "trips/*"] == received_ids
    assert {one.event for one in others} <= {"marks/*", "PB_RESYNC"}
