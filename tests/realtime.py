"""PocketBase's realtime API over the raw HTTP client: open a connection, submit its topics."""

import asyncio
import json
import re
import socket

from tests.conformance.http_client import Address, EventStream, Request, send

OPEN_STREAM = Request(method="GET", path="/api/realtime", headers={})
_SECONDS = 10.0


def post_json(path: str, body: bytes) -> Request:
    """Return a POST of JSON."""
    headers = {"Content-Type": "application/json"}
    return Request(method="POST", path=path, headers=headers, body=body)


async def open_stream(address: Address, name: str = "A") -> tuple[EventStream, str]:
    """Open a connection; return it with its client id."""
    stream = await EventStream.open(OPEN_STREAM, address, name)
    (connect,) = await stream.take(1, _SECONDS)
    return stream, _client_id_in(connect)


async def open_unread(address: Address, *topics: str) -> socket.socket:
    """Subscribe, and read no more after that; the kernel buffers little for it."""
    sleeper = socket.socket()
    sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sleeper.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sleeper, (address.host, address.port))
    await loop.sock_sendall(sleeper, b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n")
    text = b""
    async with asyncio.timeout(_SECONDS):
        while b"\n\n" not in text:
            text += await loop.sock_recv(sleeper, 4096)
    assert await subscribe(address, _client_id_in(text), *topics) == 204
    return sleeper


async def subscribe(address: Address, client_id: str, *topics: str, token: str = "") -> int:
    """Submit the topics of a connection; return the status."""
    body = json.dumps({"clientId": client_id, "subscriptions": topics}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": token} if token else {})
    call = Request(method="POST", path="/api/realtime", headers=headers, body=body)
    return (await send(call, address)).head.status


def _client_id_in(connect: bytes) -> str:
    found = re.search(rb'"clientId":"(\w+)"', connect)
    assert found is not None, connect
    return found[1].decode()
