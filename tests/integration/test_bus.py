"""Processes of a cluster reach each other by NOTIFY, and nobody else can make use of that."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql
from structlog.testing import capture_logs

from pgrealtime.bus.base import draw_tag
from pgrealtime.bus.postgres import (
    PostgresBus,
    _cluster_lock,
    _lock_of,
    _signed,
    probe_postgres_bus,
    read_bus_report,
)
from pgrealtime.errors import (
    DatabaseUnreachableError,
    HolderGoneError,
    HolderSilentError,
    SetupError,
)
from pgrealtime.postgres.connect import connect_once
from tests.own_server import OwnServer, own_server
from tests.pgbouncer import pgbouncer

SECRET = "a secret of more than thirty-two characters"
DEADLINE = 20.0


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    """A server of this module's own, which may be restarted."""
    with own_server() as running:
        yield running


@dataclass
class Process:
    """One process on the bus; answers with what it is asked, after its tag."""

    bus: PostgresBus
    asked: list[bytes] = field(default_factory=list)
    is_silent: bool = False

    async def answer(self, request: bytes) -> bytes:
        self.asked.append(request)
        if self.is_silent:
            await asyncio.sleep(DEADLINE)
        return self.bus.tag.encode() + request


def make_bus(url: str, *, name: str = "app", secret: str = SECRET, **settings: Any) -> PostgresBus:
    return PostgresBus(url, name=name, secret=secret, tag=draw_tag(), **settings)


@asynccontextmanager
async def process(url: str, **settings: Any) -> AsyncIterator[Process]:
    bus = make_bus(url, **settings)
    made = Process(bus)
    bus.serve(made.answer)
    async with bus.running():
        yield made


@asynccontextmanager
async def processes(url: str, count: int = 2, **settings: Any) -> AsyncIterator[list[Process]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(process(url, **settings)) for _ in range(count)]


async def until_connected(*them: Process) -> None:
    async with asyncio.timeout(DEADLINE):
        while any(one.bus._connection is None for one in them):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("size", [0, 100, 5_195, 5_196, 64 * 1024, 100_000, 2_600_000])
async def test_a_request_of_any_size_is_answered(database_url: str, size: int) -> None:
    """A notification has less than 8,000 bytes."""
    request = random.Random(1).randbytes(size)
    async with processes(database_url) as (one, other):
        answer = await one.bus.call(other.bus.tag, request)

    assert answer == other.bus.tag.encode() + request
    assert (one.asked, other.asked) == ([], [request])


async def test_many_calls_at_once_each_have_their_answer(database_url: str) -> None:
    async with processes(database_url, 3) as three:
        tags = [one.bus.tag for one in three]
        calls = [(one, tag, b"%d" % n) for n in range(100) for one in three for tag in tags]
        answers = await asyncio.gather(*(one.bus.call(tag, text) for one, tag, text in calls))

    assert answers == [tag.encode() + text for _, tag, text in calls]


async def test_nobody_there_is_told_at_once(database_url: str) -> None:
    """As PocketBase does after a restart: SDKs reconnect."""
    async with processes(database_url) as (one, other):
        began = time.monotonic()
        with pytest.raises(HolderGoneError):
            await one.bus.call(draw_tag(), b"x")
        seconds = time.monotonic() - began
        answer = await one.bus.call(other.bus.tag, b"x")

    assert seconds < 1
    assert answer == other.bus.tag.encode() + b"x"
    async with process(database_url) as late:
        with pytest.raises(HolderGoneError):
            await late.bus.call(one.bus.tag, b"x")


async def test_a_holder_that_ends_meanwhile_is_gone(database_url: str) -> None:
    async with process(database_url, gone_seconds=0.5) as one:
        async with process(database_url) as other:
            other.is_silent = True
            asking = asyncio.create_task(one.bus.call(other.bus.tag, b"x"))
            await one.bus.call(one.bus.tag, b"")  # so the other has been asked
        began = time.monotonic()
        with pytest.raises(HolderGoneError):
            await asking
        seconds = time.monotonic() - began

    assert seconds < 3


