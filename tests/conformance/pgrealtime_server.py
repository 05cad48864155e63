"""pgrealtime as operators run it: a process with a database, configured by one YAML file."""

from __future__ import annotations

import asyncio
import re
import secrets
import sysconfig
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import msgspec
import psycopg
import yaml

from pgrealtime.config.model import CollectionConfig
from tests.balancer import apart, balancer
from tests.conformance.fixtures import SUPERUSERS, Account, Fixtures
from tests.conformance.http_client import Address
from tests.conformance.natural_schema import NaturalSchema, Statement, Style, fields_of
from tests.conformance.pocketbase_server import PocketBaseApi
from tests.conformance.process import ServerProcess, free_port
from tests.conformance.target import RefusedError, UnsupportedStepError
from tests.conformance.transcript import Write

TOKEN_SECONDS = 5 * 24 * 3600
"""PocketBase's default lifetime of a token."""

IDLE_SECONDS = 300.0
LIFE_SECONDS = 1800.0
"""PocketBase's two time limits of a connection."""

SUPERUSER_ROLE = "service"

RULES = {
    "listRule": "list_rule",
    "viewRule": "view_rule",
    "manageRule": "manage_rule",
    "authRule": "auth_rule",
}
"""PocketBase's names of rules to those of the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run needs different from the default."""

    time_scale: float = 1.0
    """Factor on the two limits of a connection."""
    heartbeat: str = "200ms"
    """Short, so that a recording meets some.

    They must neither disturb messages nor keep a connection open.
    """
    login_through_api: bool = False
    """Whether accounts get their tokens from pgrealtime itself rather than from another issuer."""
    calls_elsewhere: bool = False
    """Whether there is a second process, to which everything goes but the streams."""


def command() -> str:
    """Return the installed command."""
    return str(Path(sysconfig.get_path("scripts")) / "pgrealtime")


class PgRealtimeServer:
    """A running pgrealtime and a connection to write with; implements ``Target``."""

    def __init__(
        self,
        *,
        fixtures: Fixtures,
        schema: NaturalSchema,
        connection: psycopg.AsyncConnection[Any],
        config: Path,
        address: Address,
        processes: Sequence[Address],
        issuers: Mapping[str, str],
        setting: Setting,
    ) -> None:
        """Not to be called; see ``running``.

        Args:
            fixtures: What the database was filled with.
            schema: Its tables.
            connection: To the database, in autocommit.
            config: The configuration file.
            address: Where clients reach the server.
            processes: Where its processes will listen.
            issuers: Collection to the secret its tokens are signed with.
            setting: Differences from the default.
        """
        self._fixtures = fixtures
        self._schema = schema
        self._connection = connection
        self._config = config
        self._address = address
        self._addresses = processes
        self._issuers = dict(issuers)
        self._tables: dict[str, str] = {}
        """The names in the fixtures of collections that were renamed since."""
        self._setting = setting
        self._processes: list[ServerProcess] = []

    @property
    def address(self) -> Address:
        return self._address

    @property
    def output(self) -> str:
        """Return what the processes have printed."""
        return "\n".join(process.output() for process in self._processes)

    async def start(self) -> None:
        """Start the processes; return when they answer."""
        arguments = [command(), "run", "-c", str(self._config)]
        self._processes = [
            await ServerProcess.start(
                arguments,
                self._config.with_suffix(f".{address.port}.log"),
                {"PGREALTIME_SERVER__PORT": str(address.port)},
            )
            for address in self._addresses
        ]
        for process, address in zip(self._processes, self._addresses, strict=True):
            await process.wait_healthy(address)

    async def stop(self) -> None:
        """Stop in an orderly way."""
        await asyncio.gather(*(process.stop() for process in self._processes))

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def login(self, account: Account, lifetime_seconds: float | None) -> str:
        is_superuser = account.collection == SUPERUSERS
        if self._setting.login_through_api and lifetime_seconds is None and not is_superuser:
            api = PocketBaseApi(self._address)
            return await api.login(account.collection, account.identity, account.password)
        record_id = "root" if is_superuser else self._fixtures.account_id(account)
        lifetime = TOKEN_SECONDS if lifetime_seconds is None else lifetime_seconds
        claims = {"id": record_id, "exp": time.time() + lifetime, "jti": secrets.token_hex(8)}
        claims |= {"role": SUPERUSER_ROLE} if is_superuser else {}
        return jwt.encode(claims, self._issuers[account.collection], algorithm="HS256")

    async def write(self, write: Write) -> None:
        await self._execute(self._written(write))

    async def transaction(self, writes: Sequence[Write], *, commit: bool) -> None:
        async with self._connection.transaction(force_rollback=not commit):
            for write in writes:
                await self._execute(self._written(write))

    def _written(self, write: Write) -> Statement:
        name = self._tables.get(write.collection, write.collection)
        return self._schema.write(msgspec.structs.replace(write, collection=name))

    async def _execute(self, statement: Statement) -> None:
        await self._connection.execute(*statement)

    async def alter_collection(self, name: str, patch: Mapping[str, Any]) -> None:
        unknown = patch.keys() - {"name", *RULES}
        if unknown:
            raise UnsupportedStepError(f"a configuration has no {', '.join(sorted(unknown))}")
        settings = self._settings()
        changed = settings["collections"].pop(name)
        changed |= {RULES[key]: rule for key, rule in patch.items() if key in RULES}
        new_name = patch.get("name", name)
        settings["collections"][new_name] = changed
        self._tables[new_name] = self._tables.get(name, name)
        await self._reload(settings)
        if "authRule" in patch:  # PocketBase draws a new secret by itself then
            await self.reset_token_secret(name)

    async def drop_collection(self, name: str) -> None:
        settings = self._settings()
        del settings["collections"][name]
        await self._reload(settings)

    async def reset_token_secret(self, name: str) -> None:
        settings = self._settings()
        secret = self._issuers[name] = secrets.token_hex(32)
        for issuer in settings["auth"]["issuers"]:
            if issuer["name"] == name:
                issuer["secret"] = secret
        if self._setting.login_through_api:
            settings["auth"]["login"]["secret"] = secrets.token_hex(25)
        await self._reload(settings)

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load(self._config.read_text())
        return settings

    async def _reload(self, settings: Mapping[str, Any]) -> None:
        """Put another configuration into force without a restart."""
        self._config.write_text(yaml.safe_dump(settings, sort_keys=False))
        for process in self._processes:
            if not await process.reload():
                raise RefusedError(f"the configuration is refused:\n{self.output}")


