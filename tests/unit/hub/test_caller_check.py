"""What can't be read of a caller is no proof that it is who the stream says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from psycopg import sql

from pgrealtime.hub.caller_check import CallerCheck
from pgrealtime.hub.event import Event
from pgrealtime.hub.expansion import Plan, Viewer
from pgrealtime.hub.row_history import RowHistory
from pgrealtime.lsn import LSN, Cursor, Xid
from tests.unit.hub.room import COLLECTIONS, NoRows, open_room
from tests.unit.hub.test_identity import caller, listening


class Unanswered(NoRows):
    """A reading whose query failed, of a time that the stream hasn't told of."""

    reach = LSN(1_000_000)

    async def texts(self, _statement: sql.Composed, _params: Mapping[str, object]) -> None:  # type: ignore[override]
        return None


class AskingPlan(Plan):
    """An ``expand`` whose rules ask who the subscriber is."""

    asks_caller = True


EVENT = Event(COLLECTIONS["posts"], "update", "p", {"id": "p"}, Cursor(LSN(8), 1), Xid(3))


def viewer_of(plan: Plan, own: tuple[str, str] | None = None) -> Viewer:
    return Viewer(plan=plan, sees_hidden=False, own=own, seen={}, managed={})


@pytest.mark.parametrize(
    ("viewer", "is_asking"),
    [
        pytest.param(viewer_of(AskingPlan((), {}, ())), True, id="rules ask"),
        pytest.param(viewer_of(Plan((), {}, ()), ("people", "ann")), True, id="own address"),
        pytest.param(viewer_of(Plan((), {}, ())), False, id="anybody may see it"),
    ],
)
async def test_who_cannot_be_read_is_shown_nothing_that_depends_on_who_that_is(
    viewer: Viewer, *, is_asking: bool
) -> None:
    async with open_room() as room:
        connection, _ = await listening(room, "posts/*", who=caller())
        connection.subscriptions["posts/*"].viewer = viewer
        hub = room.hub
        check = CallerCheck(
            hub._identities,
            hub._course.meaning,
            RowHistory(room.changelog),
            events=[EVENT],
            connections=lambda _viewers, _groups: [connection],
        )
        await check(Unanswered(), [viewer], [])
        assert check.outdated == ({connection: {viewer}} if is_asking else {})
        assert (check.checked is not None) == is_asking
