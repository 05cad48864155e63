"""Questions put to PostgreSQL: in a snapshot that sees the commit.

A failure stays with its pair.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from random import Random

import psycopg
import pytest
import pytest_asyncio
from msgspec import structs
from structlog.testing import capture_logs

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.changes import Delete, Key, Row, WholeRow
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.hub.connections.connection import Connection, Subscription
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.records.encode import View
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rule_queries.rounds import BudgetedTransaction
from pgrealtime.rule_queries.slow_queries import SLICE_FILTER_SECONDS, TimeBudget
from pgrealtime.rules.engine.batch_query import KeyQuestion, PairQuestion
from pgrealtime.rules.engine.formula import Test, each_test_call
from tests.engine_driving import evaluate_in_process
from tests.rules_world import World
from tests.topics import topic
from tests.unit.hub.harness import MemorySink

SEEN = Xid(3)
"""The xid after FrozenTransactionId: visible to every snapshot."""
DEADLINE = 10.0
VIEW = View(sees_hidden=False, sees_email=False, fields=None)


class Desk:
    """Subscribers of ``posts``, a matcher with one rule, and a query executor."""

    def __init__(self, world: World, pool: QueryPool) -> None:
        self.world = world
        self.executor = QueryExecutor(pool)
        self.matcher = Matcher(world.collections)

    def rule(self, text: str) -> None:
        """Make it the list rule of posts, for later subscriptions."""
        posts = replace(self.world.collections["posts"], list_rule=text)
        others = (c for c in self.world.collections.values() if c.name != "posts")
        self.matcher = Matcher(Collections((posts, *others)))

    def subscribe(self, user: str) -> Subscription:
        """Add a subscription to all posts."""
        cursor = Cursor(LSN(0), 0)
        connection = Connection("c", MemorySink(), address="", epoch="", cursor=cursor, now=0.0)
        made = Subscription(connection, parse_topic("posts/*"), VIEW, "")
        record = AuthRecord(collection_id="x", collection_name="users", id=user)
        assert self.matcher.add(made, record) == ""
        return made

    async def admitted(self, events: Sequence[Event]) -> list[set[Subscription]]:
        """Return, per event, the subscribers whose rule admits it."""
        found: list[set[Subscription]] = [set() for _ in events]
        for costly in (False, True):
            evaluation = evaluate_in_process(
                self.matcher, events, datetime.now(UTC), has_remote_filter=costly
            )
            await self.executor.answer_questions(evaluation)
            for index, subscriptions in enumerate(found):
                subscriptions.update(
                    s for group in evaluation.hits(index) for a in group.render_groups for s in a
                )
        return found

    def event(self, **columns: str | None) -> Event:
        """Return an update of a post."""
        row: Row = {**self.world.post(), **columns}
        posts = self.world.collections["posts"]
        return Event(posts, "update", row["id"] or "", row, Cursor(LSN(8), 1), SEEN)


@pytest_asyncio.fixture
async def desk(database_url: str) -> AsyncIterator[Desk]:
    world = await asyncio.to_thread(World, database_url, Random(1))
    async with QueryPool(database_url, statement_timeout=60) as pool:
        with world.connection:
            yield Desk(world, pool)


def set_up(desk: Desk, statement: str) -> None:
    with psycopg.connect(desk.world.url, autocommit=True) as connection:
        connection.execute(statement.encode())


async def test_a_row_that_postgres_refuses_is_denied_alone(desk: Desk) -> None:
    """The catalogue may be older than the stream.

    One of many rows holds a text where an integer is expected.
    """
    set_up(desk, "UPDATE projects SET owner = 'u1'; INSERT INTO projects VALUES ('px', '', 'u1')")
    desk.rule("project.owner = @request.auth.id && project.owner.level != views")
    one = desk.subscribe("u1")
    desk.subscribe("u2")
    events = [desk.event(project="px", views=views) for views in ("1000", "no number", "2000")]

    assert await desk.admitted(events) == [{one}, set(), {one}]
    assert set(desk.executor.unanswered_counts) == {("posts", "error")}


async def test_what_postgres_quotes_of_a_row_is_not_logged(desk: Desk) -> None:
    """For a rule's query and a live row's query.

    The first line of the message is the value itself.
    """
    set_up(desk, "UPDATE projects SET owner = 'u1'; INSERT INTO projects VALUES ('px', '', 'u1')")
    desk.rule("project.owner = @request.auth.id && project.owner.level != views")
    desk.subscribe("u1")
    posts = desk.world.collections["posts"]
    views = posts.table.find_column("views")
    assert views is not None
    numbered = replace(posts, key=views)
    event = desk.event(project="px", views="secret")
    with capture_logs() as logged:
        await desk.admitted([event])
        await desk.executor.fetch_live_rows(
            [structs.replace(event, collection=numbered, record_id="secret")]
        )

    said = [(one["event"], one["error"]) for one in logged]
    assert said == [("rule.error", "SQLSTATE 22P02"), ("live_row.failed", "SQLSTATE 22P02")]


async def test_which_columns_there_are_is_asked_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of missing columns: events wait for the answer."""
    asked: list[str] = []
    reader = desk.executor._live_rows
    existing = reader._fetch_existing_columns

    async def counted(collection: Collection) -> frozenset[str]:
        asked.append(collection.name)
        return await existing(collection)

    monkeypatch.setattr(reader, "_fetch_existing_columns", counted)
    set_up(desk, "ALTER TABLE posts DROP COLUMN title")
    event = structs.replace(desk.event(), row={"id": "p"})
    _, unread = await desk.executor.fetch_live_rows([event])

    assert len(event.missing_columns) > 1
    assert (asked, unread) == (["posts"], frozenset())


