"""Reads request bodies and parses them, within limits of bytes and time.

Called by the routes that have a body. A body of up to 64 KiB is parsed on the event loop; a larger
one in a thread, one at a time, after its bytes were counted against the limits of large bodies.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from aiohttp import web

from pgrealtime.api import error_responses
from pgrealtime.api.error_responses import RequestRefusedError
from pgrealtime.fairness import FairLock, client_network

_Content = TypeVar("_Content")

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
"""A body that declares more is refused before it is read (protocol, 1.7)."""

LARGE_BODY_BYTES: Final = 64 * 1024
"""A larger body is parsed in a thread, so that no event waits for it."""

_MAX_LARGE_BYTES_PER_NETWORK: Final = 40 * 1024 * 1024
"""Bytes of large bodies from one network at a time: one of the maximum size, and some more."""
_MAX_LARGE_BYTES: Final = 128 * 1024 * 1024
"""Bytes of all large bodies at a time. Small bodies have limits of their own: subscribe calls are
served while this limit is reached."""
_MAX_SMALL_BYTES_PER_NETWORK: Final = 16 * 1024 * 1024

_BODY_TIMEOUT_SECONDS: Final = 60.0


class BodyReader:
    """Reads and parses bodies; one per application, because its limits are of all routes."""

    def __init__(
        self,
        *,
        max_large_bytes_per_network: int = _MAX_LARGE_BYTES_PER_NETWORK,
        max_large_bytes: int = _MAX_LARGE_BYTES,
        max_small_bytes_per_network: int = _MAX_SMALL_BYTES_PER_NETWORK,
        timeout_seconds: float = _BODY_TIMEOUT_SECONDS,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._large = _ByteQuota(max_large_bytes_per_network, max_large_bytes)
        self._small = _ByteQuota(max_small_bytes_per_network)
        self._parse_lock = FairLock()
        """Held while a thread parses: several would compete for the interpreter's lock."""
        self._chunk_lock = FairLock()
        """Held while the next chunk of a large body is taken, one per pass of the loop: a chunk
        of each of some dozen bodies at once would delay events for as long."""

    async def read(
        self,
        request: web.Request,
        address: str,
        parse: Callable[[str, bytes, bytes], _Content],
        *,
        max_bytes: int = MAX_BODY_BYTES,
    ) -> _Content | None:
        """Read the body and return what ``parse`` returns for it; None if there is no body.

        ``parse`` is called with content type, body and query string, for a large body in a thread.

        Raises:
            RequestRefusedError: The body is too large, broken or too slow, or a limit is reached.
        """
        if not request.body_exists or request.content_length == 0:
            return None
        content_type = request.headers.get("Content-Type", "")
        query = request.rel_url.raw_query_string.encode()
        content, size = request.content, request.content_length
        if (
            (size is not None and size <= min(LARGE_BODY_BYTES, max_bytes))
            and content.is_eof()
            and content.exception() is None
        ):
            # Most come whole, together with the head: nothing is waited for, or held meanwhile.
            return parse(content_type, content.read_nowait(), query)
        body = _BodyBuffer(client_network(address))
        try:
            # In all, not between two chunks: a client that sends a byte a minute would hold its
            # quota for days.
            async with asyncio.timeout(self._timeout_seconds):
                await self._receive(request, body, max_bytes)
            if not body.large_bytes:
                return parse(content_type, body.join_and_clear(), query)
            # Shielded: the thread keeps the bytes until it ends, so they stay counted until then,
            # also if the client disconnects. From here the task frees them.
            work = partial(_parse_and_release, parse, content_type, body, query)
            parsing = asyncio.create_task(self._parse_in_thread(work, body))
            # An empty one: ``finally`` must not free what the thread still reads.
            body = _BodyBuffer(body.network)
            return await asyncio.shield(parsing)
        except TimeoutError as error:
            raise RequestRefusedError(error_responses.REQUEST_TIMEOUT) from error
        except web.RequestPayloadError as error:
            raise RequestRefusedError(error_responses.BAD_REQUEST) from error
        finally:
            self._free(body)

    async def _receive(self, request: web.Request, body: _BodyBuffer, max_bytes: int) -> None:
        async for chunk in request.content.iter_any():
            body.append(chunk)
            if body.size_bytes > max_bytes:
                raise RequestRefusedError(error_responses.BODY_TOO_LARGE)
            # Counted as bytes arrive: a client may declare no length, or much and send nothing,
            # which would lock out its network. What was counted as small stays so until the end.
            if body.size_bytes > LARGE_BODY_BYTES:
                self._large.add(body.network, body.size_bytes - body.large_bytes)
                body.large_bytes = body.size_bytes
                # Meanwhile nothing is read from the request: aiohttp pauses the socket, and the
                # client waits.
                async with self._chunk_lock.acquire(body.network):
                    await asyncio.sleep(0)
            else:
                self._small.add(body.network, len(chunk))
                body.small_bytes = body.size_bytes

    async def _parse_in_thread(self, parse: Callable[[], _Content], body: _BodyBuffer) -> _Content:
        try:
            async with self._parse_lock.acquire(body.network):
                return await asyncio.to_thread(parse)
        finally:
            self._free(body)

    def _free(self, body: _BodyBuffer) -> None:
        body.clear()
        self._large.subtract(body.network, body.large_bytes)
        self._small.subtract(body.network, body.small_bytes)


