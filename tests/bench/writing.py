"""How benchmarks write: as fast as each commit allows, or at a steady pace."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tests.bench.servers import Server, Writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Paced:
    """Results of writing at a steady pace."""

    sent: Sequence[int]
    """When each write was begun, in nanoseconds of the monotonic clock."""
    round_trips: Sequence[float]
    """Milliseconds until each was acknowledged, ascending."""


def flat_out(server: Server, commits: Sequence[Sequence[str]], *, writers: int) -> int:
    """Let some writers share the commits, each as fast as it can; return the start in nanoseconds.

    Args:
        server: Receives the writes.
        commits: The owners of each commit's notes.
        writers: Number of concurrent writers.
    """
    shares = [(server.writer(), commits[place::writers]) for place in range(writers)]
    with ThreadPoolExecutor(writers) as pool:
        began = time.monotonic_ns()
        work = [pool.submit(partial(_write_all, writer, share)) for writer, share in shares]
    for done in work:
        done.result()
    return began


def _write_all(writer: Writer, commits: Sequence[Sequence[str]]) -> None:
    for owners in commits:
        writer.write(owners)


def paced(
    server: Server, owners: Sequence[str], *, per_second: float, writer: Writer | None = None
) -> Paced:
    """Write one note per commit, beginning each when its time has come.

    A write that is late because the one before took so long counts from when it began, which
    favours a server that delays its writers.

    Args:
        server: Receives the writes.
        owners: Owners of the notes.
        per_second: The pace.
        writer: One that has written before; the first statement of a new session is slow.
    """
    writer = writer or server.writer()
    sent: list[int] = []
    round_trips: list[float] = []
    start = time.monotonic_ns()
    for place, owner in enumerate(owners):
        due = start + int(place * 1e9 / per_second)
        time.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
        begun = time.monotonic_ns()
        writer.write([owner])
        sent.append(begun)
        round_trips.append((time.monotonic_ns() - begun) / 1e6)
    return Paced(sent=sent, round_trips=sorted(round_trips))
