"""Telling connections of changes that can't be delivered to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pgrealtime.auth.principal import account_of
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.evaluation.slice_result import EvaluationGap
from pgrealtime.hub.events.slices import GapNotice
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.lsn import Cursor
from pgrealtime.protocol.frame import resync_tail


class GapNotifier:
    """Tells of gaps, or ends who can't be told.

    Args:
        progress: Where the hub stands.
        request_close: Ends a connection as soon as its client can bear that, for a reason.
        invalidate_caller: As well, and lets it hear nothing more than what it had up to a place.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        progress: DispatchProgress,
        *,
        request_close: Callable[[Connection, str], None],
        invalidate_caller: Callable[[Connection, str, Cursor], None],
        clock: Callable[[], float],
    ) -> None:
        self._progress = progress
        self._request_close = request_close
        self._invalidate_caller = invalidate_caller
        self._clock = clock
        self.notified: Counter[str] = Counter()
        """Connections that were told, or ended, by the gap's reason."""

    def notify_slice(
        self,
        connection: Connection,
        gap: GapNotice | None,
        unheard: EvaluationGap | None,
        upto: Cursor,
    ) -> None:
        """Tell a connection of a gap in the stream, and of what nobody could be asked about.

        Of both only the last moves its position: who breaks off in between is told again.
        """
        gaps = [] if gap is None else [gap]
        if unheard is not None and (unknown := _collections_missed_by(connection, unheard)):
            gaps.insert(0, GapNotice(unknown, "unknown", upto))
        is_held = len(gaps) > 1 and self._affects(connection, gaps[-1])
        for one in gaps:
            if not connection.is_closed:
                self.notify(connection, one, keeps_position=is_held and one is not gaps[-1])

    def position_limit(
        self, connection: Connection, unheard: EvaluationGap | None
    ) -> Cursor | None:
        """Return what the connection's position may not pass before it was told; None if nothing.

        An id says that all up to it was delivered or told.
        """
        if unheard is None:
            return None
        names = _collections_missed_by(connection, unheard)
        return unheard.first_cursor if self._subscribed_collections(connection) & names else None

    def _subscribed_collections(self, connection: Connection) -> set[str]:
        """Return the names of the collections that the connection has topics of."""
        collections = self._progress.generation.collections
        topics = (s.topic.collection for s in connection.subscriptions.values())
        return {c.name for c in map(collections.find, topics) if c is not None}

    def _affects(self, connection: Connection, gap: GapNotice) -> bool:
        return gap.collections is None or bool(
            self._subscribed_collections(connection) & gap.collections
        )

    def notify(
        self, connection: Connection, gap: GapNotice, *, keeps_position: bool = False
    ) -> None:
        """Tell a connection of a gap that concerns it; a plain one is ended, so that it reloads.

        So is one whose caller's row may have changed in the gap: coming back it says anew who
        it is, and until then hears nothing.

        Args:
            connection: Who is told.
            gap: Of what.
            keeps_position: Whether its position stays, since another gap is about to be told.
        """
        is_concerned = self._affects(connection, gap)
        is_told = connection.is_resumable or connection.has_resync_topic
        if is_concerned and is_told:
            at = None if keeps_position else gap.cursor
            connection.write_message(resync_tail(gap.collections or (), gap.reason), at)
            connection.cursor = at or connection.cursor
            connection.idle_since = connection.last_write_at = self._clock()
        is_caller_lost = self._may_caller_have_changed(connection, gap)
        self.notified[gap.reason] += is_concerned or is_caller_lost
        if is_caller_lost:
            self._invalidate_caller(connection, "gap", gap.cursor)
        elif is_concerned and not is_told:
            self._request_close(connection, "gap")

    def _may_caller_have_changed(self, connection: Connection, gap: GapNotice) -> bool:
        """Whether the caller's row may have changed in the gap since it was read."""
        name, _ = account_of(connection.caller) or ("", "")
        if name not in self._progress.generation.collections or not gap.affects(name):
            return False
        return (
            connection.caller_read_point is None
            or connection.caller_read_point.insert_lsn < gap.cursor.lsn
        )


def _collections_missed_by(connection: Connection, unheard: EvaluationGap) -> frozenset[str]:
    """The collections of which the connection may miss something."""
    unknown = unheard.failed_collections | (
        unheard.undecided_collections & _collections_queried_for(connection)
    )
    if not (unheard.unprovable_groups or unheard.incomplete_expands):
        return unknown
    return unknown.union(
        subscription.group.specialization.collection.name
        for subscription in connection.subscriptions.values()
        if subscription.group is not None
        and (
            subscription.group in unheard.unprovable_groups
            or (subscription.group, subscription.expand_viewer) in unheard.incomplete_expands
        )
    )


def _collections_queried_for(connection: Connection) -> frozenset[str]:
    """The collections about whose rows something may be asked for the connection's sake."""
    groups = (s.group for s in connection.subscriptions.values() if s.group is not None)
    return frozenset(
        g.specialization.collection.name for g in groups if g.specialization.formula is not True
    )
