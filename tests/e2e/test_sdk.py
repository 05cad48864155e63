"""The official JavaScript SDK, unchanged, against the running program."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.sdk import DEADLINE, EVENT_SOURCES, Sdk, SdkError, sdk
from tests.e2e.service import SCHEMA, service, token
from tests.realtime import subscribe

each_library = pytest.mark.parametrize("library", EVENT_SOURCES)


def received(client: Sdk) -> list[tuple[str, str]]:
    return [(event["action"], event["record"]["id"]) for event in client.events]


PUBLICATION = "CREATE PUBLICATION pgrealtime FOR TABLE users, posts;"


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_each_client_receives_what_it_may_see_and_nothing_else(
    plugin: str, database_url: str, tmp_path: Path
) -> None:
    """Two users and a guest; rows written by plain SQL; a commit of a thousand rows in order."""
    async with (
        service(
            database_url,
            tmp_path,
            schema=SCHEMA + PUBLICATION,
            sections={"replication": {"plugin": plugin}},
        ) as running,
        sdk(running.url) as ann,
        sdk(running.url) as bob,
        sdk(running.url) as guest,
    ):
        await ann.do("token", token=token("ann"))
        await bob.do("token", token=token("bob"))
        for client in (ann, bob, guest):
            await client.do("subscribe", collection="posts", topic="*")
        write = running.write
        cursor = await write.execute(
            "SELECT plugin FROM pg_replication_slots WHERE database = current_database()"
        )
        assert await cursor.fetchall() == [(plugin,)]
        await write.execute(
            "INSERT INTO posts (id, title, author, public) VALUES"
            " ('p1', 'all', 'ann', true), ('p2', 'ann''s', 'ann', false),"
            " ('p3', 'bob''s', 'bob', false), ('p4', 'nobody''s', NULL, false)"
        )
        await write.execute("UPDATE posts SET public = false WHERE id = 'p1'")
        await write.execute("UPDATE posts SET title = 'seen' WHERE id = 'p2'")
        await write.execute("DELETE FROM posts WHERE id IN ('p2', 'p3', 'p4')")
        async with write.transaction():
            await write.execute(
                "INSERT INTO posts (id, title, author, n) SELECT 'n' || i, 'x',"
                " CASE WHEN i % 2 = 0 THEN 'ann' ELSE 'bob' END, i FROM generate_series(1, 1000) i"
            )
        await write.execute("INSERT INTO posts (id, title, public) VALUES ('end', 'e', true)")
        for client, count in ((ann, 505 + 1), (bob, 503 + 1), (guest, 2)):
            await client.wait_for(count)

    evens = [("create", f"n{i}") for i in range(2, 1001, 2)]
    odds = [("create", f"n{i}") for i in range(1, 1001, 2)]
    last = [("create", "end")]
    assert received(ann) == [
        ("create", "p1"),
        ("create", "p2"),
        ("update", "p1"),
        ("update", "p2"),
        ("delete", "p2"),
        *evens,
        *last,
    ]
    assert received(bob) == [("create", "p1"), ("create", "p3"), ("delete", "p3"), *odds, *last]
    assert received(guest) == [("create", "p1"), *last]


async def test_a_rolled_back_transaction_is_never_received(
    database_url: str, tmp_path: Path
) -> None:
    async with service(database_url, tmp_path) as running, sdk(running.url) as guest:
        await guest.do("subscribe", collection="posts", topic="*")
        insert = "INSERT INTO posts (id, title, public) VALUES (%s, 'x', true)"
        async with running.write.transaction(force_rollback=True):
            await running.write.execute(insert, ["gone"])
        await running.write.execute(insert, ["kept"])
        await guest.wait_for(1)

    assert received(guest) == [("create", "kept")]


async def test_one_record_is_received_by_its_id_before_it_exists_and_after_its_delete(
    database_url: str, tmp_path: Path
) -> None:
    async with service(database_url, tmp_path) as running, sdk(running.url) as guest:
        await guest.do("subscribe", collection="posts", topic="one")
        for statement in (
            "INSERT INTO posts (id, title, public) VALUES ('one', 'a', true), ('two', 'b', true)",
            "UPDATE posts SET title = 'c'",
            "DELETE FROM posts",
            "INSERT INTO posts (id, title, public) VALUES ('one', 'again', true)",
        ):
            await running.write.execute(statement.encode())
        await guest.wait_for(4)

    assert received(guest) == [
        ("create", "one"),
        ("update", "one"),
        ("delete", "one"),
        ("create", "one"),
    ]


async def test_unsubscribing_works_in_its_three_forms(database_url: str, tmp_path: Path) -> None:
    async with service(database_url, tmp_path) as running, sdk(running.url) as guest:

        async def subscribe_to_all() -> None:
            for topic in ("a", "b", "*"):
                await guest.do("subscribe", collection="posts", topic=topic)
            # Keeps the connection when nothing else is left.
            await guest.do("subscribe", collection="users", topic="x")

        async def names_of_an_update(expected: int) -> list[str]:
            before = len(guest.events)
            await running.write.execute("UPDATE posts SET n = n + 1 WHERE id = 'a'")
            await running.write.execute(
                "INSERT INTO posts (id, title, public) VALUES"
                " (gen_random_uuid()::text, 'mark', true)"
            )
            found = await guest.wait_for(before + expected)
            return sorted(event["as"] for event in found[before:])

        await running.write.execute(
            "INSERT INTO posts (id, title, public) VALUES ('a', 'x', true), ('b', 'x', true)"
        )
        await subscribe_to_all()
        assert await names_of_an_update(3) == ["*", "*", "a"]
        await guest.do("unsubscribe", collection="posts", topic="a")
        assert await names_of_an_update(2) == ["*", "*"]
        await guest.do("unsubscribe", collection="posts", topic="*")
        await guest.do("subscribe", collection="posts", topic="a")
        assert await names_of_an_update(1) == ["a"]
        await guest.do("unsubscribe", collection="posts")
        before = len(guest.events)
        await running.write.execute("UPDATE posts SET n = n + 1")
        await guest.do("subscribe", collection="posts", topic="*")
        await running.write.execute("UPDATE posts SET n = n + 1 WHERE id = 'b'")
        found = await guest.wait_for(before + 1)

    assert [event["record"]["id"] for event in found[before:]] == ["b"]


async def test_values_arrive_in_pocketbase_s_form(database_url: str, tmp_path: Path) -> None:
    """Text, number, boolean, timestamp, json, uuid, enum, array; NULL as null."""
    async with service(database_url, tmp_path) as running, sdk(running.url) as guest:
        await guest.do("subscribe", collection="posts", topic="*")
        await running.write.execute(
            "INSERT INTO posts VALUES ('v', E'é \"<\"\\n\\u0085 \\u2028 id:',"
            " NULL, true, 42, '{\"b\": [1, 2.50]}',"
            " '{a,\"b c\",NULL}', 'loud', 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11',"
            " '2024-02-03 04:05:06.789999+02', NULL)"
        )
        (event,) = await guest.wait_for(1)

    record = event["record"]
    assert record.pop("collectionId").startswith("pbc_")
    assert record == {
        "collectionName": "posts",
        "id": "v",
        "title": 'é "<"\n\x85 \u2028 id:',
        "author": None,
        "public": True,
        "n": 42,
        "meta": {"b": [1, 2.5]},
        "tags": ["a", "b c", None],
        "mood": "loud",
        "ref": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
        "at": "2024-02-03 02:05:06.789Z",
        "note": None,
    }


async def test_options_reach_the_rule_and_the_listener(database_url: str, tmp_path: Path) -> None:
    rule = "title = @request.query.title && note = @request.headers.x_note"
    collections = {"posts": {"table": "posts", "list_rule": rule}}
    async with (
        service(database_url, tmp_path, collections=collections) as running,
        sdk(running.url) as guest,
    ):
        options = {"query": {"title": "a"}, "headers": {"x-note": "n"}}
        await guest.do("subscribe", collection="posts", topic="*", options=options)
        await running.write.execute(
            "INSERT INTO posts (id, title, note) VALUES ('1', 'b', 'n'), ('2', 'a', 'm'),"
            " ('3', 'a', 'n')"
        )
        await guest.wait_for(1)

    assert received(guest) == [("create", "3")]


async def test_filter_fields_and_expand_shape_what_a_listener_gets(
    database_url: str, tmp_path: Path
) -> None:
    """A topic with different options is different topics, each with events of its own."""
    open_rules = {"list_rule": "", "view_rule": ""}
    collections = {
        "users": {"table": "users", "type": "auth", **open_rules},
        "posts": {"table": "posts", **open_rules},
    }
    async with (
        service(database_url, tmp_path, collections=collections) as running,
        sdk(running.url) as guest,
    ):
        for name, options in (
            ("few", {"filter": "n >= 2", "fields": "id,n"}),
            ("author", {"expand": "author", "fields": "id,expand.author.name"}),
            ("both", {"filter": "author.name ~ 'ann'", "expand": "author", "fields": "id"}),
        ):
            await guest.do(
                "subscribe", collection="posts", topic="*", options=options, **{"as": name}
            )
        await running.write.execute(
            "INSERT INTO posts (id, title, author, n) VALUES"
            " ('1', 'x', 'ann', 1), ('2', 'x', 'bob', 2), ('3', 'x', NULL, 3)"
        )
        await guest.wait_for(6)

    def records(name: str) -> list[dict[str, Any]]:
        return [event["record"] for event in guest.events if event["as"] == name]

    assert records("few") == [{"id": "2", "n": 2}, {"id": "3", "n": 3}]
    assert records("author") == [
        {"id": "1", "expand": {"author": {"name": "Ann"}}},
        {"id": "2", "expand": {"author": {"name": "Bob"}}},
        {"id": "3", "expand": {}},  # as in PocketBase: the relation exists and is empty
    ]
    assert records("both") == [{"id": "1"}]


async def test_one_of_two_listeners_leaves_and_the_other_goes_on(
    database_url: str, tmp_path: Path
) -> None:
    """By the function that subscribe() returned: unsubscribeByTopicAndListener."""
    insert = "INSERT INTO posts (id, title, public) VALUES (%s, 'x', true)"
    async with service(database_url, tmp_path) as running, sdk(running.url) as guest:
        for name in ("first", "second"):
            await guest.do("subscribe", collection="posts", topic="*", **{"as": name})
        await running.write.execute(insert, ["both"])
        await guest.wait_for(2)
        await guest.do("leave", **{"as": "first"})
        await running.write.execute(insert, ["one"])
        events = await guest.wait_for(3)

    assert [(event["as"], event["record"]["id"]) for event in events] == [
        ("first", "both"),
        ("second", "both"),
        ("second", "one"),
    ]


async def test_the_realtime_service_unsubscribes_by_topic_prefix_and_wholly(
    database_url: str, tmp_path: Path
) -> None:
    """Without a subscription the SDK closes its connection, and the program forgets it at once."""
    async with service(database_url, tmp_path) as running, sdk(running.url) as guest:

        async def names_of_an_update() -> list[str]:
            """Return what is received before the mark's event."""
            before = len(guest.events)
            async with running.write.transaction():
                await running.write.execute("UPDATE posts SET n = n + 1 WHERE id = 'a'")
                await running.write.execute("UPDATE posts SET n = n + 1 WHERE id = 'mark'")
            await wait_until(lambda: "mark" in [e["as"] for e in guest.events[before:]], guest)
            return sorted(e["as"] for e in guest.events[before:] if e["record"]["id"] == "a")

        await running.write.execute(
            "INSERT INTO posts (id, title, public) VALUES ('a', 'x', true), ('mark', 'x', true)"
        )
        await guest.do("disconnects")
        for topic in ("*", "a", "mark"):
            await guest.do("subscribe", collection="posts", topic=topic)
        options = {"query": {"k": "v"}}
        await guest.do("subscribe", collection="posts", topic="a", options=options, **{"as": "k"})
        await guest.do("is_connected")
        (connected,) = await guest.wait_for(1, "connected")
        assert await names_of_an_update() == ["*", "a", "k"]
        await guest.do("unsubscribe_prefix", prefix="posts/a?options=")
        assert await names_of_an_update() == ["*", "a"]
        await guest.do("unsubscribe_topic", topic="posts/*")
        assert await names_of_an_update() == ["a"]
        await guest.do("unsubscribe_prefix", prefix="posts/a")
        assert await names_of_an_update() == []
        assert guest.of("disconnect") == []
        await guest.do("unsubscribe_topic")
        (disconnected,) = await guest.wait_for(1, "disconnect")
        await guest.do("is_connected")
        gone = await guest.wait_for(2, "connected")
        async with asyncio.timeout(DEADLINE):
            while await subscribe(running.address, connected["id"], "posts/*") != 404:
                await asyncio.sleep(0.01)  # the socket's end is on its way

    assert (connected["is"], gone[-1]["is"]) == (True, False)
    assert disconnected["topics"] == []


