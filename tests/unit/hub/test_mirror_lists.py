"""Lists that are sent to mirrors which ask for that: what follows a resync, and what follows it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller, account_of
from pgrealtime.changes import Delete, Key, Row, Truncate, Update
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import MirrorsConfig
from pgrealtime.errors import DatabaseUnreachableError, ReadError
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.snapshot import ReadPoint, parse_read_point
from tests.topics import topic
from tests.unit.hub.harness import (
    COLLECTIONS,
    PEOPLE,
    POSTS,
    HubHarness,
    MemorySink,
    insert,
    open_harness,
)

LOADED = topic("posts/*", mode="mirror", load="true")
BY_ID = "title = @request.auth.id"


class Found(NamedTuple):
    records: Sequence[bytes]
    read_point: ReadPoint
    delay_seconds: float


@dataclass
class Lists:
    """Answers with given rows; a test may hold it at a gate."""

    rows: list[str] = field(default_factory=lambda: ["a", "b"])
    snapshot: str = "1000000:1000000:"
    insert_lsn: str = "0/0"
    asked: list[str] = field(default_factory=list)
    """The ids of the callers for whom it was asked."""
    gate: asyncio.Event | None = None
    delays: list[float] = field(default_factory=list)
    """Of the next lists."""
    faults: list[Exception] = field(default_factory=list)
    fields: list[str | None] = field(default_factory=list)
    """The option with which it was asked."""

    async def read_set(
        self,
        collection: Collection,
        record_id: str | None,
        caller: Caller,
        request: RuleRequest,
        *,
        max_rows: int,
        max_bytes: int,
        network: str = "",
    ) -> Found:
        assert (collection.name, record_id, request.query["load"]) == ("posts", None, "true")
        assert (max_rows, bool(max_bytes), network) == (7, True, "127.0.0.1")
        self.fields.append(request.query.get("fields"))
        self.asked.append((account_of(caller) or ("", ""))[1])
        if self.gate is not None:
            await self.gate.wait()
        if self.faults:
            raise self.faults.pop(0)
        records = [json.dumps({"id": row}).encode() for row in self.rows]
        delay = self.delays.pop(0) if self.delays else 0.0
        return Found(records, parse_read_point(self.snapshot, self.insert_lsn), delay)


@asynccontextmanager
async def mirrors(
    lists: Lists | None,
    *,
    rule: str = "",
    clock: Callable[[], float] = time.monotonic,
    send_buffer: int = 1 << 20,
) -> AsyncIterator[HubHarness]:
    posts = replace(COLLECTIONS["posts"], list_rule=rule, view_rule=rule)
    others = (one for one in COLLECTIONS.values() if one.name != "posts")
    limits = MirrorsConfig.model_validate({"pace": 0.02, "rows": 7})
    async with open_harness(
        collections=Collections((posts, *others)),
        mirrors=limits,
        list_reader=lists,
        clock=clock,
        send_buffer=send_buffer,
    ) as harness:
        yield harness


async def listen(
    harness: HubHarness, *topics: str, caller: str = "ann", position: str | None = None
) -> MemorySink:
    connection, sink = harness.connect(position=position)
    principal = AuthRecord(collection_id="pbc_people", collection_name="people", id=caller)
    await harness.subscribe(connection, *topics, caller=Caller(principal))
    return sink


def told(sink: MemorySink, beginning: str = "posts") -> list[str]:
    found = [json.loads(data) for _, name, data in sink.events() if name.startswith(beginning)]
    texts = [f"{one['action']} {one.get('reason') or one['record']['id']}" for one in found]
    return [text.strip() for text in texts]


async def settle(harness: HubHarness) -> None:
    async with asyncio.timeout(20):
        await harness.until_delivered()
        while harness.hub._registry.mirrors_to_resync or harness.hub._catch_up._tasks:
            await asyncio.sleep(0.005)
    await harness.until_delivered()


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not claim():
            await asyncio.sleep(0.005)


LIST = ["resync start", "create a", "create b", "ready"]


async def test_the_list_follows_the_resync_and_events_follow_the_list() -> None:
    lists = Lists()
    async with mirrors(lists) as harness:
        sink = await listen(harness, LOADED, "notes/*")
        await settle(harness)
        harness.commit(insert("c"))
        harness.commit(Truncate(POSTS))
        await settle(harness)
        frames = dict(harness.hub.mirror_frames_sent)

    again = ["resync truncate", "create a", "create b", "ready"]
    assert told(sink) == [*LIST, "create c", *again]
    assert json.loads(sink.events()[-1][2]) == {
        "record": {"collectionId": "pbc_posts", "collectionName": "posts", "id": ""},
        "action": "ready",
    }
    assert frames == {"create": 5, "ready": 2}


@pytest.mark.parametrize(("rule", "asked"), [("", 1), (BY_ID, 2)], ids=["same rows", "own rows"])
async def test_those_who_show_the_same_rows_share_a_query(rule: str, asked: int) -> None:
    lists = Lists(gate=asyncio.Event())
    async with mirrors(lists, rule=rule) as harness:
        assert lists.gate is not None
        people = ["ann", "bob"] * 10
        sinks = [await listen(harness, LOADED, caller=person) for person in people]
        await until(lambda: len(lists.asked) == asked)
        lists.gate.set()
        await settle(harness)

    assert sorted(lists.asked) == ["ann", "bob"][:asked]
    assert [told(sink) for sink in sinks] == [LIST] * 20


async def test_a_list_is_not_shared_with_who_was_delivered_more() -> None:
    """Its rows would lack what that client had."""
    lists = Lists()
    async with mirrors(lists) as harness:
        await listen(harness, LOADED)
        await settle(harness)
        lists.rows = [*lists.rows, "c"]
        harness.commit(insert("c"))
        await harness.until_delivered()
        second = await listen(harness, LOADED)
        await settle(harness)

    assert told(second) == ["resync start", "create a", "create b", "create c", "ready"]


async def test_a_client_that_reads_slowly_is_sent_a_list_when_it_has_read() -> None:
    """It waits for no other, and no other for it."""
    lists = Lists()
    async with mirrors(lists) as harness:
        slow, other = await listen(harness, LOADED), await listen(harness, LOADED)
        await settle(harness)
        slow.is_stuck = True
        harness.commit(insert("c"))
        harness.commit(Truncate(POSTS))
        await until(lambda: told(other)[-1] == "ready" and len(told(other)) > len(LIST) + 1)
        before = told(slow)
        slow.unstick()
        await settle(harness)

    again = ["resync truncate", *LIST[1:]]
    assert before == [*LIST, "create c"]
    assert told(slow) == told(other) == [*LIST, "create c", *again]


async def test_what_the_list_has_is_not_sent_again_and_nothing_is_missed() -> None:
    """While a list is read nothing is delivered to its connection, and all others go on."""
    lists = Lists(gate=asyncio.Event())
    async with mirrors(lists) as harness:
        assert lists.gate is not None
        sink = await listen(harness, LOADED, "notes/*")
        other = await listen(harness, "posts/*")
        await until(lambda: bool(lists.asked))
        for name in ("c", "d", "e", "f"):
            harness.commit(insert(name))  # transactions 200, 300, 400, 500
        await harness.until_delivered()
        before = told(sink), told(other)
        # Of 300 it has nothing; what committed behind its LSN it can't have.
        lists.snapshot, lists.insert_lsn = "300:401:300", "0/1C2"
        lists.gate.set()
        await settle(harness)
        harness.commit(insert("g"))
        await settle(harness)

    assert before == ([], ["create c", "create d", "create e", "create f"])
    assert told(sink) == [*LIST, "create d", "create f", "create g"]


async def test_positions_within_a_list_say_that_it_is_to_be_sent_again() -> None:
    lists = Lists()
    async with mirrors(lists) as harness:
        harness.commit(insert("z"))
        await harness.until_delivered()
        sink = await listen(harness, LOADED, "notes/*", position="")
        await settle(harness)
        positions = [full_id.partition(".")[2] for full_id, name, _ in sink.events()][1:]
        amid = await listen(harness, LOADED, "notes/*", position=positions[1])
        behind = await listen(harness, LOADED, "notes/*", position=positions[-1])
        await settle(harness)
        harness.commit(insert("c"))
        await settle(harness)

    assert [position.endswith("-r") for position in positions] == [True, True, True, False]
    assert told(amid) == [*LIST, "create c"]
    assert told(behind) == ["create c"]


async def test_a_list_that_may_not_be_sent_is_its_client_s_to_load() -> None:
    """It is too long, or refused; or nothing can be read here."""
    for lists in (Lists(faults=[ReadError("the list is too long")]), None):
        async with mirrors(lists) as harness:
            sink = await listen(harness, LOADED)
            await settle(harness)
            harness.commit(insert("c"))
            await settle(harness)

        assert told(sink) == ["resync wide", "create c"]


async def test_a_list_larger_than_a_send_buffer_is_its_client_s_to_load() -> None:
    async with mirrors(Lists(), send_buffer=300) as harness:
        sink = await listen(harness, LOADED)
        await settle(harness)

    assert told(sink) == ["resync wide"]


async def test_a_database_that_does_not_answer_is_asked_again() -> None:
    lists = Lists(faults=[DatabaseUnreachableError("no answer")])
    async with mirrors(lists) as harness:
        sink = await listen(harness, LOADED)
        await settle(harness)

    assert told(sink) == LIST
    assert lists.asked == ["ann"] * 2


async def test_a_list_without_what_was_delivered_is_read_again() -> None:
    """A commit may be delivered before readers see it."""
    lists = Lists()
    async with mirrors(lists, clock=lambda: time.monotonic() * 50) as harness:
        sink = await listen(harness, LOADED)
        await settle(harness)
        harness.database.snapshot_text = lists.snapshot = "150:150:"
        harness.commit(Truncate(POSTS))
        await until(lambda: len(lists.asked) > 1)
        before = told(sink)
        harness.database.snapshot_text = lists.snapshot = "1000:1000:"
        await settle(harness)

    assert before == LIST
    assert told(sink) == [*LIST, "resync truncate", *LIST[1:]]


async def test_a_list_that_is_held_back_holds_no_other_back() -> None:
    lists = Lists(delays=[60.0] * 3)
    async with mirrors(lists, rule=BY_ID) as harness:
        guesses = [
            topic("posts/*", mode="mirror", load="true", filter=f"id = '{n}'") for n in "123"
        ]
        held = [await listen(harness, guess) for guess in guesses]
        await until(lambda: len(lists.asked) == len(guesses))
        other = await listen(harness, LOADED, caller="bob")
        await until(lambda: told(other) == LIST)
        before = [told(sink) for sink in held]

    assert before == [[], [], []]


async def test_a_client_that_goes_while_its_list_is_read_takes_nothing_from_others() -> None:
    lists = Lists(gate=asyncio.Event())
    async with mirrors(lists) as harness:
        assert lists.gate is not None
        await listen(harness, LOADED)
        second = await listen(harness, LOADED)
        await until(lambda: bool(lists.asked))
        first, _ = harness.hub.connections
        harness.hub.remove_connection(first)
        lists.gate.set()
        await settle(harness)

    assert told(second) == LIST
    assert lists.asked == ["ann"]


async def test_a_client_that_goes_before_its_list_is_read_leaves_it_to_others() -> None:
    """Both places are taken by other lists, so that theirs waits."""
    lists = Lists(gate=asyncio.Event())
    async with mirrors(lists) as harness:
        assert lists.gate is not None
        for n in "12":
            query = {"mode": "mirror", "load": "true", "filter": f"id = '{n}'"}
            await listen(harness, topic("posts/*", **query))
        await until(lambda: len(lists.asked) == 2)
        first = await listen(harness, LOADED)
        second = await listen(harness, LOADED)
        loads = harness.hub._resyncs.loads
        await until(lambda: loads._permits.count_waiting("127.0.0.1") == 1)
        (gone,) = (one for one in harness.hub.connections if one.writer is first)
        harness.hub.remove_connection(gone)
        lists.gate.set()
        await settle(harness)

    assert told(second) == LIST


async def test_listed_records_have_the_id_whatever_fields_are_asked_for() -> None:
    """As those of the events: the client sets and drops rows by it."""
    lists = Lists()
    async with mirrors(lists) as harness:
        await listen(harness, topic("posts/*", mode="mirror", load="true", fields="title"))
        await settle(harness)

    assert lists.fields == ["title,id"]


async def test_a_list_read_after_its_caller_has_changed_is_not_sent() -> None:
    """Somebody deleted meanwhile would be sent rows that were written after it."""
    lists = Lists(gate=asyncio.Event())
    async with mirrors(lists) as harness:
        assert lists.gate is not None
        ann, bob = await listen(harness, LOADED), await listen(harness, LOADED, caller="bob")
        await until(lambda: bool(lists.asked))
        seen: Row = {"id": "bob", "key": None, "seen": "now"}
        harness.commit(Delete(PEOPLE, Key({"id": "ann"})), Update(PEOPLE, seen, Key(seen)))
        lists.gate.set()
        await settle(harness)

    # Then the deletion itself comes, after which she is a guest.
    assert told(ann) == ["resync wide", "resync identity", *LIST[1:]]
    assert told(bob) == LIST


async def test_a_mirror_without_a_collection_it_may_see_has_an_empty_list() -> None:
    lists = Lists()
    async with mirrors(lists, rule='@request.auth.id = "bob"') as harness:
        sink = await listen(harness, LOADED)
        await settle(harness)

    assert told(sink) == ["resync start", "ready"]
    assert lists.asked == []
