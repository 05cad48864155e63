"""Subscribers that could see a record before its delete receive that, also in a cascade."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.listener import listener
from tests.e2e.service import service, token

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY);
CREATE TABLE projects (id text PRIMARY KEY, open boolean NOT NULL);
CREATE TABLE tasks (
  id text PRIMARY KEY, project text NOT NULL REFERENCES projects ON DELETE CASCADE
);
CREATE TABLE task_people (
  task text REFERENCES tasks ON DELETE CASCADE, person text REFERENCES users,
  PRIMARY KEY (task, person)
);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE projects REPLICA IDENTITY FULL;
ALTER TABLE tasks REPLICA IDENTITY FULL;
ALTER TABLE task_people REPLICA IDENTITY FULL;
INSERT INTO users VALUES ('ann'), ('bob');
INSERT INTO projects VALUES ('p', true), ('q', false);
INSERT INTO tasks VALUES ('t1', 'p'), ('t2', 'p'), ('t3', 'q');
INSERT INTO task_people VALUES ('t1', 'ann'), ('t2', 'bob'), ('t3', 'ann');
"""

PEOPLE = {"collection": "users", "through": "task_people", "source": "task", "target": "person"}


async def test_a_cascade_reaches_exactly_the_subscribers_that_could_see_the_rows(
    database_url: str, tmp_path: Path
) -> None:
    """The parent and the junction rows are deleted first, in the same transaction."""
    rule = "project.open = true && people.id ?= @request.auth.id"
    collections: dict[str, dict[str, Any]] = {
        "users": {"table": "users", "type": "auth"},
        "projects": {"table": "projects"},
        "tasks": {"table": "tasks", "relations": {"people": PEOPLE}, "list_rule": rule},
    }
    async with (
        service(database_url, tmp_path, collections=collections, schema=SCHEMA) as running,
        listener(running.address, "tasks/*", token=token("ann")) as ann,
        listener(running.address, "tasks/*", token=token("bob")) as bob,
        listener(running.address, "tasks/*") as guest,
    ):
        await running.write.execute("DELETE FROM projects")
        async with running.write.transaction():
            await running.write.execute("INSERT INTO projects VALUES ('r', true)")
            await running.write.execute("INSERT INTO tasks VALUES ('end', 'r')")
            await running.write.execute(
                "INSERT INTO task_people VALUES ('end', 'ann'), ('end', 'bob')"
            )
        received = {
            name: [(m.data["action"], m.data["record"]["id"]) for m in await one.take(2)]
            for name, one in (("ann", ann), ("bob", bob))
        }
        assert received == {
            "ann": [("delete", "t1"), ("create", "end")],
            "bob": [("delete", "t2"), ("create", "end")],
        }
        assert not guest.stream.waiting


SPELT = """
CREATE TABLE projects (id numeric PRIMARY KEY, open boolean NOT NULL);
CREATE TABLE tasks (
  id text PRIMARY KEY, project numeric NOT NULL REFERENCES projects ON DELETE CASCADE
);
ALTER TABLE projects REPLICA IDENTITY FULL;
ALTER TABLE tasks REPLICA IDENTITY FULL;
INSERT INTO projects VALUES (1.0, true), (2.0, false), (3, true);
INSERT INTO tasks VALUES ('t1', 1.00), ('t2', 2.00);
"""


async def test_a_cascade_is_found_by_ids_that_are_equal_and_spelt_differently(
    database_url: str, tmp_path: Path
) -> None:
    """A numeric keeps its trailing zeros in PostgreSQL; a value equal to it may have others."""
    collections: dict[str, dict[str, Any]] = {
        "projects": {"table": "projects"},
        "tasks": {"table": "tasks", "list_rule": "project.open = true"},
    }
    async with (
        service(database_url, tmp_path, collections=collections, schema=SPELT) as running,
        listener(running.address, "tasks/*") as guest,
    ):
        await running.write.execute("DELETE FROM projects WHERE id < 3")
        await running.write.execute("INSERT INTO tasks VALUES ('end', 3)")
        received = [(m.data["action"], m.data["record"]["id"]) for m in await guest.take(2)]
        assert received == [("delete", "t1"), ("create", "end")]


MANY = """
CREATE TABLE users (id text PRIMARY KEY);
CREATE TABLE teams (id int PRIMARY KEY, open boolean NOT NULL);
CREATE TABLE projects (
  id text PRIMARY KEY, team int NOT NULL REFERENCES teams ON DELETE CASCADE,
  open boolean NOT NULL, owner text NOT NULL
);
CREATE TABLE tasks (
  id text PRIMARY KEY, project text NOT NULL REFERENCES projects ON DELETE CASCADE
);
CREATE INDEX ON projects (team);
CREATE INDEX ON tasks (project);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE teams REPLICA IDENTITY FULL;
ALTER TABLE projects REPLICA IDENTITY FULL;
ALTER TABLE tasks REPLICA IDENTITY FULL;
INSERT INTO users VALUES ('ann');
"""


@pytest.mark.parametrize(
    "rule",
    ["project.open = true", "project.owner = @request.auth.id", "project.team.open = true"],
    ids=["of-the-row", "of-the-subscriber", "over-two"],
)
async def test_a_deleted_row_costs_the_same_however_many_went_with_it(
    database_url: str, tmp_path: Path, rule: str
) -> None:
    """A deleted row is evaluated with the rows that it referenced, not with all deleted ones."""
    collections: dict[str, dict[str, Any]] = {
        "users": {"table": "users", "type": "auth"},
        "teams": {"table": "teams"},
        "projects": {"table": "projects"},
        "tasks": {"table": "tasks", "list_rule": rule},
    }
    async with (
        service(database_url, tmp_path, collections=collections, schema=MANY) as running,
        listener(running.address, "tasks/*", token=token("ann")) as ann,
    ):
        seconds = {}
        for size in (500, *SIZES):
            await running.write.execute(
                "INSERT INTO teams SELECT n, n = %(n)s FROM generate_series(1, %(n)s) n",
                {"n": size},
            )
            await running.write.execute(
                "INSERT INTO projects SELECT 'p' || n, n, n = %(n)s,"
                " CASE n WHEN %(n)s THEN 'ann' ELSE 'x' END FROM generate_series(1, %(n)s) n",
                {"n": size},
            )
            await running.write.execute(
                "INSERT INTO tasks SELECT 't' || n, 'p' || n FROM generate_series(1, %s) n", [size]
            )
            (created,) = await ann.take(1, 60)
            assert created.data["record"]["id"] == f"t{size}"
            await running.write.execute("DELETE FROM teams")
            began = time.perf_counter()
            (deleted,) = await ann.take(1, 60)
            seconds[size] = time.perf_counter() - began
            assert (deleted.data["action"], deleted.data["record"]["id"]) == ("delete", f"t{size}")
        few, many = SIZES
        assert seconds[many] / many < 3 * seconds[few] / few, seconds


SIZES = 2_000, 16_000
"""Rows of each table.

If each row were evaluated with all of them, one would cost eight times as much.
"""
