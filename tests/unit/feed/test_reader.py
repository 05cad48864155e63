"""The replication reader: what it appends to the changelog over streams that break or change."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import cast

import msgspec
import pytest

from pgrealtime.changelog.memory import Changelog, Gap
from pgrealtime.changes import Insert, TableName, Transaction
from pgrealtime.errors import PgRealtimeError, SlotBusyError, StreamInterruptedError
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import OpenStream, ReplicationReader
from pgrealtime.history import SystemIdentity
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from pgrealtime.wal.feedback import Feedback
from pgrealtime.wal.slot import Slot
from pgrealtime.wal.stream import WalStream
from tests.feed_follower import Follower

POSTS = TableName("public", "posts")


class Behind:
    """A follower whose head is in the middle of a transaction."""

    def __init__(self, head: Cursor) -> None:
        self.head = head
        self.progressed = asyncio.Event()

    def wake(self) -> None:
        """Ignored."""

    def stream_started(self, epoch: str) -> None:
        raise AssertionError(epoch)

    def stream_continued(self, epoch: str) -> None:
        raise AssertionError(epoch)

    def stream_lost(self) -> None:
        raise AssertionError


def no_stream() -> AbstractAsyncContextManager[WalStream]:
    raise AssertionError


async def unexpected_advance() -> None:
    raise AssertionError


def large(end_lsn: int) -> Transaction:
    changes = (Insert(POSTS, {"id": "1"}), Insert(POSTS, {"id": "2"}))
    return Transaction(Xid(end_lsn), LSN(end_lsn), 0, changes, 90)


def test_appending_a_gap_discards_nothing_that_is_not_delivered() -> None:
    """The transaction being delivered and those after it may exceed the bound; all stay in it."""
    changelog = Changelog(LSN(0), max_bytes=100, max_age_seconds=1e9)
    follower = Behind(Cursor(LSN(10), 1))
    for end_lsn in (10, 20):
        changelog.append(large(end_lsn), 0.0, follower.head)
    intake = Intake(changelog, follower, max_size=100)
    intake.append_gap("schema", frozenset({POSTS}))

    gap = Gap(LSN(21), "schema", frozenset({POSTS}))
    assert changelog.read(follower.head, changelog.end_cursor, 10) == [large(10), large(20), gap]


def reader_of(changelog: Changelog) -> ReplicationReader:
    intake = Intake(changelog, Behind(changelog.end_cursor), max_size=100)
    return ReplicationReader(no_stream, intake, tables=[POSTS], advance_slot=unexpected_advance)


async def test_waiting_for_the_changelog_has_a_time_limit() -> None:
    """After a wait in vain, later calls return at once until the changelog has reached that LSN."""
    changelog = Changelog(LSN(0), max_bytes=100, max_age_seconds=1e9)
    reader = reader_of(changelog)
    changelog.append(large(1000))
    assert await reader.wait_for_changelog(LSN(1000))

    asyncio.get_running_loop().call_later(0.05, changelog.append, large(1100))
    assert await reader.wait_for_changelog(LSN(1100))

    began = asyncio.get_running_loop().time()
    assert not await reader.wait_for_changelog(LSN(1200))
    waited = asyncio.get_running_loop().time() - began
    assert not await reader.wait_for_changelog(LSN(1300))
    assert asyncio.get_running_loop().time() - began < waited + 0.5
    changelog.append(large(1200))
    changelog.append(large(1300))
    assert await reader.wait_for_changelog(LSN(1300))


async def test_the_header_of_a_page_is_not_waited_for() -> None:
    """The insert LSN is after a page's header if the last record ended with the page before it."""
    changelog = Changelog(LSN(0), max_bytes=100, max_age_seconds=1e9)
    changelog.append(large(8192))
    reader = reader_of(changelog)

    assert await reader.wait_for_changelog(LSN(8192 + 24))
    assert await reader.wait_for_changelog(LSN(8192 + 40))
    assert not await reader.wait_for_changelog(LSN(8192 + 48))


async def test_a_change_that_the_decoder_fails_at_is_skipped_whatever_the_detail() -> None:
    """The detail may have an address in the server's memory, another one each time."""
    advances: list[None] = []

    async def advance() -> None:
        advances.append(None)

    changelog = Changelog(LSN(0), max_bytes=100, max_age_seconds=1e9)
    reader = ReplicationReader(
        no_stream,
        Intake(changelog, Behind(changelog.end_cursor), max_size=100),
        tables=[POSTS],
        advance_slot=advance,
    )
    for number in range(5):
        assert not advances
        error = StreamInterruptedError("failed", detail=f"0x{number}", code="decoder_failed")
        await reader._handle_decoder_failure(error)
    assert advances


# Interrupted streams, restored servers, and switches to other tables

HERE = SystemIdentity(system_id="1", timeline=1, database_name="app")
DEADLINE = 10.0


