"""A list tells nothing of what its caller may not see: by no filter, order or expansion."""

from __future__ import annotations

import string

import pytest

from tests.attacks.reading import Reader, reading
from tests.realtime import open_stream, subscribe
from tests.topics import topic

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, email text, boss text REFERENCES users,
                    "emailVisibility" boolean NOT NULL DEFAULT false);
INSERT INTO users VALUES ('ann', 'ann@x.y', NULL, false), ('bob', 'bob@x.y', 'ann', true),
                         ('cid', 'cid@x.y', 'ann', false);
CREATE TABLE links (post text, person text, PRIMARY KEY (post, person));
CREATE TABLE posts (id text PRIMARY KEY, author text REFERENCES users, watchers text[]);
INSERT INTO posts VALUES ('p', 'bob', '{ann,bob}'), ('q', 'bob', '{bob}');
INSERT INTO links VALUES ('p', 'ann'), ('p', 'bob'), ('q', 'bob');
INSERT INTO users VALUES ('dan', 'dan@x.y', 'ann', true);
"""
LINKS = {"collection": "users", "through": "public.links", "source": "post", "target": "person"}
COLLECTIONS = {
    "users": {"table": "users", "type": "auth", "list_rule": "", "view_rule": ""},
    "posts": {
        "table": "posts",
        "list_rule": "",
        "relations": {"watchers": {"collection": "users"}, "links": LINKS},
    },
}
PATHS = {
    "list": ("posts", "watchers", "ann@x.y", "p"),
    "junction": ("posts", "links", "ann@x.y", "p"),
    "back relation": ("users", "users_via_boss", "cid@x.y", "ann"),
}
GUESSES = {
    "unequal": "{path}.email != '{address}'",
    "lower": "{path}.email:lower != '{address}'",
    "pattern": "{path}.email !~ '{address}'",
}


@pytest.mark.parametrize("hidden", ["strict", "pocketbase"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("guess", GUESSES)
async def test_no_filter_over_many_people_finds_out_the_hidden_address_of_one(
    database_url: str, hidden: str, path: str, guess: str
) -> None:
    """Without ``?`` all have to satisfy it, so in PocketBase a hidden address decides."""
    collection, relation, address, found = PATHS[path]
    text = GUESSES[guess]
    async with reading(database_url, SCHEMA, COLLECTIONS, records={"hidden": hidden}) as reader:
        right, wrong = [
            await reader.ids(collection, filter=text.format(path=relation, address=guessed))
            for guessed in (address, f"0{address}")
        ]

    assert found in wrong
    assert (found in right) == (hidden == "strict")


@pytest.mark.parametrize("key", ["email", "email:lower", "email:length"])
@pytest.mark.parametrize("relation", ["watchers", "links", "author.users_via_boss"])
async def test_hidden_addresses_decide_no_order(database_url: str, key: str, relation: str) -> None:
    """Also that of a related person, the first of several too."""
    async with reading(database_url, SCHEMA, COLLECTIONS) as reader:
        orders = []
        for address in ("0@x.y", "zz@x.y"):
            await reader.write.execute(
                'UPDATE users SET email = %s WHERE NOT "emailVisibility"', [address]
            )
            orders += [
                [await reader.ids("posts", sort=f"{sign}{relation}.{key}") for sign in ("", "-")],
                [await reader.ids("users", sort=f"{sign}{key}") for sign in ("", "-")],
            ]

    assert orders[:2] == orders[2:]


LOCKED_SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, tasks text[]);
CREATE TABLE projects (id text PRIMARY KEY, title text, member text);
CREATE TABLE tasks (id text PRIMARY KEY, title text, is_open boolean,
                    project text REFERENCES projects, owner text REFERENCES users);
CREATE TABLE links (person text, task text, PRIMARY KEY (person, task));
INSERT INTO users VALUES ('ann', '{open,locked,none}'), ('bob', '{}'), ('cid', '{}'), ('zed', '{}');
INSERT INTO projects VALUES ('public', 'zz', ''), ('secret', 'kumquat', 'bob');
INSERT INTO tasks VALUES ('open', 'zz', true, 'public', 'ann'), ('of', 'zz', true, 'secret', 'ann'),
                         ('locked', 'kumquat', false, 'secret', 'ann');
INSERT INTO links VALUES ('ann', 'open'), ('ann', 'locked');
"""
LOCKED_LINKS = {"collection": "tasks", "through": "links", "source": "person", "target": "task"}
LOCKED_COLLECTIONS = {
    "users": {
        "table": "users",
        "type": "auth",
        "list_rule": "",
        "relations": {"tasks": {"collection": "tasks"}, "links": LOCKED_LINKS},
    },
    "projects": {"table": "projects", "list_rule": "member = '' || member = @request.auth.id"},
    "tasks": {"table": "tasks", "list_rule": "is_open = true || project.member = @request.auth.id"},
}
LOCKED_PATHS = [
    "tasks_via_owner.title",
    "tasks.title",
    "links.title",
    "tasks_via_owner.project.title",
]
LETTERS = string.ascii_lowercase


