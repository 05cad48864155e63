"""Workers as the main process has them: which have its configuration, and which are asked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from pgrealtime.collections.model import Collections
from pgrealtime.config.load import ParsedConfig
from pgrealtime.feed.broadcast import Broadcaster
from pgrealtime.feed.window import EncodedWindow
from pgrealtime.lsn import LSN
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.service.applied_config import AppliedConfig
from pgrealtime.workers.link import Answering, Link
from pgrealtime.workers.main import Team
from pgrealtime.workers.messages import Apply, Deliver, Done, Failed, Hello, Message
from pgrealtime.workers.process import WorkerProcess
from tests.config_values import parse_config


class Child:
    """A process that runs until it is killed."""

    pid = 1

    def __init__(self) -> None:
        self.returncode: int | None = None

    def kill(self) -> None:
        self.returncode = -9


def nothing(*_: object) -> None:
    pass


def worker(number: int, *, runs: bool = True) -> WorkerProcess:
    window = EncodedWindow(LSN(0), max_bytes=1, max_age_seconds=1)
    made = WorkerProcess(Hello(number, "", 0), Broadcaster(window, patience_seconds=1), nothing)
    if runs:
        made._process = cast(asyncio.subprocess.Process, Child())
    return made


@asynccontextmanager
async def answering(asked: WorkerProcess, answer: Link) -> AsyncIterator[None]:
    """Let a worker's other end answer what it is asked."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    await loop.create_unix_connection(lambda: asked.link, sock=ours)
    await loop.create_unix_connection(lambda: answer, sock=theirs)
    try:
        async with asyncio.timeout(10):
            yield
    finally:
        asked.link.close()
        answer.close()
        await asked.link.closed.wait()


def read_nothing() -> ParsedConfig:
    raise AssertionError


def team() -> Team:
    config = parse_config({})
    applied = AppliedConfig(config=config, collections=Collections(()))
    return Team(applied, QueryPool(), read_nothing, count=2, port=0)


async def test_a_configuration_is_in_force_in_every_worker_or_it_begins_anew() -> None:
    """One that starts while the others apply it has it already."""
    of = team()
    applies, fails, starting, successor = (worker(n) for n in (1, 2, 3, 4))
    of._workers = {one.number: one for one in (applies, fails, starting)}

    heard: list[Message] = []

    async def apply(message: Message) -> Message:
        heard.append(message)
        of._workers[successor.number] = successor
        return Done()

    async def fail(_message: Message) -> Message:
        return Failed("internal", "no")

    async with answering(applies, Link(apply)), answering(fails, Link(fail)):
        await of._apply([applies, fails])

    killed = [one.number for one in of.workers if one.exit_code is not None]
    assert killed == [fails.number, starting.number]
    assert heard == [Apply(is_accepted=True), Deliver()]


async def test_a_worker_that_is_killed_while_it_is_being_started_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would have a configuration that was replaced meanwhile."""
    one = worker(1, runs=False)

    class Started(Child):
        async def wait(self) -> int:
            assert self.returncode is not None, "it runs"
            return self.returncode

    child = Started()

    async def start(*_: object, **__: object) -> Child:
        one.kill()
        return child

    monkeypatch.setattr("pgrealtime.workers.process.asyncio.create_subprocess_exec", start)
    async with asyncio.timeout(10):
        await one.run()
    assert one.exit_code == -9


async def test_the_end_waits_for_no_worker_that_is_yet_to_be_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pause before that grows while a worker fails again and again."""
    monkeypatch.setattr("pgrealtime.workers.main._FIRST_PAUSE_SECONDS", 1000.0)
    failed = asyncio.Event()

    async def fail(_worker: WorkerProcess) -> None:
        failed.set()

    monkeypatch.setattr(WorkerProcess, "run", fail)
    of = team()
    supervising = asyncio.create_task(of._supervise(1))
    async with asyncio.timeout(10):
        await failed.wait()
        await of._stop([supervising])
    assert supervising.done()
    assert not supervising.cancelled()


async def test_a_silent_worker_is_not_asked_for_its_metrics() -> None:
    """A scrape would wait for it, each time."""
    one = worker(1)
    one._missed_beats = 5
    asked: list[Message] = []

    def answer(message: Message) -> Answering:
        asked.append(message)
        return None

    async with answering(one, Link(answer)):
        assert one.is_silent
        assert await one.read_counts() is None
        await one.link.ask(Apply(is_accepted=True), Done)

    assert asked == [Apply(is_accepted=True)]
