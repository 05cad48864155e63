"""A service whose mirrors are compared with lists: its tables, and what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psycopg

from pgrealtime.config.load import ConfigLocations, ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.service.build import run_service
from tests.attacks.reading import Reader, configured
from tests.mirrors.client import FENCE, SECONDS, MirrorClient

_FENCE_SECONDS = 1.0
FENCE_SCHEMA = "CREATE TABLE fence (id text PRIMARY KEY);"
FENCE_COLLECTION = {"table": FENCE, "list_rule": "", "view_rule": "", "mirrors": "off"}


@dataclass(eq=False)
class Scene:
    """A running service and its clients."""

    url: str
    reader: Reader
    sections: dict[str, Any]
    clients: list[MirrorClient] = field(default_factory=list)
    fences: int = 0
    _running: AsyncExitStack = field(default_factory=AsyncExitStack)

    # --- the service

    async def start(self) -> None:
        """Start the service with the reader's configuration."""

        def read_config() -> ParsedConfig:
            locations = ConfigLocations(source="configuration")
            return ParsedConfig(config=self.reader.config, locations=locations)

        running = run_service(self.reader.config, read_config=read_config)
        self.reader.service = await self._running.enter_async_context(running)

    async def stop(self) -> None:
        """Stop it in order."""
        await self._running.aclose()

    async def reload(self, collections: Mapping[str, Any]) -> None:
        """Apply other collections."""
        await self.reader.reload(configured_with_fence(self.url, collections, self.sections))

    # --- the clients

    async def client(self, collection: str, person: str = "", **settings: Any) -> MirrorClient:
        """Connect a client, and return it once it has its list."""
        made = MirrorClient(self.reader, collection, person, **settings)
        self.clients.append(made)
        await made.connect()
        await self.settle()
        return made

    async def disconnect(self) -> None:
        """Break off every client."""
        for client in self.clients:
            await client.disconnect()

    async def write(self, *statements: str) -> None:
        """Commit some statements in one transaction."""
        async with self.reader.write.transaction():
            for statement in statements:
                await self.reader.write.execute(statement.encode())

    async def settle(self) -> None:
        """Return once every client has all that was committed, and no resync waits."""
        resyncs = self.reader.service.hub.resyncs_written
        async with asyncio.timeout(SECONDS):
            while True:
                written = sum(resyncs.values())
                await self.pass_fence()
                # One that was written meanwhile may be on its way.
                waiting = self.reader.service.hub._registry.mirrors_to_resync
                if not waiting and sum(resyncs.values()) == written:
                    return
                await asyncio.sleep(0.02)

    async def pass_fence(self) -> None:
        """Return once every client has what was committed before, and loads nothing."""
        while True:
            self.fences += 1
            fence = f"{id(self)}-{self.fences}"
            await self.write(f"INSERT INTO fence VALUES ('{fence}')")
            # One that was away will hear of the next one.
            with suppress(TimeoutError):
                async with asyncio.timeout(_FENCE_SECONDS):
                    for client in self.clients:
                        await client.wait_for_fence(fence)
                    return

    async def check(self) -> None:
        """Compare every client's list with what it would load now."""
        await self.settle()
        for client in self.clients:
            expected = await client.fetch_list()
            assert client.rows == expected, (client.collection, client.person, client.filter)


def configured_with_fence(
    url: str, collections: Mapping[str, Any], sections: Mapping[str, Any]
) -> Config:
    """Return the configuration of the collections and of the fence."""
    return configured(url, {**collections, FENCE: FENCE_COLLECTION}, **sections)


@asynccontextmanager
async def scene(
    url: str, schema: str, collections: Mapping[str, Any], **sections: Any
) -> AsyncIterator[Scene]:
    """Load a schema and run the service over it."""
    sections.setdefault("mirrors", {"pace": 0.05})
    async with (
        await psycopg.AsyncConnection.connect(url, autocommit=True) as write,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await write.execute((schema + FENCE_SCHEMA).encode())
        config = configured_with_fence(url, collections, sections)
        reader = Reader(session, None, write, config)  # type: ignore[arg-type]  # until the start
        made = Scene(url, reader, sections)
        try:
            await made.start()
            yield made
        finally:
            await made.disconnect()
            await made.stop()
