"""Requests per second and p99 of reads, and what they cost those who listen; beside PocketBase.

    python -m tests.bench.reads postgresql://postgres@127.0.0.1:5432/postgres

The same 100,000 notes of 1,000 users in 100 teams, the same indexes, the same requests over the
same number of connections; rounds alternate. The cores are assigned as in all benchmarks:
PocketBase with its database has one to itself, pgrealtime's process has that one and shares the
other with PostgreSQL and the callers. Then live events at a steady pace, alone and beside pages
that are read as fast as they are answered, in rounds that alternate as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
)
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
from psycopg import sql

from tests.bench import requesting
from tests.bench.listeners import listeners
from tests.bench.machine import (
    CLIENT_CORE,
    SERVER_CORE,
    allow_many_files,
    cpu_seconds,
    described,
    load,
    pinned,
)
from tests.bench.servers import (
    OWNER,
    PgRealtime,
    PocketBase,
    own_database,
    pin_sessions,
    pocketbase_of,
    user_id,
)
from tests.bench.writing import paced
from tests.conformance.fixtures import (
    FixtureCollection,
    FixtureField,
    FixtureRow,
    Fixtures,
    SuperuserAccount,
)
from tests.e2e.service import service, token

_USERS = 1000
_TEAMS = 100
_NOTES = 100_000
_OF_FIRST_USER = 10_000
_BATCH = 1000
"""The SDK's, of getFullList."""
_DEADLINE = 120.0
_WARMING = 20
_LISTENERS = 100
_BODY = "Some text that goes on for a little while, as people's notes do. " * 2
_CREATED = "2025-01-01 00:00:00"
_SCHEMA = """
CREATE TABLE teams (id text PRIMARY KEY, name text NOT NULL);
CREATE TABLE users (id text PRIMARY KEY, name text NOT NULL, team text NOT NULL);
CREATE TABLE notes (
  id text PRIMARY KEY,
  owner text NOT NULL,
  title text NOT NULL,
  body text NOT NULL,
  n int NOT NULL,
  created timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE notes REPLICA IDENTITY FULL;
"""
_FILL = """
INSERT INTO teams SELECT 'team' || lpad(n::text, 11, '0'), 'team ' || n
FROM generate_series(0, {teams} - 1) n;
INSERT INTO users SELECT 'user' || lpad(n::text, 11, '0'), 'user ' || n,
  'team' || lpad((n % {teams})::text, 11, '0')
FROM generate_series(0, {users} - 1) n;
INSERT INTO notes SELECT 'old' || lpad(n::text, 12, '0'), 'user' || lpad(owner::text, 11, '0'),
  'note ' || n, {body}, n, {created}::timestamptz + n * interval '1 minute'
FROM (SELECT n, CASE WHEN n < {first} THEN 0 ELSE 1 + n % ({users} - 1) END AS owner
  FROM generate_series(0, {notes} - 1) n) AS numbered;
CREATE INDEX ON notes (owner, created DESC, id);
CREATE INDEX ON notes (created, id);
ANALYZE;
"""
_INDEXES = (
    "CREATE INDEX `notes_owner` ON `notes` (`owner`, `created` DESC, `id`)",
    "CREATE INDEX `notes_created` ON `notes` (`created`, `id`)",
)
_ROOT = SuperuserAccount(email="root@example.com", password="benchmarks only")

