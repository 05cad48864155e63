"""Telling connections of changes that can't be delivered to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.evaluation.evaluator import Unheard
from pgrealtime.hub.events.slices import Announcement
from pgrealtime.hub.state.callers import person_of
from pgrealtime.hub.state.progress import Course
from pgrealtime.lsn import Cursor
from pgrealtime.protocol.frame import resync_tail


class Gaps:
    """Tells of gaps, or ends who can't be told.

    Args:
        course: Where the hub stands.
        doom: Ends a connection as soon as its client can bear that, for a reason.
        lose: As well, and lets it hear nothing more than what it had up to a place.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        course: Course,
        *,
        doom: Callable[[Connection, str], None],
        lose: Callable[[Connection, str, Cursor], None],
        clock: Callable[[], float],
    ) -> None:
        self._course = course
        self._doom = doom
        self._lose = lose
        self._clock = clock
        self.told: Counter[str] = Counter()
        """Connections that were told, or ended, by the gap's reason."""

    def tell_all(
        self, connection: Connection, gap: Announcement | None, unheard: Unheard | None, at: Cursor
    ) -> None:
        """Tell a connection of a gap in the stream, and of what nobody could be asked about.

        Of both only the last moves its position: who breaks off in between is told again.
        """
        gaps = [] if gap is None else [gap]
        if unheard is not None and (unknown := _unknown_to(connection, unheard)):
            gaps.insert(0, Announcement(unknown, "unknown", at))
        is_held = len(gaps) > 1 and self._concerns(connection, gaps[-1])
        for one in gaps:
            if not connection.is_ended:
                self.tell(connection, one, is_held=is_held and one is not gaps[-1])

    def held_at(self, connection: Connection, unheard: Unheard | None) -> Cursor | None:
        """Return what the connection's position may not pass before it was told; None if nothing.

        An id says that all up to it was delivered or told.
        """
        if unheard is None:
            return None
        names = _unknown_to(connection, unheard)
        return unheard.since if self._subscribed(connection) & names else None

    def _subscribed(self, connection: Connection) -> set[str]:
        """Return the names of the collections that the connection has topics of."""
        collections = self._course.meaning.collections
        topics = (s.topic.collection for s in connection.subscriptions.values())
        return {c.name for c in map(collections.find, topics) if c is not None}

    def _concerns(self, connection: Connection, gap: Announcement) -> bool:
        return gap.collections is None or bool(self._subscribed(connection) & gap.collections)

    def tell(self, connection: Connection, gap: Announcement, *, is_held: bool = False) -> None:
        """Tell a connection of a gap that concerns it; a plain one is ended, so that it reloads.

        So is one whose caller's row may have changed in the gap: coming back it says anew who
        it is, and until then hears nothing.

        Args:
            connection: Who is told.
            gap: Of what.
            is_held: Whether its position stays, since another gap is about to be told.
        """
        is_concerned = self._concerns(connection, gap)
        is_told = connection.is_resumable or connection.wants_resync
        if is_concerned and is_told:
            at = None if is_held else gap.at
            connection.say(resync_tail(gap.collections or (), gap.reason), at)
            connection.cursor = at or connection.cursor
            connection.active_at = connection.written_at = self._clock()
        is_caller_lost = self._is_caller_lost(connection, gap)
        self.told[gap.reason] += is_concerned or is_caller_lost
        if is_caller_lost:
            self._lose(connection, "gap", gap.at)
        elif is_concerned and not is_told:
            self._doom(connection, "gap")

    def _is_caller_lost(self, connection: Connection, gap: Announcement) -> bool:
        """Whether the caller's row may have changed in the gap since it was read."""
        name, _ = person_of(connection.caller) or ("", "")
        if name not in self._course.meaning.collections or not gap.concerns(name):
            return False
        return connection.known is None or connection.known.insert_lsn < gap.at.lsn


def _unknown_to(connection: Connection, unheard: Unheard) -> frozenset[str]:
    """The collections of which the connection may miss something."""
    unknown = unheard.lost | (unheard.undecided & _asked_about(connection))
    if not (unheard.unprovable or unheard.unseen):
        return unknown
    return unknown.union(
        subscription.group.variant.collection.name
        for subscription in connection.subscriptions.values()
        if subscription.group is not None
        and (
            subscription.group in unheard.unprovable
            or (subscription.group, subscription.viewer) in unheard.unseen
        )
    )


def _asked_about(connection: Connection) -> frozenset[str]:
    """The collections about whose rows something may be asked for the connection's sake."""
    groups = (s.group for s in connection.subscriptions.values() if s.group is not None)
    return frozenset(g.variant.collection.name for g in groups if g.variant.formula is not True)
