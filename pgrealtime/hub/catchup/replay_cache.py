"""A cache of what one connection that caught up was just sent, for others at the same cursor.

Connections fall behind together when a burst is larger than their send buffers, and reconnect
together when a proxy restarts. Each would evaluate the same rows by the same rule and render the
same messages, 8 us a message; from this cache that is 1 us, the write included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pgrealtime.hub.connections.output import MessageBatch
from pgrealtime.hub.evaluation.filter_budget import FilterBudget
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import Cursor

if TYPE_CHECKING:
    from pgrealtime.hub.connections.connection import Connection, Group
    from pgrealtime.hub.connections.group import RenderKey
    from pgrealtime.hub.state.caller_check import CallerCheckResult

_MAX_AGE_SECONDS = 1.0
"""Seconds. Rules query the database as it is now; the answers in the cache may be so old."""
_MAX_BYTES = 16 * 1024 * 1024
"""Of messages in the cache."""


class CatchUpCacheKey(NamedTuple):
    """What decides the messages a connection receives next; equal keys mean equal bytes."""

    revision: int
    cursor: Cursor
    group: Group
    render_key: RenderKey


class CachedSlice(NamedTuple):
    """The messages that follow one key."""

    events: Sequence[Event]
    batch: MessageBatch
    end_cursor: Cursor
    budget: FilterBudget
    """Used to evaluate them: the filters of each connection that receives them take as long."""
    stored_at: float
    """Monotonic seconds."""
    size_bytes: int
    checked: CallerCheckResult | None
    """What was found out about the caller for whom it was made, if rules depend on the caller."""


def catch_up_cache_key(connection: Connection, revision: int) -> CatchUpCacheKey | None:
    """Return the connection's key; None if its messages differ from those of all others.

    They do with several topics, with an own record, and soon after a topic was added.
    """
    if len(connection.subscriptions) != 1:
        return None
    (one,) = connection.subscriptions.values()
    if one.group is None or one.own_record_id:
        return None
    if one.read_point is not None and connection.cursor.lsn <= one.read_point.insert_lsn:
        return None
    return CatchUpCacheKey(revision, connection.cursor, one.group, one.render_key)


class CatchUpCache:
    """The last few slices.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slices: OrderedDict[CatchUpCacheKey, CachedSlice] = OrderedDict()
        self._total_bytes = 0

    def get(self, key: CatchUpCacheKey) -> CachedSlice | None:
        """Return what follows the key, if it is recent."""
        cached = self._slices.get(key)
        if cached is None or self._clock() - cached.stored_at > _MAX_AGE_SECONDS:
            return None
        return cached

    def store(
        self,
        key: CatchUpCacheKey,
        events: Sequence[Event],
        batch: MessageBatch,
        end_cursor: Cursor,
        budget: FilterBudget,
        *,
        checked: CallerCheckResult | None,
    ) -> None:
        """Store what follows the key; the oldest are evicted.

        Also by age: a slice without messages has no size, but holds its events in memory.
        """
        now = self._clock()
        old = self._slices.pop(key, None)
        size = sum(map(len, batch.tails))
        self._slices[key] = CachedSlice(events, batch, end_cursor, budget, now, size, checked)
        self._total_bytes += size - (0 if old is None else old.size_bytes)
        while self._slices:
            oldest_key, oldest = next(iter(self._slices.items()))
            if self._total_bytes <= _MAX_BYTES and now - oldest.stored_at <= _MAX_AGE_SECONDS:
                return
            del self._slices[oldest_key]
            self._total_bytes -= oldest.size_bytes

    def clear(self) -> None:
        """Evict all; called when no connection catches up any more."""
        self._slices.clear()
        self._total_bytes = 0
