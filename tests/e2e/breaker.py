"""A TCP proxy that cuts connections at random bytes, as networks do.

One exception: a stream isn't cut between its PB_CONNECT and the answer to the call that follows.
There the official SDK cancels its call, takes that for success and never connects again, whatever
the server does.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.conformance.http_client import Address

CALL_SECONDS = 5.0
"""How long a stream isn't cut while its call doesn't come."""

NOTICE_SECONDS = 0.1
"""How long a client has to notice that its call was answered."""


class Breaker:
    """Forwards one client to a server; cuts connections after a random number of bytes.

    Args:
        target: The server.
        rng: Decides where to cut.
    """

    def __init__(self, target: Address, rng: random.Random) -> None:
        self._target = target
        self._rng = rng
        self._answered = asyncio.Event()
        """Set once a call was answered after the last PB_CONNECT."""
        self.breaks = 0
        self.longest = 0
        """Maximum of bytes that a new connection brings before it is cut; 0 cuts none."""
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        try:
            there = await asyncio.open_connection(self._target.host, self._target.port)
        except OSError:
            writer.transport.abort()
            return
        up = _Up(reader, there[1])
        copying = asyncio.create_task(up.copy())
        try:
            await self._down(there[0], writer, up)
        finally:
            copying.cancel()
            with suppress(asyncio.CancelledError):
                await copying
            there[1].transport.abort()
            writer.transport.abort()

    async def _down(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: _Up
    ) -> None:
        left: int | None = None
        greeted: asyncio.Event | None = None
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if not self.longest:
                    left = None
                elif left is None:
                    left = self._rng.randint(1, self.longest)
                cut = left is not None and len(data) >= left
                part = data[:left] if cut else data
                writer.write(part)
                await writer.drain()
                if up.is_call:
                    self._answered.set()
                elif _GREETING.search(part):
                    greeted = self._answered = asyncio.Event()
                if cut:
                    if greeted is not None:
                        await _noticed(greeted)
                    self.breaks += 1
                    return
                left = None if left is None else left - len(part)
            writer.write_eof()


_GREETING = re.compile(rb"PB_CONNECT\n.*\n\n")


class _Up:
    """What one connection sends to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.is_call = False
        """Whether the newest request on it is a POST."""

    async def copy(self) -> None:
        with suppress(ConnectionError):
            while data := await self._reader.read(65536):
                if verb := _VERB.match(data):
                    self.is_call = verb[1] == b"POST"
                self._writer.write(data)
                await self._writer.drain()


_VERB = re.compile(rb"([A-Z]+) /")


async def _noticed(answered: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(CALL_SECONDS):
            await answered.wait()
    await asyncio.sleep(NOTICE_SECONDS)  # the client's own time, which nothing signals


@asynccontextmanager
async def breaker(target: Address, rng: random.Random) -> AsyncIterator[Breaker]:
    """Start the proxy on a free port."""
    proxy = Breaker(target, rng)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(proxy.handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    proxy.url = f"http://{host}:{port}"
    try:
        yield proxy
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