async def test_a_holder_that_is_there_and_silent_is_not_gone(database_url: str) -> None:
    async with processes(database_url, silence_seconds=2.5, gone_seconds=0.5) as (one, other):
        other.is_silent = True
        with pytest.raises(HolderSilentError, match=r"no answer in 2\.5 s"):
            await one.bus.call(other.bus.tag, b"x")
        left = dict(one.bus._calls)

    assert left == {}


async def test_a_call_that_was_cancelled_is_not_sent(database_url: str) -> None:
    """It could arrive after the one that the client made instead, through another process."""
    async with processes(database_url) as (one, other):
        cancelled = asyncio.create_task(one.bus.call(other.bus.tag, b"first"))
        await asyncio.sleep(0)
        cancelled.cancel()
        with suppress(asyncio.CancelledError):
            await cancelled
        await one.bus.call(other.bus.tag, b"second")

    assert other.asked == [b"second"]


async def test_clusters_of_other_names_don_t_see_each_other(database_url: str) -> None:
    async with process(database_url) as one, process(database_url, name="app2") as other:
        with pytest.raises(HolderGoneError):
            await one.bus.call(other.bus.tag, b"x")

    assert other.asked == []


async def test_clusters_of_one_name_with_two_secrets_refuse_each_other(database_url: str) -> None:
    """Nothing is carried out, and the log says why."""
    with capture_logs() as logged:
        async with (
            process(database_url, silence_seconds=0.5) as one,
            process(database_url, secret=SECRET[::-1]) as other,
        ):
            for _ in range(2):
                with pytest.raises(HolderSilentError):
                    await one.bus.call(other.bus.tag, b"x")

    assert (other.asked, dict(other.bus.ignored)) == ([], {"call_unsealed": 2})
    ignored = [entry for entry in logged if entry["event"] == "bus.message_ignored"]
    assert [(entry["log_level"], entry["code"]) for entry in ignored] == [
        ("warning", "call_unsealed")
    ]


async def test_what_another_role_writes_is_ignored(database_url: str) -> None:
    """Any role of the database may listen, and notify."""
    async with (
        processes(database_url) as (one, other),
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as stranger,
    ):
        channel = one.bus._channel(other.bus.tag)
        await stranger.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        await one.bus.call(other.bus.tag, b"token")
        (overheard,) = [n async for n in stranger.notifies(timeout=DEADLINE, stop_after=1)]
        for text in (overheard.payload, overheard.payload[:-8], "AAAA" * 20, "", "%", "é"):
            await stranger.execute("SELECT pg_notify(%s, %s)", [channel, text])
        answer = await one.bus.call(other.bus.tag, b"again")

    assert b"token" not in overheard.payload.encode()
    assert other.asked == [b"token", b"again"]
    assert answer == other.bus.tag.encode() + b"again"
    assert dict(other.bus.ignored) == {
        "call_replayed": 1,
        "call_unsealed": 1,
        "call_malformed": 4,
    }


async def test_an_answer_of_another_call_is_none(database_url: str) -> None:
    async with (
        processes(database_url, silence_seconds=1.0) as (one, other),
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as stranger,
    ):
        channel = one.bus._channel(one.bus.tag)
        await stranger.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        await one.bus.call(other.bus.tag, b"first")
        (overheard,) = [n async for n in stranger.notifies(timeout=DEADLINE, stop_after=1)]
        other.is_silent = True
        asking = asyncio.create_task(one.bus.call(other.bus.tag, b"second"))
        await stranger.execute("SELECT pg_notify(%s, %s)", [channel, overheard.payload])
        with pytest.raises(HolderSilentError):
            await asking

    assert dict(one.bus.ignored) == {"call_replayed": 1}


async def test_a_lost_connection_is_made_again(database_url: str) -> None:
    with capture_logs() as logged:
        async with processes(database_url) as (one, other):
            other.is_silent = True
            asking = asyncio.create_task(one.bus.call(other.bus.tag, b"x"))
            await one.bus.call(one.bus.tag, b"")
            async with connect_once(database_url) as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'pgrealtime bus'"
                )
            with pytest.raises(HolderSilentError, match="lost its connection"):
                await asking
            with pytest.raises(HolderSilentError, match="not connected"):
                await one.bus.call(other.bus.tag, b"x")
            other.is_silent = False
            await until_connected(one)
            # The other may not be back: that is no reason to take it for gone.
            answer = await one.bus.call(other.bus.tag, b"y")

    assert answer == other.bus.tag.encode() + b"y"
    events = [entry["event"] for entry in logged]
    assert (events.count("bus.lost"), events.count("bus.connected")) == (2, 2)


