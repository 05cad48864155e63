"""Whom the ``auth_rule`` of a users table doesn't admit is a guest, from that change on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from pgrealtime.auth.token import make_login_token
from pgrealtime.collections.model import derive_collection_id
from tests.conformance.http_client import Request, send
from tests.e2e.listener import Listener, listener
from tests.e2e.service import SECRET, Service, service, token

SCHEMA = """
CREATE TABLE teams (id text PRIMARY KEY, is_open boolean NOT NULL);
CREATE TABLE users (
  id text PRIMARY KEY, is_active boolean NOT NULL DEFAULT true, password_hash text, seen int,
  email text
);
CREATE TABLE staff (id text PRIMARY KEY, team text REFERENCES teams, seen int);
CREATE TABLE posts (id text PRIMARY KEY, author text NOT NULL, n int NOT NULL DEFAULT 0);
CREATE TABLE ends (id int PRIMARY KEY);
INSERT INTO teams VALUES ('open', true), ('shut', false);
INSERT INTO users VALUES ('ann', true, 'a hash'), ('bob', false, 'a hash');
INSERT INTO staff VALUES ('cid', 'open'), ('dot', 'shut');
INSERT INTO posts VALUES ('a', 'ann'), ('b', 'bob'), ('c', 'cid'), ('d', 'dot');
ALTER TABLE staff REPLICA IDENTITY FULL;
ALTER TABLE posts REPLICA IDENTITY FULL;
"""
MINE = '@request.auth.id != "" && author = @request.auth.id'
COLLECTIONS: dict[str, Any] = {
    "users": {
        "table": "users",
        "type": "auth",
        "auth_rule": "is_active = true",
        "login": {"password_hash": "password_hash"},
    },
    "staff": {"table": "staff", "type": "auth", "auth_rule": "team.is_open = true"},
    "teams": {"table": "teams"},
    "posts": {"table": "posts", "list_rule": MINE, "view_rule": MINE},
    "ends": {"table": "ends", "list_rule": ""},
}
OTHER_SECRET = "the secret of the staff's issuer, of more than thirty-two bytes"
AUTH: dict[str, Any] = {
    "issuers": [
        {"name": "app", "secret": SECRET, "superuser_when": {"role": "admin"}},
        {"name": "staff", "secret": OTHER_SECRET, "collection": "staff"},
    ],
    "login": {"enabled": True, "secret": SECRET},
}


def of_staff(person: str) -> str:
    return jwt.encode({"sub": person, "exp": time.time() + 1000}, OTHER_SECRET)


def of_login(person: str) -> str:
    return make_login_token(
        collection_id=derive_collection_id("auth", "users"),
        record_id=person,
        signing_key="a hash" + SECRET,
        expires_at=int(time.time()) + 1000,
    )


class World:
    """A service, and what its listeners hear up to a row that is written last."""

    def __init__(self, running: Service) -> None:
        self.running, self.end = running, 0

    async def heard(self, *listeners: Listener) -> list[list[str]]:
        """Write every post; return by listener the ids that it hears of."""
        self.end += 1
        await self.running.write.execute("UPDATE posts SET n = n + 1")
        return await self.rest(*listeners)

    async def rest(self, *listeners: Listener) -> list[list[str]]:
        self.end += 1
        await self.running.write.execute("INSERT INTO ends VALUES (%s)", (self.end,))
        found: list[list[str]] = []
        for one in listeners:
            ids: list[str] = []
            while True:
                (message,) = await one.take(1)
                if message.event == "posts/*":
                    ids.append(message.data["record"]["id"])
                elif message.data["record"]["id"] == str(self.end):
                    break
            found.append(ids)
        return found

    async def listed(self, key: str, path: str = "posts/records") -> tuple[int, list[str]]:
        """Return the status and the ids of a read."""
        request = Request(
            method="GET", path=f"/api/collections/{path}", headers={"Authorization": key}
        )
        answer = await send(request, self.running.address)
        body = json.loads(answer.body)
        return answer.head.status, [item["id"] for item in body.get("items", ())]


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_who_is_deactivated_is_a_guest_from_that_change_on(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """On open connections, at calls and reads, with tokens of issuers and of the login."""
    tables = "users, ONLY staff, ONLY teams, ONLY posts, ONLY ends"
    more = f"CREATE PUBLICATION pgrealtime FOR TABLE ONLY {tables};"
    topics = ("posts/*", "ends/*")
    async with (
        service(
            database_url,
            tmp_path,
            collections=COLLECTIONS,
            schema=SCHEMA + more,
            sections={"auth": AUTH, "replication": {"plugin": plugin}},
        ) as running,
        listener(running.address, *topics, token=token("ann")) as ann,
        listener(running.address, *topics, token=of_login("ann")) as of_password,
        listener(running.address, *topics, token=token("bob")) as bob,
        listener(running.address, *topics, token=of_staff("cid")) as cid,
        listener(running.address, *topics, token=of_staff("dot")) as dot,
        listener(running.address, *topics, token=token("ann", role="admin")) as admin,
    ):
        world = World(running)
        assert await world.heard(ann, of_password, bob, cid, dot) == [["a"], ["a"], [], ["c"], []]
        assert await world.rest(admin) == [["a", "b", "c", "d"]]
        assert await world.listed(token("ann")) == (200, ["a"])
        assert await world.listed(token("bob")) == (200, [])
        assert await world.listed(of_staff("cid")) == (200, ["c"])
        assert await world.listed(of_staff("dot")) == (200, [])
        # Whatever else changes of the row ends nobody's connection.
        await running.write.execute("UPDATE users SET seen = 1")
        await running.write.execute("UPDATE staff SET seen = 1")
        assert await world.heard(ann, of_password, cid) == [["a"], ["a"], ["c"]]

        async with running.write.transaction():
            await running.write.execute("UPDATE posts SET n = 10 WHERE id = 'a'")
            await running.write.execute("UPDATE users SET is_active = false WHERE id = 'ann'")
            await running.write.execute("UPDATE posts SET n = 11 WHERE id = 'a'")
        await running.write.execute("UPDATE posts SET n = 12 WHERE id = 'a'")
        assert await world.rest(ann, of_password) == [["a"], ["a"]]
        assert await world.listed(token("ann")) == (200, [])
        assert (await world.listed(token("ann"), "posts/records/a"))[0] == 404
        assert await ann.subscribe(*topics, token=token("ann")) == 204
        assert await world.heard(ann, cid) == [[], ["c"]]

        await running.write.execute("UPDATE users SET is_active = true")
        assert await ann.subscribe(*topics, token=token("ann")) == 204
        assert await bob.subscribe(*topics, token=token("bob")) == 204
        await world.rest(ann, bob)
        assert await world.heard(ann, bob) == [["a"], ["b"]]

        # A rule about other rows: whoever is changed in what it reads must come again.
        await running.write.execute("UPDATE staff SET team = 'shut' WHERE id = 'cid'")
        assert await cid.stream.wait_end(20) is not None
        async with listener(running.address, *topics, token=of_staff("cid")) as again:
            assert await world.heard(again) == [[]]


async def test_where_guests_may_not_subscribe_a_deactivated_user_is_ended(
    database_url: str, tmp_path: Path
) -> None:
    """The connection is closed, and the next call is refused."""
    async with (
        service(
            database_url,
            tmp_path,
            collections=COLLECTIONS,
            schema=SCHEMA,
            sections={"auth": {**AUTH, "allow_guests": False}},
        ) as running,
        listener(running.address, "posts/*", token=token("ann")) as ann,
        listener(running.address) as later,
    ):
        await running.write.execute("UPDATE users SET is_active = false")
        assert await ann.stream.wait_end(20) is not None
        assert await later.subscribe("posts/*", token=token("ann")) == 401
