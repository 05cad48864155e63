"""Published clients as processes that tests talk to: the official JavaScript SDK, those of PyPI."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tests.conftest import lacking

_HERE = Path(__file__).parent
DEADLINE = 20.0

PythonSdk: TypeAlias = Literal["pocketbase", "pocketbase-async"]
PYTHON_SDKS: tuple[PythonSdk, ...] = ("pocketbase", "pocketbase-async")


class SdkError(Exception):
    """The SDK rejected a call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Sdk:
    """One ``PocketBase`` object in a Node process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._arrived = asyncio.Event()
        self._number = 0
        self.reports: list[dict[str, Any]] = []
        """Everything that isn't an answer to a command, in order."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events so far."""
        return [report for report in self.reports if report["report"] == "event"]

    @property
    def is_closed(self) -> bool:
        """Whether a plain EventSource has given up for good."""
        closed = 2  # EventSource.CLOSED
        return any(r["report"] == "break" and r["id"] == closed for r in self.reports)

    async def do(self, command: str, **arguments: Any) -> None:
        """Run a command and wait for the SDK's promise.

        Raises:
            SdkError: It was rejected.
        """
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        line = {"do": command, "number": self._number, **arguments}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
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
                while len(found := [r for r in self.reports if r["report"] == kind]) < count:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise TimeoutError(f"{count} {kind}: {self.reports[-20:]}") from None
        return found

    async def read(self) -> None:
        """Take what the process prints, until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            answer = self._answers.pop(said.get("number", 0), None)
            if answer is None:
                self.reports.append(said)
                self._arrived.set()
            elif not answer.done():
                failed = said["report"] == "failed"
                if failed:
                    answer.set_exception(SdkError(said["status"], said["message"]))
                else:
                    answer.set_result(None)


@asynccontextmanager
async def sdk(url: str) -> AsyncIterator[Sdk]:
    """Start the SDK against a server; end it by pid."""
    async with _node("sdk_client.mjs", url) as client:
        yield client


@asynccontextmanager
async def native(url: str, *topics: str) -> AsyncIterator[Sdk]:
    """Start a plain EventSource that resumes; it takes no commands."""
    async with _node("native_client.mjs", url, json.dumps(topics)) as client:
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
    node = shutil.which("node")
    if node is None:
        lacking("Node is missing; sh tests/run.sh installs it")
    async with _running(node, str(_HERE / script), *arguments) as client:
        yield client


@asynccontextmanager
async def _running(
    *command: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Sdk]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        limit=1 << 24,
    )
    client = Sdk(process)
    reading = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        process.kill()
        await process.wait()
        await reading
