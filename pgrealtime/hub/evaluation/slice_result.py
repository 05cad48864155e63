"""Which groups receive the events of a slice, and what could not be evaluated."""

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
    """What was found out about events."""

    hits: list[Iterable[Group]]
    """Per event, the groups that may receive it."""
    undecided_collections: frozenset[str] = _NO_NAMES
    """Collections whose rules could not be asked: who depends on one may miss something."""
    failed_collections: frozenset[str] = _NO_NAMES
    """Collections of which anybody may miss something."""
    over_budget_groups: frozenset[Group] = frozenset()
    """Groups whose filters took too long: they must be judged anew, alone."""
    expensive_groups: frozenset[Group] = frozenset()
    """Those of them that took so long themselves, in the process."""
    unprovable_groups: frozenset[Group] = frozenset()
    """Groups that may miss something, as their rules read columns that nobody knows any more."""
    incomplete_expands: frozenset[tuple[Group, ExpandViewer]] = frozenset()
    """Groups' viewers who may miss something of what they expand."""
    unproven_indexes: Sequence[int] = ()
    """Places of events that some of those may miss."""
    partial_row_indexes: Sequence[int] = ()
    """Places of events whose rows lack columns."""
    gap_indexes: Sequence[int] = ()
    """Places, ascending, of the events that somebody may miss."""

    def record_unprovable(self, evaluation: Evaluation[int, Group]) -> None:
        """Note who may miss which of the events, once nothing is left to ask."""
        places, groups = evaluation.members_missing_columns()
        self.unproven_indexes = [*self.unproven_indexes, *places]
        self.unprovable_groups |= groups - self.over_budget_groups

    def record_failed_enrichment(
        self, events: Sequence[Event], failed: Iterable[tuple[int, ExpandViewer | None]]
    ) -> None:
        """Note of which events something couldn't be had, perhaps for one viewer alone."""
        viewers: defaultdict[int, set[ExpandViewer | None]] = defaultdict(set)
        for place, viewer in failed:
            viewers[place].add(viewer)
        unprovable: set[Group] = set()
        unseen: set[tuple[Group, ExpandViewer]] = set()
        for place, missing in viewers.items():
            groups = self.hits[place]
            if None in missing:
                unprovable.update(groups)
            pairs = ((g, audience.render_key[2]) for g in groups for audience in g.render_groups)
            unseen.update((g, one) for g, one in pairs if one is not None and one in missing)
        self.unprovable_groups |= unprovable
        self.incomplete_expands |= unseen
        self.unproven_indexes = [*self.unproven_indexes, *viewers]
        self.update_gap_indexes(events)

    def update_gap_indexes(self, events: Sequence[Event]) -> None:
        """Note which of the events it was found about somebody may miss."""
        names = self.undecided_collections | self.failed_collections
        if names or self.unproven_indexes:
            unproved = frozenset(self.unproven_indexes)
            self.gap_indexes = [
                place
                for place, event in enumerate(events)
                if place in unproved or event.collection.name in names
            ]

    def gap_in(
        self, events: Sequence[Event], event_indexes: range, failed_indexes: Sequence[int] = ()
    ) -> EvaluationGap | None:
        """Return what must be told of some of the events, if anything.

        Args:
            events: Those that were judged.
            event_indexes: Of the events concerned.
            failed_indexes: Places, ascending, of events that could not be shown to somebody.
        """
        doubted = [place for place in self.gap_indexes if place in event_indexes]
        if not doubted and not failed_indexes:
            return None
        names = collection_names(events[place] for place in doubted)
        first = min([*doubted[:1], *failed_indexes[:1]])
        is_unproved = any(place in event_indexes for place in self.unproven_indexes)
        return EvaluationGap(
            undecided_collections=self.undecided_collections & names,
            failed_collections=(self.failed_collections & names)
            | collection_names(events[place] for place in failed_indexes),
            unprovable_groups=self.unprovable_groups if is_unproved else _NO_GROUPS,
            incomplete_expands=self.incomplete_expands if is_unproved else frozenset(),
            first_cursor=events[first].cursor,
        )


class EvaluationGap(Struct, frozen=True):
    """Events that somebody may miss and has to be told of."""

    undecided_collections: frozenset[str]
    """As the verdict has it."""
    failed_collections: frozenset[str]
    """As the verdict has it."""
    unprovable_groups: frozenset[Group]
    """As the verdict has it."""
    incomplete_expands: frozenset[tuple[Group, ExpandViewer]]
    """As the verdict has it."""
    first_cursor: Cursor
    """Of the first of them: until they are told no position may pass it."""


def gap_xids(
    gap: GapNotice | None,
    events: Sequence[Event],
    result: SliceResult,
    subscription_counts: Mapping[str, int],
) -> set[Xid]:
    """Return the transactions that readers must see before a slice's gaps are told.

    Args:
        gap: The slice's.
        events: The slice's.
        result: On them.
        subscription_counts: Collections that anybody may hear of; of the others nobody is told.
    """
    doubted = (events[place] for place in result.gap_indexes)
    causes = {event.xid for event in doubted if subscription_counts.get(event.collection.name)}
    if (
        gap is not None
        and gap.xid is not None
        and any(map(subscription_counts.get, gap.collections or ()))
    ):
        causes.add(gap.xid)
    return causes


def collection_names(events: Iterable[Event]) -> frozenset[str]:
    """Return the names of the events' collections."""
    return frozenset(event.collection.name for event in events)
