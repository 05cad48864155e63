"""A server as a child process: started, awaited and ended by its own id."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conformance.http_client import Address, ProtocolError, Request, send

START_SECONDS = 60.0
STOP_SECONDS = 20.0
LOG_SECONDS = 30.0
POLL_SECONDS = 0.02
SERVER_PORTS = 10_000, 32_000
_RANDOM = random.SystemRandom()
"""Not the one of ``random``, which tests seed."""
_marks = deque[int](maxlen=100)
"""The descriptors of UDP sockets, closed with this process."""


class ServerDiedError(Exception):
    """The server ended before it answered, or didn't answer in time; carries its output."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody uses, and that none of the next calls returns.

    It is none of those that the system gives to outgoing connections, one of which could have it
    before a server does. The UDP port of the same number is kept for a while, so that suites which
    run side by side don't choose the same one.
    """
    while True:
        port = _RANDOM.randint(*SERVER_PORTS)
        mark = socket.socket(type=socket.SOCK_DGRAM)
        try:
            mark.bind(("127.0.0.1", port))
            with socket.socket() as listening:
                listening.bind(("127.0.0.1", port))
        except OSError:
            mark.close()
        else:
            if len(_marks) == _marks.maxlen:
                os.close(_marks.popleft())
            _marks.append(mark.detach())
            return port


class ServerProcess:
    """One child process; its output goes to a file."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(
        cls, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> ServerProcess:
        """Start the command; its output is appended to ``log``."""
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
            )
        return cls(process, log)

    @property
    def pid(self) -> int:
        """The process id, for measurements."""
        return self._process.pid

    async def wait_healthy(self, address: Address, base_path: str = "") -> None:
        """Return once ``/api/health`` answers 200, under the path prefix, if there is one.

        Raises:
            ServerDiedError: The process ended, or said nothing for too long.
        """
        health = Request(method="GET", path=f"{base_path}/api/health", headers={})
        try:
            async with asyncio.timeout(START_SECONDS):
                while True:
                    if self._process.returncode is not None:
                        raise ServerDiedError(f"exit {self._process.returncode}\n{self.output()}")
                    try:
                        if (await send(health, address)).head.status == 200:
                            return
                    except (OSError, ProtocolError):
                        pass
                    await asyncio.sleep(POLL_SECONDS)  # the only sign of readiness is an answer
        except TimeoutError as error:
            await self.stop()
            raise ServerDiedError(f"no answer in {START_SECONDS} s\n{self.output()}") from error

    def output(self) -> str:
        """Return what the process has printed so far."""
        return self._log.read_text(errors="replace")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of the log with that event; only a program that logs JSON has any."""
        whole = self.output().split("\n")[:-1]  # the last line may be half written
        lines = (line for line in whole if line.startswith("{"))
        return [said for line in lines if (said := json.loads(line)).get("event") == event]

    async def wait_logged(self, event: str, times: int = 1) -> dict[str, Any]:
        """Return the log line with that event that makes so many, once it is written."""
        async with asyncio.timeout(LOG_SECONDS):
            while len(said := self.logged(event)) < times:
                await asyncio.sleep(POLL_SECONDS)  # a file signals no growth
        return said[times - 1]

    async def reload(self) -> bool:
        """Send SIGHUP; return once the program has accepted the configuration, or refused it."""

        def answers() -> list[int]:
            return [len(self.logged(f"config.{word}")) for word in ("reloaded", "rejected")]

        before = answers()
        self._process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(LOG_SECONDS):
            while (now := answers()) == before:
                await asyncio.sleep(POLL_SECONDS)  # as above
        return now[1] == before[1]

    async def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if that doesn't end it in time."""
        if self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise ServerDiedError(
                f"SIGTERM ignored for {STOP_SECONDS} s\n{self.output()}"
            ) from None


async def run(command: Sequence[str]) -> str:
    """Run a command to its end and return its output.

    Raises:
        ServerDiedError: It failed.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise ServerDiedError(output.decode(errors="replace"))
    return output.decode(errors="replace")
