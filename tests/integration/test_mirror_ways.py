"""Each way on which a related row may move a verdict on a row that nobody writes.

A table or column that ``ways`` forgets is a row that stays on a screen for ever, and random rules
seldom meet it: so each kind of operand and of path has a change here that moves the one row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import psycopg

from pgrealtime.auth.principal import GUEST, AuthRecord
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Change, Delete, Insert, Row, TableName, Transaction, Update, WholeRow
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.model import CollectionConfig, FieldsConfig, RelationConfig
from pgrealtime.hub.evaluation.concerns import Concerns
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import reference_query
from tests.columns_of_ways import columns_without_way
from tests.engine_driving import CallerMember

SCHEMA = """
CREATE TABLE teams (id text PRIMARY KEY, open boolean);
CREATE TABLE users (id text PRIMARY KEY, team text, email text, "emailVisibility" boolean);
CREATE TABLE projects (
  id text PRIMARY KEY, lead text, status text, doc jsonb, place point, due timestamptz,
  tags text[], secret text
);
CREATE TABLE members (id text PRIMARY KEY, project text, usr text, role text);
CREATE TABLE labels (id text PRIMARY KEY, name text);
CREATE TABLE task_labels (task text, label text, PRIMARY KEY (task, label));
CREATE TABLE boards (id text PRIMARY KEY, tasks text[], open boolean);
CREATE TABLE tasks (
  id text PRIMARY KEY, project text REFERENCES projects ON DELETE CASCADE, owner text,
  watchers text[]
);
INSERT INTO teams VALUES ('t', true), ('u', false);
INSERT INTO users VALUES ('ann', 't', 'ann@a', true), ('bob', 'u', 'bob@a', true);
INSERT INTO projects VALUES
  ('p', 'ann', 'pub', '{"a": {"b": "x"}}', '(1,2)', '2024-02-03', '{a,b}', 's'),
  ('q', 'bob', '', NULL, NULL, NULL, NULL, NULL);
INSERT INTO members VALUES ('m', 'p', 'ann', 'boss'), ('n', 'q', 'bob', '');
INSERT INTO labels VALUES ('hot', 'Hot'), ('cold', 'Cold');
INSERT INTO boards VALUES ('b', '{one}', true);
INSERT INTO tasks VALUES ('one', 'p', 'gus', '{ann,gus}'), ('two', 'q', 'bob', '{}');
INSERT INTO task_labels VALUES ('one', 'hot');
"""
ONE: Row = {"id": "one", "project": "p", "owner": "gus", "watchers": "{ann,gus}"}
"""The row that nothing writes; ``gus`` is in no table."""
_START, _END = Cursor(LSN(0), 0), Cursor(LSN(8), END_ORDINAL)


def configuration() -> dict[str, CollectionConfig]:
    def to(name: str) -> RelationConfig:
        return RelationConfig(collection=name)

    def table(name: str, **relations: RelationConfig) -> CollectionConfig:
        return CollectionConfig(table=f"public.{name}", list_rule="", relations=relations)

    labels = RelationConfig(
        collection="labels", through="public.task_labels", source="task", target="label"
    )
    users = CollectionConfig(
        table="public.users", type="auth", list_rule="", relations={"team": to("teams")}
    )
    projects = CollectionConfig(
        table="public.projects",
        list_rule="",
        relations={"lead": to("users")},
        fields=FieldsConfig(hide=("secret",)),
    )
    return {
        "teams": table("teams"),
        "users": users,
        "projects": projects,
        "members": table("members", project=to("projects"), usr=to("users")),
        "labels": table("labels"),
        "boards": table("boards", tasks=to("tasks")),
        "tasks": table(
            "tasks",
            project=to("projects"),
            owner=to("users"),
            watchers=to("users"),
            labels=labels,
        ),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a rule or filter reads, and changes that each, from the start, move the row."""

    changes: tuple[str, ...]
    rule: str = ""
    filter: str = ""
    list_rules: tuple[tuple[str, str], ...] = ()
    is_strict: bool = False
    is_caller_row_known: bool = True


MEMBER = "project.members_via_project.usr ?= @request.auth.id"
NEW_MEMBER = "INSERT INTO members VALUES ('x', 'p', 'bob', '')"
MEMBER_GOES = (
    "DELETE FROM members WHERE id = 'm'",
    "UPDATE members SET usr = 'bob' WHERE id = 'm'",
    "UPDATE members SET project = 'q' WHERE id = 'm'",
)
TEAM_CLOSES = "UPDATE teams SET open = false WHERE id = 't'"
UNLABELLED = "DELETE FROM task_labels"
NO_TAGS = "UPDATE projects SET tags = '{}' WHERE id = 'p'"

