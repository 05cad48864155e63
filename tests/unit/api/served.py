"""The application on a real port with a real hub, without a database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import jwt
from aiohttp import web

from pgrealtime.api.app import build_app, build_runner
from pgrealtime.api.body_reader import BODY_READER_KEY, BodyReader
from pgrealtime.api.call_router import CallRouter
from pgrealtime.auth.account import AccountLoader
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.bus.base import Bus, NoBus, draw_tag
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import Config
from pgrealtime.postgres.pool import QueryPool
from tests.conformance.http_client import Address
from tests.unit.hub.harness import DEADLINE, HubHarness, open_harness

SECRET = "made up for the tests, and long enough"
CONFIG: dict[str, Any] = {
    "auth": {"issuers": [{"name": "app", "secret": SECRET, "superuser_when": {"role": "service"}}]}
}


def token(subject: str, **claims: object) -> str:
    """Return a valid token."""
    return jwt.encode({"sub": subject, "exp": time.time() + 3600, **claims}, SECRET, "HS256")


SUPERUSER = token("root", role="service")


async def until(holds: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    async with asyncio.timeout(DEADLINE):
        while not holds():
            await asyncio.sleep(0.001)


@dataclass(frozen=True, slots=True)
class Served:
    """A service that accepts connections."""

    harness: HubHarness
    address: Address

    async def until_no_connection(self) -> None:
        """Wait until the hub has no connection left."""
        await until(lambda: not len(self.harness.hub.connections))

    async def raw(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection and send bytes unchanged; the caller reads and closes it."""
        reader, writer = await asyncio.open_connection(self.address.host, self.address.port)
        writer.write(data)
        return reader, writer

    async def answer_to(self, data: bytes) -> bytes:
        """Send bytes and the end of the stream; return everything received."""
        reader, writer = await self.raw(data)
        try:
            async with asyncio.timeout(DEADLINE):
                return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()


@asynccontextmanager
async def served(
    server: Mapping[str, object] | None = None,
    *,
    is_up: bool = True,
    body_reader: BodyReader | None = None,
    auth: Mapping[str, object] | None = None,
    bus: Bus | None = None,
    **limits: Any,
) -> AsyncIterator[Served]:
    """Run the service. ``limits`` are keys of the section ``realtime``.

    Args:
        server: Keys of the section ``server``.
        is_up: Whether the replication stream is up.
        body_reader: Reads bodies, if not with the default limits.
        auth: Further keys of the section ``auth``.
        bus: To other services.
        limits: Keys of the section ``realtime``.
    """
    config = Config.model_validate(
        {"auth": CONFIG["auth"] | (auth or {}), "server": server or {}, "realtime": limits}
    )
    bus = bus or NoBus(draw_tag())
    # Never opened: the tokens of the issuer are of no configured collection, so no row is read.
    pool = QueryPool()
    authenticator = Authenticator(config.auth, Collections(()), AccountLoader(pool))
    async with open_harness(is_up=is_up, tag=bus.tag, **limits) as open_:
        calls = CallRouter(open_.hub, authenticator, bus)
        app = build_app(open_.hub, authenticator, calls, config)
        app[BODY_READER_KEY] = body_reader or BodyReader()
        runner = build_runner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield Served(open_, Address(host="127.0.0.1", port=runner.addresses[0][1]))
        finally:
            await runner.cleanup()
