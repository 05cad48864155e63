"""Whether the time of a login reveals accounts, and what logins cost connected clients.

    python -m tests.bench.login postgresql://postgres@127.0.0.1:5432/postgres

Unknown users and wrong passwords alternate, over one connection each; then live events at a steady
pace without and with concurrent logins, as fast as they are answered, in rounds that alternate.
Fails if the medians of both refusals differ by more than the middle half of one of them is wide, or
if events during logins have more than twice the p99 of those without (the median of the rounds).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import bcrypt
import psycopg

from tests.bench.listeners import listeners
from tests.bench.machine import SERVER_CORE, described, load, pinned
from tests.bench.servers import TOPIC, PgRealtime, own_database
from tests.bench.writing import paced
from tests.e2e.service import service

_PASSWORD = "a password of the benchmark's"
_COST = 10
"""PocketBase's."""
_CALLERS = 4
_DEADLINE = 120.0
_BATCH = 50
"""Writes between two checks whether the logins are done."""
_WARMING = 20
"""Writes before the measurement, which don't count."""
_MOST = 2.0
_SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, email text UNIQUE, password_hash text);
CREATE TABLE notes (id text PRIMARY KEY, owner text, title text, body text, n int);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE notes REPLICA IDENTITY FULL;
"""


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="a superuser's, on any database")
    parser.add_argument("--tries", type=int, default=60, help="of each kind")
    parser.add_argument("--logins", type=int, default=1000, help="in all rounds together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--pace", type=float, default=50.0, help="writes per second")
    parser.add_argument("--most", type=float, default=_MOST, help="of the p99's ratio")
    sys.exit(not asyncio.run(compare(parser.parse_args())))


async def compare(arguments: argparse.Namespace) -> bool:
    """Run both comparisons; return whether they are within the limits."""
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    async with _running(arguments.url) as server:
        is_silent = await asyncio.to_thread(_strangers, server, arguments.tries)
        is_light = await asyncio.to_thread(_is_light, server, arguments)
    return is_silent and is_light


@asynccontextmanager
async def _running(url: str) -> AsyncIterator[PgRealtime]:
    login = {"enabled": True, "secret": secrets.token_hex(25), "attempts_per_minute": 1_000_000}
    with (
        own_database(url) as database,
        tempfile.TemporaryDirectory() as directory,
        pinned(SERVER_CORE),
    ):
        async with service(
            database,
            Path(directory),
            schema=_SCHEMA,
            sections={"auth": {"login": login}},
            collections={
                "users": {
                    "table": "users",
                    "type": "auth",
                    "login": {"identity": ["email"], "password_hash": "password_hash"},
                },
                "notes": {"table": "notes", "list_rule": "", "view_rule": ""},
            },
        ) as running:
            stored = bcrypt.hashpw(_PASSWORD.encode(), bcrypt.gensalt(_COST)).decode()
            await running.write.execute(
                "INSERT INTO users VALUES ('ann', 'ann@example.com', %s)", [stored]
            )
            yield PgRealtime(
                url=database,
                port=running.address.port,
                pid=running.process.pid,
                tokens=(),
                numbers=count(1),
            )


def _strangers(server: PgRealtime, tries: int) -> bool:
    caller = _Caller(server.port)
    assert caller.log_in("ann@example.com", _PASSWORD)  # sets the dummy hash
    unknown: list[float] = []
    wrong: list[float] = []
    for n in range(tries):
        unknown.append(caller.seconds(f"nobody{n}@example.com", "x"))
        wrong.append(caller.seconds("ann@example.com", f"x{n}"))
    medians = statistics.median(unknown), statistics.median(wrong)
    spread = statistics.quantiles(wrong, n=4)
    print(
        f"unknown user {medians[0] * 1e3:.2f} ms, wrong password {medians[1] * 1e3:.2f} ms,"
        f" ratio {medians[0] / medians[1]:.3f};"
        f" middle half of the latter {spread[0] * 1e3:.2f}-{spread[2] * 1e3:.2f} ms; {load()}"
    )
    return abs(medians[0] - medians[1]) <= spread[2] - spread[0]


def _is_light(server: PgRealtime, arguments: argparse.Namespace) -> bool:
    ratios: list[float] = []
    logins = arguments.logins // arguments.rounds
    for number in range(arguments.rounds):
        # As many events without as with.
        during = _latencies(server, arguments, logins=logins, batches=1)
        alone = _latencies(server, arguments, logins=0, batches=len(during.sent) // _BATCH)
        ratios.append(during.p99 / alone.p99)
        print(
            f"round {number + 1}: p50 {alone.p50:.2f} ms, p99 {alone.p99:.2f} ms alone;"
            f" p50 {during.p50:.2f} ms, p99 {during.p99:.2f} ms beside {logins} logins"
            f" ({logins / during.seconds:.0f}/s); ratio {ratios[-1]:.2f}; {load()}"
        )
    ratio = statistics.median(ratios)
    print(f"p99 beside logins against without: {ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    return bool(ratio <= arguments.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """Results of a phase."""

    sent: list[int]
    p50: float
    p99: float
    seconds: float


def _latencies(
    server: PgRealtime, arguments: argparse.Namespace, *, logins: int, batches: int
) -> _Phase:
    """Write so many batches, and on until the logins are done.

    Each is one commit that all receive.
    """
    callers = [
        threading.Thread(target=_log_in_many, args=(server.port, logins // _CALLERS))
        for _ in range(_CALLERS if logins else 0)
    ]
    sent: list[int] = []
    writer = server.writer()
    with listeners() as opened:
        opened.open(server.port, [[TOPIC]] * arguments.connections)
        opened.aim(_WARMING * arguments.connections)
        paced(server, [""] * _WARMING, per_second=arguments.pace, writer=writer)
        opened.wait(_DEADLINE)
        opened.aim(1_000_000_000, notes=True)
        began = time.monotonic()
        for caller in callers:
            caller.start()
        while batches > 0 or any(caller.is_alive() for caller in callers):
            sent += paced(server, [""] * _BATCH, per_second=arguments.pace, writer=writer).sent
            batches -= 1
        seconds = time.monotonic() - began
        opened.settle(len(sent) * arguments.connections, _DEADLINE)
        p50, p99 = opened.latencies(sent, [0.5, 0.99])
    for caller in callers:
        caller.join()
    return _Phase(sent=sent, p50=p50, p99=p99, seconds=seconds)


def _log_in_many(port: int, times: int) -> None:
    caller = _Caller(port)
    for _ in range(times):
        assert caller.log_in("ann@example.com", _PASSWORD)


class _Caller:
    """A connection that signs in."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._port = port

    def seconds(self, identity: str, password: str) -> float:
        """How long a refusal took."""
        began = time.perf_counter()
        assert not self.log_in(identity, password)
        return time.perf_counter() - began

    def log_in(self, identity: str, password: str) -> bool:
        """Return whether the login was accepted."""
        body = json.dumps({"identity": identity, "password": password}).encode()
        head = (
            "POST /api/collections/users/auth-with-password HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + body)
        answer = self._socket.recv(65536)
        while answer.count(b"}") < answer.count(b"{") or b"{" not in answer:
            answer += self._socket.recv(65536)
        return answer.startswith(b"HTTP/1.1 200")


if __name__ == "__main__":
    main()
