"""Every mirror equals PocketBase's own list, after every write, for every person and filter.

The real PocketBase and PostgreSQL get the same writes. A client loads from the one or the other
when it is told to, and keeps its list by frames of this program alone; what it ought to be the list
route of PocketBase says, asked with the person's token and filter. The seed is fresh in every run,
``PGREALTIME_SEED`` repeats one; ``PGREALTIME_SLOW=1`` lives ``PGREALTIME_TEST_MIRRORS`` histories.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal
from urllib.parse import urlencode

import psycopg
import pytest

from tests.attacks.reading import SECRET
from tests.conformance.fixtures import (
    FixtureCollection,
    FixtureField,
    FixtureRow,
    Fixtures,
    SuperuserAccount,
)
from tests.conformance.http_client import Request, send
from tests.conformance.natural_schema import NaturalSchema, Style
from tests.conformance.pocketbase_server import PocketBaseServer, PocketBaseTemplate
from tests.conformance.transcript import Write
from tests.mirrors.client import MirrorClient, Record
from tests.mirrors.scene import Scene, scene

_IS_LONG = os.environ.get("PGREALTIME_SLOW") == "1"
HISTORIES = int(os.environ.get("PGREALTIME_TEST_MIRRORS", "40")) if _IS_LONG else 2
_STEPS = 12 if _IS_LONG else 4
_CLIENTS = 8
_PASSWORD = "1234567890"
_GUEST = ""


def _id(name: str) -> str:
    """Return an id as PocketBase makes them: of fifteen characters."""
    return name.ljust(15, "0")


def _relation(name: str, to: str, *, is_cascade: bool = False, count: int = 1) -> FixtureField:
    return FixtureField(
        name=name,
        type="relation",
        collection_id=_id(f"pbc{to}"),
        cascade_delete=is_cascade,
        max_select=count,
    )


def _collection(name: str, *fields: FixtureField) -> FixtureCollection:
    return FixtureCollection(
        id=_id(f"pbc{name}"),
        name=name,
        type="auth" if name == "people" else "base",
        list_rule="",
        view_rule="",
        fields=fields,
    )


_COLLECTIONS = (
    _collection(
        "projects",
        FixtureField(name="public", type="bool"),
        FixtureField(name="status", type="text"),
    ),
    _collection("tags", FixtureField(name="name", type="text")),
    _collection(
        "people",
        FixtureField(name="team", type="text"),
        FixtureField(name="role", type="text"),
        _relation("home", "projects"),
    ),
    _collection(
        "members",
        _relation("project", "projects", is_cascade=True),
        _relation("person", "people"),
        FixtureField(name="rank", type="number"),
    ),
    _collection(
        "tasks",
        _relation("owner", "people"),
        FixtureField(name="team", type="text"),
        FixtureField(name="done", type="bool"),
        FixtureField(name="level", type="number"),
        FixtureField(name="note", type="text"),
        _relation("project", "projects"),
        _relation("tags", "tags", count=9),
    ),
)
PEOPLE = tuple(map(_id, ("ann", "bob", "cid")))
PROJECTS = tuple(map(_id, ("p0", "p1", "p2")))
TAGS = tuple(map(_id, ("hot", "cold")))
MEMBERS = tuple(_id(f"m{number}") for number in range(4))
TASKS = tuple(_id(f"t{number}") for number in range(6))
TEAMS = ("red", "blue", "")


def _rows() -> Iterator[FixtureRow]:
    for number, name in enumerate(PROJECTS):
        row = {"id": name, "public": number == 0, "status": "pub"}
        yield FixtureRow(collection="projects", data=row)
    for name in TAGS:
        yield FixtureRow(collection="tags", data={"id": name, "name": name[:3]})
    for name, team in zip(PEOPLE, TEAMS, strict=True):
        row = {"id": name, "email": f"{name[:3]}@example.com", "password": _PASSWORD, "team": team}
        yield FixtureRow(collection="people", data=row)


FIXTURES = Fixtures(
    superuser=SuperuserAccount(email="root@example.com", password=_PASSWORD),
    accounts={},
    collections=_COLLECTIONS,
    rows=tuple(_rows()),
)

MEMBER = "project.members_via_project.person ?= @request.auth.id"
OWN_RULES = (
    "",
    "owner = @request.auth.id",
    "owner != @request.auth.id",
    "team = @request.auth.team",
    "done = false",
    "level > 2 || owner = @request.auth.id",
    "@request.auth.id != '' && note ~ 'a'",
    "@request.auth.role = 'admin' || team = @request.auth.team",
    "tags:length > 0",
    "tags:each ?= 'hot000000000000'",
)
RELATED_RULES = (
    "project.public = true",
    MEMBER,
    f"done = false && {MEMBER}",
    f"owner = @request.auth.id || {MEMBER}",
    f"{MEMBER} && project.members_via_project.rank ?> 2",
    f"{MEMBER} && project.members_via_project.rank > 1",
    "@request.auth.id != '' && project.members_via_project.person != @request.auth.id",
    "project.members_via_project.person.team ?= @request.auth.team",
    "project.status = 'pub' && owner.role = 'admin'",
    "@collection.members.person ?= @request.auth.id && @collection.members.project ?= project",
    "@collection.members.person ?= @request.auth.id && level > 1",
    "@request.auth.home.public = true",
    "@request.auth.members_via_person.project ?= project",
    "tags.name ?= 'hot'",
    "project.tasks_via_project.done ?= true",
)
OWN_FILTERS = (
    *("", "", "done = true", "level > 2", "note ~ 'a'", "owner = 'ann000000000000' || level < 2"),
    *("note = ''", "owner != 'bob000000000000' && team = 'red'", "tags:length = 1"),
)
RELATED_FILTERS = (
    *("", "", "done = true", "project.status = 'pub'", "owner.team = 'red'"),
    *("project.members_via_project.person ?= 'bob000000000000'", "tags.name ?= 'hot' || level > 3"),
    *("project.members_via_project.rank > 1", "project.public != true"),
)


@dataclass(eq=False)
class Writer:
    """Draws writes that both databases accept."""

    chance: Random
    present: dict[str, set[str]] = field(
        default_factory=lambda: {"projects": {*PROJECTS}, "members": set(), "tasks": set()}
    )
    _projects_of_members: dict[str, str] = field(default_factory=dict)

    def transaction(self, *, of_related: bool) -> list[Write]:
        """Return some writes of one transaction."""
        count = self.chance.choice((1, 1, 1, 2, 4))
        return [self._draw(of_related=of_related) for _ in range(count)]

    def _draw(self, *, of_related: bool) -> Write:
        chance = self.chance
        if chance.random() < 0.1:
            person = chance.choice(PEOPLE)
            return Write(op="update", collection="people", id=person, data=self._person())
        if not of_related or chance.random() < 0.5:
            return self.write("tasks", TASKS)
        match chance.randrange(8):
            case 0:
                data = {"name": chance.choice(("hot", "cold"))}
                return Write(op="update", collection="tags", id=chance.choice(TAGS), data=data)
            case 1 | 2 | 3:
                return self.write("projects", PROJECTS)
            case _:
                return self.write("members", MEMBERS)

    def write(self, collection: str, ids: tuple[str, ...]) -> Write:
        """Return the creation of a row that isn't there, or a change or deletion of one that is."""
        chance, present = self.chance, self.present[collection]
        record_id = chance.choice(ids)
        data = {"tasks": self._task, "projects": self._project, "members": self._member}[
            collection
        ]()
        if record_id in present and chance.random() < 0.25:
            self._forget(collection, record_id)
            return Write(op="delete", collection=collection, id=record_id)
        if record_id in present:
            kept = chance.sample(sorted(data), chance.randint(1, len(data)))
            data = {name: data[name] for name in kept}
        if collection == "members" and "project" in data:
            self._projects_of_members[record_id] = data["project"]
        op: Literal["create", "update"] = "update" if record_id in present else "create"
        present.add(record_id)
        return Write(op=op, collection=collection, id=record_id, data=data)

    def _forget(self, collection: str, record_id: str) -> None:
        self.present[collection].discard(record_id)
        if collection == "projects":  # and, by cascade, its members
            self.present["members"] -= {
                one for one, project in self._projects_of_members.items() if project == record_id
            }

    def _some_project(self) -> str:
        return self.chance.choice([*sorted(self.present["projects"]), ""])

    def _task(self) -> dict[str, Any]:
        chance = self.chance
        # Stored apart from its row, and left out of the WAL where it stays.
        long_text = chance.randbytes(2400).hex()
        return {
            "owner": chance.choice([*PEOPLE, ""]),
            "team": chance.choice(TEAMS),
            "done": chance.random() < 0.5,
            "level": chance.randrange(6),
            "note": chance.choice(("", "a", "b", long_text)),
            "project": self._some_project(),
            "tags": chance.sample(TAGS, chance.randrange(3)),
        }

    def _project(self) -> dict[str, Any]:
        status = self.chance.choice(("pub", "draft"))
        return {"public": self.chance.random() < 0.5, "status": status}

    def _member(self) -> dict[str, Any]:
        chance = self.chance
        return {
            "project": self._some_project(),
            "person": chance.choice([*PEOPLE, *PEOPLE, ""]),
            "rank": chance.randrange(5),
        }

    def _person(self) -> dict[str, Any]:
        drawn = {
            "team": self.chance.choice(TEAMS),
            "role": self.chance.choice(("", "admin")),
            "home": self._some_project(),
        }
        name = self.chance.choice(sorted(drawn))
        return {name: drawn[name]}


