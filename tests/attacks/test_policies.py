"""Row security that hides rows from rules: the rule is refused, never evaluated without them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.e2e.listener import listener
from tests.e2e.service import service

SCHEMA = """
CREATE TABLE bans (id text PRIMARY KEY, post text);
CREATE TABLE posts (id text PRIMARY KEY, title text);
CREATE TABLE notes (id text PRIMARY KEY);
ALTER TABLE bans ENABLE ROW LEVEL SECURITY;
CREATE POLICY all_rows ON bans FOR SELECT USING (true);
INSERT INTO bans VALUES ('1', 'banned');
"""

COLLECTIONS: dict[str, dict[str, Any]] = {
    "bans": {"table": "bans"},
    "posts": {"table": "posts", "list_rule": "@collection.bans.post != id"},
    "notes": {"table": "notes", "list_rule": ""},
}


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A login role that row security applies to, and that may read all tables."""
    name = f"reader_{uuid4().hex[:12]}"
    role_name = sql.Identifier(name)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role_name))
        connection.execute(
            sql.SQL("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {}").format(role_name)
        )
        yield name
        connection.execute(sql.SQL("DROP OWNED BY {}").format(role_name))
        connection.execute(sql.SQL("DROP ROLE {}").format(role_name))


async def test_a_policy_that_comes_to_hide_rows_admits_no_more_callers(
    database_url: str, role: str, tmp_path: Path
) -> None:
    """A rule that requires the absence of a row would be true for a hidden row."""
    sections = {"database": {"query_url": make_conninfo(database_url, user=role)}}
    async with (
        service(
            database_url, tmp_path, sections=sections, collections=COLLECTIONS, schema=SCHEMA
        ) as running,
        listener(running.address, "posts/*", "notes/*") as guest,
    ):
        await running.write.execute("INSERT INTO posts VALUES ('banned', 'a'), ('free', 'b')")
        (seen,) = await guest.take(1)
        assert running.process.logged("rule.error") == []

        await running.write.execute(
            "CREATE POLICY none_of_them ON bans AS RESTRICTIVE USING (false)"
        )
        await running.write.execute("INSERT INTO posts VALUES ('banned2', 'a')")
        await running.write.execute("UPDATE posts SET title = 'x' WHERE id = 'banned'")
        await running.write.execute("INSERT INTO notes VALUES ('n')")
        (next_one,) = await guest.take(1)
        (said,) = running.process.logged("rule.error")

    assert seen.data["record"]["id"] == "free"
    assert next_one.data["record"]["id"] == "n"
    assert "row-level security" in said["error"]


async def test_a_reload_denies_nothing_that_a_policy_shows(
    database_url: str, role: str, tmp_path: Path
) -> None:
    """The tables that rules read are determined anew, while events are delivered."""
    sections = {"database": {"query_url": make_conninfo(database_url, user=role)}}
    written = 0
    async with (
        service(
            database_url, tmp_path, sections=sections, collections=COLLECTIONS, schema=SCHEMA
        ) as running,
        listener(running.address, "posts/*") as guest,
        asyncio.TaskGroup() as group,
    ):

        async def reload() -> None:
            for _ in range(10):
                assert await running.process.reload(), running.process.output()

        reloading = group.create_task(reload())
        while not reloading.done():
            await running.write.execute("INSERT INTO posts VALUES (%s, 'a')", (f"post{written}",))
            written += 1
            await asyncio.sleep(0.001)
        received = await guest.take(written)

    assert [one.data["record"]["id"] for one in received] == [f"post{n}" for n in range(written)]
