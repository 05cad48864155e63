"""The service behind nginx, Caddy and haproxy, with the files of ``config/proxy``."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.http_client import Address, End, EventStream, Request, send
from tests.e2e.curl import curl, post
from tests.e2e.listener import DEADLINE, Caller, listener, parse
from tests.e2e.numbered import OPEN
from tests.e2e.proxy import PREFIX, PROGRAMS, Program, Proxy, proxy
from tests.e2e.sdk import native, sdk
from tests.e2e.service import Service, service, token
from tests.e2e.test_admin import admin, scrape

BEHIND_A_PROXY = {"base_path": PREFIX, "trusted_proxies": ["127.0.0.1"]}
NO_HEARTBEAT = {"realtime": {"heartbeat": "1h"}}
AT_ONCE = 0.1
"""Seconds; above what a busy machine adds to most events, below the 0.2 that haproxy can add."""

# All of 127.0.0.0/8 is this machine, but only 127.0.0.1 is a trusted proxy.
ONE = Caller(base_path=PREFIX, source_ip="127.0.0.2")
OTHER = Caller(base_path=PREFIX, source_ip="127.0.0.3")
PRETENDER = Caller(
    base_path=PREFIX, source_ip="127.0.0.3", headers={"X-Forwarded-For": "127.0.0.2"}
)

OWN_HOST: Mapping[Program, Mapping[str, str]] = {
    "nginx": {"/realtime/api/realtime": "/api/realtime", "location /realtime/": "location /"},
    "caddy": {"handle /realtime/*": "handle", "path /realtime/api/": "path /api/"},
    "haproxy": {"use_backend pgrealtime if { path_beg /realtime/ }": "default_backend pgrealtime"},
}

each_program = pytest.mark.parametrize("program", PROGRAMS)


@asynccontextmanager
async def behind(
    program: Program,
    database_url: str,
    directory: Path,
    *,
    edits: Mapping[str, str] | None = None,
    server: Mapping[str, Any] = BEHIND_A_PROXY,
    **sections: Mapping[str, Any],
) -> AsyncIterator[tuple[Service, Proxy]]:
    """A service and a proxy in front of it."""
    sections = {"server": server, **sections}
    async with (
        service(database_url, directory, collections=OPEN, sections=sections) as running,
        proxy(program, running.address, directory, edits=edits) as front,
    ):
        yield running, front


async def insert(running: Service, name: str) -> None:
    await running.write.execute("INSERT INTO posts (id, title) VALUES (%s, 'x')", [name])


async def address_of(caller: Caller, through: Address) -> str:
    """Return the caller's address in pgrealtime's view, which superusers are shown."""
    headers = {**caller.headers, "Authorization": token("root", role="admin")}
    request = Request(
        method="GET",
        path=f"{caller.base_path}/api/health",
        headers=headers,
        source_ip=caller.source_ip,
    )
    found: str = json.loads((await send(request, through)).body)["data"]["realIP"]
    return found


@each_program
async def test_the_head_and_each_event_come_at_once(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """No buffer delays them, although no heartbeat is sent and compression was offered."""
    offering = Caller(base_path=PREFIX, headers={"Accept-Encoding": "gzip, br"})
    async with behind(program, database_url, tmp_path, **NO_HEARTBEAT) as (running, front):
        started = time.monotonic()
        stream = await EventStream.open(offering.request("GET", {}), front.address, "head")
        first = [parse(raw) for raw in await stream.take(1, DEADLINE)]
        opened_in = time.monotonic() - started
        await stream.close()
        delays = []
        async with listener(front.address, "posts/*", caller=offering) as client:
            for n in range(15):
                committed = time.monotonic()
                await insert(running, f"r{n}")
                (message,) = await client.take(1)
                delays.append(time.monotonic() - committed)
                assert message.data["record"]["id"] == f"r{n}"

    assert [message.event for message in first] == ["PB_CONNECT"]
    assert stream.head.header("content-encoding") is None
    assert opened_in < 10 * AT_ONCE
    assert statistics.median(delays) < AT_ONCE


@each_program
async def test_the_client_s_own_address_counts(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """Not the proxy's, nor the one that the client claims; a client subscribes for no other."""
    async with behind(program, database_url, tmp_path) as (_, front):
        known = [await address_of(caller, front.address) for caller in (ONE, OTHER, PRETENDER)]
        async with listener(front.address, caller=ONE) as client:
            by_pretender = await client.subscribe("posts/*", caller=PRETENDER)
            by_other = await client.subscribe("posts/*", caller=OTHER)
            by_itself = await client.subscribe("posts/*")

    assert known == ["127.0.0.2", "127.0.0.3", "127.0.0.3"]
    assert (by_pretender, by_other, by_itself) == (400, 400, 204)


