"""Which groups receive the events of a slice, and what could not be evaluated.

The evaluator makes a ``SliceResult``, the enricher adds what it could not load. The dispatcher and
catch-up deliver by it, and notify connections of the ``EvaluationGap`` in it (``hub.state.gaps``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.slices import GapNotice
from pgrealtime.lsn import Cursor, Xid
from pgrealtime.rules.engine.evaluation import Evaluation

_NO_NAMES: frozenset[str] = frozenset()
_NO_GROUPS: frozenset[Group] = frozenset()


class SliceResult(Struct):
    """The receivers of a slice's events; indexes are those of the events in the slice."""

    hits: list[Iterable[Group]]
    """Per event, the groups that receive it."""
    undecided_collections: frozenset[str] = _NO_NAMES
    """Names of collections whose rules could not be asked: connections that depend on the answers
    may miss events of them."""
    failed_collections: frozenset[str] = _NO_NAMES
    """Names of collections of which any connection may miss events."""
    over_budget_groups: frozenset[Group] = _NO_GROUPS
    """Groups whose filters exceeded the budget: their connections must evaluate them alone."""
    expensive_groups: frozenset[Group] = _NO_GROUPS
    """Those of them whose own filters took that long in the process."""
    unprovable_groups: frozenset[Group] = _NO_GROUPS
    """Groups that may miss events, as their rules read columns whose values are unknown."""
    incomplete_expands: frozenset[tuple[Group, ExpandViewer]] = frozenset()
    """Groups' viewers who may miss related records."""
    unproven_indexes: Sequence[int] = ()
    """Events that the groups and viewers of the two sets above may miss."""
    partial_row_indexes: Sequence[int] = ()
    """Events whose rows lack columns."""
    gap_indexes: Sequence[int] = ()
    """All events that any connection may miss, ascending."""

    def append(self, part: SliceResult) -> None:
        """Append the result of the events that follow those of this one."""
        first = len(self.hits)
        self.hits += part.hits
        self.undecided_collections |= part.undecided_collections
        self.failed_collections |= part.failed_collections
        self.over_budget_groups |= part.over_budget_groups
        self.expensive_groups |= part.expensive_groups
        self.unprovable_groups |= part.unprovable_groups
        self.incomplete_expands |= part.incomplete_expands
        self.unproven_indexes = _appended(self.unproven_indexes, part.unproven_indexes, first)
        self.partial_row_indexes = _appended(
            self.partial_row_indexes, part.partial_row_indexes, first
        )
        self.gap_indexes = _appended(self.gap_indexes, part.gap_indexes, first)

    def record_unprovable(self, evaluation: Evaluation[int, Group]) -> None:
        """Record the groups whose rules read missing columns; once no question is open."""
        indexes, groups = evaluation.members_missing_columns()
        self.unproven_indexes = [*self.unproven_indexes, *indexes]
        self.unprovable_groups |= groups - self.over_budget_groups

    def record_failed_enrichment(
        self, events: Sequence[Event], failed: Iterable[tuple[int, ExpandViewer | None]]
    ) -> None:
        """Record the events for which something could not be loaded, by index.

        The viewer is the one who lacks it; None is every receiver.
        """
        viewers_by_index: defaultdict[int, set[ExpandViewer | None]] = defaultdict(set)
        for index, viewer in failed:
            viewers_by_index[index].add(viewer)
        unprovable: set[Group] = set()
        incomplete: set[tuple[Group, ExpandViewer]] = set()
        for index, viewers in viewers_by_index.items():
            groups = self.hits[index]
            if None in viewers:
                unprovable.update(groups)
            served = (
                (group, render_group.render_key[2])
                for group in groups
                for render_group in group.render_groups
            )
            incomplete.update(
                (group, viewer) for group, viewer in served if viewer and viewer in viewers
            )
        self.unprovable_groups |= unprovable
        self.incomplete_expands |= incomplete
        self.unproven_indexes = [*self.unproven_indexes, *viewers_by_index]
        self.update_gap_indexes(events)

    def update_gap_indexes(self, events: Sequence[Event]) -> None:
        """Derive ``gap_indexes`` from what was recorded so far."""
        names = self.undecided_collections | self.failed_collections
        if names or self.unproven_indexes:
            unproven = frozenset(self.unproven_indexes)
            self.gap_indexes = [
                index
                for index, event in enumerate(events)
                if index in unproven or event.collection.name in names
            ]

    def gap_in(
        self, events: Sequence[Event], event_indexes: range, failed_indexes: Sequence[int] = ()
    ) -> EvaluationGap | None:
        """Return what connections must be notified of for some of the events; None if nothing.

        ``failed_indexes`` are, ascending, those that can't be rendered for some connection.
        """
        in_range = [index for index in self.gap_indexes if index in event_indexes]
        if not in_range and not failed_indexes:
            return None
        names = collection_names(events[index] for index in in_range)
        first = min([*in_range[:1], *failed_indexes[:1]])
        has_unproven = any(index in event_indexes for index in self.unproven_indexes)
        return EvaluationGap(
            undecided_collections=self.undecided_collections & names,
            failed_collections=(self.failed_collections & names)
            | collection_names(events[index] for index in failed_indexes),
            unprovable_groups=self.unprovable_groups if has_unproven else _NO_GROUPS,
            incomplete_expands=self.incomplete_expands if has_unproven else frozenset(),
            first_cursor=events[first].cursor,
        )


class EvaluationGap(Struct, frozen=True):
    """Events that connections may miss and must be notified of; fields as of ``SliceResult``."""

    undecided_collections: frozenset[str]
    failed_collections: frozenset[str]
    unprovable_groups: frozenset[Group]
    incomplete_expands: frozenset[tuple[Group, ExpandViewer]]
    first_cursor: Cursor
    """Of the first event: no position may pass it before its connection is notified."""


def gap_xids(
    gap: GapNotice | None,
    events: Sequence[Event],
    result: SliceResult,
    subscription_counts: Mapping[str, int],
) -> set[Xid]:
    """Return the transactions that must be visible before connections are notified of gaps.

    A client that reloads when it is notified must see what it missed.
    """
    # Gaps of collections without subscriptions notify nobody, so nothing waits for them.
    missed = (events[index] for index in result.gap_indexes)
    xids = {event.xid for event in missed if subscription_counts.get(event.collection.name)}
    if (
        gap is not None
        and gap.xid is not None
        and any(map(subscription_counts.get, gap.collections or ()))
    ):
        xids.add(gap.xid)
    return xids


def collection_names(events: Iterable[Event]) -> frozenset[str]:
    """Return the names of the events' collections."""
    return frozenset(event.collection.name for event in events)


def _appended(indexes: Sequence[int], more: Sequence[int], first: int) -> Sequence[int]:
    return [*indexes, *(first + index for index in more)] if more else indexes
