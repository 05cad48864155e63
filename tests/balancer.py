"""A load balancer without sticky sessions: each connection goes to whichever service it chooses."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias

from tests.conformance.http_client import Address

Choose: TypeAlias = Callable[[bytes], Sequence[Address]]
"""Returns the services to try for a connection that begins with these bytes, in this order."""

_STREAM = re.compile(rb"GET [^ ]*/api/realtime[? ]")


def apart(holder: Address, other: Address) -> Choose:
    """Return a choice that puts every stream on one service and everything else on another."""
    return lambda beginning: [holder if _STREAM.match(beginning) else other]


class Roaming:
    """Puts each stream on another service than the one before, and calls on yet others.

    Those that are in ``ready`` at the time; where there is one only, it takes all.
    """

    def __init__(self, ready: Sequence[Address], rng: random.Random) -> None:
        self._ready = ready
        self._rng = rng
        self._holder: Address | None = None

    def __call__(self, beginning: bytes) -> Sequence[Address]:
        """Return the services to try."""
        mixed = self._rng.sample(self._ready, len(self._ready))
        mixed.sort(key=lambda address: address == self._holder)
        if _STREAM.match(beginning):
            self._holder = mixed[0]
        return mixed


@asynccontextmanager
async def balancer(choose: Choose) -> AsyncIterator[Address]:
    """Serve on a free port of all loopback addresses; a client keeps the address that it has."""
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_carry(reader, writer, choose))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(lambda _: writer.close())  # also if it never began

    server = await asyncio.start_server(accept, "0.0.0.0", 0)
    try:
        yield Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, choose: Choose
) -> None:
    client_host = writer.get_extra_info("peername")[0]
    beginning = await reader.read(65536)
    for address in choose(beginning) if beginning else ():
        with suppress(OSError):
            there = await asyncio.open_connection(
                address.host, address.port, local_addr=(client_host, 0)
            )
            break
    else:
        return
    there[1].write(beginning)
    up = asyncio.create_task(_copy(reader, there[1]))
    try:
        await _copy(there[0], writer)
    finally:
        there[1].transport.abort()
        up.cancel()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
