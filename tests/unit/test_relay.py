"""What the relay does with the changelog for who is behind; streams are tested for real."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

from pgrealtime.changelog.base import Gap
from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.changes import Insert, TableName, Transaction
from pgrealtime.errors import StreamInterruptedError
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.relay import Relay
from pgrealtime.wal.stream import WalStream

POSTS = TableName("public", "posts")


class Behind:
    """A follower in the middle of a transaction."""

    def __init__(self, head: Cursor) -> None:
        self.head = head
        self.progressed = asyncio.Event()

    def wake(self) -> None:
        """It has enough to do."""

    def stream_started(self, epoch: str) -> None:
        raise AssertionError(epoch)

    def stream_continued(self, epoch: str) -> None:
        raise AssertionError(epoch)

    def stream_lost(self) -> None:
        raise AssertionError


def no_stream() -> AbstractAsyncContextManager[WalStream]:
    raise AssertionError


async def not_asked() -> None:
    raise AssertionError


def large(end_lsn: int) -> Transaction:
    changes = (Insert(POSTS, {"id": "1"}), Insert(POSTS, {"id": "2"}))
    return Transaction(Xid(end_lsn), LSN(end_lsn), 0, changes, 90)


def test_a_gap_that_is_told_takes_nothing_from_who_has_yet_to_read_it() -> None:
    """What is being read may be as much as there is room for, and what waits as well."""
    changelog = MemoryChangelog(LSN(0), max_size=100, max_age=1e9)
    follower = Behind(Cursor(LSN(10), 1))
    for end_lsn in (10, 20):
        changelog.append(large(end_lsn), 0.0, follower.head)
    relay = Relay(no_stream, changelog, follower, tables=[POSTS], max_size=100, pass_over=not_asked)
    relay.tell_gap("schema", frozenset({POSTS}))

    gap = Gap(LSN(21), "schema", frozenset({POSTS}))
    assert changelog.read(follower.head, changelog.head, 10) == [large(10), large(20), gap]


def relay_of(changelog: MemoryChangelog) -> Relay:
    follower = Behind(changelog.head)
    return Relay(no_stream, changelog, follower, tables=[POSTS], max_size=100, pass_over=not_asked)


async def test_who_dates_a_row_waits_for_the_stream_and_not_for_ever() -> None:
    """What came in time, or was there; and no second wait before it has come."""
    changelog = MemoryChangelog(LSN(0), max_size=100, max_age=1e9)
    relay = relay_of(changelog)
    changelog.append(large(1000))
    assert await relay.reach(LSN(1000))

    asyncio.get_running_loop().call_later(0.05, changelog.append, large(1100))
    assert await relay.reach(LSN(1100))

    began = asyncio.get_running_loop().time()
    assert not await relay.reach(LSN(1200))
    waited = asyncio.get_running_loop().time() - began
    assert not await relay.reach(LSN(1300))
    assert asyncio.get_running_loop().time() - began < waited + 0.5
    changelog.append(large(1200))
    changelog.append(large(1300))
    assert await relay.reach(LSN(1300))


async def test_the_header_of_a_page_is_not_waited_for() -> None:
    """The insert position lies behind it where the last record ended with the page before."""
    changelog = MemoryChangelog(LSN(0), max_size=100, max_age=1e9)
    changelog.append(large(8192))
    relay = relay_of(changelog)

    assert await relay.reach(LSN(8192 + 24))
    assert await relay.reach(LSN(8192 + 40))
    assert not await relay.reach(LSN(8192 + 48))


async def test_what_a_decoder_fails_at_is_passed_over_whatever_the_server_says_of_it() -> None:
    """Its words may name an address in its memory, another one each time."""
    passed: list[None] = []

    async def pass_over() -> None:
        passed.append(None)

    changelog = MemoryChangelog(LSN(0), max_size=100, max_age=1e9)
    relay = Relay(
        no_stream,
        changelog,
        Behind(changelog.head),
        tables=[POSTS],
        max_size=100,
        pass_over=pass_over,
    )
    for number in range(5):
        assert not passed
        error = StreamInterruptedError("failed", detail=f"0x{number}", code="decoder_failed")
        await relay._mind_failure(error)
    assert passed
