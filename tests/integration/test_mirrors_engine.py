"""Lists kept by a mirror's events equal the reference query's, before and after each transaction.

Rules, filters, rows, related rows, subscribers and transactions are drawn anew on each run; a
failure names its seed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from random import Random
from types import SimpleNamespace

import psycopg
import pytest

from pgrealtime.auth.principal import AuthRecord, Superuser
from pgrealtime.changelog.memory import Changelog
from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Key,
    Row,
    TableName,
    Transaction,
    Update,
    WholeRow,
)
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.errors import RuleError
from pgrealtime.hub.connections.connection import (
    Connection,
    Group,
    MirrorState,
    Subscription,
)
from pgrealtime.hub.evaluation import evaluator
from pgrealtime.hub.evaluation.concerns import Concerns
from pgrealtime.hub.evaluation.evaluator import SliceEvaluator
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.evaluation.toast import RowCompleter
from pgrealtime.hub.events.event import Event, transaction_events
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from pgrealtime.protocol.topic import Topic
from pgrealtime.records.encode import View
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.slow_queries import TimeBudget
from pgrealtime.rules.engine.batch_query import KeyQuestion, PairQuestion
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest
from tests.columns_of_ways import columns_without_way
from tests.engine_driving import CallerMember, put
from tests.integration.test_rules_engine import asked, request_of
from tests.rules_world import World
from tests.unit.hub.harness import FakeDatabase, MemorySink

ROUNDS = int(os.environ.get("PGREALTIME_TEST_OWN_COLUMNS", "25"))
STEPS = 6
CONCERNED_ROUNDS = int(os.environ.get("PGREALTIME_TEST_CONCERNED", "30"))
_TRANSACTIONS = 6
_MEMBERSHIPS = (
    "project.members_via_project.user ?= @request.auth.id",
    "project.members_via_project.user ?= @request.query.q",
    "project.members_via_project.user.team ?= @request.auth.team",
    "author.team.open = true",
    "@collection.members.user ?= @request.auth.id && @collection.members.project ?= project",
    "labels.name ?= @request.query.q",
    "project.owner = @request.auth.id",
)
"""Rules that a change of related rows moves more often than random ones."""
_START = Cursor(LSN(0), 0)


class _Database(FakeDatabase):
    """Answers the engine's questions by a plain connection."""

    def __init__(self, connection: psycopg.Connection) -> None:
        super().__init__()
        self._connection = connection

    async def answer_questions(
        self, evaluation: PendingEvaluation, _budget: TimeBudget | None = None
    ) -> frozenset[str]:
        while questions := evaluation.questions():
            for question in questions:
                assert isinstance(question, (PairQuestion, KeyQuestion))
                put(self._connection, question)
            evaluation.resume()
        return frozenset()


