"""Subscribe calls that arrive at another service than the one that has the connection."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import structlog

from pgrealtime.bus.base import Answerer, draw_tag
from pgrealtime.bus.calls import CallAnswer, SubscribeCall, decode, encode
from pgrealtime.errors import HolderGoneError, HolderSilentError
from tests.balancer import apart, balancer
from tests.conformance.fixtures import load_fixtures
from tests.conformance.http_client import Address, Answer, Request, send
from tests.conformance.replay import Replay
from tests.conformance.transcript import Conversation
from tests.realtime import open_stream
from tests.unit.api.served import Served, served, token
from tests.unit.api.test_app import FIXTURES, WithoutDatabase, recordings_without_writes
from tests.unit.hub.harness import DEADLINE, insert

Peers = dict[str, Answerer]


class LocalBus:
    """A bus between services of one process."""

    def __init__(self, peers: Peers) -> None:
        self.tag = draw_tag()
        self.peers = peers
        self.is_silent = False
        self.ignored: Mapping[str, int] = {}
        self.requests: list[SubscribeCall] = []

    def serve(self, answer: Answerer) -> None:
        self.peers[self.tag] = answer

    async def call(self, tag: str, request: bytes) -> bytes:
        self.requests.append(decode(request, SubscribeCall))
        if self.is_silent:
            raise HolderSilentError("no answer")
        if tag not in self.peers:
            raise HolderGoneError(tag)
        return await self.peers[tag](request)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two services; ``holder`` has the stream of ``client_id``."""

    holder: Served
    other: Served
    client_id: str
    bus: LocalBus
    """The other's."""

    async def post(self, at: Served, client_id: str = "", **more: Any) -> Answer:
        return await post(at.address, client_id or self.client_id, **more)


async def post(
    address: Address,
    client_id: str,
    *topics: str,
    headers: Mapping[str, str] | None = None,
    source_ip: str | None = None,
) -> Answer:
    body = json.dumps({"clientId": client_id, "subscriptions": topics}).encode()
    request = Request(
        method="POST",
        path="/api/realtime",
        headers={"Content-Type": "application/json"} | dict(headers or {}),
        body=body,
        source_ip=source_ip,
    )
    return await send(request, address)


@asynccontextmanager
async def pair(**settings: Any) -> AsyncIterator[Pair]:
    peers: Peers = {}
    own, other = LocalBus(peers), LocalBus(peers)
    async with served(bus=own, **settings) as first, served(bus=other, **settings) as second:
        stream, client_id = await open_stream(first.address)
        yield Pair(first, second, client_id, other)
        await stream.close()


def message_of(answer: Answer) -> tuple[int, str]:
    return answer.head.status, json.loads(answer.body)["message"]


@pytest.mark.parametrize(
    "conversation", [pytest.param(c, id=c.name) for c in recordings_without_writes()]
)
async def test_recording_is_met_with_every_call_at_the_other_service(
    conversation: Conversation,
) -> None:
    """A client can't tell which of them answers it."""
    peers: Peers = {}
    async with (
        served(bus=LocalBus(peers)) as holder,
        served(bus=LocalBus(peers)) as other,
        balancer(apart(holder.address, other.address)) as front,
    ):
        target = WithoutDatabase(Served(holder.harness, front))
        await Replay(conversation, load_fixtures(FIXTURES).accounts, target).run()


async def test_call_takes_effect_where_the_connection_is() -> None:
    peers: Peers = {}
    async with (
        served(bus=LocalBus(peers)) as holder,
        served(bus=LocalBus(peers)) as other,
    ):
        stream, client_id = await open_stream(holder.address)
        answer = await post(other.address, client_id, "posts/*")
        holder.harness.commit(insert("a"))
        (message,) = await stream.take(1, DEADLINE)
        await stream.close()

    assert (answer.head.status, answer.body) == (204, b"")
    assert answer.head.header("x-pgrealtime-outcome") is None
    assert message.startswith(f"id:{client_id}\nevent:posts/*\n".encode())


async def test_id_names_the_process_that_made_it() -> None:
    """A call for one's own connection asks nobody, nor does an id that no process makes."""
    async with pair() as two:
        own = await two.post(two.holder)
        odd = [await post(two.other.address, text) for text in ("x", two.client_id[:-1], "../..")]
        forwarded = list(two.bus.requests)

    assert two.client_id.startswith(next(iter(two.bus.peers)))
    assert own.head.status == 204
    assert [answer.head.status for answer in odd] == [404, 404, 404]
    assert forwarded == []


