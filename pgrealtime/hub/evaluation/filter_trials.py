"""Which filters that ask PostgreSQL may be evaluated for all connections at once.

A filter may that was quick when no other connection waited for it, and did not exceed a slice's
budget since. Any other is evaluated for its own connections alone at the next change of its
collection (``hub.state.isolation``). Otherwise each new slow filter would cost all connections
the time that a slice's filters may take, and a client can send new filters all the time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection as Sized
from collections.abc import Iterable, Iterator
from itertools import accumulate
from weakref import WeakSet

from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.rules.engine.plan import Specialization


class FilterTrials:
    """The groups that are evaluated for all and whose filters ask PostgreSQL, by filter.

    A filter is a ``Specialization``: filters that differ only in values are one.

    The matcher adds and removes groups; the evaluator and ``IsolatedConnections`` record how long
    filters took.
    """

    def __init__(self) -> None:
        self._groups: defaultdict[Specialization, dict[Group, None]] = defaultdict(dict)
        self._quick_filters: WeakSet[Specialization] = WeakSet()
        self._untried_filters: defaultdict[str, dict[Specialization, None]] = defaultdict(dict)
        """By collection, those of ``_groups`` that aren't quick."""

    def add(self, group: Group) -> None:
        """Add a group that is evaluated for all from now on."""
        specialization = group.specialization
        self._groups[specialization][group] = None
        if specialization not in self._quick_filters:
            self._untried_filters[specialization.collection.name][specialization] = None

    def remove(self, group: Group) -> None:
        """Remove a group that is evaluated for all no longer."""
        specialization = group.specialization
        groups = self._groups[specialization]
        del groups[group]
        if not groups:
            del self._groups[specialization]
            self._untried_filters[specialization.collection.name].pop(specialization, None)

    def record_quick(self, specializations: Iterable[Specialization]) -> None:
        """Record that filters were quick when no other connection waited."""
        for one in specializations:
            self._quick_filters.add(one)
            self._untried_filters[one.collection.name].pop(one, None)

    def record_over_budget(self, specializations: Iterable[Specialization]) -> None:
        """Record that filters exceeded a slice's budget, or were evaluated with one that did."""
        for one in specializations:
            self._quick_filters.discard(one)
            if one in self._groups:
                self._untried_filters[one.collection.name][one] = None

    @property
    def has_untried(self) -> bool:
        """Whether there is any filter that must not be evaluated for all."""
        return any(self._untried_filters.values())

    def untried_groups(self, collection_names: Iterable[str]) -> Iterator[Group]:
        """Yield the groups whose filters must not be evaluated for all.

        Args:
            collection_names: The collections whose rows changed.
        """
        for name in collection_names:
            for specialization in self._untried_filters.get(name, ()):
                groups = self._groups[specialization]
                if not _are_widely_used(groups):
                    yield from groups


def _are_widely_used(groups: Sized[Group]) -> bool:
    return len(groups) >= MANY_CONNECTIONS or any(
        count >= MANY_CONNECTIONS
        for count in accumulate(group.shared_subscription_count for group in groups)
    )
