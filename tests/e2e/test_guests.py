"""``auth.allow_guests: false``: a subscribe call needs a valid token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.conformance.http_client import send
from tests.conformance.pocketbase_server import PocketBaseServer
from tests.conformance.process import free_port
from tests.e2e.listener import DEADLINE, listener
from tests.e2e.service import SECRET, service, token
from tests.realtime import post_json

AUTH: dict[str, Any] = {"issuers": [{"name": "app", "secret": SECRET}]}
GUARDED = """
routerAdd("POST", "/guarded", (e) => e.noContent(204), $apis.requireAuth())
"""
"""A route of the real PocketBase that guests may not use."""


async def test_a_guest_is_refused_and_a_user_is_not(database_url: str, tmp_path: Path) -> None:
    """The stream opens for all; a refused call changes nothing, and a reload can admit guests."""
    sections = {"auth": {**AUTH, "allow_guests": False}}
    async with (
        service(database_url, tmp_path, sections=sections) as running,
        listener(running.address) as client,
    ):
        guest = await client.subscribe("posts/*")
        expired = await client.subscribe("posts/*", token=token("ann", lifetime=-1))
        user = await client.subscribe("posts/*", token=token("ann"))
        late = await client.subscribe(token="")
        await running.write.execute("INSERT INTO posts (id, title, public) VALUES ('p', 't', true)")
        (received,) = await client.take(1)

        settings = yaml.safe_load(running._config.read_text())
        running._config.write_text(yaml.safe_dump({**settings, "auth": AUTH}))
        assert await running.process.reload(), running.process.output()
        async with listener(running.address) as other:
            after = await other.subscribe("posts/*")

    assert (guest, expired, user, late, after) == (401, 401, 204, 401, 204)
    assert received.data["record"]["id"] == "p"


async def test_a_connection_whose_caller_becomes_a_guest_is_ended(
    database_url: str, tmp_path: Path
) -> None:
    """By the delete of its row, or by a reload that admits no guests; its next call is refused."""
    sections = {"auth": {**AUTH, "allow_guests": False}}
    insert = "INSERT INTO posts (id, title, public) VALUES (%s, 't', true)"
    async with service(database_url, tmp_path, sections=sections) as running:
        async with listener(running.address) as ann, listener(running.address) as bob:
            for client, name in ((ann, "ann"), (bob, "bob")):
                assert await client.subscribe("posts/*", token=token(name)) == 204
            await running.write.execute("DELETE FROM users WHERE id = 'ann'")
            assert await ann.stream.wait_end(DEADLINE) is not None
            await running.write.execute(insert, ["p"])
            (received,) = await bob.take(1)
        settings = yaml.safe_load(running._config.read_text())
        running._config.write_text(yaml.safe_dump({**settings, "auth": AUTH}))
        assert await running.process.reload(), running.process.output()
        async with listener(running.address, "posts/*") as guest:
            running._config.write_text(yaml.safe_dump(settings))
            assert await running.process.reload(), running.process.output()
            assert await guest.stream.wait_end(DEADLINE) is not None
    assert received.data["record"]["id"] == "p"


async def test_a_guest_is_refused_in_pocketbase_s_words(database_url: str, tmp_path: Path) -> None:
    """The answer is that of a route with ``requireAuth``, to the byte."""
    (tmp_path / "original" / "hooks").mkdir(parents=True)
    (tmp_path / "original" / "hooks" / "guarded.pb.js").write_text(GUARDED)
    original = PocketBaseServer(tmp_path / "original", free_port())
    await original.start()
    try:
        theirs = await send(post_json("/guarded", b"{}"), original.address)
    finally:
        await original.stop()
    sections = {"auth": {**AUTH, "allow_guests": False}}
    async with service(database_url, tmp_path, sections=sections) as running:
        body = b'{"clientId":"anything"}'
        answer = await send(post_json("/api/realtime", body), running.address)

    assert (theirs.head.status, theirs.body) == (answer.head.status, answer.body)
    assert answer.head.status == 401