class _ByteQuota:
    """Bytes held, per network and in total, and their limits."""

    def __init__(self, max_per_network: int, max_total: int | None = None) -> None:
        self.total_bytes = 0
        self._max_per_network = max_per_network
        self._max_total = max_total
        self._by_network: Counter[str] = Counter()

    def add(self, network: str, size_bytes: int) -> None:
        """Count bytes that arrived.

        Raises:
            RequestRefusedError: A limit is exceeded; the bytes are not counted.
        """
        total = self.total_bytes + size_bytes
        # No await between check and count.
        if self._by_network[network] + size_bytes > self._max_per_network or (
            self._max_total is not None and total > self._max_total
        ):
            raise RequestRefusedError(error_responses.TOO_MANY_REQUESTS)
        self._by_network[network] += size_bytes
        self.total_bytes = total

    def subtract(self, network: str, size_bytes: int) -> None:
        """Count bytes that are freed."""
        self.total_bytes -= size_bytes
        self._by_network[network] -= size_bytes
        if not self._by_network[network]:
            # Or the counter would keep an entry for every network that ever sent a body.
            del self._by_network[network]


class _BodyBuffer:
    """The received part of a body, in chunks of 64 KiB or more that are never moved."""

    def __init__(self, network: str) -> None:
        self.network = network
        self.size_bytes = 0
        self.large_bytes = self.small_bytes = 0
        """Counted in the network's quotas."""
        # One growing block would be reallocated again and again, which fragments the process's
        # memory.
        self._chunks: list[bytes] = []
        self._open_chunk = bytearray()
        """Collects small chunks: a client may send a body byte by byte."""

    def append(self, chunk: bytes) -> None:
        self.size_bytes += len(chunk)
        self._open_chunk += chunk
        if len(self._open_chunk) >= LARGE_BODY_BYTES:
            self._chunks.append(bytes(self._open_chunk))
            self._open_chunk.clear()

    def join_and_clear(self) -> bytes:
        """Return the whole body and free the chunks."""
        whole = b"".join((*self._chunks, self._open_chunk))
        self.clear()
        return whole

    def clear(self) -> None:
        self._chunks.clear()
        self._open_chunk.clear()


def _parse_and_release(
    parse: Callable[[str, bytes, bytes], _Content],
    content_type: str,
    body: _BodyBuffer,
    query: bytes,
) -> _Content:
    """Parse a body in a thread, leaving no reference to its bytes."""
    try:
        return parse(content_type, body.join_and_clear(), query)
    except Exception as error:
        # The frames of the exception refer to the body, and a task that failed and its exception to
        # each other: the body would stay in memory until the garbage collector runs, perhaps
        # hundreds of bodies later.
        _clear_frames(error)
        raise


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        # Each exception of the chain has frames of its own.
        error = error.__cause__ or error.__context__


BODY_READER_KEY: Final = web.AppKey("body_reader", BodyReader)
