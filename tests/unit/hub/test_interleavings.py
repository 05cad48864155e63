"""What must hold whatever happens between two steps of the hub. Each test is one way to fail."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from pgrealtime.changes import Insert, OversizedTransaction, Truncate
from pgrealtime.errors import SubscriptionError
from pgrealtime.lsn import LSN, Xid
from tests.unit.hub.harness import (
    DEADLINE,
    NOTES,
    POSTS,
    HubHarness,
    at,
    delete,
    insert,
    open_harness,
)


async def test_a_connection_that_missed_nothing_resumes_on_a_quiet_database() -> None:
    """Its position is after the last change and before the end of the commit: nothing is left.

    Catching up must end there, instead of reading again and again without yielding to other tasks.
    """
    async with open_harness() as harness:
        made = harness.commit(insert("a"))
        await harness.until_delivered()
        connection, sink = harness.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("b"))

        assert (await sink.wait_for(2))[1][1] == "posts/*"


async def test_a_position_within_a_commit_but_beyond_its_changes_is_at_its_end() -> None:
    """A client may send any position."""
    async with open_harness() as harness:
        made = harness.commit(insert("a"))
        await harness.until_delivered()
        connection, sink = harness.connect(position=f"{'x' * 40}.{at(made, 99)}")
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("b"))

        assert (await sink.wait_for(2))[1][1] == "posts/*"


# Another history, as after a failover: LSNs and transaction ids are used again


def partial(record_id: str) -> Insert:
    """Return an insert that lacks a column: evaluating it reads the live row."""
    return Insert(POSTS, {"id": record_id})


def restart(harness: HubHarness, lsn: int, epoch: str = "fedcba") -> None:
    """Begin another history, as the replication reader does."""
    harness.hub.stream_lost()
    harness.changelog.restart(LSN(lsn))
    harness._end = lsn
    harness.hub.stream_started(epoch)
    harness.hub.wake()


@pytest.mark.parametrize("lsn", [150, 10_000], ids=["lower", "higher"])
async def test_another_history_begins_while_a_slice_is_evaluated(lsn: int) -> None:
    """A slice of the lost history advances no head, and its events aren't sent."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        harness.database.rows_gate = asyncio.Event()
        harness.commit(partial("old"))
        await harness.database.is_at_rows_gate.wait()
        restart(harness, lsn)
        harness.database.rows_gate.set()
        harness.commit(insert("new"))
        events = await sink.wait_for(3)
        await harness.until_delivered()

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]
    assert len(sink.events()) == 3


@pytest.mark.parametrize("lsn", [150, 10_000], ids=["lower", "higher"])
async def test_another_history_begins_while_a_connection_catches_up(lsn: int) -> None:
    """The same for a slice of a connection that catches up."""
    async with open_harness() as harness:
        made = harness.commit(insert("a"), partial("old"))
        await harness.until_delivered()
        connection, sink = harness.connect(position=f"{'x' * 40}.{at(made, 1)}")
        harness.database.rows_gate = asyncio.Event()
        await harness.subscribe(connection, "posts/*")
        await harness.database.is_at_rows_gate.wait()
        restart(harness, lsn)
        harness.database.rows_gate.set()
        harness.commit(insert("new"))
        events = await sink.wait_for(3)
        await harness.until_delivered()

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]
    assert len(sink.events()) == 3


async def test_another_history_begins_while_events_wait_to_be_visible() -> None:
    """Their transactions are lost with the history and may never become visible."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        harness.hub.set_waits_for_visibility(waits=True)
        harness.database.snapshot_text = "50:50:"
        harness.commit(insert("lost"), xid=60)
        await harness.database.wait_for_snapshot_queries(3)
        restart(harness, 10_000)
        harness.commit(insert("new"), xid=49)
        events = await sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]


async def test_a_read_point_of_another_history_hides_nothing_of_this_one() -> None:
    """Its snapshot saw transaction 40; the new history's transaction 40 is another."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        harness.database.snapshot_text, harness.database.insert_lsn = "50:50:", "0/9000"
        await harness.subscribe(connection, "posts/*")
        restart(harness, 150)
        harness.commit(insert("new"), xid=40)
        events = await sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]


