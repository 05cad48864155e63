"""What must hold whatever happens between two steps of the hub: one test per way to go wrong."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from pgrealtime.changes import Insert, OversizedTransaction, Truncate
from pgrealtime.errors import SubscriptionError
from pgrealtime.lsn import LSN, Xid
from tests.unit.hub.room import DEADLINE, NOTES, POSTS, Room, at, delete, insert, open_room


async def test_who_missed_nothing_comes_back_to_a_quiet_database() -> None:
    """It stands after the last change but before the end of its commit: nothing is left to read.

    Once this made the replay look for more without ever letting another task run.
    """
    async with open_room() as room:
        made = room.commit(insert("a"))
        await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await room.subscribe(connection, "posts/*")
        room.commit(insert("b"))

        assert (await sink.wait_for(2))[1][1] == "posts/*"


async def test_a_position_within_a_commit_but_beyond_its_changes_is_at_its_end() -> None:
    """Anybody can write a position."""
    async with open_room() as room:
        made = room.commit(insert("a"))
        await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 99)}")
        await room.subscribe(connection, "posts/*")
        room.commit(insert("b"))

        assert (await sink.wait_for(2))[1][1] == "posts/*"


# Another history, as after a failover: LSNs and transaction ids are used again


def partial(record_id: str) -> Insert:
    """A row that isn't whole: judging it asks the database."""
    return Insert(POSTS, {"id": record_id})


def restart(room: Room, lsn: int, epoch: str = "fedcba") -> None:
    """Another history begins, as the relay finds out."""
    room.hub.stream_lost()
    room.changelog.restart(LSN(lsn))
    room._end = lsn
    room.hub.stream_started(epoch)
    room.hub.wake()


@pytest.mark.parametrize("lsn", [150, 10_000], ids=["lower", "higher"])
async def test_another_history_begins_while_a_slice_is_judged(lsn: int) -> None:
    """The slice is of a past that no longer counts: it moves nothing and nobody hears of it."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        room.database.rows_gate = asyncio.Event()
        room.commit(partial("old"))
        await room.database.is_holding.wait()
        restart(room, lsn)
        room.database.rows_gate.set()
        room.commit(insert("new"))
        events = await sink.wait_for(3)
        await room.settled()

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]
    assert len(sink.events()) == 3


@pytest.mark.parametrize("lsn", [150, 10_000], ids=["lower", "higher"])
async def test_another_history_begins_while_a_replay_is_judged(lsn: int) -> None:
    async with open_room() as room:
        made = room.commit(insert("a"), partial("old"))
        await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        room.database.rows_gate = asyncio.Event()
        await room.subscribe(connection, "posts/*")
        await room.database.is_holding.wait()
        restart(room, lsn)
        room.database.rows_gate.set()
        room.commit(insert("new"))
        events = await sink.wait_for(3)
        await room.settled()

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]
    assert len(sink.events()) == 3


async def test_another_history_begins_while_events_wait_to_be_visible() -> None:
    """Their transactions may never be: they are lost with the history."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        room.hub.set_waits_for_visibility(waits=True)
        room.database.snapshot_text = "50:50:"
        room.commit(insert("lost"), xid=60)
        await room.database.asked_again(3)
        restart(room, 10_000)
        room.commit(insert("new"), xid=49)
        events = await sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert '"new"' in events[2][2]


