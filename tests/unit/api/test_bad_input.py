"""Malicious input is refused, is no internal error, and leaves nothing in memory."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog

from pgrealtime.api.body_reader import BodyReader
from tests.conformance.http_client import Request, send
from tests.loop_work import measuring_work
from tests.realtime import open_stream, post_json
from tests.unit.api.served import Served, served, until
from tests.unit.hub.harness import DEADLINE

POST = b"POST /api/realtime HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SEEDS = (
    b"GET /api/realtime HTTP/1.1\r\nHost: x\r\nLast-Event-ID: abc\r\n\r\n",
    b"HEAD /api/health?fields=code HTTP/1.1\r\nHost: x\r\n\r\n",
    (
        b"OPTIONS /api/realtime HTTP/1.1\r\nHost: x\r\nOrigin: a\r\n"
        b"Access-Control-Request-Headers: b\r\n\r\n"
    ),
    POST + b"Content-Length: 17\r\n\r\n" + b'{"clientId":"ab"}',
    POST + b"Transfer-Encoding: chunked\r\n\r\n11\r\n" + b'{"clientId":"ab"}\r\n0\r\n\r\n',
    POST.replace(b"application/json", b"multipart/form-data; boundary=B")
    + b"Content-Length: 72\r\n\r\n"
    + b'--B\r\nContent-Disposition: form-data; name="clientId"\r\n\r\nabcdef\r\n--B--\r\n',
    POST.replace(b"application/json", b"application/x-www-form-urlencoded")
    + b"Content-Length: 23\r\n\r\nclientId=a&@jsonPayload",
)
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


@asynccontextmanager
async def unharmed(
    caplog: pytest.LogCaptureFixture, body_reader: BodyReader | None = None
) -> AsyncIterator[Served]:
    """Run a service; afterwards it must be healthy, hold nothing, and have logged no warning."""
    caplog.set_level(logging.WARNING)
    with structlog.testing.capture_logs() as events:
        async with served(body_reader=body_reader) as service:
            tasks = len(asyncio.all_tasks())
            yield service
            await service.until_no_connection()
            await until(lambda: len(asyncio.all_tasks()) <= tasks)
            health = Request(method="GET", path="/api/health", headers={})
            assert (await send(health, service.address)).head.status == 200
    assert [event for event in events if event["log_level"] in ("warning", "error")] == []
    assert caplog.records == []


async def talk(service: Served, data: bytes) -> bytes:
    """Send the data and the end of the stream; return what is received until the server closes."""
    reader, writer = await service.raw(data)
    try:
        writer.write_eof()
        async with asyncio.timeout(DEADLINE):
            return await reader.read()
    except (ConnectionResetError, BrokenPipeError):
        return b""
    finally:
        writer.close()


def statuses(answer: bytes) -> set[int]:
    """Return the status codes in an answer."""
    return {int(status) for status in STATUS.findall(answer)}


def mutated(rng: random.Random, request: bytes) -> bytes:
    """Return the request with a few bytes changed, dropped, repeated or cut."""
    text = bytearray(request)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(5):
            case 0:
                text[at:at] = rng.randbytes(rng.choice((1, 1, 2, 30)))
            case 1:
                del text[at : at + rng.choice((1, 1, 5))]
            case 2:
                text[at:at] = rng.choice((b"\r\n", b"\n", b":", b"\x00", b"\xff", b";", b"%", b'"'))
            case 3:
                text[at:at] = text[rng.randrange(len(text) + 1) : at]
            case _:
                del text[at:]
        text = text or bytearray(b"\r\n")
    return bytes(text)


async def test_mutated_requests_are_answered_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    """No mutation of a valid request is an internal error."""
    rng = random.Random(20260)
    async with unharmed(caplog) as service:
        for _ in range(600):
            request = mutated(rng, rng.choice(SEEDS))
            answer = await talk(service, request)
            assert statuses(answer) <= {100, 200, 204, 400, 404, 413, 417}, request


async def test_bytes_that_are_no_http_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Random bytes of any length, and a TLS handshake."""
    rng = random.Random(20261)
    async with unharmed(caplog) as service:
        for size in (1, 2, 3, 10, 100, 5000, 100_000):
            for _ in range(20):
                assert statuses(await talk(service, rng.randbytes(size))) <= {400}
        tls_hello = bytes.fromhex("160301020001000 1fc0303".replace(" ", "")) + rng.randbytes(500)
        assert statuses(await talk(service, tls_hello)) <= {400}


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /api/realtime HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"GET /api/realtime HTTP/1.1\r\n" + b"a" * 200_000,
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 99999999999999999999999999\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: xyz\r\n\r\nabc",
    ],
)
async def test_head_that_can_t_be_meant_is_refused(
    caplog: pytest.LogCaptureFixture, head: bytes
) -> None:
    """Heads that are too long, contradict themselves, or declare an unknown coding."""
    async with unharmed(caplog) as service:
        assert statuses(await talk(service, head)) <= {400, 404, 413}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"x":' * 1_000_000,
        b'{"clientId":"' + b"a" * 10_000_000 + b'"}',
        b'{"clientId":"a","subscriptions":[' + b'"a",' * 500_000 + b'"a"]}',
        b'{"x":' + b"9" * 5_000_000 + b"}",
        b'{"x":"' + b"\\u0041" * 1_000_000 + b'"}',
        b"\xff" * 1_000_000,
        b" " * 5_000_000,
    ],
    ids=["lists", "objects", "long id", "many topics", "digits", "escapes", "no text", "blanks"],
)
async def test_large_nonsense_is_refused_soon(
    caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    """Other requests are served meanwhile with little delay."""
    async with unharmed(caplog) as service:
        status, longest = await subscribe(service, body)

    assert status == 400
    assert longest < 0.1


@pytest.mark.parametrize(
    "options",
    [
        'options={"query":{"0":1' + "".join(f',"{number}":1' for number in range(1, 240)) + "}}",
        "a&" * 1200 + "options={}",
    ],
    ids=["members", "pairs"],
)
async def test_the_largest_call_is_read_in_turns(
    caplog: pytest.LogCaptureFixture, options: str
) -> None:
    """A thousand topics of maximum length take seconds to parse, but delay no other request."""
    async with unharmed(caplog) as service:
        stream, client_id = await open_stream(service.address)
        call = {
            "clientId": client_id,
            "subscriptions": [f"posts/{number}?{options}" for number in range(1000)],
        }
        status, longest = await subscribe(service, json.dumps(call).encode())
        await stream.close()

    assert status == 204
    assert longest < 0.05


async def subscribe(service: Served, body: bytes) -> tuple[int, float]:
    """Send a subscribe call; return its status and the seconds of the longest loop iteration.

    They are the processor's: what else runs on the machine counts for nothing.
    """
    answer = asyncio.create_task(send(post_json("/api/realtime", body), service.address))
    longest = 0.0
    with measuring_work() as pieces:
        while not answer.done():
            pieces.clear()
            await asyncio.sleep(0)  # one iteration of the loop
            longest = max(longest, sum(pieces))
    return answer.result().head.status, longest


async def test_call_that_breaks_off_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """In the head, in the body, between chunks: the SDKs abort calls at any byte."""
    async with unharmed(caplog) as service:
        for request in SEEDS:
            for cut in range(0, len(request), 7):
                _, writer = await service.raw(request[:cut])
                await writer.drain()
                writer.transport.abort()


async def test_body_that_comes_too_slowly_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """After the time limit it is answered with status 408."""
    async with unharmed(caplog, BodyReader(timeout_seconds=0.1)) as service:
        reader, writer = await service.raw(POST + b"Content-Length: 1000\r\n\r\n{")
        async with asyncio.timeout(DEADLINE):
            answer = await reader.read()
        writer.close()

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert answer.endswith(b'{"data":{},"message":"Request timeout.","status":408}')


async def test_pipelined_requests_behind_a_stream_wait_and_are_bounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a client sends after its GET isn't parsed during the stream; it takes bounded memory."""
    async with unharmed(caplog) as service:
        _reader, writer = await service.raw(SEEDS[0] + SEEDS[1] * 20)
        await until(lambda: len(service.harness.hub.connections) == 1)
        writer.close()


async def test_many_clients_that_come_and_go_leave_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether they close their connections or reset them."""
    async with unharmed(caplog) as service:
        for _ in range(5):
            writers = [(await service.raw(SEEDS[0]))[1] for _ in range(50)]
            await until(lambda: len(service.harness.hub.connections) == 50)
            for number, writer in enumerate(writers):
                if number % 2:
                    writer.close()
                else:
                    writer.transport.abort()
            await service.until_no_connection()
