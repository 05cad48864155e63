"""Limits what clients' subscriptions cost: the time of their filters, and their number.

While others wait for a slice, all filters together have one ``FilterBudget``. A connection whose
filter exceeds it is isolated: it reads on from the changelog by itself, with a budget of its own
(``hub.state.isolation``), and is no part of the slices that are evaluated for all. ``FilterTrials``
evaluates a filter that asks PostgreSQL alone before it is evaluated with others.

The matcher checks the number of subscriptions when it adds one. Only those that the connection
submitted before count, so that the same topics are refused whether they are new or bound again
after a reload.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection as Sized
from collections.abc import Iterable, Iterator
from itertools import accumulate, takewhile
from weakref import WeakSet

from pgrealtime.errors import SubscriptionLimitError
from pgrealtime.fairness import FairLock, YieldTimer
from pgrealtime.hub.connections.connection import Group, Subscription
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.protocol.topic import Topic
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

UNINDEXED_FILTERS_PER_CONNECTION = 50
"""Different filters that no index serves: each costs 2 us and more at each event."""
UNINDEXED_FILTERS_PER_ADDRESS = 1000
"""The same over all connections from one address (IPv6: one /64). Rules aren't counted: they are
the operator's, and all callers for whom a rule has the same values are one group."""
REMOTE_FILTERS_PER_CONNECTION = 50
"""Subscriptions whose filters ask PostgreSQL more than their rules do: each of those questions may
take the whole ``statement_timeout``."""
FILTER_CHARACTERS_PER_CONNECTION = 32 * 1024
"""Characters of the different filters. Compiling takes up to 50 ms per thousand, and all filters
are compiled anew when rules or the caller change."""
VIEWS_PER_CONNECTION = 100
"""Different combinations of ``fields`` and ``expand``: each is a record to render at each event,
which may take several milliseconds while all connections wait for the next event."""

_PLAIN_VIEW = ("", "")
"""The record as it is."""


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

    A filter is a ``Specialization``: filters that differ only in values are one. The matcher adds
    and removes groups; the evaluator and ``IsolatedConnections`` record how long filters took.
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
    counts = accumulate(group.shared_subscription_count for group in groups)
    return len(groups) >= MANY_CONNECTIONS or any(count >= MANY_CONNECTIONS for count in counts)


def check_topic(subscription: Subscription) -> None:
    """Raise ``SubscriptionLimitError`` for what needs no compiled filter: views, characters."""
    topic = subscription.topic
    if not topic.query:
        return
    has_view = _view_options(topic) != _PLAIN_VIEW
    if has_view and _other_views_before(subscription) >= VIEWS_PER_CONNECTION:
        raise _limit_error(subscription, "views", VIEWS_PER_CONNECTION)
    if "filter" in topic.query:
        earlier = _submitted_before(subscription)
        filters = {topic.query["filter"], *(one.topic.query.get("filter", "") for one in earlier)}
        if sum(map(len, filters)) > FILTER_CHARACTERS_PER_CONNECTION:
            raise _limit_error(subscription, "filter_characters", FILTER_CHARACTERS_PER_CONNECTION)


def check_remote_filters(subscription: Subscription, specialization: Specialization) -> None:
    """Check the number of filters that ask PostgreSQL, once it is known whether this one does."""
    if specialization.has_remote_filter:
        groups = (earlier.group for earlier in _submitted_before(subscription))
        count = sum(
            group is not None and group.specialization.has_remote_filter for group in groups
        )
        if count >= REMOTE_FILTERS_PER_CONNECTION:
            raise _limit_error(subscription, "asking_filters", REMOTE_FILTERS_PER_CONNECTION)


class UnindexedFilters:
    """Counts, by network, the groups whose filters no index serves."""

    def __init__(self) -> None:
        self._groups_by_network: dict[str, Counter[Group]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups_by_network)

    def add(self, subscription: Subscription, group: Group) -> None:
        """Count a subscription of such a group; ``SubscriptionLimitError`` for too many."""
        own = {
            earlier.group
            for earlier in _submitted_before(subscription)
            if earlier.group and earlier.group.is_unindexed
        }
        if group not in own and len(own) >= UNINDEXED_FILTERS_PER_CONNECTION:
            raise _limit_error(subscription, "unindexed_filters", UNINDEXED_FILTERS_PER_CONNECTION)
        of_network = self._groups_by_network.setdefault(subscription.connection.network, Counter())
        if group not in of_network and len(of_network) >= UNINDEXED_FILTERS_PER_ADDRESS:
            limit = "unindexed_filters_of_address"
            raise _limit_error(subscription, limit, UNINDEXED_FILTERS_PER_ADDRESS)
        of_network[group] += 1

    def remove(self, subscription: Subscription, group: Group) -> None:
        """Undo ``add``."""
        network = subscription.connection.network
        groups = self._groups_by_network[network]
        groups[group] -= 1
        if not groups[group]:
            del groups[group]
        if not groups:
            del self._groups_by_network[network]


def _limit_error(subscription: Subscription, limit: str, maximum: int) -> SubscriptionLimitError:
    topic = subscription.topic.text
    return SubscriptionLimitError(
        f"more than {maximum} {limit}", topic=topic, limit_name=limit, maximum=maximum
    )


def _submitted_before(subscription: Subscription) -> Iterator[Subscription]:
    subscriptions = subscription.connection.subscriptions.values()
    return takewhile(lambda earlier: earlier is not subscription, subscriptions)


def _other_views_before(subscription: Subscription) -> int:
    """Return how many other views than its own were submitted before the first of its own."""
    own, others = _view_options(subscription.topic), {_PLAIN_VIEW}
    for earlier in _submitted_before(subscription):
        view = _view_options(earlier.topic)
        if view == own or len(others) > VIEWS_PER_CONNECTION:
            break
        others.add(view)
    return len(others) - 1


def _view_options(topic: Topic) -> tuple[str, str]:
    return topic.query.get("fields", ""), topic.query.get("expand", "")
