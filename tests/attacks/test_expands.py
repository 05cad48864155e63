"""A slow ``expand`` delays its own connection only."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psycopg

from tests.e2e.listener import listener
from tests.e2e.service import service
from tests.topics import topic

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY);
CREATE TABLE pages (id text PRIMARY KEY, owner text REFERENCES users, n int);
CREATE TABLE notes (id text PRIMARY KEY);
INSERT INTO users VALUES ('ann');
INSERT INTO pages SELECT 'p' || n, 'ann', n FROM generate_series(1, 500) n;
"""
COLLECTIONS: dict[str, dict[str, Any]] = {
    "users": {"table": "users", "list_rule": "", "view_rule": ""},
    "pages": {
        "table": "pages",
        "list_rule": "",
        "view_rule": "",
        "relations": {"owner": {"collection": "users"}},
    },
    "notes": {"table": "notes", "list_rule": ""},
}
TOPIC = topic("pages/*", expand="owner.pages_via_owner")


async def test_a_slow_expand_delays_no_other_connection(database_url: str, tmp_path: Path) -> None:
    """A slow expand, here one that waits for a lock, does not delay connections without it.

    Slices that all connections wait for give such an expand twenty milliseconds. A connection that
    requested it receives everything in order, with the related records, once they can be loaded.
    """
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            service(
                database_url,
                tmp_path,
                schema=SCHEMA,
                collections=COLLECTIONS,
                sections={"database": {"statement_timeout": "30s"}},
            )
        )
        honest = await stack.enter_async_context(listener(running.address, "notes/*"))
        waiting = await stack.enter_async_context(listener(running.address, TOPIC))
        async with await psycopg.AsyncConnection.connect(database_url) as locking:
            await locking.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            for n in range(1, 4):
                await running.write.execute("UPDATE pages SET n = -n WHERE id = %s", [f"p{n}"])
                await running.write.execute("INSERT INTO notes VALUES (%s)", [f"n{n}"])
            received = await honest.take(3, 4)
            assert [message.data["record"]["id"] for message in received] == ["n1", "n2", "n3"]
        pages = [message.data["record"] for message in await waiting.take(3, 30)]
    assert [page["id"] for page in pages] == ["p1", "p2", "p3"]
    owners = [page["expand"]["owner"] for page in pages]
    assert [len(owner["expand"]["pages_via_owner"]) for owner in owners] == [500] * 3