async def test_a_snapshot_of_another_history_makes_no_read_point_in_this_one() -> None:
    """A snapshot query that a failover overtakes is repeated."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        harness.database.snapshot_text, harness.database.insert_lsn = "50:50:", "0/9000"
        harness.database.gate = asyncio.Event()
        call = asyncio.create_task(harness.subscribe(connection, "posts/*"))
        await harness.database.wait_for_snapshot_queries(1)
        restart(harness, 150)
        harness.database.gate.set()
        await asyncio.sleep(0)
        harness.database.snapshot_text, harness.database.insert_lsn = "40:40:", "0/96"
        await call
        harness.commit(insert("new"), xid=40)

        assert (await sink.wait_for(2))[1][1] == "posts/*"


async def test_a_catch_up_that_waits_for_its_client_continues_where_a_call_has_put_it() -> None:
    """Its client replaces all topics while the connection is in the middle of a long commit."""
    async with open_harness() as harness:
        rows = [insert(f"n{n}") for n in range(300)]
        made = harness.commit(*rows, Truncate(NOTES), *rows)
        await harness.until_delivered()
        connection, sink = harness.connect(position=f"{'x' * 40}.{at(made, 1)}")
        sink.is_stuck = True
        await harness.subscribe(connection, "posts/*")
        before = len(await sink.wait_for(200))
        await harness.subscribe(connection)
        await harness.subscribe(connection, "notes/*")
        sink.unstick()
        harness.commit(insert("n", table=NOTES))
        events = await sink.wait_for(before + 1)

    assert [event[1] for event in events[before:]] == ["notes/*"]


# Oversized transactions


def commit_oversized(harness: HubHarness, xid: int) -> None:
    """Append an oversized transaction of posts."""
    harness._end += 100
    harness.changelog.append(
        OversizedTransaction(Xid(xid), LSN(harness._end), 0, frozenset({POSTS}))
    )
    harness.hub.wake()


async def test_an_oversized_commit_is_notified_once_it_is_visible() -> None:
    """A client that loads anew at once must find its changes."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        harness.hub.set_waits_for_visibility(waits=True)
        harness.database.snapshot_text = "50:50:"
        commit_oversized(harness, xid=50)
        await harness.database.wait_for_snapshot_queries(3)
        assert len(sink.events()) == 1

        harness.database.snapshot_text = "51:51:"
        assert (await sink.wait_for(2))[1][1] == "PB_RESYNC"


async def test_a_call_waits_until_a_skipped_oversized_commit_is_visible() -> None:
    """It was no gap for the connection's topics before the call; for the new topic it would be."""
    async with open_harness() as harness:
        connection, _sink = harness.connect()
        await harness.subscribe(connection, "notes/*")
        harness.database.snapshot_text = "50:50:"
        commit_oversized(harness, xid=50)
        await harness.until_delivered()
        call = asyncio.create_task(harness.subscribe(connection, "notes/*", "posts/*"))
        await harness.database.wait_for_snapshot_queries(3)
        assert not call.done()

        harness.database.snapshot_text = "51:51:"
        await call


# Ending connections that can't be notified of a gap


async def test_a_gap_right_after_the_first_call_ends_a_connection_a_second_later() -> None:
    """The JS SDK doesn't reconnect if the end arrives before the 204 of its call."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        began = time.monotonic()
        harness.commit(Truncate(POSTS))
        await harness.until_delivered()
        assert sink.state == "open"
        await sink.wait_until("ended")

    assert time.monotonic() - began > 0.9


async def test_a_first_call_that_gets_no_snapshot_ends_its_connection_a_second_later() -> None:
    """The Dart SDK would keep the connection without topics: it calls again only after an end."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        harness.database.is_unreachable = True
        with pytest.raises(SubscriptionError) as refused:
            await harness.subscribe(connection, "posts/*")
        await sink.wait_until("ended")

    assert refused.value.error_code == "stream_away"


