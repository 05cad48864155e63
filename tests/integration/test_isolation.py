"""What can't be evaluated is denied, without an effect on other subscribers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import psycopg
import pytest

from pgrealtime.hub.evaluation.filter_limits import REMOTE_FILTERS_PER_CONNECTION as COSTLY
from tests.e2e.listener import Listener, listener
from tests.e2e.service import Service, service
from tests.topics import topic

SCHEMA = "CREATE TABLE posts (id text PRIMARY KEY); CREATE TABLE notes (id text PRIMARY KEY);"


async def test_a_rule_that_times_out_denies_its_own_subscribers_only(
    database_url: str, tmp_path: Path
) -> None:
    """Other rules of the same collection and other collections are unaffected.

    Later events arrive.
    """
    collections = {
        "posts": {
            "table": "posts",
            "list_rule": '@collection.notes.id ?= "open"',
            "view_rule": 'id != "" || @collection.notes.id ?= id',
        },
        "notes": {"table": "notes", "list_rule": ""},
    }
    async with (
        service(
            database_url,
            tmp_path,
            collections=collections,
            schema=SCHEMA + "INSERT INTO notes VALUES ('open');",
            sections={"database": {"statement_timeout": "300ms"}, "logging": {"format": "json"}},
        ) as running,
        listener(running.address, "posts/*") as slow,
        listener(running.address, "posts/p1", "notes/*") as other,
    ):
        async with await psycopg.AsyncConnection.connect(database_url) as locker:
            await locker.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")
            await running.write.execute("INSERT INTO posts VALUES ('p1'), ('p2')")
            (received,) = await other.take(1)
            assert (received.event, received.data["record"]["id"]) == ("posts/p1", "p1")
            await locker.rollback()
        await running.write.execute("INSERT INTO notes VALUES ('n')")
        await running.write.execute("INSERT INTO posts VALUES ('p3')")

        assert [m.data["record"]["id"] for m in await slow.take(1)] == ["p3"]
        assert [m.event for m in await other.take(1)] == ["notes/*"]
        assert running.process.output().count("rule.error") == 1


async def test_a_locked_table_holds_others_up_a_few_times_and_not_once_per_row(
    database_url: str, tmp_path: Path
) -> None:
    """Migrations lock tables; a hundred rows that can't be evaluated are given up together."""
    collections = {
        "posts": {"table": "posts", "list_rule": "@collection.notes.id ?= id", "view_rule": ""},
        "notes": {"table": "notes", "list_rule": ""},
    }
    async with (
        service(
            database_url,
            tmp_path,
            collections=collections,
            schema=SCHEMA,
            sections={"database": {"statement_timeout": "300ms"}, "logging": {"format": "json"}},
        ) as running,
        listener(running.address, "posts/*"),
        listener(running.address, "posts/p100") as other,
    ):
        async with await psycopg.AsyncConnection.connect(database_url) as locker:
            await locker.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")
            began = time.monotonic()
            await running.write.execute(
                "INSERT INTO posts SELECT 'p' || n FROM generate_series(1, 100) n"
            )
            await other.take(1)
            waited = time.monotonic() - began

        assert 1.2 < waited < 6  # four time-outs; a hundred would be 30 s
        assert len(running.process.logged("rule.suspended")) == 1


PLACES = """
CREATE TABLE places (
  id text PRIMARY KEY, lon float8, lat float8, meta json, bad json DEFAULT '{"k": "\\u0000"}'
);
CREATE TABLE posts (id text PRIMARY KEY, place text REFERENCES places);
INSERT INTO places VALUES ('here', 10, 20, '{"k": 1}'), ('nowhere', 10, 20, '{"k": "\\u0000"}');
"""
"""A json member with U+0000 can be stored but not read: the whole statement fails."""

NEAR = 'geoDistance(place.lon, place.lat, @request.query.lon, 20) < 1000 && place.meta.k != "x"'


def _from(lon: str, **query: str) -> str:
    return topic("posts/*", lon=lon, **query)


