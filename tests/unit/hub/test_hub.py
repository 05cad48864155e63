"""What connections are promised, against a real hub without sockets or a server."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller, Superuser
from pgrealtime.changelog.base import Gap
from pgrealtime.changes import OversizedTransaction, Truncate
from pgrealtime.errors import SubscriptionError, SubscriptionLimitError
from pgrealtime.lsn import LSN, Xid
from tests.unit.hub.room import NOTES, POSTS, Room, at, delete, insert, open_room, update

ANN = Caller(AuthRecord(collection_id="pbc_users", collection_name="users", id="ann"))
BOB = Caller(AuthRecord(collection_id="pbc_users", collection_name="users", id="bob"))


def said(event: tuple[str, str, str]) -> tuple[str, str]:
    """Action and record id of an event."""
    data = json.loads(event[2])
    return data["action"], data["record"]["id"]


async def test_a_plain_connection_s_bytes_are_pocketbase_s() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        room.commit(insert("a", "x"))
        await sink.wait_for(2)

    assert len(connection.id) == 40
    assert sink.data.decode() == (
        f'id:{connection.id}\nevent:PB_CONNECT\ndata:{{"clientId":"{connection.id}"}}\n\n'
        f"id:{connection.id}\nevent:posts/*\n"
        'data:{"record":{"collectionId":"pbc_posts","collectionName":"posts","id":"a","title":"x"}'
        ',"action":"create"}\n\n'
    )


async def test_events_come_in_commit_order_and_in_order_within_a_commit() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        room.commit(insert("a"), update("a", "b"), insert("b"))
        room.commit(delete("a"))
        room.commit(*(insert(f"n{n:04}") for n in range(1000)))
        events = (await sink.wait_for(1005))[1:]

    assert [said(event) for event in events[:4]] == [
        ("create", "a"),
        ("update", "a"),
        ("create", "b"),
        ("delete", "a"),
    ]
    assert [said(event)[1] for event in events[4:]] == [f"n{n:04}" for n in range(1000)]


async def test_a_changed_key_is_a_delete_of_the_old_and_a_create_of_the_new() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*", "posts/new")
        room.commit(update("new", "t", was="old"))
        events = (await sink.wait_for(4))[1:]

    assert sorted((name, *said((i, name, data))) for i, name, data in events) == [
        ("posts/*", "create", "new"),
        ("posts/*", "delete", "old"),
        ("posts/new", "create", "new"),
    ]


async def test_every_matching_topic_gets_its_own_message_under_its_own_name() -> None:
    names = ["posts/*", "posts", "posts/a", "pbc_posts/*", 'posts/*?options={"query":{"a":"b"}}']
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, *names, "posts/b", "notes/*", "nothing/*", "@oauth2")
        room.commit(insert("a"))
        events = (await sink.wait_for(1 + len(names)))[1:]
        await room.settled()

    assert sorted(event[1] for event in events) == sorted(names)
    assert len(sink.events()) == 1 + len(names)


# The subscribe barrier


async def test_what_was_visible_when_the_call_came_is_not_delivered_again() -> None:
    """Visible and not yet decoded: the reader has it from its read."""
    async with open_room() as room:
        connection, sink = room.connect()
        room.database.snapshot_text, room.database.insert_lsn = "10:10:", "0/1000"
        await room.subscribe(connection, "posts/*")
        room.commit(insert("seen"), xid=9)
        room.commit(insert("unseen"), xid=10)
        events = await sink.wait_for(2)

    assert said(events[1]) == ("create", "unseen")


async def test_what_commits_beyond_the_barrier_is_delivered_whatever_its_id() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        room.database.snapshot_text, room.database.insert_lsn = "10:10:", "0/10"
        await room.subscribe(connection, "posts/*")
        room.commit(insert("late"), xid=5)

        assert said((await sink.wait_for(2))[1]) == ("create", "late")


async def test_a_topic_kept_by_a_later_call_keeps_hearing_what_is_already_visible() -> None:
    """A new barrier for it would lose a change that was visible and not yet delivered."""
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        room.database.snapshot_text, room.database.insert_lsn = "10:10:", "0/1000"
        await room.subscribe(connection, "posts/*", "notes/*")
        room.commit(insert("old"), insert("n", table=NOTES), xid=9)
        room.commit(insert("m", table=NOTES), xid=11)
        events = await sink.wait_for(3)

    assert [said(event)[1] for event in events[1:]] == ["old", "m"]


async def test_output_waits_while_a_call_is_at_work_and_nothing_is_lost_meanwhile() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        room.database.gate = asyncio.Event()
        call = asyncio.create_task(room.subscribe(connection, "posts/*", "notes/*"))
        await asyncio.sleep(0)
        room.commit(insert("a"), insert("x", table=NOTES), xid=2_000_000)
        await room.settled()
        assert len(sink.events()) == 1

        room.database.gate.set()
        await call
        events = await sink.wait_for(3)

    assert [said(event)[1] for event in events[1:]] == ["a", "x"]


async def test_a_call_waits_until_readers_see_all_that_its_connection_was_handed() -> None:
    """Decoded and delivered, not yet visible: the new topic would hear it out of order."""
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        room.database.snapshot_text = "50:50:"
        room.commit(insert("a"), insert("x", table=NOTES), xid=50)
        await sink.wait_for(2)
        call = asyncio.create_task(room.subscribe(connection, "posts/*", "notes/*"))
        await room.database.asked_again(3)
        assert not call.done()

        room.database.snapshot_text = "51:51:"
        await call


async def test_a_cancelled_call_leaves_the_connection_as_it_was() -> None:
    """The SDK aborts an older submit when it has a newer one."""
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        room.database.gate = asyncio.Event()
        call = asyncio.create_task(room.subscribe(connection, "notes/*"))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        room.commit(insert("a"), insert("x", table=NOTES))

        assert said((await sink.wait_for(2))[1]) == ("create", "a")


async def test_a_replaced_topic_is_silent_and_an_empty_list_silences_all() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        await room.subscribe(connection, "notes/*")
        room.commit(insert("a"), insert("x", table=NOTES))
        assert said((await sink.wait_for(2))[1]) == ("create", "x")
        await room.subscribe(connection)
        room.commit(insert("b"), insert("y", table=NOTES))
        await room.settled()
        await room.subscribe(connection, "posts/*")
        room.commit(insert("c"))
        events = await sink.wait_for(3)

    assert said(events[2]) == ("create", "c")


# Authorization


async def test_the_first_caller_takes_a_connection_and_nobody_else_gets_it() -> None:
    async with open_room() as room:
        connection, _sink = room.connect()
        await room.subscribe(connection, "posts/*")
        await room.subscribe(connection, "posts/*", caller=ANN)
        await room.subscribe(connection, "posts/*", caller=ANN)
        for other in (BOB, Caller(), Caller(Superuser("root"))):
            with pytest.raises(SubscriptionError) as refused:
                await room.subscribe(connection, "notes/*", caller=other)
            assert refused.value.error_code == "authorization_mismatch"

        assert list(connection.subscriptions) == ["posts/*"]


async def test_unknown_clients_and_other_addresses_are_refused() -> None:
    async with open_room() as room:
        connection, _sink = room.connect(address="10.0.0.1")
        with pytest.raises(SubscriptionError) as unknown:
            await room.hub.subscribe("x" * 40, ["posts/*"], Caller(), "10.0.0.1")
        with pytest.raises(SubscriptionError) as foreign:
            await room.hub.subscribe(connection.id, ["posts/*"], Caller(), "10.0.0.2")
        room.hub.remove_connection(connection)
        with pytest.raises(SubscriptionError) as gone:
            await room.hub.subscribe(connection.id, ["posts/*"], Caller(), "10.0.0.1")

    assert unknown.value.error_code == gone.value.error_code == "client_unknown"
    assert foreign.value.error_code == "address_mismatch"


# Resume


async def test_who_asks_gets_the_position_with_every_message() -> None:
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        made = room.commit(insert("a"), insert("b"))
        events = await sink.wait_for(3)

    assert [event[0] for event in events] == [
        f"{connection.id}.abcdef-{100:016x}-ffffffff",
        f"{connection.id}.{at(made, 1)}",
        f"{connection.id}.{at(made, 2)}",
    ]
    assert json.loads(events[0][2]) == {"clientId": connection.id}


async def test_only_the_last_message_of_a_change_moves_the_position() -> None:
    """A break between two messages of one change must not lose the second."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*", "posts/b")
        made = room.commit(insert("a"), insert("b"))
        events = await sink.wait_for(4)

    ids = [event[0].partition(".")[2] for event in events[1:]]
    assert ids == [at(made, 1), at(made, 1), at(made, 2)]