@dataclass(eq=False)
class PocketBaseMirror(MirrorClient):
    """A mirror that loads from PocketBase, whose list may be ahead of the frames."""

    both: Both | None = None

    async def fetch_list(self) -> dict[str, Record]:
        assert self.both is not None
        if self.is_loaded_elsewhere:
            return await self.both.pocketbase_list(self)
        return await super().fetch_list()

    @property
    def is_loaded_elsewhere(self) -> bool:
        return len(self.person + self.filter) % 2 == 0


@dataclass(eq=False)
class Both:
    """PocketBase and the program, over the same rows."""

    original: PocketBaseServer
    running: Scene
    schema: NaturalSchema
    tokens: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)

    async def pocketbase_list(self, client: MirrorClient) -> dict[str, Record]:
        """Return what PocketBase lists for the client's person."""
        path = "/api/collections/tasks/records"
        if client.record_id:
            status, body = await self._get(f"{path}/{client.record_id}", client.person)
            return {body["id"]: body} if status == 200 else {}
        query = {"perPage": "500", **({"filter": client.filter} if client.filter else {})}
        status, body = await self._get(f"{path}?{urlencode(query)}", client.person)
        assert status == 200, body
        return {one["id"]: one for one in body["items"]}

    async def _get(self, path: str, person: str) -> tuple[int, Any]:
        headers = {"Authorization": self.tokens[person]} if person else {}
        request = Request(method="GET", path=path, headers=headers)
        answer = await send(request, self.original.address)
        return answer.head.status, json.loads(answer.body)

    async def write(self, writes: list[Write]) -> None:
        """Commit writes in PocketBase, then in PostgreSQL."""
        await self.original.transaction(writes, commit=True)
        connection = self.running.reader.write
        async with connection.transaction():
            for write in writes:
                await connection.execute(*self.schema.write(write))
        self.counts["writes"] += len(writes)

    async def set_rules(self, list_rule: str, view_rule: str) -> None:
        patch = {"listRule": list_rule, "viewRule": view_rule}
        await self.original.alter_collection("tasks", patch)
        await self.running.reload(_configured(list_rule, view_rule))

    async def compare(self) -> None:
        """Compare every mirror with PocketBase's list."""
        await self.running.settle()
        clients = self.running.clients
        # At once: an empty list with a filter is answered late.
        lists = await asyncio.gather(*(self.pocketbase_list(client) for client in clients))
        for client, expected in zip(clients, lists, strict=True):
            about = f"{client.person} {client.topic}: {client.log[-12:]}"
            assert client.rows == expected, about
        self.counts["comparisons"] += len(clients)