async def test_a_bad_rule_keeps_no_other_from_its_answer(desk: Desk) -> None:
    set_up(desk, "INSERT INTO projects VALUES ('px', '', 'u1')")
    desk.rule("project.owner = @request.auth.id")
    one = desk.subscribe("u1")
    set_up(desk, "ALTER TABLE labels RENAME COLUMN name TO title")
    broken = Subscription(
        one.connection,
        parse_topic('posts/*?options={"query":{"filter":"labels.name~1"}}'),
        VIEW,
        "",
    )
    record = AuthRecord(collection_id="x", collection_name="users", id="u1")
    assert desk.matcher.add(broken, record) == ""

    assert await desk.admitted([desk.event(project="px")]) == [{one}]
    assert set(desk.executor.unanswered_counts) == {("posts", "error")}


async def test_nothing_is_asked_before_the_commit_is_visible(desk: Desk) -> None:
    """The stream can bring a commit before any snapshot sees it."""
    desk.rule("project.owner = @request.auth.id")
    one = desk.subscribe("u1")
    async with await psycopg.AsyncConnection.connect(desk.world.url) as writing:
        await writing.execute("INSERT INTO projects VALUES ('px', '', 'u1')")
        cursor = await writing.execute("SELECT (pg_current_xact_id()::text::int8 % 4294967296)")
        found = await cursor.fetchone()
        assert found is not None
        event = desk.event(project="px")
        event.xid = Xid(found[0])
        evaluating = asyncio.create_task(desk.admitted([event]))
        # Loop until the executor has checked visibility at least twice.
        for _ in range(5):
            await writing.execute("SELECT pg_sleep(0.01)")
        assert not evaluating.done()
        await writing.commit()
    async with asyncio.timeout(DEADLINE):
        assert await evaluating == [{one}]


async def test_a_deleted_row_is_evaluated_with_rows_deleted_with_it(desk: Desk) -> None:
    """A cascade sends the parent's delete first.

    Subscribers that could see the post receive its delete.
    """
    set_up(desk, "INSERT INTO members VALUES ('mx', 'px', 'u1', '', 1)")
    set_up(desk, "INSERT INTO projects VALUES ('px', '', 'u2')")
    desk.rule("project.members_via_project.user ?= @request.auth.id")
    one = desk.subscribe("u1")
    desk.subscribe("u2")
    tables = desk.world.collections
    project = next(r for r in desk.world.rows(tables["projects"].table) if r["id"] == "px")
    member = next(r for r in desk.world.rows(tables["members"].table) if r["id"] == "mx")
    set_up(desk, "DELETE FROM members WHERE id = 'mx'")
    set_up(desk, "DELETE FROM projects WHERE id = 'px'")
    went = desk.event(project="px")
    went.action = "delete"
    went.transaction_changes = (
        Delete(tables["projects"].table.name, WholeRow(project)),
        Delete(tables["members"].table.name, WholeRow(member)),
    )

    assert await desk.admitted([went]) == [{one}]


