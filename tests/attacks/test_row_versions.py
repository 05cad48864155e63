"""An event never contains a later version's values, for callers that may not see that version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.listener import Caller, Listener, Message, listener
from tests.e2e.service import Service, service, token

SCHEMA = """
CREATE TABLE docs (
  id text PRIMARY KEY, title text NOT NULL, body text NOT NULL, owner text NOT NULL,
  public boolean NOT NULL,
  summary text GENERATED ALWAYS AS (left(body, 6)) STORED
);
ALTER TABLE docs ALTER body SET STORAGE EXTERNAL;
{more}
INSERT INTO docs (id, title, body, owner, public)
  SELECT n::text, 'old', repeat('openly', 2000), 'ann', true FROM generate_series(1, 60) n;
CREATE TABLE ends (id text PRIMARY KEY);
CREATE PUBLICATION pgrealtime FOR TABLE ONLY docs, ONLY ends;
"""
RULE = "public = true || owner = @request.auth.id"
COLLECTIONS = {
    "docs": {"table": "docs", "list_rule": RULE, "view_rule": RULE},
    "ends": {"table": "ends", "list_rule": ""},
}
ROUNDS = 30


async def write(running: Service, n: int, way: str) -> None:
    """Change a title; then, in another commit, make the row private and put a secret into it."""
    title = f"UPDATE docs SET title = 'new' WHERE id = '{n}'"
    secret = f"UPDATE docs SET public = false, body = repeat('SECRET', 2000) WHERE id = '{n}'"
    if way == "back to back":
        await running.write.execute(f"BEGIN; {title}; COMMIT; BEGIN; {secret}; COMMIT".encode())
    elif way == "one transaction":
        await running.write.execute(f"BEGIN; {title}; {secret}; COMMIT".encode())
    else:
        await running.write.execute(title.encode())
        await running.write.execute(secret.encode())


async def until_end(received: Listener) -> list[Message]:
    """Return what is received before the row that is inserted last."""
    found: list[Message] = []
    while True:
        (message,) = await received.take(1)
        if message.event.startswith("ends"):
            return [one for one in found if one.event != "PB_CURSOR"]
        found.append(message)


def records(messages: list[Message]) -> list[dict[str, Any]]:
    return [one.data["record"] for one in messages if one.event != "PB_RESYNC"]


@pytest.mark.parametrize("way", ["separate", "back to back", "one transaction"])
@pytest.mark.parametrize(
    ("plugin", "more"),
    [
        pytest.param("wal2json", "", id="wal2json"),
        pytest.param("pgoutput", "", id="pgoutput"),
        pytest.param(
            "pgoutput", "ALTER TABLE docs REPLICA IDENTITY FULL;", id="pgoutput, generated column"
        ),
    ],
)
async def test_a_secret_of_a_later_version_is_in_no_event_of_before(
    database_url: str, tmp_path: Path, plugin: str, more: str, way: str
) -> None:
    """That holds for events delivered at once, and for connections that resume later."""
    async with (
        service(
            database_url,
            tmp_path,
            collections=COLLECTIONS,
            sections={"replication": {"plugin": plugin}},
            schema=SCHEMA.format(more=more),
        ) as running,
        listener(running.address, "docs/*", "ends/*", "PB_CURSOR") as guest,
        listener(running.address, "docs/*", "ends/*", token=token("ann", sub="ann")) as owner,
    ):
        (first,) = await guest.take(1)
        assert first.event == "PB_CURSOR"
        for n in range(1, ROUNDS + 1):
            await write(running, n, way)
        await running.write.execute("INSERT INTO ends VALUES ('1')")

        live = await until_end(guest)
        back = Caller(headers={"Last-Event-ID": first.data["id"]})
        async with listener(running.address, "docs/*", "ends/*", caller=back) as returned:
            later = await until_end(returned)

        for received in (live, later):
            assert [one for one in received if "SECRET" in str(one.data)] == []
            titles = [one["title"] for one in records(received)]
            assert titles == ["new"] * ROUNDS
        whole = records(await until_end(owner))
        assert len(whole) == 2 * ROUNDS
        assert all("body" in one and "summary" in one for one in whole), "may see the row of now"


TAGGED = """
CREATE TABLE posts (id text PRIMARY KEY, title text NOT NULL, public boolean NOT NULL);
CREATE TABLE tags (id text PRIMARY KEY, label text NOT NULL);
CREATE TABLE post_tags (post text REFERENCES posts, tag text REFERENCES tags,
  PRIMARY KEY (post, tag));
