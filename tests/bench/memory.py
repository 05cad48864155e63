"""Memory of an idle connection, with one topic and with ten; and how fast subscribing goes.

    python -m tests.bench.memory postgresql://postgres@127.0.0.1:5432/postgres

The connections come in steps, each with its subscribe call done; a line is what the last step
added to the server process (proportional set size), over its connections. Buffers of the kernel
aren't in it; they are the same for any server.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

import psycopg

from tests.bench.listeners import listeners
from tests.bench.machine import allow_many_files, described, load, resident_kilobytes
from tests.bench.servers import OWNER, TOPIC, Server, pgrealtime, pocketbase

_USERS = 1000


def main() -> None:
    """Print a line per step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--steps", type=int, nargs="*", default=[1000, 4000, 5000])
    parser.add_argument("--their-steps", type=int, nargs="*", default=[1000, 2000])
    asyncio.run(compare(parser.parse_args()))


async def compare(arguments: argparse.Namespace) -> None:
    """Each case has servers of its own: what was freed isn't always given back."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    print("            topics  connections  KB each  connects/s  subscribe calls/s")
    for topics in ([TOPIC], [f"notes/note{number:011d}" for number in range(10)]):
        async with pgrealtime(arguments.url, rule=OWNER, users=_USERS) as ours:
            measure(ours, topics, arguments.steps)
        async with pocketbase(rule=OWNER, users=_USERS) as theirs:
            measure(theirs, topics, arguments.their_steps)


def measure(server: Server, topics: Sequence[str], steps: Sequence[int]) -> None:
    """Open the connections step by step."""
    with listeners() as opened:
        opened.open(server.port, [topics] * 100, server.tokens)  # what is made once, and lazily
        before = resident_kilobytes(server.pid)
        total = 0
        for step in steps:
            took = opened.open(server.port, [topics] * step, server.tokens)
            after = resident_kilobytes(server.pid)
            total += step
            print(
                f"{server.name:10} {len(topics):7} {total:12} {(after - before) / step:8.1f}"
                f" {step / took.connect_seconds:11,.0f} {step / took.subscribe_seconds:18,.0f}"
                f"   {load()}"
            )
            before = after


if __name__ == "__main__":
    main()
