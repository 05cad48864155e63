"""Lists and records of tables as people have them, their limits, and what PostgreSQL refuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import jwt
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from structlog.testing import capture_logs

from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError
from pgrealtime.service.build import run_service
from tests.conformance.http_client import Address
from tests.own_server import own_server
from tests.realtime import open_stream, subscribe

SECRET = "an integration secret of more than thirty-two bytes"

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, name text NOT NULL, email text,
                    "emailVisibility" boolean NOT NULL DEFAULT false);
INSERT INTO users VALUES ('ann', 'Ann', 'z@x.y', false), ('bob', 'Bob', 'a@x.y', true),
                         ('cid', 'Cid', 'm@x.y', false), ('dan', 'Dan', 'k@x.y', true);
CREATE TABLE tasks (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text NOT NULL,
                    owner text REFERENCES users, watchers text[] NOT NULL DEFAULT '{}');
INSERT INTO tasks (title, owner, watchers)
  SELECT 'same', 'ann', ARRAY['ann', 'bob', 'cid'] FROM generate_series(1, 25);
CREATE TABLE things (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), created timestamptz NOT NULL,
                     name text NOT NULL);
INSERT INTO things (created, name) VALUES ('2024-01-02', 'b'), ('2024-01-01', 'c'),
                                          ('2024-01-03', 'a');
CREATE VIEW totals AS SELECT owner AS id, count(*)::int AS n FROM tasks GROUP BY owner;
CREATE MATERIALIZED VIEW kept AS SELECT id::text AS id, title FROM tasks WHERE id < 4;
CREATE TABLE measures (id bigint NOT NULL, day date NOT NULL, value int, UNIQUE (id, day))
  PARTITION BY RANGE (day);
CREATE TABLE measures_2024 PARTITION OF measures FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
INSERT INTO measures VALUES (1, '2024-05-01', 7), (2, '2024-04-01', 9);
CREATE VIEW slow AS SELECT id::text AS id, pg_sleep(20)::text AS waited FROM tasks WHERE id = 1;
"""

COLLECTIONS: Mapping[str, Mapping[str, Any]] = {
    "users": {"table": "users", "type": "auth", "list_rule": "", "view_rule": ""},
    "tasks": {
        "table": "tasks",
        "list_rule": "",
        "view_rule": "",
        "relations": {"watchers": {"collection": "users"}},
    },
    "things": {"table": "things", "list_rule": "", "view_rule": ""},
    "totals": {"table": "totals", "id": "id", "stream": False, "list_rule": "", "view_rule": ""},
    "kept": {"table": "kept", "id": "id", "stream": False, "list_rule": ""},
    "measures": {"table": "measures", "id": "id", "stream": False, "list_rule": ""},
    "slow": {"table": "slow", "id": "id", "stream": False, "list_rule": "", "view_rule": ""},
}


class Api:
    """The public port."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self._session = session
        self.address = Address(host="127.0.0.1", port=port)
        self._url = f"http://127.0.0.1:{port}/api"

    async def get(self, path: str, caller: str = "") -> tuple[int, Any]:
        """Return status and body."""
        return await self.send("GET", path, caller)

    async def send(self, method: str, path: str, caller: str = "") -> tuple[int, Any]:
        """Return status and body."""
        claims = {"sub": caller, "exp": time.time() + 3600}
        headers = {"Authorization": jwt.encode(claims, SECRET)} if caller else {}
        url = f"{self._url}/collections/{path}"
        async with self._session.request(method, url, headers=headers) as response:
            return response.status, await response.json()

    async def ids(self, path: str, caller: str = "") -> list[str]:
        """Return the ids of a list."""
        status, body = await self.get(path, caller)
        assert status == 200, body
        return [item["id"] for item in body["items"]]


@asynccontextmanager
async def serving(database_url: str, **sections: Any) -> AsyncIterator[Api]:
    """Load the schema and run the program."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(SCHEMA)
    settings = {
        "database": {"url": database_url},
        "server": {"host": "127.0.0.1", "port": 0},
        "auth": {"issuers": [{"name": "app", "secret": SECRET}]},
        "collections": COLLECTIONS,
        **sections,
    }
    async with (
        run_service(Config.model_validate(settings)) as service,
        aiohttp.ClientSession() as session,
    ):
        yield Api(session, service.port)


