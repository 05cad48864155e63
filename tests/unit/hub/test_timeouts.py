"""When a connection that is due to end is ended, in virtual time.

Between PB_CONNECT and the answer to the first call, and for a second after it, the end would leave
the JS SDK without a connection for good: it takes the end for an answer to its call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pgrealtime.hub.connections.connection import NO_MESSAGE_KEYS, Connection
from pgrealtime.hub.connections.output import encode_position
from pgrealtime.lsn import LSN, Cursor
from pgrealtime.protocol.frame import HEARTBEAT
from tests.unit.hub.harness import HubHarness, MemorySink, open_harness
from tests.virtual_time import run

Make = Callable[[HubHarness, Connection], None]


def _due(harness: HubHarness, connection: Connection) -> None:
    """The connection's lifetime ends; nothing else happens to it."""


def _close_requested(harness: HubHarness, connection: Connection) -> None:
    """A close is requested, as after a gap that can't be notified."""
    harness.hub._registry.request_close(connection, "gap")


async def _open_at(
    clock: Callable[[], float], sink: MemorySink, moments: list[float]
) -> list[bool]:
    """Return whether the connection is open at each of the moments."""
    found = []
    for moment in moments:
        await asyncio.sleep(max(0.0, moment - clock()))
        found.append(sink.state == "open")
    return found


def run_scenario(
    scenario: Callable[[HubHarness, Callable[[], float]], Awaitable[None]], **limits: Any
) -> None:
    """Run a scenario with a hub whose clock is virtual."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        async with open_harness(clock=clock, heartbeat=2.0, **limits) as harness:
            await scenario(harness, clock)

    run(main())


@pytest.mark.parametrize("make", [_due, _close_requested])
def test_a_connection_is_not_ended_before_its_call_is_answered(make: Make) -> None:
    """Nor within a second after the answer."""

    async def scenario(harness: HubHarness, clock: Callable[[], float]) -> None:
        harness.database.gate = asyncio.Event()
        connection, sink = harness.connect()
        call = asyncio.create_task(harness.subscribe(connection, "posts/*"))
        await harness.database.wait_for_snapshot_queries(1)
        make(harness, connection)
        assert await _open_at(clock, sink, [0.5, 1.5, 4.0]) == [True] * 3
        harness.database.gate.set()
        await call
        answered = clock()
        assert await _open_at(clock, sink, [answered + 0.5, answered + 0.9]) == [True] * 2
        assert await _open_at(clock, sink, [answered + 2.0]) == [False]

    run_scenario(scenario, max_lifetime=0.3)


@pytest.mark.parametrize("make", [_due, _close_requested])
def test_a_connection_has_a_second_after_pb_connect_for_its_call_to_come(make: Make) -> None:
    """Its client calls right after PB_CONNECT."""

    async def scenario(harness: HubHarness, clock: Callable[[], float]) -> None:
        connection, sink = harness.connect()
        make(harness, connection)
        assert await _open_at(clock, sink, [0.5, 0.9, 2.0]) == [True, True, False]

    run_scenario(scenario, max_lifetime=0.3)


def test_a_call_that_was_given_up_holds_nothing_open() -> None:
    """A cancelled first call doesn't delay the end any more."""

    async def scenario(harness: HubHarness, clock: Callable[[], float]) -> None:
        harness.database.gate = asyncio.Event()
        connection, sink = harness.connect()
        call = asyncio.create_task(harness.subscribe(connection, "posts/*"))
        await harness.database.wait_for_snapshot_queries(1)
        assert await _open_at(clock, sink, [3.0]) == [True]
        call.cancel()
        assert await _open_at(clock, sink, [4.0]) == [False]

    run_scenario(scenario, max_lifetime=0.3)


def test_a_client_that_takes_nothing_is_dropped_during_its_first_call_too() -> None:
    """Its client reads nothing, so it can't take the end for an answer."""

    async def scenario(harness: HubHarness, clock: Callable[[], float]) -> None:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        sink.is_stuck = True
        sink.overhead = 1
        connection.write_heartbeat(harness.hub.head, clock())
        await asyncio.sleep(3.0)
        assert sink.state == "aborted"

    run_scenario(scenario, stall_timeout=2.0)


async def test_a_heartbeat_amid_a_change_tells_no_position() -> None:
    """That of the events that were sent of the change is a later one."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*", "PB_CURSOR")
        await harness.until_caught_up()
        at, before = connection.cursor, connection.position
        amid = Cursor(LSN(at.lsn + 100), 1)
        connection.record_messages_sent(amid, {(None, 0)})  # type: ignore[arg-type]
        connection.position = encode_position("abcdef", Cursor(amid.lsn, 0))
        written = len(sink.data)
        connection.write_heartbeat(at, 0.0)
        assert (sink.data[written:], connection.is_amid_change()) == (HEARTBEAT, True)
        connection.record_messages_sent(amid, NO_MESSAGE_KEYS)
        connection.write_heartbeat(at, 0.0)

    assert b"event:PB_CURSOR" in sink.data[written:]
    assert before in sink.data[written:]
