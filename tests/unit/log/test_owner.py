"""A replica takes over from an owner that is gone, and leaves one alone that is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import pytest

from pgrealtime.config.model import LogConfig
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.feed.frames import EraFrame
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.log import owner as owner_module
from pgrealtime.log.beat import CHANCE_SECONDS, VACANT_SECONDS, Beat, decode
from pgrealtime.log.connection import LogNames
from pgrealtime.log.follower import LogFollower
from pgrealtime.log.jetstream import LogStream
from pgrealtime.log.owner import Owner, SlotPosition
from pgrealtime.log.tasks import end_tasks
from pgrealtime.log.writer import LogWriter
from pgrealtime.lsn import LSN
from tests.unit.log.test_follower import Log, Replica, era, rows
from tests.unit.log.test_follower import owner as chain_of


@dataclass
class Nats(Log):
    """A stream in memory that is appended to, and the beats that were said beside it."""

    beats: list[Beat] = field(default_factory=list)
    max_payload: int = 100_000
    names: LogNames = field(default_factory=lambda: LogNames(name="test"))

    @property
    def client(self) -> Nats:
        return self

    async def append(self, payload: bytes, after: int) -> asyncio.Future[int]:
        assert after == self.last
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        future.set_result(self.store(payload).sequence)
        return future

    async def publish(self, subject: str, payload: bytes) -> None:
        assert subject == "pgrt.test.beat"
        self.beats.append(decode(payload, Beat))

    async def flush(self, _seconds: float) -> None:
        pass


@dataclass
class Database:
    """Answers with what a test has put in."""

    primary_timeline: int = 1
    is_reached: bool = True
    asked: int = 0
    """How often somebody wanted to take over."""
    looked: int = 0
    """How often somebody looked at the timeline."""
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def slot_position(self) -> SlotPosition:
        self.asked += 1
        if not self.is_reached:
            raise DatabaseUnreachableError("not reached")
        return SlotPosition(LSN(0), self.primary_timeline)

    async def end_walsender(self) -> None:
        await self.has_ended.wait()

    async def timeline(self) -> int:
        self.looked += 1
        return self.primary_timeline

    async def is_answering(self, seconds: float) -> bool:
        raise AssertionError(seconds)


class Candidate:
    """A replica that owns the log whenever nobody else does."""

    def __init__(self, log: Nats) -> None:
        replica = Replica(log)
        self.database, self.rank = Database(), 0
        self.follower: LogFollower = replica.follower
        intake = Intake(replica.changelog, replica.hub, max_size=1 << 20)
        self.owner = Owner(
            cast(LogStream, log),
            self.follower,
            intake,
            self.database,
            self._make_reader,
            config=LogConfig(),
            tag="own",
            rank=lambda: self.rank,
            max_pause_seconds=10.0,
            era_bytes=1 << 20,
        )
        self.follower._on_fence = self.owner.on_fence
        self.follower._on_resigned = self.owner.on_resigned

    async def _make_reader(self, intake: Intake, writer: LogWriter) -> ReplicationReader:
        raise AssertionError(intake, writer)

    def hear(self, term: int = 1) -> None:
        """Hear the beat of another owner."""
        beat = Beat(
            term=term,
            salt=1,
            tag="other",
            sequence=0,
            head_lsn=LSN(0),
            wal_end=LSN(0),
            deaf_seconds=0.0,
            is_streaming=True,
        )
        self.follower.hear(beat)
        self.owner.on_beat(beat)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.owner.run())
        try:
            yield
        finally:
            await end_tasks([task])


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0.01)


async def test_it_beats_from_its_fence_on() -> None:
    """Else others would fence it while a slow database ends the walsender, and so would they be."""
    log = Nats()
    candidate = Candidate(log)
    async with candidate.running():
        candidate.owner.on_resigned()
        await until(lambda: len(log.beats) * 0.2 > VACANT_SECONDS)
        assert not candidate.owner.is_owner
    said = {(beat.term, beat.tag, beat.sequence, beat.is_streaming) for beat in log.beats}
    assert said == {(1, "own", 1, False)}
    assert all(beat.is_valid(1) for beat in log.beats)


async def test_it_stops_to_beat_at_the_fence_of_another() -> None:
    log = Nats()
    candidate = Candidate(log)
    async with candidate.running():
        candidate.owner.on_resigned()
        await until(lambda: bool(log.beats))
        log.say(chain_of(2), None)
        await candidate.follower.catch_up()
        assert candidate.owner.beat() is None


async def test_a_new_owner_is_not_the_one_that_read_an_old_primary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several replicas that see the failover one is first, and the others leave that alone."""
    monkeypatch.setattr(owner_module, "_TIMELINE_SECONDS", 0.4)
    monkeypatch.setattr(owner_module, "_RETRY_SECONDS", 0.0)
    log = Nats()
    log.say(chain_of(1), None, EraFrame(era(timeline=1), LSN(10)), rows(20))
    candidate = Candidate(log)
    await candidate.follower.catch_up()
    candidate.database.is_reached, candidate.database.primary_timeline = False, 2
    term = 1
    async with candidate.running(), asyncio.TaskGroup() as group:

        async def beat() -> None:
            while True:
                candidate.hear(term)
                await asyncio.sleep(0.05)

        beating = group.create_task(beat())
        await until(lambda: candidate.database.asked > 1)
        term = 2
        log.say(chain_of(2), None)
        await candidate.follower.catch_up()
        asked = candidate.database.asked
        await asyncio.sleep(0.3)
        assert candidate.database.asked == asked
        log.say(chain_of(2), None, EraFrame(era(timeline=1), LSN(20)))
        await until(lambda: candidate.database.asked > asked)  # it reads the old one, too
        beating.cancel()