@asynccontextmanager
async def running(
    fixtures: Fixtures,
    collections: Collection[str],
    *,
    database_url: str,
    directory: Path,
    style: Style,
    setting: Setting,
) -> AsyncIterator[PgRealtimeServer]:
    """Start a server with an empty database that is filled first.

    Args:
        fixtures: Contents of the database.
        collections: The names of those that are configured; the others are ordinary tables.
        database_url: An empty database.
        directory: Receives the configuration and the output.
        style: Options of the tables.
        setting: Differences from the default.
    """
    schema = NaturalSchema(fixtures, style)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        async with connection.transaction():
            for statement, parameters in schema.create():
                await connection.execute(statement, parameters)
        owners = [c.name for c in fixtures.collections if c.type == "auth"]
        issuers = {name: secrets.token_hex(32) for name in (*owners, SUPERUSERS)}
        count = 2 if setting.calls_elsewhere else 1
        processes = [Address(host="127.0.0.1", port=free_port()) for _ in range(count)]
        settings = {
            "version": 1,
            "database": {"url": database_url},
            "server": {"host": "127.0.0.1"},
            "cluster": {
                "bus": "postgres" if setting.calls_elsewhere else "none",
                "secret": secrets.token_hex(25),
            },
            "realtime": _limits(setting),
            "records": {"nulls": "zero", "hidden": "pocketbase"},
            "auth": {
                "issuers": [_issuer(name, secret) for name, secret in issuers.items()],
                "login": {"enabled": True, "secret": secrets.token_hex(25)},
            },
            "collections": {name: _collection(name, fixtures) for name in collections},
        }
        config = directory / "pgrealtime.yaml"
        config.write_text(yaml.safe_dump(settings, sort_keys=False))
        async with AsyncExitStack() as stack:
            address = processes[0]
            if setting.calls_elsewhere:
                address = await stack.enter_async_context(balancer(apart(*processes)))
            server = PgRealtimeServer(
                fixtures=fixtures,
                schema=schema,
                connection=connection,
                config=config,
                address=address,
                processes=processes,
                issuers=issuers,
                setting=setting,
            )
            stack.push_async_callback(server.stop)
            await server.start()
            yield server


def touched(text: str, fixtures: Fixtures) -> list[str]:
    """Return the collections that a text names or that those reference, in the fixtures' order.

    Accounts are named as well, so that each user that logs in has a row.
    """
    words = set(re.findall(r"\w+", text))
    words |= {fixtures.accounts[word].collection for word in words & fixtures.accounts.keys()}
    wanted = {c.name for c in fixtures.collections if {c.name, c.id} & words}
    while True:
        targets = {
            fixtures.collection(field.collection_id).name
            for name in wanted
            for field in fixtures.collection(name).fields
            if field.type == "relation"
        }
        if targets <= wanted:
            return [c.name for c in fixtures.collections if c.name in wanted]
        wanted |= targets


def _limits(setting: Setting) -> dict[str, Any]:
    return {
        "idle_timeout": f"{IDLE_SECONDS * setting.time_scale * 1000:.0f}ms",
        "max_lifetime": f"{LIFE_SECONDS * setting.time_scale * 1000:.0f}ms",
        "heartbeat": setting.heartbeat,
    }


def _issuer(collection: str, secret: str) -> dict[str, Any]:
    issuer: dict[str, Any] = {
        "name": collection,
        "algorithms": ["HS256"],
        "secret": secret,
        "id_claim": "id",
        "collection": collection,
    }
    if collection == SUPERUSERS:
        issuer["superuser_when"] = {"role": SUPERUSER_ROLE}
    return issuer


def _collection(name: str, fixtures: Fixtures) -> dict[str, Any]:
    collection = fixtures.collection(name)
    fields = fields_of(collection)
    settings: dict[str, Any] = {
        "table": f"public.{collection.name}",
        "type": collection.type,
        "collection_id": collection.id,
        "list_rule": collection.list_rule,
        "view_rule": collection.view_rule,
        "fields": {
            "hide": [field.name for field in fields if field.hidden],
            "types": {field.name: "file" for field in fields if field.type == "file"},
        },
        # Foreign keys define the single relations; nothing in a schema defines a list of ids.
        "relations": {
            field.name: {"collection": fixtures.collection(field.collection_id).name}
            for field in fields
            if field.type == "relation" and field.is_multiple
        },
    }
    if collection.type == "auth":
        settings["login"] = {"password_hash": "password_hash", "token_key": "token_key"}
    if "manage_rule" in CollectionConfig.model_fields and collection.manage_rule is not None:
        settings["manage_rule"] = collection.manage_rule
    return settings