async def test_what_went_without_a_trace_is_denied_and_counted(desk: Desk) -> None:
    """Without REPLICA IDENTITY FULL the values of the deleted related row are unknown."""
    set_up(desk, "INSERT INTO projects VALUES ('px', '', 'u1')")
    desk.rule("project.owner = @request.auth.id")
    desk.subscribe("u1")
    went = desk.event(project="px")
    went.action = "delete"
    went.transaction_changes = (
        Delete(desk.world.collections["projects"].table.name, Key({"id": "px"})),
    )

    assert await desk.admitted([went]) == [set()]
    assert desk.executor.unanswered_counts == {("posts", "unknown_rows"): 1}


async def test_more_values_than_are_fetched_are_asked_for_by_name(desk: Desk) -> None:
    """If a project has more members than there are subscribers, the query names the subscribers."""
    set_up(
        desk,
        "INSERT INTO projects VALUES ('px', '', 'u1');"
        " INSERT INTO members"
        " SELECT 'x' || n, 'px', 'w' || n, '', 1 FROM generate_series(1, 3000) n",
    )
    desk.rule("project.members_via_project.user ?= @request.auth.id")
    members = {desk.subscribe(f"w{n}") for n in (1, 1500, 3000)}
    desk.subscribe("w3001")

    assert await desk.admitted([desk.event(project="px")]) == [members]
    assert not desk.executor.unanswered_counts


async def test_many_slow_filters_together_are_hurried(desk: Desk) -> None:
    """A client's slow filters cost a few time-outs, not one each; fast ones are still answered."""
    set_up(desk, "INSERT INTO projects VALUES ('px', '', 'u1')")
    desk.rule("")
    one = desk.subscribe("u1")
    slow = [f"project.owner.{name}{op}'x'" for name in ("name", "role", "team") for op in "~=<>"]
    record = AuthRecord(collection_id="x", collection_name="users", id="u1")
    filters = [*slow, "project.id~'p'"]
    made = [
        Subscription(one.connection, parse_topic(f"posts/*?options={text}"), VIEW, "")
        for text in (json.dumps({"query": {"filter": text}}) for text in filters)
    ]
    assert [desk.matcher.add(each, record) for each in made] == [""] * 13
    async with (
        QueryPool(desk.world.url, statement_timeout=0.8) as pool,
        await psycopg.AsyncConnection.connect(desk.world.url) as locker,
    ):
        desk.executor = QueryExecutor(pool)
        await locker.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        (found,) = await desk.admitted([desk.event(project="px")])
        waited = time.monotonic() - began

    assert found == {one, made[-1]}
    assert desk.executor.unanswered_counts[("posts", "timeout")] == 12
    assert 3.2 < waited < 6  # four of 0.8 s and eight of 0.04 s; 9.6 s unhurried


