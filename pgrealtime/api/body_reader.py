"""Bodies of requests: read and taken apart, within the bytes and seconds that there are."""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from aiohttp import web

from pgrealtime.api.error_responses import (
    BAD_REQUEST,
    BODY_TOO_LARGE,
    REQUEST_TIMEOUT,
    TOO_MANY_REQUESTS,
    RequestRefusedError,
)
from pgrealtime.fairness import FairLock
from pgrealtime.networks import client_network

_Content = TypeVar("_Content")

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
"""Bytes; a body that declares more is refused before it is read (protocol, 1.7)."""

LARGE_BODY_BYTES: Final = 64 * 1024
"""Bytes above which a body is taken apart in a thread, so that nobody else waits for it; up to here
it doesn't count as large either."""

_MAX_LARGE_BYTES_PER_ADDRESS: Final = 40 * 1024 * 1024
"""Of large bodies from one address that are here at a time: one of the largest, and some more."""
_MAX_LARGE_BYTES: Final = 128 * 1024 * 1024
"""Of large bodies that are here at a time. Smaller ones are read beside them: calls for topics go
on while somebody fills this."""
_MAX_SMALL_BYTES_PER_ADDRESS = 16 * 1024 * 1024
"""Of smaller bodies from one address."""

_BODY_TIMEOUT_SECONDS: Final = 60.0
"""How long a client may take to send its body."""


class BodyReader:
    """The bodies that are being read or taken apart.

    Args:
        max_large_bytes_per_address: Bytes of one address' large bodies at a time.
        max_large_bytes: Of all.
        max_small_bytes_per_address: Bytes of one address' smaller bodies at a time.
        timeout_seconds: That a client may take to send its body.
    """

    def __init__(
        self,
        *,
        max_large_bytes_per_address: int = _MAX_LARGE_BYTES_PER_ADDRESS,
        max_large_bytes: int = _MAX_LARGE_BYTES,
        max_small_bytes_per_address: int = _MAX_SMALL_BYTES_PER_ADDRESS,
        timeout_seconds: float = _BODY_TIMEOUT_SECONDS,
    ) -> None:
        self._max_large_bytes_per_address = max_large_bytes_per_address
        self._max_large_bytes = max_large_bytes
        self._timeout_seconds = timeout_seconds
        self._max_small_bytes_per_address = max_small_bytes_per_address
        self._large_bytes_by_network: Counter[str] = Counter()
        self._small_bytes_by_network: Counter[str] = Counter()
        self._large_bytes = 0
        self._thread_turns = FairLock()
        self._chunk_turns = FairLock()
        """For the next piece of a large body, one each time the loop has seen to all others: of
        some dozen bodies at once a piece each would hold up events for as long."""

    @property
    def large_bytes(self) -> int:
        """Bytes of the large bodies that are here."""
        return self._large_bytes

    async def read(
        self,
        request: web.Request,
        address: str,
        parse: Callable[[str, bytes, bytes], _Content],
        *,
        max_bytes: int = MAX_BODY_BYTES,
    ) -> _Content:
        """Return what a function makes of the body.

        Args:
            request: It has a body.
            address: Whose; of IPv6 its network's bodies are counted together.
            parse: Is given content type, body and query string; runs in a thread if that is long,
                one at a time: several would only keep each other from the interpreter.
            max_bytes: Bytes of the body.

        Raises:
            RequestRefusedError: The body is larger than it may be, broken, too slow in coming, or
                more than there is room for.
        """
        content_type = request.headers.get("Content-Type", "")
        query = request.rel_url.raw_query_string.encode()
        network = client_network(address)
        body = _BodyBuffer()
        counted = small = 0
        try:
            async with asyncio.timeout(self._timeout_seconds):
                async for piece in request.content.iter_any():
                    body.append(piece)
                    if body.size_bytes > max_bytes:
                        raise RequestRefusedError(BODY_TOO_LARGE)
                    if body.size_bytes > LARGE_BODY_BYTES:
                        self._count_large(network, body.size_bytes - counted)
                        counted = body.size_bytes
                        async with self._chunk_turns.acquire(network):
                            await asyncio.sleep(0)
                    else:
                        self._count_small(network, len(piece))
                        small = body.size_bytes
            if not counted:
                return parse(content_type, body.join_and_clear(), query)
            # Shielded: who hangs up doesn't make room before the thread is free.
            work = partial(_parse_and_release, parse, content_type, body, query)
            taking = asyncio.create_task(self._parse_in_thread(work, network, counted))
            counted, body = 0, _BodyBuffer()
            return await asyncio.shield(taking)
        except TimeoutError as error:
            raise RequestRefusedError(REQUEST_TIMEOUT) from error
        except web.RequestPayloadError as error:
            raise RequestRefusedError(BAD_REQUEST) from error
        finally:
            body.clear()
            self._count_large(network, -counted)
            self._count_small(network, -small)

    async def _parse_in_thread(
        self, parse: Callable[[], _Content], network: str, size: int
    ) -> _Content:
        """Return what work in a thread makes of a body; its bytes go then."""
        try:
            async with self._thread_turns.acquire(network):
                return await asyncio.to_thread(parse)
        finally:
            self._count_large(network, -size)

    def _count_large(self, network: str, size: int) -> None:
        """Count bytes that came or went.

        Raises:
            RequestRefusedError: There is no room for them.
        """
        held, total = self._large_bytes_by_network[network] + size, self._large_bytes + size
        if size > 0 and (held > self._max_large_bytes_per_address or total > self._max_large_bytes):
            raise RequestRefusedError(TOO_MANY_REQUESTS)
        self._large_bytes = total
        _set_or_delete(self._large_bytes_by_network, network, held)

    def _count_small(self, network: str, size: int) -> None:
        held = self._small_bytes_by_network[network] + size
        if size > 0 and held > self._max_small_bytes_per_address:
            raise RequestRefusedError(TOO_MANY_REQUESTS)
        _set_or_delete(self._small_bytes_by_network, network, held)


