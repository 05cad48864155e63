"""SIGHUP: a new configuration under open connections, and changes of the schema."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import yaml

from pgrealtime.auth.token import make_login_token
from pgrealtime.collections.model import derive_collection_id
from tests.conformance.http_client import EventStream, Request
from tests.e2e.listener import ANYBODY, Listener, Message, listener
from tests.e2e.sdk import sdk
from tests.e2e.service import SECRET, Service, service, token

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, name text, email text, password_hash text);
CREATE TABLE posts (id text PRIMARY KEY, title text, n int);
CREATE TABLE notes (id text PRIMARY KEY, title text);
CREATE TABLE marks (id text PRIMARY KEY);
INSERT INTO users (id) VALUES ('ann');
"""

OPEN = {"list_rule": "", "view_rule": ""}
POSTS = {"table": "posts", **OPEN}
NOTES = {"table": "notes", **OPEN}
MARKS = {"table": "marks", **OPEN}
"""A collection whose event marks that everything before has arrived."""

POOL_SIZE = 8
"""Pooled connections, which may be open at one time and not at another."""


@pytest.fixture(params=["temporary", "durable"])
def slot(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with both kinds.

    A new stream is opened along with the old one, or replaces it.
    """
    kind: str = request.param
    if kind == "durable":
        monkeypatch.setenv("PGREALTIME_REPLICATION__SLOT__DURABLE", "true")
        monkeypatch.setenv("PGREALTIME_REPLICATION__SLOT__ALLOW_UNLIMITED_WAL", "true")
        monkeypatch.setenv("PGREALTIME_REPLICATION__SLOT__NAME", f"reload_{uuid4().hex}")
    return kind


either_slot = pytest.mark.usefixtures("slot")


def rewrite(running: Service, collections: Mapping[str, Any], **sections: Any) -> None:
    settings = yaml.safe_load(running._config.read_text())
    settings |= {"collections": {**collections, "marks": MARKS}, **sections}
    running._config.write_text(yaml.safe_dump(settings))


async def reload(running: Service, collections: Mapping[str, Any], **sections: Any) -> None:
    rewrite(running, collections, **sections)
    assert await running.process.reload(), running.process.output()


def serving(database_url: str, directory: Path, collections: Mapping[str, Any], **sections: Any):  # type: ignore[no-untyped-def]  # noqa: ANN201 (as service)
    return service(
        database_url,
        directory,
        collections={**collections, "marks": MARKS},
        sections=sections,
        schema=SCHEMA,
    )


async def received(to: Listener, running: Service, *statements: str) -> list[str]:
    """Run the statements; return what was received of them, as ``action collection/id``."""
    for statement in statements:
        await running.write.execute(statement.encode())
    await running.write.execute("INSERT INTO marks VALUES (gen_random_uuid()::text)")
    messages: list[Message] = []
    while not messages or messages[-1].event != "marks/*":
        messages += await to.take(1)
    return [described(one) for one in messages[:-1]]


def described(message: Message) -> str:
    if message.event == "PB_RESYNC":
        return f"{message.data['reason']} {' '.join(message.data['collections'])}"
    record = message.data["record"]
    return f"{message.data['action']} {record['collectionName']}/{record['id']}"


async def test_a_rule_changes_under_an_open_connection(database_url: str, tmp_path: Path) -> None:
    """It applies from the next event on, and the official SDK sees no other effect."""
    async with (
        serving(database_url, tmp_path, {"posts": {"table": "posts"}}) as running,
        sdk(running.url) as guest,
    ):
        await guest.do("connects")
        for collection in ("posts", "marks"):
            await guest.do("subscribe", collection=collection, topic="*")
        seen = []
        for number, rule in enumerate((None, "", "n > 3", "n > 1", None, "")):
            await reload(running, {"posts": {"table": "posts", "list_rule": rule}})
            await running.write.execute(f"INSERT INTO posts VALUES ('p{number}', 't', {number})")
            await running.write.execute("INSERT INTO marks VALUES (gen_random_uuid()::text)")
            seen += [rule] if rule in {"", "n > 1"} else []
            await guest.wait_for(number + 1 + len(seen))
        connects = [one for one in guest.reports if one["report"] == "connect"]

    ids = [e["record"]["id"] for e in guest.events if e["record"]["collectionName"] == "posts"]
    assert ids == ["p1", "p3", "p5"]
    assert len(connects) == 1


async def test_a_configuration_with_problems_changes_nothing(
    database_url: str, tmp_path: Path
) -> None:
    """The log has all problems, with file and line; the configuration in force stays."""
    bad = {
        "posts": {"table": "posts", "list_rule": "titel = 1"},
        "notes": {"table": "nots", "list_rule": ""},
    }
    async with (
        serving(database_url, tmp_path, {"posts": POSTS}) as running,
        listener(running.address, "posts/*", "notes/*", "marks/*") as guest,
    ):
        rewrite(running, bad)
        assert not await running.process.reload()
        (rejected,) = running.process.logged("config.rejected")
        running._config.write_text("collections: [")
        assert not await running.process.reload()
        running._config.unlink()
        assert not await running.process.reload()
        found = await received(guest, running, "INSERT INTO posts VALUES ('1')")

    text = "\n".join(rejected["problems"])
    assert "collections.posts.list_rule" in text
    assert "collections.notes.table" in text
    assert f"{running._config}:" in text
    assert found == ["create posts/1"]


@either_slot
async def test_collections_come_and_go_under_submitted_topics(
    database_url: str, tmp_path: Path
) -> None:
    """Events of a new collection begin, those of a removed one stop.

    A renamed one matches by its id only.
    """
    insert = ("INSERT INTO posts VALUES ('{}')", "INSERT INTO notes VALUES ('{}')")
    fixed = {**NOTES, "collection_id": "pbc_fixed"}
    topics = ("posts/*", "notes/*", "pbc_fixed/*", "letters/*", "notes/2", "marks/*")

    def both(record_id: int) -> list[str]:
        return [statement.format(record_id) for statement in insert]

    async with (
        serving(database_url, tmp_path, {"posts": POSTS}) as running,
        listener(running.address, *topics) as guest,
    ):
        assert await received(guest, running, *both(1)) == ["create posts/1"]
        await reload(running, {"posts": POSTS, "notes": fixed})
        assert await received(guest, running, *both(2)) == ["create posts/2"] + 3 * [
            "create notes/2"
        ]
        await reload(running, {"letters": fixed})
        assert await received(guest, running, *both(3)) == 2 * ["create letters/3"]
        await reload(running, {"posts": POSTS})
        assert await received(guest, running, *both(4)) == ["create posts/4"]


@pytest.mark.timeout(300)
async def test_many_reloads_under_load_lose_nothing_and_leave_nothing(
    database_url: str, tmp_path: Path, slot: str
) -> None:
    """Every other reload adds or removes a table, and so changes the stream."""
    reloads = 100 if slot == "temporary" else 30  # which reads what is kept anew each time
    is_over = asyncio.Event()
    written: list[str] = []

    async def write() -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as own:
            while not is_over.is_set():
                record_id = f"{len(written):06}"
                await own.execute("INSERT INTO posts VALUES (%s, 't', 1)", [record_id])
                written.append(record_id)

    def open_files(running: Service) -> int:
        return len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))

    rules = ("", "title = 't'", "n = 1 && title != 'x'")
    async with (
        serving(database_url, tmp_path, {"posts": POSTS}) as running,
        listener(running.address, "posts/*", "notes/*", "marks/*") as guest,
        listener(running.address, "posts/*", "marks/*", "PB_CURSOR") as resumable,
    ):
        await reload(running, {"posts": POSTS, "notes": NOTES})
        before = open_files(running)
        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            for number in range(reloads):
                rule = {"table": "posts", "list_rule": rules[number % 3]}
                more = {"notes": NOTES} if number % 2 else {}
                await reload(running, {"posts": rule, **more})
            is_over.set()
        found = await received(guest, running)
        positions = [m for m in await resumable.take(len(written)) if m.event == "posts/*"]
        while len(positions) < len(written):
            positions += [m for m in await resumable.take(1) if m.event == "posts/*"]
        after = open_files(running)
        slots = await (
            await running.write.execute(
                "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
            )
        ).fetchone()
        assert not running.process.logged("replication.gap")

    assert found == [f"create posts/{record_id}" for record_id in written]
    assert [one.data["record"]["id"] for one in positions] == written
    assert slots == (1,)
    assert after <= before + POOL_SIZE


@either_slot
@pytest.mark.parametrize("change", ["another table", "another column"])
async def test_a_position_of_before_the_reload_is_still_good(
    database_url: str, tmp_path: Path, change: str
) -> None:
    """Another stream is read since; what was missed is delivered nevertheless."""
    more = {"notes": NOTES} if change == "another table" else {}
    async with serving(database_url, tmp_path, {"posts": POSTS}) as running:
        async with listener(running.address, "posts/*", "PB_CURSOR", "marks/*") as first:
            await running.write.execute("INSERT INTO posts VALUES ('1')")
            position = ""
            while not position:
                message = (await first.take(1))[0]
                position = message.id if message.event == "posts/*" else ""
        await running.write.execute("INSERT INTO posts VALUES ('2')")
        if not more:
            await running.write.execute("ALTER TABLE posts ADD COLUMN extra text")
        await reload(running, {"posts": POSTS, **more})
        await running.write.execute("INSERT INTO posts VALUES ('3')")
        request = Request(method="GET", path="/api/realtime", headers={"Last-Event-ID": position})
        stream = await EventStream.open(request, running.address, "returning")
        try:
            returning = Listener(stream, running.address, ANYBODY)
            (connect,) = await returning.take(1)
            returning.client_id = connect.data["clientId"]
            assert await returning.subscribe("posts/*", "marks/*") == 204
            found = await received(returning, running)
        finally:
            await stream.close()

    assert found == ["create posts/2", "create posts/3"]


@either_slot
async def test_under_pgoutput_the_publication_comes_first(
    database_url: str, tmp_path: Path
) -> None:
    """The log has the SQL; until it was run nothing changes, afterwards nothing is missed."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin:
        await admin.execute("CREATE TABLE posts (id text PRIMARY KEY, title text, n int)")
        await admin.execute("CREATE TABLE marks (id text PRIMARY KEY)")
        await admin.execute("CREATE PUBLICATION pgrealtime FOR TABLE posts, marks")
    async with (
        service(
            database_url,
            tmp_path,
            collections={"posts": POSTS, "marks": MARKS},
            sections={"replication": {"plugin": "pgoutput"}},
            schema="CREATE TABLE notes (id text PRIMARY KEY)",
        ) as running,
        listener(running.address, "posts/*", "notes/*", "marks/*") as guest,
    ):
        rewrite(running, {"posts": POSTS, "notes": NOTES})
        assert not await running.process.reload()
        (rejected,) = running.process.logged("config.rejected")
        both = ("INSERT INTO posts VALUES ('1')", "INSERT INTO notes VALUES ('1')")
        assert await received(guest, running, *both) == ["create posts/1"]
        (problem,) = rejected["problems"]
        await running.write.execute(problem.partition("superuser: ")[2].encode())
        assert await received(guest, running, "INSERT INTO posts VALUES ('2')") == [
            "create posts/2"
        ]
        assert await running.process.reload()
        both = ("INSERT INTO posts VALUES ('3')", "INSERT INTO notes VALUES ('3')")
        assert await received(guest, running, *both) == ["create posts/3", "create notes/3"]
        assert not running.process.logged("replication.gap")


async def test_what_the_publication_lacks_is_a_gap_and_notified_again_when_it_has_it(
    database_url: str, tmp_path: Path
) -> None:
    """The stream itself reports nothing of a table that was removed from the publication."""
    schema = (
        "CREATE TABLE posts (id text PRIMARY KEY); CREATE TABLE marks (id text PRIMARY KEY);"
        " CREATE PUBLICATION pgrealtime FOR TABLE posts, marks"
    )
    resync = {"collections": ["posts"], "reason": "schema"}
    async with (
        service(
            database_url,
            tmp_path,
            collections={"posts": POSTS, "marks": MARKS},
            sections={"replication": {"plugin": "pgoutput"}},
            schema=schema,
        ) as running,
        listener(running.address, "posts/*", "PB_RESYNC", "marks/*") as guest,
    ):
        assert await running.process.reload()
        await running.write.execute("ALTER PUBLICATION pgrealtime DROP TABLE posts")
        await running.write.execute("INSERT INTO posts VALUES ('1')")
        for _ in range(2):
            assert await running.process.reload()
        (message,) = await guest.take(1)
        assert (message.event, message.data) == ("PB_RESYNC", resync)
        (said,) = running.process.logged("publication.rejected")
        assert await received(guest, running, said["hint"].partition("superuser: ")[2]) == []
        assert await running.process.reload()
        (message,) = await guest.take(1)
        assert (message.event, message.data) == ("PB_RESYNC", resync)
        insert = "INSERT INTO posts VALUES ('2')"
        assert await received(guest, running, insert) == ["create posts/2"]

    assert said["detail"] == 'It lacks "public.posts".'


async def test_a_caller_with_a_token_of_another_secret_is_a_guest(
    database_url: str, tmp_path: Path
) -> None:
    """At once, on the open connection; the former secret may stay valid by configuration."""
    mine = {"users": {"table": "users", "type": "auth", "list_rule": "id = @request.auth.id"}}
    update = "UPDATE users SET name = gen_random_uuid()::text"
    new = {"name": "app", "secret": "another secret, also of more than thirty-two bytes"}
    async with (
        serving(database_url, tmp_path, mine) as running,
        listener(running.address, "users/*", "marks/*", token=token("ann")) as ann,
    ):
        assert await received(ann, running, update) == ["update users/ann"]
        both = {"issuers": [{**new, "previous_secret": SECRET}]}
        await reload(running, mine, auth=both)
        assert await received(ann, running, update) == ["update users/ann"]
        await reload(running, mine, auth={"issuers": [new]})
        assert await received(ann, running, update) == []
        assert await ann.subscribe("users/*", "marks/*", token=token("ann")) == 204
        assert await received(ann, running, update) == []


async def test_a_caller_that_signed_in_under_another_auth_rule_is_a_guest(
    database_url: str, tmp_path: Path
) -> None:
    """PocketBase signs out all users of the collection then."""
    users = {
        "table": "users",
        "type": "auth",
        "list_rule": "id = @request.auth.id",
        "login": {"password_hash": "password_hash"},
    }
    login = {"login": {"enabled": True, "secret": SECRET}}
    key = make_login_token(
        collection_id=derive_collection_id("auth", "users"),
        record_id="ann",
        signing_key="a hash" + SECRET,
        expires_at=int(time.time()) + 1000,
    )
    update = "UPDATE users SET name = gen_random_uuid()::text"
    async with serving(database_url, tmp_path, {"users": users}, auth=login) as running:
        await running.write.execute("UPDATE users SET password_hash = 'a hash'")
        async with listener(running.address, "users/*", "marks/*", token=key) as ann:
            assert await received(ann, running, update) == ["update users/ann"]
            await reload(running, {"users": {**users, "auth_rule": "name != ''"}}, auth=login)
            assert await received(ann, running, update) == []


async def test_a_table_that_rules_may_not_read_is_named(database_url: str, tmp_path: Path) -> None:
    """At start and at each reload, with the SQL that permits it.

    The collection isn't served meanwhile.
    """
    role = f"reader_{uuid4().hex}"
    query_url = database_url.replace("postgres@", f"{role}@")
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN".encode())
        try:
            sections = {"database": {"query_url": query_url}}
            async with serving(database_url, tmp_path, {"posts": POSTS}, **sections) as running:
                found = running.process.logged("table.unreadable")
                for one in found:
                    admin.execute(one["hint"].encode())
                await reload(running, {"posts": POSTS})
                again = running.process.logged("table.unreadable")[len(found) :]
        finally:
            admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())

    assert [one["code"] for one in found] == ["select_not_granted"] * 2
    assert {one["reason"].split('"')[3] for one in found} == {"public.posts", "public.marks"}
    assert again == []


