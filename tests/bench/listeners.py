"""The parent's side of ``listening``: opens streams in a child process, sets targets, waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.bench import listening
from tests.bench.machine import CLIENT_CORE, pinned


class LostStreamsError(Exception):
    """A server ended streams, or didn't deliver in time: the round has no result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The time that opening and subscribing took."""

    connect_seconds: float
    subscribe_seconds: float


class Listeners:
    """A handle on the process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def open(
        self, port: int, topics: Sequence[Sequence[str]], tokens: Sequence[str] = ()
    ) -> Opened:
        """Open a stream per list of topics and subscribe it, with the tokens in turn."""
        return Opened(**self._ask("open", port=port, topics=topics, tokens=list(tokens)))

    def connect(self, port: int, count: int) -> list[str]:
        """Open streams without subscribing them; return their client ids."""
        return list(self._ask("connect", port=port, count=count)["client_ids"])

    def aim(self, messages: int, *, notes: bool = False) -> None:
        """Reset the counter, and expect so many messages on all streams together."""
        self._ask("aim", messages=messages, notes=notes)

    def wait(self, seconds: float) -> int:
        """Return when the last message came, in nanoseconds of the monotonic clock.

        Raises:
            LostStreamsError: Not all came, or streams ended.
        """
        came = self._ask("wait", seconds=seconds)
        if came["lost"] or not came["at"]:
            raise LostStreamsError(f"{came['messages']} messages, {came['lost']} streams lost")
        return int(came["at"])

    def settle(self, messages: int, seconds: float) -> None:
        """Wait for so many messages since ``aim``, whatever the target was then.

        Raises:
            LostStreamsError: Not all came, or streams ended.
        """
        self._ask("expect", messages=messages)
        self.wait(seconds)

    def latencies(self, sent: Sequence[int], quantiles: Sequence[float]) -> list[float]:
        """Return quantiles of the milliseconds from sending to each arrival.

        Args:
            sent: When each write was begun, in nanoseconds of the monotonic clock. Every stream
                receives them all, in this order.
            quantiles: As in 0.5 for the median.
        """
        asked = self._ask("latencies", sent=list(sent), quantiles=list(quantiles))
        return list(asked["milliseconds"])

    def close(self) -> None:
        """Close all streams."""
        self._ask("close")

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise LostStreamsError(f"the listening process ended: {self._process.wait()}")
        return dict(json.loads(answer))


@contextmanager
def listeners() -> Iterator[Listeners]:
    """Start the process on the clients' core, and end it with the block."""
    with pinned(CLIENT_CORE):
        process = subprocess.Popen(
            [sys.executable, "-m", listening.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    with process:
        yield Listeners(process)
        assert process.stdin is not None
        process.stdin.close()
