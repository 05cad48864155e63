"""What ``check`` says of mirrors: how right a list is kept by each rule, and what betters it."""

from __future__ import annotations

import asyncio

import psycopg

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.cli.check.mirrors import mirror_lines
from pgrealtime.collections.build import build_collections
from pgrealtime.config.model import CollectionConfig

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, role text);
CREATE TABLE projects (id text PRIMARY KEY, status text);
CREATE TABLE members (id text PRIMARY KEY, project text NOT NULL REFERENCES projects, usr text);
CREATE TABLE tasks (
  id int PRIMARY KEY, owner int NOT NULL, note text, project text REFERENCES projects,
  due timestamptz
);
"""
MEMBERSHIP = "project.members_via_project.usr ?= @request.auth.id"
FULL = 'ALTER TABLE "public"."tasks" REPLICA IDENTITY FULL;'


def lines(url: str, list_rule: str, view_rule: str | None = None, **config: str) -> list[str]:
    """Return the lines about tasks."""
    return asyncio.run(_lines(url, list_rule, view_rule, config))


async def _lines(
    url: str, list_rule: str, view_rule: str | None, config: dict[str, str]
) -> list[str]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        catalog = await read_catalog(connection, schemas=["public"])
    tables = {
        "users": CollectionConfig(table="users", type="auth"),
        "projects": CollectionConfig(table="projects"),
        "members": CollectionConfig(table="members"),
        "tasks": CollectionConfig.model_validate(
            {"table": "tasks", "list_rule": list_rule, "view_rule": view_rule, **config}
        ),
    }
    return list(mirror_lines(build_collections(tables, catalog)))


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def test_a_rule_on_logged_columns_is_exact(database_url: str) -> None:
    execute(database_url, SCHEMA)

    assert lines(database_url, "", "") == ["mirror tasks/* and tasks/ID: exact"]
    assert lines(database_url, "id > 4") == ["mirror tasks/*: exact"]


def test_columns_of_old_rows_that_are_not_logged_are_named_with_the_sql(database_url: str) -> None:
    """An index is offered for bounded columns only: a longer text would fail its writer."""
    execute(database_url, SCHEMA)
    said, full, index = lines(database_url, "owner = @request.query.q")

    assert said == (
        "mirror tasks/*: exact, but loaded anew whenever it may have lost a row, as owner isn't"
        " logged of old rows"
    )
    assert full == f"  logs them: {FULL}"
    assert len(lines(database_url, 'note = "x"')) == 2
    execute(database_url, index.partition(": ")[2])
    assert lines(database_url, "owner = @request.query.q") == ["mirror tasks/*: exact"]
    execute(database_url, full.partition(": ")[2])
    assert lines(database_url, 'note = "x"') == ["mirror tasks/*: exact"]


def test_related_rows_are_named_and_how_fewer_are_told(database_url: str) -> None:
    execute(database_url, SCHEMA + FULL)
    said, hint = lines(database_url, MEMBERSHIP)

    assert said == (
        "mirror tasks/*: exact, but loaded anew whenever a change of public.members,"
        " public.projects concerns its caller"
    )
    execute(database_url, hint.partition(": ")[2])
    assert lines(database_url, MEMBERSHIP) == [said]


def test_a_moment_of_time_moves_rows_when_they_are_written(database_url: str) -> None:
    execute(database_url, SCHEMA + FULL)

    assert lines(database_url, "due > @now") == [
        "mirror tasks/*: exact, but rows move only when they are written after a moment of its rule"
    ]


def test_nothing_is_said_of_collections_without_mirrors(database_url: str) -> None:
    execute(database_url, SCHEMA)

    assert lines(database_url, "owner = @request.query.q", mirrors="off") == []
