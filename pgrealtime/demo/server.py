"""Starts the supervisor of the throwaway server, and ends it."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgrealtime.demo.directory import remove_directory
from pgrealtime.demo.os_account import clean_environment
from pgrealtime.errors import SetupError

_START_SECONDS = 180.0
_END_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrowawayServer:
    """A PostgreSQL server that runs until the block ends."""

    url: str
    """Of an empty database, with user and password of a superuser."""
    version: str
    origin: str
    """Where its programs are from, as a text."""
    directory: Path
    supervisor: Process

    async def watch(self) -> None:
        """Wait for as long as the server runs, then raise SetupError."""
        await self.supervisor.wait()
        raise SetupError("the demo's PostgreSQL ended by itself", code="server_gone")


@asynccontextmanager
async def throwaway_server(*, embedded: bool) -> AsyncIterator[ThrowawayServer]:
    """Run a server for the duration of the block; remove it with all its data at the end.

    Raises:
        SetupError: There is no server, or it doesn't start.
    """
    supervisor = await asyncio.create_subprocess_exec(
        # -P: don't import modules from the current directory.
        *(sys.executable, "-P", "-m", "pgrealtime.demo.supervisor"),
        *(["--embedded"] if embedded else []),
        stdin=PIPE,
        stdout=PIPE,
        env=clean_environment(),
        # The terminal's Ctrl-C doesn't reach it: the server ends after the service that uses it.
        start_new_session=True,
    )
    server: ThrowawayServer | None = None
    try:
        server = await _read_start_report(supervisor)
        yield server
    finally:
        await _stop_supervisor(supervisor)
        if server is not None and server.directory.exists():  # the supervisor was killed
            await asyncio.to_thread(remove_directory, server.directory)


async def _read_start_report(supervisor: Process) -> ThrowawayServer:
    assert supervisor.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            report: dict[str, Any] = json.loads(await supervisor.stdout.readline())
    except (TimeoutError, json.JSONDecodeError) as error:
        raise SetupError("the demo's PostgreSQL doesn't start", code="server_start") from error
    if "error" in report:
        message, detail, hint, code = report["error"]
        raise SetupError(message, detail=detail, hint=hint, code=code)
    report["directory"] = Path(report["directory"])
    return ThrowawayServer(supervisor=supervisor, **report)


async def _stop_supervisor(supervisor: Process) -> None:
    """Close the supervisor's input, at which it ends, and wait for that."""
    assert supervisor.stdin is not None
    supervisor.stdin.close()
    try:
        async with asyncio.timeout(_END_SECONDS):
            await supervisor.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            supervisor.kill()
        await supervisor.wait()
