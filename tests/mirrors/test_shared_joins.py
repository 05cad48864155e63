"""A mirror's rule and filter are about the same related rows, as those of a list are.

PocketBase's realtime asks each by itself: by that a task of a project whose members are Ann and Bob
would be told to Ann, who filters by Bob, though no list shows it to her.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.mirrors.scene import scene

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY);
CREATE TABLE projects (id text PRIMARY KEY);
CREATE TABLE members (
  id text PRIMARY KEY, project text REFERENCES projects, usr text REFERENCES users, rank int
);
CREATE TABLE tasks (id text PRIMARY KEY, project text REFERENCES projects, tags text[], note text);
ALTER TABLE tasks REPLICA IDENTITY FULL;
ALTER TABLE members REPLICA IDENTITY FULL;
INSERT INTO users VALUES ('ann'), ('bob');
INSERT INTO projects VALUES ('p');
INSERT INTO members VALUES ('a', 'p', 'ann', 1), ('b', 'p', 'bob', 2);
INSERT INTO tasks VALUES ('t', 'p', '{x,y}');
"""
MEMBER = "project.members_via_project.usr ?= @request.auth.id"
OF_BOB = 'project.members_via_project.usr ?= "bob"'
RANKED = "project.members_via_project.rank ?= 2"


def collections(rule: str) -> dict[str, Any]:
    everyone = {"list_rule": "", "view_rule": ""}
    return {
        "users": {"table": "users", "type": "auth"},
        "projects": {"table": "projects", **everyone},
        "members": {"table": "members", **everyone},
        "tasks": {"table": "tasks", "list_rule": rule, "view_rule": rule},
    }


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (
            MEMBER,
            {
                OF_BOB: "",
                RANKED: "",
                'project.members_via_project.usr ?= "ann"': "update",
                # All of them, whoever is asked.
                "project.members_via_project.rank > 0": "update",
            },
        ),
        (f'{MEMBER} || note = "z"', {RANKED: "create"}),
        ('tags:each ?= "x"', {'tags:each ?= "x"': "update", 'tags:each ?= "y"': ""}),
    ],
)
async def test_a_row_that_no_list_shows_is_not_told(
    database_url: str, rule: str, told: dict[str, str]
) -> None:
    async with scene(database_url, SCHEMA, collections(rule)) as world:
        for filter_text in told:
            await world.client("tasks", "ann", filter=filter_text)
        await world.write("UPDATE tasks SET note = 'z'")
        await world.check()

        assert {
            client.filter: " ".join(action for action, _ in client.log[1:])
            for client in world.clients
        } == told


@pytest.mark.parametrize(
    "statements",
    [
        ("UPDATE tasks SET project = 'q'", "UPDATE tasks SET project = NULL"),
        ("UPDATE tasks SET project = 'q'", "DELETE FROM projects WHERE id = 'q'"),
        ("UPDATE tasks SET project = 'q'", "UPDATE tasks SET note = 'z'"),
    ],
)
async def test_a_row_that_points_to_a_new_row_and_away_again_is_not_kept(
    database_url: str, statements: tuple[str, ...]
) -> None:
    """By related rows after the transaction it enters; by those before it, it never leaves."""
    schema = f"{SCHEMA} ALTER TABLE projects ADD public boolean; ALTER TABLE tasks DROP CONSTRAINT"
    schema += (
        " tasks_project_fkey, ADD FOREIGN KEY (project) REFERENCES projects ON DELETE SET NULL;"
    )
    async with scene(database_url, schema, collections("project.public = true")) as world:
        await world.client("tasks", "ann")
        await world.write("INSERT INTO projects VALUES ('q', true)", *statements)
        await world.check()
