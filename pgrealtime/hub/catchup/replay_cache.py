"""What one replay worked out a moment ago, for the others that stand where it stood.

Connections fall behind together, when a burst is more than their clients take, and come back
together, when something between them and us broke. Each would judge the same rows by the same rule
and write the same text at 8 us a message; to take it from here costs 1 us, the write included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pgrealtime.hub.connections.batch import Batch
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import Cursor
from pgrealtime.rule_queries.slow_filters import TimeBudget

if TYPE_CHECKING:
    from pgrealtime.hub.connections.connection import Connection, Receives
    from pgrealtime.hub.evaluation.matcher import Group
    from pgrealtime.hub.live_reads.caller_check import Checked

_SECONDS = 1.0
"""What rules ask the database has the answer of the moment, and may be as old as this."""
_SIZE = 16 * 1024 * 1024
"""Bytes of messages that are kept."""


class Standpoint(NamedTuple):
    """Where a connection stands and what it may hear from there on; equal ones hear the same."""

    edition: int
    """Of the collections in force."""
    cursor: Cursor
    group: Group
    receives: Receives


class Stretch(NamedTuple):
    """What follows for one standpoint."""

    events: Sequence[Event]
    batch: Batch
    upto: Cursor
    budget: TimeBudget
    """What was used of it to find that out: who is handed it has filters that take as long."""
    found_at: float
    """Monotonic seconds."""
    size: int
    checked: Checked | None
    """What was found out about the caller that it was made for, where rules ask who that is."""


def standpoint(connection: Connection, edition: int) -> Standpoint | None:
    """Return where the connection stands; None if what it hears is its own.

    That is so with several topics, with an own record, and soon after a topic was submitted.
    """
    if len(connection.subscriptions) != 1:
        return None
    (one,) = connection.subscriptions.values()
    if one.group is None or one.own_id:
        return None
    if one.barrier is not None and connection.cursor.lsn <= one.barrier.insert_lsn:
        return None
    return Standpoint(edition, connection.cursor, one.group, one.receives)


class Recent:
    """The last few stretches.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stretches: OrderedDict[Standpoint, Stretch] = OrderedDict()
        self._size = 0

    def find(self, at: Standpoint) -> Stretch | None:
        """Return what follows, if that was found out a moment ago."""
        stretch = self._stretches.get(at)
        if stretch is None or self._clock() - stretch.found_at > _SECONDS:
            return None
        return stretch

    def keep(
        self,
        at: Standpoint,
        events: Sequence[Event],
        batch: Batch,
        upto: Cursor,
        budget: TimeBudget,
        *,
        checked: Checked | None,
    ) -> None:
        """Keep what follows for the next one that comes by; the oldest give way.

        What is too old goes as well: a stretch without a message has no size, but its events.
        """
        now = self._clock()
        old = self._stretches.pop(at, None)
        size = sum(map(len, batch.tails))
        self._stretches[at] = Stretch(events, batch, upto, budget, now, size, checked)
        self._size += size - (0 if old is None else old.size)
        while self._stretches:
            place, oldest = next(iter(self._stretches.items()))
            if self._size <= _SIZE and now - oldest.found_at <= _SECONDS:
                return
            del self._stretches[place]
            self._size -= oldest.size

    def clear(self) -> None:
        """Let go of all, when nobody reads on any more."""
        self._stretches.clear()
        self._size = 0