def _configured(list_rule: str, view_rule: str) -> dict[str, Any]:
    relations = {"tags": {"collection": "tags"}}
    made: dict[str, Any] = {
        one.name: {
            "table": one.name,
            "type": one.type,
            "collection_id": one.id,
            "list_rule": "",
            "view_rule": "",
        }
        for one in _COLLECTIONS
    }
    made["tasks"] |= {"list_rule": list_rule, "view_rule": view_rule, "relations": relations}
    return made


@asynccontextmanager
async def both_servers(database_url: str, directory: Path) -> AsyncIterator[Both]:
    """Run both with the fixtures."""
    (directory / "template").mkdir()
    template = await PocketBaseTemplate.build(FIXTURES, directory / "template")
    schema = NaturalSchema(FIXTURES, Style(empty="zero", json_type="json"))
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        for statement, parameters in schema.create():
            await connection.execute(statement, parameters)
    settings = {
        "auth": {"issuers": [{"name": "app", "secret": SECRET, "collection": "people"}]},
        "records": {"nulls": "zero", "hidden": "pocketbase"},
        "mirrors": {"pace": 0.02},
    }
    async with (
        template.running(directory / "original") as original,
        scene(database_url, "", _configured("", ""), **settings) as running,
    ):
        tokens = {one: await original.api.impersonate("people", one, 3600) for one in PEOPLE}
        yield Both(original, running, schema, tokens)


