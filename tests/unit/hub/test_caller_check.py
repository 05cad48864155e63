"""What can't be read of a caller is no proof that it is who the stream says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest
from psycopg import sql

from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.changes import Change, TableName, Transaction, Truncate
from pgrealtime.collections.model import (
    Collection,
    Collections,
    Field,
    FieldKind,
    Junction,
    Relation,
)
from pgrealtime.expand.plan import Plan, Viewer, Viewers
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.live_reads.caller_check import CallerCheck, Checked, may_have_changed
from pgrealtime.hub.live_reads.row_history import RowHistory
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.rules.engine.plan import Planner
from tests.unit.hub.room import COLLECTIONS, NOTES, PEOPLE, POSTS, TEXT, NoRows, insert, open_room
from tests.unit.hub.test_callers import caller, changed, listening


class Unanswered(NoRows):
    """A reading whose query failed."""

    def __init__(self, reach: LSN) -> None:
        self.reach = reach

    async def texts(self, _statement: sql.Composed, _params: Mapping[str, object]) -> None:  # type: ignore[override]
        return None


LOOKUPS = frozenset({(POSTS, "id")})
PLAIN = Plan((), {}, (), lookups=LOOKUPS)
ASKING = Plan((), {}, (), asks_caller=True, lookups=LOOKUPS)
"""An ``expand`` whose rules ask who the subscriber is."""
EVENT = Event(COLLECTIONS["posts"], "update", "p", {"id": "p"}, Cursor(LSN(8), 1), Xid(3))


def viewer_of(plan: Plan, own: tuple[str, str] | None = None) -> Viewer:
    return Viewer(plan=plan, sees_hidden=False, own=own, seen={}, managed={})


@pytest.mark.parametrize(
    ("viewer", "is_asking"),
    [
        pytest.param(viewer_of(ASKING), True, id="rules ask"),
        pytest.param(viewer_of(PLAIN, ("people", "ann")), True, id="own address"),
        pytest.param(viewer_of(PLAIN), False, id="anybody may see it"),
    ],
)
@pytest.mark.parametrize(
    "reach",
    [
        pytest.param(LSN(1_000_000), id="the stream has yet to get there"),
        pytest.param(LSN(0), id="the changelog has discarded the time since"),
    ],
)
async def test_who_cannot_be_read_is_shown_nothing_that_depends_on_who_that_is(
    viewer: Viewer, reach: LSN, *, is_asking: bool
) -> None:
    async with open_room() as room:
        connection, _ = await listening(room, "posts/*", who=caller())
        connection.subscriptions["posts/*"].viewer = viewer
        hub = room.hub
        check = CallerCheck(
            hub._identities,
            hub._course.meaning,
            RowHistory(room.changelog),
            events=[EVENT],
            connections=lambda _viewers, _groups: [connection],
        )
        await check(Unanswered(reach), [viewer], [])
        assert check.outdated == ({connection: {viewer}} if is_asking else {})
        assert check.checked == (Checked(LSN(8), is_complete=False) if is_asking else None)


def test_a_table_that_the_stream_carries_since_a_reload_has_no_history_of_before() -> None:
    """It wasn't in what the changelog had of then."""

    async def known(history: RowHistory) -> list[bool]:
        found = [await history.of(table, "id", LSN(100)) for table in (POSTS, NOTES)]
        found += [await history.of(table, "id", LSN(200)) for table in (POSTS, NOTES)]
        return [one is not None for one in found]

    changelog = MemoryChangelog(LSN(100), max_size=1000, max_age=300.0)
    history = RowHistory(changelog)
    history.use([POSTS])
    changelog.append(Transaction(xid=Xid(1), end_lsn=LSN(200), commit_time=0, changes=(), size=1))
    assert asyncio.run(known(history)) == [True, False, True, False]
    history.use([POSTS, NOTES])
    assert asyncio.run(known(history)) == [True, False, True, True]
    history.clear()
    assert asyncio.run(known(history)) == [True] * 4


@pytest.mark.parametrize("rule", ["", "public = true", "id = @request.auth.id"])
def test_an_option_knows_what_its_records_are_read_from(rule: str) -> None:
    posts = replace(
        COLLECTIONS["posts"],
        fields=tuple(
            replace(one, relation=Relation(collection="people")) if one.name == "title" else one
            for one in COLLECTIONS["posts"].fields
        ),
    )
    people = replace(COLLECTIONS["people"], view_rule=rule)
    collections = Collections((posts, COLLECTIONS["notes"], people))
    plan = Viewers(collections, Planner(collections))._plan("posts", "title", False)
    assert plan is not None
    assert plan.asks_caller == ("@request.auth" in rule)
    assert plan.lookups == {(POSTS, "id"), (PEOPLE, "id")}


def test_an_option_reads_junction_tables_as_well() -> None:
    """Those of the relations on its way, and of the records that it leads to."""
    links, likes = TableName("public", "links"), TableName("public", "likes")
    posts, people = COLLECTIONS["posts"], COLLECTIONS["people"]
    by_links = through(links, posts, "people")
    by_likes = replace(
        people, fields=(*people.fields, *through(likes, people, "notes").fields[-1:])
    )
    collections = Collections((by_links, COLLECTIONS["notes"], by_likes))
    plan = Viewers(collections, Planner(collections))._plan("posts", "others", False)
    assert plan is not None
    assert {(links, "here"), (likes, "here")} <= plan.lookups


def through(table: TableName, collection: Collection, to: str) -> Collection:
    """Return the collection with a relation ``others`` through a junction table."""
    junction = Junction(table=replace(collection.table, name=table), source="here", target="there")
    made = Field(
        name="others",
        column=None,
        kind=FieldKind.RELATION,
        type=TEXT,
        is_multiple=True,
        relation=Relation(collection=to, junction=junction),
    )
    return replace(collection, fields=(*collection.fields, made))


@pytest.mark.parametrize("change", [insert("a"), Truncate(POSTS)], ids=["a row", "all rows"])
async def test_a_table_is_written_by_changes_of_known_and_unknown_rows(change: Change) -> None:
    async with open_room() as room:
        end = room.commit(change).end_lsn
        history = await RowHistory(room.changelog).of(POSTS, "id", LSN(end - 1))
        assert history is not None
        assert history.is_written(LSN(end - 1))
        assert not history.is_written(end)


async def test_ids_with_padding_are_not_looked_up() -> None:
    """A char(n) is another text in a row than in a caller."""
    async with open_room() as room:
        people = COLLECTIONS["people"]
        history = RowHistory(room.changelog)
        after = room.changelog.head.lsn
        room.commit(changed("bob"))
        assert await history.of(PEOPLE, "id", after) is not None
        key = replace(people.key, type=replace(people.key.type, name="bpchar"))
        assert may_have_changed(history, people, ("people", "bob"), after)
        assert not may_have_changed(history, people, ("people", "ann"), after)
        assert may_have_changed(history, replace(people, key=key), ("people", "ann"), after)
