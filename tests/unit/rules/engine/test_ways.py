"""The ways from related rows to a rule: a column forgotten here is a row that stays for ever."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.model import ForeignKey, Table
from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Key,
    Row,
    TableName,
    Truncate,
    Update,
    WholeRow,
)
from pgrealtime.collections.model import Collections, FieldKind
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.plan import BoundPredicate, Specialization
from pgrealtime.rules.engine.ways import Way, ways_to
from pgrealtime.rules.language.request import RuleRequest
from tests.unit.rules.schema import collection, field, many, one

_Expected: TypeAlias = dict[str, tuple[str, str]]
"""By table: the columns that are read there, and the column that names the callers concerned."""


def schema(*, is_validated: bool = True, pointed_at: str = "projects") -> Collections:
    tasks = collection(
        "tasks",
        one("project", "projects"),
        one("owner", "users"),
        field("state"),
        many("likes", "users"),
    )
    key = ForeignKey(
        name="fk",
        column_names=("project",),
        target=TableName("public", pointed_at),
        target_column_names=("id",),
        is_validated=is_validated,
    )
    table: Table = replace(tasks.table, foreign_keys=(key,))
    return Collections(
        (
            replace(tasks, table=table),
            collection(
                "projects", field("status"), one("lead", "users"), field("extra", FieldKind.JSON)
            ),
            collection("members", one("project", "projects"), one("user", "users"), field("role")),
            collection("users", field("role"), one("team", "teams"), kind="auth"),
            collection("teams", field("name")),
        )
    )


def specialization(
    rule: str, collections: Collections, own_row: Row | None = None, *, filter_text: str = ""
) -> Specialization:
    ann = AuthRecord(collection_id="pbc_users", collection_name="users", id="ann")
    request = RuleRequest(principal=ann, query={"q": "x", "filter": filter_text})
    bound = RuleCompiler(collections).bind_caller(collections["tasks"], rule, request, own_row)
    assert isinstance(bound, BoundPredicate)
    return bound.specialization


def ways_of(rule: str, own_row: Row | None = None) -> tuple[Way, ...]:
    collections = schema()
    return ways_to(specialization(rule, collections, own_row), collections)


MEMBER = "project.members_via_project.user ?= @request.auth.id"

RULES: dict[str, _Expected] = {
    "state = 'a'": {},
    "project.status = 'a'": {"projects": ("id status", "")},
    "project.lead = @request.auth.id": {"projects": ("id lead", "lead")},
    "project.lead.role = 'a'": {"projects": ("id lead", ""), "users": ("id role", "")},
    "project.lead.team.name = 'a'": {
        "projects": ("id lead", ""),
        "users": ("id team", ""),
        "teams": ("id name", ""),
    },
    MEMBER: {"projects": ("id", ""), "members": ("id project user", "user")},
    # All else that reads the row is in conjunction with the caller's.
    f"{MEMBER} && project.members_via_project.role ?= 'a'": {
        "projects": ("id", ""),
        "members": ("id project role user", "user"),
    },
    # Every member must have the role: also of others.
    f"{MEMBER} && project.members_via_project.role = 'a'": {
        "projects": ("id", ""),
        "members": ("id project role user", ""),
    },
    # Every member must be the caller.
    "project.members_via_project.user = @request.auth.id": {
        "projects": ("id", ""),
        "members": ("id project user", ""),
    },
    "project.members_via_project.user ?!= @request.auth.id": {
        "projects": ("id", ""),
        "members": ("id project user", ""),
    },
    # The key is one place further.
    "project.members_via_project.user.team ?= @request.query.q": {
        "projects": ("id", ""),
        "members": ("id project user", ""),
        "users": ("id team", "team"),
    },
    f"owner = @request.auth.id || {MEMBER}": {
        "projects": ("id", ""),
        "members": ("id project user", "user"),
    },
    "likes.role ?= 'a'": {"users": ("id role", "")},
    "project.extra.a.b = 'x'": {"projects": ("extra id", "")},
    "@collection.members.user ?= @request.auth.id && @collection.members.project ?= project": {
        "members": ("id project user", "user")
    },
    "@collection.members.role ?= 'a'": {"members": ("id role", "")},
    "@request.auth.team.name = 'a'": {"teams": ("id name", ""), "users": ("id team", "")},
}


@pytest.mark.parametrize("rule", RULES)
def test_each_place_says_what_is_read_there_and_whom_it_concerns(rule: str) -> None:
    found = {
        way.table.name: (" ".join(sorted(way.column_names)), way.key.column_name if way.key else "")
        for way in ways_of(rule)
    }

    assert found == RULES[rule]


def test_the_caller_s_own_row_is_no_way_if_its_columns_are_values() -> None:
    """A change of it makes another caller."""
    assert ways_of("@request.auth.role = 'a' || state = 'b'", {"id": "ann", "role": "x"}) == ()
    (team,) = ways_of("@request.auth.team.name = 'a'", {"id": "ann", "team": "t"})
    assert team.table.name == "teams"


def ways_of_filter(
    filter_text: str, list_rules: dict[str, str], *, is_strict: bool = False
) -> tuple[Way, ...]:
    """Return the ways to a filter on tasks, whose related rows have these list rules."""
    ruled = (replace(one, list_rule=list_rules.get(one.name, "")) for one in schema().values())
    collections = Collections(tuple(ruled), is_strict=is_strict)
    return ways_to(specialization("", collections, filter_text=filter_text), collections)


@pytest.mark.parametrize(
    ("list_rule", "key"),
    [
        ("status = 'a'", "user"),
        # Another member than the one that the filter names makes it true.
        ("members_via_project.role ?= 'a'", ""),
        ("lead = @request.auth.id || members_via_project.role ?= 'a'", ""),
    ],
)
def test_a_member_that_a_list_rule_of_a_filter_reads_may_concern_everybody(
    list_rule: str, key: str
) -> None:
    ways = ways_of_filter("project.members_via_project.user ?= 'ann'", {"projects": list_rule})
    (members,) = (way for way in ways if way.table == MEMBERS)
    assert (members.key.column_name if members.key else "") == key


def test_list_rules_of_rows_that_must_all_agree_read_what_the_others_read() -> None:
    """They stand at the comparison and beside it."""
    filter_text = "project.members_via_project.role = 'a'"
    rules = {"members": "project.status = 'a' || user.team.name = 'b'"}
    strict = ways_of_filter(filter_text, rules, is_strict=True)
    assert set(strict) == set(ways_of_filter(filter_text, rules))


def only(rule: str, table: str, *, is_validated: bool = True, pointed_at: str = "projects") -> Way:
    collections = schema(is_validated=is_validated, pointed_at=pointed_at)
    (way,) = (
        way
        for way in ways_to(specialization(rule, collections), collections)
        if way.table.name == table
    )
    return way


def keys(way: Way, change: Change) -> object:
    """Return the callers concerned: their keys, or everybody."""
    found = way.keys_concerned(change, is_event=way.is_referenced)
    return "everybody" if found is None else sorted(map(str, found))


MEMBERS, PROJECTS = TableName("public", "members"), TableName("public", "projects")
OLD: Row = {"id": "m", "project": "p", "user": "ann", "role": "a"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Insert(MEMBERS, OLD), ["ann"]),
        (Delete(MEMBERS, WholeRow(OLD)), ["ann"]),
        (Update(MEMBERS, {**OLD, "user": "bob"}, WholeRow(OLD)), ["ann", "bob"]),
        # Moved to another project: whose tasks are others.
        (Update(MEMBERS, {**OLD, "project": "q"}, WholeRow(OLD)), ["ann"]),
        # No column of the way.
        (Update(MEMBERS, {**OLD, "role": "b"}, WholeRow(OLD)), []),
        # What the old row doesn't say is unknown.
        (Delete(MEMBERS, Key({"id": "m"})), "everybody"),
        (Update(MEMBERS, OLD, Key({"id": "m"})), "everybody"),
        (Truncate(MEMBERS), "everybody"),
        # A long value that was left alone.
        (Update(MEMBERS, {"id": "m", "project": "p"}, WholeRow(OLD)), []),
    ],
)
def test_a_member_concerns_whom_it_names_and_named(change: Change, expected: object) -> None:
    assert keys(only(MEMBER, "members"), change) == expected


def test_rows_behind_a_foreign_key_come_and_go_with_those_that_point_to_them() -> None:
    """Which the same transaction writes; unless some are older than the foreign key."""
    row: Row = {"id": "p", "status": "a", "lead": "ann"}
    rule = "project.status = 'a'"
    came, went = Insert(PROJECTS, row), Delete(PROJECTS, WholeRow(row))
    changed = Update(PROJECTS, {**row, "status": "b"}, WholeRow(row))

    way = only(rule, "projects")
    assert [keys(way, one) for one in (came, went, changed)] == [[], [], "everybody"]
    for other in (
        only(rule, "projects", is_validated=False),
        only(rule, "projects", pointed_at="archive"),
    ):
        assert [keys(other, one) for one in (came, went, changed)] == ["everybody"] * 3


@pytest.mark.parametrize("is_generated", [False, True])
def test_a_generated_column_that_is_left_out_may_have_changed(*, is_generated: bool) -> None:
    """Of another column that an update leaves out it says that the value is the old one."""
    collections = schema()
    projects = collections["projects"]
    columns = tuple(
        replace(column, is_generated=is_generated and column.name == "status")
        for column in projects.table.columns
    )
    changed = replace(projects, table=replace(projects.table, columns=columns))
    collections = Collections(
        tuple(changed if one.name == "projects" else one for one in collections.values())
    )
    (way,) = ways_to(specialization("project.status = 'a'", collections), collections)
    row: Row = {"id": "p", "lead": "ann"}
    update = Update(way.table, row, WholeRow(row))
    assert way.keys_concerned(update) == (None if is_generated else frozenset())
