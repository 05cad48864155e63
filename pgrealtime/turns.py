"""Long work on the event loop, cut so that the loop's other users never wait long for it."""

from __future__ import annotations

import asyncio
from time import perf_counter

TURN_SECONDS = 0.005
"""Of work between two pauses: what a connection's event may be late by for each user of the loop
that has such work to do. A pause that nobody needs costs some ten microseconds."""


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
