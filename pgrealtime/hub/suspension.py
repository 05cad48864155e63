"""Questions that ran into the time-out again and again: for how long they aren't put. For probe.

And for aside, of connections: how long they are judged apart when their filters were slow.

A question that is too slow is its own rule's or filter's fault, and everybody whose events are
judged with it waits for it. So its time-outs are counted over all batches; they aren't forgotten
when it is answered in between, for whoever wrote a filter chooses which rows are slow.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from msgspec import Struct

_BORNE = 3
"""Time-outs that are borne, enough to find the row that is to blame."""
_FIRST_SECONDS = 5.0
_LONGEST_SECONDS = 600.0
_FORGOTTEN_SECONDS = 600.0
"""A question that ran into no time-out for so long begins anew."""

Q = TypeVar("Q", bound=Hashable)
"""What is the same in all questions of a kind; kept by a weak reference."""


class _Slowness(Struct):
    timeouts: int = 0
    until: float = 0.0
    """It isn't put before that, in seconds of the clock."""


class Suspensions(Generic[Q]):
    """Which questions aren't put at the moment.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slow: MutableMapping[Q, _Slowness] = WeakKeyDictionary()

    def is_suspended(self, about: Q) -> bool:
        """Whether questions of the kind must not be put now."""
        slowness = self._slow.get(about)
        return slowness is not None and self._clock() < slowness.until

    def is_known(self, about: Q) -> bool:
        """Whether one of the kind ran into the time-out lately: others are put first."""
        return about in self._slow

    def note_timeout(self, about: Q, *, is_borne: bool) -> float:
        """Take note that one ran into the time-out.

        Args:
            about: Its kind.
            is_borne: Whether there is patience left with all questions of the batch together.

        Returns:
            For how many seconds the kind is suspended: each time twice as long; 0 is not at all.
        """
        now = self._clock()
        slowness = self._slow.setdefault(about, _Slowness(until=now))
        if now - slowness.until > _FORGOTTEN_SECONDS:
            slowness.timeouts = 0
        slowness.timeouts += 1
        if not is_borne:
            slowness.timeouts = max(slowness.timeouts, _BORNE + 1)
        times = slowness.timeouts - _BORNE - 1
        seconds = 0.0 if times < 0 else min(_FIRST_SECONDS * 2 ** min(times, 30), _LONGEST_SECONDS)
        slowness.until = now + seconds
        return seconds