async def test_an_owner_that_has_followed_a_failover_is_left_alone_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only after the next look at the timeline."""
    monkeypatch.setattr(owner_module, "_TIMELINE_SECONDS", 0.1)
    monkeypatch.setattr(owner_module, "_RETRY_SECONDS", 0.0)
    log, first = Nats(), chain_of(1)
    log.say(first, None, EraFrame(era(timeline=1), LSN(10)), rows(20))
    candidate = Candidate(log)
    await candidate.follower.catch_up()
    candidate.database.is_reached, candidate.database.primary_timeline = False, 2
    async with candidate.running(), asyncio.TaskGroup() as group:

        async def beat() -> None:
            while True:
                candidate.hear()
                await asyncio.sleep(0.05)

        beating = group.create_task(beat())
        await until(lambda: candidate.database.asked > 1)
        monkeypatch.setattr(owner_module, "_TIMELINE_SECONDS", 60.0)
        looked = candidate.database.looked
        await until(lambda: candidate.database.looked > looked)
        log.say(first, EraFrame(era(timeline=2), LSN(30)))
        await candidate.follower.catch_up()
        asked = candidate.database.asked
        await asyncio.sleep(0.3)
        assert candidate.database.asked == asked
        beating.cancel()


@pytest.mark.parametrize(("rank", "is_among_the_first"), [(0, True), (4, True), (5, False)])
def test_five_replicas_try_at_once(rank: int, *, is_among_the_first: bool) -> None:
    """Of many not all connect to the database; the others wait for one of these to be there."""
    candidate = Candidate(Nats())
    candidate.rank = rank
    ticks = [candidate.owner._ticks_of_silence() for _ in range(100)]
    seconds = [each * owner_module._TICK_SECONDS for each in ticks]
    first = VACANT_SECONDS if is_among_the_first else VACANT_SECONDS + 1.0
    assert first <= min(seconds) <= max(seconds) <= first + CHANCE_SECONDS
    assert len(set(ticks)) > 50


async def test_how_long_it_waits_depends_on_the_replicas_that_are_there_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When it began to wait, it knew no others; now there are many before it."""
    monkeypatch.setattr(owner_module, "VACANT_SECONDS", 0.1)
    monkeypatch.setattr(owner_module, "CHANCE_SECONDS", 0.0)
    candidate = Candidate(Nats())
    waiting = asyncio.create_task(candidate.owner._until_vacant())
    for _ in range(10):
        candidate.hear()
        await asyncio.sleep(0.03)
    candidate.rank = 9
    done, _ = await asyncio.wait([waiting], timeout=0.5)
    assert not done
    async with asyncio.timeout(5):
        await waiting
