"""Tokens of an issuer that publishes its keys, checked by the running program.

Guests aren't allowed here, so that the status of a subscribe call shows whether a token was
accepted.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from tests.conformance.process import free_port
from tests.e2e.listener import listener
from tests.e2e.service import service

KEYS = {name: Ed25519PrivateKey.generate() for name in ("old", "new", "next")}
UNKNOWN = 20
"""Tokens with a ``kid`` that was never published."""


def token(kid: str, user: str = "ann", key: str = "") -> str:
    claims = {"sub": user, "exp": time.time() + 3600}
    return jwt.encode(claims, KEYS[key or kid], algorithm="EdDSA", headers={"kid": kid})


class KeyServer:
    """Publishes key sets by path, counts the requests for each, and can be unavailable."""

    def __init__(self) -> None:
        self.sets: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        self.port = free_port()
        self._runner: web.AppRunner | None = None

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/{name}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.asked[name] += 1
        return web.json_response({"keys": [_public(kid) for kid in self.sets[name]]})


def _public(kid: str) -> dict[str, Any]:
    key: dict[str, Any] = json.loads(OKPAlgorithm.to_jwk(KEYS[kid].public_key()))
    return {**key, "kid": kid}


@asynccontextmanager
async def key_server() -> AsyncIterator[KeyServer]:
    server = KeyServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def auth(server: KeyServer) -> dict[str, Any]:
    issuer = {"name": "idp", "jwks_url": server.url("idp"), "collection": "users"}
    return {"auth": {"allow_guests": False, "issuers": [issuer]}}


async def test_a_rotated_key_is_fetched_once_however_many_ask(
    database_url: str, tmp_path: Path
) -> None:
    """A new key's tokens are accepted; an unknown key is fetched once, not for every token."""
    async with key_server() as keys:
        keys.sets["idp"] = ["old"]
        async with service(database_url, tmp_path, sections=auth(keys)) as running:
            said = await running.process.wait_logged("jwks.refreshed")
            async with listener(running.address, "posts/*", token=token("old")) as ann:
                await running.write.execute(
                    "INSERT INTO posts (id, title, author) VALUES ('p', 't', 'ann')"
                )
                (received,) = await ann.take(1)
                forged = await ann.subscribe("posts/*", token=token("old", key="new"))
                before = keys.asked["idp"]

                keys.sets["idp"] = ["new"]
                rotated = await ann.subscribe("posts/*", token=token("new"))
                withdrawn = await ann.subscribe("posts/*", token=token("old"))
                strangers = [
                    await ann.subscribe("posts/*", token=token(f"no-{n}", key="new"))
                    for n in range(UNKNOWN)
                ]

    assert (said["issuer"], said["keys"]) == ("idp", 1)
    assert received.data["record"]["id"] == "p"
    assert (forged, rotated, withdrawn) == (401, 204, 401)
    assert strangers == [401] * UNKNOWN
    assert (before, keys.asked["idp"]) == (1, 2)


async def test_an_issuer_that_is_away_leaves_its_keys_in_force(
    database_url: str, tmp_path: Path
) -> None:
    """The log reports it with the number of keys kept; an outage signs no user out."""
    async with key_server() as keys:
        keys.sets["idp"] = ["old"]
        async with service(database_url, tmp_path, sections=auth(keys)) as running:
            await running.process.wait_logged("jwks.refreshed")
            async with listener(running.address) as ann:
                await keys.stop()
                unknown = await ann.subscribe("posts/*", token=token("next"))
                failed = await running.process.wait_logged("jwks.failed")
                known = await ann.subscribe("posts/*", token=token("old"))

    assert (unknown, known) == (401, 204)
    assert (failed["issuer"], failed["kept"], failed["level"]) == ("idp", 1, "warning")


async def test_an_issuer_that_is_away_at_the_start_is_asked_again(
    database_url: str, tmp_path: Path
) -> None:
    """The program starts without its keys; the first token after the outage is accepted."""
    async with key_server() as keys:
        keys.sets["idp"] = ["old"]
        await keys.stop()
        async with service(database_url, tmp_path, sections=auth(keys)) as running:
            failed = await running.process.wait_logged("jwks.failed")
            await keys.start()
            async with listener(running.address, "posts/*", token=token("old")):
                pass

    assert failed["kept"] == 0
