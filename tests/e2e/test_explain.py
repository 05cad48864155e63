"""``pgrealtime explain`` agrees with what the running service does with a record."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import yaml

from pgrealtime.auth.principal import GUEST
from pgrealtime.explain.caller import BearerToken, CallerSpec
from pgrealtime.explain.explain import explain_delivery
from tests.config_values import parse_config
from tests.e2e.listener import Listener, listener
from tests.e2e.service import service, token

RULES: dict[str, str | None] = {
    "open": "",
    "locked": None,
    "own": 'public = true || (author != "" && author = @request.auth.id)',
    "trusted": "@request.auth.verified = true && n > 3",
    "shared": "team_shared_via_post.person ?= @request.auth.id",
    "every": '@request.auth.id != "" && team_every_via_post.person = @request.auth.id',
    "owned": 'team_owned_via_post.person ?= @request.auth.id && team_owned_via_post.role ?= "boss"',
}
SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, verified boolean);
INSERT INTO users VALUES ('ann', true), ('bob', false);
CREATE TABLE last (id int PRIMARY KEY);
"""
TABLES = """
CREATE TABLE {name} (id int PRIMARY KEY, author text, public boolean, n int);
CREATE TABLE team_{name} (id int PRIMARY KEY, post int, person text, role text);
INSERT INTO team_{name}
  VALUES (1, 1, 'ann', 'boss'), (2, 1, 'bob', 'guest'), (3, 2, 'bob', 'boss');
"""
POSTS = "INSERT INTO {name} VALUES (1, 'ann', false, 5), (2, 'bob', true, 1), (3, NULL, false, 4)"
TOKENS = {
    "guest": "",
    "ann": token("ann"),
    "bob": token("bob"),
    "expired": token("ann", lifetime=-1),
    "admin": token("root", role="admin"),
}


def collections() -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {
        "users": {"table": "users", "type": "auth"},
        "last": {"table": "last", "list_rule": ""},
    }
    for name, rule in RULES.items():
        made[name] = {"table": name, "list_rule": rule}
        made[f"team_{name}"] = {
            "table": f"team_{name}",
            "relations": {"post": {"collection": name}},
        }
    return made


def caller_spec(bearer: str) -> CallerSpec:
    return BearerToken(bearer) if bearer else GUEST


async def received(client: Listener) -> set[tuple[str, str]]:
    """Return topics and ids of all events up to the last one, which every connection receives."""
    found: set[tuple[str, str]] = set()
    while True:
        (message,) = await client.take(1)
        if message.event == "last/*":
            return found
        found.add((message.event, message.data["record"]["id"]))


async def test_the_service_does_what_explain_says(database_url: str, tmp_path: Path) -> None:
    """For every rule, caller and record an event arrives exactly if explain says so."""
    topics = [f"{name}/*" for name in RULES]
    schema = SCHEMA + "".join(TABLES.format(name=name) for name in RULES)
    shown: dict[str, set[tuple[str, str]]] = {}
    async with (
        service(database_url, tmp_path, collections=collections(), schema=schema) as running,
        AsyncExitStack() as stack,
    ):
        clients = {
            caller: await stack.enter_async_context(
                listener(running.address, *topics, "last/*", token=bearer)
            )
            for caller, bearer in TOKENS.items()
        }
        for name in RULES:
            await running.write.execute(POSTS.format(name=name).encode())
        await running.write.execute("INSERT INTO last VALUES (1)")
        for caller, client in clients.items():
            shown[caller] = await received(client)

    config = parse_config(yaml.safe_load((tmp_path / "pgrealtime.yaml").read_text()), {})
    said: dict[str, set[tuple[str, str]]] = {caller: set() for caller in TOKENS}
    for caller, bearer in TOKENS.items():
        for topic in topics:
            for record_id in ("1", "2", "3"):
                explanation = await explain_delivery(config, caller_spec(bearer), topic, record_id)
                assert not any(line.startswith("BUG") for line in explanation.lines), (
                    explanation.lines
                )
                if explanation.is_delivered:
                    said[caller].add((topic, record_id))

    assert said == shown
    assert {caller: len(found) for caller, found in shown.items()} == {
        "guest": 5,
        "expired": 5,
        "admin": 21,
        "ann": 3 + 2 + 2 + 1 + 1,
        "bob": 3 + 1 + 2 + 1 + 1,
    }
