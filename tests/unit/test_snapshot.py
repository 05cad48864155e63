"""Which transactions a barrier's snapshot has seen, across the wrap of 32-bit ids too."""

from __future__ import annotations

import asyncio

import pytest

from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.hub.state.visibility import SnapshotSource
from pgrealtime.lsn import LSN, Xid
from pgrealtime.snapshot import ReadPoint, Snapshot, parse_read_point, parse_snapshot


@pytest.mark.parametrize(
    ("text", "xid", "is_seen"),
    [
        pytest.param("100:100:", 99, True, id="below-xmin"),
        pytest.param("100:100:", 100, False, id="at-xmax"),
        pytest.param("100:100:", 250, False, id="beyond-xmax"),
        pytest.param("100:110:100,105", 105, False, id="running"),
        pytest.param("100:110:100,105", 104, True, id="ended-while-others-ran"),
        pytest.param("4294967344:4294967344:", 4294967200, True, id="before-the-wrap"),
        pytest.param("4294967344:4294967344:", 47, True, id="after-the-wrap"),
        pytest.param("4294967344:4294967344:", 48, False, id="after-the-wrap-at-xmax"),
        pytest.param("4294967200:4294967344:4294967200", 4294967200, False, id="old-and-running"),
        pytest.param("12884901900:12884901900:", 11, True, id="third-epoch"),
    ],
)
def test_the_stream_s_ids_are_extended_by_their_distance(
    text: str, xid: int, *, is_seen: bool
) -> None:
    assert parse_snapshot(text).sees(Xid(xid)) is is_seen


def test_the_form_that_postgres_prints_is_read() -> None:
    assert parse_snapshot("795:799:795,797") == Snapshot(795, 799, frozenset({795, 797}))
    assert parse_snapshot("795:795:") == Snapshot(795, 795, frozenset())


def test_a_barrier_admits_what_was_invisible_and_all_that_commits_later() -> None:
    """A commit can be decoded before it is visible, and visible before it is decoded."""
    barrier = ReadPoint(parse_snapshot("100:110:105"), LSN(1000))

    assert barrier.predates(Xid(105), LSN(900))  # decoded, not visible: the read missed it
    assert not barrier.predates(Xid(104), LSN(990))  # visible, not yet decoded: the read had it
    assert barrier.predates(Xid(104), LSN(1001))  # beyond the end of WAL of then


async def test_who_asks_meanwhile_shares_the_next_snapshot_and_not_the_running_one() -> None:
    """A snapshot that began before a call came may miss what that call's reader sees."""
    gates = [asyncio.Event(), asyncio.Event()]
    started: list[int] = []
    is_started = asyncio.Event()

    async def fetch() -> ReadPoint:
        number = len(started)
        started.append(number)
        is_started.set()
        await gates[number].wait()
        return parse_read_point(f"{number + 1}:{number + 1}:", "0/10")

    snapshots = SnapshotSource(fetch)
    first = asyncio.create_task(snapshots.fetch())
    await is_started.wait()
    late = [asyncio.create_task(snapshots.fetch()) for _ in range(3)]
    gates[0].set()
    assert (await first).snapshot.xmin == 1
    gates[1].set()

    assert [(await task).snapshot.xmin for task in late] == [2, 2, 2]
    assert started == [0, 1]


async def test_who_asks_within_a_few_passes_of_the_loop_shares_the_first_snapshot() -> None:
    """Requests are read one by one: a query for the first of them would answer it alone."""
    queries = 0

    async def fetch() -> ReadPoint:
        nonlocal queries
        queries += 1
        return parse_read_point("5:5:", "0/10")

    snapshots = SnapshotSource(fetch)
    asking = []
    for _ in range(5):
        asking.append(asyncio.create_task(snapshots.fetch()))
        await asyncio.sleep(0)
    await asyncio.gather(*asking)

    assert queries == 1


async def test_a_failed_snapshot_fails_its_askers_and_not_the_next() -> None:
    answers: list[ReadPoint | None] = [None, parse_read_point("5:5:", "0/10")]

    async def fetch() -> ReadPoint:
        answer = answers.pop(0)
        if answer is None:
            raise DatabaseUnreachableError("away")
        return answer

    snapshots = SnapshotSource(fetch)
    with pytest.raises(DatabaseUnreachableError):
        await snapshots.fetch()

    assert (await snapshots.fetch()).snapshot.xmin == 5
