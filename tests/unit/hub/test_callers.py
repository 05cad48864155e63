"""Connections whose callers are changed, deleted, or get another token key while they are open."""

from __future__ import annotations

import asyncio
import json
import sys
from weakref import ReferenceType, ref

import pytest

from pgrealtime.auth.principal import GUEST, AuthRecord, Caller
from pgrealtime.auth.record import digest_token_key
from pgrealtime.changelog.memory import Gap
from pgrealtime.changes import Delete, Insert, Row, TableName, Truncate, Update, WholeRow
from pgrealtime.errors import SubscriptionError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.state.callers import CallerTracker
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from pgrealtime.snapshot import ReadPoint, parse_read_point
from tests.unit.hub.harness import (
    COLLECTIONS,
    LOGINS,
    PEOPLE,
    POSTS,
    HubHarness,
    MemorySink,
    insert,
    open_harness,
)


def caller(name: str = "ann", key: str = "k1", read_point: ReadPoint | None = None) -> Caller:
    record = AuthRecord(
        collection_id="pbc_people", collection_name="people", id=name, email=f"{name}@x"
    )
    return Caller(record, token_key_digest=digest_token_key(key), read_point=read_point)


def row(name: str, key: str = "k1") -> Row:
    return {"id": name, "email": f"{name}@x", "key": key}


def changed(name: str = "ann", key: str = "k1") -> Update:
    return Update(PEOPLE, row(name, key), WholeRow(row(name)))


def deleted(name: str = "ann", key: str = "k1") -> Delete:
    return Delete(PEOPLE, WholeRow(row(name, key)))


async def subscribe(
    harness: HubHarness, *topics: str, user: Caller
) -> tuple[Connection, MemorySink]:
    connection, sink = harness.connect()
    await harness.subscribe(connection, *topics, caller=user)
    return connection, sink


async def receive(sink: MemorySink, count: int) -> list[tuple[str, str, bool]]:
    """Wait for events; return action, record id, and whether the e-mail address was shown.

    Only the owner of a record receives its address.
    """
    events = (await sink.wait_for(1 + count))[1:]
    data = [json.loads(event[2]) for event in events]
    return [(d["action"], d["record"]["id"], "email" in d["record"]) for d in data]


async def test_a_changed_token_key_makes_a_guest_before_its_own_event_is_evaluated() -> None:
    """Events before it in the same transaction are still evaluated for the former caller."""
    async with open_harness() as harness:
        connection, sink = await subscribe(harness, "people/*", user=caller())
        harness.commit(
            changed(), changed("bob"), changed(key="k2"), changed("bob"), changed(key="k2")
        )

        assert await receive(sink, 5) == [
            ("update", "ann", True),
            ("update", "bob", False),
            ("update", "ann", False),
            ("update", "bob", False),
            ("update", "ann", False),
        ]
        assert connection.caller == Caller()


async def test_a_deleted_caller_receives_the_event_and_is_a_guest_from_then_on() -> None:
    """Also within one transaction. A record that gets the same id later is another account."""
    async with open_harness() as harness:
        _, sink = await subscribe(harness, "people/*", "posts/*", user=caller())
        harness.commit(changed(), deleted(), Insert(PEOPLE, row("ann")), changed(), insert("a"))

        assert await receive(sink, 5) == [
            ("update", "ann", True),
            ("delete", "ann", True),
            ("create", "ann", False),
            ("update", "ann", False),
            ("create", "a", False),
        ]


async def test_a_caller_whose_id_changes_is_a_guest_after_it() -> None:
    """Clients receive a delete and a create; both belong to one change and are sent together."""
    async with open_harness() as harness:
        _, sink = await subscribe(harness, "people/*", user=caller())
        harness.commit(Update(PEOPLE, row("eve"), WholeRow(row("ann"))), changed("ann"))

        assert await receive(sink, 3) == [
            ("delete", "ann", True),
            ("create", "eve", False),
            ("update", "ann", False),
        ]


async def test_new_data_is_the_caller_s_from_its_own_event_on() -> None:
    """A change of other columns updates the caller and keeps its token valid."""
    async with open_harness() as harness:
        connection, _ = await subscribe(harness, "people/*", user=caller())
        harness.commit(Update(PEOPLE, {**row("ann"), "email": "new@x"}, WholeRow(row("ann"))))
        await harness.until_delivered()

        principal = connection.caller.principal
        assert isinstance(principal, AuthRecord)
        assert principal.email == "new@x"
        assert connection.caller.token_key_digest == digest_token_key("k1")


async def test_a_caller_that_became_a_guest_may_authenticate_as_any_other() -> None:
    """Its client isn't notified; its next call may have any authorization (protocol, 8)."""
    async with open_harness() as harness:
        connection, sink = await subscribe(harness, "people/*", user=caller())
        harness.commit(deleted())
        await receive(sink, 1)

        await harness.subscribe(connection, "people/*", caller=caller("bob"))
        harness.commit(changed("bob"))
        assert (await receive(sink, 2))[1] == ("update", "bob", True)


