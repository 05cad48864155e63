"""Mirrors whose rules read related rows, while the database is ahead of the stream."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from pgrealtime.changes import Delete, Insert, Row, TableName, Update, WholeRow
from pgrealtime.config.model import CollectionConfig, MirrorsConfig, RelationConfig
from tests.attacks.held_stream import World, world_of
from tests.topics import topic

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, role text);
CREATE TABLE projects (id text PRIMARY KEY, status text);
CREATE TABLE members (id text PRIMARY KEY, project text REFERENCES projects, usr text);
CREATE TABLE tasks (id text PRIMARY KEY, project text REFERENCES projects, author text);
INSERT INTO users VALUES ('ann', 'admin'), ('bob', '');
INSERT INTO projects VALUES ('p', 'pub'), ('q', 'pub');
INSERT INTO members VALUES ('m', 'p', 'ann');
INSERT INTO tasks VALUES ('t', 'p', 'ann');
"""
USERS, PROJECTS = TableName("public", "users"), TableName("public", "projects")
MEMBERS, TASKS = TableName("public", "members"), TableName("public", "tasks")
MIRROR = topic("tasks/*", mode="mirror")
MEMBERSHIP = "project.members_via_project.usr ?= @request.auth.id"


def configured(rule: str) -> dict[str, CollectionConfig]:
    def to(name: str) -> RelationConfig:
        return RelationConfig(collection=name)

    author = {"author": to("users")}
    return {
        "users": CollectionConfig(table="public.users", type="auth"),
        "projects": CollectionConfig(table="public.projects"),
        "members": CollectionConfig(table="public.members", relations={"usr": to("users")}),
        "tasks": CollectionConfig(table="public.tasks", list_rule=rule, relations=author),
    }


def changed(table: TableName, old: Row, **new: str) -> Update:
    return Update(table, {**old, **new}, WholeRow(old))


async def told(world: World, name: str = "ann") -> list[str]:
    """Return what the mirror was told, once no resync waits."""
    async with asyncio.timeout(5):
        while world.hub._registry.mirrors_to_resync:
            world.hub.wake()
            await asyncio.sleep(0.005)
    found: list[dict[str, Any]] = [json.loads(data) for data in world.data(name)]
    return [f"{one['action']} {one.get('reason') or one['record']['id']}" for one in found]


SETTINGS = {"mirrors": MirrorsConfig.model_validate({"pace": "1ms"})}
P: Row = {"id": "p", "status": "pub"}
M: Row = {"id": "m", "project": "p", "usr": "ann"}


async def test_two_changes_that_hide_a_row_are_not_taken_for_none(database_url: str) -> None:
    """Both are in the tables when the first is evaluated, so that it hides nothing by them.

    It is the related change that tells, whatever it is found to have changed.
    """
    rule = 'project.status = "pub" && author.role = "admin"'
    async with world_of(database_url, SCHEMA, configured(rule), **SETTINGS) as world:
        await world.listen("ann", MIRROR, await world.user("ann"))
        ann: Row = {"id": "ann", "role": "admin"}
        task: Row = {"id": "t", "project": "p", "author": "ann"}
        first = await world.write(
            "UPDATE projects SET status = 'draft' WHERE id = 'p'; UPDATE tasks SET id = id",
            changed(PROJECTS, P, status="draft"),
            changed(TASKS, task),
        )
        second = await world.write("UPDATE users SET role = ''", changed(USERS, ann, role=""))
        await world.stream(first)
        after_first = await told(world)
        await world.stream(second)

        assert after_first[0] == "resync start"
        assert after_first[-1] == "resync related"
        assert (await told(world))[-1] == "resync related"


async def test_a_resync_comes_behind_the_events_of_its_transaction(database_url: str) -> None:
    """They would fall onto the list that is loaded."""
    async with world_of(database_url, SCHEMA, configured(MEMBERSHIP), **SETTINGS) as world:
        await world.listen("ann", MIRROR, await world.user("ann"))
        made = await world.write(
            "DELETE FROM members; INSERT INTO members VALUES ('n', 'q', 'ann');"
            " INSERT INTO tasks VALUES ('u', 'q', 'bob')",
            Delete(MEMBERS, WholeRow(M)),
            Insert(MEMBERS, {"id": "n", "project": "q", "usr": "ann"}),
            Insert(TASKS, {"id": "u", "project": "q", "author": "bob"}),
        )
        await world.stream(made)

        assert await told(world) == ["resync start", "create u", "resync related"]


async def test_a_member_who_left_again_is_told_of_the_coming_too(database_url: str) -> None:
    """By the tables nobody is a member any more when the change is evaluated."""
    async with world_of(database_url, SCHEMA, configured(MEMBERSHIP), **SETTINGS) as world:
        for name in ("ann", "bob"):
            await world.listen(name, MIRROR, await world.user(name))
        row: Row = {"id": "n", "project": "q", "usr": "bob"}
        came = await world.write(
            "INSERT INTO members VALUES ('n', 'q', 'bob')", Insert(MEMBERS, row)
        )
        went = await world.write(
            "DELETE FROM members WHERE id = 'n'", Delete(MEMBERS, WholeRow(row))
        )
        await world.stream(came)
        first = await told(world, "bob")
        await world.stream(went)

        assert first == ["resync start", "resync related"]
        assert await told(world, "bob") == ["resync start", *["resync related"] * 2]
        assert await told(world, "ann") == ["resync start"]


async def test_a_related_change_that_concerns_nobody_is_told_nobody(database_url: str) -> None:
    """A column that no rule reads, a member whom nobody is, a project that nobody points to yet."""
    async with world_of(database_url, SCHEMA, configured(MEMBERSHIP), **SETTINGS) as world:
        await world.listen("ann", MIRROR, await world.user("ann"))
        made = await world.write(
            "INSERT INTO projects VALUES ('r', 'pub'); UPDATE projects SET status = 'x';"
            " INSERT INTO members VALUES ('n', 'p', 'cid')",
            Insert(PROJECTS, {"id": "r", "status": "pub"}),
            changed(PROJECTS, P, status="x"),
            Insert(MEMBERS, {"id": "n", "project": "p", "usr": "cid"}),
        )
        await world.stream(made)

        assert await told(world) == ["resync start"]


async def test_who_resumes_is_told_what_concerned_it_meanwhile(database_url: str) -> None:
    async with world_of(database_url, SCHEMA, configured(MEMBERSHIP), **SETTINGS) as world:
        ann = await world.user("ann")
        await world.stream(
            await world.write("UPDATE projects SET status = 'x'", changed(PROJECTS, P))
        )
        await world.listen("ann", MIRROR, ann, position="")
        await told(world)
        position = world.sinks["ann"].events()[-1][0].partition(".")[2]
        gone = await world.write("DELETE FROM members", Delete(MEMBERS, WholeRow(M)))
        await world.stream(gone)
        await world.listen("again", MIRROR, ann, position=position)

        assert await told(world, "again") == ["resync related"]