# -- keys


async def test_an_id_that_the_key_s_type_refuses_is_unknown_and_matches_nothing(
    database_url: str,
) -> None:
    """Never an error of PostgreSQL, which would be a 400 or a 500."""
    async with serving(database_url) as api:
        for collection in ("tasks", "things"):
            for wrong in ("abc", "1.5", "99999999999999999999", "007", "%00", "%FF", "%20"):
                status, _ = await api.get(f"{collection}/records/{wrong}")
                assert status == 404, (collection, wrong)
            for wrong in ("abc", "99999999999999999999", ""):
                query = f"filter=id%20%3D%20'{wrong}'"
                assert await api.ids(f"{collection}/records?{query}") == []
        status, task = await api.get("tasks/records/7")
        assert (status, task["id"], task["title"]) == (200, "7", "same")


# -- order and pages


async def test_pages_of_equal_rows_repeat_and_lose_none(database_url: str) -> None:
    """Every sort ends with the default order, whatever PostgreSQL does with ties."""
    async with serving(database_url) as api:
        for sort in ("", "title", "-title", "watchers.name", "owner.name,-title"):
            pages = [
                await api.ids(f"tasks/records?perPage=4&page={page}&sort={sort}")
                for page in range(1, 8)
            ]
            assert [id_ for page in pages for id_ in page] == [str(n) for n in range(1, 26)], sort


@pytest.mark.parametrize(("collection", "sort"), [("tasks", "id:lower"), ("things", "id")])
async def test_pages_by_the_last_id_have_every_record_once(
    database_url: str, collection: str, sort: str
) -> None:
    """Filters compare ids as text, so integer keys are sorted as text for it."""
    seen: list[str] = []
    async with serving(database_url) as api:
        while True:
            wanted = quote(f"id > '{seen[-1]}'") if seen else ""
            query = f"perPage=2&skipTotal=1&sort={sort}&filter={wanted}"
            page = await api.ids(f"{collection}/records?{query}")
            seen += page
            if len(page) < 2:
                break
        assert sorted(seen) == sorted(await api.ids(f"{collection}/records"))


async def test_the_default_order_is_a_numbered_key_or_a_creation_time_or_as_configured(
    database_url: str,
) -> None:
    configured = {**COLLECTIONS, "things": {**COLLECTIONS["things"], "order": ["-name"]}}
    async with serving(database_url) as api:
        assert (await api.ids("tasks/records?perPage=3")) == ["1", "2", "3"]
        _, body = await api.get("things/records")
        assert [item["name"] for item in body["items"]] == ["c", "b", "a"]
        _, body = await api.get("things/records?sort=-@rowid")
        assert [item["name"] for item in body["items"]] == ["a", "b", "c"]
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    async with serving(database_url, collections=configured) as api:
        _, body = await api.get("things/records")
        assert [item["name"] for item in body["items"]] == ["c", "b", "a"]
        _, body = await api.get("things/records?sort=-@rowid")
        assert [item["name"] for item in body["items"]] == ["a", "b", "c"]


# -- collections that can be read only


async def test_views_are_listed_and_read(database_url: str) -> None:
    async with serving(database_url) as api:
        _, totals = await api.get("totals/records")
        assert [(item["id"], item["n"]) for item in totals["items"]] == [("ann", 25)]
        assert totals["totalItems"] == 1
        assert (await api.get("totals/records/ann"))[0] == 200
        assert await api.ids("kept/records?sort=-id") == ["3", "2", "1"]
        assert (await api.get("totals/records?sort=@rowid"))[0] == 400
        assert await api.send("POST", "totals/records") == (
            400,
            {"data": {}, "message": "Unsupported collection type.", "status": 400},
        )


