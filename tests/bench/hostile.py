"""The effect of hostile connections on honest ones: p99 under every attack at its limit, and alone.

    python -m tests.bench.hostile postgresql://postgres@127.0.0.1:5432/postgres --minutes 20

Honest connections receive notes at a steady pace; in every other round hostile clients run too
(``attacking`` has the kinds) while large pages change that the hostile ones subscribed to. Fails if
the median of the rounds' ratios of p99 is above ``--most``, if a note is missed, or if the
process's memory passes ``--megabytes``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path

import bcrypt
import psycopg

from tests.bench import attacking
from tests.bench.listeners import listeners
from tests.bench.machine import (
    CLIENT_CORE,
    SERVER_CORE,
    allow_many_files,
    described,
    load,
    pinned,
    resident_kilobytes,
)
from tests.bench.servers import TOPIC, PgRealtime, own_database
from tests.bench.writing import paced
from tests.e2e.service import service

_DEADLINE = 120.0
_BATCH = 50
_WARMING = 20
_SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, name text, email text UNIQUE, password_hash text);
CREATE TABLE notes (id text PRIMARY KEY, owner text, title text, body text, n int);
CREATE TABLE pages (
  id text PRIMARY KEY, owner text REFERENCES users, tags text[], html text, n int
);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE notes REPLICA IDENTITY FULL;
ALTER TABLE pages REPLICA IDENTITY FULL;
INSERT INTO users SELECT 'u' || n, 'name ' || n FROM generate_series(1, 50) AS n;
INSERT INTO pages
SELECT 'p' || n, 'u' || n, array(SELECT 'tag-' || t || '-a-b' FROM generate_series(1, 20) AS t),
  repeat('<p>some <b>bold</b> text of a page &amp; more aaaaaaaaab</p>', 160), n
FROM generate_series(1, 50) AS n;
"""
_CHANGE = "UPDATE pages SET n = n + 1 WHERE id = 'p' || (1 + floor(random() * 50))::int"
_CHANGES_PER_SECOND = 5.0


def main() -> None:
    """Print a line per round, and the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="a superuser's, on any database")
    parser.add_argument("--minutes", type=float, default=20.0, help="beside attackers, in all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--pace", type=float, default=20.0, help="notes per second")
    parser.add_argument("--kinds", nargs="*", default=[], choices=list(attacking.KINDS))
    parser.add_argument("--most", type=float, default=5.0, help="of the p99's ratio")
    parser.add_argument("--megabytes", type=int, default=1024, help="of the process, at most")
    sys.exit(not asyncio.run(compare(parser.parse_args())))


async def compare(arguments: argparse.Namespace) -> bool:
    """Run the rounds; return whether all limits are met."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    async with _running(arguments.url) as server:
        return await asyncio.to_thread(_rounds, server, arguments)


@asynccontextmanager
async def _running(url: str) -> AsyncIterator[PgRealtime]:
    shown = {"list_rule": "", "view_rule": ""}
    with (
        own_database(url) as database,
        tempfile.TemporaryDirectory() as directory,
        pinned(SERVER_CORE),
    ):
        async with service(
            database,
            Path(directory),
            schema=_SCHEMA,
            sections={"auth": {"login": {"enabled": True, "secret": secrets.token_hex(25)}}},
            collections={
                "users": {
                    "table": "users",
                    "type": "auth",
                    **shown,
                    "login": {"identity": ["email"], "password_hash": "password_hash"},
                },
                "notes": {"table": "notes", **shown},
                "pages": {
                    "table": "pages",
                    **shown,
                    "relations": {"owner": {"collection": "users"}},
                },
            },
        ) as running:
            stored = bcrypt.hashpw(b"a password of the benchmark's", bcrypt.gensalt(10)).decode()
            await running.write.execute(
                "INSERT INTO users VALUES ('ann', 'Ann', 'ann@example.com', %s)", [stored]
            )
            yield PgRealtime(
                url=database,
                port=running.address.port,
                pid=running.process.pid,
                tokens=(),
                numbers=count(1),
            )


def _rounds(server: PgRealtime, arguments: argparse.Namespace) -> bool:
    seconds = arguments.minutes * 60 / arguments.rounds
    ratios: list[float] = []
    with _watched(server.pid) as sizes:
        for number in range(arguments.rounds):
            alone = _p99(server, arguments, min(seconds, 30.0))
            before = max(sizes)
            with _attacked(server, arguments.kinds) as counted:
                attacked = _p99(server, arguments, seconds)
            ratios.append(attacked / alone)
            print(
                f"round {number + 1}: p99 {alone:.2f} ms alone, {attacked:.2f} ms beside attackers,"
                f" ratio {ratios[-1]:.2f}; at most {max(sizes) / 1024:,.0f} MB"
                f" ({before / 1024:,.0f} before); {load()}\n   {counted[0]}",
                flush=True,
            )
    ratio, megabytes = statistics.median(ratios), max(sizes) / 1024
    print(
        f"p99 beside attackers against alone: {ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f});"
        f" at most {megabytes:,.0f} MB"
    )
    return bool(ratio <= arguments.most and megabytes <= arguments.megabytes)


def _p99(server: PgRealtime, arguments: argparse.Namespace, seconds: float) -> float:
    """Return milliseconds from a note's write to its arrival.

    Each must arrive at all connections.
    """
    sent: list[int] = []
    writer = server.writer()
    with listeners() as opened:
        opened.open(server.port, [[TOPIC]] * arguments.connections)
        opened.aim(_WARMING * arguments.connections)
        paced(server, [""] * _WARMING, per_second=arguments.pace, writer=writer)
        opened.wait(_DEADLINE)
        opened.aim(1_000_000_000, notes=True)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            sent += paced(server, [""] * _BATCH, per_second=arguments.pace, writer=writer).sent
        opened.settle(len(sent) * arguments.connections, _DEADLINE)
        (p99,) = opened.latencies(sent, [0.99])
    return p99


@contextmanager
def _attacked(server: PgRealtime, kinds: Sequence[str]) -> Iterator[list[str]]:
    """Run hostile clients while pages change; afterwards the list has what they counted."""
    counted: list[str] = []
    ended = threading.Event()
    changing = threading.Thread(target=_change_pages, args=(server.url, ended))
    with pinned(CLIENT_CORE):
        process = subprocess.Popen(
            [sys.executable, "-m", attacking.__name__, str(server.port), *kinds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    changing.start()
    with process:
        try:
            yield counted
        finally:
            ended.set()
            changing.join()
            output, _ = process.communicate()
            counted.append(json.dumps(json.loads(output or b"{}")))


def _change_pages(url: str, ended: threading.Event) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        while not ended.wait(1 / _CHANGES_PER_SECOND):
            connection.execute(_CHANGE)


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """Record the process's memory continuously, in kilobytes."""
    sizes = [resident_kilobytes(pid)]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.25):
            sizes.append(resident_kilobytes(pid))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield sizes
    finally:
        ended.set()
        watching.join()


if __name__ == "__main__":
    main()
