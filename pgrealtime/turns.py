"""Long work on the event loop, cut so that the loop's other users never wait long for it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

TURN_SECONDS = 0.002
"""Of work between two pauses: what a connection's event may be late by for each user of the loop
that has such work to do. A pause that nobody needs costs some ten microseconds."""
_LONGEST_REST = 0.1
"""Seconds that work waits for after a turn, at most."""


class Turn:
    """Says when work has gone on for long enough; begins when it is made."""

    __slots__ = ("_end",)

    def __init__(self) -> None:
        self._end = perf_counter() + TURN_SECONDS

    def is_over(self) -> bool:
        """Whether others should be let in now."""
        return perf_counter() >= self._end

    async def pause(self) -> None:
        """Let the loop's other users work, then begin anew."""
        await asyncio.sleep(0)
        self._end = perf_counter() + TURN_SECONDS


class RestingTurn(Turn):
    """A turn of work that nobody else waits for, and of which there may be much."""

    __slots__ = ()

    async def pause(self) -> None:
        """Let others work for much longer."""
        await asyncio.sleep(_LONGEST_REST)
        self._end = perf_counter() + TURN_SECONDS


class TurnQueue:
    """Work that one does at a time, those who wait taking turns; each does its own in order.

    So whoever has much to do waits for himself: others wait for one turn of each who has some.
    """

    def __init__(self) -> None:
        self._is_busy = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, whose: str) -> AsyncIterator[None]:
        """Wait for a turn, and pass it on at the end."""
        if self._is_busy:
            await self._wait(whose)
        self._is_busy = True
        try:
            yield
        finally:
            self._pass_on()

    @asynccontextmanager
    async def work(self, whose: str) -> AsyncIterator[Turn]:
        """As ``turn``, for work on the event loop: of long work others get half the time.

        Yields:
            Says when the next turn should be waited for.
        """
        async with self.turn(whose):
            began = perf_counter()
            yield Turn()
            seconds = perf_counter() - began
            await asyncio.sleep(min(seconds, _LONGEST_REST) if seconds > TURN_SECONDS else 0)

    async def _wait(self, whose: str) -> None:
        passed = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(whose, deque()).append(passed)
        try:
            await passed
        except asyncio.CancelledError:
            if passed.done() and not passed.cancelled():
                self._pass_on()  # it was passed on to nobody
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            whose, theirs = self._waiting.popitem(last=False)
            passed = theirs.popleft()
            if theirs:
                self._waiting[whose] = theirs
            if not passed.done():
                passed.set_result(None)
                return
        self._is_busy = False