async def test_a_restarted_server_is_waited_for(server: OwnServer) -> None:
    async with processes(server.url) as (one, other):
        await asyncio.to_thread(server.control, "restart", "--mode=immediate")
        await until_connected(one)
        answer = await one.bus.call(other.bus.tag, b"x")
        began = time.monotonic()
        with pytest.raises(HolderGoneError):
            await one.bus.call(draw_tag(), b"x")
        waited = time.monotonic() - began
        with pytest.raises(HolderGoneError):
            await one.bus.call(draw_tag(), b"x")

    assert answer == other.bus.tag.encode() + b"x"
    assert waited < 5


async def test_a_wrong_clock_is_set_right(database_url: str) -> None:
    """The monotonic clock of a machine that was paused stood still, and others drift."""
    async with processes(database_url, silence_seconds=0.5) as (one, other):
        for wrong in (other, one):
            wrong.bus._clock_offset_ms -= 60_000
            with pytest.raises(HolderSilentError):
                await one.bus.call(other.bus.tag, b"lost")
            assert await one.bus.call(other.bus.tag, b"x") == other.bus.tag.encode() + b"x"
            assert dict(other.bus.ignored).keys() == {"call_stale"}

    assert b"lost" not in other.asked


async def test_calls_don_t_wait_for_standbys(server: OwnServer) -> None:
    """A notification is a commit, and with synchronous replication commits wait."""
    server.configure(synchronous_standby_names="nobody")
    async with (
        processes(server.url) as (one, other),
        await psycopg.AsyncConnection.connect(server.url) as writing,
    ):
        await writing.execute("CREATE TABLE t ()")
        committing = asyncio.create_task(writing.commit())
        answer = await one.bus.call(other.bus.tag, b"x")
        done, _ = await asyncio.wait([committing], timeout=0.1)
        writing.cancel()
        await committing
    server.configure()

    assert answer == other.bus.tag.encode() + b"x"
    assert not done


async def test_a_pooler_is_refused(database_url: str) -> None:
    """What is listened to there arrives at whoever has the session next."""
    with pgbouncer(database_url) as pooled, pytest.raises(SetupError) as raised:
        await make_bus(pooled).connect()

    assert raised.value.error_code == "bus_needs_direct_connection"
    assert "database.url" in raised.value.hint


async def test_a_standby_is_refused(server: OwnServer) -> None:
    with server.standby() as standby, pytest.raises(SetupError) as raised:
        await make_bus(standby.url).connect()

    assert raised.value.error_code == "standby"


async def test_a_server_that_is_away_is_an_error_at_the_start() -> None:
    with pytest.raises(DatabaseUnreachableError):
        await make_bus("postgresql://postgres@127.0.0.1:1/none").connect()


async def test_a_lock_that_another_holds_is_an_error(database_url: str) -> None:
    bus = make_bus(database_url)
    async with connect_once(database_url) as connection:
        keys = [_signed(_cluster_lock("app")), _signed(_lock_of(bus.tag))]
        await connection.execute("SELECT pg_advisory_lock(%s::int4, %s::int4)", keys)
        with pytest.raises(SetupError) as raised:
            await bus.connect()

    assert raised.value.error_code == "bus_refused"


async def test_a_read_only_role_without_rights_is_enough(database_url: str) -> None:
    role = f"role_{draw_tag().lower()}"
    url = database_url.replace("postgres@", f"{role}@")
    async with connect_once(database_url) as connection:
        await connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        try:
            options = "?options=-c%20default_transaction_read_only%3Don"
            async with processes(url + options) as (one, other):
                answer = await one.bus.call(other.bus.tag, b"x")
        finally:
            await connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))

    assert answer == other.bus.tag.encode() + b"x"


async def test_a_probe_says_what_is_there(database_url: str) -> None:
    async with processes(database_url), connect_once(database_url) as connection:
        report = await read_bus_report(connection, "app")
        other = await read_bus_report(connection, "other")
        await probe_postgres_bus(database_url, name="app", secret=SECRET)

    assert (report.replicas, other.replicas) == (2, 0)
    assert 0 < report.room == other.room