@pytest.mark.parametrize("by_header", [True, False])
async def test_a_returning_client_hears_what_it_missed_from_within_a_commit_on(
    *, by_header: bool
) -> None:
    async with open_room() as room:
        made = room.commit(insert("a"), insert("b"), insert("c"))
        later = room.commit(insert("d"))
        await room.settled()
        last = f"{'x' * 40}.{at(made, 1)}"
        connection, sink = room.connect(
            last_event_id=last if by_header else None,
            position="ignored" if by_header else last,
        )
        await sink.wait_for(1)
        await room.subscribe(connection, "posts/*")
        events = await sink.wait_for(4)
        room.commit(insert("live"))
        await sink.wait_for(5)

    assert events[0][0] == f"{connection.id}.{at(made, 1)}"
    assert [said(event)[1] for event in events[1:]] == ["b", "c", "d"]
    assert events[3][0] == f"{connection.id}.{at(later, 1)}"


async def test_a_position_that_the_changelog_no_longer_reaches_is_told_so() -> None:
    async with open_room(max_size=250) as room:
        first = room.commit(insert("a"))
        for n in range(10):
            room.commit(insert(f"b{n}"))
            await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(first, 1)}")
        assert (await sink.wait_for(1))[0][0].endswith(at(first, 1))
        await room.subscribe(connection, "posts/*")
        room.commit(insert("live"))
        events = await sink.wait_for(3)

    assert (events[1][1], json.loads(events[1][2])) == (
        "PB_RESYNC",
        {"collections": [], "reason": "expired"},
    )
    assert said(events[2]) == ("create", "live")


