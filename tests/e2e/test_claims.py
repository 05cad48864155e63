"""Rules read claims of an issuer's tokens as fields of the caller, in realtime and in lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.service import SECRET, Service, service, token

RULES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "text": ("note = @request.auth.tenant", {"org_id": "acme"}, {"org_id": "other"}),
    "number": ("n < @request.auth.level", {"app": {"level": 5}}, {"app": {"level": 1}}),
}
CLAIMS = {"tenant": "org_id", "level": "app.level"}


@pytest.mark.parametrize("kind", RULES)
async def test_a_rule_compares_a_claim_by_its_type(
    kind: str, database_url: str, tmp_path: Path
) -> None:
    """Whoever has the claim sees the record and its events, whoever has another does not."""
    rule, admitted, refused = RULES[kind]
    issuer = {"name": "app", "secret": SECRET, "claims": CLAIMS}
    posts = {"table": "posts", "list_rule": rule, "view_rule": rule}
    users = {"table": "users", "type": "auth"}
    async with (
        service(
            database_url,
            tmp_path,
            sections={"auth": {"issuers": [issuer]}},
            collections={"posts": posts, "users": users},
        ) as running,
        aiohttp.ClientSession() as session,
    ):
        seen: dict[str, list[str]] = {}
        for name, claims in (("admitted", admitted), ("refused", refused)):
            stream = await _subscribed(session, running, token("ann", **claims))
            seen[name] = []
            await running.write.execute(
                "INSERT INTO posts (id, title, note, n) VALUES (%s, 'x', 'acme', 3)", [name]
            )
            if name == "admitted":
                seen[name].append(await _next_id(stream))
            async with session.get(
                f"{running.url}/api/collections/posts/records?sort=id",
                headers={"Authorization": token("ann", **claims)},
            ) as response:
                seen[name] += [item["id"] for item in (await response.json())["items"]]
            stream.close()

    assert seen == {"admitted": ["admitted", "admitted"], "refused": []}


async def _subscribed(
    session: aiohttp.ClientSession, running: Service, bearer: str
) -> aiohttp.ClientResponse:
    stream = await session.get(f"{running.url}/api/realtime")
    client_id = (await stream.content.readuntil(b"\n")).decode().strip().removeprefix("id:")
    while (await stream.content.readline()).strip():
        pass
    async with session.post(
        f"{running.url}/api/realtime",
        json={"clientId": client_id, "subscriptions": ["posts/*"]},
        headers={"Authorization": bearer},
    ) as answer:
        assert answer.status == 204
    return stream


async def _next_id(stream: aiohttp.ClientResponse) -> str:
    while True:
        line = await stream.content.readline()
        if line.startswith(b"data:"):
            record_id: str = json.loads(line[5:])["record"]["id"]
            return record_id
