"""The event stream over HTTP, byte for byte, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import struct
from socket import SO_LINGER, SOL_SOCKET

import pytest
from aiohttp import web

from tests.conformance.http_client import EventStream
from tests.realtime import open_stream
from tests.unit.api.served import Served, served, until
from tests.unit.hub.harness import DEADLINE, insert

GET = b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD_LINES = {
    b"Content-Type: text/event-stream",
    b"Cache-Control: no-store",
    b"X-Accel-Buffering: no",
    b"X-XSS-Protection: 1; mode=block",
    b"X-Content-Type-Options: nosniff",
    b"X-Frame-Options: SAMEORIGIN",
    b"Cross-Origin-Opener-Policy: same-origin",
    b"Vary: Origin",
}
PB_CONNECT = re.compile(
    rb'id:([A-Za-z0-9]{40})\nevent:PB_CONNECT\ndata:\{"clientId":"\1"\}\n\n', re.DOTALL
)


async def read_head(reader: asyncio.StreamReader) -> tuple[bytes, set[bytes]]:
    """Return the status line, and the header lines without the date."""
    async with asyncio.timeout(DEADLINE):
        head = await reader.readuntil(b"\r\n\r\n")
    status, *lines = head[:-4].split(b"\r\n")
    return status, {line for line in lines if not line.startswith(b"Date:")}


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(DEADLINE):
        size = int(await reader.readuntil(b"\r\n"), 16)
        return (await reader.readexactly(size + 2))[:-2]


async def test_head_and_first_message_are_pocketbase_s() -> None:
    """No charset, no Connection, one chunk (protocol, 2.1 and 2.3)."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        status, lines = await read_head(reader)
        message = await read_chunk(reader)
        writer.close()

    assert status == b"HTTP/1.1 200 OK"
    assert lines == HEAD_LINES | {b"Transfer-Encoding: chunked"}
    assert PB_CONNECT.fullmatch(message)


async def test_head_comes_at_once_although_the_first_message_is_held_back() -> None:
    """A client that receives no head gives up; nothing else is sent meanwhile."""
    async with served(is_up=False) as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        service.harness.hub.stream_started("abcdef")

        assert PB_CONNECT.fullmatch(await read_chunk(reader))
        writer.close()


async def test_nothing_in_the_request_changes_the_answer() -> None:
    """Protocol 2.2. A native EventSource would not retry after a refused 8 KB Last-Event-ID."""
    request = (
        b"GET /api/realtime?x=%%zz&token=1 HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n"
        b"Accept-Encoding: gzip, deflate\r\nAuthorization: garbage\r\nLast-Event-ID: %b\r\n"
        b"Cookie: a=%b\r\n\r\n"
    ) % (b"i" * 8192, b"c" * 8000)
    async with served() as service:
        reader, writer = await service.raw(request)
        status, lines = await read_head(reader)
        message = await read_chunk(reader)
        writer.close()

    assert status == b"HTTP/1.1 200 OK"
    assert lines == HEAD_LINES | {b"Transfer-Encoding: chunked"}
    assert PB_CONNECT.fullmatch(message)


async def test_http_1_0_gets_the_body_as_it_is() -> None:
    """Without chunked encoding."""
    async with served() as service:
        reader, writer = await service.raw(b"GET /api/realtime HTTP/1.0\r\n\r\n")
        status, lines = await read_head(reader)
        async with asyncio.timeout(DEADLINE):
            message = await reader.readuntil(b"\n\n")
        writer.close()

    assert status == b"HTTP/1.0 200 OK"
    assert lines == HEAD_LINES
    assert PB_CONNECT.fullmatch(message)


async def test_head_request_is_held_without_a_body() -> None:
    """It counts as a connection until its client closes it (protocol, 2.10)."""
    async with served() as service:
        reader, writer = await service.raw(GET.replace(b"GET", b"HEAD"))
        status, lines = await read_head(reader)
        (connection,) = service.harness.hub.connections
        connection.write(b"not for it")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.read(1)
        writer.close()
        await service.until_no_connection()

    assert status == b"HTTP/1.1 200 OK"
    assert lines == HEAD_LINES


async def subscribed(service: Served) -> EventStream:
    """Open a stream that is subscribed to posts."""
    stream, _ = await open_stream(service.address)
    (connection,) = service.harness.hub.connections
    await service.harness.subscribe(connection, "posts/*")
    return stream


