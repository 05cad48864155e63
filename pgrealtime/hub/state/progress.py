"""How far the dispatcher is and the generation it evaluates by; read by all parts of the hub."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from pgrealtime.lsn import Cursor

if TYPE_CHECKING:
    from pgrealtime.hub.state.generation import Generation


class DispatchProgress:
    """The dispatcher's head, the generation in force and the revision."""

    def __init__(self, head: Cursor, generation: Generation) -> None:
        self.head = head
        """Everything up to here was delivered to the LIVE connections."""
        self.evaluation_target = head
        """Everything up to here was evaluated for them, or is being evaluated."""
        self.generation = generation
        self.revision = 0
        """Counts generations and histories. Code that awaits compares it with the one read
        before, and discards results of an older one."""
        self.is_evaluating = False
        """Whether a slice is being evaluated. The groups of a connection that becomes LIVE
        during that time are not among those evaluated."""
        self._deferred: deque[Callable[[], None]] = deque()

    def begin_slice(self, end_cursor: Cursor) -> None:
        """Begin the evaluation of a slice."""
        self.evaluation_target, self.is_evaluating = end_cursor, True

    def advance(self, head: Cursor) -> None:
        """Move the head."""
        self.head = head

    def restart(self, head: Cursor) -> None:
        """Continue from a head that the slice being evaluated, if any, does not lead to."""
        self.head = self.evaluation_target = head

    def replace_generation(self, generation: Generation) -> None:
        """Evaluate by another generation from now on; no slice may be in progress."""
        self.generation = generation
        self.revision += 1

    def begin_history(self, head: Cursor) -> None:
        """Begin another history at a head."""
        self.revision += 1
        self.restart(head)

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Run the callback at once, or after the slice being evaluated."""
        if self.is_evaluating:
            self._deferred.append(callback)
        else:
            callback()

    def end_evaluation(self) -> None:
        """Run the callbacks deferred until no slice is being evaluated."""
        self.is_evaluating = False
        while self._deferred:
            self._deferred.popleft()()
