"""Chromium with a page of another origin: its EventSource, its fetch, its CORS."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from tests.e2e.breaker import breaker
from tests.e2e.browser import chromium, native_page, page_client, pages, sdk_page
from tests.e2e.numbered import OPEN, fresh_seed, repeats, wait_for_number, write_numbered
from tests.e2e.proxy import PREFIX, PROGRAMS, Program, proxy
from tests.e2e.sdk import Sdk
from tests.e2e.service import service, token
from tests.readme import script

AWAY_SECONDS = 4.0
"""Long enough for an EventSource to retry meanwhile: Chromium waits for three seconds."""


@asynccontextmanager
async def visited() -> AsyncIterator[tuple[Browser, str]]:
    """A browser, and the origin of its pages."""
    async with pages() as origin, chromium() as browser:
        yield browser, origin


async def test_a_page_of_any_origin_receives_what_its_user_may_see(
    database_url: str, tmp_path: Path
) -> None:
    """The SDK in the page: preflights with Authorization, two users in one browser, a guest."""
    async with (
        service(database_url, tmp_path) as running,
        visited() as (browser, origin),
        sdk_page(browser, origin, running.url) as ann,
        sdk_page(browser, origin, running.url) as guest,
    ):
        await ann.do("token", token=token("ann"))
        for client in (ann, guest):
            await client.do("subscribe", collection="posts", topic="*")
        for statement in (
            "INSERT INTO posts (id, title, author) VALUES ('a', 'x', 'ann')",
            "UPDATE posts SET title = 'é'",
            "DELETE FROM posts",
            "INSERT INTO posts (id, title, public) VALUES ('all', 'x', true)",
        ):
            await running.write.execute(statement.encode())
        await ann.wait_for(4)
        await guest.wait_for(1)

    assert [(e["action"], e["record"]["id"], e["record"]["title"]) for e in ann.events] == [
        ("create", "a", "x"),
        ("update", "a", "é"),
        ("delete", "a", "é"),
        ("create", "all", "x"),
    ]
    assert [event["record"]["id"] for event in guest.events] == ["all"]


EXISTING = """
CREATE TABLE app_user (id serial PRIMARY KEY, username varchar(150) NOT NULL UNIQUE);
CREATE TABLE app_task (
  id bigserial PRIMARY KEY,
  title varchar(200) NOT NULL,
  done boolean NOT NULL DEFAULT false,
  created_at timestamptz NOT NULL DEFAULT now(),
  owner_id integer NOT NULL REFERENCES app_user
);
INSERT INTO app_user (username) VALUES ('ann'), ('bob');
INSERT INTO app_task (title, done, created_at, owner_id) VALUES
  ('second', false, '2024-01-02', 1), ('first', false, '2024-01-01', 1),
  ('third', true, '2024-01-03', 1), ('of Bob', false, '2024-01-04', 2);
ALTER TABLE app_task REPLICA IDENTITY FULL;
"""
"""Tables of an application that knows nothing of PocketBase."""

MINE = "owner != '' && owner = @request.auth.id"


async def test_the_readme_s_todo_list_is_loaded_and_kept_over_an_existing_table(
    database_url: str, tmp_path: Path
) -> None:
    """The SDK as it is: one user's tasks, loaded by ``getFullList``, then kept by events."""
    renamed = {"rename": {"owner_id": "owner"}}
    rules = {"list_rule": MINE, "view_rule": MINE}
    collections: dict[str, dict[str, Any]] = {
        "users": {"table": "app_user", "type": "auth"},
        "tasks": {"table": "app_task", "fields": renamed, **rules},
    }
    code = f"pb.authStore.save({token('1')!r}); {script('A todo list')}"
    async with (
        service(database_url, tmp_path, collections=collections, schema=EXISTING) as running,
        visited() as (browser, origin),
        page_client(browser, origin) as (_, page),
    ):
        await page.evaluate("([code, url]) => runScript(code, url)", [code, running.url])
        items = page.locator("li")
        await expect(items).to_have_text(["2 first", "1 second", "3 third"])
        for statement, shown in (
            (
                "INSERT INTO app_task (title, owner_id) VALUES ('of Bob too', 2), ('fourth', 1)",
                ["2 first", "1 second", "3 third", "6 fourth"],
            ),
            (
                "UPDATE app_task SET title = 'now last' WHERE id = 2",
                ["1 second", "3 third", "6 fourth", "2 now last"],
            ),
            ("DELETE FROM app_task WHERE id <> 6", ["6 fourth"]),
        ):
            await running.write.execute(statement.encode())
            await expect(items).to_have_text(shown)


