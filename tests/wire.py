"""A TCP proxy between program and database that can cut connections or drop all data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit, urlunsplit


class Wire:
    """Forwards to a server until it is cut or silenced."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._is_cut = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    def url(self, url: str) -> str:
        """Return the URL of the same database through this proxy."""
        parts = urlsplit(url)
        netloc = f"{parts.username}@127.0.0.1:{self.port}"
        return urlunsplit(parts._replace(netloc=netloc))

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        self._is_cut = True
        self.break_all()

    def break_all(self) -> None:
        """Break the current connections."""
        for writer in self._writers:
            writer.transport.abort()

    def silence(self) -> None:
        """Deliver nothing more, without an error."""
        self._flowing.clear()

    def mend(self) -> None:
        """Forward again."""
        self._is_cut = False
        self._flowing.set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        if self._is_cut:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(*self._target)
        both = {writer, there[1]}
        self._writers |= both
        ways = [
            asyncio.create_task(self._copy(reader, there[1])),
            asyncio.create_task(self._copy(there[0], writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._writers -= both
            for one in both:
                one.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[Wire]:
    """Start a proxy in front of the server that a database's URL names."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    proxy = Wire(parts.hostname, parts.port)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(proxy.handle(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
