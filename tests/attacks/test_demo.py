"""The demo's page contains every user's token, so only the local machine's page may load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from urllib.parse import urlsplit

import pytest

from tests.conformance.http_client import Address, Answer, Request, send
from tests.e2e.demo import demo

EVIL = "http://evil.example"


async def ask(
    url: str, path: str, headers: Mapping[str, str], body: object = None, method: str = ""
) -> Answer:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    data = b"" if body is None else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    request = Request(method=method, path=path, headers=headers, body=data)
    return await send(request, Address(host=parts.hostname, port=parts.port))


@pytest.mark.timeout(120)
async def test_the_demo_is_for_its_own_page_alone() -> None:
    """Another origin gets no token and no write; neither does a host name that resolves here."""
    async with demo() as running:
        own, port = running.url, urlsplit(running.url).port
        step = {"do": "add", "id": "1"}
        theirs: tuple[Mapping[str, str], ...] = (
            {"Origin": EVIL},
            {"Origin": "null"},
            {"Origin": f"http://127.0.0.1:{(port or 0) + 1}"},
            {"Origin": f"https://127.0.0.1:{port}"},
            {"Origin": f"http://localhost:{port}"},  # another origin for the browser
            {"Host": f"evil.example:{port}"},
            {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
            {"Host": f"127.0.0.1.evil.example:{port}"},
            {"Host": ""},
        )
        for headers in theirs:
            for path, body in (
                ("/", None),
                ("/demo/state", None),
                ("/demo/step", step),
                ("/demo/writer", {"writing": True}),
                ("/api/health", None),
            ):
                for more in ({}, {"Content-Type": "text/plain"}):
                    answer = await ask(own, path, {**headers, **more}, body)
                    assert answer.head.status == 403, (path, headers)
                    assert b"token" not in answer.body
        for preflight in ("/demo/step", "/api/realtime"):
            asked = {"Origin": EVIL, "Access-Control-Request-Method": "POST"}
            answer = await ask(own, preflight, asked, method="OPTIONS")
            assert answer.head.header("access-control-allow-origin") is None
        ours: tuple[Mapping[str, str], ...] = (
            {},
            {"Origin": own},
            {"Host": f"LOCALHOST:{port}"},
            {"Host": "localhost:9000"},
        )
        for one in ours:
            state = await ask(own, "/demo/state", one)
            assert state.head.status == 200
            assert json.loads(state.body)["watcher"]
            assert state.head.header("access-control-allow-origin") is None
        done = await ask(own, "/demo/step", {"Origin": own}, step)
        assert json.loads(done.body)["id"]