async def test_only_listed_origins_are_let_in(database_url: str, tmp_path: Path) -> None:
    """The browser enforces it: for a page of another origin the stream is closed for good."""
    async with (
        visited() as (browser, origin),
        pages() as elsewhere,
        service(
            database_url,
            tmp_path,
            collections=OPEN,
            sections={"server": {"cors_origins": [origin]}},
        ) as running,
        native_page(browser, origin, running.url, "posts/*") as listed,
        native_page(browser, elsewhere, running.url, "posts/*") as unlisted,
    ):
        await listed.wait_for(1, "subscribed")
        await unlisted.wait_for(1, "break")
        await running.write.execute("INSERT INTO posts (id, title) VALUES ('a', 'x')")
        await listed.wait_for(1)

    assert unlisted.is_closed
    assert [report["report"] for report in unlisted.reports] == ["break"]


async def test_the_native_reconnect_misses_nothing_and_receives_no_change_twice(
    database_url: str, tmp_path: Path
) -> None:
    """Cut at random bytes; Chromium sends Last-Event-ID by itself, three seconds later.

    Cut within the head of a plain HTTP answer, it gives up for good; then a new EventSource brings
    the position in its address.
    """
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        breaker(running.address, random.Random(fresh_seed())) as cutting,
        visited() as (browser, origin),
        native_page(browser, origin, cutting.url, "posts/*") as client,
    ):
        await client.wait_for(1, "subscribed")
        cutting.longest = 12_000
        last = await write_numbered(running, 300, 0.05)
        cutting.longest = 0
        await wait_for_number(client, last, 60)
        numbers = [event["record"]["n"] for event in client.events]
        breaks = cutting.breaks

    assert breaks >= 2
    assert client.of("resync") == []
    assert numbers == list(range(1, last + 1))


async def test_two_topics_that_match_one_change_are_both_received_over_a_break(
    database_url: str, tmp_path: Path
) -> None:
    """Per break at most one message is repeated: the first of a change's two."""
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        breaker(running.address, random.Random(fresh_seed())) as cutting,
        visited() as (browser, origin),
        native_page(browser, origin, cutting.url, "posts/*", "posts/r") as client,
    ):
        await client.wait_for(1, "subscribed")
        await running.write.execute("INSERT INTO posts (id, title, n) VALUES ('r', 'x', 1)")
        cutting.longest = 6_000
        for n in range(2, 151):
            await running.write.execute("UPDATE posts SET n = %s", [n])
            await asyncio.sleep(0.05)  # paces the writer
        cutting.longest = 0
        async with asyncio.timeout(60):
            while not all(received(client, name)[-1:] == [150] for name in ("posts/*", "posts/r")):
                await client.wait_for(len(client.events) + 1, seconds=60)
        breaks = cutting.breaks

    assert breaks >= 2
    counts = [repeats(received(client, name)) for name in ("posts/*", "posts/r")]
    assert sum(counts) <= breaks


def received(client: Sdk, name: str) -> list[int]:
    return [event["record"]["n"] for event in client.events if event["as"] == name]


async def test_the_unmodified_sdk_with_five_lines_misses_nothing(
    database_url: str, tmp_path: Path
) -> None:
    """As with Node; here the browser provides EventSource and sends preflights."""
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        breaker(running.address, random.Random(fresh_seed())) as cutting,
        visited() as (browser, origin),
        sdk_page(browser, origin, cutting.url) as client,
    ):
        await client.do("resume")
        await client.do("subscribe", collection="posts", topic="*")
        cutting.longest = 30_000
        last = await write_numbered(running, 600, 0.008)
        cutting.longest = 0
        await wait_for_number(client, last, 60)
        numbers = [event["record"]["n"] for event in client.events]
        breaks = cutting.breaks

    assert breaks >= 5
    assert client.of("resync") == []
    assert repeats(numbers) <= breaks * 16


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_page_survives_a_restart_of_pgrealtime_behind_a_proxy(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """The proxy's answers meanwhile are neither an error nor blocked by CORS."""
    server = {"base_path": PREFIX, "trusted_proxies": ["127.0.0.1"]}
    async with (
        service(database_url, tmp_path, collections=OPEN, sections={"server": server}) as running,
        proxy(program, running.address, tmp_path) as front,
        visited() as (browser, origin),
        native_page(browser, origin, front.url + PREFIX, "posts/*") as client,
    ):
        await client.wait_for(1, "subscribed")
        await running.stop()
        await client.wait_for(1, "break")
        await asyncio.sleep(AWAY_SECONDS)
        await running.start()
        await client.wait_for(2, "subscribed")
        await running.write.execute("INSERT INTO posts (id, title) VALUES ('after', 'x')")
        (event,) = await client.wait_for(1)

    assert event["record"]["id"] == "after"
    assert not client.is_closed
