"""The promises of a connection, tested on a real hub without sockets and without a server."""

from __future__ import annotations

import asyncio
import json
import time
from urllib.parse import quote

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller, Superuser
from pgrealtime.changelog.memory import Gap
from pgrealtime.changes import OversizedTransaction, Truncate
from pgrealtime.errors import SubscriptionError, SubscriptionLimitError
from pgrealtime.hub.connections.connection import LIVE
from pgrealtime.lsn import LSN, Xid
from tests.unit.hub.harness import (
    NOTES,
    POSTS,
    HubHarness,
    at,
    delete,
    insert,
    open_harness,
    update,
)

ANN = Caller(AuthRecord(collection_id="pbc_users", collection_name="users", id="ann"))
BOB = Caller(AuthRecord(collection_id="pbc_users", collection_name="users", id="bob"))


def action_and_id(event: tuple[str, str, str]) -> tuple[str, str]:
    """Return action and record id of an event."""
    data = json.loads(event[2])
    return data["action"], data["record"]["id"]


async def test_a_plain_connection_s_bytes_are_pocketbase_s() -> None:
    """A connection that uses no extension receives exactly what PocketBase sends."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("a", "x"))
        await sink.wait_for(2)

    assert len(connection.id) == 40
    assert sink.data.decode() == (
        f'id:{connection.id}\nevent:PB_CONNECT\ndata:{{"clientId":"{connection.id}"}}\n\n'
        f"id:{connection.id}\nevent:posts/*\n"
        'data:{"record":{"collectionId":"pbc_posts","collectionName":"posts","id":"a","title":"x"}'
        ',"action":"create"}\n\n'
    )


async def test_a_connection_with_nothing_to_read_is_live_when_its_call_ends() -> None:
    """Without a task of its own, which most of many thousand calls would begin for nothing."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        state_after_the_call = connection.state
        harness.commit(insert("a"))
        await sink.wait_for(2)

    assert state_after_the_call is LIVE


async def test_a_filter_that_others_of_its_kind_have_is_not_compiled_again() -> None:
    """Its topic is that of the first call."""
    options = quote(json.dumps({"query": {"filter": "title = 'x'"}}))
    topic = f"posts/*?options={options}"
    callers = (ANN, BOB, Caller(Superuser("root")), Caller())
    async with open_harness() as harness:
        opened = [harness.connect() for _ in callers]
        for (connection, _), caller in zip(opened, callers, strict=True):
            await harness.subscribe(connection, topic, caller=caller)
        topics = [connection.subscriptions[topic].topic for connection, _ in opened]
        harness.commit(insert("a", "x"), insert("b", "y"))
        await harness.until_delivered()

    assert topics[0] is topics[1]
    assert all(other is not topics[0] for other in topics[2:])
    received = [[action_and_id(event)[1] for event in sink.events()[1:]] for _, sink in opened]
    assert received == [["a"]] * len(callers)


async def test_events_come_in_commit_order_and_in_order_within_a_commit() -> None:
    """Also over a commit of more changes than one slice has."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("a"), update("a", "b"), insert("b"))
        harness.commit(delete("a"))
        harness.commit(*(insert(f"n{n:04}") for n in range(1000)))
        events = (await sink.wait_for(1005))[1:]

    assert [action_and_id(event) for event in events[:4]] == [
        ("create", "a"),
        ("update", "a"),
        ("create", "b"),
        ("delete", "a"),
    ]
    assert [action_and_id(event)[1] for event in events[4:]] == [f"n{n:04}" for n in range(1000)]


async def test_a_changed_key_is_a_delete_of_the_old_and_a_create_of_the_new() -> None:
    """Each topic receives those of the two events that are of its record."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "posts/new")
        harness.commit(update("new", "t", was="old"))
        events = (await sink.wait_for(4))[1:]

    assert sorted((name, *action_and_id((i, name, data))) for i, name, data in events) == [
        ("posts/*", "create", "new"),
        ("posts/*", "delete", "old"),
        ("posts/new", "create", "new"),
    ]


async def test_every_matching_topic_gets_its_own_message_under_its_own_name() -> None:
    """Under the text as it was submitted, also where several texts mean the same topic."""
    names = ["posts/*", "posts", "posts/a", "pbc_posts/*", 'posts/*?options={"query":{"a":"b"}}']
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, *names, "posts/b", "notes/*", "nothing/*", "@oauth2")
        harness.commit(insert("a"))
        events = (await sink.wait_for(1 + len(names)))[1:]
        await harness.until_delivered()

    assert sorted(event[1] for event in events) == sorted(names)
    assert len(sink.events()) == 1 + len(names)


