"""Changes per second when each matches one of many: the rule ``owner = @request.auth.id``.

    python -m tests.bench.matching postgresql://postgres@127.0.0.1:5432/postgres

A thousand users have one stream each, then five each, and every note matches one of them. The same
writers write to both servers, in commits of 100 notes and of one; rounds alternate. A rate is all
changes over the time from the first write to the last delivery.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics

import psycopg

from tests.bench.listeners import Listeners, listeners
from tests.bench.machine import allow_many_files, cpu_seconds, described, load
from tests.bench.servers import (
    MOST_IN_A_COMMIT,
    OWNER,
    TOPIC,
    Server,
    pgrealtime,
    pocketbase,
    user_id,
)
from tests.bench.writing import flat_out

_DEADLINE = 500.0
_USERS = 1000


def main() -> None:
    """Print a line per round, and a ratio of medians per number of connections and commit size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, nargs="*", default=[1000, 5000])
    parser.add_argument("--changes", type=int, default=100_000, help="of pgrealtime, a round")
    parser.add_argument("--single", type=int, default=10_000, help="the same, one a commit")
    parser.add_argument("--their-changes", type=int, default=100, help="of PocketBase, a round")
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(compare(parser.parse_args()))


async def compare(arguments: argparse.Namespace) -> None:
    """Alternate the rounds."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    async with (
        pgrealtime(arguments.url, rule=OWNER, users=_USERS) as ours,
        pocketbase(rule=OWNER, users=_USERS) as theirs,
    ):
        for connections in arguments.connections:
            _compare(arguments, connections, ours, theirs)


def _compare(arguments: argparse.Namespace, connections: int, ours: Server, theirs: Server) -> None:
    for size in (MOST_IN_A_COMMIT, 1):
        # Connections are made anew: those that receive nothing are ended after five minutes.
        with listeners() as at_ours, listeners() as at_theirs:
            for server, opened in ((ours, at_ours), (theirs, at_theirs)):
                opened.open(server.port, [[TOPIC]] * connections, server.tokens)
            changes = arguments.changes if size > 1 else arguments.single
            turns = ((ours, at_ours, changes), (theirs, at_theirs, arguments.their_changes))
            rates: dict[str, list[float]] = {ours.name: [], theirs.name: []}
            for _ in range(arguments.rounds):
                for server, opened, count in turns:
                    rate, micros = measure(
                        server,
                        opened,
                        connections=connections,
                        changes=count,
                        size=size,
                        writers=arguments.writers,
                    )
                    rates[server.name].append(rate)
                    print(
                        f"{server.name:10} {connections} connections, {count} changes in commits"
                        f" of {size}: {rate:9,.0f} changes/s, {micros:8.1f} us each; {load()}"
                    )
            mine, other = (statistics.median(rates[server.name]) for server in (ours, theirs))
            print(f"ratio of the medians: {mine / other:,.0f}")


def measure(
    server: Server, opened: Listeners, *, connections: int, changes: int, size: int, writers: int
) -> tuple[float, float]:
    """Write, and wait for the last delivery.

    Returns:
        Changes per second, and microseconds of the server's processor for each.
    """
    chosen = random.Random(changes)
    owners = [user_id(chosen.randrange(_USERS)) for _ in range(changes)]
    commits = [owners[first : first + size] for first in range(0, changes, size)]
    opened.aim(changes * connections // _USERS)
    before = cpu_seconds(server.pid)
    began = flat_out(server, commits, writers=writers)
    seconds = (opened.wait(_DEADLINE) - began) / 1e9
    return changes / seconds, (cpu_seconds(server.pid) - before) / changes * 1e6


if __name__ == "__main__":
    main()
