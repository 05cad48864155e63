"""What two workers are worth against one process, by the processor time of the busiest process.

    python -m tests.bench.workers postgresql://postgres@127.0.0.1:5432/postgres

With fewer cores than processes no rate shows it, so each figure is what a core of its own would
allow: of several processes the one that used most time is the limit. Rounds alternate. With
``--storm`` connections come back after a start, until the last one is subscribed: one process, two
workers, PocketBase; those are seconds, of a machine whose cores the clients use as well.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import psycopg

from tests.bench.listeners import listeners
from tests.bench.listening import subscribe_call
from tests.bench.machine import allow_many_files, cpu_seconds, described, load
from tests.bench.reads import requests
from tests.bench.servers import (
    EVERYONE,
    MOST_IN_A_COMMIT,
    OWNER,
    TOPIC,
    Server,
    pgrealtime,
    pocketbase,
    process_ids,
    user_id,
)
from tests.bench.subscribing import CASES
from tests.bench.writing import flat_out, paced

_USERS: Final = 1000
_DEADLINE: Final = 300.0
_TICK_SECONDS: Final = 0.01
"""In which the kernel counts processor time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Processor time of one round."""

    seconds: Sequence[float]
    """Of each process; of several the main process is the first."""
    units: int

    @property
    def busiest_us(self) -> float:
        """Microseconds of the process that limits the rate, per unit."""
        return max(self.seconds) / self.units * 1e6

    @property
    def worker_us(self) -> float:
        """Microseconds of one worker, or of the only process, per unit."""
        workers = self.seconds[1:] or self.seconds
        return statistics.mean(workers) / self.units * 1e6

    def described(self) -> str:
        each = ", ".join(f"{seconds / self.units * 1e6:.2f}" for seconds in self.seconds)
        return f"[{each}] us"


def main() -> None:
    """Print each round, and ratios of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--writes", type=int, default=200, help="that all receive, a round")
    parser.add_argument("--pace", type=float, default=20.0, help="of those, per second")
    parser.add_argument("--changes", type=int, default=50_000, help="that one receives, a round")
    parser.add_argument("--calls", type=int, default=2000, help="a round")
    parser.add_argument("--callers", type=int, default=512, help="calls at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="measures whose names contain this")
    parser.add_argument("--storm", type=int, default=0, help="connections of ten topics")
    arguments = parser.parse_args()
    asyncio.run(storm(arguments) if arguments.storm else compare(arguments))


async def compare(arguments: argparse.Namespace) -> None:
    """Alternate the rounds of one process and of two workers."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    for rule, measures in (
        (EVERYONE, {"deliveries": _deliveries}),
        (OWNER, {"changes": _changes} | {f"calls: {case}": _calls(case) for case in _CALLS}),
    ):
        async with AsyncExitStack() as stack:
            one, two = [
                await stack.enter_async_context(
                    pgrealtime(arguments.url, rule=rule, users=_USERS, workers=workers)
                )
                for workers in (1, 2)
            ]
            await asyncio.to_thread(_compare, arguments, measures, one, two)


_CALLS: Final = ("guest, 1 topic", "user, 10 topics")


def _compare(
    arguments: argparse.Namespace,
    measures: Mapping[str, Callable[[Server, argparse.Namespace], Used]],
    one: Server,
    two: Server,
) -> None:
    for name, measure in measures.items():
        if arguments.only not in name:
            continue
        rounds: list[tuple[Used, Used]] = []
        for number in range(arguments.rounds + 1):
            pair = measure(one, arguments), measure(two, arguments)
            if number:  # the first warms up
                rounds.append(pair)
        gains = sorted(alone.busiest_us / several.busiest_us for alone, several in rounds)
        costs = sorted(several.worker_us / alone.worker_us for alone, several in rounds)
        alone, several = rounds[-1]
        print(
            f"{name:24} one process {alone.described()}, main and two workers"
            f" {several.described()}; two are worth {statistics.median(gains):.2f}"
            f" ({gains[0]:.2f}-{gains[-1]:.2f}), a worker costs {statistics.median(costs):.2f}"
            f" ({costs[0]:.2f}-{costs[-1]:.2f}) of one process; {load()}"
        )


def _deliveries(server: Server, arguments: argparse.Namespace) -> Used:
    """Commits of one row that all connections receive, at a pace; a unit is a delivery.

    Not as many as possible: who is behind writes many events at once, which costs less for each.
    """
    connections, writes = arguments.connections, arguments.writes
    with listeners() as opened:
        opened.open(server.port, [[TOPIC]] * connections)

        def write() -> None:
            opened.aim(connections * writes)
            paced(server, [""] * writes, per_second=arguments.pace)
            opened.wait(_DEADLINE)

        return _used(server, connections * writes, write)


def _changes(server: Server, arguments: argparse.Namespace) -> Used:
    """Commits of a hundred rows; each matches a connection of each worker. A unit is a change."""
    copies = max(1, len(process_ids(server)) - 1)
    chosen = random.Random(1)
    owners = [user_id(chosen.randrange(_USERS)) for _ in range(arguments.changes)]
    commits = [owners[n : n + MOST_IN_A_COMMIT] for n in range(0, len(owners), MOST_IN_A_COMMIT)]
    with listeners() as opened:
        opened.open(server.port, [[TOPIC]] * _USERS * copies, server.tokens)

        def write() -> None:
            opened.aim(copies * len(owners))
            flat_out(server, commits, writers=4)
            opened.wait(_DEADLINE)

        return _used(server, len(owners), write)


def _calls(case: str) -> Callable[[Server, argparse.Namespace], Used]:
    """First calls of connections; a unit is a call."""
    has_tokens, topics_of = CASES[case]

    def measure(server: Server, arguments: argparse.Namespace) -> Used:
        with listeners() as opened, requests() as asking:
            calls = [
                [
                    subscribe_call(
                        server.port,
                        client_id,
                        topics_of(number),
                        server.tokens[number % _USERS] if has_tokens else "",
                    ).decode()
                ]
                for number, client_id in enumerate(opened.connect(server.port, arguments.calls))
            ]

            def call() -> None:
                asking.begin(
                    server.port,
                    calls,
                    callers=arguments.callers,
                    seconds=_DEADLINE,
                    most=len(calls),
                )
                asking.finish()

            return _used(server, len(calls), call)

    return measure


def _used(server: Server, units: int, work: Callable[[], object]) -> Used:
    pids = process_ids(server)
    before = [cpu_seconds(pid) for pid in pids]
    work()
    after = [cpu_seconds(pid) for pid in pids]
    used = [max(b - a, _TICK_SECONDS) for a, b in zip(before, after, strict=True)]
    return Used(seconds=used, units=units)


async def storm(arguments: argparse.Namespace) -> None:
    """Print how long it takes until all connections are subscribed, of each server in turn."""
    allow_many_files()
    with psycopg.connect(arguments.url) as admin:
        print(described(admin))
    for number in range(arguments.rounds):
        for name, starting in (
            ("one process", pgrealtime(arguments.url, rule=OWNER, users=_USERS)),
            ("two workers", pgrealtime(arguments.url, rule=OWNER, users=_USERS, workers=2)),
            ("PocketBase", pocketbase(rule=OWNER, users=_USERS)),
        ):
            async with starting as server:
                connected, subscribed = await asyncio.to_thread(_come_back, server, arguments.storm)
            print(
                f"round {number + 1}, {name:12} {arguments.storm} connections: connected after"
                f" {connected:.1f} s, the last one subscribed after {subscribed:.1f} s; {load()}"
            )


def _come_back(server: Server, connections: int) -> tuple[float, float]:
    with listeners() as opened, requests() as asking:
        began = time.monotonic()
        client_ids = opened.connect(server.port, connections)
        connected = time.monotonic() - began
        _, topics_of = CASES["user, 10 topics"]
        calls = [
            [
                subscribe_call(
                    server.port, client_id, topics_of(number), server.tokens[number % _USERS]
                ).decode()
            ]
            for number, client_id in enumerate(client_ids)
        ]
        asking.begin(server.port, calls, callers=64, seconds=_DEADLINE, most=connections)
        return connected, connected + float(asking.finish()["seconds"])


if __name__ == "__main__":
    main()
