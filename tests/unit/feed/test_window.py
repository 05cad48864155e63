"""The encoded window and those who read it: every process has what one process would have."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from pgrealtime.changelog.memory import Changelog, Entry, Gap, Watermark
from pgrealtime.changes import Insert, TableName, Transaction
from pgrealtime.errors import ChangelogError
from pgrealtime.feed.broadcast import LENGTH_BYTES, MAX_BUFFERED_BYTES, Broadcaster, FrameSender
from pgrealtime.feed.frames import EraFrame, FrameIntake
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.window import EncodedWindow
from pgrealtime.feed.wire import FrameDecoder
from pgrealtime.history import SystemIdentity, make_era
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from tests import virtual_time
from tests.feed_follower import Follower

POSTS = TableName("public", "posts")
SYSTEM = SystemIdentity(system_id="7301", timeline=3, database_name="app")
ERAS = [make_era(SYSTEM, [POSTS, TableName("public", f"t{n}")]) for n in range(5)]
SMALL = 2000
HUGE = 1 << 40
START = Cursor(LSN(0), 0)


def transaction(end_lsn: int, size: int = 100) -> Transaction:
    changes = (Insert(POSTS, {"id": str(end_lsn)}),)
    return Transaction(Xid(end_lsn), LSN(end_lsn), 0, changes, size)


class FakeSocket(asyncio.WriteTransport):
    """Holds the bytes written until the process reads them."""

    def __init__(self, sender: FrameSender) -> None:
        self._sender = sender
        self._high = 0
        self.frames: list[bytes] = []
        self.is_read = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert (high, low) == (MAX_BUFFERED_BYTES, None)
        self._high = 3  # frames, here

    def get_write_buffer_size(self) -> int:
        return len(self.frames)

    def writelines(self, list_of_data: Any) -> None:
        length, frame = list_of_data
        assert int.from_bytes(length) == len(frame)
        assert len(length) == LENGTH_BYTES
        self.frames.append(frame)
        if len(self.frames) > self._high:
            self._sender.pause_writing()

    def take(self) -> Sequence[bytes]:
        taken, self.frames = self.frames, []
        self._sender.resume_writing()
        return taken


class Process:
    """Reads frames into a changelog of its own, as a worker does."""

    def __init__(self, broadcaster: Broadcaster, max_bytes: int = HUGE) -> None:
        self.sender = broadcaster.add_sender()
        self.socket = FakeSocket(self.sender)
        self.changelog = Changelog(LSN(0), max_bytes=max_bytes, max_age_seconds=HUGE)
        self.follower = Follower(self.changelog, 1.0)
        self._decoder = FrameDecoder()
        self._intake = FrameIntake(Intake(self.changelog, self.follower, max_size=HUGE))
        self.sender.connection_made(self.socket)

    async def read(self) -> None:
        """Read all that was sent, and what is sent then."""
        while self.socket.frames:
            for data in self.socket.take():
                await self._intake.apply(self._decoder.decode(data))

    @property
    def entries(self) -> list[Entry]:
        return entries_of(self.changelog)

    @property
    def is_up(self) -> bool:
        return not self.follower.said or self.follower.said[-1] != "lost"


def entries_of(changelog: Changelog) -> list[Entry]:
    return list(changelog.read(changelog.floor, changelog.end_cursor, HUGE))


class Feeding:
    """What a reader does, done to the encoded window and to a changelog alike."""

    def __init__(self, max_bytes: int = HUGE) -> None:
        self.window = EncodedWindow(LSN(0), max_bytes=max_bytes, max_age_seconds=50)
        self.broadcaster = Broadcaster(self.window, patience_seconds=1, clock=lambda: self.now)
        self.changelog = Changelog(LSN(0), max_bytes=max_bytes, max_age_seconds=50)
        self.follower = Follower(self.changelog, 1.0)
        self.intakes = (
            Intake(self.window, self.broadcaster, max_size=HUGE),
            Intake(self.changelog, self.follower, max_size=HUGE),
        )
        self.now = 0.0
        self.end = 0

    def start(self, number: int = 0) -> None:
        for intake in self.intakes:
            intake.restart(LSN(self.end))
            intake.start_era(ERAS[number])

    async def append(self, *entries: Entry) -> None:
        for intake in self.intakes:
            for entry in entries:
                await intake.append(entry)
            intake.wake()
        self.end = entries[-1].end_lsn

    async def commit(self, *sizes: int) -> None:
        await self.append(*(transaction(self.end + 10 * (n + 1), s) for n, s in enumerate(sizes)))


async def test_what_is_appended_between_two_wakes_is_one_frame() -> None:
    """It is encoded once, whatever the number of processes."""
    feeding = Feeding()
    processes = [Process(feeding.broadcaster) for _ in range(2)]
    feeding.start()
    await feeding.commit(1, 2, 3)
    sent = [process.socket.frames[-1] for process in processes]
    assert sent[0] is sent[1]
    assert [len(process.socket.frames) for process in processes] == [2, 2]
    for process in processes:
        await process.read()
        assert process.entries == entries_of(feeding.changelog)


async def do_something(  # noqa: C901, PLR0912 (a table of what may be done)
    feeding: Feeding, processes: list[Process], rng: random.Random
) -> None:
    """Do at random what a reader, or a process, may do."""
    match rng.randrange(12):
        case 0:
            for intake in feeding.intakes:
                intake.lose_stream()
        case 1:
            era = rng.choice(ERAS)
            for intake in feeding.intakes:
                intake.continue_era(era)
                intake.start_era(era)
        case 2 if rng.random() < 0.3:
            feeding.end = rng.randrange(10**6)
            feeding.start(rng.randrange(5))
        case 3:
            for intake in feeding.intakes:
                intake.append_gap("schema", frozenset({POSTS}))
            feeding.end += 1
        case 4:
            await feeding.append(Watermark(LSN(feeding.end + 5)))
        case 5 if rng.random() < 0.3:
            for window in (feeding.window, feeding.changelog):
                window.expire(time.monotonic() + HUGE, feeding.changelog.end_cursor)
        case 6 if len(processes) < 4:
            processes.append(Process(feeding.broadcaster))
        case 7 if processes:
            await rng.choice(processes).read()
        case _:
            await feeding.commit(*rng.choices([1, 100, 900], k=rng.randrange(1, 5)))


@pytest.mark.parametrize("seed", range(60))
async def test_every_process_has_what_one_process_would_have(seed: int) -> None:
    """Whenever it joins and however slowly it reads; what it missed is a gap, or void."""
    rng = random.Random(seed)
    feeding = Feeding(max_bytes=SMALL)
    processes: list[Process] = []
    feeding.start()
    for _ in range(200):
        feeding.now += rng.random() * 3
        await do_something(feeding, processes, rng)
        if rng.random() < 0.05:
            # A process that reads nothing for long isn't waited for.
            for process in processes:
                for _ in range(4):
                    process.sender.check_progress()
    there = feeding.changelog
    for process in processes:
        await process.read()
        here = process.changelog
        assert here.end_cursor == there.end_cursor == feeding.window.end_cursor
        assert here.era == there.era
        assert process.is_up is (feeding.follower.said[-1] != "lost")
        # What one process would still have; after a gap of its own what follows that.
        gaps = [e.end_lsn for e in process.entries if isinstance(e, Gap) and e.reason == "expired"]
        assert gaps or here.floor <= there.floor
        since = Cursor(max([there.floor.lsn, here.floor.lsn, *gaps]), END_ORDINAL)
        assert list(here.read(since, here.end_cursor, HUGE)) == list(
            there.read(since, there.end_cursor, HUGE)
        )


async def test_a_process_that_joins_later_has_the_window_entry_by_entry() -> None:
    """Where frames were removed it has the era at the floor, and the loss of the stream."""
    feeding = Feeding(max_bytes=SMALL)
    feeding.start()
    for _ in range(30):
        await feeding.commit(500)
    late = Process(feeding.broadcaster)
    await late.read()
    there = feeding.changelog
    assert list(late.changelog.read(there.floor, there.end_cursor, HUGE)) == entries_of(there)
    assert late.follower.said == [f"started {ERAS[0].epoch}"]

    for intake in feeding.intakes:
        intake.lose_stream()
    for _ in range(30):
        await feeding.commit(500)
    later = Process(feeding.broadcaster)
    await later.read()
    assert later.follower.said == [f"started {ERAS[0].epoch}", "lost"]


async def test_a_process_behind_the_window_has_a_gap_and_then_what_follows() -> None:
    """It is waited for while it reads; after that the window moves on."""
    feeding = Feeding(max_bytes=SMALL)
    process = Process(feeding.broadcaster)
    feeding.start()
    for _ in range(50):
        await feeding.commit(500)
    assert feeding.window.floor.lsn == 30, "nothing is removed that it hasn't read"
    for _ in range(4):
        process.sender.check_progress()
    await feeding.commit(500)
    assert feeding.broadcaster.head == feeding.window.end_cursor
    floor = feeding.window.floor.lsn
    assert floor == 460
    await process.read()
    expected = [transaction(n, 500) for n in (10, 20, 30)]
    expected_after = [transaction(n, 500) for n in (470, 480, 490, 500, 510)]
    assert process.entries[-9:] == [*expected, Gap(floor, "expired"), *expected_after]
    started, continued, *more = process.follower.said
    assert (started, continued) == tuple(f"{w} {ERAS[0].epoch}" for w in ("started", "continued"))
    assert more == [started]
    process.sender.check_progress()
    assert not process.sender.is_stalled


async def test_the_intake_waits_for_a_process_that_reads_slowly() -> None:
    """No more than the window's bound waits for it; when it has read, the intake goes on."""
    feeding = Feeding(max_bytes=SMALL)
    intake = Intake(feeding.window, feeding.broadcaster, max_size=SMALL)
    process = Process(feeding.broadcaster)
    intake.start_era(ERAS[0])
    appended = 0

    async def append_all() -> None:
        nonlocal appended
        for n in range(1, 41):
            await intake.append(transaction(n, 500))
            appended = n

    appending = asyncio.create_task(append_all())
    await asyncio.sleep(0)
    assert appended == 16, "in the socket, and in the window"
    async with asyncio.timeout(5):
        while not appending.done():
            await process.read()
            await asyncio.sleep(0)
        intake.wake()
        await process.read()
    assert [e.end_lsn for e in process.entries] == list(range(1, 41))


