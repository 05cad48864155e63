"""Mirrors in the hub: what each is told, in which order, how often, and by which positions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.changes import Delete, Key, OversizedTransaction, Truncate, Update
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import MirrorsConfig
from pgrealtime.hub import dispatcher
from pgrealtime.lsn import LSN, Xid
from tests.topics import topic
from tests.unit.hub.harness import (
    COLLECTIONS,
    NOTES,
    POSTS,
    HubHarness,
    MemorySink,
    delete,
    insert,
    open_harness,
    update,
)

MIRROR = topic("posts/*", mode="mirror")
RULE = "title = @request.auth.id"


def ann() -> Caller:
    return Caller(AuthRecord(collection_id="pbc_people", collection_name="people", id="ann"))


def renamed(record_id: str, old: str, new: str) -> Update:
    """Return an update of a post's title, of which the whole old row is logged."""
    return replace_old(update(record_id, new), {"id": record_id, "title": old})


def replace_old(change: Update, old: dict[str, str | None]) -> Update:
    return Update(change.table, change.new, type(change.old)(old))


def unlogged(record_id: str, new: str) -> Update:
    """Return one of which the key alone is logged."""
    return Update(POSTS, {"id": record_id, "title": new}, Key({"id": record_id}))


@asynccontextmanager
async def mirrors(
    rule: str = RULE, *, pace: float | str = 0.05, per_second: int = 500, mode: str = "on_request"
) -> AsyncIterator[HubHarness]:
    posts = replace(COLLECTIONS["posts"], list_rule=rule, view_rule=rule, mirrors=mode)  # type: ignore[arg-type]
    others = (one for one in COLLECTIONS.values() if one.name != "posts")
    limits = MirrorsConfig.model_validate({"pace": pace, "resyncs_per_second": per_second})
    async with open_harness(collections=Collections((posts, *others)), mirrors=limits) as harness:
        yield harness


async def listen(
    harness: HubHarness, *topics: str, position: str | None = None, caller: Caller | None = None
) -> MemorySink:
    connection, sink = harness.connect(position=position)
    await harness.subscribe(connection, *topics, caller=caller or ann())
    await harness.until_caught_up()
    return sink


def told(sink: MemorySink) -> list[str]:
    """Return what came for topics of posts: the action, with the id or the reason."""
    found = [json.loads(data) for _, name, data in sink.events() if name.startswith("posts")]
    return [f"{one['action']} {one.get('reason') or one['record']['id']}" for one in found]


async def settle(harness: HubHarness) -> None:
    """Wait until everything is delivered, and every resync told."""
    await harness.until_delivered()
    await harness.until_caught_up()
    async with asyncio.timeout(5):
        while harness.hub._registry.mirrors_to_resync:
            await asyncio.sleep(0.005)
    await harness.until_caught_up()


async def test_a_row_enters_stays_and_leaves() -> None:
    async with mirrors() as harness:
        sink = await listen(harness, MIRROR)
        harness.commit(renamed("a", "bob", "ann"), renamed("a", "ann", "ann"))
        harness.commit(renamed("a", "ann", "bob"), insert("b", "ann"), delete("b", "ann"))
        await settle(harness)

    expected = "resync start", "create a", "update a", "delete a", "create b", "delete b"
    assert told(sink) == list(expected)


async def test_what_mirrors_are_sent_is_counted() -> None:
    """Live or behind, and of connections that are gone too; not what other topics are sent."""
    async with mirrors() as harness:
        hub = harness.hub
        sink = await listen(harness, MIRROR, "posts/*", "notes/*")
        gone = await listen(harness, topic("posts/a", mode="mirror"))
        harness.commit(insert("a", "ann"), renamed("a", "ann", "ann"), insert("b", "ann"))
        await settle(harness)
        hub._dispatcher._fall_behind(hub._registry.live_connections()[0])
        harness.commit(renamed("a", "ann", "bob"), delete("b", "ann"))
        await settle(harness)
        hub._registry.close(hub._registry.live_connections()[-1], "client")
        counts = dict(hub.mirror_frames_sent)

    assert told(gone) == ["resync start", "create a", "update a", "delete a"]
    assert counts == {"create": 3, "update": 2, "delete": 3}
    assert sum(counts.values()) < sum(map(len, (told(sink), told(gone))))


