"""The program as an operator runs it: a process, a database, and one YAML file."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import psycopg
import yaml

from tests.conformance.http_client import Address
from tests.conformance.pgrealtime_server import command
from tests.conformance.process import ServerProcess, free_port

SECRET = "an end-to-end secret of more than thirty-two bytes"

SCHEMA = """
CREATE TYPE mood AS ENUM ('calm', 'loud');
CREATE TABLE users (
  id text PRIMARY KEY,
  name text NOT NULL,
  email text,
  "emailVisibility" boolean NOT NULL DEFAULT false,
  verified boolean NOT NULL DEFAULT false
);
CREATE TABLE posts (
  id text PRIMARY KEY,
  title text NOT NULL,
  author text REFERENCES users,
  public boolean NOT NULL DEFAULT false,
  n integer NOT NULL DEFAULT 0,
  meta jsonb,
  tags text[],
  mood mood,
  ref uuid,
  at timestamptz,
  note text
);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE posts REPLICA IDENTITY FULL;
INSERT INTO users (id, name) VALUES ('ann', 'Ann'), ('bob', 'Bob');
"""
"""A small application: users, and posts that are public or their author's."""

MINE_OR_PUBLIC = 'public = true || (author != "" && author = @request.auth.id)'


def token(user: str, *, lifetime: float = 3600.0, **claims: object) -> str:
    """Return a token of the configured issuer."""
    made = {"sub": user, "exp": time.time() + lifetime, **claims}
    return jwt.encode(made, SECRET, algorithm="HS256")


def environ_of(database_url: str, config: Path, address: Address) -> dict[str, str]:
    """Return the variables with which the program runs by a file that ``init`` wrote."""
    return {
        "DATABASE_URL": database_url,
        "APP_JWT_SECRET": SECRET,
        "LOGIN_SECRET": SECRET,
        "PGREALTIME_CONFIG": str(config),
        "PGREALTIME_SERVER__HOST": address.host,
        "PORT": str(address.port),
    }


class Service:
    """A running pgrealtime; ``write`` is an application's connection to the database."""

    def __init__(
        self, config: Path, address: Address, write: psycopg.AsyncConnection[Any], base_path: str
    ) -> None:
        self._config = config
        self.address = address
        self.write = write
        self.base_path = base_path
        self._process: ServerProcess | None = None

    @property
    def url(self) -> str:
        return f"http://{self.address.host}:{self.address.port}{self.base_path}"

    @property
    def process(self) -> ServerProcess:
        assert self._process is not None, "not started"
        return self._process

    async def start(self) -> None:
        arguments = [command(), "run", "-c", str(self._config)]
        self._process = await ServerProcess.start(arguments, self._config.with_suffix(".log"))
        await self._process.wait_healthy(self.address, self.base_path)

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop()


@asynccontextmanager
async def service(
    database_url: str,
    directory: Path,
    *,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    collections: Mapping[str, Mapping[str, Any]] | None = None,
    schema: str = SCHEMA,
) -> AsyncIterator[Service]:
    """Create the tables, start the program, and end it by its pid.

    Args:
        database_url: An empty database.
        directory: For the configuration and the output.
        sections: Further sections of the configuration, such as ``{"realtime": {...}}``.
        collections: Instead of users and posts.
        schema: Instead of those of ``SCHEMA``.
    """
    rules = {"list_rule": MINE_OR_PUBLIC, "view_rule": MINE_OR_PUBLIC}
    settings: dict[str, Any] = {
        "version": 1,
        "database": {"url": database_url},
        "server": {"host": "127.0.0.1", "port": free_port()},
        "auth": {
            "issuers": [{"name": "app", "secret": SECRET, "superuser_when": {"role": "admin"}}]
        },
        "collections": collections
        or {
            "users": {"table": "users", "type": "auth", "list_rule": "id = @request.auth.id"},
            "posts": {"table": "posts", **rules},
        },
    }
    for name, section in (sections or {}).items():
        settings[name] = {**settings.get(name, {}), **section}
    config = directory / "pgrealtime.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    address = Address(host="127.0.0.1", port=settings["server"]["port"])
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as write:
        await write.execute(schema.encode())
        running = Service(config, address, write, settings["server"].get("base_path", ""))
        try:
            await running.start()
            yield running
        finally:
            await running.stop()