@pytest.mark.parametrize("poison", ["1e999", "-1e999", "9" * 400])
async def test_a_value_that_is_out_of_range_is_denied_alone(
    database_url: str, tmp_path: Path, poison: str
) -> None:
    """One subscriber's value fails no other's evaluation, of the same rule and statement."""
    async with (
        _places(database_url, tmp_path) as running,
        listener(running.address, _from(poison), "places/*") as poisoner,
        listener(running.address, _from("10"), _from("12"), _from("170")) as others,
    ):
        for n in range(5):
            await running.write.execute("INSERT INTO posts VALUES (%s, 'here')", (f"n{n}",))
            received = await others.take(2)
            assert {m.event for m in received} == {_from("10"), _from("12")}
            assert {m.data["record"]["id"] for m in received} == {f"n{n}"}
        await running.write.execute("INSERT INTO places VALUES ('new', 0, 0)")

        assert [m.event for m in await poisoner.take(1)] == ["places/*"]
        assert not running.process.logged("rule.error")
        assert not running.process.logged("rule.rejected")


async def test_a_row_that_postgres_refuses_is_denied_alone(
    database_url: str, tmp_path: Path
) -> None:
    """The rows before and after it, of the same transaction, reach their subscribers."""
    async with (
        _places(database_url, tmp_path) as running,
        listener(running.address, _from("10")) as one,
        listener(running.address, _from("12")) as other,
    ):
        await running.write.execute(
            "INSERT INTO posts SELECT 'n' || n, CASE n WHEN 3 THEN 'nowhere' ELSE 'here' END"
            " FROM generate_series(1, 5) n"
        )
        for listening in (one, other):
            ids = [m.data["record"]["id"] for m in await listening.take(4)]
            assert ids == ["n1", "n2", "n4", "n5"]
        (said,) = running.process.logged("rule.error")
        assert said["collection"] == "posts"
        assert "nowhere" not in running.process.output()


async def test_a_template_that_postgres_refuses_is_denied_alone(
    database_url: str, tmp_path: Path
) -> None:
    """One filter fails for every row.

    The rule without a filter and another filter are unaffected.
    """
    bad = _from("10", filter="place.bad.k = 1")
    good = _from("10", filter="place.meta.k = 1")
    async with (
        _places(database_url, tmp_path) as running,
        listener(running.address, bad, "places/*") as poisoner,
        listener(running.address, _from("10"), good) as other,
    ):
        for n in range(5):
            await running.write.execute("INSERT INTO posts VALUES (%s, 'here')", (f"n{n}",))
            assert {m.event for m in await other.take(2)} == {_from("10"), good}
        await running.write.execute("INSERT INTO places VALUES ('new', 0, 0)")

        assert [m.event for m in await poisoner.take(1)] == ["places/*"]
        assert len(running.process.logged("rule.error")) == 1


def _places(database_url: str, directory: Path) -> AbstractAsyncContextManager[Service]:
    return service(
        database_url,
        directory,
        collections={
            "places": {"table": "places", "list_rule": ""},
            "posts": {"table": "posts", "list_rule": NEAR},
        },
        schema=PLACES,
        sections={"logging": {"format": "json"}},
    )


BOMBED = """
CREATE TABLE users (id text PRIMARY KEY, name text);
CREATE TABLE projects (id text PRIMARY KEY);
CREATE TABLE members (id text PRIMARY KEY, project text REFERENCES projects,
  "user" text REFERENCES users);
CREATE INDEX ON members (project);
CREATE INDEX ON members ("user");
CREATE TABLE posts (id text PRIMARY KEY, project text REFERENCES projects);
INSERT INTO users SELECT 'u' || n, 'name' || n FROM generate_series(1, 1500) n;
INSERT INTO projects SELECT 'p' || n FROM generate_series(1, 20) n;
INSERT INTO members SELECT p || '-' || u, 'p' || p, 'u' || u
  FROM generate_series(1, 20) p, generate_series(1, 1500) u;
"""
"""Relations that lead from one post to 45 million pairs."""

_PEOPLE = "project.members_via_project.user"
BOMBS = [
    f"{_PEOPLE}.{name} ?~ {_PEOPLE}.members_via_user.project.members_via_project.{end}"
    for name in ("name", "name:lower")
    for end in ("id", "user", "project")
]
"""Filters that are never true; each is a query of its own."""


def _filtered(text: str) -> str:
    return topic("posts/*", filter=text)


def _bombed(database_url: str, directory: Path) -> AbstractAsyncContextManager[Service]:
    names = ("users", "projects", "members", "posts")
    return service(
        database_url,
        directory,
        collections={name: {"table": name, "list_rule": ""} for name in names},
        schema=BOMBED,
        sections={"database": {"statement_timeout": "2s"}, "logging": {"format": "json"}},
    )


