"""curl as a client, the program that nearly every machine has."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from tests.lacking import lacking

DEADLINE = 20.0


class Stream:
    """What an open ``curl -N`` prints."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        self._output = process.stdout

    async def line(self) -> str:
        """Return the next line without its end.

        Raises:
            EOFError: There is none.
        """
        async with asyncio.timeout(DEADLINE):
            line = await self._output.readline()
        if not line:
            raise EOFError
        return line.decode().rstrip("\r\n")

    async def data_of(self, event: str) -> Any:
        """Skip lines up to an event of the name; return its data."""
        while await self.line() != f"event:{event}":
            pass
        return json.loads((await self.line()).removeprefix("data:"))

    async def client_id(self) -> str:
        """Return the id that subscribe calls need."""
        found: str = (await self.data_of("PB_CONNECT"))["clientId"]
        return found


@asynccontextmanager
async def curl(*arguments: str) -> AsyncIterator[Stream]:
    """Run ``curl -N`` and end it by its pid; the answer's head comes first."""
    process = await _start(["-N", "--silent", "--show-error", "--include", *arguments])
    try:
        yield Stream(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def post(url: str, client_id: str, *topics: str, arguments: Sequence[str] = ()) -> None:
    """Submit the topics.

    Raises:
        AssertionError: The answer isn't a success.
    """
    body = json.dumps({"clientId": client_id, "subscriptions": topics})
    json_body = ("-H", "Content-Type: application/json", "-d", body)
    process = await _start(["--silent", "--show-error", "--fail", *json_body, *arguments, url])
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def _start(arguments: Sequence[str]) -> asyncio.subprocess.Process:
    program = shutil.which("curl")
    if program is None:
        lacking("curl is missing; sh tests/run.sh installs it")
    return await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
