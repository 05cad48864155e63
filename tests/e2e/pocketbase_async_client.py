"""Drives the PyPI client ``pocketbase-async``, with the commands and reports of ``sdk_client.mjs``.

Runs as a program with that client on its path, which shares its package's name with
``pocketbase``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pocketbase  # type: ignore[import-not-found]  # installed beside the others, not in .venv


def report(**what: Any) -> None:
    """Print one line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Driver:
    """One client."""

    def __init__(self, url: str) -> None:
        self._client = pocketbase.PocketBase(url)
        self._client.after_send = self._on_answer
        self._endings: dict[str, Callable[[], Awaitable[None]]] = {}

    async def _on_answer(self, response: Any) -> None:
        if response.url.path.endswith("/api/realtime"):
            report(report="submitted", status=response.status_code)

    async def token(self, token: str) -> None:
        async def authorize(request: Any) -> None:
            request.headers["Authorization"] = token

        self._client.before_send = authorize

    async def login(self, collection: str, identity: str, password: str) -> None:
        await self._client.collection(collection).auth.with_password(identity, password)

    async def subscribe(
        self, collection: str, topic: str, options: dict[str, Any] | None = None
    ) -> None:
        async def on_event(message: dict[str, Any]) -> None:
            report(report="event", **message)

        of = self._client.collection(collection)
        if topic == "*":
            ending = await of.subscribe_all(on_event, options)
        else:
            ending = await of.subscribe(on_event, topic, options)
        self._endings[f"{collection}/{topic}"] = ending

    async def cursor(self) -> None:
        """Ask for positions; nothing needs to be done with them."""

        async def pass_over(_: dict[str, Any]) -> None:
            pass

        await self._client.realtime.subscribe("PB_CURSOR", pass_over)

    async def unsubscribe(self, collection: str, topic: str) -> None:
        await self._endings.pop(f"{collection}/{topic}")()


async def main() -> None:
    """Execute commands until standard input ends."""
    driver = Driver(sys.argv[1])
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    async for line in reader:
        command = json.loads(line)
        number = command.pop("number")
        try:
            await getattr(driver, command.pop("do"))(**command)
            report(report="done", number=number)
        except Exception as error:  # noqa: BLE001 (whatever the client throws is the answer)
            status = getattr(error, "status", 0)
            report(report="failed", number=number, status=status, message=repr(error))


asyncio.run(main())
