"""What signing in tells a stranger by its time, and what it costs those who listen meanwhile.

    python -m tests.bench.login postgresql://postgres@127.0.0.1:5432/postgres

Unknown users and wrong passwords in turns, over one connection each; then live events at a steady
pace without and with a thousand logins beside them, as fast as they are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import bcrypt
import psycopg

from tests.bench.listeners import listeners
from tests.bench.machine import SERVER_CORE, described, load, pinned
from tests.bench.servers import TOPIC, PgRealtime
from tests.bench.writing import paced
from tests.e2e.service import service

_PASSWORD = "a password of the benchmark's"
_COST = 10
"""PocketBase's."""
_CALLERS = 4
_DEADLINE = 120.0
_SHORTEST = 3.0
_SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, email text UNIQUE, password_hash text);
CREATE TABLE notes (id text PRIMARY KEY, owner text, title text, body text, n int);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE notes REPLICA IDENTITY FULL;
"""


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="an empty database")
    parser.add_argument("--tries", type=int, default=60, help="of each kind")
    parser.add_argument("--logins", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--pace", type=float, default=50.0, help="writes per second")
    asyncio.run(compare(parser.parse_args()))


async def compare(arguments: argparse.Namespace) -> None:
    """Run both."""
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    async with _running(arguments.url) as server:
        await asyncio.to_thread(_strangers, server, arguments.tries)
        await asyncio.to_thread(_beside_events, server, arguments)


@asynccontextmanager
async def _running(url: str) -> AsyncIterator[PgRealtime]:
    login = {"enabled": True, "secret": secrets.token_hex(25), "attempts_per_minute": 1_000_000}
    with tempfile.TemporaryDirectory() as directory, pinned(SERVER_CORE):
        async with service(
            url,
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
                url=url,
                port=running.address.port,
                pid=running.process.pid,
                tokens=(),
                numbers=count(1),
            )


def _strangers(server: PgRealtime, tries: int) -> None:
    caller = _Caller(server.port)
    assert caller.log_in("ann@example.com", _PASSWORD)  # the decoy is of the last scheme that held
    unknown: list[float] = []
    wrong: list[float] = []
    for n in range(tries):
        unknown.append(caller.seconds(f"nobody{n}@example.com", "x"))
        wrong.append(caller.seconds("ann@example.com", f"x{n}"))
    ratio = statistics.median(unknown) / statistics.median(wrong)
    spread = statistics.quantiles(wrong, n=4)
    print(
        f"unknown user {statistics.median(unknown) * 1e3:.2f} ms,"
        f" wrong password {statistics.median(wrong) * 1e3:.2f} ms, ratio {ratio:.3f};"
        f" middle half of the latter {spread[0] * 1e3:.2f}-{spread[2] * 1e3:.2f} ms; {load()}"
    )


def _beside_events(server: PgRealtime, arguments: argparse.Namespace) -> None:
    alone = _latency(server, arguments, logins=0)
    beside = _latency(server, arguments, logins=arguments.logins)
    again = _latency(server, arguments, logins=0)
    quiet = statistics.mean((alone[1], again[1]))
    print(f"events alone         p50 {alone[0]:7.2f} ms   p99 {alone[1]:7.2f} ms")
    print(f"beside {arguments.logins} logins  p50 {beside[0]:7.2f} ms   p99 {beside[1]:7.2f} ms")
    print(f"events alone, again  p50 {again[0]:7.2f} ms   p99 {again[1]:7.2f} ms")
    print(f"p99 beside logins against without: {beside[1] / quiet:.2f}; {load()}")


def _latency(
    server: PgRealtime, arguments: argparse.Namespace, *, logins: int
) -> tuple[float, float]:
    stop = threading.Event()
    callers = [
        threading.Thread(target=_log_in_many, args=(server.port, logins // _CALLERS, stop))
        for _ in range(_CALLERS if logins else 0)
    ]
    with listeners() as opened:
        opened.open(server.port, [[TOPIC]] * arguments.connections)
        for caller in callers:
            caller.start()
        began = time.monotonic()
        sent: list[int] = []
        waits: list[float] = []
        # As long as there are logins, and for a few seconds at least.
        while any(c.is_alive() for c in callers) or time.monotonic() - began < _SHORTEST:
            opened.aim(arguments.connections * 50, notes=True)
            written = paced(server, [""] * 50, per_second=arguments.pace)
            opened.wait(_DEADLINE)
            sent += written.sent
            waits += opened.latencies(written.sent, [q / 100 for q in range(1, 100)])
        stop.set()
    for caller in callers:
        caller.join()
    waits.sort()
    return waits[len(waits) // 2], waits[len(waits) * 99 // 100]


def _log_in_many(port: int, times: int, stop: threading.Event) -> None:
    caller = _Caller(port)
    for _ in range(times):
        if stop.is_set():
            return
        caller.log_in("ann@example.com", _PASSWORD)


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
        """Whether it was let in."""
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
