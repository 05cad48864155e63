"""A subscriber of raw bytes: opens the stream, subscribes, and keeps every message."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.conformance.http_client import Address, EventStream, Request, send

DEADLINE = 20.0


@dataclass(frozen=True, slots=True)
class Message:
    """One message, split into its fields."""

    id: str
    event: str
    data: Any


def parse(raw: bytes) -> Message:
    fields = dict(line.split(":", 1) for line in raw.decode().rstrip("\n").split("\n"))
    return Message(fields["id"], fields["event"], json.loads(fields["data"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """How a client connects: its address, path and headers."""

    base_path: str = ""
    source_ip: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, method: str, headers: Mapping[str, str], body: bytes = b"") -> Request:
        return Request(
            method=method,
            path=f"{self.base_path}/api/realtime",
            headers={**self.headers, **headers},
            body=body,
            source_ip=self.source_ip,
        )


ANYBODY = Caller()


class Listener:
    """One connection."""

    def __init__(self, stream: EventStream, address: Address, caller: Caller) -> None:
        self.stream = stream
        self._address = address
        self._caller = caller
        self.client_id = ""

    async def subscribe(self, *topics: str, token: str = "", caller: Caller | None = None) -> int:
        """Submit the topics; return the status."""
        body = json.dumps({"clientId": self.client_id, "subscriptions": topics}).encode()
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = token
        request = (caller or self._caller).request("POST", headers, body)
        return (await send(request, self._address)).head.status

    async def take(self, count: int, seconds: float = DEADLINE) -> list[Message]:
        """Return the next messages."""
        return [parse(raw) for raw in await self.stream.take(count, seconds)]


@asynccontextmanager
async def listener(
    address: Address, *topics: str, token: str = "", caller: Caller = ANYBODY
) -> AsyncIterator[Listener]:
    """Open a connection, and subscribe if there are topics."""
    stream = await EventStream.open(caller.request("GET", {}), address, "listener")
    try:
        opened = Listener(stream, address, caller)
        (connect,) = await opened.take(1)
        opened.client_id = connect.data["clientId"]
        if topics:
            assert await opened.subscribe(*topics, token=token) == 204
        yield opened
    finally:
        await stream.close()
