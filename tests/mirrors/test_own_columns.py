"""Mirrors whose rules read the row's own columns: each row enters and leaves by an event."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.mirrors.client import SECONDS
from tests.mirrors.scene import scene

SCHEMA = """
CREATE TABLE tasks (id text PRIMARY KEY, owner text, done boolean, note text);
ALTER TABLE tasks REPLICA IDENTITY FULL;
INSERT INTO tasks VALUES ('a', 'ann', false, 'x'), ('b', 'bob', false, 'x'), ('o', 'ann', true, '');
"""
RULE = "owner = @request.auth.id"
TASKS = {"tasks": {"table": "tasks", "list_rule": RULE, "view_rule": RULE}}


async def test_a_row_enters_stays_and_leaves(database_url: str) -> None:
    """As create, update, and a delete that names the id alone."""
    async with scene(database_url, SCHEMA, TASKS) as world:
        ann, bob = await world.client("tasks", "ann"), await world.client("tasks", "bob")
        assert set(ann.rows) == {"a", "o"}
        await world.write("UPDATE tasks SET note = 'z' WHERE id = 'a'")
        await world.write("UPDATE tasks SET owner = 'bob' WHERE id = 'a'")
        await world.write(
            "INSERT INTO tasks VALUES ('c', 'ann')", "DELETE FROM tasks WHERE id = 'o'"
        )
        await world.check()

    assert ann.log == [
        ("resync", ""),
        ("update", "a"),
        ("delete", "a"),
        ("create", "c"),
        ("delete", "o"),
    ]
    assert bob.log == [("resync", ""), ("create", "a")]
    assert bob.rows["a"]["note"] == "z"
    # Gone and out of sight are the same to a client.
    assert {tuple(one) for one in (ann.bodies[2], ann.bodies[4])} == {
        ("collectionId", "collectionName", "id")
    }
    assert ann.resyncs == bob.resyncs == {"start": 1}


LINKS = """
CREATE TABLE people (id text PRIMARY KEY);
CREATE TABLE watchers (task text, person text, PRIMARY KEY (task, person));
INSERT INTO people VALUES ('ann'), ('bob');
"""


async def test_a_row_enters_and_leaves_by_its_links(database_url: str) -> None:
    """What the rule reads of a junction table is part of the record that shows it."""
    watchers = {"collection": "people", "through": "watchers"}
    relation = {**watchers, "source": "task", "target": "person"}
    rule = "watchers.id ?= @request.auth.id"
    shown = {"table": "tasks", "relations": {"watchers": relation}}
    tasks = {**shown, "list_rule": rule, "view_rule": rule}
    people = {"table": "people", "list_rule": "", "view_rule": ""}
    async with scene(database_url, SCHEMA + LINKS, {"tasks": tasks, "people": people}) as world:
        ann = await world.client("tasks", "ann")
        assert not ann.rows
        # Each by itself: links are read at or just after their commit.
        for written in (
            "INSERT INTO watchers VALUES ('a', 'ann'), ('b', 'bob')",
            "INSERT INTO watchers VALUES ('a', 'bob')",
            "DELETE FROM watchers WHERE person = 'ann'",
            "INSERT INTO watchers VALUES ('a', 'ann')",
            "UPDATE watchers SET task = 'o' WHERE task = 'a' AND person = 'ann'",
        ):
            await world.write(written)
            await world.check()

    assert ann.log[1:] == [
        ("create", "a"),
        ("update", "a"),
        ("delete", "a"),
        ("create", "a"),
        ("delete", "a"),
        ("create", "o"),
    ]
    assert ann.resyncs == {"start": 1}


PEOPLE = """
CREATE TABLE users (id text PRIMARY KEY, team text, seen int);
ALTER TABLE users REPLICA IDENTITY FULL;
INSERT INTO users VALUES ('ann', 'bob', 0), ('bob', 'bob', 0);
"""


def by_team(list_rule: str = "owner = @request.auth.team", **more: Any) -> dict[str, Any]:
    tasks = {"table": "tasks", "list_rule": list_rule, "view_rule": "owner = @request.auth.id"}
    return {"users": {"table": "users", "type": "auth", "list_rule": ""}, "tasks": tasks, **more}


async def test_a_caller_who_becomes_another_loads_anew(database_url: str) -> None:
    """By the values that its rule reads, and by no others."""
    async with scene(database_url, SCHEMA + PEOPLE, by_team()) as world:
        ann, bob = await world.client("tasks", "ann"), await world.client("tasks", "bob")
        single = await world.client("tasks", "ann", record_id="a")
        await world.write("UPDATE users SET seen = 1")
        await world.check()
        before = dict(ann.resyncs)
        await world.write("UPDATE users SET team = 'ann' WHERE id = 'ann'")
        await world.check()

    assert before == {"start": 1}
    assert ann.resyncs == {"start": 1, "identity": 1}
    assert set(ann.rows) == {"a", "o"}
    assert bob.resyncs == single.resyncs == {"start": 1}


async def test_a_caller_who_became_another_while_away_loads_anew(database_url: str) -> None:
    """Its events were missed as who it was."""
    async with scene(database_url, SCHEMA + PEOPLE, by_team()) as world:
        ann = await world.client("tasks", "ann", is_resumable=True)
        bob = await world.client("tasks", "bob", is_resumable=True)
        await world.write("UPDATE tasks SET note = 'n'")
        await world.settle()
        for client in (ann, bob):
            await client.disconnect()
        await world.write(
            "UPDATE users SET team = 'ann' WHERE id = 'ann'", "UPDATE users SET seen = 2"
        )
        await world.write("UPDATE tasks SET owner = 'ann' WHERE id = 'b'")
        for client in (ann, bob):
            await client.connect()
        await world.check()

    assert ann.resyncs == {"start": 1, "identity": 1}
    assert bob.resyncs == {"start": 1}
    assert bob.log[-1] == ("delete", "b")


async def test_other_rules_are_told_to_whom_they_are_other(database_url: str) -> None:
    everyone = {"table": "users", "type": "auth", "list_rule": ""}
    async with scene(database_url, SCHEMA + PEOPLE, by_team()) as world:
        ann = await world.client("tasks", "ann")
        single = await world.client("tasks", "ann", record_id="a")
        users = await world.client("users", "ann")
        await world.reload(by_team(users=everyone))
        await world.check()
        before = dict(ann.resyncs)
        await world.reload(by_team("done = true"))
        await world.check()

    assert before == {"start": 1}
    assert ann.resyncs == {"start": 1, "rules": 1}
    assert single.resyncs == users.resyncs == {"start": 1}


async def test_a_column_that_is_added_is_told_to_those_whose_records_show_it(
    database_url: str,
) -> None:
    async with scene(database_url, SCHEMA + PEOPLE, by_team()) as world:
        ann, users = await world.client("tasks", "ann"), await world.client("users", "ann")
        await world.write("ALTER TABLE tasks ADD COLUMN more text", "UPDATE tasks SET more = 'x'")
        async with asyncio.timeout(SECONDS):  # the schema is read anew after a while
            while not ann.resyncs["rules"]:
                await asyncio.sleep(0.05)
        await world.check()

    assert ann.resyncs == {"start": 1, "rules": 1}
    assert ann.rows["b"]["more"] == "x"
    assert users.resyncs == {"start": 1}
