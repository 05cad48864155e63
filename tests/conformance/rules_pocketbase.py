"""The real PocketBase with the rules corpus loaded, which evaluates any rule."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.conformance.fixtures import SuperuserAccount
from tests.conformance.http_client import Request, send
from tests.conformance.pocketbase_server import PocketBaseApi, PocketBaseServer, pocketbase_binary
from tests.conformance.process import free_port, run
from tests.conformance.rules_corpus import CORPUS
from tests.conformance.target import RefusedError

ROOT = SuperuserAccount(email="root@example.com", password="1234567890")

_AUTH_FIELDS = {"email", "emailVisibility", "verified", "tokenKey"}
_ID = {
    "name": "id",
    "type": "text",
    "system": True,
    "primaryKey": True,
    "required": True,
    "pattern": "^[a-z0-9]+$",
    "autogeneratePattern": "[a-z0-9]{15}",
    "min": 0,
    "max": 0,
}


class CorpusPocketBase:
    """Evaluates rules by list requests."""

    def __init__(self, api: PocketBaseApi) -> None:
        self._api = api
        self._rules: dict[str, str | None] = {}
        self._tokens: dict[str, str] = {"guest": "", "superuser": api.token}

    async def show(
        self, collection: str, rule: str | None, auth: str, query: Mapping[str, str]
    ) -> tuple[str, ...] | None:
        """Return the ids that a subscriber sees, none after an error.

        None if the rule is invalid.
        """
        try:
            await self.set_rule(collection, rule)
        except RefusedError:
            return None
        parameters = urlencode({"perPage": 100, "fields": "id", "sort": "id", **query})
        path = f"/api/collections/{collection}/records?{parameters}"
        token = await self._token(auth)
        headers = {"Authorization": token} if token else {}
        answer = await send(Request(method="GET", path=path, headers=headers), self._api.address)
        if answer.head.status != 200:
            return ()
        return tuple(item["id"] for item in json.loads(answer.body)["items"])

    async def set_rule(self, collection: str, rule: str | None) -> None:
        """Make it the collection's list rule.

        Raises:
            RequestRefusedError: PocketBase refuses it.
        """
        if collection not in self._rules or self._rules[collection] != rule:
            path = f"/api/collections/{collection}"
            await self._api.call("PATCH", path, {"listRule": rule})
            self._rules[collection] = rule

    async def _token(self, auth: str) -> str:
        if auth not in self._tokens:
            collection, record_id = auth.split("/")
            self._tokens[auth] = await self._api.impersonate(collection, record_id, 3600)
        return self._tokens[auth]


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[CorpusPocketBase]:
    """A server with the corpus' collections and rows, in an empty directory."""
    data = f"--dir={directory / 'data'}"
    await run([pocketbase_binary(), "superuser", "upsert", ROOT.email, ROOT.password, data])
    server = PocketBaseServer(directory, free_port())
    await server.start()
    try:
        await server.authenticate(ROOT)
        await _load(server.api)
        yield CorpusPocketBase(server.api)
    finally:
        await server.stop()


async def _load(api: PocketBaseApi) -> None:
    schema = json.loads((CORPUS / "schema.json").read_text(encoding="utf-8"))["collections"]
    seed = json.loads((CORPUS / "seed.json").read_text(encoding="utf-8"))
    tables = [one for one in schema if one["kind"] != "view"]
    await api.call("DELETE", "/api/collections/users")
    for with_relations in (False, True):  # a relation needs its target to be there
        described = [_collection(one, with_relations=with_relations) for one in tables]
        body = {"collections": described, "deleteMissing": False}
        await api.call("PUT", "/api/collections/import", body)
    for with_relations in (False, True):
        for table in tables:
            for row in seed.get(table["name"], []):
                await _store(api, table, row, with_relations=with_relations)


def _collection(table: Mapping[str, Any], *, with_relations: bool) -> dict[str, Any]:
    name = table["name"]
    return {
        "id": _id(name),
        "name": name,
        "type": table["kind"],
        "fields": [
            _field(one)
            for one in table["fields"]
            if one["name"] not in _AUTH_FIELDS and (with_relations or one["type"] != "relation")
        ],
        "listRule": "",
        "viewRule": "",
        "indexes": [
            f"CREATE UNIQUE INDEX idx_{name}_{one} ON {name} ({one}) WHERE {one} <> ''"
            for one in table["unique"]
            if with_relations
        ],
    }


def _id(name: str) -> str:
    return f"pbc_{name}".ljust(15, "0")


def _field(described: Mapping[str, Any]) -> dict[str, Any]:
    if described["name"] == "id":
        return _ID
    field = {
        "name": described["name"],
        "type": described["type"],
        "hidden": described.get("hidden", False),
    }
    match described["type"]:
        case "select":
            most = len(described["values"]) if described["multiple"] else 1
            field |= {"values": described["values"], "maxSelect": most}
        case "relation":
            most = 99 if described["multiple"] else 1
            field |= {"collectionId": _id(described["to"]), "maxSelect": most}
        case _:
            pass
    return field


async def _store(
    api: PocketBaseApi, table: Mapping[str, Any], row: Mapping[str, Any], *, with_relations: bool
) -> None:
    """Create the row without its relations, or add them once all rows exist."""
    kinds = {one["name"]: one["type"] for one in table["fields"]}
    body = {
        name: _json_text(value) if kinds[name] == "json" else value
        for name, value in row.items()
        if name != "id" and (kinds[name] == "relation") is with_relations
    }
    path = f"/api/collections/{table['name']}/records"
    if with_relations:
        await api.call("PATCH", f"{path}/{row['id']}", body)
        return
    if table["kind"] == "auth":
        body |= {"password": "12345678", "passwordConfirm": "12345678"}
    await api.call("POST", path, {"id": row["id"], **body})


def _json_text(value: Any) -> str:
    """Return the JSON as PostgreSQL keeps it, so that both have the same containers as texts.

    PocketBase stores a text that is JSON unchanged; values sent as JSON it would reorder.
    """
    return json.dumps(_ordered(value), separators=(",", ":"), ensure_ascii=False)


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: (len(name), name))
        return {name: _ordered(value[name]) for name in names}
    return [_ordered(item) for item in value] if isinstance(value, list) else value
