"""Preconditions of all other tests: what the given server and its databases provide."""

from __future__ import annotations

import psycopg
from psycopg import pq

from tests.conftest import MakeDatabase, drop_database


def test_the_server_decodes_with_both_plugins(database_url: str) -> None:
    """Tests may open slots with wal2json and with pgoutput, and prepare transactions."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        for plugin in ("wal2json", "pgoutput"):
            connection.execute(
                "SELECT pg_create_logical_replication_slot(%s, %s, temporary => true)",
                [f"given_{plugin}", plugin],
            )
        prepared = connection.execute("SHOW max_prepared_transactions").fetchone()
    assert prepared is not None
    assert int(prepared[0]) > 0


def test_a_database_is_fresh_and_utf8(make_database: MakeDatabase) -> None:
    """Two databases of one test share nothing, and hold text whatever the cluster's locale."""
    one, other = make_database(), make_database()
    with psycopg.connect(one) as connection:
        connection.execute("CREATE TABLE only_here (name text)")
        connection.execute("INSERT INTO only_here VALUES ('Grüße 🐘')")
    with psycopg.connect(other) as connection:
        tables = connection.execute("SELECT to_regclass('only_here')").fetchone()
        encoding = connection.execute("SHOW server_encoding").fetchone()
    assert tables == (None,)
    assert encoding == ("UTF8",)


def test_a_database_is_dropped_whatever_holds_on_to_it(database_url: str) -> None:
    """A test that failed half-way leaves nothing behind that disturbs the next one."""
    name = database_url.rpartition("/")[2]
    server = database_url.rpartition("/")[0]
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('idle', 'wal2json')")
        connection.execute("SELECT pg_create_logical_replication_slot('in_use', 'wal2json')")
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("PREPARE TRANSACTION 'half way'")
    walsender = pq.PGconn.connect(f"{database_url}?replication=database".encode())
    started = walsender.exec_(b"START_REPLICATION SLOT in_use LOGICAL 0/0")
    assert started.status == pq.ExecStatus.COPY_BOTH
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        drop_database(admin, name)
        left = admin.execute(
            "SELECT (SELECT count(*) FROM pg_database WHERE datname = %(name)s),"
            " (SELECT count(*) FROM pg_replication_slots WHERE database = %(name)s),"
            " (SELECT count(*) FROM pg_prepared_xacts WHERE database = %(name)s)",
            {"name": name},
        ).fetchone()
    walsender.finish()
    assert left == (0, 0, 0)