async def test_a_barrier_of_another_history_hides_nothing_of_this_one() -> None:
    """Its snapshot saw transaction 40; the new history's 40 is another."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        room.database.snapshot_text, room.database.insert_lsn = "50:50:", "0/9000"
        await room.subscribe(connection, "posts/*")
        restart(room, 150)
        room.commit(insert("new"), xid=40)
        events = await sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]


async def test_a_snapshot_asked_for_in_another_history_makes_no_barrier_in_this_one() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        room.database.snapshot_text, room.database.insert_lsn = "50:50:", "0/9000"
        room.database.gate = asyncio.Event()
        call = asyncio.create_task(room.subscribe(connection, "posts/*"))
        await room.database.asked_again(1)
        restart(room, 150)
        room.database.gate.set()
        await asyncio.sleep(0)
        room.database.snapshot_text, room.database.insert_lsn = "40:40:", "0/96"
        await call
        room.commit(insert("new"), xid=40)

        assert (await sink.wait_for(2))[1][1] == "posts/*"


async def test_a_replay_that_waits_for_its_client_goes_on_where_a_call_has_put_it() -> None:
    """It was in the middle of a long commit when its client dropped all topics and took others."""
    async with open_room() as room:
        rows = [insert(f"n{n}") for n in range(300)]
        made = room.commit(*rows, Truncate(NOTES), *rows)
        await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        sink.is_stuck = True
        await room.subscribe(connection, "posts/*")
        before = len(await sink.wait_for(200))
        await room.subscribe(connection)
        await room.subscribe(connection, "notes/*")
        sink.unstick()
        room.commit(insert("n", table=NOTES))
        events = await sink.wait_for(before + 1)

    assert [event[1] for event in events[before:]] == ["notes/*"]


# Commits that are too large are commits


def commit_oversized(room: Room, xid: int) -> None:
    room._end += 100
    room.changelog.append(OversizedTransaction(Xid(xid), LSN(room._end), 0, frozenset({POSTS})))
    room.hub.wake()


async def test_a_commit_too_large_is_told_when_it_can_be_read_and_not_before() -> None:
    """Whoever loads anew at once must find it."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        room.hub.set_waits_for_visibility(waits=True)
        room.database.snapshot_text = "50:50:"
        commit_oversized(room, xid=50)
        await room.database.asked_again(3)
        assert len(sink.events()) == 1

        room.database.snapshot_text = "51:51:"
        assert (await sink.wait_for(2))[1][1] == "PB_RESYNC"


async def test_a_call_waits_until_readers_see_a_commit_too_large_that_was_passed_over() -> None:
    """It concerned nobody on this connection; the new topic it would have concerned."""
    async with open_room() as room:
        connection, _sink = room.connect()
        await room.subscribe(connection, "notes/*")
        room.database.snapshot_text = "50:50:"
        commit_oversized(room, xid=50)
        await room.settled()
        call = asyncio.create_task(room.subscribe(connection, "notes/*", "posts/*"))
        await room.database.asked_again(3)
        assert not call.done()

        room.database.snapshot_text = "51:51:"
        await call


# Who can't be told is ended, but not while that would leave the JS SDK dead


async def test_a_gap_right_after_the_first_call_ends_a_connection_a_second_later() -> None:
    """The end would overtake the 204, and the SDK take that for a call it gave up itself."""
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        began = time.monotonic()
        room.commit(Truncate(POSTS))
        await room.settled()
        assert sink.state == "open"
        await sink.wait_until("ended")

    assert time.monotonic() - began > 0.9


async def test_a_first_call_that_gets_no_snapshot_ends_its_connection_a_second_later() -> None:
    """Its stream would stay open without topics: the Dart SDK asks only after an end."""
    async with open_room() as room:
        connection, sink = room.connect()
        room.database.is_away = True
        with pytest.raises(SubscriptionError) as refused:
            await room.subscribe(connection, "posts/*")
        await sink.wait_until("ended")

    assert refused.value.error_code == "stream_away"


async def test_a_limit_is_kept_although_calls_follow_one_another_without_a_pause() -> None:
    """Only the first call must be answered before the end."""
    async with open_room(max_lifetime=1.5) as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        room.database.gate = asyncio.Event()
        call = asyncio.create_task(room.subscribe(connection, "posts/*", "notes/*"))
        await sink.wait_until("ended")
        room.database.gate.set()
        with pytest.raises(SubscriptionError):
            await call


# The position says what its client has, and nothing more


async def test_a_heartbeat_does_not_move_a_position_over_a_gap_that_was_not_told() -> None:
    """Who breaks off before its first call asks again from there, and must be told then."""
    async with open_room(heartbeat=0.05) as room:
        room.commit(insert("a"))
        await room.settled()
        old = f"123456-{100:016x}-ffffffff"
        _connection, sink = room.connect(position=f"{'x' * 40}.{old}")
        await sink.wait_for_bytes(b"\n:\n")

    assert [id_.partition(".")[2] for id_, _, _ in sink.events()] == [old]


async def test_a_position_beyond_a_gap_comes_after_the_gap() -> None:
    """A break between the two: the client comes back from the one it has."""
    async with open_room() as room:
        live, live_sink = room.connect()
        await room.subscribe(live, "posts/*", "PB_CURSOR")
        before = (await live_sink.wait_for(2))[-1][0]
        room.commit(insert("a"), Truncate(POSTS))
        events = await live_sink.wait_for(5)
        late, late_sink = room.connect(position=before)
        await room.subscribe(late, "posts/*", "PB_CURSOR")
        again = await late_sink.wait_for(4)

    assert [event[1] for event in events[2:5]] == ["posts/*", "PB_RESYNC", "PB_CURSOR"]
    assert [event[1] for event in again[1:4]] == ["posts/*", "PB_RESYNC", "PB_CURSOR"]