class GivenStream:
    """A stream of given transactions, which is interrupted or closed when the test does so."""

    def __init__(self, start: int, *, reach: int = 0, is_durable: bool = False) -> None:
        lsn = self.wal_end = LSN(start)
        self.slot = Slot(name="feed", plugin="wal2json", start_lsn=lsn, is_durable=is_durable)
        self.feedback = Feedback(lsn, interval=10.0, now=0.0, is_durable=is_durable)
        self.initial_wal_end = LSN(max(reach, start))
        self.system = HERE
        self._given: deque[Transaction] = deque()
        self._error: PgRealtimeError | None = None
        self._changed = asyncio.Event()

    def append(self, *transactions: Transaction) -> None:
        self._given.extend(transactions)
        self.wal_end = transactions[-1].end_lsn
        self.feedback.record_transaction(self.wal_end)
        self._changed.set()

    def advance_to(self, lsn: int) -> None:
        """Report that no further transaction ends before an LSN."""
        self.wal_end = LSN(lsn)

    def interrupt(self) -> None:
        self._error = StreamInterruptedError("interrupted")
        self._changed.set()

    def stop(self) -> None:
        self._error = StreamInterruptedError("the stream was closed", code="stream_closed")
        self._changed.set()

    async def __anext__(self) -> list[Transaction]:
        while not self._given:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        batch, self._given = list(self._given), deque()
        return batch

    def request_keepalive(self) -> None:
        """Ignored."""


def opening(*streams: GivenStream) -> OpenStream:
    """Return a function that opens the streams one after the other, and the last one repeatedly."""
    left = deque(streams)

    @asynccontextmanager
    async def open_one() -> AsyncIterator[WalStream]:
        yield cast("WalStream", left.popleft() if len(left) > 1 else left[0])

    return open_one


@asynccontextmanager
async def reading(
    open_stream: OpenStream, *, is_durable: bool = False
) -> AsyncIterator[tuple[ReplicationReader, Changelog, Follower]]:
    """A running reader, with its changelog and its follower."""
    changelog = Changelog(LSN(0), max_bytes=1 << 20, max_age_seconds=1e9)
    follower = Follower(changelog, DEADLINE)
    reader = ReplicationReader(
        open_stream,
        Intake(changelog, follower, max_size=1 << 20),
        tables=[POSTS],
        advance_slot=unexpected_advance,
        is_durable=is_durable,
    )
    running = asyncio.create_task(reader.run())
    try:
        yield reader, changelog, follower
    finally:
        running.cancel()
        await asyncio.wait([running])


def ends(changelog: Changelog) -> list[int]:
    """Return the end LSNs of the transactions in the changelog."""
    entries = changelog.read(changelog.floor, changelog.end_cursor, 1 << 20)
    return [entry.end_lsn for entry in entries if isinstance(entry, Transaction)]


async def test_a_restored_server_begins_another_history() -> None:
    """System identifier and timeline are the same, but its WAL ends before the changelog's head."""
    before = GivenStream(100, is_durable=True)
    restored = GivenStream(100, reach=150, is_durable=True)
    async with reading(opening(before, restored)) as (_, changelog, follower):
        await follower.until(lambda: len(follower.said) == 1)
        before.append(large(200), large(300))
        await follower.until(lambda: ends(changelog) == [200, 300])
        before.interrupt()
        await follower.until(lambda: len(follower.said) == 3)
        assert ends(changelog) == []
        assert changelog.end_cursor == Cursor(LSN(100), END_ORDINAL)
        restored.append(large(160))
        await follower.until(lambda: ends(changelog) == [160])

    first, lost, second = follower.said
    assert lost == "lost"
    assert first != second


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param((250,), id="in-between"),
        pytest.param((200, 350), id="without-the-last"),
        pytest.param((), id="nothing"),
    ],
)
async def test_a_restored_server_that_has_gone_on_is_known_by_what_it_lacks(
    sent: tuple[int, ...],
) -> None:
    """Its WAL ends after the changelog's head, and has other commits before it."""
    before = GivenStream(100, is_durable=True)
    restored, anew = (GivenStream(100, reach=400, is_durable=True) for _ in range(2))
    async with reading(opening(before, restored, anew)) as (_, changelog, follower):
        await follower.until(lambda: len(follower.said) == 1)
        before.append(large(200), large(300))
        await follower.until(lambda: ends(changelog) == [200, 300])
        before.interrupt()
        await follower.until(lambda: len(follower.said) == 3)
        if sent:
            restored.append(*map(large, sent))
        restored.advance_to(400)
        await follower.until(lambda: len(follower.said) == 5)
        assert ends(changelog) == []

    first, _, second, _, third = follower.said
    assert first == second != third