@pytest.mark.parametrize(
    "position",
    [
        pytest.param("garbage", id="garbage"),
        pytest.param(f"{'x' * 40}.123456-{100:016x}-ffffffff", id="another-history"),
        pytest.param("y" * 5000, id="too-long"),
    ],
)
async def test_a_position_that_is_not_ours_is_a_gap_and_never_an_error(position: str) -> None:
    async with open_room() as room:
        connection, sink = room.connect(position=position)
        await room.subscribe(connection, "posts/*")
        events = await sink.wait_for(2)

    assert json.loads(events[1][2]) == {"collections": [], "reason": "unknown"}


async def test_an_event_id_without_a_position_is_ignored_as_pocketbase_ignores_all() -> None:
    async with open_room() as room:
        connection, sink = room.connect(last_event_id="x" * 40)

        assert (await sink.wait_for(1))[0][0] == connection.id


async def test_with_no_age_allowed_every_position_is_a_gap() -> None:
    async with open_room(max_age=0.0) as room:
        made = room.commit(insert("a"))
        await room.settled()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await room.subscribe(connection, "posts/*")

        assert json.loads((await sink.wait_for(2))[1][2])["reason"] == "unknown"


async def test_the_topic_pb_cursor_makes_a_plain_connection_resumable_from_then_on() -> None:
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*", "PB_CURSOR")
        events = await sink.wait_for(2)
        assert events[0][0] == connection.id
        assert (events[1][1], json.loads(events[1][2])) == (
            "PB_CURSOR",
            {"id": f"{connection.id}.abcdef-{100:016x}-ffffffff"},
        )
        made = room.commit(insert("a"))
        events = await sink.wait_for(4)

    assert events[2][0] == f"{connection.id}.{at(made, 1)}"
    assert events[3][1] == "PB_CURSOR"


async def test_a_quiet_resumable_connection_s_position_moves_by_the_heartbeat() -> None:
    async with open_room(heartbeat=0.05) as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*")
        room.commit(insert("n", table=NOTES))
        events = await sink.wait_for(2)

    assert events[1][1] == "PB_CURSOR"
    assert events[1][0] == f"{connection.id}.abcdef-{200:016x}-ffffffff"


# Slow connections


async def test_a_slow_connection_reads_on_from_the_changelog_and_loses_nothing() -> None:
    async with open_room(send_buffer=4096) as room:
        slow, slow_sink = room.connect()
        fast, fast_sink = room.connect()
        await room.subscribe(slow, "posts/*")
        await room.subscribe(fast, "posts/*")
        slow_sink.is_stuck = True
        for n in range(500):
            room.commit(insert(f"n{n}"))
            if n % 50 == 0:
                await room.settled()
        await fast_sink.wait_for(501)
        assert slow_sink.buffered_bytes() < 50_000
        slow_sink.unstick()
        events = await slow_sink.wait_for(501)
        room.commit(insert("live"))
        await slow_sink.wait_for(502)

    assert [said(event)[1] for event in events[1:]] == [f"n{n}" for n in range(500)]


async def test_a_connection_that_the_changelog_has_passed_is_ended_if_it_is_plain() -> None:
    async with open_room(send_buffer=1024, max_size=1000) as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        sink.is_stuck = True
        for n in range(200):
            room.commit(insert(f"n{n}"))
            await room.settled()
        sink.unstick()
        await sink.wait_until("ended")


