"""Sends large responses within limits of bytes held and time. Called by the routes of records.

A response is in memory until its client has received it: one of 64 MiB that reads slowly would hold
so much for as long as it likes, and a thousand such clients all memory there is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from aiohttp import web

from pgrealtime.api.error_responses import TOO_MANY_REQUESTS, RequestRefusedError

LARGE_RESPONSE_BYTES: Final = 64 * 1024
"""Smaller ones aren't counted: the kernel takes them at once, mostly."""
_CHUNK_BYTES: Final = 256 * 1024
_MIN_SECONDS: Final = 30.0
_MIN_BYTES_PER_SECOND: Final = 256 * 1024
"""A client that receives less, after ``_MIN_SECONDS``, is disconnected."""


class LargeResponses:
    """The large responses that are being sent; ``total_bytes`` is what they hold at most.

    One network may hold half of what the others leave, so that there is always some left for one
    more. A response beyond that is refused: its client tries again.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._held: Counter[str] = Counter()

    @property
    def held_bytes(self) -> int:
        """The bytes of all large responses that are being sent."""
        return self._held.total()

    @contextmanager
    def holding(self, network: str, size_bytes: int) -> Iterator[None]:
        """Count a response for a network while the context is open.

        Raises:
            RequestRefusedError: The network has too many.
        """
        if size_bytes < LARGE_RESPONSE_BYTES:
            yield
            return
        own = self._held[network]
        if own + size_bytes > (self._total_bytes - self.held_bytes + own) // 2:
            raise RequestRefusedError(TOO_MANY_REQUESTS)
        self._held[network] = own + size_bytes
        try:
            yield
        finally:
            self._held[network] -= size_bytes
            if not self._held[network]:
                del self._held[network]


async def send_large(request: web.Request, response: web.StreamResponse, body: bytes) -> None:
    """Send a response whose head is complete, and its body; disconnect a client that is slow."""
    response.content_length = len(body)
    try:
        async with asyncio.timeout(_MIN_SECONDS + len(body) / _MIN_BYTES_PER_SECOND):
            await response.prepare(request)
            rest = memoryview(body)
            while rest:
                await response.write(rest[:_CHUNK_BYTES])
                rest = rest[_CHUNK_BYTES:]
            await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
