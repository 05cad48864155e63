"""A few rows put to subscribers that were found otherwise than by what the rows hold.

Who hears of an event is found by the index (``match``). That one may see a related record, or an
address that isn't public, is asked for those alone whom it concerns. Pure, like a ``Judging``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.lsn import Xid
from pgrealtime.rules.engine.batch_query import Inquiry
from pgrealtime.rules.engine.before_state import Past
from pgrealtime.rules.engine.evaluation import Case, Deciding
from pgrealtime.rules.engine.formula import Facts, Moment
from pgrealtime.rules.engine.plan import Bound

_NOTHING: frozenset[Bound] = frozenset()

P = TypeVar("P", bound=Hashable)
"""What rows are told apart by."""


class Looking(Generic[P]):
    """Rows, and what is asked of each.

    Args:
        at: What macros mean.
        xids: The transactions that must be visible to whoever answers.
    """

    def __init__(self, at: Moment, xids: frozenset[Xid] = frozenset()) -> None:
        self.xids = xids
        self._at = at
        self._cases: dict[P, Case[Bound]] = {}
        self._deciding: Deciding[Bound] | None = None

    def consider(
        self,
        place: P,
        collection: Collection,
        row: Row,
        bounds: Iterable[Bound],
        past: Past | None = None,
    ) -> None:
        """Ask whether the row satisfies each; before anything is put.

        Args:
            place: Of the row; the same row may come again for others.
            collection: Whose row it is.
            row: Its image.
            bounds: What is asked.
            past: What related tables were like; None is as they are.
        """
        case = self._cases.get(place)
        if case is None:
            missing = collection.column_names.difference(row)
            case = self._cases[place] = Case(Facts(row, missing, self._at), past)
        case.consider(bounds)

    def admitted(self, place: P) -> AbstractSet[Bound]:
        """Return what the row satisfies; complete once nothing is left to ask."""
        case = self._cases.get(place)
        return _NOTHING if case is None else case.hits.keys()

    def inquiries(self) -> list[Inquiry]:
        """Return what Postgres must be asked now; nothing if all is decided."""
        if self._deciding is None:
            self._deciding = Deciding(list(self._cases.values()), self._at)
        return self._deciding.inquiries()

    def resume(self) -> None:
        """Go on when the inquiries have been put; what has no answer is denied."""
        assert self._deciding is not None
        self._deciding.resume()
