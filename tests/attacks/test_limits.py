"""Subscriptions that can't be served are refused in the answer.

No subscription is silently dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pgrealtime.hub.evaluation.filter_limits import (
    REMOTE_FILTERS_PER_CONNECTION,
    UNINDEXED_FILTERS_PER_ADDRESS,
    UNINDEXED_FILTERS_PER_CONNECTION,
    VIEWS_PER_CONNECTION,
)
from tests.conformance.http_client import send
from tests.e2e.listener import ANYBODY, Caller, Listener, listener
from tests.e2e.service import Service, service
from tests.topics import topic

SCHEMA = """
CREATE TABLE owners (id text PRIMARY KEY, name text);
CREATE TABLE pages (id text PRIMARY KEY, title text, owner text REFERENCES owners);
CREATE TABLE users (id text PRIMARY KEY);
"""
COLLECTIONS: dict[str, dict[str, Any]] = {
    "owners": {"table": "owners", "list_rule": ""},
    "pages": {"table": "pages", "list_rule": ""},
    "users": {"table": "users", "type": "auth"},
}


async def call(running: Service, client: Listener, topics: list[str], language: str) -> Any:
    """Return the answer's body."""
    body = json.dumps({"clientId": client.client_id, "subscriptions": topics}).encode()
    headers = {"Content-Type": "application/json", "Accept-Language": language}
    answer = await send(ANYBODY.request("POST", headers, body), running.address)
    return json.loads(answer.body)


REFUSED = [
    pytest.param(
        [
            topic("pages/*", filter=f"title~'{n}'")
            for n in range(UNINDEXED_FILTERS_PER_CONNECTION + 1)
        ],
        "A connection may have no more than 50 filters without an equality.",
        id="no-index",
    ),
    pytest.param(
        [
            topic("pages/*", filter=f"owner.name~'{n}'")
            for n in range(REMOTE_FILTERS_PER_CONNECTION + 1)
        ],
        "A connection may have no more than 50 filters that need the database.",
        id="database",
    ),
    pytest.param(
        [topic("pages/*", fields=f"id,a{n}") for n in range(VIEWS_PER_CONNECTION + 1)],
        "A connection may have no more than 100 different fields and expand.",
        id="views",
    ),
    pytest.param(
        [topic("pages/*", filter=f"title='{n}{'x' * 1500}'") for n in range(22)],
        "The filters of a connection must be no longer than 32768 characters together.",
        id="long",
    ),
]


@pytest.mark.parametrize(("topics", "message"), REFUSED)
async def test_a_call_with_too_many_is_refused_and_changes_nothing(
    database_url: str, tmp_path: Path, topics: list[str], message: str
) -> None:
    """In PocketBase's form, at the first topic that is too many, in both languages."""
    async with (
        service(database_url, tmp_path, schema=SCHEMA, collections=COLLECTIONS) as running,
        listener(running.address, "pages/*") as client,
    ):
        answer = await call(running, client, ["owners/*", *topics], "en")
        chinese = await call(running, client, ["owners/*", *topics], "zh")
        await running.write.execute("INSERT INTO owners VALUES ('o', 'O')")
        await running.write.execute("INSERT INTO pages VALUES ('p', 'xyz')")
        (received,) = await client.take(1)
        fits = await client.subscribe("owners/*", *topics[:-1])

    most = answer["data"]["subscriptions"][str(len(topics))]["params"]["max"]
    assert answer == {
        "status": 400,
        "message": "Something went wrong while processing your request.",
        "data": {
            "subscriptions": {
                str(len(topics)): {
                    "code": "validation_limit_reached",
                    "message": message,
                    "params": {"max": most},
                }
            }
        },
    }
    assert str(most) in chinese["data"]["subscriptions"][str(len(topics))]["message"]
    assert (received.event, fits) == ("pages/*", 204)


async def test_one_address_displaces_no_other_with_filters_that_no_index_serves(
    database_url: str, tmp_path: Path
) -> None:
    """One address is refused beyond its share; the calls of others count for themselves."""
    greedy, modest = Caller(source_ip="127.0.0.2"), Caller(source_ip="127.0.0.3")
    asked = iter(
        topic("pages/*", filter=f"title~'{n}!'") for n in range(UNINDEXED_FILTERS_PER_ADDRESS + 50)
    )
    async with service(database_url, tmp_path, schema=SCHEMA, collections=COLLECTIONS) as running:
        clients = [listener(running.address, caller=greedy) for _ in range(21)]
        opened = [await client.__aenter__() for client in clients]
        try:
            answers = [
                await one.subscribe(*(next(asked) for _ in range(UNINDEXED_FILTERS_PER_CONNECTION)))
                for one in opened
            ]
            mine = topic("pages/*", filter="title~'mine'")
            async with listener(running.address, mine, caller=modest) as other:
                await running.write.execute("INSERT INTO pages VALUES ('p', 'mine')")
                (received,) = await other.take(1)
        finally:
            for client in clients:
                await client.__aexit__(None, None, None)

    assert answers == [204] * 20 + [400]
    assert received.event == mine
