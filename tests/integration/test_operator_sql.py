"""The scripts in sql/ do what they say, and may be run again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

_SQL = Path(__file__).parents[2] / "sql"

_BLANK = "\\ "
"""A blank within a value, as libpq's options have it."""

_SCHEMA = """
    CREATE SCHEMA "My App";
    CREATE TABLE "My App"."Users" (id int PRIMARY KEY);
    CREATE TABLE events (at int PRIMARY KEY) PARTITION BY RANGE (at);
    CREATE TABLE early PARTITION OF events FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (at);
    CREATE TABLE earliest PARTITION OF early FOR VALUES FROM (0) TO (5);
    CREATE TABLE late PARTITION OF events FOR VALUES FROM (10) TO (20);
    CREATE TABLE other (id int PRIMARY KEY);
    CREATE VIEW seen AS SELECT 1 AS id;
"""


class Operator:
    """An operator with psql, own files and own role names, since roles belong to the whole server.

    Args:
        url: The database to be served, as a superuser.
    """

    def __init__(self, url: str) -> None:
        suffix = uuid4().hex[:12]
        self.url = url
        self.stream_role = f"Stream {suffix}"
        self.query_role = f"Query {suffix}"

    def run(self, file: str, tables: str = "") -> list[str]:
        """Run a file; return the warnings."""
        settings = {
            "pgrealtime.stream_role": self.stream_role,
            "pgrealtime.query_role": self.query_role,
            "pgrealtime.tables": tables,
        }
        options = " ".join(
            f"-c {name}={value.replace(' ', _BLANK)}" for name, value in settings.items()
        )
        warnings: list[str] = []
        with psycopg.connect(make_conninfo(self.url, options=options)) as connection:
            connection.add_notice_handler(
                lambda notice: warnings.append(notice.message_primary or "")
            )
            connection.execute((_SQL / file).read_bytes())
        return warnings

    def ask(self, query: str, role: str = "", **parameters: object) -> list[tuple[Any, ...]]:
        url = make_conninfo(self.url, user=role) if role else self.url
        with psycopg.connect(url) as connection:
            return connection.execute(query.encode(), parameters or None).fetchall()


@pytest.fixture
def operator(database_url: str) -> Iterator[Operator]:
    made = Operator(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(_SCHEMA)
        yield made
        for role in (made.stream_role, made.query_role):
            known = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [role])
            for command in ("DROP OWNED BY {}", "DROP ROLE {}") if known.fetchone() else ():
                connection.execute(sql.SQL(command).format(sql.Identifier(role)))


def test_the_stream_role_may_replicate_and_the_query_role_only_logs_in(operator: Operator) -> None:
    """The role that reads every change is not the role that evaluates rules."""
    for _ in range(2):
        assert operator.run("roles.sql") == []
    assert operator.ask(
        "SELECT rolname, rolcanlogin, rolreplication, rolsuper, rolcreaterole, rolcreatedb,"
        " rolbypassrls, rolconfig FROM pg_roles WHERE rolname IN (%(one)s, %(other)s)"
        " ORDER BY rolreplication",
        one=operator.stream_role,
        other=operator.query_role,
    ) == [
        (
            *(operator.query_role, True, False, False, False, False, False),
            ["default_transaction_read_only=on"],
        ),
        (operator.stream_role, True, True, False, False, False, False, None),
    ]


def test_a_query_role_with_too_many_privileges_is_reported(operator: Operator) -> None:
    operator.run("roles.sql")
    with psycopg.connect(operator.url, autocommit=True) as connection:
        connection.execute(
            sql.SQL("ALTER ROLE {} SUPERUSER").format(sql.Identifier(operator.query_role))
        )
    assert operator.run("roles.sql") == [f'role "{operator.query_role}" may do more than it needs']


def test_the_query_role_reads_the_named_tables_and_nothing_else(operator: Operator) -> None:
    operator.run("roles.sql")
    for _ in range(2):
        assert operator.run("tables.sql", '"My App"."Users", events,seen') == []

    for name in ('"My App"."Users"', "events", "seen"):
        operator.ask(f"SELECT * FROM {name}", operator.query_role)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        operator.ask("SELECT * FROM other", operator.query_role)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        operator.ask(
            "SET default_transaction_read_only = off; COMMIT;"
            ' INSERT INTO "My App"."Users" VALUES (1)',
            operator.query_role,
        )


def test_named_tables_and_all_their_partitions_log_the_whole_old_row(operator: Operator) -> None:
    operator.run("roles.sql")
    operator.run("tables.sql", '"My App"."Users",events')
    assert operator.ask(
        "SELECT relname::text, relreplident::text FROM pg_class"
        " WHERE relkind IN ('r', 'p') AND relnamespace IN"
        " ('public'::regnamespace, '\"My App\"'::regnamespace) ORDER BY relname"
    ) == [
        ("Users", "f"),
        ("earliest", "f"),
        ("early", "f"),
        ("events", "f"),
        ("late", "f"),
        ("other", "d"),
    ]


def test_without_tables_nothing_is_done_and_the_hint_says_how(operator: Operator) -> None:
    operator.run("roles.sql")
    with pytest.raises(psycopg.errors.RaiseException) as caught:
        operator.run("tables.sql")
    assert caught.value.diag.message_hint is not None
    assert "PGOPTIONS=" in caught.value.diag.message_hint