async def test_callers_of_other_accounts_stay_as_they_are() -> None:
    """Changes of one account's row leave callers of other accounts as they are."""
    async with open_harness() as harness:
        _, sink = await subscribe(harness, "people/*", user=caller("bob"))
        harness.commit(changed(key="k2"), deleted(), changed("bob"))

        assert (await receive(sink, 3))[2] == ("update", "bob", True)


# Changes between the look-up of a caller and the end of its call


async def test_what_changed_between_look_up_and_answer_is_not_lost() -> None:
    """The event of the new key is delivered before the connection has the caller."""
    async with open_harness() as harness:
        user = caller(read_point=parse_read_point("50:50:", "0/64"))
        harness.commit(changed(key="k2"), xid=60)
        await harness.until_delivered()
        connection, sink = await subscribe(harness, "people/*", user=user)

        assert connection.caller == Caller()
        harness.commit(changed(key="k2"))
        assert await receive(sink, 1) == [("update", "ann", False)]


async def test_a_deletion_between_look_up_and_answer_is_not_lost() -> None:
    """The caller is a guest, although another row has its id by then."""
    async with open_harness() as harness:
        user = caller(read_point=parse_read_point("50:50:", "0/64"))
        harness.commit(deleted(), Insert(PEOPLE, row("ann")), xid=60)
        await harness.until_delivered()
        connection, _ = await subscribe(harness, "people/*", user=user)

        assert connection.caller.principal == GUEST


async def test_what_changes_while_the_call_waits_is_not_lost() -> None:
    """The change is delivered while the call waits for its snapshot."""
    async with open_harness() as harness:
        harness.database.gate = asyncio.Event()
        connection, sink = harness.connect()
        call = asyncio.create_task(
            harness.subscribe(
                connection, "people/*", caller=caller(read_point=parse_read_point("50:50:", "0/64"))
            )
        )
        await harness.database.wait_for_snapshot_queries(1)
        harness.database.snapshot_text = "70:70:"
        harness.commit(changed(key="k2"), xid=60)
        await harness.until_delivered()
        harness.database.gate.set()
        await call
        harness.commit(changed(key="k2"), xid=80)

        assert await receive(sink, 1) == [("update", "ann", False)]


def test_a_caller_is_as_of_its_connection_s_cursor_and_not_a_change_later() -> None:
    """Later changes are applied when the connection reads them: its rights change from there on."""
    tracker = CallerTracker(LOGINS)
    people = COLLECTIONS["people"]
    renamed = {**row("ann"), "email": "new@x"}
    for lsn, changed_row in ((200, renamed), (300, row("ann", "k2"))):
        tracker.remember_change(
            Event(people, "update", "ann", changed_row, Cursor(LSN(lsn), 3), Xid(lsn), ())
        )
    known_read_point = parse_read_point("1:1:", "0/1")

    def at(lsn: int, ordinal: int) -> str:
        user = tracker.caller_at(
            caller(read_point=known_read_point), Cursor(LSN(lsn), ordinal)
        ).principal
        return user.email if isinstance(user, AuthRecord) else "guest"

    assert [at(100, END_ORDINAL), at(200, 2)] == ["ann@x"] * 2
    assert [at(200, 3), at(200, END_ORDINAL), at(300, 2)] == ["new@x"] * 3
    assert [at(300, 3), at(400, END_ORDINAL)] == ["guest"] * 2


async def test_a_call_during_a_slice_begins_with_the_rights_from_before_it() -> None:
    """The change of its key was read and is being evaluated; it applies only after the slice."""
    async with open_harness() as harness:
        await subscribe(harness, "posts/*", user=Caller())
        harness.database.rows_gate = asyncio.Event()
        harness.database.snapshot_text = "50:50:"
        harness.commit(Insert(POSTS, {"id": "held up"}), changed(), changed(key="k2"), xid=60)
        await harness.database.is_at_rows_gate.wait()
        user = caller(read_point=parse_read_point("50:50:", "0/64"))
        connection, sink = await subscribe(harness, "people/*", user=user)
        assert connection.caller == user
        harness.database.rows_gate.set()

        assert await receive(sink, 2) == [("update", "ann", True), ("update", "ann", False)]
        assert connection.caller == Caller()


