"""The cost of showing a related record: deliveries per second with ``expand``, against without.

    python -m tests.bench.expand postgresql://postgres@127.0.0.1:5432/postgres

As ``fanout``: every connection receives everything, live writes of one row a commit. Each note has
one of a hundred owners; in every second round all streams request that record too. All of them see
the same, so a record is loaded and evaluated once for all. Fails if less than half as many are
delivered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
from urllib.parse import quote

import psycopg

from tests.bench.listeners import listeners
from tests.bench.machine import allow_many_files, cpu_seconds, described, load
from tests.bench.servers import EVERYONE, TOPIC, Server, pgrealtime, user_id
from tests.bench.writing import flat_out
from tests.conformance.http_client import Address
from tests.e2e.listener import listener

_DEADLINE = 300.0
_USERS = 100
_LEAST = 0.5
_OPTIONS = quote(json.dumps({"query": {"expand": "owner"}}))
_CASES = {"without": TOPIC, "with": f"{TOPIC}?options={_OPTIONS}"}


def main() -> None:
    """Print a line per round and the ratio; exit with 1 below the minimum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--writes", type=int, default=3000, help="a round")
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind")
    parser.add_argument("--least", type=float, default=_LEAST, help="0 only measures")
    arguments = parser.parse_args()
    sys.exit(asyncio.run(compare(arguments)) < arguments.least)


async def compare(arguments: argparse.Namespace) -> float:
    """Alternate the rounds; return the median of their ratios."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    rates: dict[str, list[float]] = {name: [] for name in _CASES}
    async with pgrealtime(
        arguments.url, rule=EVERYONE, users=_USERS, owners_are_shown=True
    ) as server:
        await _check(server)
        for number in range(arguments.rounds):
            for name, topic in _CASES.items():
                rate = _round(server, topic, arguments, name)
                rates[name].append(rate)
                print(f"round {number + 1}, {name:7} {rate:11,.0f} deliveries/s; {load()}")
    ratios = sorted(a / b for a, b in zip(rates["with"], rates["without"], strict=True))
    ratio = statistics.median(ratios)
    print(
        f"pgrealtime, {arguments.connections} connections, with expand against without:"
        f" {ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}); at least {arguments.least}"
    )
    return ratio


def _round(server: Server, topic: str, arguments: argparse.Namespace, name: str) -> float:
    chosen = random.Random(name)
    commits = [[user_id(chosen.randrange(_USERS))] for _ in range(arguments.writes)]
    deliveries = arguments.connections * arguments.writes
    with listeners() as opened:
        opened.open(server.port, [[topic]] * arguments.connections)
        opened.aim(deliveries)
        before = cpu_seconds(server.pid)
        began = flat_out(server, commits, writers=arguments.writers)
        seconds = (opened.wait(_DEADLINE) - began) / 1e9
        used = (cpu_seconds(server.pid) - before) / arguments.writes
    print(f"  {used * 1e3:.2f} ms of the processor per commit", end=";  ")
    return float(deliveries / seconds)


async def _check(server: Server) -> None:
    """Check that the related record is shown before measuring."""
    async with listener(Address(host="127.0.0.1", port=server.port), _CASES["with"]) as one:
        server.writer().write([user_id(1)])
        (message,) = await one.take(1)
    assert message.data["record"]["expand"]["owner"]["id"] == user_id(1), message


if __name__ == "__main__":
    main()
