"""The two servers that are compared: pgrealtime with PostgreSQL, and PocketBase; the same notes.

Each has a core to itself. PocketBase's core includes its database; pgrealtime's PostgreSQL shares
the other core with the writers and the subscribers.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import psycopg
from psycopg import sql

from tests.bench.machine import CLIENT_CORE, SERVER_CORE, pinned
from tests.conformance.fixtures import (
    FixtureCollection,
    FixtureField,
    FixtureRow,
    Fixtures,
    SuperuserAccount,
)
from tests.conformance.pocketbase_server import PocketBaseTemplate
from tests.e2e.service import service, token

TOPIC = "notes/*"
EVERYONE = ""
OWNER = "owner = @request.auth.id"
MOST_IN_A_COMMIT = 100

_BODY = "Some text that goes on for a little while, as people's notes do. " * 2
_SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY);
CREATE TABLE notes (id text PRIMARY KEY, owner text, title text, body text, n int);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE notes REPLICA IDENTITY FULL;
"""
_WRITE = """
INSERT INTO notes (id, owner, title, body, n)
SELECT lpad(n::text, 15, '0'), owner, 'note ' || n, %s, n
FROM unnest(%s::int[], %s::text[]) AS written(n, owner)
"""
_ROOT = SuperuserAccount(email="root@example.com", password="benchmarks only")


class Writer(Protocol):
    """Creates notes; one call is one commit, and returns when it is acknowledged."""

    def write(self, owners: Sequence[str]) -> None:
        """Create a note per owner."""
        ...


class Server(Protocol):
    """The interface that a benchmark measures."""

    @property
    def name(self) -> str:
        """Its name in the tables."""
        ...

    @property
    def port(self) -> int:
        """Of 127.0.0.1."""
        ...

    @property
    def pid(self) -> int:
        """Of its one process."""
        ...

    @property
    def tokens(self) -> Sequence[str]:
        """Of the users, in order."""
        ...

    def writer(self) -> Writer:
        """One more connection to write with."""
        ...


def process_ids(server: Server) -> Sequence[int]:
    """The ids of its processes; the first one started the others."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return [server.pid, *map(int, children)]


def user_id(number: int) -> str:
    """The id of one of the users, as PocketBase wants ids."""
    return f"user{number:011d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PgRealtime:
    """A running pgrealtime."""

    url: str
    port: int
    pid: int
    tokens: Sequence[str]
    numbers: Iterator[int]
    name: str = "pgrealtime"

    def writer(self) -> Writer:
        """A session of its own, as any application's."""
        connection = psycopg.connect(self.url, autocommit=True)
        _pin(connection.info.backend_pid)
        return _PostgresWriter(connection, self.numbers)