async def test_another_commit_of_the_same_id_and_end_is_another_history() -> None:
    """A restored server may repeat ids and LSNs; the commit time differs."""
    before = GivenStream(100, is_durable=True)
    restored, anew = (GivenStream(100, reach=400, is_durable=True) for _ in range(2))
    async with reading(opening(before, restored, anew)) as (_, changelog, follower):
        await follower.until(lambda: len(follower.said) == 1)
        before.append(large(200))
        await follower.until(lambda: ends(changelog) == [200])
        before.interrupt()
        await follower.until(lambda: len(follower.said) == 3)
        restored.append(msgspec.structs.replace(large(200), commit_time_us=1))
        await follower.until(lambda: len(follower.said) == 5)

    assert follower.said[2] != follower.said[4]


async def test_a_watermark_belongs_to_its_history_too() -> None:
    """Otherwise what a restored server commits before a watermark would be skipped as known."""
    before = GivenStream(100, is_durable=True)
    restored, anew = (GivenStream(100, reach=400, is_durable=True) for _ in range(2))
    async with reading(opening(before, restored, anew)) as (reader, changelog, follower):
        await follower.until(lambda: len(follower.said) == 1)
        before.append(large(200))
        await follower.until(lambda: ends(changelog) == [200])
        before.feedback.record_quiet(LSN(300))
        reader._append_watermark(cast("WalStream", before), time.monotonic() + 60)
        assert changelog.end_cursor == Cursor(LSN(300), END_ORDINAL)
        before.interrupt()
        await follower.until(lambda: len(follower.said) == 3)
        restored.append(large(200), large(250))
        await follower.until(lambda: len(follower.said) == 5)

    assert follower.said[2] != follower.said[4]


async def test_a_durable_stream_that_broke_goes_on_where_it_was() -> None:
    """Repeated transactions are appended once, and positions stay valid."""
    before = GivenStream(100, is_durable=True)
    after = GivenStream(100, reach=300, is_durable=True)
    async with reading(opening(before, after)) as (_, changelog, follower):
        await follower.until(lambda: len(follower.said) == 1)
        before.append(large(200), large(300))
        await follower.until(lambda: ends(changelog) == [200, 300])
        before.interrupt()
        await follower.until(lambda: len(follower.said) == 3)
        after.append(large(200), large(300), large(400))
        await follower.until(lambda: ends(changelog) == [200, 300, 400])

    assert follower.said[0] == follower.said[2]


async def test_what_ends_before_the_successor_begins_is_read_from_the_one_before() -> None:
    """Transactions that both streams have are appended once."""
    before, after = GivenStream(100), GivenStream(250)
    async with reading(opening(before)) as (reader, changelog, follower):
        await follower.until(lambda: len(follower.said) == 1)
        after.append(large(300), large(400))
        switch = asyncio.create_task(reader.switch(opening(after), [POSTS]))
        await asyncio.sleep(0.1)
        assert not switch.done()
        before.append(large(200), large(300))
        await switch
        await follower.until(lambda: ends(changelog) == [200, 300, 400])


async def test_other_tables_that_are_wanted_while_a_durable_stream_is_opened() -> None:
    """A slot has one reader: the stream being opened is closed before the other is opened."""
    may_open, opened = asyncio.Event(), asyncio.Event()
    is_read = False
    closings = 0

    def slow(stream: GivenStream) -> OpenStream:
        @asynccontextmanager
        async def open_it() -> AsyncIterator[WalStream]:
            nonlocal is_read, closings
            if is_read:
                raise SlotBusyError("the slot is in use")
            is_read = True
            try:
                opened.set()
                await may_open.wait()
                yield cast("WalStream", stream)
            finally:
                is_read = False
                closings += 1

        return open_it

    first, second = (GivenStream(100, is_durable=True) for _ in range(2))
    async with reading(slow(first), is_durable=True) as (reader, _, follower):
        await opened.wait()
        switch = asyncio.create_task(reader.switch(slow(second), [POSTS]))
        await asyncio.sleep(0.05)
        assert not switch.done()
        may_open.set()
        async with asyncio.timeout(DEADLINE):
            await switch
        assert reader.stream is cast("WalStream", second)
        assert closings == 1

    assert [word.split()[0] for word in follower.said] == ["started"]


async def test_a_switch_ends_with_the_reader_that_would_carry_it_out() -> None:
    """An owner that is fenced meanwhile: whoever waits holds the lock that reloads need."""

    @asynccontextmanager
    async def never() -> AsyncIterator[WalStream]:
        await asyncio.Event().wait()
        yield cast("WalStream", GivenStream(100))

    async with reading(never, is_durable=True) as (reader, _, _):
        switch = asyncio.create_task(reader.switch(never, [POSTS]))
        await asyncio.sleep(0.01)
        assert not switch.done()
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(StreamInterruptedError):
            await switch
        with pytest.raises(StreamInterruptedError):
            await reader.switch(never, [POSTS])