async def test_sections_that_need_a_restart_are_named(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, tmp_path, {"posts": POSTS}) as running:
        port = running.address.port
        server = {"host": "127.0.0.1", "port": port + 1}
        await reload(running, {"posts": POSTS}, server=server, records={"nulls": "zero"})
        (said,) = running.process.logged("config.restart_needed")

    assert said["sections"] == ["server", "records"]


# -- the schema


@pytest.mark.parametrize("change", ["DROP COLUMN n", "RENAME COLUMN n TO m"])
async def test_a_column_that_is_gone_locks_what_needs_it_and_nothing_else(
    database_url: str, tmp_path: Path, change: str
) -> None:
    """The log reports the cause once; with the column restored everything is as before."""
    ruled = {"table": "posts", "list_rule": "n > 0", "view_rule": "n > 0"}
    create = ("INSERT INTO posts (id) VALUES ('{}')", "INSERT INTO notes VALUES ('{}')")
    async with (
        serving(database_url, tmp_path, {"posts": ruled, "notes": NOTES}) as running,
        listener(running.address, "posts/*", "notes/*", "marks/*", "PB_RESYNC") as guest,
    ):
        await running.write.execute(f"ALTER TABLE posts {change}".encode())
        found = await received(guest, running, *(one.format(1) for one in create))
        # A row that lacks what the rule needs can't be evaluated, which may be a gap.
        assert set(found) - {"unknown posts"} == {"create notes/1"}
        await running.process.wait_logged("schema.changed")
        found = await received(guest, running, *(one.format(2) for one in create))
        assert set(found) - {"unknown posts"} == {"create notes/2"}
        said = running.process.logged("rule.rejected")
        await running.write.execute("ALTER TABLE posts ADD COLUMN n int DEFAULT 1")
        assert await running.process.reload()
        (gap,) = await guest.take(1)
        found = await received(guest, running, *(one.format(3) for one in create))
        assert found == ["create posts/3", "create notes/3"]

    # What was committed while it was locked reached no subscriber.
    assert (gap.event, gap.data) == ("PB_RESYNC", {"collections": ["posts"], "reason": "schema"})
    assert [(one["collection"], one["path"]) for one in said] == [
        ("posts", "collections.posts.list_rule"),
        ("posts", "collections.posts.view_rule"),
    ]


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
async def test_an_added_column_is_not_taken_for_another(
    database_url: str, tmp_path: Path, identity: str
) -> None:
    """Until the catalogue is read again, rows have as many columns as before, but others."""
    ruled = {"table": "posts", "list_rule": "title != ''"}
    async with serving(database_url, tmp_path, {"posts": POSTS}) as running:
        for statement in (
            f"ALTER TABLE posts REPLICA IDENTITY {identity}",
            "ALTER TABLE posts ALTER title SET STORAGE EXTERNAL",
            "INSERT INTO posts VALUES ('1', repeat('x', 10000), 1)",
        ):
            await running.write.execute(statement.encode())
        await reload(running, {"posts": ruled})
        async with listener(running.address, "posts/*", "PB_RESYNC") as guest:
            await running.write.execute("ALTER TABLE posts ADD COLUMN more text")
            await running.write.execute("UPDATE posts SET n = 2")
            (message,) = await guest.take(1)

    assert message.event == "posts/*"
    assert message.data["record"]["title"] == "x" * 10000


