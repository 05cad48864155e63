"""Deliveries per second when every connection receives everything: live writes, one row a commit.

    python -m tests.bench.fanout postgresql://postgres@127.0.0.1:5432/postgres

The same writers create notes in both servers, each as fast as its commit allows, while the same
process reads all streams. Rounds alternate; a rate is all deliveries over the time from the first
write to the last delivery.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from tests.bench.listeners import Listeners, listeners
from tests.bench.machine import allow_many_files, cpu_seconds, described, load
from tests.bench.servers import EVERYONE, TOPIC, Server, pgrealtime, pocketbase
from tests.bench.writing import flat_out

_DEADLINE = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Results of one round."""

    deliveries: float
    """Per second."""
    microseconds: float
    """CPU time of the server, per delivery."""


def main() -> None:
    """Print a line per round and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--writes", type=int, default=5000, help="of pgrealtime, a round")
    parser.add_argument("--their-writes", type=int, default=100, help="of PocketBase, a round")
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(compare(parser.parse_args()))


async def compare(arguments: argparse.Namespace) -> None:
    """Alternate the rounds."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    topics = [[TOPIC]] * arguments.connections
    async with (
        pgrealtime(arguments.url, rule=EVERYONE) as ours,
        pocketbase(rule=EVERYONE) as theirs,
    ):
        rates: dict[str, list[float]] = {ours.name: [], theirs.name: []}
        for number in range(arguments.rounds):
            for server, writes in ((ours, arguments.writes), (theirs, arguments.their_writes)):
                done = measure(server, topics, writes, arguments.writers)
                rates[server.name].append(done.deliveries)
                print(
                    f"round {number + 1}, {server.name:10} {arguments.connections} connections,"
                    f" {writes} writes: {done.deliveries:11,.0f} deliveries/s,"
                    f" {done.microseconds:.2f} us each; {load()}"
                )
    ours_median, theirs_median = (statistics.median(rates[s.name]) for s in (ours, theirs))
    print(f"ratio of the medians: {ours_median / theirs_median:.1f}")


def measure(server: Server, topics: Sequence[Sequence[str]], writes: int, writers: int) -> Round:
    """Open the streams, write, and wait for the last delivery."""
    with listeners() as opened:
        opened.open(server.port, topics)
        return _round(server, opened, len(topics), writes, writers)


def _round(server: Server, opened: Listeners, streams: int, writes: int, writers: int) -> Round:
    opened.aim(streams * writes)
    before = cpu_seconds(server.pid)
    began = flat_out(server, [[""]] * writes, writers=writers)
    seconds = (opened.wait(_DEADLINE) - began) / 1e9
    cpu = cpu_seconds(server.pid) - before
    deliveries = streams * writes
    return Round(deliveries=deliveries / seconds, microseconds=cpu / deliveries * 1e6)


if __name__ == "__main__":
    main()
