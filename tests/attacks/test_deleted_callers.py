"""A caller is one that existed: whatever is asked of the database binds the row known of it.

Between a commit and the stream's reaching it the database knows more than a connection's caller. A
user who is deleted there has an id and no columns, which is neither that user nor a guest; one
whose role was changed there has it a change too early.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql

from pgrealtime.auth.account import Accounts, Users
from pgrealtime.auth.authenticator import caller_of
from pgrealtime.auth.principal import Caller
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.changes import Delete, Insert, Row, TableName, Transaction, Update, WholeRow
from pgrealtime.collections import Collections, build
from pgrealtime.config import CollectionConfig, RealtimeConfig
from pgrealtime.hub.dispatch import Hub
from pgrealtime.hub.match import Matcher
from pgrealtime.hub.probe import Probe
from pgrealtime.lsn import LSN, Xid
from pgrealtime.pool import QueryPool
from pgrealtime.rules.plan import columns_asked
from tests.unit.hub.room import DEADLINE, MemorySink

SCHEMA = """
CREATE TABLE teams (id text PRIMARY KEY, open bool);
CREATE TABLE users (
  id uuid PRIMARY KEY, email text, role text, level int, team text REFERENCES teams, teams text[]);
CREATE TABLE bans (id text PRIMARY KEY, person uuid REFERENCES users ON DELETE CASCADE);
CREATE TABLE secrets (id text PRIMARY KEY, body text, level int);
CREATE TABLE posts (id text PRIMARY KEY, secret text REFERENCES secrets);
INSERT INTO teams VALUES ('closed', false), ('open', true);
INSERT INTO secrets VALUES ('s', 'body', 5);
INSERT INTO users VALUES
  ('00000000-0000-0000-0000-00000000000b', 'bad@x', 'banned', 9, 'closed', '{closed}'),
  ('00000000-0000-0000-0000-00000000000c', 'good@x', 'member', 1, 'open', '{open}'),
  ('00000000-0000-0000-0000-00000000000d', 'other@x', 'member', 1, 'open', '{open}');
INSERT INTO bans VALUES ('b', '00000000-0000-0000-0000-00000000000b');
"""
BAD = "00000000-0000-0000-0000-00000000000b"
GOOD = "00000000-0000-0000-0000-00000000000c"
OTHER = "00000000-0000-0000-0000-00000000000d"

SIGNED_IN = "@request.auth.id != '' && "


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rule that shuts out the bad user and guests, and where it is asked."""

    rule: str
    place: str
    """Collection and rule."""
    topic: str = "posts/*"
    is_of_columns: bool = True
    """Columns of the caller's own row decide, or what they point to; else rows that point to it."""


ROLE = SIGNED_IN + "@request.auth.role != 'banned'"
LEVEL = SIGNED_IN + "secret.level > @request.auth.level"
FILTERED = "posts/*?options=" + json.dumps({"query": {"filter": "secret.body = 'body'"}})
EXPANDED = "posts/*?options=" + json.dumps({"query": {"expand": "secret"}})

CASES = {
    "a list rule": Case(rule=ROLE, place="posts.list_rule"),
    "a filter over a locked collection": Case(rule=ROLE, place="secrets.list_rule", topic=FILTERED),
    "expand": Case(rule=ROLE, place="secrets.view_rule", topic=EXPANDED),
    "addresses": Case(rule=ROLE, place="users.manage_rule", topic="users/*"),
    "a column beside a related one": Case(rule=LEVEL, place="posts.list_rule"),
    "a column beside a related one, expanded": Case(
        rule=SIGNED_IN + "level > @request.auth.level && posts_via_secret.id != ''",
        place="secrets.view_rule",
        topic=EXPANDED,
    ),
    "what a column points to": Case(
        rule=SIGNED_IN + "@request.auth.team.open != false", place="posts.list_rule"
    ),
    "what a column points to, expanded": Case(
        rule=SIGNED_IN + "@request.auth.team.open != false",
        place="secrets.view_rule",
        topic=EXPANDED,
    ),
    "what an array points to": Case(
        rule=SIGNED_IN + "@request.auth.teams.open != false", place="posts.list_rule"
    ),
    "rows that point to the caller": Case(
        rule=SIGNED_IN + "@request.auth.bans_via_person.id = ''",
        place="posts.list_rule",
        is_of_columns=False,
    ),
    "rows that hold the id": Case(
        rule=SIGNED_IN + "@collection.bans.person != @request.auth.id",
        place="posts.list_rule",
        is_of_columns=False,
    ),
    "rows that hold the id, expanded": Case(
        rule=SIGNED_IN + "@collection.bans.person != @request.auth.id",
        place="secrets.view_rule",
        topic=EXPANDED,
        is_of_columns=False,
    ),
}


