"""What must hold whatever happens between two steps of the hub: one test per way to go wrong."""

from __future__ import annotations

import asyncio

import pytest

from pgrealtime.changes import Insert
from pgrealtime.lsn import LSN
from tests.unit.hub.room import POSTS, Room, at, insert, open_room


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


# Another history, as after a failover: LSNs and transaction ids are used again


def partial(record_id: str) -> Insert:
    """A row that isn't whole: judging it asks the database."""
    return Insert(POSTS, {"id": record_id})


def restart(room: Room, lsn: int, epoch: str = "fedcba") -> None:
    """Another history begins, as the relay finds out."""
    room.hub.stream_lost()
    room.changelog.restart(LSN(lsn))
    room._end = lsn
    room.hub.stream_started(epoch)
    room.hub.wake()


@pytest.mark.parametrize("lsn", [150, 10_000], ids=["lower", "higher"])
async def test_another_history_begins_while_a_slice_is_judged(lsn: int) -> None:
    """The slice is of a past that no longer counts: it moves nothing and nobody hears of it."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        room.database.rows_gate = asyncio.Event()
        room.commit(partial("old"))
        await room.database.is_holding.wait()
        restart(room, lsn)
        room.database.rows_gate.set()
        room.commit(insert("new"))
        events = await sink.wait_for(3)
        await room.settled()

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]
    assert len(sink.events()) == 3


@pytest.mark.parametrize("lsn", [150, 10_000], ids=["lower", "higher"])
async def test_another_history_begins_while_a_replay_is_judged(lsn: int) -> None:
    async with open_room() as room:
        made = room.commit(insert("a"), partial("old"))
        await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        room.database.rows_gate = asyncio.Event()
        await room.subscribe(connection, "posts/*")
        await room.database.is_holding.wait()
        restart(room, lsn)
        room.database.rows_gate.set()
        room.commit(insert("new"))
        events = await sink.wait_for(3)
        await room.settled()

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]
    assert len(sink.events()) == 3


async def test_another_history_begins_while_events_wait_to_be_visible() -> None:
    """Their transactions may never be: they are lost with the history."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        room.hub.gate_on_visibility(gate=True)
        room.database.snapshot_text = "50:50:"
        room.commit(insert("lost"), xid=60)
        await room.database.asked_again(3)
        restart(room, 10_000)
        room.commit(insert("new"), xid=49)
        events = await sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]


async def test_a_barrier_of_another_history_hides_nothing_of_this_one() -> None:
    """Its snapshot saw transaction 40; the new history's 40 is another."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        room.database.snapshot_text, room.database.insert_lsn = "50:50:", "0/9000"
        await room.subscribe(connection, "posts/*")
        restart(room, 150)
        room.commit(insert("new"), xid=40)
        events = await sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]


async def test_a_snapshot_asked_for_in_another_history_makes_no_barrier_in_this_one() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        room.database.snapshot_text, room.database.insert_lsn = "50:50:", "0/9000"
        room.database.gate = asyncio.Event()
        call = asyncio.create_task(room.subscribe(connection, "posts/*"))
        await room.database.asked_again(1)
        restart(room, 150)
        room.database.gate.set()
        await asyncio.sleep(0)
        room.database.snapshot_text, room.database.insert_lsn = "40:40:", "0/96"
        await call
        room.commit(insert("new"), xid=40)

        assert (await sink.wait_for(2))[1][1] == "posts/*"