async def test_who_never_saw_a_row_is_told_nothing_of_it() -> None:
    """Neither its deletion nor that it passes from one to another."""
    async with mirrors() as harness:
        sink = await listen(harness, MIRROR, topic("posts/a", mode="mirror"))
        harness.commit(insert("a", "bob"), renamed("a", "bob", "cid"), delete("a", "cid"))
        await settle(harness)

    assert told(sink) == ["resync start"] * 2


async def test_a_changed_key_is_a_delete_and_a_create() -> None:
    async with mirrors() as harness:
        sink = await listen(harness, MIRROR)
        changed = replace_old(update("b", "ann"), {"id": "a", "title": "ann"})
        harness.commit(changed)
        await settle(harness)

    assert told(sink) == ["resync start", "delete a", "create b"]


async def test_a_delete_names_the_id_alone_whatever_happened_and_whatever_was_asked_for() -> None:
    """A row that went and one that is out of sight are the same to who lost sight of it."""
    async with mirrors() as harness:
        names = MIRROR, topic("posts/*", mode="mirror", fields="title")
        sinks = [await listen(harness, name) for name in names]
        harness.commit(renamed("a", "ann", "bob"), delete("b", "ann"))
        await settle(harness)

    key = {"collectionId": "pbc_posts", "collectionName": "posts"}
    for sink in sinks:
        bodies = [json.loads(data)["record"] for _, _, data in sink.events()[-2:]]
        assert bodies == [{**key, "id": "a"}, {**key, "id": "b"}]


async def test_the_id_is_shown_whatever_fields_says() -> None:
    """The client sets and drops rows by it."""
    async with mirrors() as harness:
        sink = await listen(harness, topic("posts/*", mode="mirror", fields="title"))
        harness.commit(insert("a", "ann"))
        await settle(harness)

    assert json.loads(sink.events()[-1][2])["record"] == {"id": "a", "title": "ann"}


async def test_plain_topics_beside_a_mirror_are_told_what_they_always_are() -> None:
    """PocketBase's events: no row leaves, and a deleted one is whole."""
    changes = renamed("a", "bob", "ann"), renamed("a", "ann", "bob"), delete("b", "ann")
    received = []
    for names in (["posts/*"], ["posts/*", MIRROR]):
        async with mirrors() as harness:
            sink = await listen(harness, "posts/*")
            for name in names[1:]:
                await listen(harness, name)
            harness.commit(*changes)
            await settle(harness)
            received.append([data for _, _, data in sink.events()[1:]])

    assert received[0] == received[1]
    assert told(sink) == ["update a", "delete b"]
    assert '"title":"ann"' in received[0][1]


@pytest.mark.parametrize("change", [unlogged("a", "bob"), Delete(POSTS, Key({"id": "a"}))])
async def test_an_old_row_without_the_column_is_unknown_and_not_unseen(
    change: Update | Delete,
) -> None:
    """Whoever may have had it loads anew; who sees it now need not."""
    async with mirrors() as harness:
        sink = await listen(harness, MIRROR)
        everybody = await listen(harness, topic("posts/b", mode="mirror"))
        harness.commit(unlogged("a", "ann"), change)
        await settle(harness)

    assert told(sink) == ["resync start", "update a", "resync unknown"]
    assert told(everybody) == ["resync start"]


async def test_a_rule_without_columns_needs_no_old_row() -> None:
    async with mirrors("") as harness:
        sink = await listen(harness, MIRROR)
        harness.commit(unlogged("a", "x"), Delete(POSTS, Key({"id": "a"})))
        await settle(harness)

    assert told(sink) == ["resync start", "update a", "delete a"]