def configured(case: Case) -> dict[str, CollectionConfig]:
    relations = {
        "users": {"team": {"collection": "teams"}, "teams": {"collection": "teams"}},
        "bans": {"person": {"collection": "users"}},
        "posts": {"secret": {"collection": "secrets"}},
    }
    raw: dict[str, dict[str, Any]] = {
        name: {
            "table": f"public.{name}",
            "list_rule": "",
            "view_rule": "",
            "relations": relations.get(name, {}),
        }
        for name in ("teams", "users", "bans", "secrets", "posts")
    }
    raw["users"]["type"] = "auth"
    collection, rule = case.place.split(".")
    raw[collection][rule] = case.rule
    return {name: CollectionConfig.model_validate(one) for name, one in raw.items()}


@dataclass
class World:
    """A database, and a hub whose stream goes as far as a test lets it."""

    connection: psycopg.AsyncConnection[Any]
    accounts: Accounts
    collections: Collections
    hub: Hub
    changelog: MemoryChangelog
    sinks: dict[str, MemorySink] = field(default_factory=dict)
    _lsn: int = 1 << 40  # beyond the WAL of any test server: after every barrier

    async def listen(self, name: str, topic: str) -> None:
        """Connect and subscribe; as a guest with an empty name."""
        users = Users(
            collection=self.collections["users"],
            asked=columns_asked(self.collections).get("users", ()),
        )
        caller = Caller()
        if name:
            account = await self.accounts.load(users, name)
            assert account is not None
            caller = caller_of(account, None)
        sink = self.sinks[name] = MemorySink()
        connection = self.hub.open(sink, address="", last_event_id=None, position=None)
        await self.hub.subscribe(connection.id, [topic], caller, "")

    async def write(self, statement: str, *changes: Insert | Update | Delete) -> Transaction:
        """Commit; return the transaction as the stream would bring it."""
        async with self.connection.transaction():
            cursor = await self.connection.execute("SELECT pg_current_xact_id()::text")
            row = await cursor.fetchone()
            await self.connection.execute(sql.SQL(statement))
        assert row is not None
        self._lsn += 100
        return Transaction(
            xid=Xid(int(row[0])), end_lsn=LSN(self._lsn), commit_time=0, changes=changes, size=100
        )

    async def stream(self, *transactions: Transaction) -> None:
        """Let the stream bring them."""
        for one in transactions:
            self.changelog.append(one)
        self.hub.wake()
        async with asyncio.timeout(DEADLINE):
            while self.hub.head < self.changelog.head:
                self.hub.progressed.clear()
                await self.hub.progressed.wait()

    def heard(self, name: str, record_id: str) -> str:
        """What the connection was shown of the event of a record: nothing is empty."""
        texts = [data for _, event, data in self.sinks[name].events() if event != "PB_CONNECT"]
        for data in map(json.loads, texts):
            record: Mapping[str, Any] = data["record"]
            if record["id"] == record_id:
                seen = record.get("expand", {}).get("secret") or record.get("email")
                is_shown = "secret" not in record or "expand" not in record or bool(seen)
                if "email" in record or ("secret" in record and is_shown):
                    return "all"
                return "the rest"
        return ""


@asynccontextmanager
async def world_of(url: str, case: Case) -> AsyncIterator[World]:
    async with (
        await psycopg.AsyncConnection.connect(url, autocommit=True) as connection,
        QueryPool(url, max_size=3) as pool,
    ):
        await connection.execute(sql.SQL(SCHEMA))
        collections = build(configured(case), await read_catalog(connection, schemas=["public"]))
        changelog = MemoryChangelog(LSN(100), max_size=1_000_000, max_age=300.0)
        hub = Hub(
            changelog,
            Matcher(collections),
            Probe(pool),
            collections=collections,
            limits=RealtimeConfig(),
        )
        hub.stream_started("abcdef")
        running = asyncio.create_task(hub.run())
        try:
            yield World(connection, Accounts(pool), collections, hub, changelog)
        finally:
            for one in list(hub.connections):
                hub.close(one)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