async def test_behind_haproxy_calls_come_to_any_of_several_workers(
    database_url: str, tmp_path: Path
) -> None:
    """Over connections that it keeps; the client's address goes along with the call."""
    at, sections = admin()
    workers = {**BEHIND_A_PROXY, "workers": 2}
    async with (
        behind("haproxy", database_url, tmp_path, server=workers, admin=sections["admin"]) as (
            running,
            front,
        ),
        AsyncExitStack() as stack,
    ):
        clients = [
            await stack.enter_async_context(listener(front.address, caller=ONE)) for _ in range(12)
        ]
        calls = [(client, caller) for client in clients for caller in (OTHER, PRETENDER, ONE)]
        statuses = [await client.subscribe("posts/*", caller=caller) for client, caller in calls]
        await insert(running, "to all")
        received = [(await client.take(1))[0].data["record"]["id"] for client in clients]
        metrics = await scrape(at)

    assert len({client.client_id[:6] for client in clients}) == 2
    assert statuses == [400, 400, 204] * len(clients)
    assert received == ["to all"] * len(clients)
    assert sum(n for name, n in metrics.items() if name.startswith("calls_forwarded_total{"))


async def test_a_client_that_bypasses_the_proxy_is_not_trusted(
    database_url: str, tmp_path: Path
) -> None:
    """The header is accepted from trusted addresses only."""
    async with service(
        database_url, tmp_path, collections=OPEN, sections={"server": BEHIND_A_PROXY}
    ) as running:
        known = await address_of(PRETENDER, running.address)
        async with listener(running.address, caller=ONE) as client:
            status = await client.subscribe("posts/*", caller=PRETENDER)

    assert (known, status) == ("127.0.0.3", 400)