async def test_what_the_look_up_saw_already_does_not_undo_it() -> None:
    """Two changes of the key, then a login with the second, while the stream is before both."""
    async with open_harness() as harness:
        harness.database.snapshot_text, harness.database.insert_lsn = "70:70:", "0/5000"
        user = caller(key="k3", read_point=parse_read_point("70:70:", "0/5000"))
        connection, sink = await subscribe(harness, "people/*", "posts/*", user=user)
        harness.commit(changed(key="k2"), xid=60)
        harness.commit(changed(key="k3"), xid=61)
        harness.commit(changed(key="k3"), xid=90)

        assert await receive(sink, 1) == [("update", "ann", True)]
        assert connection.caller == user


async def test_a_caller_looked_up_before_a_gap_is_looked_up_again() -> None:
    """The gap may hide a change of its row: status 503 makes the client repeat the call."""
    async with open_harness() as harness:
        end = harness.commit(insert("a")).end_lsn
        gap = Gap(LSN(end + 1), "slot_lost")
        harness.changelog.append(gap)
        harness.hub.wake()
        await harness.until_delivered()

        with pytest.raises(SubscriptionError) as caught:
            await subscribe(
                harness, "people/*", user=caller(read_point=parse_read_point("1:1:", "0/1"))
            )
        assert caught.value.error_code == "stream_away"
        await subscribe(
            harness, "people/*", user=caller(read_point=parse_read_point("1:1:", "0/FFFF"))
        )


# Connections that catch up


async def test_the_caller_of_a_slow_connection_changes_at_its_own_cursor() -> None:
    """Events committed before the change of the key are evaluated for the former caller."""
    async with open_harness(send_buffer=1) as harness:
        connection, sink = await subscribe(harness, "people/*", user=caller())
        harness.commit(changed())
        await receive(sink, 1)
        sink.is_stuck = True
        for _ in range(3):
            harness.commit(changed())
            await harness.until_delivered()
        harness.commit(changed(key="k2"))
        harness.commit(changed("bob"))
        await harness.until_delivered()
        assert connection.caller == caller()
        sink.unstick()

        assert (await receive(sink, 6))[1:] == [
            ("update", "ann", True),
            ("update", "ann", True),
            ("update", "ann", True),
            ("update", "ann", False),
            ("update", "bob", False),
        ]
        assert connection.caller == Caller()


async def test_a_slow_connection_whose_topics_become_too_many_is_ended_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that is LIVE: the close reason is the limit, and no error is logged or counted."""
    filters = [f'people/*?options={{"query":{{"filter":"id ~ \'{n}\'"}}}}' for n in range(2)]
    async with open_harness(send_buffer=1) as harness:
        _, sink = await subscribe(harness, "people/*", *filters, user=caller())
        sink.is_stuck = True
        for _ in range(3):
            harness.commit(changed())
            await harness.until_delivered()
        monkeypatch.setattr(
            "pgrealtime.hub.evaluation.filter_limits.UNINDEXED_FILTERS_PER_CONNECTION", 1
        )
        harness.commit(changed(key="k2"))
        await harness.until_delivered()
        sink.unstick()
        await sink.wait_until("ended")

        assert harness.hub.counters.closed_connections == {"limit": 1}


async def test_a_resumed_connection_has_its_present_caller() -> None:
    """The caller of the call is in force for events from before it as well."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*", caller=caller())
        harness.commit(insert("a"), xid=50)
        last = (await sink.wait_for(2))[-1][0]
        harness.hub.remove_connection(connection)
        harness.commit(changed(key="k2"), xid=60)
        harness.commit(changed(key="k3"), xid=61)
        await harness.until_delivered()

        resumed, resumed_sink = harness.connect(position=last)
        user = caller(key="k3", read_point=parse_read_point("70:70:", "0/FFFF"))
        await harness.subscribe(resumed, "people/*", caller=user)
        assert await receive(resumed_sink, 2) == [("update", "ann", True), ("update", "ann", True)]
        harness.commit(deleted(key="k3"), xid=80)
        assert (await receive(resumed_sink, 3))[2] == ("delete", "ann", True)
        await harness.until_delivered()
        assert resumed.caller == Caller()


@pytest.mark.parametrize("tables", [None, frozenset({PEOPLE})], ids=["all", "people"])
async def test_a_gap_of_accounts_rows_ends_their_connections(
    tables: frozenset[TableName] | None,
) -> None:
    """Also a connection that is notified of gaps: its client must authenticate again."""
    async with open_harness() as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "posts/*", "PB_RESYNC", caller=caller())
        guest, guest_sink = harness.connect(position="")
        await harness.subscribe(guest, "posts/*", "PB_RESYNC")
        end = harness.commit(insert("a")).end_lsn
        harness.changelog.append(Gap(LSN(end + 1), "slot_lost", tables))
        harness.hub.wake()
        await sink.wait_until("ended")
        await harness.until_delivered()

        assert guest_sink.state == "open"


