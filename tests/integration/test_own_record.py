"""The record that a login answers with, from tables that PocketBase doesn't have."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.own_record import OwnRecordRenderer
from pgrealtime.rule_queries.executor import QueryExecutor

SCHEMA = """
CREATE TABLE people (id int PRIMARY KEY, email text, name text);
CREATE TABLE teams (id int PRIMARY KEY, name text);
CREATE TABLE membership (person int, team int, PRIMARY KEY (person, team));
INSERT INTO people VALUES (7, 'ann@x', 'Ann');
INSERT INTO teams VALUES (1, 'one'), (2, 'two');
INSERT INTO membership VALUES (7, 2), (7, 1);
"""
THROUGH = {
    "collection": "teams",
    "through": "public.membership",
    "source": "person",
    "target": "team",
}
ROW: Row = {"id": "7", "email": "ann@x", "name": "Ann"}


async def _collections(
    database_url: str, teams_rule: str | None, *, auth_rule: str | None = ""
) -> Collections:
    raw: dict[str, dict[str, Any]] = {
        "people": {"type": "auth", "relations": {"teams": THROUGH}, "auth_rule": auth_rule},
        "teams": {"view_rule": teams_rule},
    }
    configured = {
        name: CollectionConfig.model_validate({"table": f"public.{name}", **more})
        for name, more in raw.items()
    }
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        return build_collections(configured, await read_catalog(connection, schemas=["public"]))


async def test_own_record_has_its_relations_and_follows_the_rules_in_force(
    database_url: str,
) -> None:
    """It contains ids of a junction table; a reload's rules apply from the next login on."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(SCHEMA)
    open_to_all = await _collections(database_url, "name = 'two'")
    locked = await _collections(database_url, None)
    async with QueryPool(database_url, max_size=2) as pool:
        records = OwnRecordRenderer(QueryExecutor(pool), open_to_all, nulls="null")

        async def shown(collections: Collections) -> dict[str, Any]:
            people = collections["people"]
            ann = Caller(AuthRecord(collection_id=people.id, collection_name="people", id="7"))
            made = await records.render_record(
                people, ROW, ann, query={"expand": "teams"}, headers={}
            )
            record: dict[str, Any] = json.loads(made)
            return {name: record.get(name) for name in ("email", "teams", "expand")}

        before = await shown(open_to_all)
        records.replace_collections(locked)
        after = await shown(locked)
        late = await shown(open_to_all)  # whose password was checked while the rules changed

    (team,) = before["expand"]["teams"]
    assert (before["email"], before["teams"], team["name"]) == ("ann@x", ["1", "2"], "two")
    assert after == {"email": "ann@x", "teams": ["1", "2"], "expand": None}
    assert late == {"email": "ann@x", "teams": None, "expand": None}


async def test_the_rule_in_force_decides_a_login(database_url: str) -> None:
    """Also if it came into force while the password was checked against an earlier row."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(SCHEMA)
    rules = (
        "",
        "name = 'Ann'",
        "teams.name ?= 'two'",
        "teams.name ?= 'three'",
        "name = 'Bob'",
        None,
    )
    each = [await _collections(database_url, None, auth_rule=rule) for rule in rules]
    before = each[1]["people"]
    async with QueryPool(database_url, max_size=2) as pool:
        records = OwnRecordRenderer(QueryExecutor(pool), each[0], nulls="null")
        found = []
        for collections in (*each, Collections(())):
            records.replace_collections(collections)
            found.append(
                await records.may_sign_in(
                    before, ROW, Caller(), query={}, headers={}, context="password"
                )
            )

    assert found == [True, True, True, False, False, False, False]


FAILING: dict[str, tuple[str, str]] = {
    "not granted": ("teams.name ?= 'two'", "REVOKE SELECT ON teams FROM reader"),
    "a column less": ("name = 'Ann' && teams.name ?= 'two'", "ALTER TABLE teams DROP name"),
    "too slow": ("teams.name ?= 'two'", "LOCK TABLE teams"),
    "names nobody knows": ("nope = 1 || name = 'Ann'", ""),
    "refused by the language": ("name =", ""),
}


@pytest.mark.parametrize("kind", FAILING)
async def test_a_rule_that_cannot_be_evaluated_denies_the_login(
    database_url: str, kind: str
) -> None:
    """An error or a time-out denies the login; the same rule admits it once it is answered."""
    rule, fault = FAILING[kind]
    role = f"reader_{uuid4().hex[:8]}"
    with psycopg.connect(database_url, autocommit=True) as admin, admin.transaction():
        admin.execute(SCHEMA)
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        grant = sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}")
        admin.execute(grant.format(sql.Identifier(role)))
    try:
        collections = await _collections(database_url, None, auth_rule=rule)
        conninfo = make_conninfo(database_url, user=role)
        async with QueryPool(conninfo, statement_timeout=0.3, timeout=30) as pool:
            records = OwnRecordRenderer(QueryExecutor(pool), collections, nulls="null")

            async def may_sign_in() -> bool:
                people = collections["people"]
                return await records.may_sign_in(
                    people, ROW, Caller(), query={}, headers={}, context="password"
                )

            assert await may_sign_in() == bool(fault)
            with psycopg.connect(database_url) as admin:
                if fault:
                    admin.execute(fault.replace("reader", role).encode())
                    if not fault.startswith("LOCK"):
                        admin.commit()
                assert await may_sign_in() is False
    finally:
        with psycopg.connect(database_url, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


async def test_an_unreachable_database_denies_the_login_with_503(database_url: str) -> None:
    """The client gets 503, since a retry may succeed."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(SCHEMA)
    collections = await _collections(database_url, None, auth_rule="teams.name ?= 'two'")
    pool = QueryPool(database_url)
    await pool.open()
    await pool.close()
    records = OwnRecordRenderer(QueryExecutor(pool), collections, nulls="null")

    with pytest.raises(DatabaseUnreachableError):
        await records.may_sign_in(
            collections["people"], ROW, Caller(), query={}, headers={}, context="password"
        )
