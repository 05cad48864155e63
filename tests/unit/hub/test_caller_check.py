"""Callers whose rows can't be read are treated as changed since the event."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest
from psycopg import sql

from pgrealtime.changelog.memory import Changelog
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
from pgrealtime.hub.state.callers import CallerCheck, CallerCheckResult, may_account_have_changed
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.rules.engine.compiler import RuleCompiler
from tests.column_types import TEXT
from tests.unit.hub.harness import (
    COLLECTIONS,
    NOTES,
    PEOPLE,
    POSTS,
    EmptyReadSession,
    insert,
    open_harness,
    viewer_of,
)
from tests.unit.hub.test_callers import caller, changed, subscribe


class Unanswered(EmptyReadSession):
    """A read session whose query failed."""

    def __init__(self, insert_lsn: LSN) -> None:
        self.insert_lsn = insert_lsn

    async def fetch_texts(self, _statement: sql.Composed, _params: Mapping[str, object]) -> None:  # type: ignore[override]
        return None


LOOKUPS = frozenset({(POSTS, "id")})
PLAIN = ExpandPlan((), {}, (), lookup_columns=LOOKUPS)
CALLER_DEPENDENT = ExpandPlan((), {}, (), depends_on_caller=True, lookup_columns=LOOKUPS)
"""An ``expand`` whose rules depend on the caller."""
EVENT = Event(COLLECTIONS["posts"], "update", "p", {"id": "p"}, Cursor(LSN(8), 1), Xid(3))


@pytest.mark.parametrize(
    ("viewer", "is_dependent"),
    [
        pytest.param(viewer_of(CALLER_DEPENDENT), True, id="rules depend on the caller"),
        pytest.param(
            viewer_of(PLAIN, ("people", "ann")), True, id="shows the caller's own address"
        ),
        pytest.param(viewer_of(PLAIN), False, id="the same for every caller"),
    ],
)
@pytest.mark.parametrize(
    "insert_lsn",
    [
        pytest.param(LSN(1_000_000), id="the stream hasn't reached the snapshot"),
        pytest.param(LSN(0), id="the changelog has discarded later commits"),
    ],
)
async def test_nothing_that_depends_on_an_unreadable_caller_is_expanded(
    viewer: ExpandViewer, insert_lsn: LSN, *, is_dependent: bool
) -> None:
    """If the rows of callers can't be read, what depends on the caller isn't expanded."""
    async with open_harness() as harness:
        connection, _ = await subscribe(harness, "posts/*", user=caller())
        connection.subscriptions["posts/*"].expand_viewer = viewer
        hub = harness.hub
        check = CallerCheck(
            hub._registry.callers,
            hub._progress.generation,
            events=[EVENT],
            find_connections=lambda _viewers, _groups: [connection],
        )
        await check(Unanswered(insert_lsn), [viewer], [])
        assert check.outdated_connections == ({connection: {viewer}} if is_dependent else {})
        assert check.result == (
            CallerCheckResult(LSN(8), is_changelog_complete=False) if is_dependent else None
        )


def test_a_table_that_the_stream_carries_since_a_reload_has_no_history_of_before() -> None:
    """The changelog has no changes of it from before the reload."""

    async def has_history(history: RowHistory) -> list[bool]:
        found = [await history.table_history(table, "id", LSN(100)) for table in (POSTS, NOTES)]
        found += [await history.table_history(table, "id", LSN(200)) for table in (POSTS, NOTES)]
        return [one is not None for one in found]

    changelog = Changelog(LSN(100), max_bytes=1000, max_age_seconds=300.0)
    history = RowHistory(changelog)
    history.set_streamed_tables([POSTS])
    changelog.append(
        Transaction(xid=Xid(1), end_lsn=LSN(200), commit_time_us=0, changes=(), size_bytes=1)
    )
    assert asyncio.run(has_history(history)) == [True, False, True, False]
    history.set_streamed_tables([POSTS, NOTES])
    assert asyncio.run(has_history(history)) == [True, False, True, True]
    history.clear()
    assert asyncio.run(has_history(history)) == [True] * 4


@pytest.mark.parametrize("rule", ["", "public = true", "id = @request.auth.id"])
def test_an_option_knows_what_its_records_are_read_from(rule: str) -> None:
    """The plan of an ``expand`` has the tables whose later writes outdate it."""
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
    """Those of the relations on its path, and those of the records that it leads to."""
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
    """A truncation counts as a write of the table, as a change of one row does."""
    async with open_harness() as harness:
        end = harness.commit(change).end_lsn
        history = await RowHistory(harness.changelog).table_history(POSTS, "id", LSN(end - 1))
        assert history is not None
        assert history.has_writes(LSN(end - 1))
        assert not history.has_writes(end)


async def test_ids_with_padding_are_not_looked_up() -> None:
    """A char(n) id is padded in rows and not in callers, so any account may have changed."""
    async with open_harness() as harness:
        people = COLLECTIONS["people"]
        history = RowHistory(harness.changelog)
        after = harness.changelog.end_cursor.lsn
        harness.commit(changed("bob"))
        assert await history.table_history(PEOPLE, "id", after) is not None
        key = replace(people.key, type=replace(people.key.type, name="bpchar"))
        assert may_account_have_changed(history, people, ("people", "bob"), after)
        assert not may_account_have_changed(history, people, ("people", "ann"), after)
        assert may_account_have_changed(history, replace(people, key=key), ("people", "ann"), after)