CASES: dict[str, Case] = {
    "column": Case(rule="project.status = 'pub'", changes=("UPDATE projects SET status = ''",)),
    "lower": Case(
        rule="project.status:lower = 'pub'", changes=("UPDATE projects SET status = ''",)
    ),
    "length": Case(rule="project.tags:length > 1", changes=(NO_TAGS,)),
    "each": Case(rule="project.tags:each ?= 'a'", changes=(NO_TAGS,)),
    "array": Case(rule="project.tags ?~ 'a'", changes=(NO_TAGS,)),
    "json": Case(rule="project.doc.a.b = 'x'", changes=("UPDATE projects SET doc = '{}'",)),
    "point": Case(rule="project.place.lon = 1", changes=("UPDATE projects SET place = '(3,2)'",)),
    "distance": Case(
        rule="geoDistance(project.place.lon, project.place.lat, 1, 2) < 5",
        changes=("UPDATE projects SET place = '(3,2)'",),
    ),
    "distance to the right": Case(
        rule="5 > geoDistance(1, 2, project.place.lon, project.place.lat)",
        changes=("UPDATE projects SET place = '(1,3)'",),
    ),
    "time": Case(
        rule="strftime('%Y', project.due) = '2024'",
        changes=("UPDATE projects SET due = '2025-01-01'",),
    ),
    "hidden": Case(rule="project.secret = 's'", changes=("UPDATE projects SET secret = ''",)),
    "of the body": Case(
        rule="@request.body.owner:isset = false && @request.body.owner:changed = false"
        " && project.status = 'pub'",
        changes=("UPDATE projects SET status = ''",),
    ),
    "query": Case(
        rule="@request.query.q:isset = true && project.status = 'pub'",
        changes=("UPDATE projects SET status = ''",),
    ),
    "chain": Case(
        rule="project.lead.team.open = true",
        changes=(
            TEAM_CLOSES,
            "DELETE FROM teams WHERE id = 't'",
            "UPDATE users SET team = 'u' WHERE id = 'ann'",
            "UPDATE projects SET lead = 'bob' WHERE id = 'p'",
            "DELETE FROM users WHERE id = 'ann'",
        ),
    ),
    "no foreign key": Case(
        rule="owner.team.open = true", changes=("INSERT INTO users VALUES ('gus', 't')",)
    ),
    "key": Case(rule="owner.team = 'u'", changes=("UPDATE users SET id = 'gus' WHERE id = 'bob'",)),
    "back": Case(rule=MEMBER, changes=MEMBER_GOES),
    "back, turned round": Case(
        rule="@request.auth.id ?= project.members_via_project.usr", changes=MEMBER_GOES
    ),
    "back, all": Case(
        rule="project.members_via_project.usr = @request.auth.id",
        changes=(*MEMBER_GOES, NEW_MEMBER),
    ),
    "back, none": Case(
        rule="project.members_via_project.usr != 'bob'", changes=(NEW_MEMBER, *MEMBER_GOES[1:2])
    ),
    "back, some other": Case(
        rule="project.members_via_project.usr ?!= @request.auth.id", changes=(NEW_MEMBER,)
    ),
    "back, empty": Case(
        rule="project.members_via_project.usr ?= @request.query.none",
        changes=(MEMBER_GOES[0], MEMBER_GOES[2], "UPDATE members SET usr = NULL WHERE id = 'm'"),
    ),
    "back, two columns": Case(
        rule=f"{MEMBER} && project.members_via_project.role ?= 'boss'",
        changes=(*MEMBER_GOES, "UPDATE members SET role = '' WHERE id = 'm'"),
    ),
    "back, all of one": Case(
        rule=f"{MEMBER} && project.members_via_project.role = 'boss'", changes=(NEW_MEMBER,)
    ),
    "back, or": Case(
        rule=f"({MEMBER} && owner = 'gus') || project.status = 'x'", changes=MEMBER_GOES
    ),
    "back, by an array": Case(
        rule="boards_via_tasks.open ?= true",
        changes=("UPDATE boards SET tasks = '{two}'", "UPDATE boards SET open = false"),
    ),
    "back, by a junction": Case(
        rule="labels.tasks_via_labels.owner ?= 'bob'",
        changes=(
            "INSERT INTO task_labels VALUES ('two', 'hot')",
            # Of a row that is an event itself.
            "INSERT INTO task_labels VALUES ('two', 'hot'); UPDATE tasks SET watchers = NULL",
        ),
    ),
    "back, to the own table": Case(
        rule="project.tasks_via_project.owner ?= 'bob'",
        changes=(
            "UPDATE tasks SET project = 'p' WHERE id = 'two'",
            "INSERT INTO tasks VALUES ('three', 'p', 'bob', '{}')",
        ),
    ),
    "array of ids": Case(
        rule="watchers.team.open ?= true",
        changes=(TEAM_CLOSES, "UPDATE users SET team = 'u' WHERE id = 'ann'"),
    ),
    "array of ids, existence": Case(
        rule="watchers.id ?= 'gus'", changes=("INSERT INTO users VALUES ('gus')",)
    ),
    "junction": Case(
        rule="labels.name ?= 'Hot'",
        changes=(
            UNLABELLED,
            "UPDATE labels SET name = ''",
            "UPDATE task_labels SET label = 'cold'",
            "DELETE FROM labels WHERE id = 'hot'",
        ),
    ),
    "junction, length": Case(
        rule="labels:length > 1", changes=("INSERT INTO task_labels VALUES ('one', 'cold')",)
    ),
    "junction, each": Case(rule="labels:each ?= 'hot'", changes=(UNLABELLED,)),
    "junction of another row": Case(
        rule="boards_via_tasks.tasks.labels.name ?= 'Hot'", changes=(UNLABELLED,)
    ),
    "collection": Case(
        rule="@collection.members.role ?= 'x'", changes=("UPDATE members SET role = 'x'",)
    ),
    "collection, by the row": Case(
        rule="@collection.members.usr ?= @request.auth.id"
        " && @collection.members.project ?= project",
        changes=MEMBER_GOES,
    ),
    "collection, two names": Case(
        rule="@collection.members:a.usr ?= @request.auth.id && @collection.members:b.usr ?= 'x'",
        changes=("INSERT INTO members VALUES ('x', 'q', 'x', '')",),
    ),
    "collection, each": Case(
        rule="@collection.boards.tasks:each ?= id", changes=("UPDATE boards SET tasks = '{two}'",)
    ),
    "caller's relation": Case(rule="@request.auth.team.open = true", changes=(TEAM_CLOSES,)),
    "caller's row": Case(
        rule="@request.auth.team = 't'",
        changes=("UPDATE users SET team = 'u' WHERE id = 'ann'",),
        is_caller_row_known=False,
    ),
    "caller's row and relation": Case(
        rule="@request.auth.team.open = true",
        changes=(TEAM_CLOSES, "UPDATE users SET team = 'u' WHERE id = 'ann'"),
        is_caller_row_known=False,
    ),
    "back from the caller": Case(
        rule="@request.auth.members_via_usr.role ?= 'boss'", changes=MEMBER_GOES[:2]
    ),
    "back from the caller, on to the row": Case(
        rule="@request.auth.members_via_usr.project ?= project", changes=MEMBER_GOES
    ),
    "filter": Case(filter="project.members_via_project.usr ?= 'ann'", changes=MEMBER_GOES),
    "address": Case(
        filter="project.lead.email ~ 'ann'",
        changes=("""UPDATE users SET "emailVisibility" = false""",),
        is_strict=True,
    ),
    "list rule of what a filter reads": Case(
        filter="project.lead.team != ''",
        list_rules=(("users", "team.open = true"),),
        changes=(TEAM_CLOSES, "UPDATE users SET team = 'u' WHERE id = 'ann'"),
        is_strict=True,
    ),
    "list rule of one of many": Case(
        filter="project.members_via_project.role ?= 'boss'",
        list_rules=(("members", "usr.team.open = true"),),
        changes=(TEAM_CLOSES,),
    ),
    "list rule of all of many": Case(
        filter="project.members_via_project.role = 'boss'",
        list_rules=(("members", "usr.team.open = true"),),
        changes=(TEAM_CLOSES,),
        is_strict=True,
    ),
    "list rule that is true by another row": Case(
        filter="project.members_via_project.usr ?= 'ann'",
        list_rules=(("projects", "members_via_project.role ?= 'x'"),),
        changes=("INSERT INTO members VALUES ('x', 'p', 'bob', 'x')",),
    ),
}


