"""Slows down callers who guess hidden values by the time that lists without items take.

PocketBase's measure: from the fourth list without items within three seconds on, answers to the
same address about the same collection are delayed by a random time.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Final

_WINDOW_SECONDS: Final = 3.0
_FREE_GUESSES: Final = 3
_MAX_DELAY_SECONDS: Final = 0.499
_MAX_KEYS: Final = 20_000
"""Pairs of address and collection remembered; beyond, the one unused for longest is forgotten."""


class GuessThrottle:
    """Counts lists without items by address and collection. Time is an argument."""

    def __init__(self) -> None:
        self._guesses: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        """Monotonic second of the first guess of a window, and how many there were in it."""

    def delay_seconds(self, address: str, collection_name: str, now: float) -> float:
        """Count a list without items; return how long its answer is to be delayed."""
        key = address, collection_name
        began, count = self._guesses.get(key, (now, 0))
        if now - began > _WINDOW_SECONDS:
            began, count = now, 0
        self._guesses[key] = began, count + 1
        self._guesses.move_to_end(key)
        if len(self._guesses) > _MAX_KEYS:
            self._guesses.popitem(last=False)
        return random.uniform(0, _MAX_DELAY_SECONDS) if count >= _FREE_GUESSES else 0.0  # noqa: S311 (not a secret)