@pytest.mark.timeout(300)
def test_lists_by_own_columns_equal_the_reference_after_each_transaction(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With old rows that are whole, and with some of which the key alone is logged.

    Time stands still: rules that read it move rows only when they are written.
    """
    now = datetime.now(UTC)
    monkeypatch.setattr(evaluator, "datetime", SimpleNamespace(now=lambda _zone: now))
    start = secrets.randbits(32)
    world = World(database_url, Random(start))
    counts: Counter[str] = Counter()
    with world.connection:
        for seed in range(start, start + ROUNDS):
            world.chance.seed(seed)
            rule = world.rule(related=0.0, depth=2)
            fault = asyncio.run(_lists_kept(world, rule, counts, now))
            assert not fault, f"seed {start}, round {seed - start}: {rule}\n{fault}"
    print(dict(counts))  # noqa: T201 (what the run is about)
    assert counts["create"]
    assert counts["delete"]
    assert counts["unknown"]


async def _lists_kept(world: World, rule: str, counts: Counter[str], now: datetime) -> str:
    """Return how some list differs from the reference, or an empty text."""
    collections, posts = world.collections, world.collections["posts"]
    ruled = Collections(
        tuple(replace(one, list_rule=rule) if one is posts else one for one in collections.values())
    )
    matcher, database = Matcher(ruled), _Database(world.connection)
    history = RowHistory(Changelog(LSN(0), max_bytes=1 << 30, max_age_seconds=1e9), None)
    evaluating = SliceEvaluator(database, matcher, RowCompleter(database.fetch_live_rows, history))
    rows = {row["id"]: row for row in (world.post() for _ in range(6))}
    lists: dict[Subscription, set[str | None]] = {}
    requests: dict[Subscription, RuleRequest] = {}
    for _ in range(10):
        request = request_of(world, world.chance.choice(["", world.filter()]))
        made = _subscription(request)
        try:
            matcher.add(made, request.principal)
            lists[made] = _reference(world, rule, request, list(rows.values()), now)
        except RuleError:
            return ""
        requests[made] = request
    for step in range(STEPS):
        changes = list(_changes(world, rows))
        transaction = Transaction(Xid(step + 3), LSN(8 * step + 8), 0, tuple(changes), 100)
        events = [e for e in transaction_events(transaction, ruled) if isinstance(e, Event)]
        result = await evaluating.evaluate_in_chunks(events)
        for event, groups in zip(events, result.hits, strict=True):
            for made in _members(groups):
                counts[event.action] += 1
                (lists[made].discard if event.action == "delete" else lists[made].add)(
                    event.record_id
                )
        for made, request in requests.items():
            expected = _reference(world, rule, request, list(rows.values()), now)
            if made.group in result.resync_reasons:
                counts["unknown"] += 1
                lists[made] = expected
            if lists[made] != expected:
                return f"{request}\n{changes}\n{lists[made]} instead of {expected}"
    return ""


def _subscription(request: RuleRequest) -> Subscription:
    client = Connection("c", MemorySink(), address="", epoch="", cursor=_START, now=0.0)
    topic = Topic(
        text="posts/*",
        collection_name_or_id="posts",
        record_id=None,
        query=request.query,
        headers=request.headers,
    )
    made = Subscription(client, topic, View(), "")
    made.set_mirror(MirrorState(is_told=True))
    return made


def _members(groups: Iterable[Group]) -> Iterator[Subscription]:
    for group in groups:
        for render_group in group.render_groups:
            yield from render_group


def _reference(
    world: World, rule: str, request: RuleRequest, rows: list[Row], now: datetime
) -> set[str | None]:
    return {rows[index]["id"] for index in _listed(world, rule, request, rows, now)}


def _listed(
    world: World, rule: str, request: RuleRequest, rows: Sequence[Row], now: datetime
) -> set[int]:
    """Return the rows that a list shows: rule and filter are about the same related rows."""
    if isinstance(request.principal, Superuser):  # for whom no rule is asked
        return asked(world, rule, request, rows, now)
    query = dict(request.query)
    texts = [text for text in (rule, query.pop("filter", "")) if text]
    whole = " && ".join(f"({text})" for text in texts)
    return asked(world, whole, replace(request, query=query), rows, now)


def _changes(world: World, rows: dict[str | None, Row]) -> Iterator[Change]:
    """Yield random changes of posts, and apply them to the rows."""
    chance, name = world.chance, world.collections["posts"].table.name
    for _ in range(chance.choice((1, 1, 2, 5))):
        new = world.post()
        old = rows.get(new["id"])
        if old is None:
            rows[new["id"]] = new
            yield Insert(name, new)
        elif chance.random() < 0.3:
            del rows[old["id"]]
            yield Delete(name, _logged(chance, old))
        else:
            kept = {column: old[column] for column in old if chance.random() < 0.6}
            new = {**new, **kept, "id": old["id"]}
            moved = f"r{chance.randint(0, 9)}"
            if chance.random() < 0.2 and moved not in rows:
                del rows[old["id"]]
                new["id"] = moved
            rows[new["id"]] = new
            yield Update(name, new, _logged(chance, old))


def _logged(chance: Random, row: Row) -> Key | WholeRow:
    return Key({"id": row["id"]}) if chance.random() < 0.1 else WholeRow(row)


# --- related rows


@pytest.mark.timeout(300)
def test_whoever_a_related_change_moves_is_concerned_by_it(database_url: str) -> None:
    """A verdict on a row that wasn't written moves only for callers that the ways find."""
    start = secrets.randbits(32)
    world = World(database_url, Random(start))
    counts: Counter[str] = Counter()
    with world.connection:
        for seed in range(start, start + CONCERNED_ROUNDS):
            world.chance.seed(seed)
            world.refill()
            rule = world.rule(related=0.9, depth=1)
            if world.chance.random() < 0.6:
                rule = " && ".join({world.chance.choice(_MEMBERSHIPS) for _ in range(2)} | {rule})
            if world.chance.random() < 0.3:
                rule = world.chance.choice(_MEMBERSHIPS)
            fault = _unconcerned(world, rule, counts)
            assert not fault, f"seed {start}, round {seed - start}: {rule}\n{fault}"
    print(dict(counts))  # noqa: T201 (what the run is about)
    assert counts["moved"]
    assert counts["concerned"] < counts["asked"] / 2


def _unconcerned(world: World, rule: str, counts: Counter[str]) -> str:
    """Return a caller whom a transaction moves and no way finds, or an empty text."""
    posts, chance = world.collections["posts"], world.chance
    rows, now = [world.post() for _ in range(10)], datetime.now(UTC)
    compiler, concerns = RuleCompiler(world.collections), Concerns(world.collections)
    members: dict[CallerMember, tuple[set[int], Row | None]] = {}
    for _ in range(8):
        request = request_of(world, chance.choice(["", "", world.filter()]))
        own = world.own_row(request.principal) if chance.random() < 0.7 else None
        try:
            before = _listed(world, rule, request, rows, now)
            bound = compiler.bind_caller(posts, rule, request, own, is_listed=True)
        except RuleError:
            return ""
        if not isinstance(bound, DenyAll):
            if forgotten := columns_without_way(bound.specialization, world.collections):
                return f"no way: {forgotten}"
            member = CallerMember(request, bound.specialization, bound.values)
            concerns.add(member)  # type: ignore[arg-type]  # has what it reads of a group
            members[member] = before, own
    tables = [t for n, t in reachable_tables(world.collections).items() if n.name != "posts"]
    for _ in range(_TRANSACTIONS):
        with psycopg.connect(world.url) as writing:
            drawn = world._change(writing, chance.choice(tables), [])
            changes = tuple(_degraded(chance, one) for one in drawn)
        transaction = Transaction(Xid(3), LSN(8), 0, changes, 100)
        found: set[object] = {*concerns.find([transaction], _START, Cursor(LSN(8), END_ORDINAL))}
        for member, (before, own) in list(members.items()):
            after = _listed(world, rule, member.request, rows, now)
            principal = member.request.principal
            is_other = own is not None and world.own_row(principal) != own
            if isinstance(principal, AuthRecord) and is_other:
                del members[member]  # another caller, as whom it is bound again
                continue
            counts["asked"] += 1
            counts["moved"] += before != after
            counts["concerned"] += member in found
            if before != after and member not in found:
                return f"{member.request}\n{changes}\n{before} -> {after}"
            members[member] = after, own
    return ""


def test_a_row_that_a_list_rule_reads_concerns_who_filters_by_another(database_url: str) -> None:
    """The filter names u1, and what its list rule asks of the project is true by u2's row."""
    world = World(database_url, Random(1))
    list_rules = {"projects": "members_via_project.role ?= 'admin'"}
    collections = Collections(
        tuple(
            replace(one, list_rule=list_rules.get(one.name, one.list_rule))
            for one in world.collections.values()
        )
    )
    world.collections = collections
    request = RuleRequest(
        principal=world.principal(), query={"filter": "project.members_via_project.user ?= 'u1'"}
    )
    members = TableName("public", "members")
    rows, now = [{**world.post(), "project": "p0"}], datetime.now(UTC)
    bound = RuleCompiler(collections).bind_caller(collections["posts"], "", request)
    assert not isinstance(bound, DenyAll)
    member = CallerMember(request, bound.specialization, bound.values)
    concerns = Concerns(collections)
    concerns.add(member)  # type: ignore[arg-type]  # has what it reads of a group
    old: Row = {"id": "b", "project": "p0", "user": "u2", "role": "admin", "score": None}
    deleted = Transaction(Xid(3), LSN(8), 0, (Delete(members, WholeRow(old)),), 100)
    with world.connection as connection:
        connection.execute("DELETE FROM public.members")
        connection.execute(
            "INSERT INTO public.members"
            " VALUES ('a', 'p0', 'u1', 'editor'), ('b', 'p0', 'u2', 'admin')"
        )
        before = asked(world, "", request, rows, now)
        connection.execute("DELETE FROM public.members WHERE id = 'b'")
        after = asked(world, "", request, rows, now)

    assert (before, after) == ({0}, set())
    assert concerns.find([deleted], _START, Cursor(LSN(8), END_ORDINAL))


def _degraded(chance: Random, change: Change) -> Change:
    """Return the change, sometimes with the key alone of the old row."""
    if chance.random() < 0.8:
        return change
    match change:
        case Update(table, new, old):
            return Update(table, new, Key({"id": old.row["id"]} if "id" in old.row else old.row))
        case Delete(table, old):
            return Delete(table, Key({"id": old.row["id"]} if "id" in old.row else old.row))
        case _:
            return change
