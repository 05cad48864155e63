"""Runs many histories and prints what was counted: ``python -m tests.histories --help``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import sys
import time
from collections import Counter

import psycopg
import structlog
from psycopg import sql

from tests.conftest import drop_database
from tests.histories.history import History, open_world, scene_of


async def live(
    url: str, seed: str, histories: range, faults: float, *, prints_stories: bool
) -> tuple[Counter[str], list[str]]:
    """Run some histories of a world; return what was counted and what was wrong."""
    scene = scene_of(seed)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    async with open_world(scene, url) as world:
        for number in histories:
            try:
                findings = await History(world, f"{seed}:{number}", faults=faults).run()
            except Exception as error:  # noqa: BLE001 (a long run goes on)
                wrong.append(f"{seed}:{number} {type(error).__name__}: {error}")
                counts[f"FAULT {type(error).__name__}"] += 1
                break
            counts.update(findings.counts)
            if prints_stories:
                print(*findings.stories, sep="\n", flush=True)
            wrong += [f"{seed}:{number} {scene.plugin} {fault}" for fault in findings.faults]
        counts.update(world.findings.counts)
    return counts, wrong


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.histories")
    parser.add_argument("--port", default=os.environ.get("PGREALTIME_TEST_PG_PORT", ""))
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--each", type=int, default=25, help="histories of one world")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--faults", type=float, default=0.0, help="share of steps that are faults")
    parser.add_argument("--seed", default="", help="WORLD or WORLD:HISTORY, as printed")
    parser.add_argument("--times", type=int, default=1, help="live the given seed so many times")
    parser.add_argument("--show", type=int, default=5, help="faults of a kind that are printed")
    parser.add_argument(
        "--story", action="store_true", help="all that the clients concerned received"
    )
    parser.add_argument("--log", action="store_true", help="what the program says")
    parser.add_argument("--progress", action="store_true", help="say how far it is")
    return parser.parse_args()


def main() -> None:
    """Run until so many histories are done or the time is over."""
    options = _options()
    logging.disable(logging.CRITICAL)
    level = logging.INFO if options.log else logging.CRITICAL
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    total: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    began = time.monotonic()
    admin = psycopg.connect(
        host="127.0.0.1", port=options.port, user="postgres", dbname="postgres", autocommit=True
    )
    times = 0
    while (
        total["histories"] < options.histories and time.monotonic() - began < options.minutes * 60
    ):
        seed, _, number = options.seed.partition(":")
        seed = seed or f"{random.randrange(1 << 32):08x}"
        histories = range(int(number), int(number) + 1) if number else range(options.each)
        if options.progress:
            print(f"{seed} begins", flush=True)
        name = f"histories_{os.getpid()}_{times}"
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        url = f"postgresql://postgres@127.0.0.1:{options.port}/{name}"
        try:
            counts, wrong = asyncio.run(
                live(url, seed, histories, options.faults, prints_stories=options.story)
            )
        finally:
            drop_database(admin, name)
        total.update(counts)
        if options.progress:
            took = time.monotonic() - began
            print(f"{seed} {total['histories']} histories, {took:.0f} s", flush=True)
        for line in wrong:
            kind = line.split(" ", 2)[-1].partition(":")[0]
            shown[kind] += 1
            if shown[kind] <= options.show:
                print(line, flush=True)
        times += 1
        if options.seed and times >= options.times:
            break
    seconds = time.monotonic() - began
    print(f"{total['histories'] / seconds:.2f} histories a second")
    for name, count in sorted(total.items()):
        print(f"{count:10d}  {name}")
    sys.exit(any(name.startswith("FAULT") for name in total))


if __name__ == "__main__":
    main()
