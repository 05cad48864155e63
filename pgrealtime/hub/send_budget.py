"""How many bytes may wait for connections: for each of them, and for all together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pgrealtime.hub.connection import Connection

COUNTED = 64 * 1024
"""Bytes that may wait for a connection however much waits for others, so that those who take what
they are sent are served as ever. Less than this isn't counted."""
_SHARE = 4
"""A connection may take up to this part of what is still free (as switches share their memory
among ports: Choudhury and Hahne, "Dynamic queue length thresholds", 1998): few may hold much, many
hold little, and there is always room for one more."""
_LOOK_SECONDS = 0.02
"""Between two looks at what the connections have taken."""


class SendBudget:
    """What waits for clients that take less than comes.

    Args:
        per_connection: Bytes at most.
        total: Bytes for all connections together, beside ``COUNTED`` for each.
        clock: Monotonic seconds.
    """

    def __init__(self, *, per_connection: int, total: int, clock: Callable[[], float]) -> None:
        self._per_connection = per_connection
        self._total = total
        self._clock = clock
        self._floor = min(COUNTED, per_connection)
        self._slow: dict[Connection, int] = {}
        """Those for whom at least the floor waits, and how much that was at the last look."""
        self._waiting = 0
        self._looked_at = clock()
        self.line = asyncio.Lock()
        """Held by the one whose message is larger than its limit, until there is room for it."""

    @property
    def waiting(self) -> int:
        """Bytes that wait for slow connections, as of the last look and what came since."""
        return self._waiting

    def limit(self) -> int:
        """Bytes that may wait for one connection now."""
        if self._slow and self._clock() - self._looked_at >= _LOOK_SECONDS:
            self._look()
        free = self._total - self._waiting
        return max(self._floor, min(self._per_connection, free // _SHARE))

    def note(self, connection: Connection) -> None:
        """Take note of what waits for a connection now that something was written to it."""
        waiting = connection.sink.buffered()
        before = self._slow.pop(connection, 0)
        if waiting >= self._floor:
            self._slow[connection] = waiting
            self._waiting += waiting
        self._waiting -= before

    def admits(self, size: int) -> bool:
        """Whether one message that is larger than the limit may be written now.

        One that is larger than all may be is written when half of that is free: somebody wants
        it, and nobody could ever make more room.
        """
        return self._waiting + min(size, self._total // 2) <= self._total

    async def has_room(self, size: int, seconds: float) -> bool:
        """Wait until a message is admitted; return whether that was so within the time."""
        end = self._clock() + seconds
        while not self.admits(size):
            if self._clock() >= end:
                return False
            await asyncio.sleep(_LOOK_SECONDS)
            self._look()
        return True

    def largest(self) -> Connection | None:
        """Return the connection for which most waits."""
        return max(self._slow, key=self._slow.__getitem__, default=None)

    def forget(self, connection: Connection) -> None:
        """Count a connection no more: what waits for it was dropped."""
        self._waiting -= self._slow.pop(connection, 0)

    def _look(self) -> None:
        """See what was taken. An ended connection counts until its last bytes are gone."""
        self._looked_at = self._clock()
        found = {connection: connection.sink.buffered() for connection in self._slow}
        self._slow = {one: waiting for one, waiting in found.items() if waiting >= self._floor}
        self._waiting = sum(self._slow.values())
