"""The operator's page: what it is told agrees with what the database and the listeners know."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest

from tests.conformance.http_client import Address, Request, send
from tests.conformance.pgrealtime_server import command
from tests.e2e.listener import Listener, listener
from tests.e2e.service import MINE_OR_PUBLIC, Service, service, token
from tests.e2e.test_admin import admin
from tests.topics import topic

KEY = "a key for the operator"
COLLECTIONS = {
    "users": {"table": "users", "type": "auth", "list_rule": "id = @request.auth.id"},
    "posts": {"table": "posts", "list_rule": MINE_OR_PUBLIC, "view_rule": "author.name != 'Bob'"},
    "locked": {"table": "secrets"},
}
SECRETS = "CREATE TABLE secrets (id text PRIMARY KEY, value text);"
SECRET = "hunter2-and-more"


async def get(
    address: Address,
    path: str,
    query: Mapping[str, object] | None = None,
    *,
    key: str = KEY,
    host: str = "",
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if host:
        headers["Host"] = host
    target = f"{path}?{urlencode(query)}" if query else path
    response = await send(Request(method="GET", path=target, headers=headers, body=b""), address)
    return response.head.status, {k.lower(): v for k, v in response.head.headers}, response.body


@dataclass(frozen=True, slots=True)
class Port:
    """The admin port."""

    address: Address

    async def look(self, view: str, **query: object) -> Any:
        status, _, body = await get(self.address, f"/inspect/{view}", query)
        assert status == 200, body
        return json.loads(body)

    async def refused(self, view: str, **query: object) -> dict[str, str]:
        status, _, body = await get(self.address, f"/inspect/{view}", query)
        assert status == 400, body
        found: dict[str, str] = json.loads(body)
        return found


@asynccontextmanager
async def running_with_port(
    database_url: str, tmp_path: Path, **sections: Mapping[str, Any]
) -> AsyncIterator[tuple[Service, Port]]:
    at, given = admin(token=KEY)
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as made,
        AsyncExitStack() as stack,
    ):
        await made.execute(SECRETS)
        running = await stack.enter_async_context(
            service(database_url, tmp_path, sections={**given, **sections}, collections=COLLECTIONS)
        )
        port = Port(at)
        async with asyncio.timeout(30):
            while not (await port.look("overview"))["is_streaming"]:
                await asyncio.sleep(0.02)
        yield running, port


async def settled(port: Port, claim: str, **query: object) -> Any:
    """Return the view once it has rows; other processes' progress can't be awaited otherwise."""
    async with asyncio.timeout(30):
        while not (found := await port.look(claim, **query))["rows"]:
            await asyncio.sleep(0.02)
        return found


def refs(*listeners: Listener) -> set[str]:
    return {one.client_id[:16] for one in listeners}


@dataclass(frozen=True, slots=True)
class Scene:
    """A service with four connections, and a row that was created and then made public."""

    running: Service
    port: Port
    guest: Listener
    ann: Listener
    bob: Listener
    silent: Listener


@asynccontextmanager
async def scene(database_url: str, tmp_path: Path) -> AsyncIterator[Scene]:
    filtered = topic("posts/*", filter="title ~ 'x' && n > 7", invite=SECRET)
    async with (
        running_with_port(database_url, tmp_path) as (running, port),
        listener(running.address, "posts/*") as guest,
        listener(running.address, filtered, "users/*", token=token("ann")) as ann,
        listener(running.address, "posts/p1", "nowhere/*", token=token("bob")) as bob,
        listener(running.address) as silent,
    ):
        await running.write.execute(
            "INSERT INTO posts (id, title, author, public, n) VALUES ('p1', 'xyz', 'ann', false, 9)"
        )
        await running.write.execute("UPDATE posts SET public = true WHERE id = 'p1'")
        await guest.take(1)
        await ann.take(2)
        await bob.take(2)
        yield Scene(running, port, guest, ann, bob, silent)


async def test_each_field_is_what_listeners_and_database_know(
    database_url: str, tmp_path: Path
) -> None:
    async with scene(database_url, tmp_path) as made:
        told = [
            await check_connections(made),
            await check_topics(made.port),
            await check_changes(made),
            await check_overview(made),
            await check_collections(made.port),
            await check_explanations(made, tmp_path),
        ]
        text = json.dumps(told)
    for hidden in (SECRET, KEY, token("ann")[:40], made.ann.client_id):
        assert hidden not in text


async def check_connections(made: Scene) -> object:
    everyone = await made.port.look("connections")
    rows = {row["ref"]: row for row in everyone["rows"]}
    assert (everyone["total"], everyone["matching"]) == (4, 4)
    guest, ann, bob, silent = (
        rows.pop(one.client_id[:16]) for one in (made.guest, made.ann, made.bob, made.silent)
    )
    assert rows == {}
    four = (guest, ann, bob, silent)
    assert [one["caller"] for one in four] == ["guest", "users/ann", "users/bob", "guest"]
    assert [one["events_sent"] for one in four] == [1, 2, 2, 0]
    assert [one["topic_count"] for one in four] == [1, 2, 2, 0]
    assert [one["state"] for one in four] == ["live", "live", "live", "unsubscribed"]
    assert (guest["why"], silent["why"]) == ("", "has not subscribed to anything")
    assert everyone["rows"][0] == silent  # who is not live comes first
    assert {one["address"] for one in four} == {"127.0.0.1"}
    assert ann["token_expires_at"] is not None
    assert guest["token_expires_at"] is None
    assert ann["topics"] == ["posts/* (filter: title ~ … && n > …, invite)", "users/*"]
    found = await made.port.look("connections", search="users/an")
    assert [row["ref"] for row in found["rows"]] == [ann["ref"]]
    assert (found["total"], found["matching"]) == (4, 1)
    assert len((await made.port.look("connections", limit=1))["rows"]) == 1
    assert (await made.port.look("connections", state="unsubscribed"))["matching"] == 1
    return everyone


async def check_topics(port: Port) -> object:
    told = await port.look("topics")
    topics = {(row["collection"], row["is_record"], row["filter"]): row for row in told["rows"]}
    assert {key: row["subscriptions"] for key, row in topics.items()} == {
        ("posts", False, ""): 1,
        ("posts", False, "title ~ … && n > …"): 1,
        ("users", False, ""): 1,
        ("posts", True, ""): 1,
        ("", False, ""): 1,
    }
    assert topics["", False, ""]["why_none"] == "there is no such collection"
    assert topics["posts", True, ""]["found_by"] == "record"
    assert topics["posts", True, ""]["asks_postgres"]
    assert topics["users", False, ""]["found_by"] == "index"
    assert not topics["users", False, ""]["asks_postgres"]
    return told


async def check_changes(made: Scene) -> object:
    """Newest first; and who they match."""
    port = made.port
    changes = (await port.look("changes"))["rows"]
    assert [(row["kind"], row["collection"], row["record"]) for row in changes] == [
        ("update", "posts", "p1"),
        ("create", "posts", "p1"),
    ]
    cursor = await made.running.write.execute(
        "SELECT %s::pg_lsn <= pg_current_wal_lsn(), extract(epoch FROM now())::float8",
        [changes[0]["lsn"]],
    )
    assert await cursor.fetchone() == (True, pytest.approx(changes[0]["at"], abs=60))
    assert (await port.look("changes", search="posts/p2"))["rows"] == []
    assert (await port.look("changes", before=changes[0]["lsn"]))["rows"] == changes[1:]
    who = [await port.look("receivers", lsn=row["lsn"], ordinal=row["ordinal"]) for row in changes]
    assert [{row["ref"] for row in one["rows"]} for one in who] == [
        refs(made.guest, made.ann, made.bob),
        refs(made.ann, made.bob),
    ]
    assert [one["subscriptions"] for one in who] == [3, 2]
    assert {row["status"] for one in who for row in one["rows"]} == {"delivered"}
    async with listener(made.running.address, "posts/*") as newcomer:
        again = await port.look("receivers", lsn=changes[0]["lsn"], ordinal=1)
    status = {row["ref"]: row["status"] for row in again["rows"]}
    assert status[newcomer.client_id[:16]] == "later"
    return [changes, who]


async def check_overview(made: Scene) -> object:
    told = await made.port.look("overview")
    cursor = await made.running.write.execute(
        "SELECT slot_name, temporary, wal_status,"
        " pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8 FROM pg_replication_slots"
        " WHERE database = current_database()"
    )
    (slot,) = await cursor.fetchall()
    shown = told["slot"]
    assert (shown["name"], shown["is_temporary"], shown["wal_status"]) == slot[:3]
    assert 0 < shown["retained_bytes"] <= slot[3] + 1024 * 1024
    assert told["not_ready"] == []
    assert told["states"] == {"live": 3, "unsubscribed": 1}
    assert (told["connections"], told["events_sent"], told["changes_received"]) == (4, 5, 2)
    assert told["last_change_at"] == (await made.port.look("changes"))["rows"][0]["at"]
    assert told["workers"] == []
    return told


async def check_collections(port: Port) -> object:
    told = await port.look("collections")
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["posts"]["list_rule"] == MINE_OR_PUBLIC
    assert rows["posts"]["table"] == "public.posts"
    assert rows["posts"]["subscriptions"] == 3
    assert rows["locked"]["list_rule"] is None
    sql = (await port.look("sql", collection="posts"))["rules"]
    of_users = {one["rule"]: one for one in sql if one["caller"] == "users"}
    assert of_users["list_rule"]["decided_by"] == "the process"
    assert of_users["view_rule"]["decided_by"] == "PostgreSQL"
    assert "users" in of_users["view_rule"]["sql"]
    return [told, sql]


async def check_explanations(made: Scene, tmp_path: Path) -> object:
    """The change is explained as it was written, though the row is another one now."""
    port = made.port
    made_public, created = (await port.look("changes"))["rows"]
    who = {
        name: one.client_id[:16]
        for name, one in zip("gas", (made.guest, made.ann, made.silent), strict=True)
    }
    of = {
        (name, row["kind"]): await port.look(
            "explain", lsn=row["lsn"], ordinal=row["ordinal"], connection=ref
        )
        for name, ref in who.items()
        for row in (made_public, created)
    }
    assert {key: one["is_delivered"] for key, one in of.items()} == {
        ("g", "create"): False,
        ("g", "update"): True,
        ("a", "create"): True,
        ("a", "update"): True,
        ("s", "create"): False,
        ("s", "update"): False,
    }
    assert of["g", "create"]["lines"][-1] == (
        "not delivered: none of: public = true; author = @request.auth.id"
    )
    assert of["s", "update"]["lines"][-1] == "not delivered: none of its 0 topics is of posts/p1"
    assert '@request.query.invite is "[hidden]"' in "".join(of["a", "create"]["lines"])
    # Whoever is not connected, and a record as it is now: as the command has it.
    told = await port.look("explain", caller="users/bob", record="users/ann")
    ran = await asyncio.create_subprocess_exec(
        *(command(), "explain", "users/*", "--record", "ann", "--user", "users/bob"),
        *("-c", str(tmp_path / "pgrealtime.yaml")),
        stdout=asyncio.subprocess.PIPE,
    )
    printed, _ = await ran.communicate()
    assert told["lines"] == printed.decode().splitlines()
    assert not told["is_delivered"]
    for query, message in (
        ({"caller": "users/nobody", "record": "posts/p1"}, '"users" has no record "nobody"'),
        (
            {"caller": "bob", "record": "posts/p1"},
            "a caller is guest, superuser, or collection and id",
        ),
        ({"caller": "guest", "record": "p1"}, "a record is named by collection and id"),
        ({"connection": "nobody", "record": "posts/p1"}, "there is no such connection"),
    ):
        assert (await port.refused("explain", **query))["message"] == message
    return list(of.values())


async def test_refusals_closed_connections_and_gaps_are_told(
    database_url: str, tmp_path: Path
) -> None:
    async with running_with_port(database_url, tmp_path) as (running, port):
        async with listener(running.address, "users/*", "PB_RESYNC", token="nonsense") as one:
            await running.write.execute("TRUNCATE users CASCADE")
            await one.take(1)
            found = await settled(port, "changes")
            overview = await port.look("overview")
        assert overview["refusals"] == {"token: token_malformed": 1}
        assert overview["gaps"] == {"truncate": 1}
        [change] = [row for row in found["rows"] if row["collection"] == "users"]
        assert change["kind"] == "truncate"
        why = await port.refused("receivers", lsn=change["lsn"], ordinal=change["ordinal"])
        assert why["message"] == "a truncate names no record"
        for view, query, message in (
            ("nothing", {}, "there is no such view"),
            ("receivers", {"lsn": "nonsense"}, "an LSN looks like 16/B374D848"),
            ("receivers", {"lsn": "0/1", "ordinal": 1}, "the change is not held any more"),
            (
                "receivers",
                {"lsn": change["lsn"]},
                'the transaction has no change of that "ordinal"',
            ),
            ("explain", {"lsn": change["lsn"]}, 'the transaction has no change of that "ordinal"'),
            ("connections", {"limit": "-1"}, '"limit" isn\'t a number'),
            ("connections", {"search": "x" * 501}, '"search" is too long'),
            ("sql", {"collection": "nowhere"}, "there is no such collection"),
        ):
            assert (await port.refused(view, **query))["message"] == message
        async with asyncio.timeout(30):
            while (await port.look("overview"))["closed"] != {"client": 1}:
                await asyncio.sleep(0.02)


async def test_without_the_token_nothing_is_told(database_url: str, tmp_path: Path) -> None:
    """The page itself holds no data, and may run no code but its own."""
    async with running_with_port(database_url, tmp_path) as (running, port):
        for key in ("", KEY[:-1], f"{KEY}x"):
            status, headers, body = await get(port.address, "/inspect/connections", key=key)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert json.loads(body)["code"] == "token_required"
        status, headers, _ = await get(port.address, "/", key="")
        assert status == 200
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert (await get(running.address, "/inspect/overview"))[0] == 404


async def test_without_a_token_only_this_machine_may_look(
    database_url: str, tmp_path: Path
) -> None:
    """A page elsewhere can have its own host name resolve to 127.0.0.1."""
    at, sections = admin()
    async with service(database_url, tmp_path, sections=sections):
        name = f"localhost:{at.port}"
        assert (await get(at, "/inspect/overview", key="", host=name))[0] == 200
        for elsewhere in ("evil.example", f"evil.example:{at.port}", "127.0.0.1.evil.example"):
            status, _, body = await get(at, "/inspect/overview", key="", host=elsewhere)
            assert status == 403
            assert "admin.token" in json.loads(body)["hint"]


async def test_workers_are_summed_and_named(database_url: str, tmp_path: Path) -> None:
    async with running_with_port(database_url, tmp_path, server={"workers": 2}) as (running, port):
        async with AsyncExitStack() as stack:
            opened = [
                await stack.enter_async_context(listener(running.address, "posts/*"))
                for _ in range(12)
            ]
            await running.write.execute(
                "INSERT INTO posts (id, title, public) VALUES ('p1', 'x', true)"
            )
            for one in opened:
                await one.take(1)
            everyone = await port.look("connections")
            assert everyone["total"] == 12
            assert {row["ref"] for row in everyone["rows"]} == refs(*opened)
            tags = {row["worker"]: row["ref"][:6] for row in everyone["rows"]}
            assert tags.keys() == {1, 2}
            assert all(row["ref"][:6] == tags[row["worker"]] for row in everyone["rows"])
            [topics] = (await port.look("topics"))["rows"]
            assert topics["subscriptions"] == 12
            [change] = (await port.look("changes"))["rows"]
            who = await port.look("receivers", lsn=change["lsn"], ordinal=1)
            assert who["subscriptions"] == 12
            for ref in refs(*opened):
                why = await port.look("explain", lsn=change["lsn"], ordinal=1, connection=ref)
                assert why["is_delivered"]
            asked = {"connection": "nobody", "record": "posts/p1"}
            assert (await port.refused("explain", **asked))["code"] == "look_refused"
            assert (await port.look("explain", caller="guest", record="posts/p1"))["is_delivered"]
            assert {row["ref"] for row in who["rows"]} == refs(*opened)
            overview = await port.look("overview")
            assert overview["states"] == {"live": 12}
            assert overview["events_sent"] == 12
            assert overview["changes_received"] == 1
            assert overview["slot"]["retained_bytes"] >= 0
            collections = {row["name"]: row for row in (await port.look("collections"))["rows"]}
            assert collections["posts"]["subscriptions"] == 12
        async with asyncio.timeout(30):
            while sum(w["connections"] for w in (await port.look("overview"))["workers"]):
                await asyncio.sleep(0.05)
        assert (await port.refused("nothing"))["message"] == "there is no such view"
