"""Callers whose records change while they are connected, and what is hidden from them.

Compared with the real PocketBase step by step: new addresses and token keys, a user deleted and
created again, changes of several records in one commit, callers that take over a connection, hidden
relations.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest_asyncio
from psycopg import sql

from tests.conformance.differential import Side
from tests.conformance.fixtures import (
    SUPERUSERS,
    Account,
    FixtureCollection,
    FixtureField,
    FixtureRow,
    Fixtures,
)
from tests.conformance.natural_schema import Style
from tests.conformance.pgrealtime_server import Setting, running
from tests.conformance.pocketbase_server import PocketBaseApi, PocketBaseTemplate
from tests.conformance.scenarios import BEACON, BEACON_ID, PASSWORD, ROOT, Subscribe
from tests.conformance.transcript import Write

ANN, BEN, CAT = (f"person{name}00000000"[:15] for name in ("ann", "ben", "cat"))
SAM = "staffsam0000000"
ITEM = "item00000000001"
FIELD = FixtureField


def _collection(name: str, *fields: FixtureField, kind: Any = "base", **rules: Any) -> Any:
    rules = {"list_rule": "", "view_rule": ""} | rules
    return FixtureCollection(
        id=f"pbc_{name}0000000000"[:15], name=name, type=kind, fields=fields, **rules
    )


def _relation(name: str, collection: str, **kind: Any) -> FixtureField:
    target = f"pbc_{collection}0000000000"[:15]
    return FIELD(name=name, type="relation", collection_id=target, **kind)


COLLECTIONS = (
    _collection("bosses", FIELD(name="name", type="text")),
    _collection(
        "people",
        FIELD(name="name", type="text"),
        FIELD(name="role", type="text"),
        FIELD(name="score", type="number"),
        _relation("boss", "bosses", hidden=True),
        kind="auth",
        list_rule="id = @request.auth.id || name = 'cat'",
        view_rule="@request.auth.id != '' && (id = @request.auth.id || verified = true)",
        manage_rule="@request.auth.role = 'admin' || @request.auth.collectionName = 'staff'",
    ),
    _collection(
        "staff",
        FIELD(name="name", type="text"),
        _relation("mate", "people"),
        kind="auth",
        list_rule="@request.auth.collectionName = 'staff'",
        view_rule="id = @request.auth.id",
    ),
    _collection(
        "items",
        FIELD(name="title", type="text"),
        FIELD(name="note", type="json", hidden=True),
        _relation("owner", "people"),
        _relation("one", "people", hidden=True),
        _relation("many", "people", hidden=True, max_select=5),
        list_rule="owner = @request.auth.id || @request.auth.role = 'admin' || title = 'open'",
        view_rule="owner.role = @request.auth.role && @request.auth.verified = true",
    ),
    _collection("subs", _relation("item", "items"), _relation("other", "items", hidden=True)),
    _collection(BEACON, FIELD(name="count", type="number")),
)


def _person(collection: str, id_: str, name: str, **more: Any) -> FixtureRow:
    given = {"id": id_, "name": name, "email": f"{name}@example.com", "emailVisibility": False}
    data = given | {"verified": False, "password": PASSWORD} | more
    return FixtureRow(collection=collection, data=data)


ROWS = (
    FixtureRow(collection="bosses", data={"id": "boss00000000001", "name": "B"}),
    _person("people", ANN, "ann", boss="boss00000000001", role="", score=1),
    _person("people", BEN, "ben", role="", score=0),
    _person("people", CAT, "cat", role="", score=0),
    _person("staff", SAM, "sam", mate=BEN, verified=True),
    FixtureRow(
        collection="items",
        data={"id": ITEM, "title": "", "owner": ANN, "one": BEN, "many": [ANN, BEN], "note": {}},
    ),
    FixtureRow(collection="subs", data={"id": "sub000000000001", "item": ITEM, "other": ITEM}),
    FixtureRow(collection=BEACON, data={"id": BEACON_ID, "count": 0}),
)

ACCOUNTS = {
    name: Account(collection=collection, identity=f"{name}@example.com", password=PASSWORD)
    for collection, names in (("people", ("ann", "ben", "cat")), ("staff", ("sam",)))
    for name in names
} | {"root": Account(collection=SUPERUSERS, identity=ROOT.email, password=ROOT.password)}

FIXTURES = Fixtures(superuser=ROOT, accounts=ACCOUNTS, collections=COLLECTIONS, rows=ROWS)

EXPANDS = {
    "people/*": ["boss", "items_via_owner", "items_via_one", "items_via_many", "staff_via_mate"],
    "staff/*": ["mate", "mate.boss", "mate.items_via_one"],
    "items/*": [
        *("one", "many", "owner,one", "one.boss", "owner.boss", "owner.items_via_one.one"),
        *("subs_via_item", "subs_via_other", "subs_via_item.other", "note", "owner.staff_via_mate"),
    ],
    "subs/*": ["item", "other", "item.one", "item.owner.boss", "other,item.many"],
}
FILTERS = {
    "people/*": ["email != ''", "verified = true", "boss != ''", "items_via_one.id ?!= ''"],
    "items/*": [
        *("one != ''", "one.name = 'ben'", "many:length = 2", "note != null", "owner.boss = ''"),
        *("owner.name != 'zz'", "owner.email != ''", "subs_via_other.id ?!= ''", "owner.id != ''"),
    ],
}
FIELDS = ["one", "*", "expand.one.name", "expand.owner.boss", "id,expand.many.id,note", "email"]


def _topics() -> tuple[str, ...]:
    with_options: list[tuple[str, dict[str, str]]] = [
        *((topic, {"expand": text}) for topic, texts in EXPANDS.items() for text in texts),
        *((topic, {"filter": text}) for topic, texts in FILTERS.items() for text in texts),
        *(("items/*", {"expand": "one,many,owner", "fields": text}) for text in FIELDS),
        *(("people/*", {"fields": text}) for text in FIELDS),
    ]
    plain = [f"{BEACON}/*", *(f"{c.name}/*" for c in COLLECTIONS), "people", f"items/{ITEM}"]
    plain += [f"people/{id_}" for id_ in (ANN, BEN, CAT)] + [f"staff/{SAM}"]
    texts = [f"{t}?options={quote(json.dumps({'query': query}))}" for t, query in with_options]
    return tuple(dict.fromkeys([*plain, *texts]))


TOPICS = _topics()


@dataclass
class Both:
    """The two servers with the same clients."""

    original: Side
    ours: Side
    api: PocketBaseApi
    connection: psycopg.AsyncConnection[Any]
    beacon: int = 0
    events: int = 0

    async def subscribe(self, conn: str, account: str | None) -> int:
        """Submit all topics; return the status, which is the same from both."""
        action = Subscribe(conn=conn, account=account, topics=TOPICS)
        theirs = await self.original.subscribe(action)
        assert await self.ours.subscribe(action) == theirs, action
        return theirs[0]

    async def log_in(self, name: str, identity: str = "") -> None:
        """Get new tokens for a user, from each server its own."""
        collection = ACCOUNTS[name].collection
        for side in (self.original, self.ours):
            api = PocketBaseApi(side.target.address)
            email = identity or ACCOUNTS[name].identity
            side.tokens[name] = await api.login(collection, email, PASSWORD)

    async def write(self, *writes: Write) -> None:
        """Make the changes one after the other, and compare the events of each."""
        for write in writes:
            await self.original.target.write(write)
            await self.ours.target.write(write)
            await self._compare(str(write))

    async def commit(self, *changes: tuple[str, str, Mapping[str, Any]]) -> None:
        """Update records (collection, id, members) in one transaction."""
        calls = [
            {"method": "PATCH", "url": f"/api/collections/{name}/records/{id_}", "body": dict(data)}
            for name, id_, data in changes
        ]
        await self.api.call("POST", "/api/batch", {"requests": calls})
        async with self.connection.transaction():
            for name, id_, data in changes:
                columns = _columns(data)
                pairs = [sql.SQL("{} = %s").format(sql.Identifier(column)) for column in columns]
                statement = sql.SQL("UPDATE {} SET {} WHERE id = %s").format(
                    sql.Identifier(name), sql.SQL(", ").join(pairs)
                )
                await self.connection.execute(statement, [*columns.values(), id_])
        await self._compare(str(changes))

    async def _compare(self, step: str) -> None:
        self.beacon += 1
        theirs = await self.original.received(self.beacon)
        found = await self.ours.received(self.beacon)
        for conn in theirs:
            if theirs[conn] != found[conn]:
                theirs[conn] += await self.original.strays(conn)
                found[conn] += await self.ours.strays(conn)
            difference = theirs[conn] - found[conn], found[conn] - theirs[conn]
            assert theirs[conn] == found[conn], (step, conn, *difference)
            self.events += theirs[conn].total()


def _columns(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what PocketBase writes for these members: a new address brings a new token key."""
    columns = {("token_key" if name == "tokenKey" else name): data[name] for name in data}
    return ({"token_key": _key()} if "email" in data else {}) | columns


