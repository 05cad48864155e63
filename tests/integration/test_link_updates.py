"""A row of a junction table that comes or goes is an update of the record that shows its id."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.listener import Caller, Listener, Message, listener
from tests.e2e.service import Service, service, token

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY);
CREATE TABLE posts (
  id int PRIMARY KEY, title text NOT NULL DEFAULT '', is_open boolean NOT NULL DEFAULT true,
  body text NOT NULL DEFAULT ''
);
ALTER TABLE posts ALTER body SET STORAGE EXTERNAL;
CREATE TABLE tags (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE post_tags (
  post_id int REFERENCES posts ON DELETE CASCADE, tag_id int REFERENCES tags ON DELETE CASCADE,
  position int NOT NULL DEFAULT 0, PRIMARY KEY (post_id, tag_id)
);
CREATE TABLE watchers (
  id serial PRIMARY KEY, post_id int REFERENCES posts ON DELETE CASCADE,
  user_id text REFERENCES users ON DELETE CASCADE
);
ALTER TABLE watchers REPLICA IDENTITY FULL;
CREATE TABLE stars (post_id int REFERENCES posts, user_id text, PRIMARY KEY (post_id, user_id));
CREATE TABLE ends (id int PRIMARY KEY);
INSERT INTO users VALUES ('ann'), ('bob');
INSERT INTO posts SELECT n, 'post ' || n, n < 4, repeat('long', 2000) FROM generate_series(1, 4) n;
INSERT INTO tags VALUES (1, 'one'), (2, 'two'), (3, 'three');
INSERT INTO post_tags VALUES (1, 1);
CREATE PUBLICATION pgrealtime FOR TABLE
  ONLY users, ONLY posts, ONLY tags, ONLY post_tags, ONLY watchers, ONLY stars, ONLY ends;
"""
FULL = "ALTER TABLE posts REPLICA IDENTITY FULL;"
RULE = "is_open = true || watchers.id ?= @request.auth.id"
COLLECTIONS: dict[str, Any] = {
    "users": {"table": "users", "type": "auth"},
    "posts": {
        "table": "posts",
        "relations": {
            "tags": {"collection": "tags", "through": "post_tags"},
            "watchers": {"collection": "users", "through": "watchers"},
            "stars": {
                "collection": "users",
                "through": "stars",
                "target": "user_id",
                "updates": False,
            },
        },
        "list_rule": RULE,
        "view_rule": RULE,
    },
    "tags": {"table": "tags", "list_rule": "", "view_rule": ""},
    "ends": {"table": "ends", "list_rule": ""},
}


@asynccontextmanager
async def running_service(
    database_url: str, directory: Path, more: str = "", **sections: Any
) -> AsyncIterator[Service]:
    async with service(
        database_url, directory, collections=COLLECTIONS, schema=SCHEMA + more, sections=sections
    ) as running:
        yield running


class Reader:
    """A listener, and what it hears up to a row that is written last."""

    def __init__(self, running: Service, received: Listener) -> None:
        self._running, self._received, self._end = running, received, 0

    async def after(self, *transactions: str) -> list[Message]:
        """Return what comes of some transactions."""
        for statements in transactions:
            async with self._running.write.transaction():
                await self._running.write.execute(statements.encode())
        return await self.rest()

    async def rest(self) -> list[Message]:
        self._end += 1
        end = id(self) % 2**20 * 1000 + self._end
        await self._running.write.execute("INSERT INTO ends VALUES (%s)", (end,))
        found: list[Message] = []
        while True:
            (message,) = await self._received.take(1)
            if not message.event.startswith("ends"):
                found.append(message)
            elif message.data["record"]["id"] == str(end):
                return found


def shown(messages: list[Message]) -> list[tuple[str, str, list[str], list[str]]]:
    """Return action, id, tags and watchers of records of posts."""
    return [
        (one.data["action"], record["id"], record["tags"], record["watchers"])
        for one in messages
        for record in [one.data["record"]]
    ]


