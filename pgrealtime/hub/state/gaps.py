"""Notifies connections of changes that cannot be delivered to them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pgrealtime.auth.principal import account_of
from pgrealtime.hub.connections.connection import Connection, Subscription
from pgrealtime.hub.evaluation.evaluator import EvaluationGap
from pgrealtime.hub.events.event import GapNotice
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.lsn import Cursor
from pgrealtime.protocol.frame import resync_tail


@dataclass(eq=False)
class GapNotifier:
    """Sends PB_RESYNC for a gap, or closes connections whose clients don't know it.

    Mirrors that it affects are told to load anew instead.
    """

    progress: DispatchProgress
    registry: ConnectionRegistry
    clock: Callable[[], float]
    notified: Counter[str] = field(default_factory=Counter)
    """By the gap's reason, how many times a connection was notified or closed for it."""

    def notify_slice(
        self,
        connection: Connection,
        gap: GapNotice | None,
        evaluation_gap: EvaluationGap | None,
        end_cursor: Cursor,
    ) -> None:
        """Notify a connection of a slice's gap, and of events not evaluated for it."""
        missed = evaluation_gap and _collections_missed_by(connection, evaluation_gap)
        if missed and not connection.is_closed():
            # Only the last one moves its position: if its client breaks off in between, it is
            # notified of both again.
            is_next_sent = gap is not None and self._affects(connection, gap)
            unknown = GapNotice(missed, "unknown", end_cursor)
            self.notify(connection, unknown, keeps_position=is_next_sent)
        # The first may have closed it.
        if gap is not None and not connection.is_closed():
            self.notify(connection, gap)

    def position_limit(
        self, connection: Connection, evaluation_gap: EvaluationGap | None
    ) -> Cursor | None:
        """Return the cursor that the position may not reach before a gap was sent, if any."""
        # A position says that everything up to it was delivered, or announced as a gap.
        if evaluation_gap is None:
            return None
        missed = _collections_missed_by(connection, evaluation_gap)
        is_missed = bool(self._subscribed_collections(connection) & missed)
        return evaluation_gap.first_cursor if is_missed else None

    def _subscribed_collections(self, connection: Connection) -> set[str]:
        collections = self.progress.generation.collections
        topics = (s.topic.collection_name_or_id for s in connection.subscriptions.values())
        return {c.name for c in map(collections.find, topics) if c is not None}

    def _mirrors_affected(self, connection: Connection, gap: GapNotice) -> list[Subscription]:
        """Return the connection's mirrors that are told to load anew instead."""
        return [
            own
            for own in connection.subscriptions.values()
            if own.mirror is not None
            and own.mirror.is_told
            and (self._affects_topic(own, gap) or self._affects_related(own, gap))
        ]

    def _affects_others(self, connection: Connection, gap: GapNotice) -> bool:
        return any(
            self._affects_topic(own, gap)
            for own in connection.subscriptions.values()
            if own.mirror is None or not own.mirror.is_told
        )

    def _affects_topic(self, subscription: Subscription, gap: GapNotice) -> bool:
        collections = self.progress.generation.collections
        collection = collections.find(subscription.topic.collection_name_or_id)
        return collection is not None and gap.affects(collection.name)

    def _affects_related(self, subscription: Subscription, gap: GapNotice) -> bool:
        """Whether the gap may hide changes of rows that a mirror's rule or filter reads."""
        concerns, group = self.progress.generation.matcher.concerns, subscription.group
        return group is not None and concerns.reads(group, gap.tables)

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
        if mirrors := self._mirrors_affected(connection, gap):
            for subscription in mirrors:
                self.registry.request_resync(subscription, gap.reason)
            is_affected = is_affected and self._affects_others(connection, gap)
        knows_gaps = connection.is_resumable or connection.has_resync_topic
        if is_affected and knows_gaps:
            cursor = None if keeps_position else gap.cursor
            tail = resync_tail(gap.collections or (), gap.reason)
            connection.write_gap(tail, cursor, self.clock())
        # On reconnecting its client authenticates anew; until then nothing is delivered. After the
        # write, so that its client can resume behind the gap.
        is_caller_lost = self._may_caller_have_changed(connection, gap)
        self.notified[gap.reason] += is_affected or is_caller_lost
        if is_caller_lost:
            self.registry.invalidate_caller(connection, "gap", gap.cursor)
        elif is_affected and not knows_gaps:
            # Clients of PocketBase load their data again after a reconnect.
            self.registry.request_close(connection, "gap")

    def _may_caller_have_changed(self, connection: Connection, gap: GapNotice) -> bool:
        name, _ = account_of(connection.caller) or ("", "")
        if name not in self.progress.generation.collections or not gap.affects(name):
            return False
        # A row that was read behind the gap is newer than all that the gap may hide.
        read_point = connection.caller_read_point
        return read_point is None or read_point.insert_lsn < gap.cursor.lsn


def _collections_missed_by(connection: Connection, gap: EvaluationGap) -> frozenset[str]:
    missed = gap.failed_collections | (
        gap.undecided_collections & _collections_queried_for(connection)
    )
    if not (gap.unprovable_groups or gap.incomplete_expands):
        return missed
    viewers = ((own.group, own.expand_viewer) for own in connection.subscriptions.values())
    return missed.union(
        group.specialization.collection.name
        for group, viewer in viewers
        if group and (group in gap.unprovable_groups or (group, viewer) in gap.incomplete_expands)
    )


def _collections_queried_for(connection: Connection) -> frozenset[str]:
    """Return the names of the collections whose rows are queried to evaluate its topics."""
    groups = (s.group for s in connection.subscriptions.values() if s.group is not None)
    # A rule whose formula is True admits every caller to every row, whatever the answers are.
    return frozenset(
        g.specialization.collection.name for g in groups if g.specialization.formula is not True
    )
