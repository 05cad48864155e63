"""Limits how often a password may be guessed. Used by ``auth.login``; time is an argument."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

RateKey: TypeAlias = tuple[str, ...]
"""Network and identity, or network and account."""

_MAX_KEYS = 20_000
"""Keys remembered, some megabytes. Beyond, the one unused for longest is forgotten: an attacker
needs as many networks or identities to reset the key of another account."""


class RateLimiter:
    """A token bucket for each key: ``per_minute`` attempts when full, and refilled in a minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._used: OrderedDict[RateKey, tuple[float, float]] = OrderedDict()
        """Attempts used, and the monotonic second for which that was computed."""

    def try_acquire(self, key: RateKey, now: float) -> bool:
        """Use one attempt of the key; False if none is left. ``now`` is monotonic seconds."""
        # Counted before the result is known, so that parallel attempts count too.
        used, since = self._used.get(key, (0.0, now))
        used = max(0.0, used - (now - since) * self._per_minute / 60.0)
        is_admitted = used + 1.0 <= self._per_minute
        self._used[key] = (used + 1.0 if is_admitted else used, now)
        # After a refusal too: hammering keeps the key from being forgotten.
        self._used.move_to_end(key)
        if len(self._used) > _MAX_KEYS:
            self._used.popitem(last=False)
        return is_admitted

    def reset(self, key: RateKey) -> None:
        """Refill the key's bucket, after the right password."""
        self._used.pop(key, None)
