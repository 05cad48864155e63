"""Limits the bytes in send buffers: of each connection, and of all connections together.

The dispatcher and catching up check it before they write to a connection, and update it afterwards.
A connection over its limit isn't written to: it catches up from the changelog as its client reads.
"""

import asyncio
from collections.abc import Callable

from pgrealtime.hub.connections.connection import Connection

COUNTED_FROM_BYTES = 64 * 1024
"""Smaller send buffers aren't counted against the total. Each connection may have so much waiting
however much waits for others: clients that keep up aren't affected by those that don't."""
_FREE_DIVISOR = 4
"""A connection may have 1/4 of what is still free waiting. (The same threshold by which switches
share memory among ports: Choudhury and Hahne, "Dynamic queue length thresholds", 1998.) A few slow
connections get much each, many get little each, and some of the total is left for one more."""
_REFRESH_SECONDS = 0.02
"""Seconds between two readings of all counted send buffers."""


class SendBudget:
    """Counts the bytes waiting in the send buffers of slow connections.

    A connection is slow while its send buffer holds at least ``counted_from_bytes``; then all its
    bytes count. All send buffers together thus hold at most ``total_bytes``
    (``realtime.send_buffers``), and less than ``counted_from_bytes`` for each connection;
    ``per_connection_bytes`` (``realtime.send_buffer``) may wait for one. A message is written
    whole, so a single large one may pass both bounds: see ``admits``.
    """

    def __init__(
        self, *, per_connection_bytes: int, total_bytes: int, clock: Callable[[], float]
    ) -> None:
        self.per_connection_bytes = per_connection_bytes
        self._total_bytes = total_bytes
        self._clock = clock
        self.counted_from_bytes = min(COUNTED_FROM_BYTES, per_connection_bytes)
        self._slow: dict[Connection, int] = {}
        """Slow connections, and the bytes in their send buffers as last read."""
        self._waiting_bytes = 0
        """The sum of ``_slow``, as read 20 ms ago or longer; bytes read since aren't deducted."""
        self._refreshed_at = clock()
        self.oversized_lock = asyncio.Lock()
        """Queues messages that are larger than a connection's limit and not admitted yet.

        ``CatchUpTasks`` holds it from before ``wait_for_room`` until the message is written:
        ``wait_for_room`` reserves nothing, and two that wait at once could each use the room the
        other waits for, or each drop a connection for it."""

    def limit_bytes(self) -> int:
        """Return how many bytes may wait for one connection now, the same for every connection."""
        if self._slow and self._clock() - self._refreshed_at >= _REFRESH_SECONDS:
            self._refresh()
        free = self._total_bytes - self._waiting_bytes
        return max(self.counted_from_bytes, min(self.per_connection_bytes, free // _FREE_DIVISOR))

    def update(self, connection: Connection) -> None:
        """Read a connection's send buffer; to be called after a write that may make it slow."""
        waiting = connection.writer.buffered_bytes()
        before = self._slow.pop(connection, 0)
        if waiting >= self.counted_from_bytes:
            self._slow[connection] = waiting
            self._waiting_bytes += waiting
        self._waiting_bytes -= before

    def admits(self, size: int) -> bool:
        """Return whether a single message may be written though it exceeds ``limit_bytes``.

        A message up to half of the total must fit into what is free. A larger one is written once
        half of the total is free: one larger than the total could otherwise never be written, and
        one nearly as large only once nothing waits for any connection. So all buffers may hold up
        to ``size - total // 2`` bytes more than the total.
        """
        return self._waiting_bytes + min(size, self._total_bytes // 2) <= self._total_bytes

    async def wait_for_room(self, size: int, timeout_seconds: float) -> bool:
        """Wait until a message is admitted; return whether it was in time.

        Reserves nothing: other connections may fill the room before the caller writes, so it checks
        ``admits`` again then. The caller holds ``oversized_lock``. If the message wasn't admitted
        in time, it drops ``largest_connection`` and waits again.
        """
        end = self._clock() + timeout_seconds
        while not self.admits(size):
            if self._clock() >= end:
                return False
            await asyncio.sleep(_REFRESH_SECONDS)
            self._refresh()
        return True

    def largest_connection(self) -> Connection | None:
        """Return the connection with the largest send buffer, None if none is slow."""
        return max(self._slow, key=self._slow.__getitem__, default=None)

    def deduct_aborted(self, connection: Connection) -> None:
        """Deduct an aborted connection, whose send buffer was discarded.

        Not one that was closed in order: what is in its send buffer is still sent.
        """
        self._waiting_bytes -= self._slow.pop(connection, 0)

    def _refresh(self) -> None:
        self._refreshed_at = self._clock()
        buffered = [(slow, slow.writer.buffered_bytes()) for slow in self._slow]
        self._slow = {slow: size for slow, size in buffered if size >= self.counted_from_bytes}
        self._waiting_bytes = sum(self._slow.values())
