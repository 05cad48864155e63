"""What clients' filters may take of this process and of PostgreSQL for one slice.

While others wait for a slice, all filters together have one ``FilterBudget``. A connection whose
filter exceeds it is isolated: it reads on from the changelog by itself, with a budget of its own
(``hub.state.isolation``), and is no part of the slices that are evaluated for all.
"""

from __future__ import annotations

from pgrealtime.fairness import FairLock, YieldTimer
from pgrealtime.hub.connections.connection import Group
from pgrealtime.rule_queries.slow_queries import SLICE_FILTER_SECONDS, TimeBudget
from pgrealtime.rules.engine.evaluation import Evaluation
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

    Args:
        is_limited: Whether others wait. If not, each statement has the whole statement timeout.
        work_budget: What the filters may take in the process; None is no bound.
        work_lock: Serializes the work in the process among connections; None if it is done for all
            connections at once.
        network: The client network that takes turns on ``work_lock``.
        max_seconds: Of PostgreSQL, if others wait.
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