POSTS, USERS = TableName("public", "posts"), TableName("public", "users")


def user(record_id: str, **more: str) -> Row:
    """The image of a user's row; of the members, unless more is said."""
    given: Row = {"id": record_id, "email": "e@x", "role": "member", "level": "1"}
    return given | {"team": "open", "teams": "{open}"} | more


async def event_of(world: World, case: Case, name: str) -> Transaction:
    """Commit something that the topic is about; its record's id is the name."""
    if case.topic != "users/*":
        row: Row = {"id": name, "secret": "s"}
        return await world.write(f"INSERT INTO posts VALUES ('{name}', 's')", Insert(POSTS, row))
    change = Update(USERS, user(name), WholeRow(user(name)))
    return await world.write(f"UPDATE users SET email = 'e@x' WHERE id = '{name}'", change)


def name_of(case: Case, number: int) -> str:
    return f"p{number}" if case.topic != "users/*" else OTHER


@pytest.mark.parametrize("name", CASES)
async def test_who_is_deleted_is_shown_no_more_than_before(database_url: str, name: str) -> None:
    """Neither before the deletion, nor between it and the stream's reaching it, nor after."""
    case = CASES[name]
    async with world_of(database_url, case) as world:
        for who in (BAD, GOOD, ""):
            await world.listen(who, case.topic)
        before = await event_of(world, case, name_of(case, 1))
        await world.stream(before)
        found = {who: world.heard(who, name_of(case, 1)) for who in (BAD, GOOD, "")}
        assert found[GOOD] == "all"
        assert found[BAD] == found[""] != "all"
        for sink in world.sinks.values():
            sink.data = b""

        between = await event_of(world, case, name_of(case, 2))
        gone = await world.write(
            f"DELETE FROM users WHERE id IN ('{BAD}', '{GOOD}')",
            Delete(USERS, WholeRow(user(BAD, role="banned"))),
            Delete(USERS, WholeRow(user(GOOD))),
        )
        await world.stream(between)
        seen = {who: world.heard(who, name_of(case, 2)) for who in (BAD, GOOD, "")}
        assert seen[BAD] == seen[""] == found[""]
        for sink in world.sinks.values():
            sink.data = b""

        await world.stream(gone, await event_of(world, case, name_of(case, 3)))
        after = [world.heard(who, name_of(case, 3)) for who in (BAD, GOOD, "")]
        assert after == [found[""]] * 3


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_of_columns])
async def test_rights_change_at_their_own_change_of_the_stream(
    database_url: str, name: str
) -> None:
    """The database has the other role already.

    Who gets rights has them no change too early, and who loses them hears what was before.
    """
    case = CASES[name]
    async with world_of(database_url, case) as world:
        for who in (BAD, GOOD, ""):
            await world.listen(who, case.topic)
        before = await event_of(world, case, name_of(case, 1))
        banned = {"role": "banned", "level": "9", "team": "closed", "teams": "{closed}"}
        swapped = await world.write(
            "UPDATE users SET (role, level, team, teams) ="
            " (SELECT o.role, o.level, o.team, o.teams FROM users o WHERE o.role != users.role"
            f"  AND o.id IN ('{BAD}', '{GOOD}')) WHERE id IN ('{BAD}', '{GOOD}')",
            Update(USERS, user(BAD), WholeRow(user(BAD, **banned))),
            Update(USERS, user(GOOD, **banned), WholeRow(user(GOOD))),
        )
        await world.stream(before)
        least = world.heard("", name_of(case, 1))
        assert world.heard(GOOD, name_of(case, 1)) == "all"
        assert world.heard(BAD, name_of(case, 1)) == least != "all"
        for sink in world.sinks.values():
            sink.data = b""

        await world.stream(swapped, await event_of(world, case, name_of(case, 2)))
        assert world.heard(BAD, name_of(case, 2)) == "all"
        assert world.heard(GOOD, name_of(case, 2)) == least