async def test_messages_of_one_flush_are_one_chunk() -> None:
    """What the hub writes at once is one chunk, which is what makes fan-out cheap."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        await read_chunk(reader)
        (connection,) = service.harness.hub.connections
        connection.write(b"id:1\ndata:a\n\nid:1\ndata:b\n\n")

        assert await read_chunk(reader) == b"id:1\ndata:a\n\nid:1\ndata:b\n\n"
        writer.close()


async def test_end_by_the_server_is_orderly_after_the_last_event() -> None:
    """The body ends, nothing follows, and the HTTP connection can be reused (protocol, 2.8)."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        await read_chunk(reader)
        (connection,) = service.harness.hub.connections
        connection.write(b"last")
        await service.harness.hub.shutdown(1.0)

        assert await read_chunk(reader) == b"last"
        async with asyncio.timeout(DEADLINE):
            assert await reader.readexactly(5) == b"0\r\n\r\n"
        writer.write(b"GET /api/health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_head(reader))[0] == b"HTTP/1.1 200 OK"
        writer.close()


async def test_request_sent_during_the_stream_is_answered_after_it() -> None:
    """As PocketBase does with pipelined requests."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        await read_chunk(reader)
        request = b"GET /api/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        writer.write(request)
        await service.answer_to(request)  # by then the earlier one has arrived as well
        await service.harness.hub.shutdown(1.0)
        async with asyncio.timeout(DEADLINE):
            rest = await reader.read()
        writer.close()

    assert rest.startswith(b"0\r\n\r\nHTTP/1.1 200 OK\r\n")


async def test_client_that_floods_a_stream_is_dropped() -> None:
    """What a client sends during the stream is kept, up to a limit."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        await read_chunk(reader)
        writer.write(b"x" * 200_000)
        await service.until_no_connection()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /api/realtime HTTP/1.0\r\n\r\n",
        b"GET /api/realtime HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /api/realtime HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf",
    ],
)
async def test_connection_that_serves_nothing_more_is_closed_after_the_stream(
    request_text: bytes,
) -> None:
    """HTTP/1.0, ``Connection: close``, and requests whose body isn't complete."""
    async with served() as service:
        reader, writer = await service.raw(request_text)
        await read_head(reader)
        await until(lambda: len(service.harness.hub.connections) == 1)
        await service.harness.hub.shutdown(1.0)
        async with asyncio.timeout(DEADLINE):
            rest = await reader.read()
        writer.close()

    assert b"PB_CONNECT" in rest
    assert rest.endswith((b"}\n\n", b"\r\n0\r\n\r\n"))


async def test_stream_keeps_nothing_of_aiohttp() -> None:
    """A request of aiohttp has 13 KB of parser, tasks and headers: too much for each connection."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        await read_chunk(reader)
        gc.collect()
        kept = [thing for thing in gc.get_objects() if isinstance(thing, web.BaseRequest)]
        tasks = [task for task in asyncio.all_tasks() if "RequestHandler" in repr(task)]
        writer.close()

    assert kept == []
    assert tasks == []


async def test_what_was_said_before_shutdown_still_arrives() -> None:
    """A server that stops sends its buffers first, as far as the client takes them."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        await read_chunk(reader)
        (connection,) = service.harness.hub.connections
        connection.write(b"x" * 20_000_000)
        await service.harness.hub.shutdown(1.0)
        reading = asyncio.create_task(reader.read())

    async with asyncio.timeout(DEADLINE):
        rest = await reading
    writer.close()
    assert len(rest) > 20_000_000
    assert rest.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("how", ["closes", "resets", "half closes"])
async def test_client_that_goes_away_is_forgotten_at_once(how: str) -> None:
    """Not only at the next event or heartbeat (protocol, 2.9), and nothing of it is kept."""
    async with served(heartbeat=1000.0, idle_timeout=1000.0) as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        await read_chunk(reader)
        assert len(service.harness.hub.connections) == 1
        match how:
            case "closes":
                writer.close()
            case "resets":
                socket = writer.get_extra_info("socket")
                socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                writer.close()
            case _:
                writer.write_eof()
        await service.until_no_connection()
        writer.close()