@pytest.mark.parametrize("is_slow", [False, True], ids=["live", "slow"])
@pytest.mark.parametrize("topic", ["PB_RESYNC", "PB_CURSOR"])
async def test_a_connection_with_an_uncertain_caller_receives_nothing_until_it_is_ended(
    topic: str, *, is_slow: bool
) -> None:
    """The events withheld are after its position, so the client receives them when it resumes."""
    async with open_harness(send_buffer=1 if is_slow else 100_000) as harness:
        connection, sink = harness.connect(position="")
        await harness.subscribe(connection, "people/*", topic, caller=caller())
        end = harness.commit(changed("bob")).end_lsn
        await harness.until_delivered()
        sink.is_stuck = is_slow
        harness.changelog.append(Gap(LSN(end + 1), "slot_lost"))
        harness.commit(changed())
        await harness.until_delivered()
        sink.unstick()
        await sink.wait_until("ended")

        names = [event for _, event, _ in sink.events() if event != "PB_CURSOR"]
        assert names == ["PB_CONNECT", "people/*", "PB_RESYNC"]
        resumed, resumed_sink = harness.connect(position=sink.events()[-1][0])
        user = caller(read_point=parse_read_point("9999:9999:", "0/FFFF"))
        await harness.subscribe(resumed, "people/*", caller=user)
        assert await receive(resumed_sink, 1) == [("update", "ann", True)]


async def test_a_refused_call_does_not_restore_a_caller_that_a_gap_invalidated() -> None:
    """A refused call doesn't restore the caller: it may have changed in the gap."""
    async with open_harness() as harness:
        connection, sink = await subscribe(harness, "people/*", user=caller())
        end = harness.commit(insert("a")).end_lsn
        harness.changelog.append(Gap(LSN(end + 1), "slot_lost"))
        harness.hub.wake()
        await harness.until_delivered()
        with pytest.raises(SubscriptionError):
            await harness.subscribe(
                connection, "people/*", caller=caller(read_point=parse_read_point("1:1:", "0/1"))
            )
        harness.commit(changed())
        await sink.wait_until("ended")

        assert [event for _, event, _ in sink.events()] == ["PB_CONNECT"]


async def test_a_caller_looked_up_before_a_gap_of_accounts_rows_is_looked_up_again() -> None:
    """The gap may hide a change of its row, so the call is refused."""
    async with open_harness() as harness:
        end = harness.commit(changed()).end_lsn
        harness.changelog.append(Gap(LSN(end + 1), "slot_lost", frozenset({PEOPLE})))
        harness.hub.wake()
        await harness.until_delivered()
        connection, _ = harness.connect()
        before = caller(read_point=parse_read_point("1:1:", f"0/{end:X}"))
        with pytest.raises(SubscriptionError):
            await harness.subscribe(connection, "posts/*", caller=before)
        after = caller(read_point=parse_read_point("9999:9999:", f"0/{end + 1:X}"))
        await harness.subscribe(connection, "posts/*", caller=after)


async def test_a_truncated_users_table_ends_its_connections() -> None:
    """A truncation of the users table ends the connections of its accounts."""
    async with open_harness() as harness:
        _, sink = await subscribe(harness, "posts/*", user=caller())
        harness.commit(Truncate(PEOPLE))
        await sink.wait_until("ended")


async def test_a_gap_elsewhere_leaves_callers_alone() -> None:
    """A gap of another table changes no caller."""
    async with open_harness() as harness:
        connection, sink = await subscribe(harness, "people/*", user=caller())
        harness.commit(Truncate(POSTS), changed())

        assert await receive(sink, 1) == [("update", "ann", True)]
        assert connection.caller == caller()


class SeenRow(dict[str, str | None]):
    """A row that can be weakly referenced, to observe when it is released."""


def test_what_is_kept_of_accounts_changes_is_bounded() -> None:
    """Neither the other changes of their transactions are kept, nor rows of any size."""
    tracker = CallerTracker({})
    changes = (insert("a"),)
    before = sys.getrefcount(changes)
    rows: list[ReferenceType[SeenRow]] = []
    for number in range(1, 100):
        changed_row = SeenRow(row("ann"), key="k" * 1_000_000)
        rows.append(ref(changed_row))
        at = Cursor(LSN(number), 1)
        tracker.remember_change(
            Event(COLLECTIONS["people"], "update", "ann", changed_row, at, Xid(number), changes)
        )
        del changed_row

    assert sys.getrefcount(changes) == before
    assert [number for number, one in enumerate(rows, 1) if one() is not None] == [96, 97, 98, 99]
    known_read_point = parse_read_point("1:1:", "0/5F")
    with pytest.raises(LookupError):
        tracker.caller_at(
            caller(read_point=parse_read_point("1:1:", "0/5E")), Cursor(LSN(200), END_ORDINAL)
        )
    assert (
        tracker.caller_at(caller(read_point=known_read_point), Cursor(LSN(200), END_ORDINAL))
        == Caller()
    )
