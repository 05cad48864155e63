"""Subscribe calls per second, and what one costs, as when all clients connect again.

    python -m tests.bench.subscribing postgresql://postgres@127.0.0.1:5432/postgres

Each round opens new streams and calls once for each, some calls at a time, so that every call is
its connection's first. Rounds alternate with PocketBase's; a figure is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import quote

import psycopg

from tests.bench.listeners import listeners
from tests.bench.listening import subscribe_call
from tests.bench.machine import allow_many_files, cpu_seconds, described, load
from tests.bench.reads import requests
from tests.bench.servers import OWNER, TOPIC, Server, pgrealtime, pocketbase

_USERS: Final = 1000
_DEADLINE: Final = 120.0


def _records(count: int) -> list[str]:
    return [f"notes/note{number:011d}" for number in range(count)]


def _filtered(text: str) -> str:
    options = json.dumps({"query": {"filter": text}})
    return f"{TOPIC}?options={quote(options)}"


CASES: Final[dict[str, tuple[bool, Callable[[int], Sequence[str]]]]] = {
    "guest, 1 topic": (False, lambda _: [TOPIC]),
    "guest, 10 topics": (False, lambda _: _records(10)),
    "user, 1 topic": (True, lambda _: [TOPIC]),
    "user, 10 topics": (True, lambda _: _records(10)),
    "user, the same filter": (True, lambda _: [_filtered("n > 5")]),
    "user, filters of their own": (True, lambda number: [_filtered(f"n > {number}")]),
}
"""Whether the callers have tokens, and the topics of the n-th."""


def main() -> None:
    """Print both servers' figures and their ratios, a case a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=2000, help="a round")
    parser.add_argument("--callers", type=int, default=64, help="calls at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
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
        await asyncio.to_thread(_compare, arguments, ours, theirs)


def _compare(arguments: argparse.Namespace, ours: Server, theirs: Server) -> None:
    for case in arguments.cases:
        for server in (ours, theirs):
            measure(server, case, arguments.connections // 5, arguments.callers)  # warms up
        rounds = [
            [
                measure(server, case, arguments.connections, arguments.callers)
                for server in (ours, theirs)
            ]
            for _ in range(arguments.rounds)
        ]
        mine, other = (
            [statistics.median(figure) for figure in zip(*side, strict=True)]
            for side in zip(*rounds, strict=True)
        )
        cpu_ratios = sorted(their[1] / our[1] for our, their in rounds)
        print(
            f"{case:28} {ours.name} {mine[0]:7,.0f} calls/s, {mine[1]:.3f} ms of CPU each;"
            f" {theirs.name} {other[0]:7,.0f}, {other[1]:.3f} ms; calls/s {mine[0] / other[0]:.2f},"
            f" per CPU {statistics.median(cpu_ratios):.2f}"
            f" ({cpu_ratios[0]:.2f}-{cpu_ratios[-1]:.2f}); {load()}"
        )


def measure(server: Server, case: str, connections: int, callers: int) -> tuple[float, float]:
    """Open streams and call once for each.

    Returns:
        Calls per second, and milliseconds of the server's processor for each.
    """
    has_tokens, topics_of = CASES[case]
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
            for number, client_id in enumerate(opened.connect(server.port, connections))
        ]
        before = cpu_seconds(server.pid)
        asking.begin(server.port, calls, callers=callers, seconds=_DEADLINE, most=connections)
        seconds = asking.finish()["seconds"]
        cpu = cpu_seconds(server.pid) - before
        return connections / seconds, cpu / connections * 1000


if __name__ == "__main__":
    main()
