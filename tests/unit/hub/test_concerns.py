"""Which mirrors a change of related rows concerns, found without a statement."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.changes import Change, Insert, Row, TableName, Transaction, Update, WholeRow
from pgrealtime.hub.evaluation import concerns as concerns_module
from pgrealtime.hub.evaluation.concerns import Concerns
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.engine.ways import ways_to
from pgrealtime.rules.language.request import RuleRequest
from tests.engine_driving import CallerMember
from tests.unit.hub.harness import NOTES, insert
from tests.unit.hub.test_mirrors import MIRROR, listen, mirrors, settle, told
from tests.unit.rules.engine.test_ways import MEMBER, schema

MEMBERS = TableName("public", "members")
COLLECTIONS = schema()


def member(user: str, rule: str = MEMBER) -> CallerMember:
    principal = AuthRecord(collection_id="pbc_users", collection_name="users", id=user)
    request = RuleRequest(principal=principal)
    bound = RuleCompiler(COLLECTIONS).bind_caller(COLLECTIONS["tasks"], rule, request)
    assert isinstance(bound, BoundPredicate)
    return CallerMember(request, bound.specialization, bound.values)


def concerns_of(*members: CallerMember) -> Concerns:
    concerns = Concerns(COLLECTIONS)
    for one in members:
        concerns.add(one)  # type: ignore[arg-type]  # has what it reads of a group
    return concerns


def came(user: str) -> Change:
    return Insert(MEMBERS, {"id": "m", "project": "p", "user": user, "role": ""})


def test_each_change_concerns_in_the_slice_that_ends_with_it_and_in_no_other() -> None:
    """A slice may end within a transaction."""
    users = ("ann", "bob", "cid")
    concerns = concerns_of(*map(member, users))
    one = Transaction(Xid(3), LSN(8), 0, tuple(map(came, users)), 100)
    cursors = [Cursor(LSN(8), 0), Cursor(LSN(8), 1), Cursor(LSN(8), 2), Cursor(LSN(8), END_ORDINAL)]

    found = [
        [group.values for group in concerns.find([one], after, upto)]
        for after, upto in pairwise(cursors)
    ]
    assert found == [[("ann",)], [("bob",)], [("cid",)]]


def test_a_value_that_makes_no_key_concerns_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*arguments: object) -> object:
        return tuple(
            way if way.key is None else replace(way, key=replace(way.key, parse_key=int))
            for way in ways_to(*arguments)  # type: ignore[arg-type]
        )

    monkeypatch.setattr(concerns_module, "ways_to", unreadable)
    concerns = concerns_of(member("ann"), member("bob"))
    one = Transaction(Xid(3), LSN(8), 0, (came("cid"),), 100)

    assert len(concerns.find([one], Cursor(LSN(0), 0), Cursor(LSN(8), END_ORDINAL))) == 2


async def test_a_related_change_that_concerns_nobody_runs_no_statement() -> None:
    """One that concerns somebody asks no rule either."""
    async with mirrors("@collection.notes.title ?= @request.auth.id") as harness:
        sink = await listen(harness, MIRROR)
        await settle(harness)
        harness.database.is_unreachable = True  # every statement would fail
        harness.commit(insert("n", "bob", table=NOTES))
        await settle(harness)
        before = told(sink)
        harness.database.is_unreachable = False
        harness.commit(insert("m", "ann", table=NOTES))
        await settle(harness)

    assert before == ["resync start"]
    assert told(sink) == ["resync start", "resync related"]


async def test_a_resync_is_told_once_the_change_is_visible() -> None:
    """A list that is loaded before would lack it."""
    async with mirrors("@collection.notes.title ?= @request.auth.id") as harness:
        sink = await listen(harness, MIRROR)
        await settle(harness)
        unseen = harness.commit(insert("m", "ann", table=NOTES))
        harness.database.snapshot_text = f"{unseen.xid}:1000000:{unseen.xid}"
        await harness.until_delivered()
        await harness.database.wait_for_snapshot_queries(2)
        before = told(sink)
        harness.database.snapshot_text = "1000000:1000000:"
        await settle(harness)

    assert before == ["resync start"]
    assert told(sink) == ["resync start", "resync related"]


@pytest.mark.parametrize(("times", "is_told"), [(1, False), (2, True)])
def test_a_new_row_concerns_whoever_points_to_it_only_if_that_is_written_twice(
    times: int,
    is_told: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    """It is an event; but of two events neither may tell that it was hidden again."""
    concerns = concerns_of(member("ann", "project.status = 'a'"))
    project = Insert(TableName("public", "projects"), {"id": "p", "status": "a", "lead": None})
    old: Row = {"id": "t", "project": None}
    task = Update(TableName("public", "tasks"), {**old, "project": "p"}, WholeRow(old))
    one = Transaction(Xid(3), LSN(8), 0, (project, *[task] * times), 100)

    assert bool(concerns.find([one], Cursor(LSN(0), 0), Cursor(LSN(8), END_ORDINAL))) == is_told
