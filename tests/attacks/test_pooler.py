"""Rules through PgBouncer in transaction mode, while another client changes session settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from pgrealtime.config.model import DatabaseConfig
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.postgres.pool import QueryPool
from tests.e2e.listener import listener
from tests.e2e.service import service, token
from tests.pgbouncer import pgbouncer
from tests.topics import topic

SESSIONS = 2

LEFT_BEHIND: tuple[LiteralString, ...] = (
    "SET search_path = evil, public, pg_catalog",
    "SET row_security = on",
    "SET DateStyle = 'German'",
    "SET TimeZone = 'Asia/Tokyo'",
    "SET IntervalStyle = 'sql_standard'",
    "SET extra_float_digits = -15",
    "SET bytea_output = 'escape'",
    "SET array_nulls = off",
    "SET standard_conforming_strings = off",
    "SET default_transaction_read_only = off",
    "SET default_transaction_isolation = 'serializable'",
    "SET statement_timeout = '1h'",
    "CREATE TEMPORARY TABLE IF NOT EXISTS pg_class (relname text)",
    "CREATE TEMPORARY TABLE IF NOT EXISTS pg_settings (name text, setting text)",
)
"""Settings that a careless or hostile application leaves in the sessions that it shares with us."""

EVIL = """
CREATE SCHEMA evil;
CREATE FUNCTION evil.always(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE OPERATOR evil.= (FUNCTION = evil.always, LEFTARG = text, RIGHTARG = text);
CREATE TABLE evil.members AS SELECT 'm9'::text AS id, '1'::text AS project, 'bob'::text AS "user";
"""

SCHEMA = f"""
CREATE TABLE users (id text PRIMARY KEY, name text);
CREATE TABLE projects (id text PRIMARY KEY, name text);
CREATE TABLE members (
  id text PRIMARY KEY, project text REFERENCES projects, "user" text REFERENCES users);
CREATE TABLE tasks (
  id text PRIMARY KEY, project text REFERENCES projects);
ALTER TABLE tasks REPLICA IDENTITY FULL;
INSERT INTO users VALUES ('ann', 'Ann'), ('bob', 'Bob');
INSERT INTO projects VALUES ('1', 'one');
INSERT INTO members VALUES ('m1', '1', 'ann');
{EVIL}
"""

ENOUGH = 8
"""More often than the driver executes a statement without preparing it."""

EXPANDED = topic("tasks/*", expand="project")

RULE = "project.members_via_project.user ?= @request.auth.id"

COLLECTIONS: dict[str, dict[str, Any]] = {
    "users": {"table": "users", "type": "auth", "list_rule": "", "view_rule": ""},
    "projects": {"table": "projects", "list_rule": RULE.removeprefix("project."), "view_rule": ""},
    "members": {"table": "members", "list_rule": ""},
    "tasks": {"table": "tasks", "list_rule": RULE, "view_rule": RULE},
}


async def leave_settings(url: str) -> None:
    """Leave the settings in each session of the pooler, all of which are in use at once."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=None)
            )
            for _ in range(SESSIONS)
        ]
        for client in clients:
            await client.execute("BEGIN")
        for client in clients:
            for statement in LEFT_BEHIND:
                await client.execute(statement)
            await client.execute("COMMIT")


@asynccontextmanager
async def pool_behind(url: str) -> AsyncIterator[QueryPool]:
    async with open_query_pool(DatabaseConfig(url=url, wait_for=0)) as pool:
        yield pool


@pytest.mark.parametrize("prepared", [200, 0], ids=["default", "before-1.21"])
async def test_rules_behind_a_pooler_are_evaluated_with_our_settings(
    database_url: str, tmp_path: Path, prepared: int
) -> None:
    """Events, expand and logins by token, each more often than a statement stays unprepared."""
    with pgbouncer(database_url, sessions=SESSIONS, prepared=prepared) as pooled:
        sections = {"database": {"query_url": pooled}}
        async with (
            service(
                database_url, tmp_path, sections=sections, collections=COLLECTIONS, schema=SCHEMA
            ) as running,
            listener(running.address, EXPANDED, token=token("ann")) as ann,
            listener(running.address, "tasks/*", "projects/*", token=token("bob")) as bob,
        ):
            for n in range(ENOUGH):
                await leave_settings(pooled)
                await running.write.execute("INSERT INTO tasks VALUES (%s, '1')", (f"t{n}",))
                (received,) = await ann.take(1)
                assert received.data["record"]["id"] == f"t{n}"
                assert received.data["record"]["expand"]["project"]["name"] == "one"
                await leave_settings(pooled)
                async with listener(running.address, "tasks/*", token=token("ann")):
                    pass  # a lookup of the user, and a snapshot
            await running.write.execute("INSERT INTO members VALUES ('m2', '1', 'bob')")
            await running.write.execute("UPDATE projects SET name = 'two'")

            (first,) = await bob.take(1)
            assert first.data["record"]["name"] == "two"
            for event in ("rule.error", "rule_query.unanswered", "request.failed"):
                assert running.process.logged(event) == []


async def test_every_statement_behind_a_pooler_has_its_settings(database_url: str) -> None:
    """Whatever was left in the session applies no more, and nothing of ours stays in it."""
    names = (
        *("search_path", "row_security", "DateStyle", "TimeZone", "IntervalStyle", "array_nulls"),
        *("extra_float_digits", "bytea_output", "standard_conforming_strings", "lock_timeout"),
        *("statement_timeout", "transaction_read_only", "transaction_isolation"),
    )
    settings = sql.SQL("SELECT {}").format(
        sql.SQL(", ").join(
            sql.SQL("pg_catalog.current_setting({})").format(sql.Literal(name)) for name in names
        )
    )
    with (
        psycopg.connect(database_url, autocommit=True) as admin,
        pgbouncer(database_url, sessions=SESSIONS) as pooled,
    ):
        admin.execute(EVIL.encode())
        async with pool_behind(pooled) as pool:
            for _ in range(8):
                await leave_settings(pooled)
                async with pool.connection() as connection:
                    row = await (await connection.execute(settings)).fetchone()
                assert row == (
                    *("pg_catalog, pg_temp", "off", "ISO, MDY", "UTC", "postgres", "on"),
                    *("1", "hex", "on", "2s", "2s", "on", "repeatable read"),
                )
                snapshot, _, in_recovery = await pool.fetch_row(
                    "SELECT pg_catalog.pg_current_snapshot()::text, 1, false"
                )
                assert snapshot.count(":") == 2
                assert in_recovery is False
        async with await psycopg.AsyncConnection.connect(pooled, autocommit=True) as neighbour:
            shown = await (await neighbour.execute("SHOW search_path")).fetchone()
            assert shown == ("evil, public, pg_catalog",)


async def test_a_role_taken_in_a_shared_session_is_not_ours(database_url: str) -> None:
    """Another client's SET ROLE stays in the session.

    Queries of ours run as the role that logged in.
    """
    with (
        psycopg.connect(database_url, autocommit=True) as admin,
        pgbouncer(database_url, sessions=1) as pooled,
    ):
        lesser = f"lesser_{admin.info.dbname}"
        admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(lesser)))
        try:
            async with pool_behind(pooled) as pool:
                async with await psycopg.AsyncConnection.connect(pooled, autocommit=True) as other:
                    await other.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(lesser)))
                assert await pool.fetch_row("SELECT current_user") == (admin.info.user,)
        finally:
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(lesser)))
