"""What can't be read of a caller is no proof that it is who the stream says."""

from __future__ import annotations

from collections.abc import Mapping

from psycopg import sql

from pgrealtime.hub.caller_check import CallerCheck
from pgrealtime.hub.expansion import Plan, Viewer
from pgrealtime.lsn import LSN
from tests.unit.hub.room import NoRows, open_room
from tests.unit.hub.test_identity import caller, listening


class Unanswered(NoRows):
    """A reading whose query failed."""

    async def texts(self, _statement: sql.Composed, _params: Mapping[str, object]) -> None:  # type: ignore[override]
        return None


class AskingPlan(Plan):
    """An ``expand`` whose rules ask who the subscriber is."""

    asks_caller = True


async def test_who_cannot_be_read_is_shown_nothing_that_is_read_live() -> None:
    async with open_room() as room:
        connection, _ = await listening(room, "posts/*", who=caller())
        viewer = Viewer(
            plan=AskingPlan((), {}, ()), sees_hidden=False, own=None, seen={}, managed={}
        )
        connection.subscriptions["posts/*"].viewer = viewer
        hub = room.hub
        check = CallerCheck(
            hub._identities,
            hub._course.meaning,
            is_told=lambda _reach: False,
            connections=lambda _viewers, _groups: [(connection, connection.cursor)],
            commit=LSN(0),
        )
        await check.check_viewers(Unanswered(), [viewer])
        assert check.outdated == {connection: {viewer}}
