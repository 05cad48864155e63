"""How often a password may be guessed. Keeps state, touches nothing outside."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

RateKey: TypeAlias = tuple[str, ...]
"""Network and identity, or network and account."""

_MAX_KEYS = 20_000
"""Of those that are remembered; the one not seen for longest is forgotten first: some megabytes."""


class RateLimiter:
    """A bucket of attempts for each of those who try, filling up steadily.

    Args:
        per_minute: What a full bucket holds, and what flows in within a minute.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._used: OrderedDict[RateKey, tuple[float, float]] = OrderedDict()

    def try_acquire(self, key: RateKey, now: float) -> bool:
        """Take one attempt, before it is known how it ends; False if there is none left.

        Args:
            key: Who tries, and as whom.
            now: Monotonic seconds.
        """
        used, since = self._used.get(key, (0.0, now))
        used = max(0.0, used - (now - since) * self._per_minute / 60.0)
        is_admitted = used + 1.0 <= self._per_minute
        self._used[key] = (used + 1.0 if is_admitted else used, now)
        self._used.move_to_end(key)
        if len(self._used) > _MAX_KEYS:
            self._used.popitem(last=False)
        return is_admitted

    def reset(self, key: RateKey) -> None:
        """Give all attempts back to one who knew the password."""
        self._used.pop(key, None)