@pytest.mark.parametrize("theirs", [3600.0, 0.02])
async def test_what_is_late_while_others_wait_is_undecided_and_can_be_asked_again(
    desk: Desk, theirs: float
) -> None:
    """It isn't denied and counts as no time-out; without the shorter limit it is answered."""
    set_up(
        desk,
        "UPDATE users SET name = 'u1' WHERE id = 'u2';INSERT INTO projects VALUES ('px', '', 'u2')",
    )
    desk.rule("")
    one = desk.subscribe("u1").connection
    pairs, values, guard = "name~'1'", "name='u1'", "name!=title"
    topics = [filtered(f"project.owner.{text}") for text in (pairs, values, guard)]
    made = [Subscription(one, parse_topic(topic), VIEW, "") for topic in topics]
    record = AuthRecord(collection_id="x", collection_name="users", id="u1")
    assert [desk.matcher.add(each, record) for each in made] == [""] * 3
    evaluation = evaluate_in_process(
        desk.matcher, [desk.event(project="px")], datetime.now(UTC), has_remote_filter=True
    )
    assert {type(question) for question in evaluation.questions()} == {PairQuestion, KeyQuestion}
    budget = TimeBudget(is_limited=True)
    async with (
        QueryPool(desk.world.url, statement_timeout=theirs) as pool,
        await psycopg.AsyncConnection.connect(desk.world.url) as locker,
    ):
        executor = QueryExecutor(pool)
        await locker.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(DEADLINE):
            assert await executor.answer_questions(evaluation, budget) == frozenset()

    assert budget.is_spent()
    assert evaluation.undecided_members == {each.group for each in made}
    assert not evaluation.hits(0)
    assert not executor.unanswered_counts
    assert not any(executor._rounds._breakers.has_timed_out(about) for about in abouts(made))
    # Their connections are closed: no query is sent.
    await executor.answer_questions(evaluation, budget)
    assert evaluation.undecided_members == {each.group for each in made}
    await desk.executor.answer_questions(evaluation, TimeBudget())

    assert evaluation.hits(0) == {each.group for each in made}
    assert not evaluation.undecided_members


def filtered(text: str) -> str:
    return topic("posts/*", filter=text)


def abouts(subscriptions: Sequence[Subscription]) -> Iterator[Test]:
    for one in subscriptions:
        assert one.group is not None
        yield from (leaf.test for leaf in each_test_call(one.group.specialization.formula))


@pytest.mark.parametrize(
    ("theirs", "ours"), [(3600.0, "10ms"), (2.0, "10ms"), (0.01, "10ms"), (0.009, "9ms")]
)
async def test_the_short_time_never_is_longer_than_the_operator_s(
    database_url: str, theirs: float, ours: str
) -> None:
    async with (
        QueryPool(database_url, statement_timeout=theirs) as pool,
        pool.session() as connection,
    ):
        await connection.run(pool.begin_statements(SLICE_FILTER_SECONDS))
        shown = await (await connection.execute("SHOW statement_timeout")).fetchone()
        await connection.execute("ROLLBACK")
        after = await (await connection.execute("SHOW statement_timeout")).fetchone()

    assert (shown, after) == ((ours,), ("0",))


@pytest.fixture
def lost_cancellations(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.CancelledError]:
    """Timeouts expire while transactions begin, which begin all the same; lists what was lost."""
    lost: list[asyncio.CancelledError] = []
    begin = BudgetedTransaction.begin

    async def begin_late(transaction: BudgetedTransaction) -> None:
        await begin(transaction)
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError as error:
            lost.append(error)

    monkeypatch.setattr(BudgetedTransaction, "begin", begin_late)
    return lost


async def test_a_timeout_whose_cancellation_is_lost_leaves_the_questions_unanswered(
    desk: Desk, lost_cancellations: list[asyncio.CancelledError]
) -> None:
    """It is no fault of the evaluation: the connections that asked evaluate the slice alone."""
    desk.rule("project.owner = @request.auth.id")
    desk.subscribe("u1")
    events, now = [desk.event(project="p1")], datetime.now(UTC)
    evaluation = evaluate_in_process(desk.matcher, events, now)
    budget = TimeBudget(is_limited=True, max_seconds=1.0)

    assert await desk.executor.answer_questions(evaluation, budget) == frozenset()
    assert len(lost_cancellations) == 1
    assert budget.is_spent()
    assert evaluation.questions()


async def test_a_session_whose_cancellation_is_lost_ends_in_a_timeout(
    desk: Desk, lost_cancellations: list[asyncio.CancelledError]
) -> None:
    with pytest.raises(TimeoutError):
        async with desk.executor.read_session([SEEN], 1.0):
            raise AssertionError
    assert len(lost_cancellations) == 1
