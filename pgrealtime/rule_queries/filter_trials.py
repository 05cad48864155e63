"""Filters that ask PostgreSQL, and whether they were quick when nobody else waited for them.

One that wasn't yet, or was late since, is evaluated for its connections alone at the next change of
its collection. Else each new slow filter would cost everybody the time that a slice's filters may
take, and a client can send new ones all the time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection as Sized
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from pgrealtime.hub.connections.connection import Group
    from pgrealtime.rules.engine.plan import Specialization

MANY_CONNECTIONS = 50
"""Live connections that ask for the same: for so many it is done once for all, whatever it takes.
Apart, each of them would do it for itself."""


class FilterTrials:
    """The groups whose filters ask PostgreSQL and that are evaluated for all, by their filters.

    A filter is a ``Specialization``: those that differ in nothing but values are one. Synchronous.
    The matcher adds and removes groups; whoever evaluates filters says how long they took.
    """

    def __init__(self) -> None:
        self._groups: defaultdict[Specialization, dict[Group, None]] = defaultdict(dict)
        self._quick_filters: WeakSet[Specialization] = WeakSet()
        self._untried_filters: defaultdict[str, dict[Specialization, None]] = defaultdict(dict)
        """By collection, those of ``_groups`` that aren't quick."""

    def add(self, group: Group) -> None:
        """Take a group that is evaluated for all from now on."""
        self._groups[group.specialization][group] = None
        if group.specialization not in self._quick_filters:
            self._untried_filters[group.specialization.collection.name][group.specialization] = None

    def remove(self, group: Group) -> None:
        """Take a group out that isn't any more."""
        groups = self._groups[group.specialization]
        del groups[group]
        if not groups:
            del self._groups[group.specialization]
            self._untried_filters[group.specialization.collection.name].pop(
                group.specialization, None
            )

    def record_quick(self, variants: Iterable[Specialization]) -> None:
        """Take note that filters were quick when nobody waited."""
        for variant in variants:
            self._quick_filters.add(variant)
            self._untried_filters[variant.collection.name].pop(variant, None)

    def record_over_budget(self, variants: Iterable[Specialization]) -> None:
        """Take note that filters were late, or others that were evaluated with them."""
        for variant in variants:
            self._quick_filters.discard(variant)
            if variant in self._groups:
                self._untried_filters[variant.collection.name][variant] = None

    @property
    def has_untried(self) -> bool:
        """Whether there is any filter that must not be evaluated for all."""
        return any(self._untried_filters.values())

    def untried_groups(self, collection_names: Iterable[str]) -> Iterator[Group]:
        """Yield the groups whose filters must not be evaluated for all.

        Args:
            collection_names: Names of those whose rows changed.
        """
        for name in collection_names:
            for variant in self._untried_filters.get(name, ()):
                groups = self._groups[variant]
                if not _are_widely_used(groups):
                    yield from groups


def _are_widely_used(groups: Sized[Group]) -> bool:
    return len(groups) >= MANY_CONNECTIONS or any(
        takers >= MANY_CONNECTIONS
        for takers in accumulate(group.shared_subscription_count for group in groups)
    )
