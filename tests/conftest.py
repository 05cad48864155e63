"""The PostgreSQL server that tests run against, and a fresh database for each of them.

``tests/run.sh`` starts a server and sets its port in ``PGREALTIME_TEST_PG_PORT``; by hand any
server with ``wal_level = logical`` on 127.0.0.1 will do that admits ``postgres`` without a
password. Without one the tests that need it skip; in CI they fail.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from typing import TypeAlias
from uuid import uuid4

import hypothesis
import psycopg
import pytest
from psycopg import sql
from pytest_postgresql import factories
from pytest_postgresql.executor_noop import NoopExecutor

from tests.lacking import lacking
from tests.own_server import OwnServer, own_server

MakeDatabase: TypeAlias = Callable[[], str]
"""Makes one more fresh database and returns its URL."""

_HOST = "127.0.0.1"
_USER = "postgres"
_PORT = os.environ.get("PGREALTIME_TEST_PG_PORT", "")
_NO_SERVER = "no PostgreSQL server: PGREALTIME_TEST_PG_PORT isn't set; sh tests/run.sh starts one"

# The database is this process's own, so that two runs can share a server.
given_server = factories.postgresql_noproc(
    host=_HOST, port=_PORT, user=_USER, dbname=f"pgrealtime_tests_{os.getpid()}"
)


# Hypothesis' deadline measures the machine, not the code. In CI the same examples come each time,
# so that a red run is about the submission.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "here")


def pytest_configure() -> None:
    """Take SIGTERM like Ctrl-C, so that fixtures end what they started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgresql_proc(request: pytest.FixtureRequest) -> NoopExecutor:
    """The given server, as pytest-postgresql describes it."""
    if not _PORT:
        lacking(_NO_SERVER)
    server: NoopExecutor = request.getfixturevalue("given_server")
    return server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give all skips for lack of a server one location, so that the summary reports it once."""
    report = yield
    match report.longrepr:
        case (str(), int(), str(reason)) if _NO_SERVER in reason:
            report.longrepr = (__file__, 1, reason)
    return report


@pytest.fixture
def make_database(postgresql_proc: NoopExecutor) -> Iterator[MakeDatabase]:
    """Makes empty UTF8 databases, as many as a test needs; they are dropped when the test ends."""
    names: list[str] = []
    with psycopg.connect(
        host=postgresql_proc.host,
        port=postgresql_proc.port,
        user=_USER,
        dbname="postgres",
        autocommit=True,
    ) as admin:

        def make() -> str:
            name = f"test_{uuid4().hex[:16]}"
            admin.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(
                    sql.Identifier(name)
                )
            )
            names.append(name)
            return f"postgresql://{_USER}@{_HOST}:{postgresql_proc.port}/{name}"

        yield make
        for name in names:
            drop_database(admin, name)


@pytest.fixture
def database_url(make_database: MakeDatabase) -> str:
    """The URL of a fresh database of the test's own."""
    return make_database()


@pytest.fixture
def server() -> Iterator[OwnServer]:
    """A server of the test's own, whatever it does to it."""
    with own_server() as running:
        yield running


def drop_database(admin: psycopg.Connection, name: str) -> None:
    """Drop the database, whatever still uses it.

    FORCE ends sessions, but refuses while a walsender has a slot in use or a transaction is
    prepared (``dropdb`` in PostgreSQL's dbcommands.c). Idle slots are dropped with the database.
    """
    prepared = admin.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s", [name])
    if gids := [gid for (gid,) in prepared]:
        with psycopg.connect(
            host=admin.info.host, port=admin.info.port, user=_USER, dbname=name, autocommit=True
        ) as inside:
            for gid in gids:
                inside.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
    admin.execute(
        "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
        " WHERE database = %s AND active_pid IS NOT NULL",
        [name],
    )
    admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
