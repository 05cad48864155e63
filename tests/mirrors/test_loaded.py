"""Lists that are sent to mirrors: the same as lists on request, and in step with the events."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import psycopg
import pytest

from tests.mirrors.client import MirrorClient
from tests.mirrors.scene import scene

SCHEMA = """
CREATE TABLE teams (id text PRIMARY KEY, name text);
CREATE TABLE people (
  id text PRIMARY KEY, team text REFERENCES teams, email text, "emailVisibility" boolean, n int
);
ALTER TABLE people REPLICA IDENTITY FULL;
INSERT INTO teams VALUES ('red', 'Red'), ('blue', 'Blue');
INSERT INTO people VALUES
  ('ann', 'red', 'ann@x', false, 0),
  ('bob', 'red', 'bob@x', true, 0),
  ('cid', 'blue', 'c@x', true, 0);
"""


def collections() -> dict[str, Any]:
    rule = 'team = "red" || id = @request.auth.id'
    return {
        "teams": {"table": "teams", "list_rule": "", "view_rule": ""},
        "people": {"table": "people", "type": "auth", "list_rule": rule, "view_rule": rule},
    }


SECTIONS: dict[str, Any] = {
    "auth": {
        "issuers": [
            {"name": "app", "secret": "a secret of an attacked service, long enough"}
            | {"collection": "people"}
        ]
    }
}


async def test_a_sent_list_is_the_one_that_is_listed(database_url: str) -> None:
    """With related records, chosen fields, and the addresses that its caller may see."""
    queries: tuple[dict[str, str], ...] = (
        {},
        {"expand": "team"},
        {"fields": "id,n,expand.team.name", "expand": "team"},
        {"filter": 'team.name = "Red" && n < 5'},
    )
    async with scene(database_url, SCHEMA, collections(), **SECTIONS) as world:
        for person in ("ann", "cid", ""):
            for query in queries:
                client = await world.client("people", person, is_loaded=True, options=dict(query))
                status, body = await world.reader.get("people/records", person, **query)
                assert status == 200
                assert client.rows == {one["id"]: one for one in body["items"]}, (person, query)
                assert client.resyncs == {"start": 1}
        single = await world.client("people", "ann", record_id="bob", is_loaded=True)
        assert set(single.rows) == {"bob"}
        hidden = await world.client("people", "ann", record_id="cid", is_loaded=True)
        assert hidden.rows == {}
        # Another's address, which only its owner sees.
        assert "ann@x" not in str(
            [client.bodies for client in world.clients if client.person != "ann"]
        )


async def test_a_list_that_is_too_long_is_loaded_by_its_client(database_url: str) -> None:
    mirrors = {"pace": 0.05, "rows": 2}
    async with scene(database_url, SCHEMA, collections(), mirrors=mirrors, **SECTIONS) as world:
        bob = await world.client("people", "bob", is_loaded=True)
        cid = await world.client("people", "cid", is_loaded=True)
        await world.write("UPDATE people SET n = 1")
        await world.check()

    assert (bob.resyncs, cid.resyncs) == ({"start": 1}, {"wide": 1})
    assert len(cid.rows) == 3


async def test_who_guesses_by_filters_waits_as_for_lists(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth list without records is held back, whichever way it is asked for."""
    delays: list[float] = []

    def draw(_least: float, most: float) -> float:
        delays.append(most)
        return 0.0

    monkeypatch.setattr("pgrealtime.reads.throttle.random.uniform", draw)
    async with scene(database_url, SCHEMA, collections(), **SECTIONS) as world:
        for number in range(3):
            await world.client("people", "bob", is_loaded=True, filter=f"id = 'x{number}'")
        assert not delays
        await world.client("people", "bob", is_loaded=True, filter="id = 'cid'")
        assert len(delays) == 1
        assert (await world.reader.get("people/records", "bob", filter="id = 'y'"))[0] == 200
        assert len(delays) == 2
        await world.client("people", "bob", is_loaded=True, filter="id = 'bob'")
        assert len(delays) == 2


async def test_no_row_goes_back_while_lists_and_events_take_turns(database_url: str) -> None:
    """Writers that overtake each other, and a list every few milliseconds."""
    async with scene(database_url, SCHEMA, collections(), **SECTIONS) as world:
        clients = [
            await world.client("people", person, is_loaded=True, is_resumable=bool(number))
            for number, person in enumerate(("ann", "bob", "cid"))
        ]
        begun = [len(client.bodies) for client in clients]
        writing = True

        async def write(seed: int) -> None:
            chance = random.Random(seed)
            async with await psycopg.AsyncConnection.connect(database_url) as connection:
                while writing:
                    for row in sorted(chance.sample(("ann", "bob", "cid"), k=2)):
                        await connection.execute("UPDATE people SET n = n + 1 WHERE id = %s", [row])
                        await asyncio.sleep(0.002)
                    await connection.commit()

        async with asyncio.TaskGroup() as group:
            for seed in range(3):
                group.create_task(write(seed))
            async with asyncio.timeout(60):
                while min(sum(client.resyncs.values()) for client in clients) < 12:
                    _have_loaded(world.reader.service.hub)
                    await asyncio.sleep(0.01)
            writing = False
        await world.check()

    for client, first in zip(clients, begun, strict=True):
        assert set(client.resyncs) == {"start", "unknown"}
        _assert_no_row_goes_back(client, first)


def _have_loaded(hub: Any) -> None:
    for connection in hub._registry.live_connections():
        for subscription in connection.subscriptions.values():
            hub._registry.request_resync(subscription, "unknown")


def _assert_no_row_goes_back(client: MirrorClient, first: int) -> None:
    latest: dict[str, int] = {}
    for record in client.bodies[first:]:
        if "n" in record:
            assert record["n"] >= latest.get(record["id"], 0), client.log[-20:]
            latest[record["id"]] = record["n"]
    assert len(latest) >= 2