# The read point of a subscribe call


async def test_what_was_visible_when_the_call_came_is_not_delivered_again() -> None:
    """Visible and not yet decoded: the client has it from its own read."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        harness.database.snapshot_text, harness.database.insert_lsn = "10:10:", "0/1000"
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("seen"), xid=9)
        harness.commit(insert("unseen"), xid=10)
        events = await sink.wait_for(2)

    assert action_and_id(events[1]) == ("create", "unseen")


async def test_what_commits_after_the_read_point_is_delivered_whatever_its_id() -> None:
    """A commit beyond the read point's LSN wasn't visible, whatever the snapshot says of its id."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        harness.database.snapshot_text, harness.database.insert_lsn = "10:10:", "0/10"
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("late"), xid=5)

        assert action_and_id((await sink.wait_for(2))[1]) == ("create", "late")


async def test_a_topic_kept_by_a_later_call_still_receives_what_is_already_visible() -> None:
    """A new read point for it would lose changes that are visible and not yet delivered."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        harness.database.snapshot_text, harness.database.insert_lsn = "10:10:", "0/1000"
        await harness.subscribe(connection, "posts/*", "notes/*")
        harness.commit(insert("old"), insert("n", table=NOTES), xid=9)
        harness.commit(insert("m", table=NOTES), xid=11)
        events = await sink.wait_for(3)

    assert [action_and_id(event)[1] for event in events[1:]] == ["old", "m"]


async def test_output_waits_while_a_call_is_at_work_and_nothing_is_lost_meanwhile() -> None:
    """Events during a call are delivered after it, each to the topics that it left or added."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        harness.database.gate = asyncio.Event()
        call = asyncio.create_task(harness.subscribe(connection, "posts/*", "notes/*"))
        await asyncio.sleep(0)
        harness.commit(insert("a"), insert("x", table=NOTES), xid=2_000_000)
        await harness.until_delivered()
        assert len(sink.events()) == 1

        harness.database.gate.set()
        await call
        events = await sink.wait_for(3)

    assert [action_and_id(event)[1] for event in events[1:]] == ["a", "x"]


async def test_a_call_waits_until_all_that_its_connection_received_is_visible() -> None:
    """Otherwise the new topic would receive a delivered but invisible change out of order."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        harness.database.snapshot_text = "50:50:"
        harness.commit(insert("a"), insert("x", table=NOTES), xid=50)
        await sink.wait_for(2)
        call = asyncio.create_task(harness.subscribe(connection, "posts/*", "notes/*"))
        await harness.database.wait_for_snapshot_queries(3)
        assert not call.done()

        harness.database.snapshot_text = "51:51:"
        await call


async def test_a_cancelled_call_leaves_the_connection_as_it_was() -> None:
    """The JS SDK aborts an older call when it makes a newer one."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        harness.database.gate = asyncio.Event()
        call = asyncio.create_task(harness.subscribe(connection, "notes/*"))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        harness.commit(insert("a"), insert("x", table=NOTES))

        assert action_and_id((await sink.wait_for(2))[1]) == ("create", "a")


