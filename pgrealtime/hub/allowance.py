"""How long questions of clients' filters may take while others wait for the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgrealtime.rules.decide import Testing
from pgrealtime.turns import TurnQueue

if TYPE_CHECKING:
    from pgrealtime.hub.match import Group

SHORT_SECONDS = 0.1
"""For all filters of a slice together, and once more for the question that it ends in: many times
what most take, and hardly a delay that people see."""


_EACH = 500.0
"""Units of work, a microsecond each, that one filter may take for one row where others wait."""
_ALL = 20_000.0
"""That all filters may take for a slice, and for each of its changes ``_PER_CHANGE`` more."""
_PER_CHANGE = 2_000.0
_EACH_APART = 5_000.0
"""That one filter may take for one row where nobody waits; then Postgres is asked."""


class Allowance:
    """What clients' filters may take of this process and of Postgres, for some changes.

    Args:
        is_short: Whether others wait. If not, nothing but the time-out of each statement counts.
        testing: What they may take in the process; None is no bound.
        queue: Where work in the process takes its turns; None is with everybody.
        whose: From whose network it is there.

    Attributes:
        is_short: As given.
        used: Seconds that Postgres took.
    """

    def __init__(
        self,
        *,
        is_short: bool,
        testing: Testing[Group] | None = None,
        queue: TurnQueue | None = None,
        whose: str = "",
    ) -> None:
        self.is_short = is_short
        self.used = 0.0
        self.testing: Testing[Group] = testing or Testing()
        self.queue = queue
        self.whose = whose

    @classmethod
    def for_all(cls, changes: int) -> Allowance:
        """Return that of a slice which is judged for everybody."""
        left = _ALL + _PER_CHANGE * changes
        return cls(is_short=True, testing=Testing(each=_EACH, left=left, is_shared=True))

    @classmethod
    def for_one(cls, *, is_short: bool) -> Allowance:
        """Return that of a connection which reads on by itself."""
        return cls(is_short=is_short, testing=Testing(each=_EACH, is_shared=True))

    @classmethod
    def apart(cls, queue: TurnQueue, whose: str, *, is_short: bool) -> Allowance:
        """Return that of a connection whose filters kept others waiting."""
        testing: Testing[Group] = Testing(each=_EACH_APART)
        return cls(is_short=is_short, testing=testing, queue=queue, whose=whose)

    def is_spent(self) -> bool:
        """Whether nobody waits for what hasn't been answered yet; it changes between awaits."""
        return self.is_short and self.used >= SHORT_SECONDS

    def use(self, seconds: float) -> None:
        """Take note that a question took so long."""
        self.used += seconds

    def spend(self) -> None:
        """Take note that a question takes longer than all may."""
        self.used = max(self.used, SHORT_SECONDS)