async def test_a_limit_is_kept_although_calls_follow_one_another_without_a_pause() -> None:
    """Only the first call delays the end of a connection."""
    async with open_harness(max_lifetime=1.5) as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        harness.database.gate = asyncio.Event()
        call = asyncio.create_task(harness.subscribe(connection, "posts/*", "notes/*"))
        await sink.wait_until("ended")
        harness.database.gate.set()
        with pytest.raises(SubscriptionError):
            await call


# Positions: they cover what the client has received, and nothing else


async def test_a_heartbeat_does_not_move_a_position_over_a_gap_that_was_not_notified() -> None:
    """A client that disconnects before its first call resumes from there and is then notified."""
    async with open_harness(heartbeat=0.05) as harness:
        harness.commit(insert("a"))
        await harness.until_delivered()
        old = f"123456-{100:016x}-ffffffff"
        _connection, sink = harness.connect(position=f"{'x' * 40}.{old}")
        await sink.wait_for_bytes(b"\n:\n")

    assert [id_.partition(".")[2] for id_, _, _ in sink.events()] == [old]


async def test_a_position_beyond_a_gap_comes_after_the_gap() -> None:
    """A client that disconnects between the two resumes from the position before the gap."""
    async with open_harness() as harness:
        live, live_sink = harness.connect()
        await harness.subscribe(live, "posts/*", "PB_CURSOR")
        before = (await live_sink.wait_for(2))[-1][0]
        harness.commit(insert("a"), Truncate(POSTS))
        events = await live_sink.wait_for(5)
        late, late_sink = harness.connect(position=before)
        await harness.subscribe(late, "posts/*", "PB_CURSOR")
        repeated = await late_sink.wait_for(4)

    assert [event[1] for event in events[2:5]] == ["posts/*", "PB_RESYNC", "PB_CURSOR"]
    assert [event[1] for event in repeated[1:4]] == ["posts/*", "PB_RESYNC", "PB_CURSOR"]


async def test_a_position_beyond_the_end_of_the_wal_is_of_a_time_before_a_restore() -> None:
    """System identifier and timeline are the same; events up to the position would be skipped."""
    async with open_harness() as harness:
        harness.database.insert_lsn = "0/64"
        connection, sink = harness.connect(position=f"{'x' * 40}.abcdef-{0x900:016x}-00000001")
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("a"))
        events = await sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]


async def test_a_position_ahead_of_us_but_within_the_wal_is_another_process_s() -> None:
    """Its client has all events up to the position: it receives those after it."""
    async with open_harness() as harness:
        harness.database.insert_lsn = "0/900"
        connection, sink = harness.connect(position=f"{'x' * 40}.abcdef-{300:016x}-00000001")
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("a"))
        harness.commit(insert("b"), insert("c"))
        harness.commit(insert("d"))
        events = await sink.wait_for(3)

    assert [json.loads(event[2])["record"]["id"] for event in events[1:]] == ["c", "d"]


