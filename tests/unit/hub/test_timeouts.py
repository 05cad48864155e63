"""When a connection that is due is ended, in virtual time: never while its client can't bear it.

Between PB_CONNECT and the answer to the first call, and for a second after it, the JS SDK takes the
end of its connection for an answer and stays dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pgrealtime.hub.connections.connection import Connection
from tests.unit.hub.room import MemorySink, Room, open_room
from tests.virtual_time import run

Make = Callable[[Room, Connection], None]


def _due(room: Room, connection: Connection) -> None:
    """Nothing more: its life is over."""


def _doomed(room: Room, connection: Connection) -> None:
    """As by a gap that can't be told, or a guest where there shall be none."""
    room.hub._registry.request_close(connection, "gap")


async def _open_at(
    clock: Callable[[], float], sink: MemorySink, moments: list[float]
) -> list[bool]:
    """Whether the connection is open at each of the moments."""
    found = []
    for moment in moments:
        await asyncio.sleep(max(0.0, moment - clock()))
        found.append(sink.state == "open")
    return found


def in_a_room(
    scenario: Callable[[Room, Callable[[], float]], Awaitable[None]], **limits: Any
) -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        async with open_room(clock=clock, heartbeat=2.0, **limits) as room:
            await scenario(room, clock)

    run(main())


@pytest.mark.parametrize("make", [_due, _doomed])
def test_a_connection_is_not_ended_before_its_call_is_answered(make: Make) -> None:
    async def scenario(room: Room, clock: Callable[[], float]) -> None:
        room.database.gate = asyncio.Event()
        connection, sink = room.connect()
        call = asyncio.create_task(room.subscribe(connection, "posts/*"))
        await room.database.asked_again(1)
        make(room, connection)
        assert await _open_at(clock, sink, [0.5, 1.5, 4.0]) == [True] * 3
        room.database.gate.set()
        await call
        answered = clock()
        assert await _open_at(clock, sink, [answered + 0.5, answered + 0.9]) == [True] * 2
        assert await _open_at(clock, sink, [answered + 2.0]) == [False]

    in_a_room(scenario, max_lifetime=0.3)


@pytest.mark.parametrize("make", [_due, _doomed])
def test_a_connection_has_a_second_after_pb_connect_for_its_call_to_come(make: Make) -> None:
    async def scenario(room: Room, clock: Callable[[], float]) -> None:
        connection, sink = room.connect()
        make(room, connection)
        assert await _open_at(clock, sink, [0.5, 0.9, 2.0]) == [True, True, False]

    in_a_room(scenario, max_lifetime=0.3)


def test_a_call_that_was_given_up_holds_nothing_open() -> None:
    async def scenario(room: Room, clock: Callable[[], float]) -> None:
        room.database.gate = asyncio.Event()
        connection, sink = room.connect()
        call = asyncio.create_task(room.subscribe(connection, "posts/*"))
        await room.database.asked_again(1)
        assert await _open_at(clock, sink, [3.0]) == [True]
        call.cancel()
        assert await _open_at(clock, sink, [4.0]) == [False]

    in_a_room(scenario, max_lifetime=0.3)


def test_who_takes_nothing_is_let_go_whatever_it_waits_for() -> None:
    """It doesn't read: the end is nothing that it could take for an answer."""

    async def scenario(room: Room, clock: Callable[[], float]) -> None:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        sink.is_stuck = True
        sink.overhead = 1
        connection.write_heartbeat(room.hub.head, clock())
        await asyncio.sleep(3.0)
        assert sink.state == "aborted"

    in_a_room(scenario, stall_timeout=2.0)
