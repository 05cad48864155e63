"""Processes of a cluster reach each other by NATS, and nobody else can make use of that."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from pgrealtime.bus.base import draw_tag
from pgrealtime.bus.nats import NatsBus
from pgrealtime.config.model import LogConfig
from pgrealtime.errors import HolderGoneError, HolderSilentError
from pgrealtime.log.connection import LogNames, connect
from tests.log_world import NatsServer, nats_server

SECRET = "a secret of more than thirty-two characters"


@dataclass
class Process:
    """One process on the bus; answers with what it is asked, after its tag."""

    bus: NatsBus
    asked: list[bytes] = field(default_factory=list)
    is_silent: bool = False

    async def answer(self, request: bytes) -> bytes:
        self.asked.append(request)
        if self.is_silent:
            await asyncio.sleep(30)
        return self.bus.tag.encode() + request


@pytest.fixture
async def server() -> AsyncIterator[NatsServer]:
    async with nats_server() as running:
        yield running


@asynccontextmanager
async def process(server: NatsServer, **settings: Any) -> AsyncIterator[Process]:
    config = LogConfig(nats=f"nats://127.0.0.1:{server.port}")
    given = {"name": "app", "secret": SECRET, "tag": draw_tag(), **settings}
    made = Process(NatsBus(config, **given))
    made.bus.serve(made.answer)
    async with made.bus.running():
        async with asyncio.timeout(10):
            while made.bus._client is None:
                await asyncio.sleep(0.01)
        made.bus._settled_at = 0.0
        yield made


async def two(stack: AsyncExitStack, server: NatsServer, **settings: Any) -> list[Process]:
    return [await stack.enter_async_context(process(server, **settings)) for _ in range(2)]


@pytest.mark.parametrize("size", [10, 100_000, 3_000_000])
async def test_a_call_is_answered_by_the_process_with_the_tag(
    server: NatsServer, size: int
) -> None:
    """In parts, where it is larger than a message of NATS may be."""
    request = bytes(n * n % 251 for n in range(size))
    async with AsyncExitStack() as stack:
        one, other = await two(stack, server)
        third = await stack.enter_async_context(process(server))
        assert await one.bus.call(other.bus.tag, request) == other.bus.tag.encode() + request
    assert (one.asked, other.asked, third.asked) == ([], [request], [])


async def test_a_process_that_has_gone_is_known_at_once(server: NatsServer) -> None:
    async with process(server) as one:
        began = time.monotonic()
        with pytest.raises(HolderGoneError):
            await one.bus.call("abcdef", b"x")
    assert time.monotonic() - began < 1.0


async def test_a_process_that_ends_meanwhile_has_gone(server: NatsServer) -> None:
    """It says once a second that it is there."""
    async with process(server, gone_seconds=1.5) as one:
        async with process(server) as other:
            other.is_silent = True
            call = asyncio.create_task(one.bus.call(other.bus.tag, b"x"))
            async with asyncio.timeout(5):
                while not other.asked:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(2.5)
            assert not call.done()
        with pytest.raises(HolderGoneError):
            async with asyncio.timeout(5):
                await call


async def test_a_process_that_is_there_and_does_not_answer_is_silent(server: NatsServer) -> None:
    async with AsyncExitStack() as stack:
        one, other = await two(stack, server, silence_seconds=1.5)
        other.is_silent = True
        with pytest.raises(HolderSilentError):
            await one.bus.call(other.bus.tag, b"x")


async def test_a_bus_without_nats_is_silent_and_comes_back(server: NatsServer) -> None:
    async with AsyncExitStack() as stack:
        one, other = await two(stack, server)
        await server.kill()
        async with asyncio.timeout(5):
            while one.bus._client is not None and one.bus._client.is_connected:
                await asyncio.sleep(0.01)
        with pytest.raises(HolderSilentError):
            await one.bus.call(other.bus.tag, b"x")
        await server.start()
        async with asyncio.timeout(10):
            while True:
                with suppress(HolderSilentError):
                    assert await one.bus.call(other.bus.tag, b"y") == other.bus.tag.encode() + b"y"
                    break
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("other", [{"secret": SECRET + "!"}, {"name": "other"}])
async def test_another_cluster_is_not_heard(server: NatsServer, other: dict[str, str]) -> None:
    """Neither one with another secret, nor one with another name and the same tag."""
    async with (
        process(server, silence_seconds=0.5) as one,
        process(server, tag=draw_tag(), **other) as stranger,
    ):
        with pytest.raises((HolderGoneError, HolderSilentError)):
            await one.bus.call(stranger.bus.tag, b"x")
        assert stranger.asked == []
        assert sum(stranger.bus.ignored.values()) == ("secret" in other)


async def test_a_forged_or_repeated_call_is_not_answered(server: NatsServer) -> None:
    """Whoever may publish there can't make a call of it."""
    heard: list[bytes] = []
    config, names = LogConfig(nats=f"nats://127.0.0.1:{server.port}"), LogNames(name="app")
    async with AsyncExitStack() as stack:
        one, other = await two(stack, server)
        client = await stack.enter_async_context(connect(config, names, client_name="spy"))
        subject = names.subject("call", other.bus.tag)

        async def hear(message: Any) -> None:
            heard.append(message.data)

        await client.subscribe(subject, cb=hear)
        await client.flush()
        await one.bus.call(other.bus.tag, b"a secret token")
        (sealed,) = heard
        assert b"a secret token" not in sealed
        for forged in (sealed, b"", bytes(100), sealed[:-1] + b"\x00"):
            await client.publish(subject, forged)
        await client.flush()
        async with asyncio.timeout(5):
            while sum(other.bus.ignored.values()) < 4:
                await asyncio.sleep(0.01)
    assert other.asked == [b"a secret token"]