async def test_a_process_that_has_ended_holds_up_nothing() -> None:
    feeding = Feeding(max_bytes=SMALL)
    process = Process(feeding.broadcaster)
    feeding.start()
    for _ in range(20):
        await feeding.commit(500)
    assert feeding.broadcaster.head < feeding.window.end_cursor
    process.sender.connection_lost(None)
    feeding.broadcaster.remove_sender(process.sender)
    assert feeding.broadcaster.head == feeding.window.end_cursor


async def test_a_process_whose_socket_breaks_holds_up_nothing() -> None:
    """Who waits for it is woken, although it hasn't ended yet."""
    feeding = Feeding(max_bytes=SMALL)
    process = Process(feeding.broadcaster)
    feeding.start()
    for _ in range(20):
        await feeding.commit(500)
    feeding.broadcaster.progressed.clear()
    process.sender.connection_lost(None)
    assert feeding.broadcaster.progressed.is_set()
    assert feeding.broadcaster.head == feeding.window.end_cursor


@pytest.mark.parametrize("read_at", [0.01, 0.26, 0.34, 0.51])
def test_a_process_that_stops_reading_is_waited_for_no_longer_than_the_patience(
    read_at: float,
) -> None:
    """Which is 1 s here, from when it has read last; not much shorter either."""

    async def stall() -> float:
        feeding = Feeding(max_bytes=SMALL)
        process = Process(feeding.broadcaster)
        feeding.start()
        for _ in range(20):
            await feeding.commit(500)
        watching = asyncio.create_task(feeding.broadcaster.watch())
        await asyncio.sleep(read_at)
        process.socket.take()
        while not process.sender.is_stalled:
            feeding.broadcaster.progressed.clear()
            await feeding.broadcaster.progressed.wait()
        watching.cancel()
        return asyncio.get_running_loop().time() - read_at

    assert 0.74 < virtual_time.run(stall()) < 1.01


