"""A client that subscribes and then reads has every row, also of commits not visible yet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from pgrealtime.config.model import Config
from pgrealtime.service import build
from tests.conformance.http_client import Address
from tests.e2e.listener import Listener, listener
from tests.e2e.service import service
from tests.own_server import OwnServer

COLLECTIONS = {
    "posts": {"table": "posts", "list_rule": "", "view_rule": ""},
    "notes": {"table": "notes", "list_rule": "", "view_rule": ""},
}
MOST_ROWS = 150
"""Of one writer: on a slow machine calls take longer, and each row goes to every subscriber."""
SCHEMA = (
    "CREATE TABLE posts (id text PRIMARY KEY); CREATE TABLE notes (id text PRIMARY KEY);"
    "CREATE TABLE elsewhere (n int);"
)


async def ids(client: Listener, count: int) -> list[str]:
    messages = await client.take(count)
    assert messages, "the connection ended"
    return [message.data["record"]["id"] for message in messages]


async def waits(
    watching: psycopg.AsyncConnection[Any], commit: asyncio.Task[Any], pid: int
) -> bool:
    """Return whether that backend's commit waits for a standby.

    It is in the WAL, and not visible yet.
    """
    async with asyncio.timeout(20):
        while not commit.done():
            cursor = await watching.execute(
                "SELECT wait_event FROM pg_stat_activity WHERE pid = %s", [pid]
            )
            if await cursor.fetchone() == ("SyncRep",):
                return True
            await asyncio.sleep(0.01)  # the server doesn't signal it
    return False


async def commits_wait(
    watching: psycopg.AsyncConnection[Any], other: psycopg.AsyncConnection[Any]
) -> asyncio.Task[Any]:
    """Return once commits wait for standbys, with one that does.

    That begins when the checkpointer has processed the reload, which the server doesn't signal.
    """
    while True:
        commit = asyncio.create_task(other.execute("INSERT INTO elsewhere VALUES (1)"))
        if await waits(watching, commit, other.info.backend_pid):
            return commit


async def test_a_commit_that_waits_for_a_standby_reaches_later_subscribers(
    server: OwnServer, tmp_path: Path
) -> None:
    """Decoded before it is visible: the subscriber's read misses it, so its stream must not."""
    async with (
        await psycopg.AsyncConnection.connect(server.url, autocommit=True) as writer,
        await psycopg.AsyncConnection.connect(server.url, autocommit=True) as other,
        service(server.url, tmp_path, collections=COLLECTIONS, schema=SCHEMA) as running,
        listener(running.address, "notes/*") as early,
    ):
        await running.write.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        await running.write.execute("SELECT pg_reload_conf()")
        first = await commits_wait(running.write, other)
        commit = asyncio.create_task(writer.execute("INSERT INTO posts VALUES ('waiting')"))
        assert await waits(running.write, commit, writer.info.backend_pid)

        # A late call either waits or is refused; a client with a 204 misses nothing.
        calls = asyncio.create_task(early.subscribe("notes/*", "posts/*"))
        async with listener(running.address) as late:
            call = asyncio.create_task(late.subscribe("posts/*"))
            cursor = await running.write.execute("SELECT count(*) FROM posts")
            assert await cursor.fetchone() == (0,)
            await running.write.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await running.write.execute("SELECT pg_reload_conf()")
            await asyncio.gather(first, commit)
            assert (await call, await calls) == (204, 204)
            cursor = await running.write.execute("SELECT id FROM posts")
            seen = [row[0] for row in await cursor.fetchall()]
            await running.write.execute("INSERT INTO posts VALUES ('after')")

            # Read after the 204, or delivered: every client has both rows.
            assert seen == ["waiting"]
            assert (await ids(late, 1))[-1] in {"waiting", "after"}
            assert await ids(early, 1)


