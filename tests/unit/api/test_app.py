"""Every route over HTTP: the recordings that need no database, and cases that none of them has."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import structlog

from tests.conformance.fixtures import Account, load_fixtures
from tests.conformance.http_client import Address, Answer, EventStream, Request, send
from tests.conformance.replay import Replay
from tests.conformance.transcript import (
    Conversation,
    Exchange,
    Expect,
    ExpectSilence,
    Login,
    SseClose,
    SseOpen,
    Wait,
    Write,
    load_conversation,
)
from tests.realtime import open_stream
from tests.unit.api.served import SUPERUSER, Served, served, token
from tests.unit.hub.harness import DEADLINE, insert

RECORDINGS = Path(__file__).parents[2] / "transcripts"
FIXTURES = RECORDINGS / "fixtures.json"
STEPS_WITHOUT_WRITES = (Login, SseOpen, SseClose, Exchange, Expect, ExpectSilence, Wait)
TESTED_ELSEWHERE = ("auth_", "idle_timeout")
"""Recordings replayed by other tests: those of the login endpoints, and one that takes five
minutes."""


def recordings_without_writes() -> list[Conversation]:
    """Return the recordings in which nothing is written."""
    paths = sorted(path for path in RECORDINGS.glob("*.json") if path != FIXTURES)
    conversations = [load_conversation(p) for p in paths if not p.name.startswith(TESTED_ELSEWHERE)]
    return [
        c for c in conversations if all(isinstance(step, STEPS_WITHOUT_WRITES) for step in c.steps)
    ]


class WithoutDatabase:
    """The target of such a recording: every account can log in, and nothing can be written."""

    def __init__(self, service: Served) -> None:
        self._service = service

    @property
    def address(self) -> Address:
        return self._service.address

    async def login(self, account: Account, lifetime_seconds: float | None) -> str:
        assert lifetime_seconds is None
        if account.collection == "_superusers":
            return SUPERUSER
        return token(account.identity)

    async def write(self, write: Write) -> NoReturn:
        raise AssertionError(write)

    async def transaction(self, writes: Sequence[Write], *, commit: bool) -> NoReturn:
        raise AssertionError(writes, commit)

    async def alter_collection(self, name: str, patch: Mapping[str, Any]) -> NoReturn:
        raise AssertionError(name, patch)

    async def drop_collection(self, name: str) -> NoReturn:
        raise AssertionError(name)

    async def reset_token_secret(self, name: str) -> NoReturn:
        raise AssertionError(name)

    async def restart(self) -> NoReturn:
        raise AssertionError


@pytest.mark.parametrize(
    "conversation", [pytest.param(c, id=c.name) for c in recordings_without_writes()]
)
async def test_recording_that_writes_nothing_is_met(conversation: Conversation) -> None:
    """The service gives the recorded answers."""
    async with served() as service:
        accounts = load_fixtures(FIXTURES).accounts
        await Replay(conversation, accounts, WithoutDatabase(service)).run()


def test_recordings_were_found() -> None:
    """A parametrized test without cases would pass."""
    assert {"connect_basic", "cors_preflight", "subscribe_malformed_body", "ip_mismatch"} <= {
        conversation.name for conversation in recordings_without_writes()
    }


async def send_request(
    service: Served, method: str, path: str, body: str = "", **headers: str
) -> tuple[int, Answer]:
    """Send a request; return status and answer.

    Underscores in header names are replaced by hyphens.
    """
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(method=method, path=path, headers=named, body=body.encode())
    async with asyncio.timeout(DEADLINE):
        answer = await send(request, service.address)
    return answer.head.status, answer


def call(client_id: str, *topics: str) -> str:
    """Return the JSON body of a subscribe call."""
    return json.dumps({"clientId": client_id, "subscriptions": topics})


async def test_accepted_call_has_neither_body_nor_content_type() -> None:
    """Status 204 alone (protocol, 3.4), and the topics are in force."""
    async with served() as service:
        stream, client_id = await open_stream(service.address)
        _, answer = await send_request(
            service,
            "POST",
            "/api/realtime",
            call(client_id, "posts/*"),
            Content_Type="application/json",
        )
        service.harness.commit(insert("a"))
        (message,) = await stream.take(1, DEADLINE)
        await stream.close()

    assert (answer.head.status, answer.body, answer.surplus) == (204, b"", b"")
    assert answer.head.header("content-type") is None
    assert answer.head.header("content-length") is None
    assert message.startswith(f"id:{client_id}\nevent:posts/*\n".encode())


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/", "File not found."),
        ("GET", "/api/realtime/", "File not found."),
        ("HEAD", "/api/nosuch", ""),
        ("GET", "/API/realtime", "File not found."),
        ("POST", "/api/health", "The requested resource wasn't found."),
        ("DELETE", "/api/health", "The requested resource wasn't found."),
        ("POST", "/api/nosuch", "The requested resource wasn't found."),
        ("TRACE", "/api/realtime", "The requested resource wasn't found."),
    ],
)
async def test_what_isn_t_routed_is_not_found(method: str, path: str, message: str) -> None:
    """Status 404 for a wrong method as well, without the header Allow (protocol, 1.6)."""
    async with served() as service:
        status, answer = await send_request(service, method, path)

    assert status == 404
    assert answer.head.header("allow") is None
    assert json.loads(answer.body or '{"message":""}')["message"] == message


@pytest.mark.parametrize(
    ("locale", "accepted", "message"),
    [
        ("auto", "zh-CN,zh;q=0.9", "缺少或无效的客户端 ID。"),
        ("auto", "en", "Missing or invalid client id."),
        ("zh", "en", "缺少或无效的客户端 ID。"),
        ("en", "zh", "Missing or invalid client id."),
    ],
)
async def test_language_is_the_client_s_or_the_configured(
    locale: str, accepted: str, message: str
) -> None:
    """With ``locale: auto`` the request's Accept-Language decides."""
    async with served({"locale": locale}) as service:
        _, answer = await send_request(
            service,
            "POST",
            "/api/realtime",
            call("nope"),
            Content_Type="application/json",
            Accept_Language=accepted,
        )

    assert answer.body.decode() == f'{{"data":{{}},"message":"{message}","status":404}}'


