"""The replication stream breaks.

Clients are notified of what is missing, and the program recovers.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg

from tests.conformance.http_client import Address, End
from tests.e2e.listener import Listener, listener
from tests.e2e.sdk import sdk
from tests.e2e.service import service
from tests.own_server import OwnServer

OPEN = {"posts": {"table": "posts", "list_rule": "", "view_rule": ""}}
KILL_WALSENDERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'walsender'"
    " AND datname = current_database()"
)


async def numbers(received: Listener, count: int) -> list[int]:
    return [message.data["record"]["n"] for message in await received.take(count)]


async def insert(write: psycopg.AsyncConnection[tuple[object, ...]], n: int) -> None:
    await write.execute(
        "INSERT INTO posts (id, title, n, public) VALUES (%s, 'x', %s, true)", [f"r{n}", n]
    )


async def test_a_killed_walsender_is_a_notified_gap_and_then_over(
    database_url: str, tmp_path: Path
) -> None:
    """A temporary slot is dropped with its connection.

    What was committed meanwhile can't be known.
    """
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        listener(running.address, "posts/*", "PB_RESYNC") as notified,
        listener(running.address, "posts/*") as plain,
    ):
        await insert(running.write, 1)
        assert await numbers(notified, 1) == await numbers(plain, 1) == [1]
        await running.write.execute(KILL_WALSENDERS)
        (gap,) = await notified.take(1)
        assert gap.event == "PB_RESYNC"
        assert gap.data == {"collections": [], "reason": "slot_lost"}
        assert await plain.stream.wait_end(20) is End.ORDERLY
        await insert(running.write, 2)
        assert await numbers(notified, 1) == [2]


async def test_the_sdk_comes_back_by_itself_after_a_restart_of_the_database(
    server: OwnServer, tmp_path: Path
) -> None:
    """The program waits for the server and the SDK for the program, without an operator."""
    async with (
        service(server.url, tmp_path, collections=OPEN) as running,
        sdk(running.url) as client,
    ):
        await client.do("connects")
        await client.do("subscribe", collection="posts", topic="*")
        await insert(running.write, 1)
        await client.wait_for(1)
        await asyncio.to_thread(
            server.control, "restart", "--mode=fast", f"--log={server.folder}/log"
        )
        await client.wait_for(2, "connect", seconds=60)
        await client.do("subscribe", collection="posts", topic="nobody")
        async with await psycopg.AsyncConnection.connect(server.url, autocommit=True) as write:
            await insert(write, 2)
            events = await client.wait_for(2)

    assert [event["record"]["n"] for event in events] == [1, 2]


async def test_while_the_stream_is_away_new_clients_wait_and_calls_are_refused(
    server: OwnServer, tmp_path: Path
) -> None:
    """A 204 promises delivery, and PB_CONNECT makes the SDK send its call."""
    async with (
        service(server.url, tmp_path, collections=OPEN) as running,
        listener(running.address, "posts/*", "PB_RESYNC") as early,
    ):
        await asyncio.to_thread(server.control, "stop", "--mode=fast")
        async with asyncio.timeout(20):
            while await early.subscribe("posts/*", "PB_RESYNC") != 503:
                await asyncio.sleep(0.05)
        late = asyncio.create_task(status_of_a_first_call(running.address))
        await asyncio.to_thread(server.control, "start", f"--log={server.folder}/log")
        assert await late == 204
        (gap,) = await early.take(1, 30)
        assert gap.event == "PB_RESYNC"


async def status_of_a_first_call(address: Address) -> int:
    async with listener(address) as late:
        return await late.subscribe("posts/*")


async def test_a_truncated_table_and_a_transaction_too_large_are_notified_gaps(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        service(
            database_url, tmp_path, collections=OPEN, sections={"changelog": {"max_size": "64KiB"}}
        ) as running,
        listener(running.address, "posts/*", "PB_RESYNC") as notified,
    ):
        await running.write.execute("TRUNCATE posts CASCADE")
        await running.write.execute(
            "INSERT INTO posts (id, title) SELECT 'b' || i, repeat('x', 200)"
            " FROM generate_series(1, 2000) i"
        )
        await insert(running.write, 7)
        gaps = await notified.take(2)
        assert [gap.data["reason"] for gap in gaps] == ["truncate", "too_large"]
        assert [gap.data["collections"] for gap in gaps] == [["posts"], ["posts"]]
        assert await numbers(notified, 1) == [7]