async def test_a_replaced_topic_is_silent_and_an_empty_list_silences_all() -> None:
    """A call replaces all topics of its connection."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        await harness.subscribe(connection, "notes/*")
        harness.commit(insert("a"), insert("x", table=NOTES))
        assert action_and_id((await sink.wait_for(2))[1]) == ("create", "x")
        await harness.subscribe(connection)
        harness.commit(insert("b"), insert("y", table=NOTES))
        await harness.until_delivered()
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("c"))
        events = await sink.wait_for(3)

    assert action_and_id(events[2]) == ("create", "c")


# Authorization


async def test_the_first_authenticated_caller_binds_the_connection() -> None:
    """A guest may authenticate once; after that, calls of other principals are refused."""
    async with open_harness() as harness:
        connection, _sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        await harness.subscribe(connection, "posts/*", caller=ANN)
        await harness.subscribe(connection, "posts/*", caller=ANN)
        for other in (BOB, Caller(), Caller(Superuser("root"))):
            with pytest.raises(SubscriptionError) as refused:
                await harness.subscribe(connection, "notes/*", caller=other)
            assert refused.value.error_code == "authorization_mismatch"

        assert list(connection.subscriptions) == ["posts/*"]


async def test_unknown_clients_and_other_addresses_are_refused() -> None:
    """A client id is valid from the address that opened the connection, and while it is open."""
    async with open_harness() as harness:
        connection, _sink = harness.connect(address="10.0.0.1")
        with pytest.raises(SubscriptionError) as unknown:
            await harness.hub.subscribe("x" * 40, ["posts/*"], Caller(), "10.0.0.1")
        with pytest.raises(SubscriptionError) as foreign:
            await harness.hub.subscribe(connection.id, ["posts/*"], Caller(), "10.0.0.2")
        harness.hub.remove_connection(connection)
        with pytest.raises(SubscriptionError) as closed:
            await harness.hub.subscribe(connection.id, ["posts/*"], Caller(), "10.0.0.1")

    assert unknown.value.error_code == closed.value.error_code == "client_unknown"
    assert foreign.value.error_code == "address_mismatch"


# Resume


async def test_a_resumable_connection_receives_the_position_with_every_message() -> None:
    """The id of each message is the client id with the position after its change."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        made = harness.commit(insert("a"), insert("b"))
        events = await sink.wait_for(3)

    assert [event[0] for event in events] == [
        f"{connection.id}.abcdef-{100:016x}-ffffffff",
        f"{connection.id}.{at(made, 1)}",
        f"{connection.id}.{at(made, 2)}",
    ]
    assert json.loads(events[0][2]) == {"clientId": connection.id}


async def test_only_the_last_message_of_a_change_moves_the_position() -> None:
    """If the network breaks between two messages of a change, resuming repeats the second."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*", "posts/b")
        made = harness.commit(insert("a"), insert("b"))
        events = await sink.wait_for(4)

    ids = [event[0].partition(".")[2] for event in events[1:]]
    assert ids == [at(made, 1), at(made, 1), at(made, 2)]


@pytest.mark.parametrize("by_header", [True, False])
async def test_a_resumed_connection_receives_what_it_missed_from_within_a_commit_on(
    *, by_header: bool
) -> None:
    """A position may be inside of a commit; resuming begins with the next change."""
    async with open_harness() as harness:
        made = harness.commit(insert("a"), insert("b"), insert("c"))
        later = harness.commit(insert("d"))
        await harness.until_delivered()
        last = f"{'x' * 40}.{at(made, 1)}"
        connection, sink = harness.connect(
            last_event_id=last if by_header else None, position="ignored" if by_header else last
        )
        await sink.wait_for(1)
        await harness.subscribe(connection, "posts/*")
        events = await sink.wait_for(4)
        harness.commit(insert("live"))
        await sink.wait_for(5)

    assert events[0][0] == f"{connection.id}.{at(made, 1)}"
    assert [action_and_id(event)[1] for event in events[1:]] == ["b", "c", "d"]
    assert events[3][0] == f"{connection.id}.{at(later, 1)}"


async def test_a_position_that_the_changelog_no_longer_reaches_is_a_notified_gap() -> None:
    """The client is notified of a gap, then receives the events of now."""
    async with open_harness(max_size=250) as harness:
        first = harness.commit(insert("a"))
        for n in range(10):
            harness.commit(insert(f"b{n}"))
            await harness.until_delivered()
        connection, sink = harness.connect(position=f"{'x' * 40}.{at(first, 1)}")
        assert (await sink.wait_for(1))[0][0].endswith(at(first, 1))
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("live"))
        events = await sink.wait_for(3)

    assert (events[1][1], json.loads(events[1][2])) == (
        "PB_RESYNC",
        {"collections": [], "reason": "expired"},
    )
    assert action_and_id(events[2]) == ("create", "live")


@pytest.mark.parametrize(
    "position",
    [
        pytest.param("garbage", id="garbage"),
        pytest.param(f"{'x' * 40}.123456-{100:016x}-ffffffff", id="another-history"),
        pytest.param("y" * 5000, id="too-long"),
    ],
)
async def test_a_position_that_is_not_ours_is_a_gap_and_never_an_error(position: str) -> None:
    """Text that isn't a position, and positions of another history."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position=position)
        await harness.subscribe(connection, "posts/*")
        events = await sink.wait_for(2)

    assert json.loads(events[1][2]) == {"collections": [], "reason": "unknown"}


async def test_an_event_id_without_a_position_is_ignored_as_pocketbase_ignores_all() -> None:
    """An EventSource sends the id of any message, also of a plain connection."""
    async with open_harness() as harness:
        connection, sink = harness.connect(last_event_id="x" * 40)

        assert (await sink.wait_for(1))[0][0] == connection.id


