"""A TCP proxy that cuts connections at random bytes, as networks do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.conformance.http_client import Address


class Breaker:
    """Forwards to a server; cuts each connection after a random number of bytes from there."""

    def __init__(self, target: Address, rng: random.Random) -> None:
        self._target = target
        self._rng = rng
        self.breaks = 0
        self.longest = 0
        """Bytes a connection may bring from now on at most before it is cut; 0 cuts none."""
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        try:
            there = await asyncio.open_connection(self._target.host, self._target.port)
        except OSError:
            writer.transport.abort()
            return
        up = asyncio.create_task(_copy(reader, there[1]))
        try:
            await self._down(there[0], writer)
        finally:
            up.cancel()
            with suppress(asyncio.CancelledError):
                await up
            there[1].transport.abort()
            writer.transport.abort()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left: int | None = None
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if not self.longest:
                    left = None
                elif left is None:
                    left = self._rng.randint(1, self.longest)
                if left is not None and len(data) >= left:
                    writer.write(data[:left])
                    await writer.drain()
                    self.breaks += 1
                    return
                left = None if left is None else left - len(data)
                writer.write(data)
                await writer.drain()
            writer.write_eof()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


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
