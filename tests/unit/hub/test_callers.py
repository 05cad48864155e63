"""Connections whose people change, go, and get other passwords while they listen."""

from __future__ import annotations

import asyncio
import json
import sys
from weakref import ReferenceType, ref

import pytest

from pgrealtime.auth.principal import GUEST, AuthRecord, Caller
from pgrealtime.auth.record import digest_token_key
from pgrealtime.changelog.base import Gap
from pgrealtime.changes import Delete, Insert, Row, TableName, Truncate, Update, WholeRow
from pgrealtime.errors import SubscriptionError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.state.callers import CallerTracker
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from pgrealtime.snapshot import ReadPoint, parse_read_point
from tests.unit.hub.room import (
    COLLECTIONS,
    LOGINS,
    PEOPLE,
    POSTS,
    MemorySink,
    Room,
    insert,
    open_room,
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


def gone(name: str = "ann", key: str = "k1") -> Delete:
    return Delete(PEOPLE, WholeRow(row(name, key)))


async def listening(room: Room, *topics: str, who: Caller) -> tuple[Connection, MemorySink]:
    connection, sink = room.connect()
    await room.subscribe(connection, *topics, caller=who)
    return connection, sink


async def heard(sink: MemorySink, count: int) -> list[tuple[str, str, bool]]:
    """Action, record id, and whether the address was shown: only its owner sees it."""
    events = (await sink.wait_for(1 + count))[1:]
    data = [json.loads(event[2]) for event in events]
    return [(d["action"], d["record"]["id"], "email" in d["record"]) for d in data]


async def test_a_changed_token_key_makes_a_guest_before_its_own_event_is_judged() -> None:
    """In the middle of one transaction too: what came before is judged as before."""
    async with open_room() as room:
        connection, sink = await listening(room, "people/*", who=caller())
        room.commit(changed(), changed("bob"), changed(key="k2"), changed("bob"), changed(key="k2"))

        assert await heard(sink, 5) == [
            ("update", "ann", True),
            ("update", "bob", False),
            ("update", "ann", False),
            ("update", "bob", False),
            ("update", "ann", False),
        ]
        assert connection.caller == Caller()


async def test_a_deleted_person_hears_of_it_and_is_a_guest_from_then_on() -> None:
    """In the same transaction too; somebody of the same id who comes later is somebody else."""
    async with open_room() as room:
        _, sink = await listening(room, "people/*", "posts/*", who=caller())
        room.commit(changed(), gone(), Insert(PEOPLE, row("ann")), changed(), insert("a"))

        assert await heard(sink, 5) == [
            ("update", "ann", True),
            ("delete", "ann", True),
            ("create", "ann", False),
            ("update", "ann", False),
            ("create", "a", False),
        ]


async def test_a_person_whose_id_changes_is_a_guest_after_it() -> None:
    """To a client the one went and another came; both are one change and go out together."""
    async with open_room() as room:
        _, sink = await listening(room, "people/*", who=caller())
        room.commit(Update(PEOPLE, row("eve"), WholeRow(row("ann"))), changed("ann"))

        assert await heard(sink, 3) == [
            ("delete", "ann", True),
            ("create", "eve", False),
            ("update", "ann", False),
        ]


async def test_new_data_is_the_caller_s_from_its_own_event_on() -> None:
    async with open_room() as room:
        connection, _ = await listening(room, "people/*", who=caller())
        room.commit(Update(PEOPLE, {**row("ann"), "email": "new@x"}, WholeRow(row("ann"))))
        await room.settled()

        principal = connection.caller.principal
        assert isinstance(principal, AuthRecord)
        assert principal.email == "new@x"
        assert connection.caller.token_key_digest == digest_token_key("k1")


async def test_a_guest_of_that_kind_may_become_anybody() -> None:
    """The client isn't told; its next call may carry any authorization (protocol, 8)."""
    async with open_room() as room:
        connection, sink = await listening(room, "people/*", who=caller())
        room.commit(gone())
        await heard(sink, 1)

        await room.subscribe(connection, "people/*", caller=caller("bob"))
        room.commit(changed("bob"))
        assert (await heard(sink, 2))[1] == ("update", "bob", True)


async def test_others_keep_what_they_are() -> None:
    async with open_room() as room:
        _, sink = await listening(room, "people/*", who=caller("bob"))
        room.commit(changed(key="k2"), gone(), changed("bob"))

        assert (await heard(sink, 3))[2] == ("update", "bob", True)


# Between the look-up of a caller and the answer to its call


async def test_what_changed_between_look_up_and_answer_is_not_lost() -> None:
    """The key changes when the caller was looked up, and is told before it is registered."""
    async with open_room() as room:
        who = caller(read_point=parse_read_point("50:50:", "0/64"))
        room.commit(changed(key="k2"), xid=60)
        await room.settled()
        connection, sink = await listening(room, "people/*", who=who)

        assert connection.caller == Caller()
        room.commit(changed(key="k2"))
        assert await heard(sink, 1) == [("update", "ann", False)]


async def test_a_deletion_between_look_up_and_answer_is_not_lost() -> None:
    async with open_room() as room:
        who = caller(read_point=parse_read_point("50:50:", "0/64"))
        room.commit(gone(), Insert(PEOPLE, row("ann")), xid=60)
        await room.settled()
        connection, _ = await listening(room, "people/*", who=who)

        assert connection.caller.principal == GUEST


async def test_what_changes_while_the_call_waits_is_not_lost() -> None:
    """The barrier takes its time; the change is handed out meanwhile."""
    async with open_room() as room:
        room.database.gate = asyncio.Event()
        connection, sink = room.connect()
        call = asyncio.create_task(
            room.subscribe(
                connection, "people/*", caller=caller(read_point=parse_read_point("50:50:", "0/64"))
            )
        )
        await room.database.asked_again(1)
        room.database.snapshot_text = "70:70:"
        room.commit(changed(key="k2"), xid=60)
        await room.settled()
        room.database.gate.set()
        await call
        room.commit(changed(key="k2"), xid=80)

        assert await heard(sink, 1) == [("update", "ann", False)]


def test_a_caller_is_as_of_its_connection_s_place_and_not_a_change_later() -> None:
    """What comes later the connection hears itself, and has other rights from there on."""
    identities = CallerTracker(LOGINS)
    people = COLLECTIONS["people"]
    renamed = {**row("ann"), "email": "new@x"}
    for lsn, told in ((200, renamed), (300, row("ann", "k2"))):
        identities.remember_change(
            Event(people, "update", "ann", told, Cursor(LSN(lsn), 3), Xid(lsn), ())
        )
    known = parse_read_point("1:1:", "0/1")

    def at(lsn: int, ordinal: int) -> str:
        who = identities.caller_at(caller(read_point=known), Cursor(LSN(lsn), ordinal)).principal
        return who.email if isinstance(who, AuthRecord) else "guest"

    assert [at(100, END_ORDINAL), at(200, 2)] == ["ann@x"] * 2
    assert [at(200, 3), at(200, END_ORDINAL), at(300, 2)] == ["new@x"] * 3
    assert [at(300, 3), at(400, END_ORDINAL)] == ["guest"] * 2


async def test_a_call_in_the_middle_of_a_slice_begins_with_the_rights_of_before_it() -> None:
    """The change of its key was read already, and is judged at this moment; its turn comes."""
    async with open_room() as room:
        await listening(room, "posts/*", who=Caller())
        room.database.rows_gate = asyncio.Event()
        room.database.snapshot_text = "50:50:"
        room.commit(Insert(POSTS, {"id": "held up"}), changed(), changed(key="k2"), xid=60)
        await room.database.is_holding.wait()
        who = caller(read_point=parse_read_point("50:50:", "0/64"))
        connection, sink = await listening(room, "people/*", who=who)
        assert connection.caller == who
        room.database.rows_gate.set()

        assert await heard(sink, 2) == [("update", "ann", True), ("update", "ann", False)]
        assert connection.caller == Caller()


async def test_what_the_look_up_saw_already_does_not_undo_it() -> None:
    """Two new passwords, then a login with the second, while the stream is still at the first."""
    async with open_room() as room:
        room.database.snapshot_text, room.database.insert_lsn = "70:70:", "0/5000"
        who = caller(key="k3", read_point=parse_read_point("70:70:", "0/5000"))
        connection, sink = await listening(room, "people/*", "posts/*", who=who)
        room.commit(changed(key="k2"), xid=60)
        room.commit(changed(key="k3"), xid=61)
        room.commit(changed(key="k3"), xid=90)

        assert await heard(sink, 1) == [("update", "ann", True)]
        assert connection.caller == who


async def test_a_caller_looked_up_before_a_gap_is_looked_up_again() -> None:
    """Nobody knows what became of the row in the gap: 503 makes the client come back."""
    async with open_room() as room:
        end = room.commit(insert("a")).end_lsn
        gap = Gap(LSN(end + 1), "slot_lost")
        room.changelog.append(gap)
        room.hub.wake()
        await room.settled()

        with pytest.raises(SubscriptionError) as caught:
            await listening(
                room, "people/*", who=caller(read_point=parse_read_point("1:1:", "0/1"))
            )
        assert caught.value.error_code == "stream_away"
        await listening(room, "people/*", who=caller(read_point=parse_read_point("1:1:", "0/FFFF")))


# Connections at a position of their own


async def test_a_slow_connection_turns_where_it_stands() -> None:
    """What was committed before its person's key changed is judged as of before."""
    async with open_room(send_buffer=1) as room:
        connection, sink = await listening(room, "people/*", who=caller())
        room.commit(changed())
        await heard(sink, 1)
        sink.is_stuck = True
        for _ in range(3):
            room.commit(changed())
            await room.settled()
        room.commit(changed(key="k2"))
        room.commit(changed("bob"))
        await room.settled()
        assert connection.caller == caller()
        sink.unstick()

        assert (await heard(sink, 6))[1:] == [
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
    """As one that isn't slow: it is no fault, and isn't logged and counted as one."""
    filters = [f'people/*?options={{"query":{{"filter":"id ~ \'{n}\'"}}}}' for n in range(2)]
    async with open_room(send_buffer=1) as room:
        _, sink = await listening(room, "people/*", *filters, who=caller())
        sink.is_stuck = True
        for _ in range(3):
            room.commit(changed())
            await room.settled()
        monkeypatch.setattr("pgrealtime.hub.evaluation.quotas.UNINDEXED_FILTERS_PER_CONNECTION", 1)
        room.commit(changed(key="k2"))
        await room.settled()
        sink.unstick()
        await sink.wait_until("ended")

        assert room.hub.counters.closed_connections == {"limit": 1}


async def test_who_resumes_is_who_it_is_now() -> None:
    """Changes of before the call are in the caller already."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*", caller=caller())
        room.commit(insert("a"), xid=50)
        last = (await sink.wait_for(2))[-1][0]
        room.hub.remove_connection(connection)
        room.commit(changed(key="k2"), xid=60)
        room.commit(changed(key="k3"), xid=61)
        await room.settled()

        again, heard_again = room.connect(position=last)
        who = caller(key="k3", read_point=parse_read_point("70:70:", "0/FFFF"))
        await room.subscribe(again, "people/*", caller=who)
        assert await heard(heard_again, 2) == [("update", "ann", True), ("update", "ann", True)]
        room.commit(gone(key="k3"), xid=80)
        assert (await heard(heard_again, 3))[2] == ("delete", "ann", True)
        await room.settled()
        assert again.caller == Caller()


@pytest.mark.parametrize("tables", [None, frozenset({PEOPLE})], ids=["all", "people"])
async def test_a_gap_over_people_s_rows_ends_their_connections(
    tables: frozenset[TableName] | None,
) -> None:
    """Also of one that is told of gaps: coming back it says anew who it is."""
    async with open_room() as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "posts/*", "PB_RESYNC", caller=caller())
        guest, guest_sink = room.connect(position="")
        await room.subscribe(guest, "posts/*", "PB_RESYNC")
        end = room.commit(insert("a")).end_lsn
        room.changelog.append(Gap(LSN(end + 1), "slot_lost", tables))
        room.hub.wake()
        await sink.wait_until("ended")
        await room.settled()

        assert guest_sink.state == "open"


@pytest.mark.parametrize("is_slow", [False, True], ids=["live", "slow"])
@pytest.mark.parametrize("topic", ["PB_RESYNC", "PB_CURSOR"])
async def test_who_may_be_another_after_a_gap_hears_nothing_until_it_is_ended(
    topic: str, *, is_slow: bool
) -> None:
    """What it isn't sent lies behind its position: when it is back it hears of that."""
    async with open_room(send_buffer=1 if is_slow else 100_000) as room:
        connection, sink = room.connect(position="")
        await room.subscribe(connection, "people/*", topic, caller=caller())
        end = room.commit(changed("bob")).end_lsn
        await room.settled()
        sink.is_stuck = is_slow
        room.changelog.append(Gap(LSN(end + 1), "slot_lost"))
        room.commit(changed())
        await room.settled()
        sink.unstick()
        await sink.wait_until("ended")

        told = [event for _, event, _ in sink.events() if event != "PB_CURSOR"]
        assert told == ["PB_CONNECT", "people/*", "PB_RESYNC"]
        again, heard_again = room.connect(position=sink.events()[-1][0])
        who = caller(read_point=parse_read_point("9999:9999:", "0/FFFF"))
        await room.subscribe(again, "people/*", caller=who)
        assert await heard(heard_again, 1) == [("update", "ann", True)]


async def test_a_refused_call_gives_nobody_back_whom_a_gap_took_away() -> None:
    """Its connection waits for its end, and not for a caller that may be another by now."""
    async with open_room() as room:
        connection, sink = await listening(room, "people/*", who=caller())
        end = room.commit(insert("a")).end_lsn
        room.changelog.append(Gap(LSN(end + 1), "slot_lost"))
        room.hub.wake()
        await room.settled()
        with pytest.raises(SubscriptionError):
            await room.subscribe(
                connection, "people/*", caller=caller(read_point=parse_read_point("1:1:", "0/1"))
            )
        room.commit(changed())
        await sink.wait_until("ended")

        assert [event for _, event, _ in sink.events()] == ["PB_CONNECT"]


async def test_who_was_looked_up_before_a_gap_over_people_s_rows_is_looked_up_again() -> None:
    """What the gap hides of its row nobody could tell the call that is being answered."""
    async with open_room() as room:
        end = room.commit(changed()).end_lsn
        room.changelog.append(Gap(LSN(end + 1), "slot_lost", frozenset({PEOPLE})))
        room.hub.wake()
        await room.settled()
        connection, _ = room.connect()
        before = caller(read_point=parse_read_point("1:1:", f"0/{end:X}"))
        with pytest.raises(SubscriptionError):
            await room.subscribe(connection, "posts/*", caller=before)
        after = caller(read_point=parse_read_point("9999:9999:", f"0/{end + 1:X}"))
        await room.subscribe(connection, "posts/*", caller=after)


async def test_emptied_people_are_no_callers_any_more() -> None:
    async with open_room() as room:
        _, sink = await listening(room, "posts/*", who=caller())
        room.commit(Truncate(PEOPLE))
        await sink.wait_until("ended")


async def test_a_gap_elsewhere_leaves_callers_alone() -> None:
    async with open_room() as room:
        connection, sink = await listening(room, "people/*", who=caller())
        room.commit(Truncate(POSTS), changed())

        assert await heard(sink, 1) == [("update", "ann", True)]
        assert connection.caller == caller()


class SeenRow(dict[str, str | None]):
    """A row of which it can be seen whether anybody still has it."""


def test_what_is_remembered_of_people_is_little() -> None:
    """Neither what else their transactions did, nor rows without end."""
    identities = CallerTracker({})
    changes = (insert("a"),)
    before = sys.getrefcount(changes)
    rows: list[ReferenceType[SeenRow]] = []
    for number in range(1, 100):
        told = SeenRow(row("ann"), key="k" * 1_000_000)
        rows.append(ref(told))
        at = Cursor(LSN(number), 1)
        identities.remember_change(
            Event(COLLECTIONS["people"], "update", "ann", told, at, Xid(number), changes)
        )
        del told

    assert sys.getrefcount(changes) == before
    assert [number for number, one in enumerate(rows, 1) if one() is not None] == [96, 97, 98, 99]
    known = parse_read_point("1:1:", "0/5F")
    with pytest.raises(LookupError):
        identities.caller_at(
            caller(read_point=parse_read_point("1:1:", "0/5E")), Cursor(LSN(200), END_ORDINAL)
        )
    assert identities.caller_at(caller(read_point=known), Cursor(LSN(200), END_ORDINAL)) == Caller()
