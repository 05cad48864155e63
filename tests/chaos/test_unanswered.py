"""PostgreSQL answers no queries while the stream goes on.

Clients that depend on them are notified.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.conformance.http_client import Address, End, Request, send
from tests.conformance.process import free_port
from tests.e2e.listener import Listener, listener
from tests.e2e.service import Service, service
from tests.own_server import own_server
from tests.wire import Wire, wire

ASKED = {
    "posts": {"table": "posts", "list_rule": '@collection.notes.id ?= "open"'},
    "notes": {"table": "notes", "list_rule": "", "view_rule": ""},
}
NO_SECTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
SCHEMA = """
CREATE TABLE posts (id text PRIMARY KEY);
CREATE TABLE notes (id text PRIMARY KEY);
INSERT INTO notes VALUES ('open');
"""


@dataclass
class Connected:
    running: Service
    way: Wire
    notified: Listener
    plain: Listener
    public: Listener


@asynccontextmanager
async def connected(
    database_url: str, directory: Path, sections: Mapping[str, Mapping[str, Any]] = NO_SECTIONS
) -> AsyncIterator[Connected]:
    """Start the program with its queries sent through a proxy; the stream doesn't use that."""
    async with (
        wire(database_url) as way,
        service(
            database_url,
            directory,
            collections=ASKED,
            schema=SCHEMA,
            sections={
                "database": {"query_url": way.url(database_url), "statement_timeout": "1s"},
                **sections,
            },
        ) as running,
        listener(running.address, "posts/*", "PB_RESYNC") as notified,
        listener(running.address, "posts/*") as plain,
        listener(running.address, "notes/*") as public,
    ):
        yield Connected(running, way, notified, plain, public)


async def write(running: Service, name: str) -> None:
    await running.write.execute("INSERT INTO posts VALUES (%s)", [name])
    await running.write.execute("INSERT INTO notes VALUES (%s)", [name])


async def until_ready(port: int, *, is_so: bool) -> None:
    """Wait until the readiness check passes, or fails."""
    request = Request(method="GET", path="/ready", headers={}, body=b"", source_ip=None)
    async with asyncio.timeout(20):
        while True:
            status = (await send(request, Address(host="127.0.0.1", port=port))).head.status
            if (status == 200) is is_so:
                return
            await asyncio.sleep(0.05)


async def ids(received: Listener, count: int) -> list[str]:
    return [message.data["record"]["id"] for message in await received.take(count)]


async def test_broken_connections_are_replaced_and_nothing_is_denied_for_them(
    database_url: str, tmp_path: Path
) -> None:
    """An administrator, a pooler or a time-out ended them: the next connection answers."""
    async with connected(database_url, tmp_path) as here:
        for n in range(3):
            await write(here.running, f"{n}")
            assert await ids(here.notified, 1) == [f"{n}"]
            here.way.break_all()

        await write(here.running, "last")
        assert await ids(here.notified, 1) == ["last"]
        assert await ids(here.plain, 4) == ["0", "1", "2", "last"]


async def test_a_server_that_restarts_is_waited_for(tmp_path: Path) -> None:
    """With a durable slot nothing is missed, so no client is notified of a gap."""
    port = free_port()
    sections: dict[str, dict[str, Any]] = {
        "replication": {"slot": {"durable": True, "allow_unlimited_wal": True}},
        "admin": {"port": port},
    }
    with own_server() as server:
        async with connected(server.url, tmp_path, sections) as here:
            await write(here.running, "a")
            assert await ids(here.notified, 1) == await ids(here.plain, 1) == ["a"]
            here.way.cut()
            await write(here.running, "b")
            await until_ready(port, is_so=False)
            await asyncio.to_thread(server.control, "restart", "--mode=fast")
            await asyncio.sleep(1)  # far longer than a broken connection is retried
            here.way.mend()

            assert await ids(here.notified, 1) == await ids(here.plain, 1) == ["b"]
            assert await ids(here.public, 2) == ["a", "b"]
            await until_ready(port, is_so=True)


async def test_unanswered_queries_are_a_gap_for_subscriptions_that_need_them_alone(
    database_url: str, tmp_path: Path
) -> None:
    """If it were silently denied, clients that may see the row would lose it."""
    async with connected(database_url, tmp_path) as here:
        here.way.cut()
        await write(here.running, "a")
        (gap,) = await here.notified.take(1)
        assert gap.event == "PB_RESYNC"
        assert gap.data == {"collections": ["posts"], "reason": "unknown"}
        assert await here.plain.stream.wait_end(20) is End.ORDERLY
        assert await ids(here.public, 1) == ["a"]

        here.way.mend()
        async with asyncio.timeout(20):
            while await here.notified.subscribe("posts/*", "PB_RESYNC", "notes/*") != 204:
                await asyncio.sleep(0.05)
        await write(here.running, "b")
        assert await ids(here.notified, 2) == ["b", "b"]


async def test_a_database_that_drops_queries_stops_no_connection_for_long(
    database_url: str, tmp_path: Path
) -> None:
    """A network that drops packets reports no error."""
    async with connected(database_url, tmp_path) as here:
        await write(here.running, "a")
        assert await ids(here.notified, 1) == await ids(here.plain, 1) == ["a"]
        assert await ids(here.public, 1) == ["a"]
        here.way.silence()
        await write(here.running, "b")
        (gap,) = await here.notified.take(1, 30)
        assert gap.event == "PB_RESYNC"
        assert await ids(here.public, 1) == ["b"]