async def test_an_added_column_is_shown_soon(database_url: str, tmp_path: Path) -> None:
    """The first row that contains it causes the catalogue to be read."""
    async with (
        serving(database_url, tmp_path, {"posts": POSTS}) as running,
        listener(running.address, "posts/*") as guest,
    ):
        await running.write.execute("ALTER TABLE posts ADD COLUMN more text DEFAULT 'm'")
        await running.write.execute("INSERT INTO posts VALUES ('1')")
        async with asyncio.timeout(10):
            await running.process.wait_logged("schema.changed")
        await running.write.execute("INSERT INTO posts VALUES ('2')")
        messages = await guest.take(2)

    assert [message.data["record"].get("more") for message in messages] == [None, "m"]


async def test_a_column_of_another_type_is_shown_and_asked_by_it(
    database_url: str, tmp_path: Path
) -> None:
    """Without a restart, and although statements were prepared for the former type."""
    mine = {"users": {"table": "users", "type": "auth", "list_rule": "id = @request.auth.id"}}
    update = "UPDATE users SET name = '{}'"
    topics = ("posts/*", "users/*", "marks/*", "PB_RESYNC")
    async with (
        serving(database_url, tmp_path, {"posts": POSTS, **mine}) as running,
        listener(running.address, *topics, token=token("ann")) as ann,
    ):
        for _ in range(20):  # psycopg prepares what comes oftener than five times
            assert await ann.subscribe(*topics, token=token("ann")) == 204
        # The first mismatch, in a call or a row, causes the catalogue to be read.
        await running.write.execute("ALTER TABLE users ALTER email TYPE varchar(90)")
        assert await ann.subscribe(*topics, token=token("ann")) == 500
        await running.process.wait_logged("schema.changed")
        await running.write.execute("ALTER TABLE posts ALTER n TYPE text")
        await running.write.execute("INSERT INTO posts VALUES ('1', 't', 'many')")
        (first,) = await ann.take(1)
        assert first.data["record"]["n"] == "many"
        await running.process.wait_logged("schema.changed", 2)
        assert await ann.subscribe(*topics, token=token("ann")) == 204
        await running.write.execute("INSERT INTO posts VALUES ('2', 't', 'few')")
        (message,) = await ann.take(1)
        assert message.data["record"]["n"] == "few"
        assert await received(ann, running, update.format("x")) == ["update users/ann"]


