"""Runs ``pgrealtime demo`` as a user does: what it prints, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.conformance.pgrealtime_server import command

START_SECONDS = 60.0
END_SECONDS = 30.0
_POLL_SECONDS = 0.05

EMBEDDED = ("--port", "0", "--no-browser", "--embedded")
"""A free port, and the wheel's server, so that it doesn't matter what is installed here."""


async def eventually(claim: Callable[[], bool], seconds: float = END_SECONDS) -> None:
    """Return once the condition holds; the state of other processes can't be awaited otherwise."""
    async with asyncio.timeout(seconds):
        while not claim():
            await asyncio.sleep(_POLL_SECONDS)


def processes_in(folder: Path) -> list[int]:
    """Return the processes whose working directory is in a folder, as a PostgreSQL server's are."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            place = entry.readlink()
        except OSError:
            continue  # it ended just now
        if folder == place or folder in place.parents or str(place).startswith(f"{folder}/"):
            found.append(int(entry.parent.name))
    return found


def uid_of(pid: int) -> int:
    """Return the user that the process runs as."""
    return Path(f"/proc/{pid}").stat().st_uid


def supervisor_of(process: Process) -> int:
    """Return the child process that supervises the server."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    [supervisor] = [
        int(pid) for pid in children if b"supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return supervisor


class Demo:
    """A demo that has printed its address."""

    def __init__(self, process: Process, printed: str) -> None:
        self.process = process
        self.printed = printed
        self.url = self._find(r"Open +(http://\S+)/\n")
        self.database_url = self._find(r"Database +(\S+)")
        self.directory = Path(self._find(r"It lives in (\S+)\.\n"))

    def _find(self, pattern: str) -> str:
        found = re.search(pattern, self.printed)
        assert found is not None, self.printed
        return found[1]

    def is_gone(self) -> bool:
        """Return whether neither its folder nor its server is left."""
        return not self.directory.exists() and not processes_in(self.directory)

    async def state(self) -> dict[str, Any]:
        """Return the state that the page loads first."""
        state: dict[str, Any] = json.loads(await self.get("/demo/state"))
        return state

    async def records(self, collection: str) -> list[dict[str, Any]]:
        """Return a collection's records, as the page lists them."""
        token = (await self.state())["watcher"]
        listed = await self.get(f"/api/collections/{collection}/records?perPage=1000", token)
        items: list[dict[str, Any]] = json.loads(listed)["items"]
        return items

    async def get(self, path: str, token: str = "") -> str:
        """Return the answer to a GET of the path."""
        request = Request(f"{self.url}{path}", headers={"Authorization": token})

        def read() -> str:
            with urlopen(request, timeout=END_SECONDS) as answer:
                text: str = answer.read().decode()
                return text

        return await asyncio.to_thread(read)

    async def end(self, number: int = signal.SIGINT) -> int:
        """Send it a signal; return its exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(END_SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def demo(
    arguments: Sequence[str] = EMBEDDED,
    *,
    start: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    started: Callable[[Process], Awaitable[None]] | None = None,
) -> AsyncIterator[Demo]:
    """Start it, wait until it says where it is; end it.

    Args:
        arguments: Of the command.
        start: Instead of the installed command.
        environment: Instead of this process's.
        started: Called with the process before it has printed anything.
    """
    process = await asyncio.create_subprocess_exec(
        *(start or [command(), "demo"]),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        env=environment,
        cwd="/",
    )
    try:
        if started is not None:
            await started(process)
        running = Demo(process, await _welcome(process))
        yield running
        await running.end()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _welcome(process: Process) -> str:
    """Return what it prints until it is up."""
    assert process.stdout is not None
    printed = ""
    async with asyncio.timeout(START_SECONDS):
        while "Ctrl-C" not in printed:
            line = await process.stdout.readline()
            assert line, f"it ended:\n{printed}"
            printed += line.decode()
    return printed


async def run(*start: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a command that ends by itself; return its status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *start,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        env=environment,
        cwd="/",
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, printed.decode()


def copy_checkout(target: Path) -> Path:
    """Copy the files of a clone that the demo needs, readable by every user."""
    root = Path(__file__).parents[2]
    for name in ("pgrealtime", "config", "sql", ".ci"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, target / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, target / name)
    for path in (target, *target.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    return target