async def test_base_path_is_before_every_route() -> None:
    """Paths without it aren't found."""
    async with served({"base_path": "/a/b"}) as service:
        inside, _ = await send_request(service, "GET", "/a/b/api/health")
        outside, _ = await send_request(service, "GET", "/api/health")
        refused, _ = await send_request(service, "POST", "/a/b/api/realtime")

    assert (inside, outside, refused) == (200, 404, 400)


async def test_configured_origin_is_let_in_and_no_other() -> None:
    """Another origin's answer has no CORS header, so a browser withholds it from the page."""
    async with served({"cors_origins": ["https://app.example"]}) as service:
        _, known = await send_request(service, "GET", "/api/health", Origin="https://app.example")
        _, unknown = await send_request(
            service, "GET", "/api/health", Origin="https://evil.example"
        )
        _, preflight = await send_request(
            service, "OPTIONS", "/api/health", Origin="https://evil.example"
        )

    assert known.head.header("access-control-allow-origin") == "https://app.example"
    assert unknown.head.header("access-control-allow-origin") is None
    assert unknown.body == known.body
    assert preflight.head.header("vary") == "Origin"
    assert preflight.head.header("access-control-allow-methods") is None


async def test_trusted_proxy_decides_the_address_of_a_stream() -> None:
    """Behind a trusted proxy X-Forwarded-For has the address that a stream is bound to."""
    async with served({"trusted_proxies": ["127.0.0.0/8"]}) as service:
        stream = await EventStream.open(
            Request(method="GET", path="/api/realtime", headers={"X-Forwarded-For": "203.0.113.7"}),
            service.address,
            "A",
        )
        (connection,) = service.harness.hub.connections
        body = call(connection.id)
        other, _ = await send_request(
            service,
            "POST",
            "/api/realtime",
            body,
            Content_Type="application/json",
            X_Forwarded_For="203.0.113.8",
        )
        same, _ = await send_request(
            service,
            "POST",
            "/api/realtime",
            body,
            Content_Type="application/json",
            X_Forwarded_For="203.0.113.7",
        )
        await stream.close()

    assert (other, same) == (400, 204)


