"""How long questions of clients' filters may take while others wait for the answers."""

from __future__ import annotations

SHORT_SECONDS = 0.1
"""For all filters of a slice together, and once more for the question that it ends in: many times
what most take, and hardly a delay that people see."""


class Allowance:
    """What Postgres may take for some questions.

    Args:
        is_short: Whether others wait. If not, nothing but the time-out of each statement counts.

    Attributes:
        is_short: As given.
        used: Seconds that Postgres took.
    """

    def __init__(self, *, is_short: bool) -> None:
        self.is_short = is_short
        self.used = 0.0

    def is_spent(self) -> bool:
        """Whether nobody waits for what hasn't been answered yet; it changes between awaits."""
        return self.is_short and self.used >= SHORT_SECONDS

    def use(self, seconds: float) -> None:
        """Take note that a question took so long."""
        self.used += seconds

    def spend(self) -> None:
        """Take note that a question takes longer than all may."""
        self.used = max(self.used, SHORT_SECONDS)