async def test_a_partitioned_table_whose_key_has_the_partition_column_is_listed(
    database_url: str,
) -> None:
    """PostgreSQL forces that column into the constraint: the id is unique in fact, not by it."""
    async with serving(database_url) as api:
        assert await api.ids("measures/records?sort=day") == ["2", "1"]
        status, body = await api.get("measures/records?filter=value%20%3E%208")
        assert (status, body["totalItems"]) == (200, 1)


async def test_a_foreign_table_is_listed(database_url: str) -> None:
    """By postgres_fdw, from the same server."""
    at = conninfo_to_dict(database_url)
    remote = {"table": "remote", "id": "id", "stream": False, "list_rule": "n > 0"}
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            f"""
            CREATE TABLE source (id text PRIMARY KEY, n int NOT NULL);
            INSERT INTO source VALUES ('a', 1), ('b', 0), ('c', 2);
            CREATE EXTENSION postgres_fdw;
            CREATE SERVER loop FOREIGN DATA WRAPPER postgres_fdw
              OPTIONS (host '{at["host"]}', port '{at["port"]}', dbname '{at["dbname"]}');
            CREATE USER MAPPING FOR CURRENT_USER SERVER loop OPTIONS (user '{at["user"]}');
            CREATE FOREIGN TABLE remote (id text NOT NULL, n int NOT NULL) SERVER loop
              OPTIONS (table_name 'source');
            """.encode()
        )
    async with serving(database_url, collections={**COLLECTIONS, "remote": remote}) as api:
        assert await api.ids("remote/records?sort=-n") == ["c", "a"]


async def test_a_topic_of_a_collection_that_can_be_read_only_is_accepted_and_mute(
    database_url: str,
) -> None:
    """As PocketBase treats a topic of an unknown collection."""
    unstreamed = {**COLLECTIONS, "things": {**COLLECTIONS["things"], "stream": False}}
    async with serving(database_url, collections=unstreamed) as api:
        stream, client_id = await open_stream(api.address)
        assert await subscribe(api.address, client_id, "things/*", "totals/ann", "tasks/*") == 204
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("INSERT INTO things (created, name) VALUES (now(), 'd')")
            connection.execute("INSERT INTO tasks (title) VALUES ('last')")
        (message,) = await stream.take(1, 10)
        await stream.close()

    assert b"event:tasks/*" in message


async def test_a_view_that_is_to_be_streamed_is_refused_with_the_key_that_mends_it(
    database_url: str,
) -> None:
    streamed = {"totals": {"table": "totals", "id": "id", "list_rule": ""}}
    with pytest.raises(ConfigError) as error:
        async with serving(database_url, collections=streamed):
            pass

    (problem,) = error.value.problems
    assert (problem.path, problem.hint) == (
        "collections.totals.table",
        "set stream: false to read it only",
    )


# -- what is hidden


@pytest.mark.parametrize(
    ("hidden", "order"),
    [("strict", ["ann", "cid", "bob", "dan"]), ("pocketbase", ["bob", "dan", "cid", "ann"])],
)
async def test_a_sort_by_address_tells_nothing_of_hidden_ones_unless_configured(
    database_url: str, hidden: str, order: list[str]
) -> None:
    """PocketBase sorts by all addresses: who may list people learns the order of hidden ones."""
    async with serving(database_url, records={"hidden": hidden}) as api:
        assert await api.ids("users/records?sort=email") == order


# -- limits


async def test_writing_is_refused_as_under_rules_for_superusers(database_url: str) -> None:
    refused = {"data": {}, "message": "Only superusers can perform this action.", "status": 403}
    async with serving(database_url) as api:
        assert await api.send("POST", "tasks/records", "ann") == (403, refused)
        assert await api.send("PATCH", "tasks/records/1", "ann") == (403, refused)
        assert await api.send("DELETE", "tasks/records/1") == (403, refused)
        status, body = await api.send("POST", "nope/records")
        assert (status, body["message"]) == (404, "Missing or invalid collection context.")
        assert (await api.send("PUT", "tasks/records/1"))[0] == 404


