"""Long work on the event loop, cut so that the loop's other users never wait long for it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

YIELD_AFTER_SECONDS = 0.002
"""Of work between two pauses: what a connection's event may be late by for each user of the loop
that has such work to do. A pause that nobody needs costs some ten microseconds."""
_MAX_PAUSE_SECONDS = 0.1
"""Seconds that work waits for after a turn, at most."""


class YieldTimer:
    """Says when work has gone on for long enough; begins when it is made."""

    __slots__ = ("_deadline",)

    def __init__(self) -> None:
        self._deadline = perf_counter() + YIELD_AFTER_SECONDS

    def is_due(self) -> bool:
        """Whether others should be let in now."""
        return perf_counter() >= self._deadline

    async def pause(self) -> None:
        """Let the loop's other users work, then begin anew."""
        await asyncio.sleep(0)
        self._deadline = perf_counter() + YIELD_AFTER_SECONDS


class BackgroundYieldTimer(YieldTimer):
    """A turn of work that nobody else waits for, and of which there may be much."""

    __slots__ = ()

    async def pause(self) -> None:
        """Let others work for much longer."""
        await asyncio.sleep(_MAX_PAUSE_SECONDS)
        self._deadline = perf_counter() + YIELD_AFTER_SECONDS


class FairLock:
    """Work that one does at a time, those who wait taking turns; each does its own in order.

    So whoever has much to do waits for himself: others wait for one turn of each who has some.
    """

    def __init__(self) -> None:
        self._is_locked = False
        self._waiters: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def acquire(self, key: str) -> AsyncIterator[None]:
        """Wait for a turn, and pass it on at the end."""
        if self._is_locked:
            await self._wait(key)
        self._is_locked = True
        try:
            yield
        finally:
            self._wake_next()

    @asynccontextmanager
    async def acquire_for_loop_work(self, key: str) -> AsyncIterator[YieldTimer]:
        """As ``turn``, for work on the event loop: of long work others get half the time.

        Yields:
            Says when the next turn should be waited for.
        """
        async with self.acquire(key):
            began = perf_counter()
            yield YieldTimer()
            seconds = perf_counter() - began
            await asyncio.sleep(
                min(seconds, _MAX_PAUSE_SECONDS) if seconds > YIELD_AFTER_SECONDS else 0
            )

    async def _wait(self, key: str) -> None:
        passed = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, deque()).append(passed)
        try:
            await passed
        except asyncio.CancelledError:
            if passed.done() and not passed.cancelled():
                self._wake_next()  # it was passed on to nobody
            raise

    def _wake_next(self) -> None:
        while self._waiters:
            whose, theirs = self._waiters.popitem(last=False)
            passed = theirs.popleft()
            if theirs:
                self._waiters[whose] = theirs
            if not passed.done():
                passed.set_result(None)
                return
        self._is_locked = False
