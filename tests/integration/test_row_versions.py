"""Each change of a row is evaluated with the row as that change left it, whatever follows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.listener import Listener, listener
from tests.e2e.service import Service, service

SCHEMA = """
CREATE TABLE docs (
  id text PRIMARY KEY, title text NOT NULL, body text NOT NULL,
  is_open boolean GENERATED ALWAYS AS (left(body, 6) = 'public') STORED
);
ALTER TABLE docs ALTER body SET STORAGE EXTERNAL;
INSERT INTO docs VALUES ('a', 'one', repeat('secret', 2000));
DO $$ BEGIN
  EXECUTE 'CREATE PUBLICATION pgrealtime FOR TABLE ONLY docs' || CASE
    WHEN current_setting('server_version_num')::int < 180000 THEN ''
    ELSE ' WITH (publish_generated_columns = stored)' END;
END $$;
"""


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
@pytest.mark.parametrize("rule", ["body !~ 'secret'", "is_open = true"])
async def test_what_the_wal_left_out_is_not_taken_from_a_later_version(
    database_url: str, tmp_path: Path, rule: str, plugin: str
) -> None:
    """The table holds unchanged TOASTed values and generated columns of the last version only."""
    collections = {"docs": {"table": "docs", "list_rule": rule}}
    sections = {"replication": {"plugin": plugin}}
    async with (
        service(
            database_url, tmp_path, collections=collections, sections=sections, schema=SCHEMA
        ) as running,
        listener(running.address, "docs/*") as guest,
    ):
        async with running.write.transaction():
            await running.write.execute("UPDATE docs SET title = 'two, still secret'")
            await running.write.execute(
                "UPDATE docs SET title = 'three', body = repeat('public', 2000)"
            )
            await running.write.execute("INSERT INTO docs VALUES ('b', 'end', 'public')")

        received = [m.data["record"]["title"] for m in await guest.take(2)]
        assert received == ["three", "end"]


PLAIN = """
CREATE TABLE docs (id text PRIMARY KEY, title text NOT NULL, body text NOT NULL, extra text);
ALTER TABLE docs ALTER body SET STORAGE EXTERNAL;
INSERT INTO docs VALUES ('a', '', repeat('public', 2000));
CREATE PUBLICATION pgrealtime FOR TABLE ONLY docs;
"""
BY_BODY = {"docs": {"table": "docs", "list_rule": "body !~ 'secret'"}}


@asynccontextmanager
async def docs_by_body(
    database_url: str, directory: Path, plugin: str
) -> AsyncIterator[tuple[Service, Listener]]:
    """A guest that receives texts that hold no secret, and is notified of gaps."""
    sections = {"replication": {"plugin": plugin}}
    async with (
        service(
            database_url, directory, collections=BY_BODY, sections=sections, schema=PLAIN
        ) as running,
        listener(running.address, "docs/*", "PB_RESYNC") as guest,
    ):
        yield running, guest


async def until_end(running: Service, guest: Listener) -> list[str]:
    """Return the titles received, with "gap" for each notified gap."""
    received: list[str] = []
    for end in ("end", "very end"):  # a gap follows the events of its slice
        await running.write.execute("INSERT INTO docs VALUES (%s, %s, 'public')", (end, end))
        while end not in received:
            (message,) = await guest.take(1)
            is_gap = message.event == "PB_RESYNC"
            received.append("gap" if is_gap else message.data["record"]["title"])
    await running.write.execute("DELETE FROM docs WHERE title LIKE '%end'")
    return [title for title in received if not title.endswith("end")]


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_updates_in_subtransactions_are_received(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """The row's xmin is then the subtransaction's xid, which no message contains."""
    async with docs_by_body(database_url, tmp_path, plugin) as (running, guest):
        for n in range(3):
            async with running.write.transaction(), running.write.transaction():
                await running.write.execute("UPDATE docs SET title = %s", (str(n),))
        async with running.write.transaction():
            for n in range(3, 6):
                async with running.write.transaction():
                    await running.write.execute("UPDATE docs SET title = %s", (str(n),))

        assert await until_end(running, guest) == list("012345")


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_quick_commits_on_one_row_are_all_received(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """A newer version with the same text is there already.

    The changelog shows that the text is unchanged.
    """
    async with docs_by_body(database_url, tmp_path, plugin) as (running, guest):
        commits = [f"BEGIN; UPDATE docs SET title = '{n}'; COMMIT;" for n in range(200)]
        await running.write.execute("".join(commits).encode())

        assert await until_end(running, guest) == [str(n) for n in range(200)]


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_an_event_that_can_no_longer_be_evaluated_is_a_gap(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """The text of a version that was overwritten or deleted is lost, so the event is a gap."""
    replaced = "UPDATE docs SET title = 'two', body = repeat('SECRET', 2000)"
    gone = "DELETE FROM docs"
    async with docs_by_body(database_url, tmp_path, plugin) as (running, guest):
        for then in (replaced, gone):
            for _ in range(20):
                await running.write.execute(
                    "INSERT INTO docs VALUES ('a', 'zero', repeat('public', 2000))"
                    " ON CONFLICT (id) DO UPDATE SET title = 'zero', body = excluded.body"
                )
                assert await until_end(running, guest) == ["zero"]
                commits = f"BEGIN; UPDATE docs SET title = 'one'; COMMIT; {then}"
                await running.write.execute(commits.encode())
                received = await until_end(running, guest)
                if received == ["gap"]:
                    break
                assert received == ["one"]  # its row was read before the second commit
            else:
                pytest.fail("the second commit never came before the row was read")


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_a_gap_is_notified_only_where_the_rule_may_be_true(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """A rule that is false whatever the column holds is false."""
    rule = "title != 'one' && body !~ 'secret'"
    collections = {"docs": {"table": "docs", "list_rule": rule}}
    sections = {"replication": {"plugin": plugin}}
    async with (
        service(
            database_url, tmp_path, collections=collections, sections=sections, schema=PLAIN
        ) as running,
        listener(running.address, "docs/*", "PB_RESYNC") as guest,
    ):
        await running.write.execute(
            b"BEGIN; UPDATE docs SET title = 'one'; COMMIT;"
            b"UPDATE docs SET title = 'two', body = repeat('SECRET', 2000)"
        )

        assert await until_end(running, guest) == []


async def test_a_row_that_took_over_an_id_is_another_row(database_url: str, tmp_path: Path) -> None:
    """Its update lacks its own text, not that of the row that had the id before."""
    async with docs_by_body(database_url, tmp_path, "pgoutput") as (running, guest):
        await running.write.execute(
            "INSERT INTO docs VALUES ('b', 'other', repeat('SECRET', 2000))"
        )
        async with running.write.transaction():
            await running.write.execute("UPDATE docs SET title = 'one' WHERE id = 'a'")
            await running.write.execute("DELETE FROM docs WHERE id = 'a'")
            await running.write.execute("UPDATE docs SET id = 'a' WHERE id = 'b'")
        await running.write.execute("UPDATE docs SET body = repeat('public', 2000)")

        assert sorted(await until_end(running, guest)) == ["gap", "other"]


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_a_column_that_was_dropped_a_moment_ago_hides_no_other(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """The catalogue in force still has the dropped column."""
    async with docs_by_body(database_url, tmp_path, plugin) as (running, guest):
        await running.write.execute(
            b"BEGIN; UPDATE docs SET title = 'one'; COMMIT; ALTER TABLE docs DROP COLUMN extra;"
            b"BEGIN; UPDATE docs SET title = 'two'; COMMIT"
        )

        received = await guest.take(2)
        assert [message.data["record"]["title"] for message in received] == ["one", "two"]
        assert ["body" in message.data["record"] for message in received] == [True, True]
        assert await until_end(running, guest) == []


@pytest.mark.parametrize(
    ("seconds", "received"),
    [pytest.param(0.7, ["one"], id="short"), pytest.param(2.5, ["gap"], id="long")],
)
async def test_a_locked_row_is_read_again_or_a_gap(
    database_url: str, tmp_path: Path, seconds: float, received: list[str]
) -> None:
    """The whole table is locked, as ALTER TABLE does it."""
    sections = {"database": {"statement_timeout": 0.5}}
    async with (
        service(
            database_url, tmp_path, collections=BY_BODY, sections=sections, schema=PLAIN
        ) as running,
        listener(running.address, "docs/*", "PB_RESYNC") as guest,
    ):
        await running.write.execute(
            b"BEGIN; UPDATE docs SET title = 'one'; COMMIT;"
            b"BEGIN; LOCK TABLE docs IN ACCESS EXCLUSIVE MODE"
        )
        await asyncio.sleep(seconds)
        await running.write.execute("ROLLBACK")

        assert await until_end(running, guest) == received


async def test_records_behind_an_unknown_column_are_a_gap(
    database_url: str, tmp_path: Path
) -> None:
    """Its current ids are shown to callers that may see them.

    The records behind them aren't the event's.
    """
    schema = """
    CREATE TABLE tags (id text PRIMARY KEY);
    CREATE TABLE docs (id text PRIMARY KEY, title text NOT NULL, body text, tags text[]);
    ALTER TABLE docs ALTER tags SET STORAGE EXTERNAL;
    INSERT INTO tags VALUES (repeat('a', 500)), (repeat('b', 500));
    INSERT INTO docs VALUES
      ('a', '', NULL, ARRAY(SELECT repeat('a', 500) FROM generate_series(1, 10)));
    CREATE PUBLICATION pgrealtime FOR TABLE ONLY docs, ONLY tags;
    """
    collections: dict[str, dict[str, Any]] = {
        "tags": {"table": "tags", "view_rule": ""},
        "docs": {"table": "docs", "list_rule": "", "relations": {"tags": {"collection": "tags"}}},
    }
    expanding = 'docs/*?options={"query":{"expand":"tags"}}'
    async with (
        service(database_url, tmp_path, collections=collections, schema=schema) as running,
        listener(running.address, expanding, "PB_RESYNC") as guest,
        listener(running.address, "docs/*", "PB_RESYNC") as plain,
    ):
        await running.write.execute(
            b"BEGIN; UPDATE docs SET title = 'one'; UPDATE docs SET title = 'two',"
            b" tags = ARRAY(SELECT repeat('b', 500) FROM generate_series(1, 10)); COMMIT"
        )

        assert sorted(await until_end(running, guest)) == ["gap", "one", "two"]
        received = [one for one in await plain.take(4) if one.event == "PB_RESYNC"]
        assert received == []


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_a_related_row_of_which_only_the_key_is_known_is_a_gap(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """A deleted record's owner is shown as before.

    With the default replica identity its row isn't in the WAL.
    """
    schema = """
    CREATE TABLE people (id text PRIMARY KEY, name text NOT NULL);
    CREATE TABLE docs (id text PRIMARY KEY, title text NOT NULL, owner text NOT NULL);
    ALTER TABLE docs REPLICA IDENTITY FULL;
    INSERT INTO people VALUES ('ann', 'Ann'), ('bob', 'Bob');
    INSERT INTO docs VALUES ('a', 'one', 'ann'), ('b', 'two', 'bob');
    CREATE PUBLICATION pgrealtime FOR TABLE ONLY docs, ONLY people;
    """
    collections: dict[str, dict[str, Any]] = {
        "people": {"table": "people", "view_rule": ""},
        "docs": {
            "table": "docs",
            "list_rule": "",
            "relations": {"owner": {"collection": "people"}},
        },
    }
    expanding = 'docs/*?options={"query":{"expand":"owner"}}'
    async with (
        service(
            database_url,
            tmp_path,
            collections=collections,
            sections={"replication": {"plugin": plugin}},
            schema=schema,
        ) as running,
        listener(running.address, expanding, "PB_RESYNC") as guest,
        listener(running.address, "docs/*", "PB_RESYNC") as plain,
    ):
        await running.write.execute(
            b"BEGIN; DELETE FROM docs WHERE id = 'a'; UPDATE people SET name = 'Anna'"
            b" WHERE id = 'ann'; COMMIT; DELETE FROM docs WHERE id = 'b'"
        )

        messages = await guest.take(3)
        assert [one.event for one in messages].count("PB_RESYNC") == 1
        records = [one.data["record"] for one in messages if one.event != "PB_RESYNC"]
        assert [one["title"] for one in records] == ["one", "two"]
        assert not records[0].get("expand")
        assert records[1]["expand"]["owner"]["name"] == "Bob"
        assert [one.event for one in await plain.take(2)] == ["docs/*", "docs/*"]