async def test_a_sort_that_joins_too_many_rows_is_refused(database_url: str) -> None:
    async with serving(database_url, reads={"max_joined_rows": 74}) as api:
        assert (await api.get("tasks/records?sort=watchers.name"))[0] == 400
        assert (await api.get("tasks/records?sort=owner.name"))[0] == 200
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    async with serving(database_url, reads={"max_joined_rows": 75}) as api:
        assert (await api.get("tasks/records?sort=watchers.name"))[0] == 200


async def test_the_log_says_why_a_list_is_refused(database_url: str) -> None:
    """The answer doesn't, as PocketBase's doesn't."""
    async with serving(database_url) as api:
        with capture_logs() as logged:
            status, body = await api.get("tasks/records?filter=nope%20%3D%201")

    assert (status, body["message"]) == (
        400,
        "Something went wrong while processing your request.",
    )
    (refused,) = [entry for entry in logged if entry["event"] == "read.refused"]
    assert (refused["collection"], refused["reason"]) == ("tasks", 'there is no field "nope"')


async def test_an_answer_that_is_too_large_is_refused(database_url: str) -> None:
    async with serving(database_url, reads={"max_answer_size": 1000}) as api:
        assert (await api.get("tasks/records"))[0] == 400
        assert (await api.get("tasks/records?perPage=2"))[0] == 200


async def test_a_query_that_takes_too_long_is_a_400_of_a_list_and_a_404_of_a_record(
    database_url: str,
) -> None:
    """And it takes its time once: it isn't tried again."""
    async with serving(database_url, reads={"statement_timeout": 0.5}) as api:
        began = time.monotonic()
        assert (await api.get("slow/records"))[0] == 400
        assert (await api.get("slow/records/1"))[0] == 404
        assert time.monotonic() - began < 3


async def test_an_address_has_its_requests_per_minute_and_superusers_have_no_limit(
    database_url: str,
) -> None:
    issuer = {"name": "app", "secret": SECRET, "superuser_when": {"sub": "root"}}
    async with serving(
        database_url, reads={"requests_per_minute": 3}, auth={"issuers": [issuer]}
    ) as api:
        statuses = [(await api.get("tasks/records"))[0] for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        assert (await api.get("nope/records"))[0] == 404
        assert (await api.get("tasks/records", "root"))[0] == 200


async def test_of_one_address_only_so_many_requests_wait(database_url: str) -> None:
    """A list that takes long holds the only connection; realtime has others."""
    reads = {"statement_timeout": 1.0, "pool_size": 1, "max_waiting": 2}
    async with serving(database_url, reads=reads) as api:
        slow = asyncio.create_task(api.get("slow/records"))
        await asyncio.sleep(0.3)
        answers = await asyncio.gather(*(api.get("tasks/records") for _ in range(5)))
        assert sorted(status for status, _ in answers) == [200, 200, 429, 429, 429]
        assert (await slow)[0] == 400


async def test_where_guests_are_not_allowed_they_read_nothing(database_url: str) -> None:
    auth = {"issuers": [{"name": "app", "secret": SECRET}], "allow_guests": False}
    async with serving(database_url, auth=auth) as api:
        assert (await api.get("tasks/records"))[0] == 401
        assert (await api.get("tasks/records", "ann"))[0] == 200


async def test_where_reads_are_off_there_are_no_routes(database_url: str) -> None:
    async with serving(database_url, reads={"enabled": False}) as api:
        status, body = await api.get("tasks/records")
        assert (status, body["message"]) == (404, "File not found.")


async def test_a_lost_database_is_a_503() -> None:
    """Not a 400, so that clients try again."""
    with own_server() as server:
        async with serving(server.url) as api:
            assert (await api.get("tasks/records"))[0] == 200
            await asyncio.to_thread(server.control, "stop", "--mode=immediate")
            for path in ("tasks/records", "tasks/records/1"):
                status, body = await api.get(path)
                assert (status, body["status"]) == (503, 503), path
            await asyncio.to_thread(server.control, "start", f"--log={server.folder}/log")
            async with asyncio.timeout(30):
                while (await api.get("tasks/records"))[0] != 200:
                    await asyncio.sleep(0.2)