Server = PgRealtime | PocketBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An operation that is repeated by several users."""

    name: str
    queries: Sequence[Sequence[tuple[str, str]]]
    """Of each request of the operation; of a view, none."""
    user_numbers: Sequence[int] | None
    """Who asks, in turn; None: a superuser."""
    views_records: bool = False
    callers: int = 8


_PAGE = (("page", "1"), ("perPage", "30"))
_MANY = range(1, 201)
CASES = (
    Case(
        name="page of 30 by owner, newest first",
        queries=[[*_PAGE, ("sort", "-created")]],
        user_numbers=_MANY,
    ),
    Case(
        name="the same without the total",
        queries=[[*_PAGE, ("skipTotal", "1"), ("sort", "-created")]],
        user_numbers=_MANY,
    ),
    Case(
        name="getFullList of 10,000",
        queries=[
            [("page", str(n + 1)), ("perPage", str(_BATCH)), ("skipTotal", "1")]
            for n in range(_OF_FIRST_USER // _BATCH + 1)
        ],
        user_numbers=[0],
        callers=2,
    ),
    Case(
        name="filter over relations, in all rows",
        queries=[[*_PAGE, ("sort", "-created"), ("filter", 'owner.team.name = "team 7"')]],
        user_numbers=None,
        callers=4,
    ),
    Case(
        name="filter over a relation, in one's own rows",
        queries=[[*_PAGE, ("sort", "-created"), ("filter", 'owner.name ~ "user"')]],
        user_numbers=_MANY,
    ),
    Case(
        name="expand of two levels, page of 30",
        queries=[[*_PAGE, ("skipTotal", "1"), ("expand", "owner.team")]],
        user_numbers=_MANY,
    ),
    Case(name="getOne", queries=[[]], user_numbers=_MANY, views_records=True),
)


def main() -> None:
    """Print a line per case, then realtime's latencies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one round of a case")
    parser.add_argument("--operations", type=int, default=1_000_000, help="of one round, at most")
    parser.add_argument("--notes", type=int, default=_NOTES)
    parser.add_argument("--only", default="", help="part of the cases' names")
    parser.add_argument("--writes", type=int, default=300, help="a round beside reads; 0: none")
    parser.add_argument("--pace", type=float, default=50.0, help="writes per second")
    parser.add_argument("--readers", type=int, default=4, help="beside live events")
    asyncio.run(compare(parser.parse_args()))


async def compare(arguments: argparse.Namespace) -> None:
    """Alternate the rounds."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    async with (
        _pgrealtime(arguments.url, arguments.notes) as ours,
        _pocketbase(arguments.notes) as other,
    ):
        await asyncio.to_thread(_compare_reads, ours, other, arguments)
        if arguments.writes:
            for server in (ours, other):
                await asyncio.to_thread(_compare_latencies, server, arguments)


# --- reads


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    per_second: float
    p99: float
    """Milliseconds."""
    cpu_milliseconds: float
    """Of the server's process, per operation."""


def _compare_reads(ours: Server, other: Server, arguments: argparse.Namespace) -> None:
    for case in CASES:
        if arguments.only not in case.name:
            continue
        shown = [[len(_items(server, case, n)) for n in (0, 1)] for server in (ours, other)]
        assert shown[0] == shown[1], f"{case.name}: {shown}"
        for server in (ours, other):
            _measure(server, case, arguments)  # caches are filled
        rounds = [
            [_measure(server, case, arguments) for server in (ours, other)]
            for _ in range(arguments.rounds)
        ]
        ratios = sorted(mine.per_second / theirs.per_second for mine, theirs in rounds)
        tails = sorted(mine.p99 / theirs.p99 for mine, theirs in rounds)
        for server, side in zip((ours, other), zip(*rounds, strict=True), strict=True):
            print(
                f"{case.name:42} {server.name:10}"
                f" {statistics.median(one.per_second for one in side):8.1f}/s,"
                f" p99 {statistics.median(one.p99 for one in side):7.1f} ms,"
                f" its CPU {statistics.median(one.cpu_milliseconds for one in side):7.2f} ms each"
            )
        print(
            f"{'':42} ratio of rates {statistics.median(ratios):.2f}"
            f" ({ratios[0]:.2f}-{ratios[-1]:.2f}), of p99 {statistics.median(tails):.2f}"
            f" ({tails[0]:.2f}-{tails[-1]:.2f}); {load()}",
            flush=True,
        )


def _measure(server: Server, case: Case, arguments: argparse.Namespace) -> _Rates:
    with requests() as sent:
        before = cpu_seconds(server.pid)
        sent.begin(
            server.port,
            _operations(server, case),
            callers=case.callers,
            seconds=arguments.seconds,
            most=arguments.operations,
        )
        done = sent.finish()
        spent = cpu_seconds(server.pid) - before
    milliseconds = sorted(done["milliseconds"])
    return _Rates(
        per_second=len(milliseconds) / done["seconds"],
        p99=milliseconds[len(milliseconds) * 99 // 100],
        cpu_milliseconds=spent * 1e3 / len(milliseconds),
    )


def _operations(server: Server, case: Case) -> list[list[str]]:
    return [
        [_request(server, path, authorization) for path in paths]
        for paths, authorization in _calls(server, case)
    ]


def _calls(server: Server, case: Case) -> Iterator[tuple[list[str], str]]:
    for number in case.user_numbers or (None,):
        paths: list[str] = []
        for query in case.queries:
            path = "/api/collections/notes/records"
            if case.views_records:
                assert number is not None
                path += f"/{note_id(_OF_FIRST_USER + (number - 1 - _OF_FIRST_USER) % (_USERS - 1))}"
            paths.append(f"{path}?{urlencode(query)}" if query else path)
        yield paths, _root_token(server) if number is None else server.tokens[number]


def _request(server: Server, path: str, authorization: str) -> str:
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        f"Authorization: {authorization}\r\nAccept: */*\r\nAccept-Language: en-US\r\n"
        "Content-Type: application/json\r\nUser-Agent: node\r\nAccept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\n\r\n"
    )


