"""How long questions are repeated while the database is away: for one outage all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

_MAX_RETRY_SECONDS = 10.0
"""A restart takes less. What waits for answers holds up all that follows it."""
CONNECTION_RETRY_DELAYS = (0.0, 0.1, 0.5, None)
"""Seconds before a question that can do without is put to another connection; None: no more."""
_FIRST_RETRY_DELAYS = (0.0, 0.1)
_RETRY_DELAY_SECONDS = 0.5


class DatabaseOutage:
    """The time since which no question was answered.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: float | None = None

    @property
    def is_ongoing(self) -> bool:
        """Whether the last question failed because the database was away."""
        return self._since is not None

    def record_answer(self) -> None:
        """Note that the database has answered."""
        self._since = None

    def retry_delays(self) -> Iterator[float | None]:
        """Yield the seconds to wait before another attempt; None after the last one.

        To be advanced once per attempt. A broken connection says nothing of the next one, so there
        are a few attempts at once; then one again and again, until the outage has lasted too
        long. After that nobody waits for long until the database has answered.
        """
        yield from _FIRST_RETRY_DELAYS
        if self._since is None:
            self._since = self._clock()
        while self._clock() - self._since < _MAX_RETRY_SECONDS:
            yield _RETRY_DELAY_SECONDS
        yield None