async def test_a_resync_comes_behind_the_last_event_of_its_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A list that is loaded before would be followed by events that are older than it."""
    monkeypatch.setattr(dispatcher, "LIVE_SLICE_CHANGES", 100)
    async with mirrors(pace=0.001) as harness:
        sink = await listen(harness, MIRROR)
        # Several slices, the first of which has what isn't known.
        rest = [insert(f"r{number}", "ann") for number in range(225)]
        harness.commit(unlogged("a", "bob"), *rest)
        await settle(harness)

    messages = told(sink)
    assert messages[:2] == ["resync start", "create r0"]
    assert messages[-1] == "resync unknown"
    assert messages.count("resync unknown") == 1


async def test_a_mirror_is_told_at_its_pace_and_the_last_time_never_lost() -> None:
    async with mirrors(pace=0.3) as harness:
        sink = await listen(harness, MIRROR)
        for _ in range(20):
            harness.commit(unlogged("a", "bob"))
            await harness.until_delivered()
        begun = told(sink)
        await settle(harness)

    assert begun == ["resync start"]
    assert told(sink) == ["resync start", "resync unknown"]


async def test_all_mirrors_together_are_told_a_few_at_a_time() -> None:
    """Those that begin wait too, and are sent no event before they are told to load."""
    async with mirrors(per_second=20) as harness:
        sinks = [await listen(harness, MIRROR) for _ in range(30)]
        harness.commit(insert("a", "ann"))
        await harness.until_delivered()
        early = [told(sink) for sink in sinks]
        await settle(harness)

    assert early.count(["resync start", "create a"]) >= 20
    assert early.count([]) > 0
    assert {tuple(told(sink)) for sink in sinks} == {
        ("resync start", "create a"),
        ("resync start",),
    }


async def test_positions_say_that_a_resync_is_to_be_written() -> None:
    """Who breaks off before it, and resumes from there, is told to load all the same."""
    async with mirrors(pace="60s") as harness:
        sink = await listen(harness, MIRROR, "notes/*", position="")
        harness.commit(unlogged("a", "bob"), insert("n", "t", NOTES))
        await harness.until_delivered()
        position = sink.events()[-1][0].partition(".")[2]
        resumed = await listen(harness, MIRROR, "notes/*", position=position)
        harness.commit(insert("b", "ann"))
        await harness.until_delivered()

    assert told(sink)[:1] == ["resync start"]
    assert position.endswith("-r")
    assert told(resumed) == ["resync start", "create b"]
    ids = [id_ for id_, name, _ in resumed.events() if name.startswith("posts")]
    assert not any(id_.endswith("-r") for id_ in ids)


async def test_a_mirror_that_resumes_goes_on_without_loading() -> None:
    """What it missed is told by both images, also a row that left."""
    async with mirrors() as harness:
        harness.commit(insert("z", "ann"))
        await harness.until_delivered()
        sink = await listen(harness, MIRROR, position="")
        harness.commit(insert("a", "ann"))
        await settle(harness)
        position = sink.events()[-1][0].partition(".")[2]
        harness.commit(renamed("a", "ann", "bob"), renamed("b", "bob", "ann"))
        await harness.until_delivered()
        resumed = await listen(harness, MIRROR, position=position)

    assert told(resumed) == ["delete a", "create b"]


async def test_a_resync_of_who_catches_up_comes_behind_its_transaction_too() -> None:
    """Though the transaction is read in many parts, each of which ends with a position."""
    async with mirrors() as harness:
        harness.commit(insert("z", "ann"))
        await harness.until_delivered()
        sink = await listen(harness, MIRROR, position="")
        harness.commit(insert("a", "ann"))
        await settle(harness)
        position = sink.events()[-1][0].partition(".")[2]
        rest = [insert(f"r{number}", "ann") for number in range(700)]
        harness.commit(unlogged("b", "bob"), *rest)
        await harness.until_delivered()
        resumed = await listen(harness, MIRROR, position=position)
        await settle(harness)

    messages = told(resumed)
    assert messages[0] == "create r0"
    assert messages[-1] == "resync unknown"
    assert len(messages) == len(rest) + 1


async def test_a_gap_is_a_resync_of_the_mirrors_it_affects() -> None:
    """In place of the connection's end, unless other topics are affected."""
    async with mirrors() as harness:
        mirror = await listen(harness, MIRROR, "notes/*")
        both = await listen(harness, MIRROR, "posts/*")
        other = await listen(harness, topic("notes/*", mode="mirror"))
        await asyncio.sleep(1.1)  # a connection isn't ended sooner after its first call
        harness.commit(Truncate(POSTS))
        await settle(harness)

    assert (mirror.state, told(mirror)) == ("open", ["resync start", "resync truncate"])
    assert both.state == "ended"
    assert [json.loads(data).get("reason") for _, _, data in other.events()[1:]] == ["start"]