async def test_client_that_takes_nothing_is_dropped_and_shows_meanwhile() -> None:
    """The hub sees the size of the buffer, waits until it is low, and aborts a stalled client."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        (connection,) = service.harness.hub.connections
        for _ in range(200):
            connection.write(b"x" * 100_000)
        waits = asyncio.create_task(connection.writer.drain())
        await asyncio.sleep(0)

        assert connection.writer.buffered_bytes() > 1_000_000
        assert not waits.done()
        connection.writer.abort()
        async with asyncio.timeout(DEADLINE):
            await waits
        await service.until_no_connection()
        connection.write(b"into the void")
        writer.close()


async def test_slow_client_gets_everything_once_it_reads() -> None:
    """``drain`` returns when the client has taken the buffer."""
    async with served() as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        await read_chunk(reader)
        (connection,) = service.harness.hub.connections
        for n in range(200):
            connection.write(b"%d" % n * 10_000)
        async with asyncio.timeout(DEADLINE):
            drained = asyncio.create_task(connection.writer.drain())
            for n in range(200):
                assert await read_chunk(reader) == b"%d" % n * 10_000
            await drained
        assert connection.writer.buffered_bytes() == 0
        writer.close()


async def test_end_of_a_stream_that_is_never_read_is_bounded_in_time() -> None:
    """Otherwise its handler would stay for as long as the client keeps the connection."""
    async with served(stall_timeout=0.1) as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        (connection,) = service.harness.hub.connections
        connection.write(b"x" * 20_000_000)
        connection.writer.close()
        connection.close()
        assert connection.writer.buffered_bytes() > 1_000_000
        await until(lambda: connection.writer.buffered_bytes() == 0)

        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(20_000_000)
        writer.close()


async def test_an_ended_stream_drops_a_client_that_takes_the_rest_too_slowly() -> None:
    """The hub has removed it by then, and for the kernel the client isn't stalled."""
    async with served(stall_timeout=0.5) as service:
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            client.setblocking(False)
            await loop.sock_connect(client, (service.address.host, service.address.port))
            await loop.sock_sendall(client, GET)
            await until(lambda: len(service.harness.hub.connections) == 1)
            (connection,) = service.harness.hub.connections
            connection.write(b"x" * 20_000_000)
            service.harness.hub.remove_connection(connection)
            connection.writer.close()
            taken = 0
            async with asyncio.timeout(DEADLINE):
                while connection.writer.buffered_bytes():
                    taken += len(await loop.sock_recv(client, 8192))
                    await asyncio.sleep(0.01)

    assert taken < 20_000_000


async def test_a_connection_whose_stream_s_end_had_to_wait_serves_on_and_stays() -> None:
    """Also if so few bytes waited that the transport never paused writing."""
    async with served(stall_timeout=1.5) as service:
        reader, writer = await service.raw(GET)
        await read_head(reader)
        (connection,) = service.harness.hub.connections
        while not connection.writer.buffered_bytes():
            connection.write(b"x" * 10_000)
        service.harness.hub.remove_connection(connection)
        connection.writer.close()
        async with asyncio.timeout(DEADLINE):
            rest = b""
            while not rest.endswith(b"\r\n0\r\n\r\n"):
                rest = rest[-10:] + await reader.read(100_000)
        for _ in range(2):
            writer.write(b"GET /api/health HTTP/1.1\r\nHost: x\r\n\r\n")
            status, lines = await read_head(reader)
            (length,) = (line for line in lines if line.startswith(b"Content-Length: "))
            await reader.readexactly(int(length.partition(b" ")[2]))
            assert status == b"HTTP/1.1 200 OK"
            await asyncio.sleep(2.0)  # longer than the end of the stream might have taken
        writer.close()


async def test_events_reach_the_socket() -> None:
    """One message for each event of the topic."""
    async with served() as service:
        stream = await subscribed(service)
        service.harness.commit(insert("a", "x"), insert("b", "y"))
        messages = await stream.take(2, DEADLINE)
        await stream.close()

    assert [b'"id":"a"' in messages[0], b'"id":"b"' in messages[1]] == [True, True]


@pytest.mark.parametrize(
    ("request_text", "position"),
    [
        (b"GET /api/realtime?lastEventId= HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (b"GET /api/realtime?lastEventId=%zz HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (b"GET /api/realtime?lasteventid= HTTP/1.1\r\nHost: x\r\n\r\n", False),
        (b"GET /api/realtime HTTP/1.1\r\nHost: x\r\nLast-Event-ID: abc\r\n\r\n", False),
        (
            b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n"
            b"Last-Event-ID: " + b"A" * 40 + b".abcdef-0000000000000064-00000000\r\n\r\n",
            True,
        ),
        (b"GET /api/realtime HTTP/1.1\r\nHost: x\r\nLast-Event-ID: \xff\xfe\r\n\r\n", False),
    ],
)
async def test_requests_for_positions_get_them(request_text: bytes, position: bool) -> None:  # noqa: FBT001 (parametrized)
    """All other requests get PocketBase's bytes (resume page, section 3)."""
    async with served() as service:
        reader, writer = await service.raw(request_text)
        await read_head(reader)
        message = await read_chunk(reader)
        writer.close()

    expected = rb"id:[A-Za-z0-9]{40}\.[0-9a-f-]{32}\n" if position else rb"id:[A-Za-z0-9]{40}\n"
    assert re.match(expected, message)
