"""The cost of an INSERT for its writer with thousands of subscribers, against none.

    python -m tests.bench.writers postgresql://postgres@127.0.0.1:5432/postgres

pgrealtime runs in both cases, so that only the connections differ. Each note matches a few of them
(``owner = @request.auth.id``); rounds alternate. For PocketBase a create is the same thing, and
there the writer waits while subscriptions are searched.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics

import psycopg

from tests.bench.listeners import listeners
from tests.bench.machine import allow_many_files, described, load
from tests.bench.servers import OWNER, TOPIC, Server, pgrealtime, pocketbase, user_id
from tests.bench.writing import paced

_USERS = 1000


def main() -> None:
    """Print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--pace", type=float, default=100.0, help="writes per second")
    parser.add_argument("--writes", type=int, default=500, help="a round")
    parser.add_argument("--their-writes", type=int, default=30, help="of PocketBase, a round")
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(compare(parser.parse_args()))


async def compare(arguments: argparse.Namespace) -> None:
    """Measure one server after the other."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    async with pgrealtime(arguments.url, rule=OWNER, users=_USERS) as ours:
        _compare(ours, arguments, arguments.writes)
    async with pocketbase(rule=OWNER, users=_USERS) as theirs:
        _compare(theirs, arguments, arguments.their_writes)


def _compare(server: Server, arguments: argparse.Namespace, writes: int) -> None:
    alone: list[float] = []
    subscribed: list[float] = []
    for _ in range(arguments.rounds):
        alone.append(_p50(server, writes, arguments.pace))
        with listeners() as opened:
            opened.open(server.port, [[TOPIC]] * arguments.connections, server.tokens)
            subscribed.append(_p50(server, writes, arguments.pace))
    ratios = sorted(
        with_them / without for with_them, without in zip(subscribed, alone, strict=True)
    )
    print(
        f"{server.name:10} p50 of a write: {statistics.median(alone):.2f} ms alone,"
        f" {statistics.median(subscribed):.2f} ms with {arguments.connections} connections; ratio"
        f" {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}); {load()}"
    )


def _p50(server: Server, writes: int, pace: float) -> float:
    chosen = random.Random(writes)
    owners = [user_id(chosen.randrange(_USERS)) for _ in range(writes)]
    return statistics.median(paced(server, owners, per_second=pace).round_trips)


if __name__ == "__main__":
    main()
