"""Caches of what is compiled of texts that anybody may submit: bounded in what they weigh.

A number of entries bounds nothing when one entry is a thousand times another: a filter of 2 KB over
six joins is 1.8 MB once it is compiled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class WeightedCache(Generic[K, V]):
    """What was made; what was not used for longest goes first.

    Args:
        max_weight: Of the weights together. What alone weighs more is kept until the next comes.
    """

    def __init__(self, max_weight: int) -> None:
        self._max_weight = max_weight
        self._total_weight = 0
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, make: Callable[[], tuple[V, int]]) -> V:
        """Return what the key stands for.

        Args:
            key: What it was made of.
            make: Makes it, and says what it weighs.
        """
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            return entry[0]
        entry = self._entries[key] = make()
        self._total_weight += entry[1]
        while self._total_weight > self._max_weight and len(self._entries) > 1:
            _, (_, weight) = self._entries.popitem(last=False)
            self._total_weight -= weight
        return entry[0]


def cached_per_object(make: Callable[[K], V]) -> Callable[[K], V]:
    """Return the function, remembering each result as long as there is what it was made of."""
    made: WeakKeyDictionary[K, V] = WeakKeyDictionary()

    def found(of: K) -> V:
        result = made.get(of)
        if result is None:
            result = made[of] = make(of)
        return result

    return found
