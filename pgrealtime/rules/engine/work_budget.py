"""Bounds of the work that rules and filters may do in the process for the rows of one batch.

Work is counted by ``rules.memory.compare.WORK_BUDGET`` while a test runs. ``RowEvaluation`` sets
that budget for each member; the evaluator and ``rule_queries`` make the ``FilterWorkBudget``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pgrealtime.rules.engine.index import Member
from pgrealtime.rules.memory.compare import WORK_BUDGET

M = TypeVar("M", bound=Member)

MAX_RULE_WORK = 20_000.0
"""Units of ``WORK_BUDGET`` that a rule may use for one row; beyond, PostgreSQL is faster."""
_WORK_PER_TEST = 2.0
"""Units that any test counts for."""


@dataclass(slots=True, eq=False)
class FilterWorkBudget(Generic[M]):
    """Limits the work of clients' filters for the rows of a batch. Rules are not limited here.

    One filter may use ``work_per_filter`` units of ``WORK_BUDGET`` for one row, all filters
    ``total_work`` for all rows. If ``is_shared``, other connections wait for the batch: a filter
    that uses more is late, and its members must be evaluated again, apart. If not, PostgreSQL is
    asked.

    Attributes:
        late_members: Members whose filter used more, or was not run as nothing was left.
        costly_members: Those of them whose own filter used more.
    """

    work_per_filter: float = math.inf
    total_work: float = math.inf
    is_shared: bool = False
    late_members: dict[M, None] = field(default_factory=dict)
    costly_members: dict[M, None] = field(default_factory=dict)
    work_used: float = 0.0

    def may_test(self, member: M) -> bool:
        """Whether a member's filter is run; a member that may not is late from now on."""
        if self.work_used >= self.total_work:
            self.late_members[member] = None
        return member not in self.late_members

    def record_work(self, member: M) -> bool:
        """Add what the member's filter has used of ``WORK_BUDGET``; return whether it is late."""
        self.work_used += _WORK_PER_TEST
        if self.work_per_filter < math.inf:
            self.work_used += self.work_per_filter - WORK_BUDGET.units_left
        if WORK_BUDGET.units_left >= 0 or not self.is_shared:
            return False
        self.late_members[member] = self.costly_members[member] = None
        return True