async def test_a_position_beyond_the_end_of_the_wal_is_of_a_time_before_a_restore() -> None:
    """The files say the same system and timeline, and everything up to there would be skipped."""
    async with open_room() as room:
        room.database.insert_lsn = "0/64"
        connection, sink = room.connect(position=f"{'x' * 40}.abcdef-{0x900:016x}-00000001")
        await room.subscribe(connection, "posts/*")
        room.commit(insert("a"))
        events = await sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]


async def test_a_position_ahead_of_us_but_within_the_wal_is_another_process_s() -> None:
    """What comes up to there its client has; it only has to wait."""
    async with open_room() as room:
        room.database.insert_lsn = "0/900"
        connection, sink = room.connect(position=f"{'x' * 40}.abcdef-{300:016x}-00000001")
        await room.subscribe(connection, "posts/*")
        room.commit(insert("a"))
        room.commit(insert("b"), insert("c"))
        room.commit(insert("d"))
        events = await sink.wait_for(3)

    assert [json.loads(event[2])["record"]["id"] for event in events[1:]] == ["c", "d"]


async def test_tables_that_come_back_bring_no_positions_of_before_back() -> None:
    """What changed in a table while it was not streamed, nobody can tell."""
    async with open_room() as room:
        made = room.commit(insert("a"), insert("b"))
        await room.settled()
        room.hub.stream_continued("fedcba")
        room.commit(insert("of the others"))
        await room.settled()
        room.hub.stream_continued("abcdef")
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await room.subscribe(connection, "posts/*")
        late = room.commit(insert("c"), insert("d"))
        events = await sink.wait_for(4)
        again, again_sink = room.connect(position=f"{'x' * 40}.{at(late, 1)}")
        await room.subscribe(again, "posts/*")
        repeated = await again_sink.wait_for(2)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*", "posts/*"]
    assert json.loads(repeated[1][2])["record"]["id"] == "d"


# What could not be found out


FILTERED = 'posts/*?options={"query":{"filter":"title != \'x\'"}}'
"""Has a condition, so Postgres may have to be asked."""


async def test_what_nobody_could_be_asked_about_is_a_gap_for_who_depends_on_it() -> None:
    """Denying it would be silence about a row that they may see."""
    async with open_room() as room:
        told, told_sink = room.connect(position="")
        plain, plain_sink = room.connect()
        public, public_sink = room.connect()
        other, other_sink = room.connect()
        await room.subscribe(told, FILTERED)
        await room.subscribe(plain, FILTERED)
        await room.subscribe(public, "posts/*")
        await room.subscribe(other, "notes/*")
        room.database.undecided = frozenset({"posts"})
        made = room.commit(delete("a"))
        events = await told_sink.wait_for(3)
        await plain_sink.wait_until("ended")
        late, late_sink = room.connect(position=f"{'x' * 40}.abcdef-{100:016x}-ffffffff")
        await room.subscribe(late, FILTERED)
        again = await late_sink.wait_for(3)

    gap = '{"collections":["posts"],"reason":"unknown"}'
    end = f"abcdef-{made.end_lsn:016x}-ffffffff"
    assert events[-1] == (f"{told.id}.{end}", "PB_RESYNC", gap)
    assert again[-1] == (f"{late.id}.{end}", "PB_RESYNC", gap)
    assert [event[1] for event in public_sink.events()] == ["PB_CONNECT", "posts/*"]
    assert len(other_sink.events()) == 1


IN_NOTES = "notes/*" + FILTERED.removeprefix("posts/*")


@pytest.mark.parametrize("resumed", [False, True], ids=["live", "resumed"])
async def test_no_id_passes_what_is_not_told_yet(*, resumed: bool) -> None:
    """Who breaks off before the gap is told comes back from before it, and is told then."""
    async with open_room() as room:
        start = f"abcdef-{100:016x}-ffffffff"
        room.database.undecided = frozenset({"notes"})
        changes = (insert("a"), insert("n", table=NOTES), insert("b"), insert("c"))
        if resumed:
            made = room.commit(*changes)
            await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{start}" if resumed else "")
        public, public_sink = room.connect(position=f"{'x' * 40}.{start}" if resumed else "")
        await room.subscribe(connection, "posts/*", IN_NOTES)
        await room.subscribe(public, "posts/*", "notes/*")
        await asyncio.sleep(0)
        if not resumed:
            made = room.commit(*changes)
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
    # Nobody is asked about what it subscribed to.
    assert [id_.rpartition(".")[2] for id_, _, _ in of_public[1:]] == [
        at(made, n) for n in range(1, 5)
    ]


async def test_what_is_not_decided_is_told_with_the_portion_that_it_is_in() -> None:
    """A connection that falls behind after that portion reads on from behind it."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*", IN_NOTES)
        await asyncio.sleep(0)
        room.database.undecided = frozenset({"notes"})
        room.commit(insert("n", table=NOTES), *(insert(str(n)) for n in range(600)))
        events = await sink.wait_for(603)
        await room.settled()

    places = [place for place, (_, name, _) in enumerate(events) if name == "PB_RESYNC"]
    assert len(places) == 1
    assert places[0] < 300
    assert len(sink.events()) == 603


async def test_a_row_that_cannot_be_shown_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its collection alone, and no id passes it before."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        other, other_sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        await room.subscribe(other, "notes/*")
        await asyncio.sleep(0)
        display = room.hub._progress.generation.renderer
        make = display._render_record
        monkeypatch.setattr(
            display,
            "_render_record",
            lambda showing, *rest: (
                b"" if showing.event.record_id == "bad" else make(showing, *rest)
            ),
        )
        made = room.commit(insert("a"), insert("bad"), insert("b"), insert("n", table=NOTES))
        events, of_other = await sink.wait_for(4), await other_sink.wait_for(2)
        late, late_sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await room.subscribe(late, "posts/*")
        again = await late_sink.wait_for(3)

    gap = ("PB_RESYNC", '{"collections":["posts"],"reason":"unknown"}')
    assert [name for _, name, _ in events[1:3]] == ["posts/*", "posts/*"]
    assert [id_.rpartition(".")[2] for id_, _, _ in events[1:]] == [
        at(made, 1),
        at(made, 1),
        at(made, 0xFFFFFFFF),
    ]
    assert events[3][1:] == again[2][1:] == gap
    assert of_other[1][1] == "notes/*"


@pytest.mark.parametrize("resumed", [False, True], ids=["live", "resumed"])
@pytest.mark.parametrize("cause", ["emptied", "too large", "undecided", "not to be shown"])
async def test_a_gap_is_told_once_its_cause_is_visible(
    monkeypatch: pytest.MonkeyPatch, cause: str, *, resumed: bool
) -> None:
    """Who loads anew at once would otherwise keep the rows of before, and hear no more of it."""
    async with open_room() as room:
        if cause == "not to be shown":
            display = room.hub._progress.generation.renderer
            monkeypatch.setattr(display, "_render_record", lambda *_: b"")
        start = room.changelog.end_cursor
        first, first_sink = room.connect(position="")
        await room.subscribe(first, FILTERED)
        await asyncio.sleep(0)
        room.database.snapshot_text = "50:50:"
        if cause == "too large":
            room._end += 100
            room.changelog.append(
                OversizedTransaction(Xid(60), LSN(room._end), 0, frozenset({POSTS}))
            )
            room.hub.wake()
        else:
            room.database.undecided = frozenset({"posts"} if cause == "undecided" else ())
            room.commit(Truncate(POSTS) if cause == "emptied" else insert("a"), xid=60)
        await room.database.asked_again(3)
        sink = first_sink
        if resumed:
            second, sink = room.connect(position=f"x.abcdef-{start.lsn:016x}-ffffffff")
            await room.subscribe(second, FILTERED)
            await room.database.asked_again(3)
        assert "PB_RESYNC" not in [name for _, name, _ in sink.events()]
        room.database.snapshot_text = "70:70:"

        await sink.wait_for_bytes(b"PB_RESYNC")


async def test_of_two_gaps_at_one_place_only_the_last_moves_the_position() -> None:
    """Who breaks off in between would come back from behind the one that it never heard of."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, FILTERED, "notes/*")
        before, _, _ = (await sink.wait_for(1))[0]
        room.database.undecided = frozenset({"posts"})
        made = room.commit(insert("a"), Truncate(NOTES))
        await sink.wait_for_bytes(b'{"collections":["notes"]')
        told = [(id_, data) for id_, name, data in sink.events() if name == "PB_RESYNC"]

    assert [json.loads(data)["collections"] for _, data in told] == [["posts"], ["notes"]]
    held, moved = [id_.rpartition(".")[2] for id_, _ in told]
    assert (held, moved) == (before.rpartition(".")[2], at(made, 2))


async def test_a_gap_is_told_though_the_database_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads it then either; and the others' events wait behind it."""
    monkeypatch.setattr("pgrealtime.hub.state.visibility._UNANSWERED_GAP_DELAY_SECONDS", 0.05)
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        room.database.is_away = True
        room.commit(Truncate(POSTS), xid=60)

        await sink.wait_for_bytes(b"PB_RESYNC")


async def test_a_fault_of_ours_in_judging_is_a_gap_and_ends_nothing() -> None:
    """Neither the task that delivers nor a replay may die of it, still less in silence."""
    async with open_room() as room:
        told, told_sink = room.connect(position="")
        plain, plain_sink = room.connect()
        await room.subscribe(told, "posts/*")
        await room.subscribe(plain, "posts/*")
        room.database.fault = TypeError("nobody thought of this row")
        room.commit(insert("a"))
        await told_sink.wait_for(2)
        await plain_sink.wait_until("ended")
        late, late_sink = room.connect(position=f"{'x' * 40}.abcdef-{100:016x}-ffffffff")
        await room.subscribe(late, "posts/*")
        await late_sink.wait_for(2)
        room.database.fault = None
        room.commit(insert("b"))
        events, again = await told_sink.wait_for(3), await late_sink.wait_for(3)

    assert [event[1] for event in events] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]
    assert [event[1] for event in again] == ["PB_CONNECT", "PB_RESYNC", "posts/*"]


# What is bounded stays so


async def test_subscriptions_that_went_are_not_kept_for_their_barriers() -> None:
    """Nothing is committed: barriers end with the first commit beyond them, and there is none."""
    async with open_room() as room:
        connection, _sink = room.connect()
        for _ in range(50):
            other, _ = room.connect()
            await room.subscribe(other, "posts/*")
            room.hub.remove_connection(other)
            await room.subscribe(connection, "posts/*", "notes/*")

        assert len(room.hub._registry.subscriptions_with_read_point) == 2


@pytest.mark.parametrize("is_behind", [False, True], ids=["live", "replay"])
async def test_a_client_that_takes_nothing_is_not_given_a_thousand_times_a_long_commit(
    *, is_behind: bool
) -> None:
    """Each of its topics hears each row; anybody may subscribe so."""
    async with open_room(send_buffer=20_000) as room:
        rows = [insert(f"n{n:03}", "x" * 1000) for n in range(40)]
        start = f"{'x' * 40}.abcdef-{100:016x}-ffffffff"
        if is_behind:
            room.commit(*rows)
            await room.settled()
        connection, sink = room.connect(position=start)
        sink.is_stuck = True
        await room.subscribe(connection, *(f"posts/*?{n}" for n in range(50)))
        if not is_behind:
            room.commit(*rows)
        await sink.wait_for(2)
        await room.settled()
        for _ in range(1000):
            await asyncio.sleep(0)
        most = sink.buffered_bytes()
        sink.unstick()
        events = await sink.wait_for(1 + 40 * 50)

    assert most < 100_000
    titles = [json.loads(event[2])["record"]["id"] for event in events[1::50]]
    assert titles == [f"n{n:03}" for n in range(40)]


async def test_what_a_write_adds_to_its_message_is_not_taken_for_bytes_that_a_client_took() -> None:
    """A chunk has a head: the transport holds more than the hub has written."""
    async with open_room(stall_timeout=0.3) as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        sink.is_stuck, sink.overhead = True, 8
        async with asyncio.timeout(DEADLINE):
            while sink.state == "open":
                room.commit(insert("a"))
                await asyncio.sleep(0.02)

    assert sink.state == "aborted"


async def test_the_return_of_the_stream_connects_no_more_than_the_limit() -> None:
    async with open_room(is_up=False, max_connections=2) as room:
        sinks = [room.connect()[1] for _ in range(4)]
        room.hub.stream_started("abcdef")
        await sinks[1].wait_for(1)

        assert [len(sink.events()) for sink in sinks] == [1, 1, 0, 0]