async def test_a_list_that_is_asked_for_after_an_event_has_its_record(
    server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event is delivered before its commit is visible; the list waits for that."""
    monkeypatch.setattr(build, "_STANDBY_POLL_SECONDS", 3600.0)  # or the event would wait as well
    settings = {
        "database": {"url": server.url},
        "server": {"host": "127.0.0.1", "port": 0},
        "collections": COLLECTIONS,
    }
    async with (
        await psycopg.AsyncConnection.connect(server.url, autocommit=True) as writer,
        await psycopg.AsyncConnection.connect(server.url, autocommit=True) as other,
        await psycopg.AsyncConnection.connect(server.url, autocommit=True) as operator,
    ):
        await operator.execute(SCHEMA.encode())
        async with (
            build.run_service(Config.model_validate(settings)) as running,
            listener(Address(host="127.0.0.1", port=running.port), "posts/*") as client,
            aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as session,
        ):
            await operator.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            await operator.execute("SELECT pg_reload_conf()")
            first = await commits_wait(operator, other)
            commit = asyncio.create_task(writer.execute("INSERT INTO posts VALUES ('early')"))
            assert await waits(operator, commit, writer.info.backend_pid)
            assert await ids(client, 1) == ["early"]

            answers = asyncio.gather(get(session, "records"), get(session, "records/early"))
            await asyncio.wait([answers], timeout=0.5)
            was_early = answers.done()
            await operator.execute("ALTER SYSTEM RESET synchronous_standby_names")
            await operator.execute("SELECT pg_reload_conf()")
            await asyncio.gather(first, commit)
            listed, viewed = await answers

    assert not was_early
    assert [item["id"] for item in listed["items"]] == ["early"]
    assert viewed["id"] == "early"


async def get(session: aiohttp.ClientSession, path: str) -> Any:
    async with session.get(f"/api/collections/posts/{path}") as response:
        return await response.json()


async def test_subscribers_that_join_during_writes_miss_and_repeat_nothing(
    database_url: str, tmp_path: Path
) -> None:
    """Six writers, fifty subscribers: the read after the 204 plus the events is every row, once."""
    async with service(database_url, tmp_path, collections=COLLECTIONS, schema=SCHEMA) as running:
        written: list[str] = []
        is_over = asyncio.Event()

        async def write(writer: int) -> None:
            async with await psycopg.AsyncConnection.connect(
                database_url, autocommit=True
            ) as connection:
                for n in range(MOST_ROWS):
                    if is_over.is_set():
                        return
                    name = f"{writer}.{n}"
                    await connection.execute("INSERT INTO posts VALUES (%s)", [name])
                    written.append(name)
                    await asyncio.sleep(0.01)  # leaves the loop to the readers

        async def join() -> tuple[set[str], list[str]]:
            async with listener(running.address, "posts/*") as client:
                async with await psycopg.AsyncConnection.connect(database_url) as reader:
                    cursor = await reader.execute("SELECT id FROM posts")
                    read = {row[0] for row in await cursor.fetchall()}
                received: list[str] = []
                # A late subscriber reads the last row; then no event is left for it.
                while "end" not in read and received[-1:] != ["end"]:
                    received += await ids(client, 1)
                return read, received

        async with asyncio.TaskGroup() as group:
            writers = [group.create_task(write(n)) for n in range(6)]
            joined = []
            for _ in range(50):
                joined.append(group.create_task(join()))
                await asyncio.sleep(0.02)  # spreads the calls over the writes
            is_over.set()
            await asyncio.wait(writers)
            await running.write.execute("INSERT INTO posts VALUES ('end')")

    for task in joined:
        read, received = task.result()
        assert read | set(received) == {*written, "end"}, "a row was neither read nor received"
        assert len(received) == len(set(received)), "a row was received twice"


async def test_a_paused_hub_loses_nothing_for_new_subscribers(
    database_url: str, tmp_path: Path
) -> None:
    """Rules that wait for a locked table pause delivery; commits and calls go on."""
    collections = {
        "posts": {"table": "posts", "list_rule": '@collection.notes.id ?= "open"'},
        "notes": {"table": "notes", "list_rule": "", "view_rule": ""},
    }
    async with (
        service(
            database_url,
            tmp_path,
            collections=collections,
            schema=SCHEMA + "INSERT INTO notes VALUES ('open');",
            sections={"database": {"statement_timeout": "20s"}},
        ) as running,
        listener(running.address, "posts/*") as early,
        await psycopg.AsyncConnection.connect(database_url) as locker,
    ):
        await locker.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")
        await running.write.execute("INSERT INTO posts VALUES ('held')")
        async with listener(running.address) as late:
            assert await late.subscribe("posts/*", "notes/*") == 204
            await running.write.execute("INSERT INTO posts VALUES ('next')")
            await locker.rollback()
            await running.write.execute("INSERT INTO notes VALUES ('last')")

            assert await ids(early, 2) == ["held", "next"]
            assert await ids(late, 2) == ["next", "last"]
