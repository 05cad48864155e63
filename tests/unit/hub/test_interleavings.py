"""What must hold whatever happens between two steps of the hub: one test per way to go wrong."""

from __future__ import annotations

from tests.unit.hub.room import at, insert, open_room


async def test_who_missed_nothing_comes_back_to_a_quiet_database() -> None:
    """It stands after the last change but before the end of its commit: nothing is left to read.

    Once this made the replay look for more without ever letting another task run.
    """
    async with open_room() as room:
        made = room.commit(insert("a"))
        await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await room.subscribe(connection, "posts/*")
        room.commit(insert("b"))

        assert (await sink.wait_for(2))[1][1] == "posts/*"


async def test_a_position_within_a_commit_but_beyond_its_changes_is_at_its_end() -> None:
    """Anybody can write a position."""
    async with open_room() as room:
        made = room.commit(insert("a"))
        await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 99)}")
        await room.subscribe(connection, "posts/*")
        room.commit(insert("b"))

        assert (await sink.wait_for(2))[1][1] == "posts/*"