async def live(both: Both, chance: Random, writer: Writer, *, of_related: bool) -> Counter[str]:
    """Connect clients with topics drawn anew, write, and compare; return the resyncs told."""
    running = both.running
    rules = RELATED_RULES if of_related else OWN_RULES
    filters = RELATED_FILTERS if of_related else OWN_FILTERS
    await running.disconnect()
    running.clients.clear()
    await both.set_rules(*chance.choices(rules, k=2))
    for _ in range(_CLIENTS):
        record_id = chance.choice(TASKS) if not chance.randrange(4) else ""
        client = PocketBaseMirror(
            running.reader,
            "tasks",
            chance.choice([*PEOPLE, _GUEST]),
            filter="" if record_id else chance.choice(filters),
            record_id=record_id,
            is_resumable=chance.random() < 0.5,
            both=both,
        )
        running.clients.append(client)
        await client.connect()
    await both.compare()
    for _ in range(_STEPS):
        away = chance.sample(running.clients, 2) if not chance.randrange(4) else []
        for one in away:
            await one.disconnect()
        await both.write(writer.transaction(of_related=of_related))
        for one in away:
            await one.connect()
        await both.compare()
    told: Counter[str] = Counter()
    for one in running.clients:
        told.update(one.resyncs)
        both.counts.update(action for action, _ in one.log)
    return told


@pytest.mark.timeout(3600 if _IS_LONG else 300)
async def test_every_mirror_equals_pocketbases_list(database_url: str, tmp_path: Path) -> None:
    """By own columns, who is told to load anew has just begun, or became another caller."""
    seed = int(os.environ.get("PGREALTIME_SEED") or secrets.randbelow(10**9))
    told: dict[str, Counter[str]] = {"own": Counter(), "related": Counter()}
    async with both_servers(database_url, tmp_path) as both:
        chance = Random(seed)
        writer = Writer(chance)
        await both.write([writer.write("members", MEMBERS) for _ in range(3)])
        for number in range(HISTORIES):
            kind = ("own", "related")[number % 2]
            try:
                told[kind] += await live(both, chance, writer, of_related=kind == "related")
            except BaseException as error:
                rules = both.running.reader.config.collections["tasks"]
                error.add_note(f"PGREALTIME_SEED={seed}, history {number}, {rules.list_rule!r},")
                error.add_note(f"{rules.view_rule!r}")
                raise
    print(f"\nseed {seed}, {HISTORIES} histories: {dict(both.counts)}, resyncs {told}")  # noqa: T201 (-rP shows what was compared)

    assert set(told["own"]) <= {"start", "identity"}
    assert set(told["related"]) <= {"start", "identity", "related", "unknown"}
