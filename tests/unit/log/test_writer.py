"""The owner's window: what is stored, in which order, and what the slot may forget."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import pytest

from pgrealtime.changes import Insert, TableName, Transaction
from pgrealtime.errors import LogAwayError
from pgrealtime.feed.frames import EntriesFrame, EraFrame, Frame
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.wire import FrameDecoder
from pgrealtime.history import SystemIdentity, make_era
from pgrealtime.log import writer as writer_module
from pgrealtime.log.jetstream import AppendRefusedError, LogStream
from pgrealtime.log.message import HEAD_BYTES, MAX_UNACKNOWLEDGED, Chain, Kind
from pgrealtime.log.tasks import end_tasks
from pgrealtime.log.writer import LogWriter
from pgrealtime.lsn import LSN, Xid

POSTS = TableName("public", "posts")
SYSTEM = SystemIdentity(system_id="1", timeline=1, database_name="app")
ERA = make_era(SYSTEM, [POSTS])
PAYLOAD = 1000


def row(end: int, size: int = 100) -> Transaction:
    return Transaction(Xid(end), LSN(end), 0, (Insert(POSTS, {"id": "x" * size}),), size)


class Stream:
    """Takes messages, and acknowledges them when it is told to."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes, asyncio.Future[int]]] = []
        self.acknowledged = 0

    async def append(self, payload: bytes, after: int) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.sent.append((after, payload, future))
        return future

    async def acknowledge(self, count: int = 1) -> None:
        for _ in range(count):
            async with asyncio.timeout(5):
                while len(self.sent) <= self.acknowledged:
                    await asyncio.sleep(0)
            after, _, future = self.sent[self.acknowledged]
            self.acknowledged += 1
            future.set_result(after + 1)
        await settle()

    def frames(self) -> Sequence[Frame]:
        decoder = FrameDecoder()
        return [decoder.decode(payload[HEAD_BYTES:]) for _, payload, _ in self.sent]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def running(
    stream: Stream, stored_upto: int = 0, **changed: float
) -> AsyncIterator[tuple[LogWriter, Intake, asyncio.Task[None]]]:
    chain = Chain(1, 0, salt=1, max_payload=PAYLOAD)
    chain.messages(Kind.FENCE, b"")
    writer = LogWriter(
        cast(LogStream, stream),
        chain,
        era=None,
        start=LSN(10),
        stored_upto=lambda: LSN(stored_upto),
        lag_seconds=changed.get("lag", 10.0),
        max_pause_seconds=changed.get("max_pause", 2.0),
        era_bytes=int(changed.get("era_bytes", 1 << 20)),
    )
    intake = Intake(writer, writer, max_size=1000)
    task = asyncio.create_task(writer.run())
    try:
        yield writer, intake, task
    finally:
        await end_tasks([task])


async def test_what_waits_meanwhile_is_one_message() -> None:
    """Batches grow with the delay of the log, instead of messages under way."""
    stream = Stream()
    async with running(stream) as (_, intake, _task):
        intake.start_era(ERA)
        await settle()
        for end in (20, 30, 40):
            await intake.append(row(end))
        intake.wake()
        await stream.acknowledge(2)
        frames = stream.frames()
    assert frames == [EraFrame(ERA, LSN(10)), EntriesFrame((row(20), row(30), row(40)))]
    assert [after for after, _, _ in stream.sent] == [1, 2]


async def test_an_entry_counts_as_stored_with_all_before_it() -> None:
    """An acknowledgement says nothing while one before it is missing."""
    stream = Stream()
    async with running(stream) as (writer, intake, _task):
        intake.start_era(ERA)
        await stream.acknowledge()
        await intake.append(row(20, size=3 * PAYLOAD))
        intake.wake()
        await settle()
        assert len(stream.sent) == MAX_UNACKNOWLEDGED + 1
        for _, _, future in stream.sent[2:]:
            future.set_result(9)
        await settle()
        assert (writer.head.lsn, writer.stored_lsn) == (10, 10)
        stream.sent[1][2].set_result(3)
        await settle()
        assert (writer.head.lsn, writer.stored_lsn) == (20, 20)
        assert writer.bytes_after(writer.head) == 0


async def test_no_more_is_under_way_than_the_rule_of_reading_allows() -> None:
    stream = Stream()
    async with running(stream) as (_, intake, _task):
        intake.start_era(ERA)
        await intake.append(row(20, size=20 * PAYLOAD))
        intake.wake()
        await settle()
        assert len(stream.sent) == MAX_UNACKNOWLEDGED
        await stream.acknowledge(3)
        assert len(stream.sent) == MAX_UNACKNOWLEDGED + 3


async def test_a_refusal_ends_the_term() -> None:
    stream = Stream()
    async with running(stream) as (writer, intake, task):
        intake.start_era(ERA)
        await settle()
        stream.sent[0][2].set_exception(AppendRefusedError("no"))
        with pytest.raises(AppendRefusedError):
            await task
        assert writer.stored_lsn == 0


async def test_a_log_that_acknowledges_nothing_ends_the_term() -> None:
    """The slot waits, and the WAL is the buffer."""
    stream = Stream()
    async with running(stream, max_pause=0.05) as (_, intake, task):
        intake.start_era(ERA)
        with pytest.raises(LogAwayError, match="acknowledged nothing"):
            await task


async def test_entries_wait_for_room() -> None:
    stream = Stream()
    async with running(stream) as (_, intake, _task):
        intake.start_era(ERA)
        await stream.acknowledge()
        await intake.append(row(20, size=900))
        waiting = asyncio.create_task(intake.append(row(30, size=900)))
        await settle()
        assert not waiting.done()
        await stream.acknowledge()
        await settle()
        assert waiting.done()
        await waiting


async def test_the_slot_stays_behind_what_was_read_back() -> None:
    """What the log loses of that is sent again."""
    stream = Stream()
    async with running(stream, stored_upto=20, lag=10.0) as (writer, intake, _task):
        intake.start_era(ERA)
        await stream.acknowledge()
        await intake.append(row(20))
        intake.wake()
        await stream.acknowledge()
        floors = []
        for now in (100.0, 105.0, 109.9, 110.0):
            writer.expire(now, writer.head)
            floors.append(writer.floor.lsn)
    assert floors == [10, 10, 10, 20]


async def test_the_next_stream_sends_the_last_entry_again() -> None:
    """It proves that the server has the same history."""
    stream = Stream()
    async with running(stream) as (writer, intake, _task):
        intake.start_era(ERA)
        assert writer.resume_lsn == 10
        for end in (20, 30):
            await intake.append(row(end))
        assert writer.resume_lsn == 20


async def test_an_era_is_repeated_so_that_every_window_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer_module, "_BATCH_BYTES", 100)
    stream = Stream()
    async with running(stream, era_bytes=250) as (_, intake, _task):
        intake.start_era(ERA)
        await stream.acknowledge()
        for end in (20, 30, 40, 50):
            await intake.append(row(end))
        intake.wake()
        await stream.acknowledge(5)
        frames = stream.frames()
    assert [frame.start_lsn for frame in frames if isinstance(frame, EraFrame)] == [10, 40]
    assert frames.index(EraFrame(ERA, LSN(40))) == 4
