"""What can't be decided is denied, and hurts nobody else."""

from __future__ import annotations

from pathlib import Path

import psycopg

from tests.e2e.listener import listener
from tests.e2e.service import service

SCHEMA = "CREATE TABLE posts (id text PRIMARY KEY); CREATE TABLE notes (id text PRIMARY KEY);"


async def test_a_rule_that_times_out_denies_its_own_subscribers_and_nobody_else(
    database_url: str, tmp_path: Path
) -> None:
    """Another rule of the same collection, and other collections, go on; later events come."""
    collections = {
        "posts": {
            "table": "posts",
            "list_rule": '@collection.notes.id ?= "open"',
            "view_rule": 'id != "" || @collection.notes.id ?= id',
        },
        "notes": {"table": "notes", "list_rule": ""},
    }
    async with (
        service(
            database_url,
            tmp_path,
            collections=collections,
            schema=SCHEMA + "INSERT INTO notes VALUES ('open');",
            sections={"database": {"statement_timeout": "300ms"}, "logging": {"format": "json"}},
        ) as running,
        listener(running.address, "posts/*") as slow,
        listener(running.address, "posts/p1", "notes/*") as other,
    ):
        async with await psycopg.AsyncConnection.connect(database_url) as locker:
            await locker.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")
            await running.write.execute("INSERT INTO posts VALUES ('p1'), ('p2')")
            (heard,) = await other.take(1)
            assert (heard.event, heard.data["record"]["id"]) == ("posts/p1", "p1")
            await locker.rollback()
        await running.write.execute("INSERT INTO notes VALUES ('n')")
        await running.write.execute("INSERT INTO posts VALUES ('p3')")

        assert [m.data["record"]["id"] for m in await slow.take(1)] == ["p3"]
        assert [m.event for m in await other.take(1)] == ["notes/*"]
        assert running.process.output().count("rule.error") == 1
