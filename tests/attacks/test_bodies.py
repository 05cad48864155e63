"""Request bodies that are large, unfinished or expensive to parse, many at a time."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NoReturn
from urllib.parse import quote

import pytest

from pgrealtime.api.body_reader import LARGE_BODY_BYTES, BodyReader
from pgrealtime.api.error_responses import BAD_REQUEST, RequestRefusedError
from tests.conformance.http_client import send
from tests.realtime import open_stream, post_json, subscribe
from tests.unit.api.served import Served, served, until
from tests.unit.hub.harness import DEADLINE, insert

MIB = 1024 * 1024
HEAD = b"POST /api/realtime HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
TOO_MANY = b'{"data":{},"message":"Too Many Requests.","status":429}'


@asynccontextmanager
async def unfinished(
    service: Served, count: int, size: int
) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Open calls that have each sent a part of their body and send no more."""
    readers, writers = [], []
    head = HEAD + b"Content-Length: %d\r\n\r\n" % (size + 1)

    async def begin() -> None:
        reader, writer = await service.raw(head + b'"' + b"x" * (size - 1))
        readers.append(reader)
        writers.append(writer)

    await asyncio.gather(*(begin() for _ in range(count)))
    try:
        yield readers
    finally:
        for writer in writers:
            writer.transport.abort()


async def test_unfinished_bodies_fill_no_more_than_there_is_for_an_address() -> None:
    """Further large bodies are refused in the API's error format.

    Small calls are served meanwhile.
    """
    body_reader = BodyReader(max_large_bytes_per_network=4 * MIB, max_large_bytes=100 * MIB)
    async with served(body_reader=body_reader) as service:
        stream, client_id = await open_stream(service.address, "honest")
        async with unfinished(service, 12, MIB) as readers:
            ends = [asyncio.create_task(reader.read()) for reader in readers]
            async with asyncio.timeout(DEADLINE):
                while sum(end.done() for end in ends) < 8:
                    assert body_reader._large.total_bytes <= 4 * MIB
                    await asyncio.sleep(0.001)
            assert body_reader._large.total_bytes == 4 * MIB
            refused = [end.result() for end in ends if end.done()]
            status = await subscribe(service.address, client_id, "posts/*")
            for end in ends:
                end.cancel()
        await until(lambda: body_reader._large.total_bytes == 0)
        await stream.close()

    assert status == 204
    assert all(answer.endswith(TOO_MANY) for answer in refused)
    assert all(answer.startswith(b"HTTP/1.1 429 ") for answer in refused)


async def test_small_bodies_of_one_address_are_bounded_apart() -> None:
    """However many connections send them, they spend nothing of the budget for large bodies."""
    body_reader = BodyReader(max_large_bytes_per_network=4 * MIB, max_small_bytes_per_network=MIB)
    async with (
        served(body_reader=body_reader) as service,
        unfinished(service, 20, LARGE_BODY_BYTES) as readers,
    ):
        ends = [asyncio.create_task(reader.read()) for reader in readers]
        await until(lambda: sum(end.done() for end in ends) == 4)
        await asyncio.sleep(0.05)
        refused = [end.result() for end in ends if end.done()]
        assert body_reader._large.total_bytes == 0
        body = b'{"clientId":"%b"}' % (b"x" * MIB)
        large = (await send(post_json("/api/realtime", body), service.address)).head.status
        for end in ends:
            end.cancel()

    assert not body_reader._small._by_network
    assert large == 400
    assert len(refused) == 4
    assert all(answer.endswith(TOO_MANY) for answer in refused)


@pytest.mark.parametrize(
    ("bounds", "address"),
    [
        pytest.param(
            {"max_large_bytes_per_network": 100 * MIB, "max_large_bytes": 2 * MIB},
            b"10.0.0.%d",
            id="IPv4",
        ),
        pytest.param(
            {"max_large_bytes_per_network": 2 * MIB}, b"2001:db8::%d", id="a network of IPv6"
        ),
    ],
)
async def test_unfinished_bodies_of_many_addresses_are_bounded_together(
    bounds: Mapping[str, int], address: bytes
) -> None:
    body_reader = BodyReader(**bounds)
    async with served({"trusted_proxies": ["127.0.0.1"]}, body_reader=body_reader) as service:
        ends = []
        for number in range(4):
            forwarded = b"X-Forwarded-For: %b\r\n" % (address % number)
            head = HEAD + forwarded + b"Content-Length: 9999999\r\n\r\n"
            reader, writer = await service.raw(head + b"x" * MIB)
            ends.append((asyncio.create_task(reader.read()), writer))
        await until(lambda: sum(end.done() for end, _ in ends) >= 2)
        held = body_reader._large.total_bytes
        for end, writer in ends:
            end.cancel()
            writer.transport.abort()
        await until(lambda: body_reader._large.total_bytes == 0)

    assert held <= 2 * MIB