async def test_with_no_age_allowed_every_position_is_a_gap() -> None:
    """With a maximum age of 0 s the changelog keeps nothing to resume from."""
    async with open_harness(max_age=0.0) as harness:
        made = harness.commit(insert("a"))
        await harness.until_delivered()
        connection, sink = harness.connect(position=f"{'x' * 40}.{at(made, 1)}")
        await harness.subscribe(connection, "posts/*")

        assert json.loads((await sink.wait_for(2))[1][2])["reason"] == "unknown"


async def test_the_topic_pb_cursor_makes_a_plain_connection_resumable_from_then_on() -> None:
    """It receives its position at once, and again after later messages."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "PB_CURSOR")
        events = await sink.wait_for(2)
        assert events[0][0] == connection.id
        assert (events[1][1], json.loads(events[1][2])) == (
            "PB_CURSOR",
            {"id": f"{connection.id}.abcdef-{100:016x}-ffffffff"},
        )
        made = harness.commit(insert("a"))
        events = await sink.wait_for(4)

    assert events[2][0] == f"{connection.id}.{at(made, 1)}"
    assert events[3][1] == "PB_CURSOR"


async def test_a_quiet_resumable_connection_s_position_moves_by_the_heartbeat() -> None:
    """So its position doesn't expire while no event is for it."""
    async with open_harness(heartbeat=0.05) as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*")
        harness.commit(insert("n", table=NOTES))
        events = await sink.wait_for(2)

    assert events[1][1] == "PB_CURSOR"
    assert events[1][0] == f"{connection.id}.abcdef-{200:016x}-ffffffff"


# Slow connections


async def test_a_slow_connection_reads_on_from_the_changelog_and_loses_nothing() -> None:
    """It holds few bytes meanwhile, and delays no other connection."""
    async with open_harness(send_buffer=4096) as harness:
        slow, slow_sink = harness.connect()
        fast, fast_sink = harness.connect()
        await harness.subscribe(slow, "posts/*")
        await harness.subscribe(fast, "posts/*")
        slow_sink.is_stuck = True
        for n in range(500):
            harness.commit(insert(f"n{n}"))
            if n % 50 == 0:
                await harness.until_delivered()
        await fast_sink.wait_for(501)
        assert slow_sink.buffered_bytes() < 50_000
        slow_sink.unstick()
        events = await slow_sink.wait_for(501)
        harness.commit(insert("live"))
        await slow_sink.wait_for(502)

    assert [action_and_id(event)[1] for event in events[1:]] == [f"n{n}" for n in range(500)]


async def test_a_connection_that_the_changelog_has_passed_is_ended_if_it_is_plain() -> None:
    """It can't be notified of the gap, and its client loads anew after the end."""
    async with open_harness(send_buffer=1024, max_size=1000) as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        sink.is_stuck = True
        for n in range(200):
            harness.commit(insert(f"n{n}"))
            await harness.until_delivered()
        sink.unstick()
        await sink.wait_until("ended")


async def test_a_connection_that_takes_nothing_is_dropped() -> None:
    """After ``stall_timeout`` without a byte taken it is aborted."""
    async with open_harness(stall_timeout=0.2) as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        sink.is_stuck = True
        harness.commit(insert("a"))
        await sink.wait_until("aborted")
        assert list(harness.hub.connections) == []


# Gaps


async def gap_of(
    harness: HubHarness, *topics: str, resumable: bool
) -> tuple[str, dict[str, object]]:
    """Subscribe, append a gap; return the state of the connection and the notification."""
    connection, sink = harness.connect(position="" if resumable else None)
    await harness.subscribe(connection, *topics)
    harness.changelog.append(Gap(LSN(harness.changelog.end_cursor.lsn + 50), "slot_lost"))
    harness.hub.wake()
    await harness.until_delivered()
    if not resumable and "PB_RESYNC" not in topics:
        await sink.wait_until("ended")
    last = sink.events()[-1]
    return sink.state, json.loads(last[2]) if last[1] == "PB_RESYNC" else {}


