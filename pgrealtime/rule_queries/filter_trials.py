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
    from pgrealtime.hub.evaluation.matcher import Group
    from pgrealtime.rules.engine.plan import Variant

MANY_TAKERS = 50
"""Live connections that ask for the same: for so many it is done once for all, whatever it takes.
Apart, each of them would do it for itself."""


class FilterTrials:
    """The groups whose filters ask PostgreSQL and that are evaluated for all, by their filters.

    A filter is a ``Variant``: those that differ in nothing but values are one. Synchronous. The
    matcher adds and removes groups; whoever evaluates filters says how long they took.
    """

    def __init__(self) -> None:
        self._groups: defaultdict[Variant, dict[Group, None]] = defaultdict(dict)
        self._quick: WeakSet[Variant] = WeakSet()
        self._untried: defaultdict[str, dict[Variant, None]] = defaultdict(dict)
        """By collection, those of ``_groups`` that aren't quick."""

    def add(self, group: Group) -> None:
        """Take a group that is evaluated for all from now on."""
        self._groups[group.variant][group] = None
        if group.variant not in self._quick:
            self._untried[group.variant.collection.name][group.variant] = None

    def remove(self, group: Group) -> None:
        """Take a group out that isn't any more."""
        groups = self._groups[group.variant]
        del groups[group]
        if not groups:
            del self._groups[group.variant]
            self._untried[group.variant.collection.name].pop(group.variant, None)

    def note_quick(self, variants: Iterable[Variant]) -> None:
        """Take note that filters were quick when nobody waited."""
        for variant in variants:
            self._quick.add(variant)
            self._untried[variant.collection.name].pop(variant, None)

    def note_late(self, variants: Iterable[Variant]) -> None:
        """Take note that filters were late, or others that were evaluated with them."""
        for variant in variants:
            self._quick.discard(variant)
            if variant in self._groups:
                self._untried[variant.collection.name][variant] = None

    @property
    def has_untried(self) -> bool:
        """Whether there is any filter that must not be evaluated for all."""
        return any(self._untried.values())

    def untried(self, collections: Iterable[str]) -> Iterator[Group]:
        """Yield the groups whose filters must not be evaluated for all.

        Args:
            collections: Names of those whose rows changed.
        """
        for name in collections:
            for variant in self._untried.get(name, ()):
                groups = self._groups[variant]
                if not _are_many(groups):
                    yield from groups


def _are_many(groups: Sized[Group]) -> bool:
    return len(groups) >= MANY_TAKERS or any(
        takers >= MANY_TAKERS for takers in accumulate(group.shared for group in groups)
    )