async def test_tables_that_come_back_bring_no_positions_of_before_back() -> None:
    """Changes of a table made while it wasn't streamed aren't known."""
    async with open_harness() as harness:
        made = harness.commit(insert("a"), insert("b"))
        await harness.until_delivered()
        harness.hub.stream_continued("fedcba")
        harness.commit(insert("of the others"))
        await harness.until_delivered()
        harness.hub.stream_continued("abcdef")
        connection, sink = harness.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await harness.subscribe(connection, "posts/*")
        late = harness.commit(insert("c"), insert("d"))
        events = await sink.wait_for(4)
        resumed, resumed_sink = harness.connect(position=f"{'x' * 40}.{at(late, 1)}")
        await harness.subscribe(resumed, "posts/*")
        repeated = await resumed_sink.wait_for(2)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*", "posts/*"]
    assert json.loads(repeated[1][2])["record"]["id"] == "d"


# Events that can't be decided or shown


FILTERED = 'posts/*?options={"query":{"filter":"title != \'x\'"}}'
"""A topic with a condition, whose verdict may need PostgreSQL."""


async def test_an_event_without_a_verdict_is_a_gap_for_subscriptions_with_a_condition() -> None:
    """Denying it would leave out a row that subscribers may see, in silence."""
    async with open_harness() as harness:
        resumable, resumable_sink = harness.connect(position="")
        plain, plain_sink = harness.connect()
        public, public_sink = harness.connect()
        other, other_sink = harness.connect()
        await harness.subscribe(resumable, FILTERED)
        await harness.subscribe(plain, FILTERED)
        await harness.subscribe(public, "posts/*")
        await harness.subscribe(other, "notes/*")
        harness.database.undecided = frozenset({"posts"})
        made = harness.commit(delete("a"))
        events = await resumable_sink.wait_for(3)
        await plain_sink.wait_until("ended")
        late, late_sink = harness.connect(position=f"{'x' * 40}.abcdef-{100:016x}-ffffffff")
        await harness.subscribe(late, FILTERED)
        repeated = await late_sink.wait_for(3)

    gap = '{"collections":["posts"],"reason":"unknown"}'
    end = f"abcdef-{made.end_lsn:016x}-ffffffff"
    assert events[-1] == (f"{resumable.id}.{end}", "PB_RESYNC", gap)
    assert repeated[-1] == (f"{late.id}.{end}", "PB_RESYNC", gap)
    assert [event[1] for event in public_sink.events()] == ["PB_CONNECT", "posts/*"]
    assert len(other_sink.events()) == 1


IN_NOTES = "notes/*" + FILTERED.removeprefix("posts/*")


@pytest.mark.parametrize("resumed", [False, True], ids=["live", "resumed"])
async def test_no_position_passes_a_gap_that_is_not_notified_yet(*, resumed: bool) -> None:
    """A client that disconnects before the notification resumes before the gap."""
    async with open_harness() as harness:
        start = f"abcdef-{100:016x}-ffffffff"
        harness.database.undecided = frozenset({"notes"})
        changes = (insert("a"), insert("n", table=NOTES), insert("b"), insert("c"))
        if resumed:
            made = harness.commit(*changes)
            await harness.until_delivered()
        connection, sink = harness.connect(position=f"{'x' * 40}.{start}" if resumed else "")
        public, public_sink = harness.connect(position=f"{'x' * 40}.{start}" if resumed else "")
        await harness.subscribe(connection, "posts/*", IN_NOTES)
        await harness.subscribe(public, "posts/*", "notes/*")
        await asyncio.sleep(0)
        if not resumed:
            made = harness.commit(*changes)
        events, of_public = await sink.wait_for(6), await public_sink.wait_for(5)

    ids = [id_.removeprefix(f"{connection.id}.") for id_, _, _ in events]
    assert [name for _, name, _ in events[1:]] == [
        "posts/*",
        IN_NOTES,
        "posts/*",
        "posts/*",
        "PB_RESYNC",
    ]
    assert ids[1:] == [at(made, 1)] * 4 + [at(made, 0xFFFFFFFF)]
    # Its topics have no filter, so their verdicts need no query.
    assert [id_.rpartition(".")[2] for id_, _, _ in of_public[1:]] == [
        at(made, n) for n in range(1, 5)
    ]


async def test_an_undecided_event_is_notified_with_its_own_part_of_the_slice() -> None:
    """A connection that falls behind after that part of the slice reads on from the part's end."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*", IN_NOTES)
        await asyncio.sleep(0)
        harness.database.undecided = frozenset({"notes"})
        harness.commit(insert("n", table=NOTES), *(insert(str(n)) for n in range(600)))
        events = await sink.wait_for(603)
        await harness.until_delivered()

    indexes = [index for index, (_, name, _) in enumerate(events) if name == "PB_RESYNC"]
    assert len(indexes) == 1
    assert indexes[0] < 300
    assert len(sink.events()) == 603


async def test_a_row_that_cannot_be_shown_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a gap of its collection only, and no position passes it before the notification."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        other, other_sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        await harness.subscribe(other, "notes/*")
        await asyncio.sleep(0)
        renderer = harness.hub._progress.generation.renderer
        render = renderer._render_record
        monkeypatch.setattr(
            renderer,
            "_render_record",
            lambda showing, *rest: (
                b"" if showing.event.record_id == "bad" else render(showing, *rest)
            ),
        )
        made = harness.commit(insert("a"), insert("bad"), insert("b"), insert("n", table=NOTES))
        events, of_other = await sink.wait_for(4), await other_sink.wait_for(2)
        late, late_sink = harness.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await harness.subscribe(late, "posts/*")
        repeated = await late_sink.wait_for(3)

    gap = ("PB_RESYNC", '{"collections":["posts"],"reason":"unknown"}')
    assert [name for _, name, _ in events[1:3]] == ["posts/*", "posts/*"]
    assert [id_.rpartition(".")[2] for id_, _, _ in events[1:]] == [
        at(made, 1),
        at(made, 1),
        at(made, 0xFFFFFFFF),
    ]
    assert events[3][1:] == repeated[2][1:] == gap
    assert of_other[1][1] == "notes/*"


@pytest.mark.parametrize("resumed", [False, True], ids=["live", "resumed"])
@pytest.mark.parametrize("cause", ["truncated", "too large", "undecided", "not rendered"])
async def test_a_gap_is_notified_once_its_cause_is_visible(
    monkeypatch: pytest.MonkeyPatch, cause: str, *, resumed: bool
) -> None:
    """A client that loads anew at once would otherwise read the rows from before the change."""
    async with open_harness() as harness:
        if cause == "not rendered":
            renderer = harness.hub._progress.generation.renderer
            monkeypatch.setattr(renderer, "_render_record", lambda *_: b"")
        start = harness.changelog.end_cursor
        first, first_sink = harness.connect(position="")
        await harness.subscribe(first, FILTERED)
        await asyncio.sleep(0)
        harness.database.snapshot_text = "50:50:"
        if cause == "too large":
            harness._end += 100
            harness.changelog.append(
                OversizedTransaction(Xid(60), LSN(harness._end), 0, frozenset({POSTS}))
            )
            harness.hub.wake()
        else:
            harness.database.undecided = frozenset({"posts"} if cause == "undecided" else ())
            harness.commit(Truncate(POSTS) if cause == "truncated" else insert("a"), xid=60)
        await harness.database.wait_for_snapshot_queries(3)
        sink = first_sink
        if resumed:
            second, sink = harness.connect(position=f"x.abcdef-{start.lsn:016x}-ffffffff")
            await harness.subscribe(second, FILTERED)
            await harness.database.wait_for_snapshot_queries(3)
        assert "PB_RESYNC" not in [name for _, name, _ in sink.events()]
        harness.database.snapshot_text = "70:70:"

        await sink.wait_for_bytes(b"PB_RESYNC")


async def test_of_two_gaps_at_one_cursor_only_the_last_moves_the_position() -> None:
    """A client that disconnects between them must still be notified of the second."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, FILTERED, "notes/*")
        await sink.wait_for(1)
        harness.database.undecided = frozenset({"posts"})
        made = harness.commit(insert("a"), Truncate(NOTES))
        await sink.wait_for_bytes(b'{"collections":["notes"]')
        gaps = [(id_, data) for id_, name, data in sink.events() if name == "PB_RESYNC"]

    assert [json.loads(data)["collections"] for _, data in gaps] == [["posts"], ["notes"]]
    held, moved = [id_.rpartition(".")[2] for id_, _ in gaps]
    assert (held, moved) == (at(made, 0), at(made, 2))


async def test_a_gap_is_notified_though_the_database_is_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No client can read it then either, and later events of other connections wait behind it."""
    monkeypatch.setattr("pgrealtime.hub.state.visibility._UNANSWERED_GAP_DELAY_SECONDS", 0.05)
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        harness.database.is_unreachable = True
        harness.commit(Truncate(POSTS), xid=60)

        await sink.wait_for_bytes(b"PB_RESYNC")


async def test_an_unexpected_error_in_evaluation_is_a_gap_and_ends_nothing() -> None:
    """An unexpected exception ends neither the dispatch task nor a connection that catches up."""
    async with open_harness() as harness:
        resumable, resumable_sink = harness.connect(position="")
        plain, plain_sink = harness.connect()
        await harness.subscribe(resumable, "posts/*")
        await harness.subscribe(plain, "posts/*")
        harness.database.fault = TypeError("unexpected row")
        harness.commit(insert("a"))
        await resumable_sink.wait_for(2)
        await plain_sink.wait_until("ended")
        late, late_sink = harness.connect(position=f"{'x' * 40}.abcdef-{100:016x}-ffffffff")
        await harness.subscribe(late, "posts/*")
        await late_sink.wait_for(2)
        harness.database.fault = None
        harness.commit(insert("b"))
        events, repeated = await resumable_sink.wait_for(3), await late_sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert [event[1] for event in repeated] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]


# Bounds


async def test_removed_subscriptions_are_not_kept_for_their_read_points() -> None:
    """A read point is dropped at the first commit beyond it; here no commit follows."""
    async with open_harness() as harness:
        connection, _sink = harness.connect()
        for _ in range(50):
            other, _ = harness.connect()
            await harness.subscribe(other, "posts/*")
            harness.hub.remove_connection(other)
            await harness.subscribe(connection, "posts/*", "notes/*")

        assert len(harness.hub._registry.subscriptions_with_read_point) == 2


@pytest.mark.parametrize("is_behind", [False, True], ids=["live", "replay"])
async def test_a_client_that_takes_nothing_has_few_bytes_of_a_long_commit_waiting(
    *, is_behind: bool
) -> None:
    """Each of its topics receives each row, and any client may subscribe so."""
    async with open_harness(send_buffer=20_000) as harness:
        rows = [insert(f"n{n:03}", "x" * 1000) for n in range(40)]
        start = f"{'x' * 40}.abcdef-{100:016x}-ffffffff"
        if is_behind:
            harness.commit(*rows)
            await harness.until_delivered()
        connection, sink = harness.connect(position=start)
        sink.is_stuck = True
        await harness.subscribe(connection, *(f"posts/*?{n}" for n in range(50)))
        if not is_behind:
            harness.commit(*rows)
        await sink.wait_for(2)
        await harness.until_delivered()
        for _ in range(1000):
            await asyncio.sleep(0)
        most = sink.buffered_bytes()
        sink.unstick()
        events = await sink.wait_for(1 + 40 * 50)

    assert most < 100_000
    titles = [json.loads(event[2])["record"]["id"] for event in events[1::50]]
    assert titles == [f"n{n:03}" for n in range(40)]


async def test_what_a_write_adds_to_its_message_is_not_taken_for_bytes_that_a_client_took() -> None:
    """Chunked encoding adds bytes: the transport holds more than the hub has written."""
    async with open_harness(stall_timeout=0.3) as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        sink.is_stuck, sink.overhead = True, 8
        async with asyncio.timeout(DEADLINE):
            while sink.state == "open":
                harness.commit(insert("a"))
                await asyncio.sleep(0.02)

    assert sink.state == "aborted"


async def test_the_return_of_the_stream_connects_no_more_than_the_limit() -> None:
    """Connections opened while the stream was down count against the limit as others do."""
    async with open_harness(is_up=False, max_connections=2) as harness:
        sinks = [harness.connect()[1] for _ in range(4)]
        harness.hub.stream_started("abcdef")
        await sinks[1].wait_for(1)

        assert [len(sink.events()) for sink in sinks] == [1, 1, 0, 0]