async def test_a_gap_is_notified_where_that_is_possible_and_ends_other_connections() -> None:
    """A connection without positions and without the topic PB_RESYNC is ended."""
    everything = {"collections": [], "reason": "slot_lost"}
    async with open_harness() as harness:
        assert await gap_of(harness, "posts/*", resumable=True) == ("open", everything)
    async with open_harness() as harness:
        assert await gap_of(harness, "posts/*", "PB_RESYNC", resumable=False) == (
            "open",
            everything,
        )
    async with open_harness() as harness:
        assert await gap_of(harness, "posts/*", resumable=False) == ("ended", {})


async def test_truncate_and_oversized_transactions_are_gaps_of_their_tables_only() -> None:
    """Subscribers of other collections receive their events as ever."""
    async with open_harness() as harness:
        posts, posts_sink = harness.connect(position="")
        notes, notes_sink = harness.connect()
        await harness.subscribe(posts, "posts/*")
        await harness.subscribe(notes, "notes/*")
        harness.commit(insert("a"), Truncate(POSTS), insert("b"))
        harness.changelog.append(OversizedTransaction(Xid(1), LSN(300), 0, frozenset({POSTS})))
        harness._end = 300
        harness.commit(insert("n", table=NOTES))
        events = await posts_sink.wait_for(5)
        assert action_and_id((await notes_sink.wait_for(2))[1]) == ("create", "n")

    assert [event[1] for event in events[1:]] == ["posts/*", "PB_RESYNC", "posts/*", "PB_RESYNC"]
    reasons = [json.loads(event[2]) for event in (events[2], events[4])]
    assert reasons == [
        {"collections": ["posts"], "reason": "truncate"},
        {"collections": ["posts"], "reason": "too_large"},
    ]


async def test_another_history_is_notified_even_where_its_positions_are_lower() -> None:
    """After a failover the new primary uses the same LSNs for other transactions."""
    async with open_harness() as harness:
        resumable, resumable_sink = harness.connect(position="")
        plain, plain_sink = harness.connect()
        await harness.subscribe(resumable, "posts/*")
        await harness.subscribe(plain, "posts/*")
        harness.commit(insert("a"))
        await resumable_sink.wait_for(2)
        harness.hub.stream_lost()
        harness.changelog.restart(LSN(150))
        harness.hub.stream_started("fedcba")
        harness.commit(insert("b"))
        events = await resumable_sink.wait_for(4)
        await plain_sink.wait_until("ended")

    assert json.loads(events[2][2]) == {"collections": [], "reason": "unknown"}
    assert action_and_id(events[3]) == ("create", "b")
    assert events[3][0].startswith(f"{resumable.id}.fedcba-")


# While the replication stream is down


async def test_pb_connect_is_held_back_until_the_stream_is_up() -> None:
    """A client can't subscribe before, so it isn't invited to."""
    async with open_harness(is_up=False) as harness:
        _connection, sink = harness.connect()
        await asyncio.sleep(0)
        assert sink.data == b""
        harness.hub.stream_started("abcdef")

        assert (await sink.wait_for(1))[0][1] == "PB_CONNECT"


async def test_a_position_is_checked_when_the_stream_is_up_and_not_before() -> None:
    """Otherwise a client that resumes during a restart would be notified of another history."""
    async with open_harness() as harness:
        made = harness.commit(insert("a"), insert("b"))
        await harness.until_delivered()
        harness.hub.stream_lost()
        connection, sink = harness.connect(position=f"{'x' * 40}.{at(made, 1)}")
        harness.hub.stream_started("abcdef")
        await harness.subscribe(connection, "posts/*")

        assert action_and_id((await sink.wait_for(2))[1]) == ("create", "b")


async def test_a_call_is_refused_at_once_and_an_unanswered_connection_ends_a_second_later() -> None:
    """A refused first call would leave the Dart SDK's connection open without topics."""
    async with open_harness(heartbeat=1.0) as harness:
        answered, answered_sink = harness.connect()
        await harness.subscribe(answered, "posts/*")
        held, held_sink = harness.connect()
        harness.hub.stream_lost()
        for connection in (answered, held):
            with pytest.raises(SubscriptionError) as refused:
                await harness.subscribe(connection, "posts/*", "notes/*")
            assert refused.value.error_code == "stream_away"
        began = time.monotonic()
        await held_sink.wait_until("ended")

        assert time.monotonic() - began > 0.9
        assert answered_sink.state == "open"


# Limits