async def wait_until(holds: Callable[[], bool], client: Sdk) -> None:
    """Return once the reports satisfy the condition."""
    async with asyncio.timeout(DEADLINE):
        while not holds():
            await client.wait_for(len(client.events) + 1)


async def test_the_sdk_reports_a_lost_connection_and_the_next(
    database_url: str, tmp_path: Path
) -> None:
    """OnDisconnect names the active subscriptions; all are submitted anew under a new client id."""
    async with service(database_url, tmp_path) as running, sdk(running.url) as guest:
        await guest.do("disconnects")
        await guest.do("connects")
        await guest.do("subscribe", collection="posts", topic="*")
        await guest.do("subscribe", collection="posts", topic="one")
        await running.stop()
        (lost,) = await guest.wait_for(1, "disconnect")
        await guest.do("is_connected")
        await running.start()
        connects = await guest.wait_for(2, "connect")
        await guest.do("is_connected")
        states = await guest.wait_for(2, "connected")
        await running.write.execute(
            "INSERT INTO posts (id, title, public) VALUES ('one', 'x', true)"
        )
        events = await guest.wait_for(2)

    assert lost["topics"] == ["PB_CONNECT", "posts/*", "posts/one"]
    assert [state["is"] for state in states] == [False, True]
    assert states[1]["id"] == connects[1]["clientId"] != connects[0]["clientId"]
    assert sorted(event["as"] for event in events) == ["*", "one"]


@each_library
async def test_the_sdk_comes_back_after_a_restart_of_the_program(
    library: str, database_url: str, tmp_path: Path
) -> None:
    """With each EventSource library that users install for it."""
    async with service(database_url, tmp_path) as running, sdk(running.url, library) as guest:
        await guest.do("connects")
        await guest.do("subscribe", collection="posts", topic="*")
        await running.stop()
        await running.start()
        await guest.wait_for(2, "connect")
        await guest.do("subscribe", collection="users", topic="x")
        await running.write.execute("INSERT INTO posts (id, title, public) VALUES ('1', 'a', true)")
        await guest.wait_for(1)

    assert received(guest) == [("create", "1")]


async def test_another_user_on_the_same_connection_is_refused(
    database_url: str, tmp_path: Path
) -> None:
    async with service(database_url, tmp_path) as running, sdk(running.url) as client:
        await client.do("token", token=token("ann"))
        await client.do("subscribe", collection="posts", topic="*")
        await client.do("token", token=token("bob"))
        with pytest.raises(SdkError) as refused:
            await client.do("subscribe", collection="posts", topic="x")

    assert refused.value.status == 403
