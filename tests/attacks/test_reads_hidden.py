"""A list tells nothing of what its caller may not see: by no filter, order or expansion."""

from __future__ import annotations

import pytest

from tests.attacks.reading import reading

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