def _items(server: Server, case: Case, place: int) -> list[Any]:
    """Return what one of the operations gives, as it is called."""
    calls = list(_calls(server, case))
    paths, authorization = calls[place % len(calls)]
    items: list[Any] = []
    for path in paths:
        url = f"http://127.0.0.1:{server.port}{path}"
        request = urllib.request.Request(url, headers={"Authorization": authorization})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        items += answer.get("items", [answer])
    return items


def _root_token(server: Server) -> str:
    return server.root if isinstance(server, PocketBase) else token("root", role="admin")


def note_id(number: int) -> str:
    """The id of one of the notes, as PocketBase wants ids."""
    return f"old{number:012d}"


class Requests:
    """A handle on the process that sends requests."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def begin(
        self,
        port: int,
        operations: Sequence[Sequence[str]],
        *,
        callers: int,
        seconds: float,
        most: int,
    ) -> None:
        """Begin to repeat operations, see ``requesting.run``."""
        assert self._process.stdin is not None
        command = {
            "port": port,
            "operations": operations,
            "callers": callers,
            "seconds": seconds,
            "most": most,
        }
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """Wait for the end, and return the milliseconds of each operation, and all seconds."""
        assert self._process.stdout is not None
        done: dict[str, Any] = json.loads(self._process.stdout.readline())
        return done


@contextmanager
def requests() -> Iterator[Requests]:
    """Start the process on the clients' core."""
    command = [sys.executable, "-m", requesting.__name__]
    with (
        pinned(CLIENT_CORE),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        try:
            yield Requests(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


# --- live events beside reads


def _compare_latencies(server: Server, arguments: argparse.Namespace) -> None:
    rounds = [
        (_latencies(server, arguments, reads=False), _latencies(server, arguments, reads=True))
        for _ in range(arguments.rounds)
    ]
    alone, beside = zip(*rounds, strict=True)
    ratios = sorted(after[1] / before[1] for before, after in rounds)
    print(
        f"{server.name:10} events: p50 {statistics.median(one[0] for one in alone):.2f} ms, p99"
        f" {statistics.median(one[1] for one in alone):.2f} ms alone; beside"
        f" {statistics.median(one[2] for one in beside):.0f} pages/s p50"
        f" {statistics.median(one[0] for one in beside):.2f} ms, p99"
        f" {statistics.median(one[1] for one in beside):.2f} ms; ratio of p99"
        f" {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}); {load()}",
        flush=True,
    )


def _latencies(
    server: Server, arguments: argparse.Namespace, *, reads: bool
) -> tuple[float, float, float]:
    """Return p50 and p99 of the events in milliseconds, and the pages read per second."""
    owner = user_id(_USERS - 1)
    operations = _operations(server, CASES[0])
    writer = server.writer()
    per_second = 0.0
    with listeners() as opened, requests() as sent:
        opened.open(server.port, [["notes/*"]] * _LISTENERS, [server.tokens[_USERS - 1]])
        opened.aim(_WARMING * _LISTENERS)
        paced(server, [owner] * _WARMING, per_second=arguments.pace, writer=writer)
        opened.wait(_DEADLINE)
        opened.aim(arguments.writes * _LISTENERS, notes=True)
        if reads:
            seconds = arguments.writes / arguments.pace
            sent.begin(
                server.port, operations, callers=arguments.readers, seconds=seconds, most=1_000_000
            )
        written = paced(
            server, [owner] * arguments.writes, per_second=arguments.pace, writer=writer
        )
        opened.wait(_DEADLINE)
        p50, p99 = opened.latencies(written.sent, (0.5, 0.99))
        if reads:
            done = sent.finish()
            per_second = len(done["milliseconds"]) / done["seconds"]
    return p50, p99, per_second


# --- the servers


@asynccontextmanager
async def _pgrealtime(url: str, notes: int) -> AsyncIterator[PgRealtime]:
    async with AsyncExitStack() as stack:
        database = stack.enter_context(own_database(url))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        owner = {"collection": "users"}
        with pinned(SERVER_CORE):
            running = await stack.enter_async_context(
                service(
                    database,
                    directory,
                    # Rows that are written later would be streamed while reads are measured.
                    schema=_SCHEMA + _filling(notes),
                    sections={"realtime": {"max_connections": 20_000}},
                    collections={
                        "teams": {"table": "teams", "list_rule": "", "view_rule": ""},
                        "users": {
                            "table": "users",
                            "type": "auth",
                            "list_rule": "",
                            "view_rule": "",
                            "relations": {"team": {"collection": "teams"}},
                        },
                        "notes": {
                            "table": "notes",
                            "list_rule": OWNER,
                            "view_rule": OWNER,
                            "relations": {"owner": owner},
                        },
                    },
                )
            )
        pin_sessions(database)
        yield PgRealtime(
            url=database,
            port=running.address.port,
            pid=running.process.pid,
            tokens=[token(user_id(number)) for number in range(_USERS)],
            numbers=count(1),
        )


def _filling(notes: int) -> str:
    values = {
        "teams": _TEAMS,
        "users": _USERS,
        "notes": notes,
        "first": _OF_FIRST_USER,
        "body": _BODY,
        "created": f"{_CREATED}+00",
    }
    return sql.SQL(_FILL).format(**{k: sql.Literal(v) for k, v in values.items()}).as_string()


def _pocketbase(notes: int) -> AbstractAsyncContextManager[PocketBase]:
    return pocketbase_of(
        _fixtures(),
        _USERS,
        {"/api/collections/notes": {"indexes": list(_INDEXES)}},
        fill=lambda data: _fill_sqlite(data, notes),
    )


def _fixtures() -> Fixtures:
    text = [FixtureField(name=name, type="text") for name in ("name", "title", "body")]
    teams = FixtureCollection(
        id="pbc_teams000001",
        name="teams",
        type="base",
        list_rule="",
        view_rule="",
        fields=(text[0],),
    )
    users = FixtureCollection(
        id="_pb_users_auth_",
        name="users",
        type="auth",
        list_rule="",
        view_rule="",
        fields=(
            text[0],
            FixtureField(name="team", type="relation", collection_id=teams.id),
        ),
    )
    notes = FixtureCollection(
        id="pbc_notes000001",
        name="notes",
        type="base",
        list_rule=OWNER,
        view_rule=OWNER,
        fields=(
            FixtureField(name="owner", type="relation", collection_id=users.id),
            text[1],
            text[2],
            FixtureField(name="n", type="number"),
            FixtureField(name="created", type="autodate", on_create=True),
        ),
    )
    rows = (
        *(
            FixtureRow(
                collection="teams",
                data={"id": f"team{number:011d}", "name": f"team {number}"},
                raw=True,
            )
            for number in range(_TEAMS)
        ),
        *(
            FixtureRow(
                collection="users",
                data={
                    "id": user_id(number),
                    "name": f"user {number}",
                    "team": f"team{number % _TEAMS:011d}",
                    "tokenKey": secrets.token_hex(25),
                },
                raw=True,
            )
            for number in range(_USERS)
        ),
    )
    return Fixtures(superuser=_ROOT, accounts={}, collections=(teams, users, notes), rows=rows)


_FILL_NOTES = """
WITH RECURSIVE numbered(n) AS (
  SELECT 0 UNION ALL SELECT n + 1 FROM numbered WHERE n < :notes - 1
)
INSERT INTO notes (id, owner, title, body, n, created)
SELECT printf('old%012d', n),
  printf('user%011d', CASE WHEN n < :first THEN 0 ELSE 1 + n % (:users - 1) END),
  'note ' || n, :body, n, strftime('%Y-%m-%d %H:%M:%f', :created, n || ' minutes') || 'Z'
FROM numbered
"""


def _fill_sqlite(database: Path, notes: int) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            _FILL_NOTES,
            {
                "notes": notes,
                "first": _OF_FIRST_USER,
                "users": _USERS,
                "body": _BODY,
                "created": _CREATED,
            },
        )
        connection.execute("ANALYZE")


if __name__ == "__main__":
    main()
