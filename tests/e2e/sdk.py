"""Published clients as child processes: the official JavaScript SDK and those of PyPI."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tests.lacking import lacking

_HERE = Path(__file__).parent
DEADLINE = 20.0

EVENT_SOURCES = ("eventsource2", "eventsource3", "eventsource", "eventsource5")
"""The major versions of the library that the SDK's guide names; see ``tests/package.json``."""

PythonSdk: TypeAlias = Literal["pocketbase", "pocketbase-async"]
PYTHON_SDKS: tuple[PythonSdk, ...] = ("pocketbase", "pocketbase-async")


class SdkError(Exception):
    """The SDK rejected a call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Sdk:
    """One client in another process, which executes commands and reports what it receives.

    Args:
        send: Sends a command.
    """

    def __init__(self, send: Callable[[Mapping[str, Any]], Awaitable[None]]) -> None:
        self._send = send
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._arrived = asyncio.Event()
        self._number = 0
        self.reports: list[dict[str, Any]] = []
        """Everything that isn't an answer to a command, in order."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """Return the events so far."""
        return self.of("event")

    @property
    def is_closed(self) -> bool:
        """Whether a plain EventSource has given up for good."""
        closed = 2  # EventSource.CLOSED
        return any(report["id"] == closed for report in self.of("break"))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the reports of a kind so far."""
        return [report for report in self.reports if report["report"] == kind]

    async def do(self, command: str, **arguments: Any) -> None:
        """Run a command and wait for the SDK's promise.

        Raises:
            SdkError: It was rejected.
        """
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._send({"do": command, "number": self._number, **arguments})
        async with asyncio.timeout(DEADLINE):
            await answer

    async def wait_for(
        self, count: int, kind: str = "event", seconds: float = DEADLINE
    ) -> list[dict[str, Any]]:
        """Return the reports of a kind, once there are so many.

        Raises:
            TimeoutError: There weren't; says what came instead.
        """
        try:
            async with asyncio.timeout(seconds):
                while len(found := self.of(kind)) < count:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise TimeoutError(f"{count} {kind}: {self.reports[-20:]}") from None
        return found

    def take(self, said: dict[str, Any]) -> None:
        """Process its output: an answer to a command, or a report."""
        answer = self._answers.pop(said.get("number", 0), None)
        if answer is None:
            self.reports.append(said)
            self._arrived.set()
        elif not answer.done():
            if said["report"] == "failed":
                answer.set_exception(SdkError(said["status"], said["message"]))
            else:
                answer.set_result(None)


@asynccontextmanager
async def sdk(url: str, event_source: str = "eventsource") -> AsyncIterator[Sdk]:
    """Start the SDK against a server, over an EventSource library; end it by pid."""
    async with _node("sdk_client.mjs", url, event_source) as client:
        yield client


@asynccontextmanager
async def native(url: str, *topics: str) -> AsyncIterator[Sdk]:
    """Start a plain EventSource that resumes; it takes no commands."""
    async with _node("native_client.mjs", url, json.dumps(topics)) as client:
        yield client


@asynccontextmanager
async def module(code: str, *arguments: str) -> AsyncIterator[Sdk]:
    """Run the text of an ECMAScript module, which may import what the clients do; no commands."""
    async with _running(_node_path(), "--input-type=module", "-e", code, *arguments) as client:
        yield client


@asynccontextmanager
async def python_sdk(name: PythonSdk, url: str) -> AsyncIterator[Sdk]:
    """Start one of the clients of PyPI."""
    installed = _HERE.parent / ".python" / name
    if not installed.exists():
        lacking(f"{name} is missing; sh tests/run.sh installs it")
    script = _HERE / f"{name.replace('-', '_')}_client.py"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    async with _running(sys.executable, str(script), url, environment=environment) as client:
        yield client


@asynccontextmanager
async def _node(script: str, *arguments: str) -> AsyncIterator[Sdk]:
    async with _running(_node_path(), str(_HERE / script), *arguments) as client:
        yield client


def _node_path() -> str:
    node = shutil.which("node")
    if node is None:
        lacking("Node is missing; sh tests/run.sh installs it")
    return node


@asynccontextmanager
async def _running(
    *command: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Sdk]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        cwd=_HERE,  # the module's imports are resolved from here
        limit=1 << 24,
    )
    client = Sdk(partial(_write, process))
    reading = asyncio.create_task(_read(process, client))
    try:
        yield client
    finally:
        process.kill()
        await process.wait()
        await reading


async def _write(process: asyncio.subprocess.Process, command: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(command).encode() + b"\n")


async def _read(process: asyncio.subprocess.Process, client: Sdk) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        client.take(json.loads(line))