async def test_the_frame_of_a_number_that_is_not_kept_is_never_another_one() -> None:
    feeding = Feeding()
    feeding.start()
    await feeding.commit(1)
    kept = feeding.window.first_number
    feeding.start()
    await feeding.commit(1)
    assert feeding.window.first_number > kept
    with pytest.raises(AssertionError):
        feeding.window.frame(kept)


async def test_entries_in_the_wrong_order_are_an_error() -> None:
    feeding = Feeding()
    feeding.start()
    await feeding.commit(1)
    with pytest.raises(ChangelogError):
        feeding.window.append(transaction(10), 0.0, START)


async def test_bytes_that_wait_are_counted_as_the_changelog_counts_them() -> None:
    rng = random.Random(1)
    feeding = Feeding()
    feeding.start()
    for _ in range(50):
        await feeding.commit(*rng.choices([1, 100, 900], k=rng.randrange(1, 5)))
    feeding.window.append(transaction(feeding.end + 10, 7), 0.0, START)
    feeding.changelog.append(transaction(feeding.end + 10, 7))
    frames = [feeding.window.end_before(n) for n in range(1, feeding.window.end_number)]
    for cursor in (*frames, feeding.window.end_cursor):
        assert feeding.window.bytes_after(cursor) == feeding.changelog.bytes_after(cursor)
    assert feeding.window.size_bytes == feeding.changelog.size_bytes


async def test_a_large_batch_is_several_frames() -> None:
    """A process that reads one does nothing else meanwhile."""
    feeding = Feeding()
    process = Process(feeding.broadcaster)
    feeding.start()
    await feeding.commit(*[500_000] * 10)
    assert len(process.socket.frames) == 4, "as the socket takes no more"
    assert feeding.window.end_number == 5
    frame = FrameDecoder().decode(process.socket.frames[0])
    assert isinstance(frame, EraFrame)
