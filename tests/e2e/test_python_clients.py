"""The two clients of PyPI, unchanged, against the running program.

Their limits are the same with PocketBase: ``pocketbase`` never reconnects after a cut or refused
connection, and has no options; ``pocketbase-async`` reconnects after a cut, not after a refusal.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from tests.e2e.breaker import breaker
from tests.e2e.numbered import OPEN, fresh_seed, repeats, wait_for_number, write_numbered
from tests.e2e.sdk import PYTHON_SDKS, PythonSdk, Sdk, SdkError, python_sdk
from tests.e2e.service import SCHEMA, SECRET, Service, service, token

PASSWORD = "correct horse"
MINE = "author = @request.auth.id"
LOGIN = {"enabled": True, "secret": "another secret of more than thirty-two bytes"}

each_client = pytest.mark.parametrize("name", PYTHON_SDKS)


@asynccontextmanager
async def application(
    database_url: str, directory: Path, **sections: dict[str, Any]
) -> AsyncIterator[Service]:
    """Users that log in with their password and receive their own posts."""
    password_hash = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    login = {"identity": ["email"], "password_hash": "password_hash"}
    auth = {"issuers": [{"name": "app", "secret": SECRET}], "login": LOGIN}
    async with service(
        database_url,
        directory,
        sections={"auth": auth, "realtime": {"heartbeat": "100ms"}, **sections},
        collections={
            "users": {"table": "users", "type": "auth", "login": login},
            "posts": {"table": "posts", "list_rule": MINE, "view_rule": MINE},
        },
        schema=f"{SCHEMA}; ALTER TABLE users ADD password_hash text;"
        f" UPDATE users SET email = id || '@example.com', password_hash = '{password_hash}'",
    ) as running:
        yield running


async def subscribed(client: Sdk, count: int = 1) -> None:
    """Wait for the subscribe call; ``pocketbase`` makes it later, on another thread."""
    made = await client.wait_for(count, "submitted")
    assert made[-1]["status"] == 204


def received(client: Sdk) -> list[tuple[str, str, str]]:
    return [(e["action"], e["record"]["id"], e["record"]["title"]) for e in client.events]


@each_client
@pytest.mark.parametrize("by", ["password", "a token of the issuer"])
async def test_a_user_receives_own_rows_written_by_sql(
    name: PythonSdk, by: str, database_url: str, tmp_path: Path
) -> None:
    async with (
        application(database_url, tmp_path) as running,
        python_sdk(name, running.url) as client,
    ):
        if by == "password":
            identity = {"collection": "users", "identity": "ann@example.com"}
            with pytest.raises(SdkError):
                await client.do("login", **identity, password="wrong")
            await client.do("login", **identity, password=PASSWORD)
        else:
            await client.do("token", token=token("ann"))
        await client.do("subscribe", collection="posts", topic="*")
        await subscribed(client)
        for statement in (
            "INSERT INTO posts (id, title, author) VALUES ('a', 'x', 'ann'), ('b', 'x', 'bob')",
            "UPDATE posts SET title = 'y'",
            "DELETE FROM posts",
            "INSERT INTO posts (id, author, title) VALUES ('end', 'ann', E'é\\n\\u0085 \\u2028')",
        ):
            await running.write.execute(statement.encode())
        await client.wait_for(4)

    assert received(client) == [
        ("create", "a", "x"),
        ("update", "a", "y"),
        ("delete", "a", "y"),
        ("create", "end", "é\n\x85 \u2028"),
    ]


@each_client
async def test_one_record_can_be_subscribed_and_unsubscribed(
    name: PythonSdk, database_url: str, tmp_path: Path
) -> None:
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        python_sdk(name, running.url) as client,
    ):
        await client.do("subscribe", collection="posts", topic="one")
        await subscribed(client)
        await client.do("subscribe", collection="posts", topic="other")
        await subscribed(client, 2)
        await running.write.execute(
            "INSERT INTO posts (id, title) VALUES ('one', 'x'), ('two', 'x'), ('other', 'x')"
        )
        await client.wait_for(2)
        await client.do("unsubscribe", collection="posts", topic="one")
        await running.write.execute("UPDATE posts SET title = 'y'")
        events = await client.wait_for(3)

    assert [event["record"]["id"] for event in events[:2]] == ["one", "other"]
    assert events[2]["record"]["id"] == "other"


@each_client
async def test_an_orderly_end_is_followed_by_a_new_connection(
    name: PythonSdk, database_url: str, tmp_path: Path
) -> None:
    """Every connection ends some time; both clients reconnect at once and submit everything."""
    async with (
        application(database_url, tmp_path, realtime={"max_lifetime": "1s"}) as running,
        python_sdk(name, running.url) as client,
    ):
        await client.do("token", token=token("ann"))
        await client.do("subscribe", collection="posts", topic="*")
        for n in range(1, 4):
            await subscribed(client, n)
            await running.write.execute(
                "INSERT INTO posts (id, title, author) VALUES (%s, 'x', 'ann')", [str(n)]
            )
            await client.wait_for(n)

    assert received(client) == [("create", str(n), "x") for n in range(1, 4)]


async def test_options_reach_the_rule_and_the_listener(database_url: str, tmp_path: Path) -> None:
    """``pocketbase-async`` only.

    It escapes more than other clients and dispatches by just that name.
    """
    rule = "title = @request.query.title && note = @request.headers.x_note"
    collections = {"posts": {"table": "posts", "list_rule": rule}}
    async with (
        service(database_url, tmp_path, collections=collections) as running,
        python_sdk("pocketbase-async", running.url) as client,
    ):
        options = {"params": {"title": "a b/c"}, "headers": {"x-note": "n"}}
        await client.do("subscribe", collection="posts", topic="*", options=options)
        await running.write.execute(
            "INSERT INTO posts (id, title, note) VALUES"
            " ('1', 'b', 'n'), ('2', 'a b/c', 'm'), ('3', 'a b/c', 'n')"
        )
        (event,) = await client.wait_for(1)

    assert event["record"]["id"] == "3"


async def test_the_topic_pb_cursor_makes_pocketbase_async_miss_nothing(
    database_url: str, tmp_path: Path
) -> None:
    """It returns the id of the last message by itself, after each connection that was cut."""
    seed = fresh_seed()
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        breaker(running.address, random.Random(seed)) as proxy,
        python_sdk("pocketbase-async", proxy.url) as client,
    ):
        await client.do("cursor")
        await client.do("subscribe", collection="posts", topic="*")
        proxy.longest = 30_000
        last = await write_numbered(running, 300, 0.01)
        proxy.longest = 0
        await wait_for_number(client, last, 60)
        numbers = [event["record"]["n"] for event in client.events]
        breaks = proxy.breaks

    assert breaks >= 2
    repeats(numbers)