async def _waits(running: Service, names: Iterable[str], *others: Listener) -> list[float]:
    """Write a post for each name; return how many seconds the other subscribers waited for it."""
    waits = []
    for name in names:
        began = time.monotonic()
        await running.write.execute("INSERT INTO posts VALUES (%s, 'p1')", (name,))
        for other in others:
            assert [m.data["record"]["id"] for m in await other.take(1)] == [name]
        waits.append(time.monotonic() - began)
    return waits


async def test_a_filter_that_is_a_bomb_costs_its_own_subscriber(
    database_url: str, tmp_path: Path
) -> None:
    """Other subscribers never wait for it.

    Its own events come when PostgreSQL has answered, or not at all.
    """
    async with (
        _bombed(database_url, tmp_path) as running,
        listener(running.address, _filtered(BOMBS[0]), "posts/*", "users/*") as bomber,
        listener(running.address, "posts/*") as other,
        listener(running.address, _filtered("project.members_via_project.id ?= '1-7'")) as asking,
    ):
        names = [f"n{n}" for n in range(8)]
        waits = await _waits(running, names, other, asking)
        await running.write.execute("INSERT INTO users VALUES ('new', '')")

        assert max(waits) < 1
        received = await bomber.take(9, 40)
        assert [m.event for m in received] == ["posts/*"] * 8 + ["users/*"]
        assert [m.data["record"]["id"] for m in received] == [*names, "new"]
        assert running.process.output().count("rule.suspended") == 1


async def test_slow_filters_of_a_new_shape_with_each_call_delay_no_other_connection(
    database_url: str, tmp_path: Path
) -> None:
    """Measured filters don't help against a client that submits a new one each time."""
    async with (
        _bombed(database_url, tmp_path) as running,
        listener(running.address) as bomber,
        listener(running.address, "posts/*") as other,
        listener(running.address, _filtered("project.members_via_project.id ?= '1-7'")) as asking,
    ):
        waits = []
        for n, bomb in enumerate(BOMBS[:3]):
            assert await bomber.subscribe(_filtered(bomb), "posts/*") == 204
            waits += await _waits(running, [f"{n}-{m}" for m in range(4)], other, asking)
        received = await bomber.take(4 * 3, 40)

        assert [m.data["record"]["id"] for m in received if m.event == "posts/*"] == [
            f"{n}-{m}" for n in range(3) for m in range(4)
        ]
        assert max(waits) < 1


async def test_slow_filters_of_new_connections_delay_no_other_connection(
    database_url: str, tmp_path: Path
) -> None:
    """A new connection has no measurements, so its filter is tried alone first."""
    async with (
        _bombed(database_url, tmp_path) as running,
        listener(running.address, "posts/*") as other,
        listener(running.address, _filtered("project.members_via_project.id ?= '1-7'")) as asking,
    ):
        waits = []
        for n, bomb in enumerate(BOMBS):
            async with listener(running.address, _filtered(bomb)):
                waits += await _waits(running, [f"{n}"], other, asking)

        assert max(waits) < 1


async def test_a_connection_s_filters_that_ask_the_database_are_numbered(
    database_url: str, tmp_path: Path
) -> None:
    """A call with more is refused, and leaves the earlier subscriptions in place."""
    collections = {name: {"table": name, "list_rule": ""} for name in ("projects", "posts")}
    schema = """
    CREATE TABLE projects (id text PRIMARY KEY, name text);
    CREATE TABLE posts (id text PRIMARY KEY, project text REFERENCES projects);
    INSERT INTO projects VALUES ('p', 'Paint');
    """
    topics = [_filtered(f"project.name ~ 'p' && id != '{n}'") for n in range(COSTLY + 1)]
    async with (
        service(
            database_url,
            tmp_path,
            collections=collections,
            schema=schema,
            sections={"logging": {"format": "json"}},
        ) as running,
        listener(running.address, *topics[1:], "posts/*") as greedy,
        listener(running.address, topics[-1]) as modest,
    ):
        await running.write.execute("INSERT INTO posts VALUES ('one', 'p')")
        received = {m.event for m in await greedy.take(COSTLY + 1)}
        assert await greedy.subscribe(*topics) == 400
        await running.write.execute("INSERT INTO posts VALUES ('two', 'p')")
        again = {m.event for m in await greedy.take(COSTLY + 1)}

        assert received == again == {*topics[1:], "posts/*"}
        assert [m.data["record"]["id"] for m in await modest.take(2)] == ["one", "two"]
        (refused,) = [
            json.loads(line)
            for line in running.process.output().splitlines()
            if "subscription.refused" in line
        ]
        assert refused["limit"] == "asking_filters"
