"""Generated requests to the real PocketBase and to our HTTP surface: the answers are the same."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pgrealtime.protocol.topic import parse_topic
from tests.conformance.http_client import Address, Request, send
from tests.conformance.pocketbase_server import PocketBaseServer
from tests.conformance.process import free_port
from tests.realtime import open_stream
from tests.unit.api.served import served
from tests.unit.hub.harness import HubHarness

ECHO = """
routerAdd("GET", "/echo/{id}", (e) => {
  const client = $app.subscriptionsBroker().clientById(e.request.pathValue("id"))
  return e.json(200, client.subscriptions())
})
"""
"""A PocketBase hook that shows which topics and options it parsed from a call."""

CLIENT = "CLIENTID"
"""A placeholder for each server's own client id."""

EXAMPLES = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Both servers, and one open stream on each."""

    pocketbase: Address
    ours: Address
    harness: HubHarness
    their_id: str
    our_id: str

    async def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Outcome:
        """Send the request to both."""
        theirs, ours = [
            await send(
                Request(
                    method=method,
                    path=path.replace(CLIENT, client_id),
                    headers=headers,
                    body=body.replace(CLIENT.encode(), client_id.encode()),
                ),
                address,
            )
            for address, client_id in ((self.pocketbase, self.their_id), (self.ours, self.our_id))
        ]
        return Outcome((theirs.head.status, theirs.body), (ours.head.status, ours.body))

    async def their_topics(self) -> dict[str, Any]:
        """Return ``query`` and ``headers`` by topic, as PocketBase has them."""
        request = Request(method="GET", path=f"/echo/{self.their_id}", headers={})
        topics: dict[str, Any] = json.loads((await send(request, self.pocketbase)).body)
        return {name.replace(self.their_id, CLIENT): topic for name, topic in topics.items()}

    def our_topics(self) -> set[str]:
        """Return the topics that the hub has."""
        (connection,) = (c for c in self.harness.hub.connections if c.id == self.our_id)
        return {name.replace(self.our_id, CLIENT) for name in connection.subscriptions}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Status and body from each server."""

    theirs: tuple[int, bytes]
    ours: tuple[int, bytes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    directory: Path = tmp_path_factory.mktemp("pocketbase")
    (directory / "hooks").mkdir()
    (directory / "hooks" / "echo.pb.js").write_text(ECHO)
    server = PocketBaseServer(directory, free_port())
    await server.start()
    try:
        async with served() as service:
            theirs, their_id = await open_stream(server.address)
            ours, our_id = await open_stream(service.address)
            yield Pair(server.address, service.address, service.harness, their_id, our_id)
            await theirs.close()
            await ours.close()
    finally:
        await server.stop()


# What is generated: good requests with a few bytes changed.

BITS = [
    *'{}[]",:\\ \t\n\r0123456789eE.+-%;&#?=aé/',
    *("\\u", "\\ud800", "null", "true", "1e999", "%41", "%zz", "\r\n", "--", "--B", "--B--"),
    *("\r\n--B", "\x00", "form-data", "name=", "\udcff", '"clientId":', "&clientId=", "client_id"),
    *("%", "\x7f", '"query":', '"headers":{', "options=", "&options=", "\u2028", '"subscriptions"'),
]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[str]) -> str:
    text = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["insert", "delete", "cut", "repeat"])):
            case "insert":
                text = text[:at] + draw(st.sampled_from(BITS)) + text[at:]
            case "delete":
                text = text[:at] + text[at + 1 :]
            case "cut":
                text = text[:at]
            case _:
                start = draw(st.integers(0, at))
                text = text[:at] + text[start:at] + text[at:]
    return text


def part(name: str, value: str, more: str = "") -> str:
    return f'--B\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


