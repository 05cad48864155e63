"""Connections whose filters kept others waiting: judged apart, each at its own pace.

They have no part in the slices that are judged for all, but read on from the changelog, so only
they wait for their own questions. A connection comes back once it has read all there is, unless
its own filters were slow even there: then not before a while, twice as long each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakSet

import structlog

from pgrealtime.hub.allowance import SHORT_SECONDS, Allowance
from pgrealtime.hub.connection import Connection
from pgrealtime.hub.course import Course
from pgrealtime.hub.event import Event
from pgrealtime.hub.suspension import Suspensions
from pgrealtime.turns import TurnQueue

log = structlog.get_logger(__name__)


class Aside:
    """Who is aside, and for how long.

    Args:
        course: Where the hub stands.
        clock: Monotonic seconds.
    """

    def __init__(self, course: Course, clock: Callable[[], float]) -> None:
        self._course = course
        self._suspensions: Suspensions[Connection] = Suspensions(clock)
        self.queue = TurnQueue()
        """Where work of this process for them takes its turns: one at a time."""
        self._late: WeakSet[Connection] = WeakSet()
        """Late even alone. How slow they are is seen when they have all the time."""

    def put(self, connection: Connection) -> None:
        """Let its filters be judged for it alone, from the next slice on."""
        self._turn(connection, is_aside=True)

    def allowance(self, connection: Connection) -> Allowance:
        """Return what its filters may take for what it reads next."""
        is_short = not self.is_slow(connection)
        if connection.is_aside:
            return Allowance.apart(self.queue, connection.network, is_short=is_short)
        return Allowance.for_one(is_short=is_short)

    def blame(self, connection: Connection) -> None:
        """Take note that its own filter took too long in the process, while others waited.

        The first times that is borne; then it stays apart for a while, twice as long each time.
        """
        self.put(connection)
        seconds = self._suspensions.note_timeout(connection, is_borne=True)
        if seconds:
            log.info("connection.aside", connection=connection.id, seconds=seconds)

    def bring_back(self, connection: Connection) -> bool:
        """Let its filters be judged with those of others; return whether it may be."""
        if self.is_slow(connection):
            return False
        self._turn(connection, is_aside=False)
        return True

    def _turn(self, connection: Connection, *, is_aside: bool) -> None:
        if connection.is_aside != is_aside:
            connection.is_aside = is_aside
            self._course.meaning.matcher.heed(connection)

    def is_slow(self, connection: Connection) -> bool:
        """Whether its own filters were slow lately: it is given all the time they need."""
        return connection in self._late or self._suspensions.is_suspended(connection)

    def note(self, connection: Connection, allowance: Allowance, events: Sequence[Event]) -> None:
        """Take note of how long its own filters took for some events.

        For many changes they may take longer: nobody waits for so many where all are judged.
        """
        self._late.discard(connection)
        if allowance.testing.late:
            self.put(connection)
        if allowance.used < SHORT_SECONDS:
            return
        if allowance.used < SHORT_SECONDS * len({event.cursor for event in events}):
            return
        self.put(connection)
        if allowance.is_short:
            self._late.add(connection)
            return
        seconds = self._suspensions.note_timeout(connection, is_borne=False)
        log.info("connection.aside", connection=connection.id, seconds=seconds)