@either_slot
@pytest.mark.parametrize("kind", ["recreated", "partition"])
async def test_a_table_that_became_another_is_a_gap(
    database_url: str, tmp_path: Path, kind: str
) -> None:
    """Rows written until the stream switched may be missing: that is notified."""
    before = {
        "recreated": "SELECT 1",
        "partition": "DROP TABLE notes; CREATE TABLE notes (id text PRIMARY KEY)"
        " PARTITION BY LIST (id); CREATE TABLE notes_1 PARTITION OF notes FOR VALUES IN ('1')",
    }
    change = {
        "recreated": "DROP TABLE notes; CREATE TABLE notes (id text PRIMARY KEY)",
        "partition": "CREATE TABLE notes_2 PARTITION OF notes FOR VALUES IN ('2')",
    }
    async with serving(database_url, tmp_path, {"posts": POSTS}) as running:
        await running.write.execute(before[kind].encode())
        await reload(running, {"posts": POSTS, "notes": NOTES})
        async with (
            listener(running.address, "notes/*", "PB_RESYNC", "marks/*") as concerned,
            listener(running.address, "posts/*", "PB_RESYNC", "marks/*") as other,
        ):
            await running.write.execute(change[kind].encode())
            await reload(running, {"posts": POSTS, "notes": NOTES})
            (message,) = await concerned.take(1)
            assert message.event == "PB_RESYNC"
            assert message.data == {"collections": ["notes"], "reason": "schema"}
            insert = "INSERT INTO notes VALUES ('2')"
            assert await received(concerned, running, insert) == ["create notes/2"]
            assert await received(other, running) == []