async def test_a_connection_that_takes_nothing_is_dropped() -> None:
    async with open_room(stall_timeout=0.2) as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        sink.is_stuck = True
        room.commit(insert("a"))
        await sink.wait_until("aborted")
        assert list(room.hub.connections) == []


# Gaps


async def gap_of(room: Room, *topics: str, resumable: bool) -> tuple[str, dict[str, object]]:
    connection, sink = room.connect(position="" if resumable else None)
    await room.subscribe(connection, *topics)
    room.changelog.append(Gap(LSN(room.changelog.end_cursor.lsn + 50), "slot_lost"))
    room.hub.wake()
    await room.settled()
    if not resumable and "PB_RESYNC" not in topics:
        await sink.wait_until("ended")
    last = sink.events()[-1]
    return sink.state, json.loads(last[2]) if last[1] == "PB_RESYNC" else {}


async def test_a_gap_is_told_to_whom_it_can_be_told_and_ends_the_others() -> None:
    everything = {"collections": [], "reason": "slot_lost"}
    async with open_room() as room:
        assert await gap_of(room, "posts/*", resumable=True) == ("open", everything)
    async with open_room() as room:
        assert await gap_of(room, "posts/*", "PB_RESYNC", resumable=False) == ("open", everything)
    async with open_room() as room:
        assert await gap_of(room, "posts/*", resumable=False) == ("ended", {})


async def test_truncate_and_oversized_transactions_are_gaps_of_their_tables_only() -> None:
    async with open_room() as room:
        posts, posts_sink = room.connect(position="")
        notes, notes_sink = room.connect()
        await room.subscribe(posts, "posts/*")
        await room.subscribe(notes, "notes/*")
        room.commit(insert("a"), Truncate(POSTS), insert("b"))
        room.changelog.append(OversizedTransaction(Xid(1), LSN(300), 0, frozenset({POSTS})))
        room._end = 300
        room.commit(insert("n", table=NOTES))
        events = await posts_sink.wait_for(5)
        assert said((await notes_sink.wait_for(2))[1]) == ("create", "n")

    assert [event[1] for event in events[1:]] == ["posts/*", "PB_RESYNC", "posts/*", "PB_RESYNC"]
    reasons = [json.loads(event[2]) for event in (events[2], events[4])]
    assert reasons == [
        {"collections": ["posts"], "reason": "truncate"},
        {"collections": ["posts"], "reason": "too_large"},
    ]


async def test_another_history_is_told_even_where_its_positions_are_lower() -> None:
    """After a failover the new primary uses the same LSNs for other transactions."""
    async with open_room() as room:
        told, told_sink = room.connect(position="")
        plain, plain_sink = room.connect()
        await room.subscribe(told, "posts/*")
        await room.subscribe(plain, "posts/*")
        room.commit(insert("a"))
        await told_sink.wait_for(2)
        room.hub.stream_lost()
        room.changelog.restart(LSN(150))
        room.hub.stream_started("fedcba")
        room.commit(insert("b"))
        events = await told_sink.wait_for(4)
        await plain_sink.wait_until("ended")

    assert json.loads(events[2][2]) == {"collections": [], "reason": "unknown"}
    assert said(events[3]) == ("create", "b")
    assert events[3][0].startswith(f"{told.id}.fedcba-")


# The stream is away


async def test_pb_connect_is_held_back_until_the_stream_is_there() -> None:
    async with open_room(is_up=False) as room:
        _connection, sink = room.connect()
        await asyncio.sleep(0)
        assert sink.data == b""
        room.hub.stream_started("abcdef")

        assert (await sink.wait_for(1))[0][1] == "PB_CONNECT"


async def test_a_position_is_read_when_the_stream_is_there_and_not_before() -> None:
    """Coming back during our own restart must not look like another history."""
    async with open_room() as room:
        made = room.commit(insert("a"), insert("b"))
        await room.settled()
        room.hub.stream_lost()
        connection, sink = room.connect(position=f"{'x' * 40}.{at(made, 1)}")
        room.hub.stream_started("abcdef")
        await room.subscribe(connection, "posts/*")

        assert said((await sink.wait_for(2))[1]) == ("create", "b")


async def test_a_call_is_refused_at_once_and_an_unanswered_connection_ends_a_second_later() -> None:
    """A refused first call would leave the Dart SDK's connection open without topics."""
    async with open_room(heartbeat=1.0) as room:
        settled, settled_sink = room.connect()
        await room.subscribe(settled, "posts/*")
        held, held_sink = room.connect()
        room.hub.stream_lost()
        for connection in (settled, held):
            with pytest.raises(SubscriptionError) as refused:
                await room.subscribe(connection, "posts/*", "notes/*")
            assert refused.value.error_code == "stream_away"
        began = time.monotonic()
        await held_sink.wait_until("ended")

        assert time.monotonic() - began > 0.9
        assert settled_sink.state == "open"


