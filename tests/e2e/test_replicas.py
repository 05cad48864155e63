"""Processes behind a load balancer without sticky sessions are as one to their clients."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.balancer import Roaming, apart, balancer
from tests.conformance.http_client import Address
from tests.e2e.listener import listener
from tests.e2e.numbered import fresh_seed, repeats, wait_for_number, write_numbered
from tests.e2e.replicas import Replica, replicas
from tests.e2e.sdk import sdk
from tests.e2e.service import token
from tests.e2e.test_admin import scrape
from tests.log_world import drop_slot, nats_server
from tests.own_server import OwnServer
from tests.realtime import open_stream, subscribe

MINUTES = float(os.environ.get("PGREALTIME_REPLICA_MINUTES", "0"))
"""How long replicas restart in turn; 0: each of them once."""

USERS = {
    "users": {"table": "users", "type": "auth", "list_rule": ""},
    "posts": {"table": "posts", "list_rule": ""},
}


async def restart_in_turn(
    three: list[Replica], ready: list[Address], *, warms_up: bool
) -> tuple[int, float]:
    """Restart one after the other, as a roll-out does, but kill each fourth.

    Return how often, and how many calls they had passed on before.
    """
    until, restarts, forwarded = time.monotonic() + MINUTES * 60, 0, 0.0
    while restarts < len(three) or time.monotonic() < until:
        replica = three[restarts % len(three)]
        ready.remove(replica.address)
        forwarded += await replica.forwarded()
        if restarts % 4 == 3:
            replica.kill()
        await replica.service.stop()
        await replica.service.start()
        # Returning clients go where the changelog reaches back further.
        assert ("warming_up" in await replica.not_ready_reasons()) is warms_up
        await replica.wait_ready()
        ready.append(replica.address)
        restarts += 1
        await asyncio.sleep(1.0 if MINUTES else 0.2)  # its clients come back
    return restarts, forwarded


@asynccontextmanager
async def slots_of_their_own(_: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the sections of replicas that read a slot each."""
    yield {"cluster": {"warm_up": "1s"}}


