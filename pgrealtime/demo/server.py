"""The demo's side of its throwaway server: starts the keeper, and lets go of it."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgrealtime.demo.account import clean_environment
from pgrealtime.demo.directory import remove_directory
from pgrealtime.errors import SetupError

_START_SECONDS = 180.0
_END_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrowawayServer:
    """A PostgreSQL that is there until the block is left."""

    url: str
    """Of an empty database, as its superuser; with the password."""
    version: str
    origin: str
    """Where its programs are from, for people."""
    directory: Path
    supervisor: Process

    async def watch(self) -> None:
        """Wait for as long as the server runs.

        Raises:
            SetupError: It ended.
        """
        await self.supervisor.wait()
        raise SetupError("the demo's PostgreSQL ended by itself", code="server_gone")


@asynccontextmanager
async def throwaway_server(*, embedded: bool) -> AsyncIterator[ThrowawayServer]:
    """Start a server, and remove it with all that was in it.

    Args:
        embedded: Take the wheel's server even if this machine has one.

    Raises:
        SetupError: None can be had.
    """
    keeper = await asyncio.create_subprocess_exec(
        # -P: what lies in the folder where somebody happens to be is none of our business.
        *(sys.executable, "-P", "-m", "pgrealtime.demo.keeper"),
        *(["--embedded"] if embedded else []),
        stdin=PIPE,
        stdout=PIPE,
        env=clean_environment(),
        # Out of reach of the terminal's Ctrl-C: the server ends after those who use it.
        start_new_session=True,
    )
    server: ThrowawayServer | None = None
    try:
        server = await _read_start_report(keeper)
        yield server
    finally:
        await _stop_supervisor(keeper)
        if server is not None and server.directory.exists():  # the keeper was killed
            await asyncio.to_thread(remove_directory, server.directory)


async def _read_start_report(supervisor: Process) -> ThrowawayServer:
    assert supervisor.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            told: dict[str, Any] = json.loads(await supervisor.stdout.readline())
    except (TimeoutError, json.JSONDecodeError) as error:
        raise SetupError("the demo's PostgreSQL doesn't start", code="server_start") from error
    if "error" in told:
        message, detail, hint, code = told["error"]
        raise SetupError(message, detail=detail, hint=hint, code=code)
    told["directory"] = Path(told["directory"])
    return ThrowawayServer(supervisor=supervisor, **told)


async def _stop_supervisor(supervisor: Process) -> None:
    """Close its input, at which it ends, and wait for that."""
    assert supervisor.stdin is not None
    supervisor.stdin.close()
    try:
        async with asyncio.timeout(_END_SECONDS):
            await supervisor.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            supervisor.kill()
        await supervisor.wait()