async def found_out(reader: Reader, path: str, caller: str) -> str:
    """Return the least value that Ann has at a path, by binary search."""

    async def is_least_from(text: str) -> bool:
        return "ann" in await reader.ids("users", caller, filter=f"{path} >= '{text}'")

    known = ""
    while await is_least_from(known + LETTERS[0]):
        low, high = 0, len(LETTERS)
        while high - low > 1:
            middle = (low + high) // 2
            is_above = await is_least_from(known + LETTERS[middle])
            low, high = (middle, high) if is_above else (low, middle)
        known += LETTERS[low]
    return known


@pytest.mark.parametrize("hidden", ["strict", "pocketbase"])
@pytest.mark.parametrize("path", LOCKED_PATHS)
async def test_no_filter_over_many_rows_finds_out_a_value_of_one_that_is_not_listed(
    database_url: str, hidden: str, path: str
) -> None:
    """Without ``?`` all have to satisfy it, so in PocketBase a row decides that isn't listed."""
    records = {"hidden": hidden}
    async with reading(database_url, LOCKED_SCHEMA, LOCKED_COLLECTIONS, records=records) as reader:
        listed = [await reader.ids("tasks", caller) for caller in ("", "cid", "bob")]
        found = [await found_out(reader, path, caller) for caller in ("", "cid", "bob")]

    assert ["locked" in ids for ids in listed] == [False, False, True]
    assert found == ["zz" if hidden == "strict" else "kumquat"] * 2 + ["kumquat"]


@pytest.mark.parametrize("hidden", ["strict", "pocketbase"])
@pytest.mark.parametrize("path", LOCKED_PATHS)
async def test_no_filter_of_a_subscription_finds_it_out_either(
    database_url: str, hidden: str, path: str
) -> None:
    """One event tells the first letter, to whom a topic for each letter is sent."""
    records = {"hidden": hidden}
    async with reading(database_url, LOCKED_SCHEMA, LOCKED_COLLECTIONS, records=records) as reader:
        stream, client_id = await open_stream(reader.address)
        guesses = {topic("users/*", filter=f"{path} >= '{one}'"): one for one in LETTERS}
        assert await subscribe(reader.address, client_id, *guesses, "users") == 204
        for user in ("ann", "zed"):
            await reader.write.execute("UPDATE users SET tasks = tasks WHERE id = %s", [user])
        heard = []
        while b'"id":"zed"' not in (message := (await stream.take(1, 10.0))[0]):
            heard.append(message)
        await stream.close()

    events = [message.partition(b"event:")[2].partition(b"\n")[0].decode() for message in heard]
    letters = [guesses[event] for event in events if event in guesses]
    assert max(letters) == ("z" if hidden == "strict" else "k")
