"""A list and the events after it are one: nothing is missed, and nothing goes back.

Several writers commit in another order than they began in, so that a list's snapshot may lack a
transaction that the stream delivers before one that it has.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from tests.e2e.breaker import breaker
from tests.e2e.numbered import OPEN, fresh_seed
from tests.e2e.sdk import Sdk, module
from tests.e2e.service import Service, service
from tests.e2e.test_readme import AROUND_SDK
from tests.own_server import own_server
from tests.readme import script

IDS = [f"r{number:02}" for number in range(12)]
WRITERS = 4
WHOLE = 1000
"""The largest page."""
GAP_SHARE = 0.3
"""Of rounds that begin with a gap: of a TRUNCATE clients are told by PB_RESYNC."""


class Screen:
    """A client that loads a list and keeps it by events, as the README says.

    Pages that are fewer records than there are have a snapshot each: then a record of a later page
    may go back, until the events have reached that page's position.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, page_size: int) -> None:
        self._session = session
        self._page_size = page_size
        self._url = url
        self._position = ""
        self._kept: list[tuple[str, dict[str, Any]]] | None = None
        self.rows: dict[str, dict[str, Any]] = {}
        self.skipped = 0
        self.changed = asyncio.Event()

    async def load(self) -> None:
        """Load the list; events that arrive meanwhile are applied after it."""
        self._kept = []
        rows, position = await self.fetch()
        self.rows, self._position = rows, position
        kept, self._kept = self._kept, None
        for position, event in kept:
            self._apply(position, event)

    async def fetch(self) -> tuple[dict[str, dict[str, Any]], str]:
        """Return the list as it is now, by pages, and the position of the first."""
        rows: dict[str, dict[str, Any]] = {}
        first_position, last_id = "", ""
        while True:
            query: dict[str, str | int] = {"perPage": self._page_size, "skipTotal": 1, "sort": "id"}
            if last_id:
                query["filter"] = f'id > "{last_id}"'
            path = f"{self._url}/api/collections/posts/records"
            async with self._session.get(path, params=query) as response:
                items = (await response.json())["items"]
                first_position = first_position or response.headers["Realtime-Position"]
            rows |= {item["id"]: item for item in items}
            if len(items) < self._page_size:
                return rows, first_position
            last_id = items[-1]["id"]

    def receive(self, position: str, event: dict[str, Any]) -> None:
        """Take an event."""
        if self._kept is not None:
            self._kept.append((position, event))
        else:
            self._apply(position, event)

    def _apply(self, position: str, event: dict[str, Any]) -> None:
        if position < self._position:
            self.skipped += 1
            return
        record = event["record"]
        known = self.rows.get(record["id"])
        if self._page_size == WHOLE:
            assert known is None or record["n"] >= known["n"], f"{record} goes back behind {known}"
        if event["action"] == "delete":
            self.rows.pop(record["id"], None)
        else:
            self.rows[record["id"]] = record
        self.changed.set()

    async def wait_for(self, record_id: str) -> None:
        """Wait until the list has a record."""
        async with asyncio.timeout(30):
            while record_id not in self.rows:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def open_screen(running: Service, page_size: int) -> AsyncIterator[Screen]:
    """Connect, asking for positions, and subscribe to all posts and to one of them."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{running.url}/api/realtime?lastEventId=") as stream,
    ):
        screen = Screen(session, running.url, page_size)
        client_id = (await _next_message(stream))[0]
        call = {"clientId": client_id, "subscriptions": ["posts/*", f"posts/{IDS[0]}"]}
        async with session.post(f"{running.url}/api/realtime", json=call) as answer:
            assert answer.status == 204
        task = asyncio.create_task(_receive(stream, screen))
        try:
            yield screen
            if task.done():
                task.result()
        finally:
            task.cancel()


async def _receive(stream: aiohttp.ClientResponse, screen: Screen) -> None:
    while True:
        id_, data = await _next_message(stream)
        screen.receive(id_.partition(".")[2], json.loads(data))


async def _next_message(stream: aiohttp.ClientResponse) -> tuple[str, str]:
    fields: dict[str, str] = {}
    while True:
        line = (await stream.content.readline()).decode().rstrip("\n")
        if not line and fields:
            return fields["id"], fields["data"]
        name, _, value = line.partition(":")
        if name:
            fields[name] = value


async def _write(database_url: str, chance: random.Random, transactions: int) -> None:
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        for _ in range(transactions):
            for record_id in sorted(chance.sample(IDS, chance.randint(1, 3))):
                # Or an INSERT that waits for a DELETE would have taken its number before.
                await connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [record_id])
                await connection.execute(_statement(chance), [record_id])
                await asyncio.sleep(chance.choice((0, 0, 0.002, 0.02)))
            await connection.commit()


def _statement(chance: random.Random) -> bytes:
    if chance.random() < 0.25:
        return b"DELETE FROM posts WHERE id = %s"
    return (
        b"INSERT INTO posts (id, title, n) VALUES (%s, 'x', nextval('seq'))"
        b" ON CONFLICT (id) DO UPDATE SET n = nextval('seq')"
    )


@pytest.mark.parametrize("page_size", [WHOLE, 4])
async def test_a_list_and_the_events_after_it_equal_a_new_list(
    tmp_path: Path, page_size: int
) -> None:
    """Over random histories, with lists loaded in the middle of them.

    ``commit_delay`` lets a commit be in the WAL for a while before any snapshot sees it.
    """
    seed = fresh_seed()
    chance = random.Random(seed)
    with own_server() as server:
        server.configure(fsync="on", commit_delay="10000", commit_siblings="0")
        await _keep_screen(server.url, tmp_path, chance, page_size)


async def _keep_screen(
    database_url: str, tmp_path: Path, chance: random.Random, page_size: int
) -> None:
    async with service(database_url, tmp_path, collections=OPEN) as running:
        await running.write.execute("CREATE SEQUENCE seq")
        async with open_screen(running, page_size) as screen:
            for round_number in range(25):
                writing = asyncio.gather(
                    *(
                        _write(database_url, random.Random(chance.random()), 8)
                        for _ in range(WRITERS)
                    )
                )
                for _ in range(chance.randint(1, 4)):
                    await asyncio.sleep(chance.random() * 0.05)
                    await screen.load()
                await writing
                marker = f"m{round_number}"
                await running.write.execute(
                    "INSERT INTO posts (id, title, n) VALUES (%s, 'x', 0)", [marker]
                )
                await screen.wait_for(marker)
                fresh, _ = await screen.fetch()
                assert screen.rows == fresh, f"round {round_number}"
            assert screen.skipped, "no event was older than a list: nothing was tested"


BEFORE_README = """
import readline from "node:readline";
const highest = new Map();
let waitedFor = null;
function render(rows) {
  for (const { id, n } of rows.values()) {
    if (n < (highest.get(id) ?? 0)) report({ report: "went back", id, n, behind: highest.get(id) });
    highest.set(id, n);
  }
  if (rows.has(waitedFor)) {
    report({ report: "rows", rows: [...rows.values()] });
    waitedFor = null;
  }
}
"""

AFTER_README = """
report({ report: "subscribed" });
pb.realtime.subscribe("PB_CONNECT", () => report({ report: "connected again" }));
for await (const line of readline.createInterface({ input: process.stdin })) {
  const { number, record } = JSON.parse(line);
  if (record) waitedFor = record; else work = work.then(load);
  work.then(() => rows && render(rows));
  report({ report: "done", number });
}
process.exit(0);
"""

AS_TASKS = {"tasks": {**OPEN["posts"]}}


async def test_the_readme_s_lines_keep_a_list_by_the_sdk_over_writes_loads_and_breaks(
    tmp_path: Path,
) -> None:
    """What is rendered never goes back, and equals a new list once the writers have stopped."""
    chance = random.Random(fresh_seed())
    code = AROUND_SDK + BEFORE_README + script("A list and its events") + AFTER_README
    with own_server() as server:
        server.configure(fsync="on", commit_delay="10000", commit_siblings="0")
        async with (
            service(server.url, tmp_path, collections=AS_TASKS) as running,
            breaker(running.address, random.Random(chance.random())) as cutting,
        ):
            await running.write.execute("CREATE SEQUENCE seq")
            await running.write.execute("INSERT INTO posts (id, title) VALUES ('first', 'x')")
            async with module(code, cutting.url) as client:
                await client.wait_for(1, "subscribed")
                for round_number in range(20):
                    cutting.longest = chance.choice((0, 0, 4_000))
                    if chance.random() < GAP_SHARE:
                        await running.write.execute("TRUNCATE posts")
                    await _write_and_reload(server.url, client, chance)
                    cutting.longest = 0
                    await _compare(running, client, f"m{round_number}")
                assert client.of("connected again")
                assert client.of("went back") == []


async def _write_and_reload(database_url: str, client: Sdk, chance: random.Random) -> None:
    writers = (_write(database_url, random.Random(chance.random()), 8) for _ in range(WRITERS))
    writing = asyncio.gather(*writers)
    for _ in range(chance.randint(0, 3)):
        await asyncio.sleep(chance.random() * 0.05)
        await client.do("refresh")
    await writing


async def _compare(running: Service, client: Sdk, marker: str) -> None:
    """Check that the client's rows, once they have the marker, are those of a new list."""
    await running.write.execute("INSERT INTO posts (id, title) VALUES (%s, 'x')", [marker])
    seen = len(client.of("rows"))
    await client.do("wait", record=marker)
    rows = (await client.wait_for(seen + 1, "rows"))[-1]["rows"]
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{running.url}/api/collections/tasks/records?perPage=1000") as response,
    ):
        items = (await response.json())["items"]
    assert sorted(rows, key=_id_of) == sorted(items, key=_id_of), marker


def _id_of(record: dict[str, Any]) -> str:
    return str(record["id"])