async def test_the_address_is_the_one_that_the_first_service_saw() -> None:
    async with pair() as two:
        stranger = await two.post(two.other, source_ip="127.0.0.2")
        same = await two.post(two.other)
        addresses = [call.address for call in two.bus.requests]

    assert message_of(stranger) == (400, "Invalid realtime client.")
    assert same.head.status == 204
    assert addresses == ["127.0.0.2", "127.0.0.1"]


async def test_the_caller_is_the_holder_s_to_judge() -> None:
    async with pair() as two:
        ann = await two.post(two.other, headers={"Authorization": token("ann")})
        bob = await two.post(two.other, headers={"Authorization": token("bob")})
        body = json.dumps({"clientId": two.client_id}).encode()
        binary = await two.other.answer_to(
            b"POST /api/realtime HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nAuthorization: \xff\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )

    assert ann.head.status == 204
    mismatch = "The current and the previous request authorization don't match."
    assert message_of(bob) == (403, mismatch)
    assert binary.startswith(b"HTTP/1.1 403 ")


async def test_guests_are_refused_in_the_same_order_everywhere() -> None:
    """An unknown id doesn't keep a guest from being told that it needs a token."""
    async with pair(auth={"allow_guests": False}) as two:
        nobody = draw_tag() + "x" * 34
        found = [
            (await two.post(at, client_id)).head.status
            for at in (two.holder, two.other)
            for client_id in (two.client_id, nobody)
        ]
        known = await two.post(two.other, nobody, headers={"Authorization": token("ann")})

    assert found == [401] * 4
    assert message_of(known) == (404, "Missing or invalid client id.")


async def test_errors_are_in_the_caller_s_language() -> None:
    async with pair() as two:
        await two.post(two.other, headers={"Authorization": token("ann")})
        answer = await two.post(two.other, headers={"Accept-Language": "zh-CN,zh"})

    assert message_of(answer) == (403, "当前请求和之前的请求授权不匹配。")


async def test_outcome_and_limits_are_as_if_it_had_come_directly() -> None:
    topics = ["posts/*", "nothing/*"]
    greedy = [f'posts/*?options={{"query":{{"fields":"id,f{n}"}}}}' for n in range(101)]
    asks = {"X-Pgrealtime-Outcome": ""}
    async with pair() as two:
        answers = [
            (answer.head.status, answer.head.header("x-pgrealtime-outcome"), answer.body)
            for at in (two.holder, two.other)
            for answer in (
                await post(at.address, two.client_id, *topics, headers=asks),
                await post(at.address, two.client_id, "", *greedy, headers=asks),
            )
        ]

    assert answers[:2] == answers[2:]
    assert answers[0] == (204, "caller=guest; mute=1", b"")
    assert answers[1][:2] == (400, None)
    assert list(json.loads(answers[1][2])["data"]["subscriptions"]) == ["101"]


async def test_a_holder_that_is_gone_is_404_and_a_silent_one_503() -> None:
    """SDKs reconnect after the one, and try again after the other."""
    with structlog.testing.capture_logs() as logged:
        async with pair() as two:
            two.bus.is_silent = True
            silent = await two.post(two.other)
            await two.post(two.other)
            two.bus.is_silent = False
            del two.bus.peers[two.client_id[:6]]
            gone = await two.post(two.other)

    assert message_of(silent) == (503, "Realtime is temporarily unavailable.")
    assert message_of(gone) == (404, "Missing or invalid client id.")
    warnings = [entry for entry in logged if entry["event"] == "call.unanswered"]
    assert [(entry["code"], entry["holder"]) for entry in warnings] == [
        ("holder_silent", two.client_id[:6])
    ]


async def test_an_interrupted_stream_is_the_holder_s() -> None:
    async with pair() as two:
        two.other.harness.hub.stream_lost()
        accepted = await two.post(two.other)
        two.holder.harness.hub.stream_lost()
        refused = await two.post(two.other)

    assert accepted.head.status == 204
    assert message_of(refused) == (503, "Realtime is temporarily unavailable.")


async def test_a_request_that_isn_t_one_is_answered_with_an_error() -> None:
    """Another version, or a defect, must not leave the caller without an answer."""
    async with pair() as two:
        answerer = two.bus.peers[two.client_id[:6]]
        garbage = decode(await answerer(b"\xc1"), CallAnswer)
        foreign = SubscribeCall(client_id=two.bus.tag + "x" * 34, address="::1")
        misled = decode(await answerer(encode(foreign)), CallAnswer)

        async def broken(_request: bytes) -> bytes:
            return b"\xc1"

        two.bus.peers[two.client_id[:6]] = broken
        answer = await two.post(two.other)

    assert garbage == CallAnswer(error_code="call_unreadable")
    assert misled == CallAnswer(error_code="client_unknown")
    assert answer.head.status == 500
