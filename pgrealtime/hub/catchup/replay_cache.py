"""What one replay worked out a moment ago, for the others that stand where it stood.

Connections fall behind together, when a burst is more than their clients take, and come back
together, when something between them and us broke. Each would judge the same rows by the same rule
and write the same text at 8 us a message; to take it from here costs 1 us, the write included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pgrealtime.hub.connections.batch import MessageBatch
from pgrealtime.hub.evaluation.filter_budget import FilterBudget
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import Cursor

if TYPE_CHECKING:
    from pgrealtime.hub.connections.connection import Connection, Group
    from pgrealtime.hub.connections.group import RenderKey
    from pgrealtime.hub.state.caller_check import CallerCheckResult

_MAX_AGE_SECONDS = 1.0
"""What rules ask the database has the answer of the moment, and may be as old as this."""
_MAX_BYTES = 16 * 1024 * 1024
"""Bytes of messages that are kept."""


class CatchUpCacheKey(NamedTuple):
    """Where a connection stands and what it may hear from there on; equal ones hear the same."""

    revision: int
    """Of the collections in force."""
    cursor: Cursor
    group: Group
    render_key: RenderKey


class CachedSlice(NamedTuple):
    """What follows for one standpoint."""

    events: Sequence[Event]
    batch: MessageBatch
    end_cursor: Cursor
    budget: FilterBudget
    """What was used of it to find that out: who is handed it has filters that take as long."""
    stored_at: float
    """Monotonic seconds."""
    size_bytes: int
    checked: CallerCheckResult | None
    """What was found out about the caller that it was made for, where rules ask who that is."""


def catch_up_cache_key(connection: Connection, revision: int) -> CatchUpCacheKey | None:
    """Return where the connection stands; None if what it hears is its own.

    That is so with several topics, with an own record, and soon after a topic was submitted.
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
    """The last few stretches.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slices: OrderedDict[CatchUpCacheKey, CachedSlice] = OrderedDict()
        self._total_bytes = 0

    def get(self, key: CatchUpCacheKey) -> CachedSlice | None:
        """Return what follows, if that was found out a moment ago."""
        stretch = self._slices.get(key)
        if stretch is None or self._clock() - stretch.stored_at > _MAX_AGE_SECONDS:
            return None
        return stretch

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
        """Keep what follows for the next one that comes by; the oldest give way.

        What is too old goes as well: a stretch without a message has no size, but its events.
        """
        now = self._clock()
        old = self._slices.pop(key, None)
        size = sum(map(len, batch.tails))
        self._slices[key] = CachedSlice(events, batch, end_cursor, budget, now, size, checked)
        self._total_bytes += size - (0 if old is None else old.size_bytes)
        while self._slices:
            place, oldest = next(iter(self._slices.items()))
            if self._total_bytes <= _MAX_BYTES and now - oldest.stored_at <= _MAX_AGE_SECONDS:
                return
            del self._slices[place]
            self._total_bytes -= oldest.size_bytes

    def clear(self) -> None:
        """Let go of all, when nobody reads on any more."""
        self._slices.clear()
        self._total_bytes = 0
