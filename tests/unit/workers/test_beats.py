"""A worker that hangs is found out by its beats."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from pgrealtime.feed.broadcast import Broadcaster
from pgrealtime.feed.window import EncodedWindow
from pgrealtime.lsn import LSN
from pgrealtime.workers.messages import Beat, Hello, Message
from pgrealtime.workers.process import WorkerProcess


class Child:
    """A process that can be killed, no more."""

    pid = 1
    returncode = None

    def __init__(self) -> None:
        self.killed = asyncio.Event()

    def kill(self) -> None:
        self.killed.set()


def nothing(_worker: WorkerProcess, _message: Message) -> None:
    pass


def worker() -> WorkerProcess:
    window = EncodedWindow(LSN(0), max_bytes=1, max_age_seconds=1)
    return WorkerProcess(Hello(1, "", 0), Broadcaster(window, patience_seconds=1), nothing)


@pytest.mark.parametrize(("beats", "missed"), [(0, 120), (1, 15)])
async def test_a_worker_without_beats_is_killed(
    beats: int, missed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later before its first beat: a slow machine takes long to load modules."""
    slept = 0

    async def sleep(_seconds: float) -> None:
        nonlocal slept
        slept += 1
        await real_sleep(0)

    real_sleep = asyncio.sleep
    one, child = worker(), Child()
    for _ in range(beats):
        one._answer(Beat(3))
    monkeypatch.setattr("pgrealtime.workers.process.asyncio.sleep", sleep)
    watch = asyncio.create_task(one._watch_beats(cast(asyncio.subprocess.Process, child)))
    async with asyncio.timeout(5):
        await child.killed.wait()
    watch.cancel()
    assert slept in (missed, missed + 1)
    assert one.is_silent
    assert one.connection_count == 3 * beats


async def test_a_beat_ends_the_silence() -> None:
    one = worker()
    one._missed_beats = 5
    assert one.is_silent
    one._answer(Beat(0))
    assert not one.is_silent