async def test_call_while_the_stream_is_down_is_refused_at_once() -> None:
    """Status 503 without a wait, which the JS SDK can't bear (resume page, section 4)."""
    async with served() as service:
        stream, client_id = await open_stream(service.address)
        service.harness.hub.stream_lost()
        status, answer = await send_request(
            service,
            "POST",
            "/api/realtime",
            call(client_id, "posts/*"),
            Content_Type="application/json",
        )
        await stream.close()

    assert status == 503
    assert json.loads(answer.body)["message"] == "Realtime is temporarily unavailable."


async def test_superuser_learns_more_of_health() -> None:
    """Only a superuser sees addresses and proxy headers (protocol, 9.4)."""
    async with served({"trusted_proxies": ["127.0.0.1/32"]}) as service:
        _, answer = await send_request(
            service, "GET", "/api/health", Authorization=SUPERUSER, X_Forwarded_For="203.0.113.7"
        )
        _, user = await send_request(service, "GET", "/api/health", Authorization=token("ann"))

    assert json.loads(answer.body)["data"] == {
        "canBackup": True,
        "realIP": "203.0.113.7",
        "possibleProxyHeader": "X-Forwarded-For",
    }
    assert user.body == b'{"message":"API is healthy.","code":200,"data":{}}'


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ("code", {"code": 200}),
        ("code,data", {"code": 200, "data": {}}),
        ("nosuch", {}),
        ("message:excerpt(3,true)", {"message": "API..."}),
    ],
)
async def test_fields_trim_the_answer(fields: str, body: dict[str, object]) -> None:
    """The parameter ``fields`` of protocol, 1.5, applies to health as well."""
    async with served() as service:
        _, answer = await send_request(service, "GET", f"/api/health?fields={fields}")

    assert json.loads(answer.body) == body


async def test_fields_that_can_t_be_read_are_refused() -> None:
    """As PocketBase 0.40.6 refuses them."""
    async with served() as service:
        status, answer = await send_request(service, "GET", "/api/health?fields=a(b")

    assert status == 400
    assert answer.head.header("content-type") == "application/json"


async def test_chunked_body_is_a_body_and_an_empty_one_broken_json() -> None:
    """Only a declared length of 0 is no body (protocol, 3.1)."""
    async with served() as service:
        stream, client_id = await open_stream(service.address)
        chunked = {"Content_Type": "application/json", "Transfer_Encoding": "chunked"}
        accepted, _ = await send_request(
            service, "POST", "/api/realtime", call(client_id), **chunked
        )
        _, empty = await send_request(service, "POST", "/api/realtime", "", **chunked)
        await stream.close()

    assert accepted == 204
    assert json.loads(empty.body)["data"] == {}


async def test_body_stays_as_it_was_sent() -> None:
    """As in PocketBase, Content-Encoding is ignored: a small body can't become a large one."""
    async with served() as service:
        _, answer = await send_request(
            service,
            "POST",
            "/api/realtime",
            "{}",
            Content_Type="application/json",
            Content_Encoding="gzip",
        )

    assert "clientId" in json.loads(answer.body)["data"]


async def test_large_body_is_waited_for_only_if_it_will_be_read() -> None:
    """A body declared as too large is refused without ``100 Continue``."""
    head = (
        "POST /api/realtime HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Expect: 100-continue\r\nConnection: close\r\nContent-Length: {}\r\n\r\n"
    )
    async with served() as service:
        refused = await service.answer_to(head.format(32 * 1024 * 1024 + 1).encode())
        asked = await service.answer_to((head.format(2) + "{}").encode())

    assert refused.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in refused
    assert refused.endswith(b'{"data":{},"message":"Request entity too large.","status":413}')
    assert asked.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 ")


async def test_body_of_the_largest_size_is_read() -> None:
    """32 MiB is accepted."""
    async with served() as service:
        stream, client_id = await open_stream(service.address)
        body = call(client_id, "posts/*")
        padded = body + " " * (32 * 1024 * 1024 - len(body))
        status, _ = await send_request(
            service, "POST", "/api/realtime", padded, Content_Type="application/json"
        )
        await stream.close()

    assert status == 204


