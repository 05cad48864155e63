"""A subscriber of raw bytes: opens the stream, subscribes, and keeps every message."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.conformance.http_client import Address, EventStream, Request, send

DEADLINE = 20.0


@dataclass(frozen=True, slots=True)
class Message:
    """One message, taken apart."""

    id: str
    event: str
    data: Any


def parse(raw: bytes) -> Message:
    fields = dict(line.split(":", 1) for line in raw.decode().rstrip("\n").split("\n"))
    return Message(fields["id"], fields["event"], json.loads(fields["data"]))


class Listener:
    """One connection."""

    def __init__(self, stream: EventStream, address: Address) -> None:
        self.stream = stream
        self._address = address
        self.client_id = ""

    async def subscribe(self, *topics: str, token: str = "") -> int:
        """Submit the topics; return the status."""
        body = json.dumps({"clientId": self.client_id, "subscriptions": topics}).encode()
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = token
        request = Request(method="POST", path="/api/realtime", headers=headers, body=body)
        return (await send(request, self._address)).head.status

    async def take(self, count: int, seconds: float = DEADLINE) -> list[Message]:
        """Return the next messages."""
        return [parse(raw) for raw in await self.stream.take(count, seconds)]


@asynccontextmanager
async def listener(address: Address, *topics: str, token: str = "") -> AsyncIterator[Listener]:
    """Open a connection, and subscribe if there are topics."""
    request = Request(method="GET", path="/api/realtime", headers={})
    stream = await EventStream.open(request, address, "listener")
    try:
        opened = Listener(stream, address)
        (connect,) = await opened.take(1)
        opened.client_id = connect.data["clientId"]
        if topics:
            assert await opened.subscribe(*topics, token=token) == 204
        yield opened
    finally:
        await stream.close()
