"""How long queries are retried while the database is away: for one outage all of them together.

The executor and the reader of live rows share one ``DatabaseOutage``; readiness asks it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_MAX_RETRY_SECONDS = 10.0
"""A restart takes less; and what waits for an answer delays all that follows it."""
CONNECTION_RETRY_DELAYS = (0.0, 0.1, 0.5, None)
"""Seconds before a query is retried on another connection that may also fail; None: no more."""
_FIRST_RETRY_DELAYS = (0.0, 0.1)
_RETRY_DELAY_SECONDS = 0.5


class DatabaseOutage:
    """Since when no query has been answered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: float | None = None

    @property
    def is_ongoing(self) -> bool:
        """Whether the last query failed because the database was away."""
        return self._since is not None

    def record_answer(self) -> None:
        """Record that the database has answered."""
        self._since = None

    def retry_delays(self) -> Iterator[float | None]:
        """Yield the seconds to wait before another attempt; None after the last one.

        Advance it before each attempt. Once an outage has lasted too long no query waits, until
        the database has answered one.
        """
        # A broken connection says nothing about the next one, so the first attempts follow at once.
        yield from _FIRST_RETRY_DELAYS
        if self._since is None:
            self._since = self._clock()
        while self._clock() - self._since < _MAX_RETRY_SECONDS:
            yield _RETRY_DELAY_SECONDS
        yield None
