"""Whether rows are what the catalogue says of their tables.

A row may be of an earlier or a later definition than the one that rules and records are made for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pgrealtime.changes import Shape, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.rules.engine.before_state import tables_of

_KEPT = 10_000
_UNREAD_SECONDS = 5.0
"""A catalogue that could not be read isn't read again before that: events wait for it."""


class Shapes:
    """The shapes that were seen since the collections came into force.

    Args:
        collections: Those in force; rows of the junctions between them count as well.
        clock: Monotonic seconds.
    """

    def __init__(
        self, collections: Collections, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tables = tables_of(collections)
        self._fitting: set[Shape] = set()
        self._unfit: set[Shape] = set()
        self._unread: dict[Shape, float] = {}
        """Those that would fit if nothing has changed, and until when nobody asks again."""
        self._clock = clock

    def is_doubtful(self, transaction: Transaction) -> bool:
        """Whether the catalogue must be read before anything is made of the transaction's rows."""
        shapes = transaction.shapes
        if self._fitting.issuperset(shapes):
            return False
        return any(self._is_doubtful(shape) for shape in shapes)

    def fits(self, transaction: Transaction) -> bool:
        """Whether its rows can be judged and shown by the collections in force."""
        shapes = transaction.shapes
        return self._fitting.issuperset(shapes) or all(map(self._fits, shapes))

    def settle(self, transaction: Transaction, *, is_read: bool, is_stale: bool = False) -> None:
        """Take note that waiting can't tell more about the transaction's rows.

        Args:
            transaction: One that was doubtful.
            is_read: Whether the catalogue was read since it became visible.
            is_stale: Whether it is known to say something else than what is in force.
        """
        for shape in transaction.shapes:
            is_open = self._is_doubtful(shape) or shape in self._unread
            if is_open or (is_stale and not is_read):
                self._fitting.discard(shape)
                self._settle(shape, is_read=is_read)

    def _settle(self, shape: Shape, *, is_read: bool) -> None:
        is_matching = self._matches(shape)
        self._unread.pop(shape, None)
        if is_matching and not is_read:
            self._make_room()
            self._unread[shape] = self._clock() + _UNREAD_SECONDS
        else:
            self._keep(shape, is_fit=is_matching)

    def _is_doubtful(self, shape: Shape) -> bool:
        if shape in self._fitting or shape in self._unfit:
            return False
        if shape in self._unread:
            return self._clock() >= self._unread[shape]
        return shape.described > 0 or not self._fits(shape)

    def _fits(self, shape: Shape) -> bool:
        if shape in self._fitting:
            return True
        if shape in self._unfit or shape in self._unread or not self._matches(shape):
            return False
        if shape.described <= 0:
            self._keep(shape, is_fit=True)
        return True

    def _keep(self, shape: Shape, *, is_fit: bool) -> None:
        self._make_room()
        (self._fitting if is_fit else self._unfit).add(shape)

    def _make_room(self) -> None:
        if len(self._fitting) + len(self._unfit) + len(self._unread) >= _KEPT:
            self._fitting.clear()
            self._unfit.clear()
            self._unread.clear()

    def _matches(self, shape: Shape) -> bool:
        """Whether the catalogue has such rows, apart from columns only added or only dropped.

        A name that is unknown beside one that is missing may be a column renamed; and a partition
        that isn't there was detached, its rows are no longer the table's.
        """
        table = self._tables.get(shape.table)
        if table is None:
            return True
        if shape.leaf is not None and shape.leaf not in table.leaves:
            return False
        types = {column.name: column.type.oid for column in table.columns}
        names = {name for name, _ in shape.columns}
        is_any_missing = any(
            column.name not in names for column in table.columns if not column.is_generated
        )
        if is_any_missing and not names <= types.keys():
            return False
        return all(types.get(name, oid) == oid for name, oid in shape.columns)