async def test_undeclared_body_is_cut_at_the_same_size() -> None:
    """A chunked body is refused once it exceeds the limit."""
    async with served() as service:
        reader, writer = await service.raw(
            b"POST /api/realtime HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        async with asyncio.timeout(DEADLINE):
            for _ in range(33):
                writer.write(chunk)
                await writer.drain()
            answer = await reader.readuntil(b"\r\n")
        writer.close()

    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_call_whose_client_leaves_changes_nothing_for_others() -> None:
    """The SDK aborts the older of two calls; the stream keeps its topics."""
    async with served() as service:
        stream, client_id = await open_stream(service.address)
        await send_request(
            service,
            "POST",
            "/api/realtime",
            call(client_id, "posts/*"),
            Content_Type="application/json",
        )
        service.harness.database.gate = asyncio.Event()
        body = call(client_id, "posts/*", "notes/*").encode()
        _, writer = await service.raw(
            b"POST /api/realtime HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await service.harness.database.wait_for_snapshot_queries(1)
        writer.transport.abort()
        service.harness.database.gate.set()
        service.harness.database.gate = None
        status, _ = await send_request(
            service,
            "POST",
            "/api/realtime",
            call(client_id, "posts/*"),
            Content_Type="application/json",
        )
        service.harness.commit(insert("a"))
        (message,) = await stream.take(1, DEADLINE)
        await stream.close()

    assert status == 204
    assert b'"id":"a"' in message


async def test_accepted_calls_are_answered_alike_on_connections_that_stay_and_that_end() -> None:
    """The head of the first is written as one text, of the second by aiohttp."""
    async with served({"cors_origins": ["https://*.example"]}) as service:
        stream, client_id = await open_stream(service.address)
        body = call(client_id, "posts/*").encode()
        head = (
            "POST /api/realtime HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        ).encode()
        kept, ended = head + b"\r\n" + body, head + b"Connection: close\r\n\r\n" + body
        answers = await service.answer_to(kept + kept + ended)
        await stream.close()

    first, second, last, rest = answers.split(b"\r\n\r\n")
    dated = re.compile(rb"Date: [^\r]{29}")
    plain = [dated.sub(b"Date", one) for one in (first, second, last)]
    assert b"\r\nConnection: close" in plain[2]
    assert plain[0] == plain[1] == plain[2].replace(b"\r\nConnection: close", b"")
    assert b"\r\nAccess-Control-Allow-Origin: https://app.example" in first
    assert (dated.search(first) is not None, rest) == (True, b"")


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
async def test_offer_of_another_protocol_is_passed_over(protocol: str) -> None:
    """Java's client offers HTTP/2 with every call; the body still belongs to the call."""
    async with served() as service:
        stream, client_id = await open_stream(service.address)
        status, _ = await send_request(
            service,
            "POST",
            "/api/realtime",
            call(client_id, "posts/*"),
            Content_Type="application/json",
            Connection="Upgrade, HTTP2-Settings, close",
            Upgrade=protocol,
            HTTP2_Settings="AAMAAABkAARAAAAAAAIAAAAA",
        )
        await stream.close()

    assert status == 204


async def test_internal_error_exposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer has the API's form; the reason is in the log only."""

    async def fail(*_: object) -> NoReturn:
        raise ZeroDivisionError("secret")

    async with served() as service:
        monkeypatch.setattr(service.harness.hub, "subscribe", fail)
        with structlog.testing.capture_logs() as events:
            status, answer = await send_request(
                service, "POST", "/api/realtime", call("c"), Content_Type="application/json"
            )

    assert status == 500
    assert answer.body == (
        b'{"data":{},"message":"Something went wrong while processing your request.","status":500}'
    )
    assert [(e["event"], e["log_level"]) for e in events] == [("request.failed", "error")]


async def test_failure_behind_a_head_cuts_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second head inside of the body would be parsed as an event."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError

    async with served() as service:
        monkeypatch.setattr(service.harness.hub, "open_connection", fail)
        with structlog.testing.capture_logs():
            answer = await service.answer_to(b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n")

    assert answer.count(b"HTTP/1.1") <= 1
    assert not answer.endswith(b"0\r\n\r\n")