class _BodyBuffer:
    """What has come of a body, in pieces that stay where they are.

    One block that grows would be moved again and again, which leaves holes of its size in the
    process's memory.
    """

    def __init__(self) -> None:
        self.size_bytes = 0
        self._chunks: list[bytes] = []
        self._open_chunk = bytearray()
        """What came in many small parts must not be kept as many."""

    def append(self, chunk: bytes) -> None:
        self.size_bytes += len(chunk)
        self._open_chunk += chunk
        if len(self._open_chunk) >= LARGE_BODY_BYTES:
            self._chunks.append(bytes(self._open_chunk))
            self._open_chunk.clear()

    def join_and_clear(self) -> bytes:
        """Return the whole; the pieces go."""
        whole = b"".join((*self._chunks, self._open_chunk))
        self.clear()
        return whole

    def clear(self) -> None:
        """Let go of it."""
        self._chunks.clear()
        self._open_chunk.clear()


def _parse_and_release(
    parse: Callable[[str, bytes, bytes], _Content],
    content_type: str,
    body: _BodyBuffer,
    query: bytes,
) -> _Content:
    """Return what a function makes of a body, of which nothing is left then.

    A task that fails and the frames that its error came through hold each other, and with them all
    that was in those frames, until the garbage collector comes: it may take hundreds of bodies.
    """
    try:
        return parse(content_type, body.join_and_clear(), query)
    except Exception as error:
        _clear_frames(error)
        raise


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _set_or_delete(bytes_by_network: Counter[str], network: str, size: int) -> None:
    """Keep what a network has, if that is anything."""
    if size:
        bytes_by_network[network] = size
    else:
        del bytes_by_network[network]


BODY_READER_KEY: Final = web.AppKey("body_reader", BodyReader)
"""Of an application: one for all its routes."""
