"""Bodies of requests: read and taken apart, within the bytes and seconds that there are."""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from aiohttp import web

from pgrealtime.api.problems import TOO_LARGE, TOO_MANY, TOO_SLOW, UNREADABLE, RefusedError
from pgrealtime.networks import network_of
from pgrealtime.turns import TurnQueue

_Content = TypeVar("_Content")

LARGEST_BODY: Final = 32 * 1024 * 1024
"""Bytes; a body that declares more is refused before it is read (protocol, 1.7)."""

LARGE_BODY: Final = 64 * 1024
"""Bytes above which a body is taken apart in a thread, so that nobody else waits for it; up to here
it doesn't count as large either."""

_PER_ADDRESS: Final = 40 * 1024 * 1024
"""Of large bodies from one address that are here at a time: one of the largest, and some more."""
_IN_ALL: Final = 128 * 1024 * 1024
"""Of large bodies that are here at a time. Smaller ones are read beside them: calls for topics go
on while somebody fills this."""
_SMALL_PER_ADDRESS = 16 * 1024 * 1024
"""Of smaller bodies from one address."""

_BODY_SECONDS: Final = 60.0
"""How long a client may take to send its body."""


class Uploads:
    """The bodies that are being read or taken apart.

    Args:
        per_address: Bytes of one address' large bodies at a time.
        in_all: Of all.
        small_per_address: Bytes of one address' smaller bodies at a time.
        seconds: That a client may take to send its body.
    """

    def __init__(
        self,
        *,
        per_address: int = _PER_ADDRESS,
        in_all: int = _IN_ALL,
        small_per_address: int = _SMALL_PER_ADDRESS,
        seconds: float = _BODY_SECONDS,
    ) -> None:
        self._per_address = per_address
        self._in_all = in_all
        self._seconds = seconds
        self._small_per_address = small_per_address
        self._held: Counter[str] = Counter()
        self._held_small: Counter[str] = Counter()
        self._total = 0
        self._threads = TurnQueue()
        self._pieces = TurnQueue()
        """For the next piece of a large body, one each time the loop has seen to all others: of
        some dozen bodies at once a piece each would hold up events for as long."""

    @property
    def held(self) -> int:
        """Bytes of the large bodies that are here."""
        return self._total

    async def read(
        self,
        request: web.Request,
        address: str,
        take: Callable[[str, bytes, bytes], _Content],
        *,
        largest: int = LARGEST_BODY,
    ) -> _Content:
        """Return what a function makes of the body.

        Args:
            request: It has a body.
            address: Whose; of IPv6 its network's bodies are counted together.
            take: Is given content type, body and query string; runs in a thread if that is long,
                one at a time: several would only keep each other from the interpreter.
            largest: Bytes of the body.

        Raises:
            RefusedError: The body is larger than it may be, broken, too slow in coming, or more
                than there is room for.
        """
        content_type = request.headers.get("Content-Type", "")
        query = request.rel_url.raw_query_string.encode()
        network = network_of(address)
        body = _Body()
        counted = small = 0
        try:
            async with asyncio.timeout(self._seconds):
                async for piece in request.content.iter_any():
                    body.append(piece)
                    if body.size > largest:
                        raise RefusedError(TOO_LARGE)
                    if body.size > LARGE_BODY:
                        self._count(network, body.size - counted)
                        counted = body.size
                        async with self._pieces.turn(network):
                            await asyncio.sleep(0)
                    else:
                        self._count_small(network, len(piece))
                        small = body.size
            if not counted:
                return take(content_type, body.joined(), query)
            # Shielded: who hangs up doesn't make room before the thread is free.
            work = partial(_take_joined, take, content_type, body, query)
            taking = asyncio.create_task(self._take_apart(work, network, counted))
            counted, body = 0, _Body()
            return await asyncio.shield(taking)
        except TimeoutError as error:
            raise RefusedError(TOO_SLOW) from error
        except web.RequestPayloadError as error:
            raise RefusedError(UNREADABLE) from error
        finally:
            body.clear()
            self._count(network, -counted)
            self._count_small(network, -small)

    async def _take_apart(self, work: Callable[[], _Content], network: str, size: int) -> _Content:
        """Return what work in a thread makes of a body; its bytes go then."""
        try:
            async with self._threads.turn(network):
                return await asyncio.to_thread(work)
        finally:
            self._count(network, -size)

    def _count(self, network: str, size: int) -> None:
        """Count bytes that came or went.

        Raises:
            RefusedError: There is no room for them.
        """
        held, total = self._held[network] + size, self._total + size
        if size > 0 and (held > self._per_address or total > self._in_all):
            raise RefusedError(TOO_MANY)
        self._total = total
        _put(self._held, network, held)

    def _count_small(self, network: str, size: int) -> None:
        held = self._held_small[network] + size
        if size > 0 and held > self._small_per_address:
            raise RefusedError(TOO_MANY)
        _put(self._held_small, network, held)


class _Body:
    """What has come of a body, in pieces that stay where they are.

    One block that grows would be moved again and again, which leaves holes of its size in the
    process's memory.
    """

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []
        self._last = bytearray()
        """What came in many small parts must not be kept as many."""

    def append(self, part: bytes) -> None:
        self.size += len(part)
        self._last += part
        if len(self._last) >= LARGE_BODY:
            self._pieces.append(bytes(self._last))
            self._last.clear()

    def joined(self) -> bytes:
        """Return the whole; the pieces go."""
        whole = b"".join((*self._pieces, self._last))
        self.clear()
        return whole

    def clear(self) -> None:
        """Let go of it."""
        self._pieces.clear()
        self._last.clear()


def _take_joined(
    take: Callable[[str, bytes, bytes], _Content], content_type: str, body: _Body, query: bytes
) -> _Content:
    """Return what a function makes of a body, of which nothing is left then.

    A task that fails and the frames that its error came through hold each other, and with them all
    that was in those frames, until the garbage collector comes: it may take hundreds of bodies.
    """
    try:
        return take(content_type, body.joined(), query)
    except Exception as error:
        _forget_frames(error)
        raise


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _put(held: Counter[str], network: str, size: int) -> None:
    """Keep what a network has, if that is anything."""
    if size:
        held[network] = size
    else:
        del held[network]


UPLOADS: Final = web.AppKey("uploads", Uploads)
"""Of an application: one for all its routes."""
