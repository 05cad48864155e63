"""Time from just before a write is sent until a client has its event, and the write's round trip.

    python -m tests.bench.latency postgresql://postgres@127.0.0.1:5432/postgres

One writer at a steady pace, one row a commit; every connection receives everything. With many
connections each arrival counts. Rounds alternate with PocketBase's under the same load; a figure is
the median of the rounds' own.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from dataclasses import dataclass

import psycopg

from tests.bench.listeners import listeners
from tests.bench.machine import allow_many_files, described, load
from tests.bench.servers import EVERYONE, TOPIC, Server, pgrealtime, pocketbase
from tests.bench.writing import paced

_DEADLINE = 120.0
_WARM_UP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds."""

    p50: float
    p99: float
    own_p50: float
    """Of the write's round trip."""
    own_p99: float

    def __str__(self) -> str:
        return (
            f"{self.p50:8.2f} {self.p99:8.2f}   {self.own_p50:8.2f} {self.own_p99:8.2f}"
            f"   {self.p50 - self.own_p50:+8.2f}"
        )


def main() -> None:
    """Print a line per round, then medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument(
        "--loads",
        nargs="*",
        default=["1@200", "1@50", "1000@50"],
        help="connections, and writes per second",
    )
    parser.add_argument("--writes", type=int, default=300, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(compare(parser.parse_args()))


async def compare(arguments: argparse.Namespace) -> None:
    """Alternate the rounds."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    async with pgrealtime(arguments.url, rule=EVERYONE) as ours, pocketbase(rule=EVERYONE) as other:
        for of_load in arguments.loads:
            connections, pace = map(int, of_load.split("@"))
            print(f"{connections} connections, {pace} writes/s, ms")
            print("                    p50      p99    write p50      p99   p50 above it")
            rounds = [
                [measure(server, connections, pace, arguments.writes) for server in (ours, other)]
                for _ in range(arguments.rounds)
            ]
            mine, theirs = (_median(list(side)) for side in zip(*rounds, strict=True))
            print(f"{ours.name:14} {mine}   {load()}")
            print(f"{other.name:14} {theirs}")
            ratios = [a.p99 / b.p99 for a, b in rounds]
            print(
                f"p99 against theirs {statistics.median(ratios):.2f}"
                f" ({min(ratios):.2f}-{max(ratios):.2f})"
            )


def measure(server: Server, connections: int, pace: int, writes: int) -> Latency:
    """Open the streams, write at the pace, and record the arrivals."""
    with listeners() as opened:
        opened.open(server.port, [[TOPIC]] * connections)
        opened.aim(connections * _WARM_UP)
        paced(server, [""] * _WARM_UP, per_second=pace)
        opened.wait(_DEADLINE)
        opened.aim(connections * writes, notes=True)
        written = paced(server, [""] * writes, per_second=pace)
        opened.wait(_DEADLINE)
        p50, p99 = opened.latencies(written.sent, (0.5, 0.99))
    own = written.round_trips
    return Latency(p50=p50, p99=p99, own_p50=own[len(own) // 2], own_p99=own[len(own) * 99 // 100])


def _median(rounds: list[Latency]) -> Latency:
    return Latency(
        p50=statistics.median(one.p50 for one in rounds),
        p99=statistics.median(one.p99 for one in rounds),
        own_p50=statistics.median(one.own_p50 for one in rounds),
        own_p99=statistics.median(one.own_p99 for one in rounds),
    )


if __name__ == "__main__":
    main()
