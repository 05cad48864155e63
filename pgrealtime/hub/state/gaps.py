"""Notifies connections of changes that cannot be delivered to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pgrealtime.auth.principal import account_of
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.evaluation.slice_result import EvaluationGap
from pgrealtime.hub.events.slices import GapNotice
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.lsn import Cursor
from pgrealtime.protocol.frame import resync_tail


class GapNotifier:
    """Sends PB_RESYNC for a gap, or closes connections whose clients don't know it."""

    def __init__(
        self,
        progress: DispatchProgress,
        registry: ConnectionRegistry,
        clock: Callable[[], float],
    ) -> None:
        self._progress = progress
        self._registry = registry
        self._clock = clock
        self.notified: Counter[str] = Counter()
        """By the gap's reason, how many times a connection was notified or closed for it."""

    def notify_slice(
        self,
        connection: Connection,
        gap: GapNotice | None,
        evaluation_gap: EvaluationGap | None,
        end_cursor: Cursor,
    ) -> None:
        """Notify a connection of a slice's gap, and of events not evaluated for it."""
        gaps = [] if gap is None else [gap]
        if evaluation_gap is not None and (
            missed := _collections_missed_by(connection, evaluation_gap)
        ):
            gaps.insert(0, GapNotice(missed, "unknown", end_cursor))
        # Only the last one moves its position: if its client breaks off in between, it is
        # notified of both again.
        are_both_sent = len(gaps) > 1 and self._affects(connection, gaps[-1])
        for notice in gaps:
            # The first may have closed it.
            if not connection.is_closed():
                self.notify(
                    connection, notice, keeps_position=are_both_sent and notice is not gaps[-1]
                )

    def position_limit(
        self, connection: Connection, evaluation_gap: EvaluationGap | None
    ) -> Cursor | None:
        """Return the cursor that the position may not reach before a gap was sent, if any."""
        # A position says that everything up to it was delivered, or announced as a gap.
        if evaluation_gap is None:
            return None
        names = _collections_missed_by(connection, evaluation_gap)
        return (
            evaluation_gap.first_cursor
            if self._subscribed_collections(connection) & names
            else None
        )

    def _subscribed_collections(self, connection: Connection) -> set[str]:
        collections = self._progress.generation.collections
        topics = (s.topic.collection_name_or_id for s in connection.subscriptions.values())
        return {c.name for c in map(collections.find, topics) if c is not None}

    def _affects(self, connection: Connection, gap: GapNotice) -> bool:
        return gap.collections is None or bool(
            self._subscribed_collections(connection) & gap.collections
        )

    def notify(
        self, connection: Connection, gap: GapNotice, *, keeps_position: bool = False
    ) -> None:
        """Notify a connection of a gap that affects it, or close it so that its client reloads.

        With ``keeps_position`` its position stays, since another gap is sent next.
        """
        is_affected = self._affects(connection, gap)
        knows_gaps = connection.is_resumable or connection.has_resync_topic
        if is_affected and knows_gaps:
            cursor = None if keeps_position else gap.cursor
            tail = resync_tail(gap.collections or (), gap.reason)
            connection.write_gap(tail, cursor, self._clock())
        # On reconnecting its client authenticates anew; until then nothing is delivered. After the
        # write, so that its client can resume behind the gap.
        is_caller_lost = self._may_caller_have_changed(connection, gap)
        self.notified[gap.reason] += is_affected or is_caller_lost
        if is_caller_lost:
            self._registry.invalidate_caller(connection, "gap", gap.cursor)
        elif is_affected and not knows_gaps:
            # Clients of PocketBase load their data again after a reconnect.
            self._registry.request_close(connection, "gap")

    def _may_caller_have_changed(self, connection: Connection, gap: GapNotice) -> bool:
        name, _ = account_of(connection.caller) or ("", "")
        if name not in self._progress.generation.collections or not gap.affects(name):
            return False
        # A row that was read behind the gap is newer than all that the gap may hide.
        return (
            connection.caller_read_point is None
            or connection.caller_read_point.insert_lsn < gap.cursor.lsn
        )


def _collections_missed_by(connection: Connection, gap: EvaluationGap) -> frozenset[str]:
    missed = gap.failed_collections | (
        gap.undecided_collections & _collections_queried_for(connection)
    )
    if not (gap.unprovable_groups or gap.incomplete_expands):
        return missed
    return missed.union(
        subscription.group.specialization.collection.name
        for subscription in connection.subscriptions.values()
        if subscription.group is not None
        and (
            subscription.group in gap.unprovable_groups
            or (subscription.group, subscription.expand_viewer) in gap.incomplete_expands
        )
    )


def _collections_queried_for(connection: Connection) -> frozenset[str]:
    """Return the names of the collections whose rows are queried to evaluate its topics."""
    groups = (s.group for s in connection.subscriptions.values() if s.group is not None)
    # A rule whose formula is True admits every caller to every row, whatever the answers are.
    return frozenset(
        g.specialization.collection.name for g in groups if g.specialization.formula is not True
    )