class _PostgresWriter:
    def __init__(self, connection: psycopg.Connection[Any], numbers: Iterator[int]) -> None:
        self._cursor = connection.cursor()
        self._numbers = numbers

    def write(self, owners: Sequence[str]) -> None:
        numbers = [next(self._numbers) for _ in owners]
        self._cursor.execute(_WRITE.encode(), (_BODY, numbers, list(owners)), prepare=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PocketBase:
    """A running PocketBase."""

    port: int
    pid: int
    tokens: Sequence[str]
    root: str
    numbers: Iterator[int]
    name: str = "PocketBase"

    def writer(self) -> Writer:
        """A connection that is kept open, as a client's pool would."""
        return _PocketBaseWriter(self.port, self.root, self.numbers)


class _PocketBaseWriter:
    def __init__(self, port: int, root: str, numbers: Iterator[int]) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._port = port
        self._root = root
        self._numbers = numbers

    def write(self, owners: Sequence[str]) -> None:
        notes = [_note(next(self._numbers), owner) for owner in owners]
        path = "/api/collections/notes/records"
        if len(notes) == 1:
            self._post(path, notes[0])
        else:
            calls = [{"method": "POST", "url": path, "body": note} for note in notes]
            self._post("/api/batch", {"requests": calls})

    def _post(self, path: str, content: object) -> None:
        body = json.dumps(content)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
            f"Authorization: {self._root}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall((head + body).encode())
        answer = self._socket.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        while not _is_whole(answer):
            answer += self._socket.recv(65536)


def _is_whole(answer: bytes) -> bool:
    head, blank, body = answer.partition(b"\r\n\r\n")
    if not blank:
        return False
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return len(body) >= int(length) if length else body.endswith(b"0\r\n\r\n")


def _note(number: int, owner: str) -> dict[str, object]:
    title = f"note {number}"
    return {"id": f"{number:015d}", "owner": owner, "title": title, "body": _BODY, "n": number}


@asynccontextmanager
async def pgrealtime(
    url: str, *, rule: str, users: int = 0, owners_are_shown: bool = False, workers: int = 1
) -> AsyncIterator[PgRealtime]:
    """Start it with a database of its own on the given server, dropped at the end.

    Args:
        url: URL of the server, as a superuser.
        rule: The notes' list and view rule.
        users: Number of users.
        owners_are_shown: Whether a note's owner is a relation, and every caller may see users.
        workers: Processes that serve the port; several use any core.
    """
    owner = {"relations": {"owner": {"collection": "users"}}} if owners_are_shown else {}
    shown = {"view_rule": ""} if owners_are_shown else {}
    async with AsyncExitStack() as stack:
        database = stack.enter_context(own_database(url))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rules = {"list_rule": rule, "view_rule": rule}
        with pinned(SERVER_CORE) if workers == 1 else nullcontext():
            running = await stack.enter_async_context(
                service(
                    database,
                    directory,
                    schema=_SCHEMA,
                    sections={
                        "realtime": {"max_connections": 20_000},
                        "server": {"workers": workers},
                    },
                    collections={
                        "users": {"table": "users", "type": "auth", **shown},
                        "notes": {"table": "notes", **rules, **owner},
                    },
                )
            )
        for number in range(users):
            await running.write.execute("INSERT INTO users VALUES (%s)", [user_id(number)])
        pin_sessions(database)
        yield PgRealtime(
            url=database,
            port=running.address.port,
            pid=running.process.pid,
            tokens=[token(user_id(number)) for number in range(users)],
            numbers=count(1),
        )


@asynccontextmanager
async def pocketbase(*, rule: str, users: int = 0) -> AsyncIterator[PocketBase]:
    """Start it with a directory of its own.

    Args:
        rule: The notes' list and view rule.
        users: Number of users.
    """
    batch = {"enabled": True, "maxRequests": MOST_IN_A_COMMIT, "timeout": 600}
    patches = {"/api/settings": {"batch": batch}}
    async with pocketbase_of(_fixtures(rule, users), users, patches) as running:
        yield running


@asynccontextmanager
async def pocketbase_of(
    fixtures: Fixtures,
    users: int,
    patches: Mapping[str, object],
    *,
    fill: Callable[[Path], None] = lambda _data: None,
) -> AsyncIterator[PocketBase]:
    """Start it with these collections in a directory of its own.

    Args:
        fixtures: The collections and their first records.
        users: Number of users, who are among the records.
        patches: Bodies of PATCH requests by path, for settings and indexes.
        fill: Adds to the database file before the start.
    """
    with tempfile.TemporaryDirectory() as directory:
        template = Path(directory) / "template"
        made = await PocketBaseTemplate.build(fixtures, template)
        fill(template / "data" / "data.db")
        async with AsyncExitStack() as stack:
            with pinned(SERVER_CORE):
                running = await stack.enter_async_context(made.running(Path(directory) / "data"))
            for path, body in patches.items():
                await running.api.call("PATCH", path, body)
            tokens = [
                await running.api.impersonate("users", user_id(number), 36_000)
                for number in range(users)
            ]
            yield PocketBase(
                port=running.address.port,
                pid=running.process.pid,
                tokens=tokens,
                root=running.api.token,
                numbers=count(1),
            )


def _fixtures(rule: str, users: int) -> Fixtures:
    user_collection = FixtureCollection(
        id="_pb_users_auth_", name="users", type="auth", list_rule=None, view_rule=None, fields=()
    )
    fields = tuple(FixtureField(name=name, type="text") for name in ("owner", "title", "body"))
    notes = FixtureCollection(
        id="pbc_notes000001",
        name="notes",
        type="base",
        list_rule=rule,
        view_rule=rule,
        fields=(*fields, FixtureField(name="n", type="number")),
    )
    rows = tuple(
        FixtureRow(
            collection="users",
            data={"id": user_id(number), "tokenKey": secrets.token_hex(25)},
            raw=True,
        )
        for number in range(users)
    )
    return Fixtures(superuser=_ROOT, accounts={}, collections=(user_collection, notes), rows=rows)


@contextmanager
def own_database(url: str) -> Iterator[str]:
    """Create a database on the server, dropped at the end; yield its URL."""
    name = f"bench_{secrets.token_hex(4)}"
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield psycopg.conninfo.make_conninfo(url, dbname=name)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def pin_sessions(database: str) -> None:
    """Keep the sessions of this database off the server's core, where the machine permits it."""
    with psycopg.connect(database) as connection:
        mine = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        for (pid,) in connection.execute(mine):
            _pin(pid)


def _pin(pid: int) -> None:
    with suppress(OSError):
        os.sched_setaffinity(pid, {CLIENT_CORE})