JSON_BODIES = [
    f'{{"clientId":"{CLIENT}","subscriptions":["posts/*","a?options={{\\"query\\":{{}}}}"]}}',
    f'{{"subscriptions":[null,"","\\u00e9"],"clientId":"{CLIENT}","x":{{"y":[1,2.5e3,true]}}}}',
    f'{{"clientId":"{CLIENT}"}} trailing',
    f'{{"CLIENTid":"{CLIENT}","Subscriptions":null}}',
    "null",
]
URLENCODED_BODIES = [
    f"clientId={CLIENT}&subscriptions=posts%2F*&subscriptions=a+b",
    f"subscriptions=x&clientId={CLIENT}&@jsonPayload=%7B%22subscriptions%22%3A%5B%22z%22%5D%7D",
    f"clientId={CLIENT}&a=1&b",
]
MULTIPART_BODIES = [
    part("clientId", CLIENT) + part("subscriptions", "a/*") + part("subscriptions", "b") + "--B--",
    "preamble\r\n"
    + part("clientId", CLIENT, '; filename=""')
    + part("subscriptions", "a", '; filename="f"')
    + "--B--\r\n",
    part("clientId", CLIENT).replace("\r\n", "\n") + "--B--\n",
    part("@jsonPayload", f'{{"clientId":"{CLIENT}","subscriptions":["q"]}}') + "--B--\r\nepilogue",
    (
        "--B  \r\ncontent-disposition: form-data; name=clientId\r\nX-Y: z\r\n w\r\n\r\n"
        f"{CLIENT}\r\n--Bx\r\n--B--\r\n"
    ),
    (
        '--B\r\nContent-Disposition: form-data; name="clientId"\r\n'
        f"Content-Transfer-Encoding: quoted-printable\r\n\r\n{CLIENT}=\r\n\r\n--B--\r\n"
    ),
]
URLENCODED = "application/x-www-form-urlencoded"
BODIES = st.one_of(
    st.tuples(st.just("application/json"), mutated(JSON_BODIES)),
    st.tuples(
        st.sampled_from([URLENCODED, f"{URLENCODED}; charset=UTF-8", f"{URLENCODED}x"]),
        mutated(URLENCODED_BODIES),
    ),
    st.tuples(
        st.sampled_from(
            [
                "multipart/form-data; boundary=B",
                'multipart/form-data; boundary="B"',
                "multipart/form-data ; BOUNDARY = B ;",
                "multipart/form-data",
            ]
        ),
        mutated(MULTIPART_BODIES),
    ),
    st.tuples(
        mutated(["application/json", URLENCODED, "multipart/form-data; boundary=B"]).filter(
            lambda text: re.fullmatch(r"[!-~]([ -~]*[!-~])?", text) is not None
        ),
        st.sampled_from([*JSON_BODIES, *URLENCODED_BODIES, *MULTIPART_BODIES]),
    ),
)
QUERIES = st.sampled_from(
    ["", "", "", f"?clientId={CLIENT}", "?subscriptions=q", "?a=%zz", "?a;b", "?subscriptions=%2B"]
)


@pytest.mark.asyncio(loop_scope="module")
@EXAMPLES
@given(typed=BODIES, query=QUERIES)
async def test_subscribe_bodies_are_taken_alike(
    pair: Pair, typed: tuple[str, str], query: str
) -> None:
    """Covers which bodies can be parsed, the errors of the others, and the resulting topics."""
    content_type, text = typed
    body = text.encode(errors="surrogateescape")
    assume(not content_type.startswith(("text/xml", "application/xml")))

    outcome = await pair.ask("POST", f"/api/realtime{query}", {"Content-Type": content_type}, body)

    assert outcome.ours == outcome.theirs
    if outcome.ours[0] == 204:
        assert pair.our_topics() == set(await pair.their_topics())


OPTIONS = [
    '{"query":{"a":"1","b":2.5,"c":true,"d":null,"e":[1,{"x":"y"}]},"headers":{"X-Tok":"t","yY":"é"}}',
    '{"headers":{"A":"b"},"query":{"filter":"a = \'x\' && b > 1","fields":"id,name"}}',
    '{"query": {"abc": "123"}, "headers": {"x-token": "..."}}',
    '{"query":{"n":-1.5e-3,"m":1E+3,"u":"\\u00e9\\ud83d\\ude00\\/\\n"},"z":[[],{},""]}',
]
PATHS = ["p/*?options=", "p?options=", "p/1?x=1&options=", "p/a#b?options=", "p/5%25?options="]


ENCODINGS: list[Callable[[str], str]] = [str, quote, quote_plus]


@st.composite
def topics(draw: st.DrawFn) -> str:
    encode = draw(st.sampled_from(ENCODINGS))
    options = encode(draw(mutated(OPTIONS)).encode(errors="replace").decode())
    return draw(mutated([draw(st.sampled_from(PATHS)) + options]))


@pytest.mark.asyncio(loop_scope="module")
@EXAMPLES
@given(names=st.lists(topics(), min_size=1, max_size=20))
async def test_options_are_read_alike(pair: Pair, names: list[str]) -> None:
    """Protocol 5: what rules see of a subscription, however its text was damaged."""
    names = [name.encode(errors="replace").decode() for name in names]
    # A topic with a line break breaks PocketBase's message; ours has no options then (4.6). What
    # doesn't begin with the name of a collection may have any, it matches nothing.
    names = [name for name in names if re.fullmatch(r"\w+([/?#][^\r\n]*)?", name, re.ASCII)]
    body = json.dumps({"clientId": CLIENT, "subscriptions": names}).encode()
    outcome = await pair.ask("POST", "/api/realtime", {"Content-Type": "application/json"}, body)
    assert outcome.ours == outcome.theirs
    assume(outcome.ours[0] == 204)

    theirs = await pair.their_topics()
    assert {name: (t["query"], t["headers"]) for name, t in theirs.items()} == {
        name: (topic.query, topic.headers) for name in names for topic in [parse_topic(name)]
    }