async def test_idle_and_life_limits_end_a_connection_without_a_byte_more() -> None:
    """``idle_timeout`` counts from the last event, ``max_lifetime`` from the beginning."""
    async with open_harness(idle_timeout=1.2, max_lifetime=2.0) as harness:
        idle, idle_sink = harness.connect()
        busy, busy_sink = harness.connect()
        await harness.subscribe(idle, "notes/*")
        await harness.subscribe(busy, "posts/*")
        began = time.monotonic()
        for n in range(8):
            harness.commit(insert(f"{n}"))
            await asyncio.sleep(0.2)
        assert (idle_sink.state, busy_sink.state) == ("ended", "open")
        await busy_sink.wait_until("ended")

    assert 1.9 < time.monotonic() - began < 4
    assert [event[1] for event in idle_sink.events()] == ["PB_CONNECT"]


async def test_a_heartbeat_keeps_a_quiet_connection_and_does_not_count_as_activity() -> None:
    """It is written, and ``idle_timeout`` ends the connection all the same."""
    async with open_harness(heartbeat=0.1, idle_timeout=1.3) as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        await sink.wait_until("ended")

    assert sink.data.count(b"\n:\n") >= 1
    assert len(sink.events()) == 1


async def test_a_connection_ends_with_its_token() -> None:
    """Not before the token expires."""
    async with open_harness(heartbeat=1.0) as harness:
        connection, sink = harness.connect()
        caller = Caller(ANN.principal, expires_at=time.time() + 0.5)
        await harness.subscribe(connection, "posts/*", caller=caller)
        began = time.monotonic()
        await sink.wait_until("ended")

    assert time.monotonic() - began >= 0.5


async def test_beyond_the_limit_a_connection_gets_no_pb_connect() -> None:
    """It gets status 200 and no message: an EventSource doesn't retry after another status."""
    async with open_harness(max_connections=1) as harness:
        _first, first_sink = harness.connect()
        _second, second_sink = harness.connect()
        await first_sink.wait_for(1)

        assert second_sink.data == b""


async def test_shutdown_lets_a_call_be_answered_before_it_ends_the_connection() -> None:
    """The JS SDK never reconnects if its connection ends between PB_CONNECT and the answer."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        harness.database.gate = asyncio.Event()
        call = asyncio.create_task(harness.subscribe(connection, "posts/*"))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(harness.hub.shutdown(5.0))
        await asyncio.sleep(0.3)
        assert sink.state == "open"
        harness.database.gate.set()
        await call
        began = time.monotonic()
        await stopping

    assert sink.state == "ended"
    assert time.monotonic() - began > 0.9


async def test_what_a_closed_connection_subscribed_to_is_forgotten() -> None:
    """The matcher keeps nothing of its topics."""
    async with open_harness() as harness:
        for _ in range(3):
            connection, _sink = harness.connect()
            await harness.subscribe(connection, "posts/*", "posts/a", "notes/*")
            harness.hub.remove_connection(connection)

        matcher = harness.hub._progress.generation.matcher
        assert matcher._tables == {}
        assert not matcher._unindexed_filters


@pytest.mark.parametrize("before", [(), ("notes/*",)])
async def test_a_refused_call_leaves_nothing_of_its_topics(
    monkeypatch: pytest.MonkeyPatch, before: tuple[str, ...]
) -> None:
    """Neither subscriptions nor read points, also of the topic that exceeded the limit."""
    monkeypatch.setattr(
        "pgrealtime.hub.evaluation.filter_limits.UNINDEXED_FILTERS_PER_CONNECTION", 1
    )
    many = [f'posts/*?options={{"query":{{"filter":"title ~ \'{n}\'"}}}}' for n in range(3)]
    async with open_harness() as harness:
        connection, _sink = harness.connect()
        if before:
            await harness.subscribe(connection, *before)
        waiting = dict(harness.hub._registry.subscriptions_with_read_point)
        with pytest.raises(SubscriptionLimitError):
            await harness.subscribe(connection, "posts/*", *many)

        assert (
            tuple(connection.subscriptions),
            harness.hub._registry.subscriptions_with_read_point,
        ) == (before, waiting)


async def test_pb_cursor_is_repeated_every_sixteen_messages_of_a_long_batch() -> None:
    """The JS SDK exposes no message ids: PB_CURSOR is all that it can resume from."""
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "PB_CURSOR")
        made = harness.commit(*(insert(f"n{n}") for n in range(40)))
        events = (await sink.wait_for(2 + 40 + 3))[2:]

    indexes = [index for index, event in enumerate(events) if event[1] == "PB_CURSOR"]
    assert indexes == [16, 33, 42]
    assert json.loads(events[16][2])["id"] == f"{connection.id}.{at(made, 16)}"