# Limits


async def test_idle_and_life_limits_end_a_connection_without_a_byte_more() -> None:
    async with open_room(idle_timeout=1.2, max_lifetime=2.0) as room:
        idle, idle_sink = room.connect()
        busy, busy_sink = room.connect()
        await room.subscribe(idle, "notes/*")
        await room.subscribe(busy, "posts/*")
        began = time.monotonic()
        for n in range(8):
            room.commit(insert(f"{n}"))
            await asyncio.sleep(0.2)
        assert (idle_sink.state, busy_sink.state) == ("ended", "open")
        await busy_sink.wait_until("ended")

    assert 1.9 < time.monotonic() - began < 4
    assert [event[1] for event in idle_sink.events()] == ["PB_CONNECT"]


async def test_a_heartbeat_keeps_a_quiet_connection_and_does_not_count_as_activity() -> None:
    async with open_room(heartbeat=0.1, idle_timeout=1.3) as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        await sink.wait_until("ended")

    assert sink.data.count(b"\n:\n") >= 1
    assert len(sink.events()) == 1


async def test_a_connection_ends_with_its_token() -> None:
    async with open_room(heartbeat=1.0) as room:
        connection, sink = room.connect()
        caller = Caller(ANN.principal, expires_at=time.time() + 0.5)
        await room.subscribe(connection, "posts/*", caller=caller)
        began = time.monotonic()
        await sink.wait_until("ended")

    assert time.monotonic() - began >= 0.5


async def test_beyond_the_limit_a_connection_gets_no_pb_connect() -> None:
    """Any status but 200 would be final to an EventSource."""
    async with open_room(max_connections=1) as room:
        _first, first_sink = room.connect()
        _second, second_sink = room.connect()
        await first_sink.wait_for(1)

        assert second_sink.data == b""


async def test_shutdown_lets_a_call_be_answered_before_it_ends_the_connection() -> None:
    """A connection that ends between PB_CONNECT and the answer leaves the JS SDK dead."""
    async with open_room() as room:
        connection, sink = room.connect()
        room.database.gate = asyncio.Event()
        call = asyncio.create_task(room.subscribe(connection, "posts/*"))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(room.hub.shutdown(5.0))
        await asyncio.sleep(0.3)
        assert sink.state == "open"
        room.database.gate.set()
        await call
        began = time.monotonic()
        await stopping

    assert sink.state == "ended"
    assert time.monotonic() - began > 0.9


async def test_what_a_closed_connection_subscribed_to_is_forgotten() -> None:
    async with open_room() as room:
        for _ in range(3):
            connection, _sink = room.connect()
            await room.subscribe(connection, "posts/*", "posts/a", "notes/*")
            room.hub.remove_connection(connection)

        matcher = room.hub._progress.generation.matcher
        assert matcher._tables == {}
        assert not matcher._unindexed_filters


@pytest.mark.parametrize("before", [(), ("notes/*",)])
async def test_a_refused_call_leaves_nothing_of_its_topics(
    monkeypatch: pytest.MonkeyPatch, before: tuple[str, ...]
) -> None:
    """Not the topic that was too many either; and what was there before waits as it did."""
    monkeypatch.setattr("pgrealtime.hub.evaluation.quotas.UNINDEXED_FILTERS_PER_CONNECTION", 1)
    many = [f'posts/*?options={{"query":{{"filter":"title ~ \'{n}\'"}}}}' for n in range(3)]
    async with open_room() as room:
        connection, _sink = room.connect()
        if before:
            await room.subscribe(connection, *before)
        waiting = dict(room.hub._registry.subscriptions_with_read_point)
        with pytest.raises(SubscriptionLimitError):
            await room.subscribe(connection, "posts/*", *many)

        assert (
            tuple(connection.subscriptions),
            room.hub._registry.subscriptions_with_read_point,
        ) == (
            before,
            waiting,
        )


async def test_a_long_batch_tells_the_position_every_sixteen_messages_to_who_asked_for_it() -> None:
    """The JS SDK shows no ids: PB_CURSOR is all that it can resume from."""
    async with open_room() as room:
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*", "PB_CURSOR")
        made = room.commit(*(insert(f"n{n}") for n in range(40)))
        events = (await sink.wait_for(2 + 40 + 3))[2:]

    told = [place for place, event in enumerate(events) if event[1] == "PB_CURSOR"]
    assert told == [16, 33, 42]
    assert json.loads(events[16][2])["id"] == f"{connection.id}.{at(made, 16)}"
