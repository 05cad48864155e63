"""Filters of clients that are slow, in the process or in PostgreSQL: who wrote one waits alone.

While others wait for a slice, all filters together have a ``TimeBudget``. A connection whose filter
exceeds it is isolated: it reads on from the changelog by itself, with a budget of its own, and is
no part of the slices that are evaluated for all (``hub.state.isolation``). So is one whose filter
asks PostgreSQL and was never tried (``trials``), until it was quick alone. A question that runs
into the operator's ``statement_timeout`` again and again, of a rule or a filter, isn't asked for a
while (``CircuitBreakers``, also in ``probe``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakKeyDictionary

from msgspec import Struct

from pgrealtime.fairness import FairLock
from pgrealtime.rules.engine.work_budget import FilterWorkBudget

if TYPE_CHECKING:
    from pgrealtime.hub.connections.connection import Group

SLICE_FILTER_SECONDS = 0.01
"""Of PostgreSQL, for all filters of a slice together, and once more for the question during which
that runs out: many times what most take, and not much more than a slice takes without filters."""
SHARED_FILTER_SECONDS = 0.1
"""The same, for filters that ``trials.MANY_CONNECTIONS`` connections share: hardly a delay that
people
see. A database that is slow for a moment doesn't isolate so many at once."""

WORK_PER_FILTER = 500.0
"""Units of work, a microsecond each, that one filter may take for one row while others wait."""
_WORK_PER_SLICE = 20_000.0
"""That all filters may take for a slice, and for each of its changes ``_WORK_PER_CHANGE`` more."""
_WORK_PER_CHANGE = 2_000.0

_TOLERATED_TIMEOUTS = 3
"""Enough to find the row that is to blame."""
_FIRST_OPEN_SECONDS = 5.0
_LONGEST_OPEN_SECONDS = 600.0
_RESET_SECONDS = 600.0
"""A subject without a timeout for so long begins anew."""

Q = TypeVar("Q", bound=Hashable)
"""What timeouts are counted for; kept by a weak reference."""


class TimeBudget:
    """What clients' filters may take of this process and of PostgreSQL, for some changes.

    Args:
        is_limited: Whether others wait. If not, each statement has the whole timeout.
        work_budget: What they may take in the process; None is no bound.
        queue: Where work in the process takes its turns; None is with everybody.
        network: Whose turns they are.
        max_seconds: Of PostgreSQL, if others wait.

    Attributes:
        is_limited: As given.
        max_seconds: As given.
        used_seconds: Seconds that PostgreSQL took.
    """

    def __init__(
        self,
        *,
        is_limited: bool = False,
        work_budget: FilterWorkBudget[Group] | None = None,
        queue: FairLock | None = None,
        network: str = "",
        max_seconds: float = SLICE_FILTER_SECONDS,
    ) -> None:
        self.is_limited = is_limited
        self.max_seconds = max_seconds
        self.used_seconds = 0.0
        self.work_budget: FilterWorkBudget[Group] = work_budget or FilterWorkBudget()
        self.queue = queue
        self.network = network

    @classmethod
    def for_slice(cls, change_count: int) -> TimeBudget:
        """Return the budget of a slice that is evaluated for all connections."""
        left = _WORK_PER_SLICE + _WORK_PER_CHANGE * change_count
        testing: FilterWorkBudget[Group] = FilterWorkBudget(
            work_per_filter=WORK_PER_FILTER, total_work=left, is_shared=True
        )
        return cls(is_limited=True, work_budget=testing)

    def for_shared_filters(self) -> TimeBudget:
        """Return the budget of filters that many share, once the slice's own is spent."""
        return TimeBudget(
            is_limited=True, work_budget=self.work_budget, max_seconds=SHARED_FILTER_SECONDS
        )

    def is_spent(self) -> bool:
        """Whether what isn't answered yet must not be waited for; it changes between awaits."""
        return self.is_limited and self.used_seconds >= self.max_seconds

    def spend(self, seconds: float) -> None:
        """Count the seconds that a question took."""
        self.used_seconds += seconds

    def exhaust(self) -> None:
        """Count a question that takes longer than all may."""
        self.used_seconds = max(self.used_seconds, self.max_seconds)


class _Timeouts(Struct):
    count: int = 0
    retry_at: float = 0.0
    """Seconds of the clock."""


class CircuitBreakers(Generic[Q]):
    """Subjects that timed out again and again, and until when they are left out.

    Timeouts are counted over all batches. A success in between doesn't reset the count: whoever
    wrote a filter chooses which rows are slow.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timeouts: MutableMapping[Q, _Timeouts] = WeakKeyDictionary()

    def is_open(self, subject: Q) -> bool:
        """Whether it is left out now."""
        timeouts = self._timeouts.get(subject)
        return timeouts is not None and self._clock() < timeouts.retry_at

    def has_timed_out(self, subject: Q) -> bool:
        """Whether it ever did: others are asked first."""
        return subject in self._timeouts

    def record_timeout(self, subject: Q, *, is_tolerated: bool) -> float:
        """Count a timeout, and open the breaker if there were too many.

        Args:
            subject: What timed out.
            is_tolerated: Whether the first few don't open it.

        Returns:
            For how many seconds it is open: twice as long each time; 0 if it stays closed.
        """
        now = self._clock()
        timeouts = self._timeouts.setdefault(subject, _Timeouts(retry_at=now))
        if now - timeouts.retry_at > _RESET_SECONDS:
            timeouts.count = 0
        timeouts.count += 1
        if not is_tolerated:
            timeouts.count = max(timeouts.count, _TOLERATED_TIMEOUTS + 1)
        doublings = timeouts.count - _TOLERATED_TIMEOUTS - 1
        seconds = (
            0.0
            if doublings < 0
            else min(_FIRST_OPEN_SECONDS * 2 ** min(doublings, 30), _LONGEST_OPEN_SECONDS)
        )
        timeouts.retry_at = now + seconds
        return seconds
