"""Bounds on questions that PostgreSQL answers slowly: a time budget, and circuit breakers.

A ``TimeBudget`` bounds all questions that others wait for. A question of a rule or filter that runs
into the operator's ``statement_timeout`` again and again is not asked for a while
(``CircuitBreakers``). The question loop (``rounds``) and the read sessions obey both; the hub
derives the budget of clients' filters from ``TimeBudget`` (``hub.evaluation.filter_limits``) and
keeps breakers of its own for connections (``hub.state.isolation``).
"""

from collections.abc import Callable, Hashable, MutableMapping
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from msgspec import Struct

SLICE_FILTER_SECONDS = 0.01
"""Seconds of PostgreSQL for all filters of a slice together; the question during which they run out
gets as long again. Most slices take far less, and it is not much more than a slice takes without
filters."""

_TOLERATED_TIMEOUTS = 3
"""Enough to find the row that is the cause: a question that times out is split by row."""
_FIRST_OPEN_SECONDS = 5.0
_LONGEST_OPEN_SECONDS = 600.0
_RESET_SECONDS = 600.0
"""The count of a subject without a timeout for so long begins at 0 again."""

Q = TypeVar("Q", bound=Hashable)
"""What timeouts are counted for; it is referred to weakly."""


class TimeBudget:
    """Seconds that PostgreSQL may take for some questions while others wait.

    If none wait, it is not limited: each statement has the whole statement timeout.
    """

    def __init__(
        self, *, is_limited: bool = False, max_seconds: float = SLICE_FILTER_SECONDS
    ) -> None:
        self.is_limited = is_limited
        self.max_seconds = max_seconds
        self.used_seconds = 0.0

    def is_spent(self) -> bool:
        """Whether what isn't answered yet must not be waited for."""
        # Not a property: the value changes between awaits, which mypy would not see.
        return self.is_limited and self.used_seconds >= self.max_seconds

    def spend(self, seconds: float) -> None:
        """Count the seconds that a question took."""
        self.used_seconds += seconds

    def exhaust(self) -> None:
        """Count a question that took longer than the whole budget."""
        self.used_seconds = max(self.used_seconds, self.max_seconds)


class _Timeouts(Struct):
    count: int = 0
    retry_at: float = 0.0
    """Seconds of the clock."""


class CircuitBreakers(Generic[Q]):
    """Which subjects timed out again and again, and until when each is left out.

    Timeouts are counted over all batches. A success in between doesn't reset the count: a client
    that writes a filter also chooses which rows are slow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timeouts: MutableMapping[Q, _Timeouts] = WeakKeyDictionary()

    def is_open(self, subject: Q) -> bool:
        """Whether the subject is left out now."""
        timeouts = self._timeouts.get(subject)
        return timeouts is not None and self._clock() < timeouts.retry_at

    def has_timed_out(self, subject: Q) -> bool:
        """Whether the subject ever timed out: others are asked before it."""
        return subject in self._timeouts

    def record_timeout(self, subject: Q, *, is_tolerated: bool) -> float:
        """Count a timeout, and open the breaker if there were too many.

        The seconds for which it is open double each time; 0 if it stays closed, as it does for the
        first few timeouts that are tolerated.
        """
        now = self._clock()
        timeouts = self._timeouts.setdefault(subject, _Timeouts(retry_at=now))
        if now - timeouts.retry_at > _RESET_SECONDS:
            timeouts.count = 0
        timeouts.count += 1
        if not is_tolerated:
            timeouts.count = max(timeouts.count, _TOLERATED_TIMEOUTS + 1)
        seconds, doublings = 0.0, timeouts.count - _TOLERATED_TIMEOUTS - 1
        if doublings >= 0:
            seconds = min(_FIRST_OPEN_SECONDS * 2 ** min(doublings, 30), _LONGEST_OPEN_SECONDS)
        timeouts.retry_at = now + seconds
        return seconds
