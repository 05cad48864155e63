"""Limits the time of this process and of PostgreSQL that clients' filters take.

While others wait for a slice, all filters together have one ``FilterBudget``. A connection whose
filter exceeds it is isolated: it reads on from the changelog by itself, with a budget of its own
(``hub.state.isolation``), and is no part of the slices that are evaluated for all. ``FilterTrials``
evaluates a filter that asks PostgreSQL alone before it is evaluated with others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection as Sized
from collections.abc import Iterable, Iterator
from itertools import accumulate
from weakref import WeakSet

from pgrealtime.fairness import FairLock, YieldTimer
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.rule_queries.slow_queries import SLICE_FILTER_SECONDS, TimeBudget
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import Specialization
from pgrealtime.rules.engine.work_budget import FilterWorkBudget

SHARED_FILTER_SECONDS = 0.1
"""Seconds of PostgreSQL for the filters that ``MANY_CONNECTIONS`` connections share.
It is short enough that users hardly notice the delay, and a database that is slow for a moment
doesn't isolate that many connections at once."""

WORK_PER_FILTER = 500.0
"""Units of work, a microsecond each, that one filter may take for one row while others wait."""
_WORK_PER_SLICE = 20_000.0
"""Units that all filters may take for a slice, and ``_WORK_PER_CHANGE`` more per change of it."""
_WORK_PER_CHANGE = 2_000.0


class FilterBudget(TimeBudget):
    """The time of PostgreSQL and of this process that filters may take for some changes.

    A limited one is for changes that others wait for. Otherwise each statement has the whole
    statement timeout. ``work_lock`` serializes the work in the process among connections, by
    turns of networks; None if the work is done for all connections at once.
    """

    def __init__(
        self,
        *,
        is_limited: bool = False,
        work_budget: FilterWorkBudget[Group] | None = None,
        work_lock: FairLock | None = None,
        network: str = "",
        max_seconds: float = SLICE_FILTER_SECONDS,
    ) -> None:
        super().__init__(is_limited=is_limited, max_seconds=max_seconds)
        self.work_budget: FilterWorkBudget[Group] = work_budget or FilterWorkBudget()
        self.work_lock = work_lock
        self.network = network

    @classmethod
    def for_slice(cls, change_count: int) -> FilterBudget:
        """Return the budget of a slice that is evaluated for all connections."""
        work_budget: FilterWorkBudget[Group] = FilterWorkBudget(
            work_per_filter=WORK_PER_FILTER,
            total_work=_WORK_PER_SLICE + _WORK_PER_CHANGE * change_count,
            is_shared=True,
        )
        return cls(is_limited=True, work_budget=work_budget)

    def for_shared_filters(self) -> FilterBudget:
        """Return the budget of filters that many connections share, once this one is spent."""
        return FilterBudget(
            is_limited=True, work_budget=self.work_budget, max_seconds=SHARED_FILTER_SECONDS
        )

    async def run_in_process(self, evaluation: Evaluation[int, Group]) -> None:
        """Do the steps of an evaluation that ask nothing of PostgreSQL, yielding to the loop."""
        if self.work_lock is None:
            timer = YieldTimer()
            while not evaluation.run_in_process(timer.is_due):
                await timer.pause()
            return
        is_done = False
        while not is_done:
            async with self.work_lock.acquire_for_loop_work(self.network) as timer:
                is_done = evaluation.run_in_process(timer.is_due)


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
        for specialization in specializations:
            self._quick_filters.add(specialization)
            self._untried_filters[specialization.collection.name].pop(specialization, None)

    def record_over_budget(self, specializations: Iterable[Specialization]) -> None:
        """Record that filters exceeded a slice's budget, or were evaluated with one that did."""
        for specialization in specializations:
            self._quick_filters.discard(specialization)
            if specialization in self._groups:
                self._untried_filters[specialization.collection.name][specialization] = None

    @property
    def has_untried(self) -> bool:
        """Whether there is any filter that must not be evaluated for all."""
        return any(self._untried_filters.values())

    def untried_groups(self, collection_names: Iterable[str]) -> Iterator[Group]:
        """Yield the groups of changed collections whose filters must not be evaluated for all."""
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