@pytest.mark.parametrize(
    ("plugin", "more"), [("wal2json", ""), ("pgoutput", FULL)], ids=["key", "whole row"]
)
async def test_links_that_change_update_the_record_that_shows_them(
    database_url: str, tmp_path: Path, plugin: str, more: str
) -> None:
    """Once per transaction and record, with the ids after it, as whoever may see it then."""
    async with (
        running_service(database_url, tmp_path, more, replication={"plugin": plugin}) as running,
        listener(running.address, "posts/*", "ends/*", "PB_RESYNC") as first,
        listener(running.address, "posts/2", "ends/*") as second,
        listener(running.address, "posts/*", "ends/*", token=token("ann")) as third,
    ):
        guest, of_2, ann = (Reader(running, one) for one in (first, second, third))

        whole = await guest.after("INSERT INTO post_tags VALUES (1, 2)")
        assert shown(whole) == [("update", "1", ["1", "2"], [])]
        assert whole[0].data["record"]["title"] == "post 1"
        assert whole[0].data["record"]["body"] == "long" * 2000

        assert shown(await guest.after("DELETE FROM post_tags WHERE tag_id = 1")) == [
            ("update", "1", ["2"], [])
        ]
        # Several links of several relations in one transaction, some of them as before.
        assert shown(
            await guest.after(
                "INSERT INTO post_tags VALUES (1, 1), (2, 1); INSERT INTO post_tags VALUES (1, 3);"
                " INSERT INTO watchers (post_id, user_id) VALUES (1, 'bob')"
            )
        ) == [("update", "2", ["1"], []), ("update", "1", ["1", "2", "3"], ["bob"])]
        # A pair moves: both records change. Other columns of a pair are nobody's.
        assert shown(
            await guest.after(
                "UPDATE post_tags SET position = 7; UPDATE post_tags SET post_id = 2"
                " WHERE post_id = 1 AND tag_id = 3"
            )
        ) == [("update", "1", ["1", "2"], ["bob"]), ("update", "2", ["1", "3"], [])]
        # What the transaction wrote itself is not told twice.
        assert shown(
            await guest.after(
                "INSERT INTO post_tags VALUES (3, 1); UPDATE posts SET title = 'x' WHERE id = 3;"
                " INSERT INTO post_tags VALUES (3, 2)",
                "INSERT INTO posts (id) VALUES (5); INSERT INTO post_tags VALUES (5, 1)",
            )
        ) == [("update", "3", ["1", "2"], []), ("create", "5", ["1"], [])]
        deleted = await guest.after("DELETE FROM posts WHERE id = 5")
        # The rule reads a column, which the WAL has of an old row under the whole identity alone.
        assert shown(deleted) == ([("delete", "5", ["1"], [])] if more else [])
        # Where the relation says so, links are nobody's news.
        assert await guest.after("INSERT INTO stars VALUES (1, 'ann')") == []
        # A tag that goes takes its links along.
        assert shown(await guest.after("DELETE FROM tags WHERE id = 3")) == [
            ("update", "2", ["1"], [])
        ]
        # Whom the link itself admits hears of it.
        assert await guest.after("INSERT INTO watchers (post_id, user_id) VALUES (4, 'ann')") == []
        (*_, last) = shown(await ann.rest())
        assert last == ("update", "4", [], ["ann"])
        assert shown(await of_2.rest()) == [
            ("update", "2", ["1"], []),
            ("update", "2", ["1", "3"], []),
            ("update", "2", ["1"], []),
        ]
        (gap,) = await guest.after("TRUNCATE post_tags")
        assert (gap.event, gap.data["reason"]) == ("PB_RESYNC", "truncate")


async def test_links_of_records_that_are_written_again_at_once(
    database_url: str, tmp_path: Path
) -> None:
    """The record is shown as it was then; where the WAL doesn't say how, the next event has it."""
    commits = [
        f"BEGIN; INSERT INTO post_tags VALUES ({post}, {tag}); COMMIT;"
        f"BEGIN; UPDATE posts SET title = '{post} {tag}' WHERE id = {post}; COMMIT;"
        for post, tag in ((1, 2), (1, 3), (2, 1), (2, 2))
    ]
    removed = "BEGIN; INSERT INTO post_tags VALUES (3, 1); COMMIT; DELETE FROM posts WHERE id = 3;"
    async with (
        running_service(database_url, tmp_path, FULL) as running,
        listener(running.address, "posts/*", "ends/*", "PB_RESYNC") as first,
    ):
        guest = Reader(running, first)
        await running.write.execute("".join(commits).encode())
        heard = [
            (one.data["record"]["title"], one.data["record"]["tags"]) for one in await guest.rest()
        ]
        assert heard == [
            ("post 1", ["1", "2"]),
            ("1 2", ["1", "2"]),
            ("1 2", ["1", "2", "3"]),
            ("1 3", ["1", "2", "3"]),
            ("post 2", ["1"]),
            ("2 1", ["1"]),
            ("2 1", ["1", "2"]),
            ("2 2", ["1", "2"]),
        ]
        await running.write.execute("ALTER TABLE posts REPLICA IDENTITY DEFAULT")
        await running.write.execute("DELETE FROM post_tags")
        await guest.rest()
        await running.write.execute("".join(commits).encode())
        # Each version with its ids, and none of a later version before that.
        heard = [
            (one.data["record"]["title"], one.data["record"]["tags"]) for one in await guest.rest()
        ]
        versions = [("1 2", ["2"]), ("1 3", ["2", "3"]), ("2 1", ["1"]), ("2 2", ["1", "2"])]
        assert [one for one in heard if one in versions] == versions
        await running.write.execute(removed.encode())
        assert "PB_RESYNC" not in {one.event for one in await guest.rest()}


async def test_a_client_that_resumes_hears_of_links(database_url: str, tmp_path: Path) -> None:
    """From the changelog, in order with the rest, at whichever process it comes to."""
    async with (
        running_service(database_url, tmp_path, server={"workers": 2}) as running,
        listener(running.address, "ends/*", "PB_CURSOR") as first,
    ):
        (begin,) = await first.take(1)
        heard = await Reader(running, first).after(
            "INSERT INTO post_tags VALUES (2, 1)",
            "UPDATE posts SET title = 'y' WHERE id = 1",
            "INSERT INTO watchers (post_id, user_id) VALUES (2, 'bob'), (4, 'bob')",
        )
        assert {one.event for one in heard} <= {"PB_CURSOR"}
        caller = Caller(headers={"Last-Event-ID": begin.id})
        async with listener(
            running.address, "posts/*", "ends/*", token=token("bob"), caller=caller
        ) as resumed:
            messages = await Reader(running, resumed).rest()
            assert shown([one for one in messages if one.event.startswith("posts")]) == [
                ("update", "2", ["1"], []),
                ("update", "1", ["1"], []),
                ("update", "2", ["1"], ["bob"]),
                ("update", "4", [], ["bob"]),
            ]