async def test_a_transaction_too_large_is_told_with_its_reason() -> None:
    async with mirrors() as harness:
        sink = await listen(harness, MIRROR)
        harness.changelog.append(
            OversizedTransaction(Xid(9), LSN(harness._end + 50), 0, frozenset({POSTS}))
        )
        harness.hub.wake()
        await settle(harness)

    assert told(sink) == ["resync start", "resync too_large"]


async def test_unanswered_questions_are_a_resync_of_mirrors_that_depend_on_them() -> None:
    async with mirrors() as harness:
        sink = await listen(harness, MIRROR)
        harness.database.undecided = frozenset({"posts"})
        harness.commit(insert("a", "bob"))
        await settle(harness)

    assert told(sink) == ["resync start", "resync unknown"]


async def test_with_always_every_topic_is_a_mirror_and_none_is_told_a_resync() -> None:
    """A client that didn't ask takes a resync for a row."""
    async with mirrors(mode="always") as harness:
        sink = await listen(harness, "posts/*", "PB_RESYNC")
        harness.commit(renamed("a", "bob", "ann"), renamed("a", "ann", "bob"), unlogged("b", "bob"))
        harness.commit(Truncate(POSTS))
        await settle(harness)

    assert told(sink) == ["create a", "delete a"]
    assert [name for _, name, _ in sink.events()][-1] == "PB_RESYNC"


async def test_who_is_a_mirror_without_asking_is_notified_of_unanswered_questions() -> None:
    """As of any other topic."""
    async with mirrors(mode="always") as harness:
        sink = await listen(harness, "posts/*", "PB_RESYNC")
        harness.database.undecided = frozenset({"posts"})
        harness.commit(insert("a", "bob"))
        await settle(harness)

    assert [name for _, name, _ in sink.events()][1:] == ["PB_RESYNC"]


async def test_with_off_no_topic_is_a_mirror() -> None:
    async with mirrors(mode="off") as harness:
        sink = await listen(harness, MIRROR)
        harness.commit(renamed("a", "bob", "ann"), renamed("a", "ann", "bob"))
        await settle(harness)

    assert told(sink) == ["update a"]


async def test_a_slow_mirror_reads_on_by_both_images() -> None:
    async with mirrors() as harness:
        sink = await listen(harness, MIRROR)
        sink.is_stuck = True
        large = "x" * 600_000
        for number in range(4):
            harness.commit(insert(f"l{number}", "ann" if number else large))
            harness.commit(
                Update(
                    POSTS,
                    {"id": f"l{number}", "title": "bob"},
                    type(update("x", "x").old)({"id": f"l{number}", "title": "ann"}),
                )
            )
        await harness.until_delivered()
        live = harness.hub._registry.live_connections()
        for connection in live:
            harness.hub._dispatcher._fall_behind(connection)
        harness.commit(renamed("m", "ann", "bob"), renamed("n", "bob", "ann"))
        sink.unstick()
        await settle(harness)

    assert told(sink)[-2:] == ["delete m", "create n"]
