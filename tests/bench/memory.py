"""Memory of an idle connection, with one topic and with ten; and how fast subscribing goes.

    python -m tests.bench.memory postgresql://postgres@127.0.0.1:5432/postgres

The connections come in steps, each with its subscribe call done; a line is what the step added to
the server process (proportional set size), over its connections, and "all" is from none to the
last. Buffers of the kernel aren't in it; they are the same for any server. PocketBase is measured
at a size it can bear.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from tests.bench.listeners import listeners
from tests.bench.machine import allow_many_files, described, load, resident_kilobytes
from tests.bench.servers import OWNER, TOPIC, Server, pgrealtime, pocketbase

_USERS = 1000
_TOPICS = ([TOPIC], [f"notes/note{number:011d}" for number in range(10)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A number of connections added at once."""

    connections: int
    kilobytes: int
    """Growth of the process."""
    connect_seconds: float
    subscribe_seconds: float

    def __add__(self, other: Step) -> Step:
        """Return both steps as one."""
        return Step(
            connections=self.connections + other.connections,
            kilobytes=self.kilobytes + other.kilobytes,
            connect_seconds=self.connect_seconds + other.connect_seconds,
            subscribe_seconds=self.subscribe_seconds + other.subscribe_seconds,
        )

    @property
    def kilobytes_each(self) -> float:
        """Memory of one connection."""
        return self.kilobytes / self.connections

    @property
    def calls(self) -> float:
        """Subscribe calls per second."""
        return self.connections / self.subscribe_seconds

    def describe(self, server: Server, topics: Sequence[str], label: str) -> None:
        """Print the line."""
        print(
            f"{server.name:10} {len(topics):7} {label:>12} {self.kilobytes_each:8.1f}"
            f" {self.connections / self.connect_seconds:11,.0f} {self.calls:18,.0f}   {load()}"
        )


_NOTHING = Step(connections=0, kilobytes=0, connect_seconds=0, subscribe_seconds=0)


def main() -> None:
    """Print a line per step, and the ratios."""
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
    for topics in _TOPICS:
        async with pgrealtime(arguments.url, rule=OWNER, users=_USERS) as server:
            ours = await asyncio.to_thread(measure, server, topics, arguments.steps)
        async with pocketbase(rule=OWNER, users=_USERS) as server:
            theirs = await asyncio.to_thread(measure, server, topics, arguments.their_steps)
        print(
            f"{len(topics)} topics, pgrealtime at {ours.connections} against PocketBase at"
            f" {theirs.connections}: memory {ours.kilobytes_each / theirs.kilobytes_each:.2f},"
            f" subscribe calls {ours.calls / theirs.calls:.2f}"
        )


def measure(server: Server, topics: Sequence[str], steps: Sequence[int]) -> Step:
    """Open the connections step by step; return all of them as one."""
    whole = _NOTHING
    with listeners() as opened:
        opened.open(server.port, [topics] * 100, server.tokens)  # what is made once, and lazily
        before = resident_kilobytes(server.pid)
        for connections in steps:
            took = opened.open(server.port, [topics] * connections, server.tokens)
            after = resident_kilobytes(server.pid)
            step = Step(
                connections=connections,
                kilobytes=after - before,
                connect_seconds=took.connect_seconds,
                subscribe_seconds=took.subscribe_seconds,
            )
            whole += step
            step.describe(server, topics, f"{whole.connections:,}")
            before = after
    whole.describe(server, topics, "all")
    return whole


if __name__ == "__main__":
    main()
