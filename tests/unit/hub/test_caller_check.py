"""What can't be read of a caller is no proof that it is who the stream says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest
from psycopg import sql

from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.changes import Change, TableName, Transaction, Truncate
from pgrealtime.collections.model import (
    Collection,
    Collections,
    Field,
    FieldKind,
    Junction,
    Relation,
)
from pgrealtime.expand.plan import ExpandCompiler, ExpandPlan, ExpandViewer
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.state.caller_check import (
    CallerCheck,
    CallerCheckResult,
    may_account_have_changed,
)
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.rules.engine.compiler import RuleCompiler
from tests.unit.hub.room import COLLECTIONS, NOTES, PEOPLE, POSTS, TEXT, NoRows, insert, open_room
from tests.unit.hub.test_callers import caller, changed, listening


class Unanswered(NoRows):
    """A reading whose query failed."""

    def __init__(self, reach: LSN) -> None:
        self.reach = reach

    async def fetch_texts(self, _statement: sql.Composed, _params: Mapping[str, object]) -> None:  # type: ignore[override]
        return None


LOOKUPS = frozenset({(POSTS, "id")})
PLAIN = ExpandPlan((), {}, (), lookup_columns=LOOKUPS)
ASKING = ExpandPlan((), {}, (), depends_on_caller=True, lookup_columns=LOOKUPS)
"""An ``expand`` whose rules ask who the subscriber is."""
EVENT = Event(COLLECTIONS["posts"], "update", "p", {"id": "p"}, Cursor(LSN(8), 1), Xid(3))


def viewer_of(plan: ExpandPlan, own: tuple[str, str] | None = None) -> ExpandViewer:
    return ExpandViewer(
        plan=plan, sees_hidden=False, own_record=own, view_predicates={}, manage_predicates={}
    )


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
    viewer: ExpandViewer, reach: LSN, *, is_asking: bool
) -> None:
    async with open_room() as room:
        connection, _ = await listening(room, "posts/*", who=caller())
        connection.subscriptions["posts/*"].expand_viewer = viewer
        hub = room.hub
        check = CallerCheck(
            hub._registry.callers,
            hub._progress.generation,
            events=[EVENT],
            find_connections=lambda _viewers, _groups: [connection],
        )
        await check(Unanswered(reach), [viewer], [])
        assert check.outdated_connections == ({connection: {viewer}} if is_asking else {})
        assert check.result == (
            CallerCheckResult(LSN(8), is_changelog_complete=False) if is_asking else None
        )


def test_a_table_that_the_stream_carries_since_a_reload_has_no_history_of_before() -> None:
    """It wasn't in what the changelog had of then."""

    async def known(history: RowHistory) -> list[bool]:
        found = [await history.table_history(table, "id", LSN(100)) for table in (POSTS, NOTES)]
        found += [await history.table_history(table, "id", LSN(200)) for table in (POSTS, NOTES)]
        return [one is not None for one in found]

    changelog = MemoryChangelog(LSN(100), max_bytes=1000, max_age_seconds=300.0)
    history = RowHistory(changelog)
    history.set_streamed_tables([POSTS])
    changelog.append(
        Transaction(xid=Xid(1), end_lsn=LSN(200), commit_time_us=0, changes=(), size_bytes=1)
    )
    assert asyncio.run(known(history)) == [True, False, True, False]
    history.set_streamed_tables([POSTS, NOTES])
    assert asyncio.run(known(history)) == [True, False, True, True]
    history.clear()
    assert asyncio.run(known(history)) == [True] * 4


@pytest.mark.parametrize("rule", ["", "public = true", "id = @request.auth.id"])
def test_an_option_knows_what_its_records_are_read_from(rule: str) -> None:
    posts = replace(
        COLLECTIONS["posts"],
        fields=tuple(
            replace(one, relation=Relation(collection_name="people"))
            if one.name == "title"
            else one
            for one in COLLECTIONS["posts"].fields
        ),
    )
    people = replace(COLLECTIONS["people"], view_rule=rule)
    collections = Collections((posts, COLLECTIONS["notes"], people))
    plan = ExpandCompiler(collections, RuleCompiler(collections))._cached_plan(
        "posts", "title", False
    )
    assert plan is not None
    assert plan.depends_on_caller == ("@request.auth" in rule)
    assert plan.lookup_columns == {(POSTS, "id"), (PEOPLE, "id")}


def test_an_option_reads_junction_tables_as_well() -> None:
    """Those of the relations on its way, and of the records that it leads to."""
    links, likes = TableName("public", "links"), TableName("public", "likes")
    posts, people = COLLECTIONS["posts"], COLLECTIONS["people"]
    by_links = through(links, posts, "people")
    by_likes = replace(
        people, fields=(*people.fields, *through(likes, people, "notes").fields[-1:])
    )
    collections = Collections((by_links, COLLECTIONS["notes"], by_likes))
    plan = ExpandCompiler(collections, RuleCompiler(collections))._cached_plan(
        "posts", "others", False
    )
    assert plan is not None
    assert {(links, "here"), (likes, "here")} <= plan.lookup_columns


def through(table: TableName, collection: Collection, to: str) -> Collection:
    """Return the collection with a relation ``others`` through a junction table."""
    junction = Junction(
        table=replace(collection.table, name=table), source_column="here", target_column="there"
    )
    made = Field(
        name="others",
        column=None,
        kind=FieldKind.RELATION,
        type=TEXT,
        is_multiple=True,
        relation=Relation(collection_name=to, junction=junction),
    )
    return replace(collection, fields=(*collection.fields, made))


@pytest.mark.parametrize("change", [insert("a"), Truncate(POSTS)], ids=["a row", "all rows"])
async def test_a_table_is_written_by_changes_of_known_and_unknown_rows(change: Change) -> None:
    async with open_room() as room:
        end = room.commit(change).end_lsn
        history = await RowHistory(room.changelog).table_history(POSTS, "id", LSN(end - 1))
        assert history is not None
        assert history.has_writes(LSN(end - 1))
        assert not history.has_writes(end)


async def test_ids_with_padding_are_not_looked_up() -> None:
    """A char(n) is another text in a row than in a caller."""
    async with open_room() as room:
        people = COLLECTIONS["people"]
        history = RowHistory(room.changelog)
        after = room.changelog.end_cursor.lsn
        room.commit(changed("bob"))
        assert await history.table_history(PEOPLE, "id", after) is not None
        key = replace(people.key, type=replace(people.key.type, name="bpchar"))
        assert may_account_have_changed(history, people, ("people", "bob"), after)
        assert not may_account_have_changed(history, people, ("people", "ann"), after)
        assert may_account_have_changed(history, replace(people, key=key), ("people", "ann"), after)