class Scene:
    """The database and its collections."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(
            url, options="-c DateStyle=ISO -c TimeZone=UTC -c search_path=public"
        )
        self.connection.execute(SCHEMA.encode())
        self.connection.commit()
        self.collections = asyncio.run(_collections(url))

    def rows(self) -> dict[tuple[TableName, str], Row]:
        """Return every row by table and key, in the text forms of the stream."""
        found: dict[tuple[TableName, str], Row] = {}
        for name, table in reachable_tables(self.collections).items():
            result = self.connection.execute(f"SELECT * FROM {name.name}".encode()).pgresult
            assert result is not None
            for place in range(result.ntuples):
                texts = [result.get_value(place, n) for n in range(result.nfields)]
                row = {
                    column.name: None if text is None else text.decode()
                    for column, text in zip(table.columns, texts, strict=True)
                }
                found[name, " ".join(str(row[key]) for key in table.primary_key)] = row
        return found

    def sees(self, collections: Collections, case: Case, request: RuleRequest) -> bool:
        """Whether the reference query admits the row."""
        made = reference_query(collections, collections["tasks"], case.rule, request)
        if isinstance(made, AdmitAll | DenyAll):
            return isinstance(made, AdmitAll)
        question = made.sql_query([ONE], datetime.now(UTC))
        return bool(self.connection.execute(question.sql.encode(), question.params).fetchall())


async def _collections(url: str) -> Collections:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        return build_collections(
            configuration(), await read_catalog(connection, schemas=["public"])
        )


def changes_between(
    before: dict[tuple[TableName, str], Row], after: dict[tuple[TableName, str], Row]
) -> Iterator[Change]:
    """Yield what the stream would bring, old rows whole."""
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if old is None and new is not None:
            yield Insert(key[0], new)
        elif new is None and old is not None:
            yield Delete(key[0], WholeRow(old))
        elif old != new and old is not None and new is not None:
            yield Update(key[0], new, WholeRow(old))


def test_whoever_a_change_of_a_related_row_moves_is_concerned(database_url: str) -> None:
    scene = Scene(database_url)
    with scene.connection:
        faults = {name: found for name, case in CASES.items() if (found := _faults(scene, case))}

    assert not faults


def test_pairs_of_a_junction_concern_whoever_sees_the_ids(database_url: str) -> None:
    """Also by a rule that reads none of them; unless the row itself was written and is an event."""
    scene = Scene(database_url)
    collections = scene.collections
    bound = RuleCompiler(collections).bind_caller(
        collections["tasks"], "owner = 'gus'", RuleRequest(principal=GUEST)
    )
    assert isinstance(bound, BoundPredicate)
    concerns = Concerns(collections)
    member = CallerMember(RuleRequest(principal=GUEST), bound.specialization, bound.values)
    concerns.add(member)  # type: ignore[arg-type]  # has what it reads of a group
    pair = Delete(TableName("public", "task_labels"), WholeRow({"task": "one", "label": "hot"}))
    written = Update(TableName("public", "tasks"), ONE, WholeRow(ONE))
    alone = Transaction(Xid(3), LSN(8), 0, (pair,), 100)
    beside = Transaction(Xid(3), LSN(8), 0, (pair, written), 100)
    scene.connection.close()

    assert concerns.find([alone], _START, _END)
    assert not concerns.find([beside], _START, _END)


def _faults(scene: Scene, case: Case) -> list[str]:
    """Return what the ways to a case's rule lack, and changes that don't move the row."""
    list_rules = dict(case.list_rules)
    collections = Collections(
        tuple(
            replace(one, list_rule=list_rules.get(one.name, one.list_rule))
            for one in scene.collections.values()
        ),
        is_strict=case.is_strict,
    )
    users = collections["users"]
    ann = AuthRecord(collection_id=users.id, collection_name="users", id="ann", email="ann@a")
    request = RuleRequest(principal=ann, query={"q": "x", "filter": case.filter})
    before = scene.rows()
    own = before[users.table.name, "ann"] if case.is_caller_row_known else None
    bound = RuleCompiler(collections).bind_caller(collections["tasks"], case.rule, request, own)
    if isinstance(bound, DenyAll):
        return [bound.reason]
    concerns = Concerns(collections)
    member = CallerMember(request, bound.specialization, bound.values)
    concerns.add(member)  # type: ignore[arg-type]  # has what it reads of a group
    faults = [f"no way: {one}" for one in columns_without_way(bound.specialization, collections)]
    saw = scene.sees(collections, case, request)
    for change in case.changes:
        scene.connection.execute(change.encode())
        if scene.sees(collections, case, request) == saw:
            faults.append(f"doesn't move the row: {change}")
        changes = tuple(changes_between(before, scene.rows()))
        scene.connection.rollback()
        transaction = Transaction(Xid(3), LSN(8), 0, changes, 100)
        if not concerns.find([transaction], _START, _END):
            faults.append(f"concerns nobody: {change}")
    return faults
