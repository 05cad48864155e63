"""A few rows put to subscribers that were found otherwise than by what the rows hold.

Who hears of an event is found by the index (``match``). That one may see a related record, or an
address that isn't public, is asked for those alone whom it concerns. Pure, like a
``EventEvaluation``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.lsn import Xid
from pgrealtime.rules.engine.batch_query import Question
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.evaluation import Evaluation, RowEvaluation
from pgrealtime.rules.engine.formula import MacroValues, RowVerdicts
from pgrealtime.rules.engine.plan import BoundPredicate

_NO_HITS: frozenset[BoundPredicate] = frozenset()

RowKey = TypeVar("RowKey", bound=Hashable)
"""What rows are told apart by."""


class PointEvaluation(Generic[RowKey]):
    """Rows, and what is asked of each.

    Args:
        macro_values: What macros mean.
        xids: The transactions that must be visible to whoever answers.
    """

    def __init__(self, macro_values: MacroValues, xids: frozenset[Xid] = frozenset()) -> None:
        self.xids = xids
        self._macro_values = macro_values
        self._rows: dict[RowKey, RowEvaluation[BoundPredicate]] = {}
        self._evaluation: Evaluation[BoundPredicate] | None = None

    def add(
        self,
        row_key: RowKey,
        collection: Collection,
        row: Row,
        predicates: Iterable[BoundPredicate],
        before_state: BeforeState | None = None,
    ) -> None:
        """Ask whether the row satisfies each; before anything is put.

        Args:
            row_key: Of the row; the same row may come again for others.
            collection: Whose row it is.
            row: Its image.
            predicates: What is asked.
            before_state: What related tables were like; None is as they are.
        """
        case = self._rows.get(row_key)
        if case is None:
            missing = collection.column_names.difference(row)
            case = self._rows[row_key] = RowEvaluation(
                RowVerdicts(row, missing, self._macro_values), before_state
            )
        case.evaluate_members(predicates)

    def satisfied_predicates(self, row_key: RowKey) -> AbstractSet[BoundPredicate]:
        """Return what the row satisfies; complete once nothing is left to ask."""
        case = self._rows.get(row_key)
        return _NO_HITS if case is None else case.hits.keys()

    def questions(self) -> list[Question]:
        """Return what Postgres must be asked now; nothing if all is decided."""
        if self._evaluation is None:
            self._evaluation = Evaluation(list(self._rows.values()), self._macro_values)
        return self._evaluation.questions()

    def resume(self) -> None:
        """Go on when the inquiries have been put; what has no answer is denied."""
        assert self._evaluation is not None
        self._evaluation.resume()