async def test_what_was_refused_or_read_holds_no_room() -> None:
    body_reader = BodyReader(max_large_bytes_per_network=MIB, max_large_bytes=MIB)
    async with served(body_reader=body_reader) as service:
        for size in (2 * MIB, MIB // 2, LARGE_BODY_BYTES + 1, 10):
            for _ in range(3):
                body = b'{"clientId":"%b"}' % (b"x" * size)
                status = (await send(post_json("/api/realtime", body), service.address)).head.status
                assert status == (429 if size > MIB else 400 if size > 10 else 404)
            await until(lambda: body_reader._large.total_bytes == 0)


async def test_an_aborted_call_frees_its_budget_only_with_its_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A body counts until its parsing ends; otherwise many could be parsed at a time, uncounted."""
    may_go, begun = threading.Event(), threading.Semaphore(0)

    def slow(*_: object) -> NoReturn:
        begun.release()
        may_go.wait(DEADLINE)
        raise RequestRefusedError(BAD_REQUEST)

    monkeypatch.setattr("pgrealtime.api.realtime.parse_subscribe_body", slow)
    body_reader = BodyReader()
    async with served(body_reader=body_reader) as service:
        for number in range(1, 4):
            _, writer = await service.raw(HEAD + b"Content-Length: %d\r\n\r\n" % MIB + b"x" * MIB)
            await until(lambda: body_reader._large.total_bytes == number * MIB)  # noqa: B023
            if number == 1:
                assert await asyncio.to_thread(begun.acquire, timeout=DEADLINE)
            await asyncio.sleep(0.05)
            writer.transport.abort()
            await service.until_no_connection()
            await asyncio.sleep(0.05)
            assert body_reader._large.total_bytes == number * MIB
            assert not begun.acquire(blocking=False)
        may_go.set()
        await until(lambda: body_reader._large.total_bytes == 0)


async def test_bodies_that_can_not_be_read_leave_nothing_in_memory() -> None:
    """Memory is freed without the garbage collector, which counts objects: a body is one."""
    request = post_json("/api/realtime", b"[" + b"1," * MIB)
    async with served() as service:
        assert (await send(request, service.address)).head.status == 400
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(10):
                assert (await send(request, service.address)).head.status == 400
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()

    assert left < 2 * len(request.body)


async def test_many_calls_with_long_filters_hold_up_no_events() -> None:
    """Twenty calls, each with two uncompiled filters, don't delay the delivery of rows.

    The event loop runs other tasks after each filter, not after all calls that came at once.
    """

    def topic(number: int) -> str:
        """Return a filter of another shape for each number; equal shapes are compiled once."""
        joins = (("&&", "||")[number >> bit & 1] for bit in range(70))
        terms = "".join(f"(title~'{n}'||id>'b'){join}" for n, join in enumerate(joins))
        options = json.dumps({"query": {"filter": f"{terms}id!='c'"}}, separators=(",", ":"))
        return f"posts/*?options={quote(options, safe='(){}|~<>=:!,')}"

    async with served() as service:
        streams = [await open_stream(service.address, str(number)) for number in range(21)]
        honest, client_id = streams.pop()
        assert await subscribe(service.address, client_id, "posts/*") == 204
        calls = [
            asyncio.create_task(
                subscribe(service.address, one, *map(topic, range(n * 2, n * 2 + 2)))
            )
            for n, (_, one) in enumerate(streams)
        ]
        began = time.monotonic()
        delays: list[float] = []
        while not all(call.done() for call in calls):
            sent = time.monotonic()
            service.harness.commit(insert(f"row{len(delays)}"))
            assert await honest.take(1, 30.0)
            delays.append(time.monotonic() - sent)
        in_all = time.monotonic() - began
        statuses = await asyncio.gather(*calls)
        for stream, _ in (*streams, (honest, client_id)):
            await stream.close()

    assert set(statuses) == {204}
    assert max(delays) < in_all / 5, "an event waited for more than a few filters"