@each_program
async def test_events_come_over_http_2_as_well(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """Browsers use it where there is a certificate.

    Here it runs without one, by prior knowledge.
    """
    edits = {"location /realtime/ {": "http2 on; location /realtime/ {"}
    async with (
        behind(program, database_url, tmp_path, edits=edits if program == "nginx" else {}) as (
            running,
            front,
        ),
        curl("--http2-prior-knowledge", f"{front.url}{PREFIX}/api/realtime") as stream,
    ):
        version = (await stream.line()).split()[0]
        client_id = await stream.client_id()
        await post(f"{front.url}{PREFIX}/api/realtime", client_id, "posts/*")
        await insert(running, "two")
        event = await stream.data_of("posts/*")

    assert version == "HTTP/2"
    assert event["record"]["id"] == "two"


@each_program
async def test_a_client_that_leaves_is_forgotten(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """The proxy closes its upstream connection although nothing is being sent."""
    async with behind(program, database_url, tmp_path, **NO_HEARTBEAT) as (_, front):
        async with listener(front.address, "posts/*", caller=ONE) as client:
            pass
        status, deadline = 204, time.monotonic() + DEADLINE
        while status == 204 and time.monotonic() < deadline:
            status = await client.subscribe("posts/*")

    assert status == 404


@each_program
async def test_an_orderly_end_stays_one(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """The last event arrives, then the end of the body; some clients hang after a cut."""
    async with (
        behind(program, database_url, tmp_path) as (running, front),
        listener(front.address, "posts/*", caller=ONE) as client,
    ):
        await insert(running, "last")
        await running.stop()
        end = await client.stream.wait_end(DEADLINE)
        messages = await client.take(1)

    assert [message.data["record"]["id"] for message in messages] == ["last"]
    assert end is End.ORDERLY


@each_program
async def test_the_heartbeat_outlives_the_proxy_s_patience(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """Times are a thirtieth of the file's 60 s and of the heartbeat's default of 25 s."""
    edits = {"60s": "2s"}
    async with (
        behind(program, database_url, tmp_path, edits=edits, realtime={"heartbeat": "830ms"}) as (
            running,
            front,
        ),
        listener(front.address, "posts/*", caller=ONE) as client,
    ):
        end = await client.stream.wait_end(5.0)
        await insert(running, "still")
        (message,) = await client.take(1)

    assert end is None
    assert message.data["record"]["id"] == "still"


@each_program
async def test_without_a_heartbeat_the_proxy_cuts(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """So the times of the test before are the ones that matter."""
    async with (
        behind(program, database_url, tmp_path, edits={"60s": "2s"}, **NO_HEARTBEAT) as (_, front),
        listener(front.address, "posts/*", caller=ONE) as client,
    ):
        end = await client.stream.wait_end(DEADLINE)

    assert end is not None


@each_program
async def test_the_sdk_comes_back_after_a_restart_of_the_proxy(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """The prefix is part of its base URL."""
    async with (
        behind(program, database_url, tmp_path) as (running, front),
        sdk(front.url + PREFIX) as client,
    ):
        await client.do("connects")
        await client.do("subscribe", collection="posts", topic="*")
        await front.stop()
        await front.start()
        await client.wait_for(2, "connect")
        # Resolves when the SDK has submitted everything anew.
        await client.do("subscribe", collection="users", topic="x")
        await insert(running, "after")
        (event,) = await client.wait_for(1)

    assert (event["action"], event["record"]["id"]) == ("create", "after")


@each_program
async def test_a_plain_event_source_misses_nothing_over_a_restart_of_the_proxy(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    async with (
        behind(program, database_url, tmp_path) as (running, front),
        native(front.url + PREFIX, "posts/*") as client,
    ):
        await client.wait_for(1, "subscribed")
        await insert(running, "before")
        await client.wait_for(1)
        await front.stop()
        await insert(running, "meanwhile")
        await front.start()
        await insert(running, "after")
        events = await client.wait_for(3)

    assert [event["record"]["id"] for event in events] == ["before", "meanwhile", "after"]


@each_program
async def test_the_sdk_comes_back_after_a_restart_of_pgrealtime(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """The SDK takes an empty stream in between for one more attempt."""
    async with (
        behind(program, database_url, tmp_path) as (running, front),
        sdk(front.url + PREFIX) as client,
    ):
        await client.do("connects")
        await client.do("subscribe", collection="posts", topic="*")
        await running.stop()
        await asyncio.sleep(1.0)  # the SDK tries two or three times meanwhile
        await running.start()
        await client.wait_for(2, "connect")
        await client.do("subscribe", collection="users", topic="x")
        await insert(running, "after")
        (event,) = await client.wait_for(1)

    assert event["record"]["id"] == "after"


@each_program
async def test_a_subscribe_call_fails_while_pgrealtime_is_away(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """The proxy's answer must not look like success to a client."""
    async with (
        behind(program, database_url, tmp_path) as (running, front),
        listener(front.address, caller=ONE) as client,
    ):
        await running.stop()
        status = await client.subscribe("posts/*")

    assert status in (502, 503)


@each_program
async def test_a_host_name_of_its_own_needs_no_base_path(
    program: Program, database_url: str, tmp_path: Path
) -> None:
    """With the edits that the file's first lines describe."""
    async with (
        behind(
            program,
            database_url,
            tmp_path,
            edits=OWN_HOST[program],
            server={"trusted_proxies": ["127.0.0.1"]},
        ) as (running, front),
        sdk(front.url) as client,
    ):
        await client.do("subscribe", collection="posts", topic="*")
        await insert(running, "here")
        (event,) = await client.wait_for(1)

    assert event["record"]["id"] == "here"
