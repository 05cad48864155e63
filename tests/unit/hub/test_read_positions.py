"""The position of a read is behind the commits that it saw, before the first that it didn't."""

from __future__ import annotations

import pytest

from pgrealtime.lsn import LSN, parse_position
from pgrealtime.snapshot import ReadPoint, parse_snapshot
from tests.unit.hub.harness import insert, open_harness


def read_point(snapshot: str, insert_lsn: int) -> ReadPoint:
    return ReadPoint(parse_snapshot(snapshot), LSN(insert_lsn))


@pytest.mark.parametrize("is_delivered", [True, False], ids=["delivered", "not-yet"])
async def test_a_commit_that_the_snapshot_lacks_is_beyond_the_position(
    is_delivered: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    """A commit is in the stream before a snapshot sees it; one after it may be seen already."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        if not is_delivered:
            harness.hub.wake = lambda: None  # type: ignore[method-assign]
        seen = harness.commit(insert("a"), xid=50)
        unseen = harness.commit(insert("b"), xid=51)
        last = harness.commit(insert("c"), xid=52)
        if is_delivered:
            await sink.wait_for(4)
        read = harness.hub.begin_read()
        position = await read.position_of(read_point("51:53:51", last.end_lsn + 8))

    assert position is not None
    parsed = parse_position(position)
    assert parsed is not None
    assert seen.end_lsn <= parsed.cursor.lsn < unseen.end_lsn


@pytest.mark.parametrize("begins", ["before its delivery", "after it"])
async def test_what_becomes_visible_during_a_read_is_beyond_its_position(begins: str) -> None:
    """Its snapshot lacks a commit that is delivered and, by another's, seen before it ends."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        if begins == "before its delivery":
            read = harness.hub.begin_read()
        unseen = harness.commit(insert("b"), xid=51)
        last = harness.commit(insert("c"), xid=52)
        await sink.wait_for(3)
        if begins == "after it":
            read = harness.hub.begin_read()
        await harness.hub.wait_for_delivered()  # as for another read
        position = await read.position_of(read_point("51:53:51", last.end_lsn + 8))

    assert position is not None
    parsed = parse_position(position)
    assert parsed is not None
    assert parsed.cursor.lsn < unseen.end_lsn


async def test_where_all_is_seen_the_position_is_the_end_of_the_wal_that_was_read() -> None:
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        made = harness.commit(insert("a"), xid=50)
        await sink.wait_for(2)
        read = harness.hub.begin_read()
        position = await read.position_of(read_point("53:53:", made.end_lsn))

    assert position is not None
    parsed = parse_position(position)
    assert parsed is not None
    assert parsed.cursor.lsn == made.end_lsn


async def test_while_the_stream_is_interrupted_no_position_is_told() -> None:
    async with open_harness() as harness:
        read = harness.hub.begin_read()
        harness.hub.stream_lost()

        assert await read.position_of(read_point("53:53:", 100)) is None


async def test_what_was_removed_during_a_read_counts_as_unseen() -> None:
    """Whether its snapshot saw that isn't known any more."""
    async with open_harness() as harness:
        seen = harness.commit(insert("a"), xid=50)
        await harness.until_delivered()
        read = harness.hub.begin_read()
        harness.commit(insert("b"), xid=51)
        last = harness.commit(insert("c"), xid=52)
        await harness.until_delivered()
        harness.changelog.expire(1e9, harness.hub.head)
        position = await read.position_of(read_point("51:53:51", last.end_lsn + 8))

    assert position is not None
    parsed = parse_position(position)
    assert parsed is not None
    assert parsed.cursor.lsn == seen.end_lsn


async def test_a_read_over_the_beginning_of_another_history_has_no_position() -> None:
    """Its snapshot is of the one before."""
    async with open_harness() as harness:
        read = harness.hub.begin_read()
        harness.hub.stream_lost()
        harness.changelog.restart(LSN(5000))
        harness.hub.stream_started("fedcba")

        assert await read.position_of(read_point("53:53:", 100)) is None
