"""A hostile client of the read routes, with the program in the test's own process."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import aiohttp
import jwt
import psycopg
import yarl

from pgrealtime.config.load import ConfigLocations, ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.service.build import RunningService, run_service
from tests.conformance.http_client import Address

SECRET = "a secret of an attacked service, long enough"


@dataclass(slots=True)
class Reader:
    """Sends read requests, and may write to the database."""

    session: aiohttp.ClientSession
    service: RunningService
    write: psycopg.AsyncConnection[Any]
    config: Config

    @property
    def port(self) -> int:
        return self.service.port

    @property
    def address(self) -> Address:
        return Address(host="127.0.0.1", port=self.port)

    def url(self, path: str, **query: str) -> yarl.URL:
        """Return the URL of a path after ``/api/collections/``."""
        text = f"http://127.0.0.1:{self.port}/api/collections/{path}?{urlencode(query)}"
        return yarl.URL(text, encoded=True)

    async def reload(self, config: Config) -> None:
        """Apply another configuration."""
        self.config = config
        assert await self.service.reloader.reload()

    async def get(self, path: str, caller: str = "", **query: str) -> tuple[int, Any]:
        """Return status and body."""
        async with self.session.get(self.url(path, **query), headers=bearer(caller)) as response:
            return response.status, json.loads(await response.read())

    async def ids(self, path: str, caller: str = "", **query: str) -> list[str]:
        """Return the ids of a list."""
        status, body = await self.get(f"{path}/records", caller, **query)
        assert status == 200, body
        return [item["id"] for item in body["items"]]


def bearer(caller: str) -> dict[str, str]:
    """Return the headers of a caller's request; none of a guest's."""
    claims = {"sub": caller, "exp": time.time() + 3600}
    return {"Authorization": jwt.encode(claims, SECRET)} if caller else {}


def configured(database_url: str, collections: Mapping[str, Any], **sections: Any) -> Config:
    """Return a configuration."""
    settings = {
        "database": {"url": database_url},
        "server": {"host": "127.0.0.1", "port": 0},
        "auth": {"issuers": [{"name": "app", "secret": SECRET}]},
        "collections": collections,
        **sections,
    }
    return Config.model_validate(settings)


@asynccontextmanager
async def reading(
    database_url: str, schema: str, collections: Mapping[str, Any], **sections: Any
) -> AsyncIterator[Reader]:
    """Load a schema, run the program, and yield its client."""
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as write,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await write.execute(schema.encode())
        config = configured(database_url, collections, **sections)

        def read_config() -> ParsedConfig:
            locations = ConfigLocations(source="configuration")
            return ParsedConfig(config=reader.config, locations=locations)

        async with run_service(config, read_config=read_config) as service:
            reader = Reader(session, service, write, config)
            yield reader