CREATE TABLE ends (id text PRIMARY KEY);
INSERT INTO tags VALUES ('open', 'open'), ('SECRET', 'SECRET');
INSERT INTO posts SELECT n::text, 'old', true FROM generate_series(1, 40) n;
INSERT INTO post_tags SELECT n::text, 'open' FROM generate_series(1, 40) n;
CREATE PUBLICATION pgrealtime FOR TABLE ONLY posts, ONLY tags, ONLY post_tags, ONLY ends;
"""
TAGGED_COLLECTIONS: dict[str, dict[str, Any]] = {
    "posts": {
        "table": "posts",
        "list_rule": "public = true",
        "relations": {
            "tags": {
                "collection": "tags",
                "through": "public.post_tags",
                "source": "post",
                "target": "tag",
            }
        },
    },
    "tags": {"table": "tags", "list_rule": "", "view_rule": ""},
    "ends": {"table": "ends", "list_rule": ""},
}
EXPANDING = 'posts/*?options={"query":{"expand":"tags"}}'


@pytest.mark.parametrize("way", ["separate", "back to back", "one transaction"])
@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_a_link_that_a_later_version_has_is_in_no_event_of_before(
    database_url: str, tmp_path: Path, plugin: str, way: str
) -> None:
    """Ids of a junction table are part of the record, and expand follows them."""
    async with (
        service(
            database_url,
            tmp_path,
            collections=TAGGED_COLLECTIONS,
            sections={"replication": {"plugin": plugin}},
            schema=TAGGED,
        ) as running,
        listener(running.address, EXPANDING, "ends/*", "PB_CURSOR") as guest,
    ):
        (first,) = await guest.take(1)
        for n in range(1, ROUNDS + 1):
            title = f"UPDATE posts SET title = 'new' WHERE id = '{n}'"
            secret = (
                f"UPDATE posts SET public = false WHERE id = '{n}';"
                f"INSERT INTO post_tags VALUES ('{n}', 'SECRET');"
                f"DELETE FROM post_tags WHERE post = '{n}' AND tag = 'open'"
            )
            between = {"separate": "COMMIT; BEGIN", "back to back": "COMMIT; BEGIN"}.get(way)
            if way == "separate":
                await running.write.execute(title.encode())
                await running.write.execute(f"BEGIN; {secret}; COMMIT".encode())
            else:
                both = [title, between, secret] if between else [title, secret]
                await running.write.execute(f"BEGIN; {'; '.join(both)}; COMMIT".encode())
        # What comes with the row in one transaction belongs to it.
        async with running.write.transaction():
            await running.write.execute("INSERT INTO posts VALUES ('made', 'new', true)")
            await running.write.execute("INSERT INTO post_tags VALUES ('made', 'open')")
        await running.write.execute("INSERT INTO ends VALUES ('1')")

        live = await until_end(guest)
        back = Caller(headers={"Last-Event-ID": first.data["id"]})
        async with listener(running.address, EXPANDING, "ends/*", caller=back) as returned:
            later = await until_end(returned)

        for received in (live, later):
            assert [one for one in received if "SECRET" in str(one.data)] == []
            shown = [(one["title"], one["tags"]) for one in records(received)]
            assert shown == [("new", ["open"])] * (ROUNDS + 1)
            expanded = [one["expand"]["tags"][0]["id"] for one in records(received)]
            assert expanded == ["open"] * (ROUNDS + 1)
