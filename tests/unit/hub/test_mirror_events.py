"""Which events follow from two verdicts on a row, where one of them isn't known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from pgrealtime.changes import Transaction
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.evaluation.mirrors import ImageVerdicts, row_images, with_mirror_events
from pgrealtime.hub.events.event import Event, transaction_events
from pgrealtime.lsn import LSN, Xid
from pgrealtime.rules.engine.evaluation import Evaluation
from tests.unit.hub.harness import COLLECTIONS
from tests.unit.hub.test_mirrors import renamed

ANN = cast("Group", "ann")
"""A group is compared by identity alone."""


def evaluation(unknown: Sequence[Iterable[Group]]) -> Evaluation[int, Group]:
    rows = {
        index: SimpleNamespace(members_missing_columns=frozenset(groups), unreached_entries=())
        for index, groups in enumerate(unknown)
    }
    return cast("Evaluation[int, Group]", SimpleNamespace(rows=rows))


@pytest.mark.parametrize(
    ("before", "after", "told", "is_undecided"),
    [
        ("seen", "seen", ["update"], False),
        ("unseen", "seen", ["create"], False),
        ("seen", "unseen", ["delete"], False),
        ("unseen", "unseen", [], False),
        # What it had doesn't matter: it is sent the whole row.
        ("unknown", "seen", ["update"], False),
        ("unknown", "unseen", [], True),
        ("unknown", "unknown", [], True),
        ("unseen", "unknown", [], True),
        # A row that may still be seen is not taken away.
        ("seen", "unknown", [], True),
    ],
)
def test_what_a_group_is_told_of_a_row(
    before: str,
    after: str,
    told: list[str],
    is_undecided: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    update = renamed("a", "x", "y")
    made = Transaction(Xid(3), LSN(8), 0, (update,), 100)
    (event,) = transaction_events(made, COLLECTIONS)
    assert isinstance(event, Event)
    images = row_images([event], {"posts": frozenset({"title"})})
    # The new image comes first.
    verdicts = ImageVerdicts(
        [[ANN] if known == "seen" else [] for known in (after, before)],
        [evaluation([[ANN] if known == "unknown" else [] for known in (after, before)])],
    )
    result = with_mirror_events([event], [()], images, verdicts)

    events = zip(result.events, result.hits, strict=True)
    assert [one.action for one, groups in events if ANN in groups] == told
    assert (ANN in result.undecided) == is_undecided