def _key() -> str:
    return secrets.token_hex(25)


def _update(collection: str, id_: str, **data: Any) -> Write:
    return Write(op="update", collection=collection, id=id_, data=data)


@pytest_asyncio.fixture
async def both(database_url: str, tmp_path: Path) -> AsyncIterator[Both]:
    """Open connections for a guest, three users, a member of staff and a superuser."""
    for directory in ("template", "ours"):
        (tmp_path / directory).mkdir()
    template = await PocketBaseTemplate.build(FIXTURES, tmp_path / "template")
    async with (
        template.running(tmp_path / "original") as original,
        running(
            FIXTURES,
            [collection.name for collection in COLLECTIONS],
            database_url=database_url,
            directory=tmp_path / "ours",
            style=Style(empty="zero", json_type="json"),
            setting=Setting(login_through_api=True),
        ) as ours,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection,
    ):
        sides = (
            await Side.of("PocketBase", original, FIXTURES),
            await Side.of("pgrealtime", ours, FIXTURES),
        )
        pair = Both(*sides, original.api, connection)
        for conn in (None, *ACCOUNTS):
            for side in sides:
                await side.open(str(conn))
            assert await pair.subscribe(str(conn), conn) == 204
        yield pair
        for side in sides:
            await side.close()


EVERYTHING = [
    _update("items", ITEM, title="x"),
    _update("items", ITEM, one=CAT, note={"a": 1}),
    _update("items", ITEM, title="open", owner=BEN),
    _update("items", ITEM, title="", owner=ANN),
    _update("subs", "sub000000000001"),
    _update("staff", SAM, mate=ANN),
    _update("bosses", "boss00000000001", name="C"),
]


