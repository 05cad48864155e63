"""The scripts of the README and of ``docs``, run unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.conformance.http_client import Address
from tests.e2e.numbered import OPEN
from tests.e2e.readme_mirror import readme_mirror, wait_for_titles
from tests.e2e.sdk import module
from tests.e2e.service import service
from tests.readme import script

AROUND_PLAIN = """
import { EventSource } from "eventsource";
const report = (what) => console.log(JSON.stringify(what));
const url = process.argv[1], topics = ["posts/*"];
async function submit(clientId, subscriptions) {
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ clientId, subscriptions });
  await fetch(url + "/api/realtime", { method: "POST", headers, body });
  report({ report: "submitted" });
}
const receive = (name, data) => report({ report: name, data });
"""

AROUND_SDK = """
import PocketBase from "pocketbase";
import { EventSource } from "eventsource";
globalThis.EventSource = EventSource;
const report = (what) => console.log(JSON.stringify(what));
const pb = new PocketBase(process.argv[1]);
const loadEverythingAnew = (e) => report({ report: "PB_RESYNC", data: e });
"""

THEN_SDK = """
await pb.collection("posts").subscribe("*", (e) => report({ report: "posts/*", data: e }));
report({ report: "submitted" });
"""


@asynccontextmanager
async def bad_gateway(address: Address) -> AsyncIterator[asyncio.Event]:
    """Answer as a proxy does without a server behind it.

    The event is set when that was received.
    """
    asked = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        asked.set()

    server = await asyncio.start_server(answer, address.host, address.port)
    try:
        yield asked
    finally:
        server.close()
        await server.wait_closed()


async def test_the_plain_event_source_comes_back_where_browsers_give_up(
    database_url: str, tmp_path: Path
) -> None:
    """After a 502 an EventSource is closed for good.

    The script opens another one, which resumes.
    """
    code = AROUND_PLAIN + script("A plain EventSource")
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        module(code, running.url) as client,
    ):
        await client.wait_for(1, "submitted")
        await running.write.execute("INSERT INTO posts (id, title) VALUES ('a', 'x')")
        await client.wait_for(1, "posts/*")
        await running.stop()
        async with bad_gateway(running.address) as asked, asyncio.timeout(20):
            await asked.wait()
        await running.start()
        await client.wait_for(2, "submitted")
        (missed,) = await client.wait_for(1, "PB_RESYNC")
        await running.write.execute("INSERT INTO posts (id, title) VALUES ('b', 'x')")
        events = await client.wait_for(2, "posts/*")

    assert missed["data"]["reason"] in ("expired", "unknown")
    assert [event["data"]["record"]["id"] for event in events] == ["a", "b"]


async def test_the_sdk_with_the_lines_for_it_learns_what_it_missed(
    database_url: str, tmp_path: Path
) -> None:
    """It reconnects with its position, which another process doesn't know."""
    code = AROUND_SDK + script("The PocketBase SDK") + THEN_SDK
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        module(code, running.url) as client,
    ):
        await client.wait_for(1, "submitted")
        await running.stop()
        await running.start()
        (missed,) = await client.wait_for(1, "PB_RESYNC")
        await running.write.execute("INSERT INTO posts (id, title) VALUES ('b', 'x')")
        (event,) = await client.wait_for(1, "posts/*")

    assert missed["data"]["reason"] in ("expired", "unknown")
    assert event["data"]["record"]["id"] == "b"


async def test_the_lines_for_a_mirror_keep_the_list_right(
    database_url: str, tmp_path: Path
) -> None:
    """Rows enter and leave, and after what events can't tell the list is loaded anew, or sent."""
    rule = {"table": "tasks", "list_rule": "done = false", "view_rule": "done = false"}
    schema = """
        CREATE TABLE tasks (id text PRIMARY KEY, title text, done boolean);
        ALTER TABLE tasks REPLICA IDENTITY FULL;
        INSERT INTO tasks VALUES ('1', 'one', false), ('2', 'two', true);
    """
    async with (
        service(database_url, tmp_path, collections={"tasks": rule}, schema=schema) as running,
        readme_mirror(running.url) as loading,
        readme_mirror(running.url, beginning="// The list is sent") as sent,
    ):

        async def expect(*titles: str) -> None:
            for client in (loading, sent):
                await wait_for_titles(client, titles)

        await expect("one")
        await running.write.execute("UPDATE tasks SET done = false WHERE id = '2'")
        await expect("one", "two")
        await running.write.execute("UPDATE tasks SET title = 'TWO' WHERE id = '2'")
        await expect("one", "TWO")
        await running.write.execute("UPDATE tasks SET done = true WHERE id = '1'")
        await expect("TWO")
        await running.write.execute("DELETE FROM tasks WHERE id = '2'")
        await expect()
        async with running.write.transaction():
            await running.write.execute("TRUNCATE tasks")
            await running.write.execute("INSERT INTO tasks VALUES ('3', 'three', false)")
        await expect("three")