HOST = "Host: x\r\n"
RAW = [
    f"GET /api/realtime HTTP/1.1\r\n{HOST}\r\n",
    "GET /api/realtime HTTP/1.0\r\n\r\n",
    "GET /api/realtime HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    f"HEAD /api/realtime HTTP/1.1\r\n{HOST}\r\n",
    f"GET /api/realtime?a=%zz HTTP/1.1\r\n{HOST}Origin: https://a.example\r\n\r\n",
    f"GET /api/%72ealtime HTTP/1.1\r\n{HOST}\r\n",
    f"OPTIONS /x HTTP/1.1\r\n{HOST}Origin: a\r\nAccess-Control-Request-Headers: X\r\n\r\n",
    f"OPTIONS /api/realtime HTTP/1.1\r\n{HOST}\r\n",
    f"PUT /api/realtime HTTP/1.1\r\n{HOST}\r\n",
    f"TRACE /api/realtime HTTP/1.1\r\n{HOST}\r\n",
    f"GET /nope HTTP/1.1\r\n{HOST}\r\n",
    f"GET /API/realtime HTTP/1.1\r\n{HOST}\r\n",
    f"GET //api/realtime HTTP/1.1\r\n{HOST}Origin: https://a.example\r\n\r\n",
    f"POST /api//realtime HTTP/1.1\r\n{HOST}Content-Length: 2\r\n\r\n{{}}",
    f"OPTIONS /api/./realtime HTTP/1.1\r\n{HOST}Origin: https://a.example\r\n\r\n",
    f"PUT /api/x/../realtime/ HTTP/1.1\r\n{HOST}Content-Length: 0\r\n\r\n",
    f"GET /api/realtime/. HTTP/1.1\r\n{HOST}\r\n",
    f"GET /../api//health?a=//b&\"<c>'=%zz HTTP/1.1\r\n{HOST}\r\n",
    f"GET //api%2F/[a]%2e%2e/'b!(c)*~$&+,:;=@ HTTP/1.1\r\n{HOST}\r\n",
    f'GET //"a<b>|c^`{{d}} HTTP/1.1\r\n{HOST}\r\n',
    f"GET //a.example/x/ HTTP/1.1\r\n{HOST}\r\n",
    f"GET // HTTP/1.1\r\n{HOST}\r\n",
    f"POST /nope HTTP/1.1\r\n{HOST}Content-Length: 99999999\r\n\r\n",
    f"POST /api/health HTTP/1.1\r\n{HOST}Content-Length: 0\r\n\r\n",
    f"HEAD /api/health HTTP/1.1\r\n{HOST}\r\n",
    f"GET /api/health?fields=code HTTP/1.1\r\n{HOST}\r\n",
    f"GET /api/health?fields=a(b HTTP/1.1\r\n{HOST}\r\n",
    f"POST /api/realtime HTTP/1.1\r\n{HOST}Content-Length: 0\r\n\r\n",
    f"POST /api/realtime HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n\r\n",
    "POST /api/realtime HTTP/1.0\r\nContent-Type: application/json\r\n\r\n",
    (
        f"POST /api/realtime HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
        "Content-Length: 2\r\nExpect: 100-continue\r\n\r\n{}"
    ),
    (
        f"POST /api/realtime HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
        "Content-Length: 2\r\nContent-Encoding: gzip\r\n\r\n{}"
    ),
    (
        f"POST /api/realtime HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    (
        f"POST /api/realtime HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    ),
    (
        f"POST /api/realtime HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
        "Content-Length: 33554433\r\nExpect: 100-continue\r\n\r\n"
    ),
]
QUIET_SECONDS = 0.3


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("request_text", RAW)
async def test_raw_requests_are_answered_alike(pair: Pair, request_text: str) -> None:
    """Status line, all headers and the body's bytes."""
    theirs, ours = [
        comparable(await answer_to(address, request_text.encode()))
        for address in (pair.pocketbase, pair.ours)
    ]

    assert ours == theirs


async def answer_to(address: Address, data: bytes) -> bytes:
    """Return what the server sends until it is quiet."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(data)
    answer = b""
    try:
        while True:
            async with asyncio.timeout(QUIET_SECONDS):
                piece = await reader.read(65536)
            if not piece:
                break
            answer += piece
    except TimeoutError:
        pass  # held open, as streams are
    finally:
        writer.close()
    return answer


def comparable(answer: bytes) -> tuple[list[bytes], bytes]:
    """Return the head's lines in order of name, and the body, without times and ids."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.split(b"\r\n")
    if status.startswith(b"HTTP/1.1 100 "):
        return comparable(body)
    named = [(name.lower(), value) for name, _, value in (f.partition(b": ") for f in fields)]
    kept = sorted(b": ".join(pair) for pair in named if pair[0] != b"date")
    return [status, *kept], re.sub(rb"[A-Za-z0-9]{40}", b"ID", body)