async def test_what_users_receive_of_their_own_records_is_pocketbases(both: Both) -> None:
    """Role, verification, address, token key and password change.

    Events and identities are PocketBase's.
    """
    await both.write(*EVERYTHING, _update("people", ANN, role="admin"), *EVERYTHING)
    await both.write(
        *(_update("people", ANN, verified=verified) for verified in (True, False, True)),
        *(_update("people", BEN, emailVisibility=visible) for visible in (True, False)),
        _update("people", BEN),
        _update("people", ANN, role="", score=2),
    )
    await both.commit(("people", BEN, {"email": "new@example.com"}))  # a guest from here on
    await both.write(_update("people", BEN, score=3), *EVERYTHING)
    assert await both.subscribe("ben", "ben") == 204  # a token of before: still a guest
    await both.log_in("ben", "new@example.com")
    assert await both.subscribe("ben", "ben") == 204
    await both.write(_update("people", BEN, score=4), *EVERYTHING)
    await both.commit(("people", CAT, {"tokenKey": _key()}))
    await both.write(_update("people", CAT, score=3))
    await both.log_in("cat")
    assert await both.subscribe("cat", "cat") == 204
    await both.write(_update("people", CAT, score=4))
    await both.write(Write(op="set_password", collection="people", id=CAT, password=PASSWORD))
    await both.write(_update("people", CAT, score=5))

    assert both.events > 500


async def test_changes_of_one_commit_change_callers_as_in_pocketbase(both: Both) -> None:
    """The caller's record changes together with rows that rules read, and its key comes last."""
    await both.commit(("people", ANN, {"role": "admin"}), ("items", ITEM, {"title": "x"}))
    await both.commit(("people", ANN, {"role": ""}), ("items", ITEM, {"owner": BEN}))
    await both.commit(("people", ANN, {"score": 3}), ("people", ANN, {"score": 4}))
    await both.commit(
        ("people", ANN, {"verified": True}), ("people", ANN, {"tokenKey": _key(), "score": 5})
    )
    await both.write(_update("people", ANN, score=6), *EVERYTHING)

    assert both.events > 100


async def test_a_user_deleted_and_created_again_is_a_guest_until_signing_in(both: Both) -> None:
    back = {"name": "cat", "email": "cat@example.com", "password": PASSWORD, "verified": True}
    await both.write(Write(op="delete", collection="people", id=CAT))
    assert await both.subscribe("cat", "cat") == 204  # as a guest
    await both.write(Write(op="create", collection="people", id=CAT, data=back))
    assert await both.subscribe("cat", "cat") == 204
    await both.write(_update("people", CAT, score=1))
    await both.log_in("cat")
    assert await both.subscribe("cat", "cat") == 204
    await both.write(_update("people", CAT, score=2), *EVERYTHING)

    assert both.events > 100


async def test_a_connection_is_taken_over_as_in_pocketbase(both: Both) -> None:
    """Only the same record may take over a connection that has one.

    A refused call changes nothing.
    """
    answers = {
        (conn, account): await both.subscribe(conn, account)
        for conn in ("ann", "sam", "root", "None")
        for account in ("sam", "root", "ben", None, "broken", "ann")
    }
    await both.write(*EVERYTHING)

    assert set(answers.values()) == {204, 403}
    assert both.events > 50
