"""Connections whose slow filters are evaluated for each of them alone."""

from collections.abc import Callable, Iterable, Sequence

import structlog

from pgrealtime.fairness import FairLock
from pgrealtime.hub.connections.connection import Connection, Group, connections_of
from pgrealtime.hub.evaluation.filter_limits import WORK_PER_FILTER, FilterBudget
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.rule_queries.slow_queries import SLICE_FILTER_SECONDS, CircuitBreakers
from pgrealtime.rules.engine.work_budget import FilterWorkBudget

log = structlog.get_logger(__name__)

_QUICK_SECONDS = SLICE_FILTER_SECONDS / 2
"""What a connection's filters take at most to be evaluated with those of others. All share the time
of a slice, and a filter that takes most of it alone would exceed it there again and again."""
_WORK_ISOLATED = 5_000.0
"""Units of work, a microsecond each, that an isolated filter may take for one row; then PostgreSQL
evaluates it."""


class IsolatedConnections:
    """Connections whose filters are evaluated for each of them alone.

    ``Connection.is_isolated`` says which; the matcher sets it, and these methods alone have it set.
    A connection rejoins the others once it has caught up, unless its filters were slow even when it
    was alone: then not before its breaker closes.
    """

    def __init__(self, progress: DispatchProgress, clock: Callable[[], float]) -> None:
        self._progress = progress
        self._breakers: CircuitBreakers[Connection] = CircuitBreakers(clock)
        self._work_lock = FairLock()
        """Held by the one of them whose filters are evaluated in this process."""

    def isolate(self, connection: Connection) -> None:
        """Evaluate its filters for it alone, from the next slice on."""
        self._progress.generation.matcher.set_isolated(connection, is_isolated=True)

    def with_untried_filters(self, events: Iterable[Event]) -> dict[Connection, None]:
        """Return the connections whose filters must not be evaluated with others for some events.

        These query PostgreSQL, few connections use them, and they were not quick yet while no other
        connection waited.
        """
        collections = {event.collection.name for event in events}
        return connections_of(self._progress.generation.matcher.trials.untried_groups(collections))

    def isolate_with_backoff(self, connection: Connection) -> None:
        """Isolate a connection whose filter took too long in this process while others waited."""
        self.isolate(connection)
        # The first times it may rejoin at once; then it stays isolated for a while.
        self._record_timeout(connection, is_tolerated=True)

    def try_rejoin(self, connection: Connection) -> bool:
        """Evaluate its filters with those of others, unless its breaker is open; return whether."""
        if self._breakers.is_open(connection):
            return False
        self._progress.generation.matcher.set_isolated(connection, is_isolated=False)
        return True

    def budget_for(self, connection: Connection, *, is_limited: bool) -> FilterBudget:
        """Return the time budget of its filters for the slice that it reads next.

        A limited one is an attempt to see if its filters are quick now.
        """
        is_limited = is_limited and not self._breakers.is_open(connection)
        work: FilterWorkBudget[Group]
        if not connection.is_isolated:
            work = FilterWorkBudget(work_per_filter=WORK_PER_FILTER, is_shared=True)
            return FilterBudget(is_limited=is_limited, work_budget=work)
        work, lock = FilterWorkBudget(work_per_filter=_WORK_ISOLATED), self._work_lock
        network = connection.network
        return FilterBudget(
            is_limited=is_limited, work_budget=work, work_lock=lock, network=network
        )

    def record_usage(
        self, connection: Connection, budget: FilterBudget, events: Sequence[Event]
    ) -> bool:
        """Isolate a connection whose filters were slow; return whether to lift their limit."""
        if budget.work_budget.late_members:
            self.isolate(connection)
        if budget.used_seconds < SLICE_FILTER_SECONDS:
            if budget.used_seconds < _QUICK_SECONDS:
                self._record_quick(connection, events)
            return False
        # So much for each change, as the dispatcher's slices often have a single one.
        if budget.used_seconds < SLICE_FILTER_SECONDS * len({event.cursor for event in events}):
            return False
        self.isolate(connection)
        if not budget.is_limited:
            self._record_timeout(connection, is_tolerated=False)
        return budget.is_limited

    def _record_quick(self, connection: Connection, events: Iterable[Event]) -> None:
        if not self._progress.generation.matcher.has_remote_filters:
            return
        collections = {event.collection.name for event in events}
        groups = (subscription.group for subscription in connection.subscriptions.values())
        filters = {group.specialization for group in groups if group}
        self._progress.generation.matcher.trials.record_quick(
            one for one in filters if one.has_remote_filter and one.collection.name in collections
        )

    def _record_timeout(self, connection: Connection, *, is_tolerated: bool) -> None:
        was_open = self._breakers.is_open(connection)
        seconds = self._breakers.record_timeout(connection, is_tolerated=is_tolerated)
        if seconds and not was_open:  # a thousand may be slow at each change
            log.info("connection.isolated", connection=connection.id, seconds=seconds)
