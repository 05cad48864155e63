"""What deletes are judged against; that it is right is proved by cascades on a server."""

from __future__ import annotations

from typing import cast

from pgrealtime.changes import Change, TableName
from pgrealtime.rules.past import Pasts

POSTS, NOTES = TableName("public", "posts"), TableName("public", "notes")


class CountingChange:
    """Counts how often it is looked at."""

    looks = 0

    @property
    def table(self) -> TableName:
        self.looks += 1
        return POSTS


def test_a_transaction_is_not_looked_through_before_somebody_asks_and_then_once() -> None:
    """Most deletes are judged by their rows alone, some at a time of very many."""
    change = CountingChange()
    changes = (cast("Change", change),)
    pasts = Pasts({})
    for _ in range(3):
        assert pasts.of(changes).overlays([]) == ()
    assert change.looks == 0
    for _ in range(3):
        assert pasts.of(changes).overlays([NOTES]) == ()
    assert change.looks == 1
