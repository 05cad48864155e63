"""Tests of the harness: it understands the recordings' notation, and it detects deviations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from random import Random

import msgspec
import pytest
import pytest_asyncio

from tests.conformance.compare import (
    are_messages_as_expected,
    expand,
    is_json_as_expected,
    is_message_as_expected,
    is_text_as_expected,
)
from tests.conformance.differential import DifferenceError, Duel, Side
from tests.conformance.fixtures import load_fixtures
from tests.conformance.http_client import MessageSplitter, Request
from tests.conformance.pgrealtime_server import touched
from tests.conformance.pocketbase_server import PocketBaseTemplate
from tests.conformance.replay import MismatchError, Replay
from tests.conformance.scenarios import BOOKS, World
from tests.conformance.transcript import (
    Exchange,
    Expect,
    ExpectClosed,
    ExpectSilence,
    SseOpen,
    Step,
    load_conversation,
)

RECORDINGS = Path(__file__).parent.parent / "transcripts"
FIXTURES = load_fixtures(RECORDINGS / "fixtures.json")


# -- comparing


def test_remembered_values_are_inserted_into_what_is_sent() -> None:
    assert expand('{"id":"{{A.clientId}}"}', {"A.clientId": "x1"}) == '{"id":"x1"}'


def test_a_value_not_remembered_is_an_error() -> None:
    with pytest.raises(KeyError):
        expand("{{B.clientId}}", {})


@pytest.mark.parametrize(
    ("expected", "actual", "verdict"),
    [
        pytest.param("a", b"a", True, id="same"),
        pytest.param("a.c", b"abc", False, id="no wildcards of regular expressions"),
        pytest.param("a", b"a\n", False, id="a line feed more"),
        pytest.param("é", "é".encode(), True, id="UTF-8"),
        pytest.param("é", b"\xe9", False, id="not UTF-8"),
        pytest.param("<{{ts}}>", b"<2024-02-03 04:05:06.789Z>", True, id="time"),
        pytest.param("<{{ts}}>", b"<2024-02-03T04:05:06.789Z>", False, id="time with T"),
        pytest.param("<{{ts}}>", b"<2024-02-03 04:05:06.789123Z>", False, id="microseconds"),
        pytest.param("<{{jwt}}>", b"<ab.c-d._e>", True, id="token"),
        pytest.param("<{{jwt}}>", b"<ab.cd>", False, id="not a token"),
        pytest.param("{{A.clientId}}", b"x1", True, id="remembered"),
        pytest.param("{{A.clientId}}", b"x2", False, id="not what was remembered"),
    ],
)
def test_text_compares_byte_by_byte(expected: str, actual: bytes, verdict: bool) -> None:  # noqa: FBT001 (a column of the table)
    assert is_text_as_expected(expected, actual, {"A.clientId": "x1"}) is verdict


@pytest.mark.parametrize(
    ("expected", "actual", "verdict"),
    [
        pytest.param('{"a":1,"b":[2]}', b'{ "b": [2], "a": 1.0 }', True, id="order and spelling"),
        pytest.param('{"a":1}', b'{"a":true}', False, id="a bool is no number"),
        pytest.param('{"a":false}', b'{"a":0}', False, id="a number is no bool"),
        pytest.param('{"a":null}', b"{}", False, id="null is not absent"),
        pytest.param('{"a":1}', b'{"a":1,"b":2}', False, id="a member more"),
        pytest.param("[1,2]", b"[2,1]", False, id="lists have an order"),
        pytest.param('{"t":"{{ts}}"}', b'{"t":"2024-02-03 04:05:06.789Z"}', True, id="time"),
        pytest.param("{}", b"{} trailing", False, id="not JSON"),
    ],
)
def test_json_compares_by_value(expected: str, actual: bytes, verdict: bool) -> None:  # noqa: FBT001 (a column of the table)
    assert is_json_as_expected(expected, actual, {}) is verdict


def test_only_the_data_of_a_message_compares_as_json() -> None:
    expected = 'id:1\nevent:t\ndata:{"a":1,"b":2}\n\n'

    assert is_message_as_expected(expected, b'id:1\nevent:t\ndata:{"b":2,"a":1}\n\n', {}, "json")
    assert not is_message_as_expected(
        expected, b'id: 1\nevent:t\ndata:{"a":1,"b":2}\n\n', {}, "json"
    )


def test_any_order_compares_as_a_multiset() -> None:
    assert are_messages_as_expected(
        ["a", "b", "b"], [b"b", b"a", b"b"], {}, how="bytes", order="any"
    )
    assert not are_messages_as_expected(
        ["a", "b", "b"], [b"a", b"b", b"a"], {}, how="bytes", order="any"
    )
    assert not are_messages_as_expected(["a", "b"], [b"b", b"a"], {}, how="bytes", order="given")


# -- the wire


def test_messages_are_cut_at_blank_lines_wherever_the_bytes_are() -> None:
    splitter = MessageSplitter()
    body = b"id:1\nevent:a\ndata:{}\n\nid:1\nevent:b\ndata:{}\n\n"

    messages = [message for byte in body for message in splitter.feed(bytes([byte]))]

    assert messages == [b"id:1\nevent:a\ndata:{}\n\n", b"id:1\nevent:b\ndata:{}\n\n"]
    assert splitter.rest == b""


def test_keep_alive_lines_between_messages_are_left_out() -> None:
    splitter = MessageSplitter()

    assert splitter.feed(b":\n:\nid:1\ndata:a\n\n:\nid") == [b"id:1\ndata:a\n\n"]
    assert splitter.feed(b":1\n\n:\n") == [b"id:1\n\n"]
    assert splitter.rest == b""


def test_a_keep_alive_line_within_a_message_is_seen() -> None:
    assert MessageSplitter().feed(b"id:1\n:\ndata:a\n\n") == [b"id:1\n:\ndata:a\n\n"]


def test_a_request_goes_out_as_written() -> None:
    request = Request(method="POST", path="/x", headers={"X-iD": "1"}, body=b"{}")

    assert request.encode("h:1", close=True) == (
        b"POST /x HTTP/1.1\r\nHost: h:1\r\nX-iD: 1\r\nContent-Length: 2\r\n"
        b"Connection: close\r\n\r\n{}"
    )


def test_a_declared_length_is_not_corrected() -> None:
    request = Request(method="POST", path="/x", headers={"Content-Length": "9"}, body=b"{")

    assert request.encode("h", close=False) == (
        b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{"
    )


# -- what a recording touches


def test_collections_are_configured_with_those_they_point_to() -> None:
    assert touched('"subscriptions":["notes/*"]', FIXTURES) == ["users", "notes"]
    assert touched("pbc_tasks0000001/*", FIXTURES) == ["vault", "projects", "tasks"]
    assert touched('"account":"ann"', FIXTURES) == ["members"]


# -- noticing


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def template(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PocketBaseTemplate]:
    yield await PocketBaseTemplate.build(FIXTURES, tmp_path_factory.mktemp("pocketbase"))


def _status(step: Step) -> Step:
    assert isinstance(step, Exchange)
    response = msgspec.structs.replace(step.response, status=200)
    return msgspec.structs.replace(step, response=response)


def _header(step: Step) -> Step:
    assert isinstance(step, SseOpen)
    response = msgspec.structs.replace(step.response, headers={"cache-control": "no-cache"})
    return msgspec.structs.replace(step, response=response)


def _missing_header(step: Step) -> Step:
    assert isinstance(step, SseOpen)
    response = msgspec.structs.replace(step.response, headers={"x-absent": ""})
    return msgspec.structs.replace(step, response=response)


def _body(step: Step) -> Step:
    assert isinstance(step, Exchange)
    response = msgspec.structs.replace(step.response, body='{"message":"API is healthy."}')
    return msgspec.structs.replace(step, response=response)


def _other_message(step: Step) -> Step:
    assert isinstance(step, Expect)
    messages = tuple(message.replace('"create"', '"update"') for message in step.messages)
    return msgspec.structs.replace(step, messages=messages)


def _one_more_message(step: Step) -> Step:
    assert isinstance(step, Expect)
    return msgspec.structs.replace(step, messages=(*step.messages, *step.messages))


def _silence(step: Step) -> Step:
    assert isinstance(step, Expect)
    return ExpectSilence(conn=step.conn, ms=350)


def _closed(step: Step) -> Step:
    assert isinstance(step, ExpectSilence)
    return ExpectClosed(conn=step.conn, after_ms=(0, 350))


@pytest.mark.parametrize(
    ("name", "number", "spoil"),
    [
        pytest.param("wildcard_lifecycle", 3, _status, id="status"),
        pytest.param("wildcard_lifecycle", 1, _header, id="header"),
        pytest.param("wildcard_lifecycle", 1, _missing_header, id="missing header"),
        pytest.param("health", 2, _body, id="body"),
        pytest.param("wildcard_lifecycle", 5, _other_message, id="message"),
        pytest.param("wildcard_lifecycle", 5, _one_more_message, id="missing message"),
        pytest.param("wildcard_lifecycle", 5, _silence, id="message instead of silence"),
        pytest.param("wildcard_lifecycle", 12, _closed, id="open instead of closed"),
    ],
)
async def test_a_wrong_answer_is_noticed(
    *,
    template: PocketBaseTemplate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
    spoil: Callable[[Step], Step],
) -> None:
    """A recording altered in one place fails at just that place against the real PocketBase."""
    monkeypatch.setattr("tests.conformance.replay.ANSWER_SECONDS", 1.0)
    conversation = load_conversation(RECORDINGS / f"{name}.json")
    steps = list(conversation.steps)
    steps[number - 1] = spoil(steps[number - 1])
    altered = msgspec.structs.replace(conversation, steps=tuple(steps))

    async with template.running(tmp_path / "run") as server:
        with pytest.raises(MismatchError, match=f"step {number},"):
            await Replay(altered, FIXTURES.accounts, server).run()


# -- the differential test


async def _duel(worlds: Iterable[World], tmp_path: Path) -> int:
    servers = []
    for number, world in enumerate(worlds):
        directory = tmp_path / f"template{number}"
        directory.mkdir()
        servers.append(await PocketBaseTemplate.build(world.fixtures, directory))
    one, other = servers
    world = World(Random(7))
    async with one.running(tmp_path / "one") as first, other.running(tmp_path / "other") as second:
        duel = Duel(
            await Side.of("one", first, world.fixtures),
            await Side.of("other", second, world.fixtures),
        )
        return sum([await duel.run(world.scenario()) for _ in range(6)])


async def test_two_pocketbases_differ_in_nothing(tmp_path: Path) -> None:
    """The differential test has no false alarms: what it compares contains nothing random."""
    assert await _duel([World(Random(7)), World(Random(7))], tmp_path) > 20


async def test_other_rules_are_noticed(tmp_path: Path) -> None:
    """Two servers that differ only in rules give different events."""
    altered = World(Random(7))
    collections = tuple(
        msgspec.structs.replace(c, list_rule="", view_rule="") if c.name in BOOKS else c
        for c in altered.fixtures.collections
    )
    altered.fixtures = msgspec.structs.replace(altered.fixtures, collections=collections)

    with pytest.raises(DifferenceError):
        await _duel([World(Random(7)), altered], tmp_path)