@asynccontextmanager
async def one_log(database_url: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the sections of replicas that share a slot by a log."""
    slot = {"name": f"log_{uuid4().hex[:8]}", "durable": True, "allow_unlimited_wal": True}
    async with nats_server() as nats:
        try:
            yield {
                "cluster": {"bus": "nats"},
                "log": {"nats": nats.url},
                "replication": {"slot": slot},
            }
        finally:
            await drop_slot(database_url, str(slot["name"]))


@pytest.mark.timeout(120 + MINUTES * 90)
@pytest.mark.parametrize("shared", [slots_of_their_own, one_log])
async def test_the_unmodified_sdk_misses_nothing_while_replicas_restart_in_turn(
    shared: Callable[[str], AbstractAsyncContextManager[dict[str, Any]]],
    database_url: str,
    tmp_path: Path,
) -> None:
    """With the five lines of the README it changes the replica at every break."""
    seed = fresh_seed()
    async with (
        shared(database_url) as sections,
        replicas(database_url, tmp_path, **sections) as three,
    ):
        ready = [replica.address for replica in three]
        async with (
            balancer(Roaming(ready, random.Random(seed))) as front,
            sdk(f"http://{front.host}:{front.port}") as client,
        ):
            await client.do("resume")
            await client.do("connects")
            await client.do("subscribe", collection="posts", topic="*")
            writing = asyncio.create_task(write_numbered(three[0].service, 10**9, 0.01))
            restarts, forwarded = await restart_in_turn(
                three, ready, warms_up=shared is slots_of_their_own
            )
            await client.wait_for(1, "connect")  # the first one came before it was subscribed to
            writing.cancel()
            cursor = await three[0].service.write.execute("SELECT max(n) FROM posts")
            ((last,),) = await cursor.fetchall()
            await wait_for_number(client, last, 60)
            numbers = [e["record"]["n"] for e in client.events]
            connects, resyncs = client.of("connect"), client.of("resync")

    again = repeats(numbers)
    print(  # noqa: T201 (the result of the run by hand)
        f"{last} rows, {restarts} restarts, {len(connects)} reconnections,"
        f" {len(resyncs)} gaps, {again} repeats, {forwarded:.0f} calls passed on"
    )
    assert resyncs == []
    assert numbers[-1] == last
    assert forwarded > 0
    assert again <= len(connects) * 16


async def test_a_call_at_any_replica_is_carried_out_and_counted(
    database_url: str, tmp_path: Path
) -> None:
    async with replicas(database_url, tmp_path, collections=USERS) as (one, two, three):
        async with (
            balancer(apart(one.address, two.address)) as front,
            listener(front, "users/*", token=token("ann")) as ann,
        ):
            other = await subscribe(three.address, ann.client_id, "posts/*")
            await ann.subscribe("posts/*", token=token("ann"))
            await one.service.write.execute("INSERT INTO posts (id, title) VALUES ('a', 'x')")
            (message,) = await ann.take(1)
        gone = await subscribe(two.address, ann.client_id, "posts/*")
        nobody = await subscribe(two.address, "x" * 40, "posts/*")
        counts = [
            {name: n for name, n in (await scrape(at.admin)).items() if name.startswith("calls_")}
            for at in (one, two, three)
        ]

    assert (message.event, other, gone, nobody) == ("posts/*", 403, 404, 404)
    assert counts == [
        {},
        {
            "calls_forwarded_total{ok}": 2,
            "calls_forwarded_total{client_unknown}": 1,
            "calls_forwarded_total{holder_gone}": 1,
        },
        {"calls_forwarded_total{authorization_mismatch}": 1},
    ]


async def test_a_holder_that_dies_during_a_call_is_404(database_url: str, tmp_path: Path) -> None:
    """SDKs reconnect; the replica that was called goes on."""
    async with replicas(database_url, tmp_path, 2) as (one, two):
        stream, client_id = await open_stream(one.address)
        os.kill(one.pid, signal.SIGSTOP)
        dying = asyncio.create_task(subscribe(two.address, client_id, "posts/*"))
        await asyncio.sleep(0.5)  # nothing signals that the call has been passed on
        one.kill()
        began = time.monotonic()
        status = await dying
        seconds = time.monotonic() - began
        await stream.close()
        async with listener(two.address) as client:
            own = await client.subscribe("posts/*")

    assert (status, own) == (404, 204)
    assert seconds < 8


@pytest.mark.skipif(
    os.environ.get("PGREALTIME_SLOW") != "1", reason="waits for 15 s: PGREALTIME_SLOW=1"
)
async def test_a_holder_that_is_stopped_is_503_and_404_once_it_is_dead(
    database_url: str, tmp_path: Path
) -> None:
    async with replicas(database_url, tmp_path, 2) as (one, two):
        stream, client_id = await open_stream(one.address)
        os.kill(one.pid, signal.SIGSTOP)
        began = time.monotonic()
        silent = await subscribe(two.address, client_id, "posts/*")
        seconds = time.monotonic() - began
        os.kill(one.pid, signal.SIGCONT)
        again = await subscribe(two.address, client_id, "posts/*")
        one.kill()
        gone = await subscribe(two.address, client_id, "posts/*")
        await stream.close()

    assert (silent, again, gone) == (503, 204, 404)
    assert 14 < seconds < 20


async def test_a_restart_of_postgresql_is_survived(server: OwnServer, tmp_path: Path) -> None:
    """Each process comes back to the bus at its own time."""
    async with replicas(server.url, tmp_path, 2) as (one, two):
        await asyncio.to_thread(server.control, "restart", "--mode=immediate")
        for replica in (one, two):
            await replica.service.process.wait_logged("bus.connected")
            await replica.wait_ready()
        async with (
            listener(one.address) as client,
            await psycopg.AsyncConnection.connect(server.url, autocommit=True) as writing,
        ):
            status = await subscribe(two.address, client.client_id, "posts/*")
            await writing.execute("INSERT INTO posts (id, title) VALUES ('a', 'x')")
            (message,) = await client.take(1)

    assert (status, message.event) == (204, "posts/*")
