"""How the Dart SDK, which has a line parser of its own, reads the stream (protocol, 10.2)."""

from __future__ import annotations

import asyncio
import codecs
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from pgrealtime.changes import Truncate
from tests.conformance.http_client import read_chunk, read_head
from tests.unit.api.served import served
from tests.unit.hub.harness import DEADLINE, POSTS, at, insert

_LINE = re.compile(
    r"([A-Za-z0-9_]+)"
    r"[:\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]+"
    r"([^\n\r\u2028\u2029]*)"
)
"""A word, any number of blanks and colons, the rest; with the character classes of Dart."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message as the SDK delivers it."""

    id: str = ""
    event: str = "message"
    data: str = ""


class DartParser:
    """The SDK's parser: it takes bytes as they come, and any empty line ends a message."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._text = ""
        self._fields: dict[str, str] = {}

    def feed(self, data: bytes) -> Iterator[Message]:
        self._text += self._decoder.decode(data)
        while found := re.search(r"\r\n|\n|\r(?!$)", self._text):
            line, self._text = self._text[: found.start()], self._text[found.end() :]
            if not line:
                yield Message(**self._fields)
                self._fields = {}
            elif match := _LINE.fullmatch(line):
                name, value = match.groups()
                if name in ("id", "event", "data"):
                    self._fields[name] = value


async def receive(
    reader: asyncio.StreamReader, is_enough: Callable[[Message], bool]
) -> list[Message]:
    """Parse the body in pieces of random sizes, until ``is_enough`` accepts a message."""
    parser, messages = DartParser(), list[Message]()
    rng = random.Random(7)
    async with asyncio.timeout(DEADLINE):
        while not messages or not is_enough(messages[-1]):
            chunk = await read_chunk(reader)
            while chunk:
                size = rng.randint(1, len(chunk))
                messages += parser.feed(chunk[:size])
                chunk = chunk[size:]
    return messages


NASTY = (
    "two\nlines\r\nand\rmore",
    "\n\n",
    "id:x\nevent:y\n\n",
    "  : blanks first",
    "\x85 \x0b \x0c \x1c \ufeff \u00a0",
    'emoji \U0001f600, quote " and \\',
)


async def test_each_message_arrives_whole_and_nothing_else_does() -> None:
    """Whatever the values hold, no message is empty, split or without data.

    Heartbeats are not seen.
    """
    async with served(heartbeat=0.02) as service:
        reader, writer = await service.raw(b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n")
        await read_head(reader)
        (connection,) = service.harness.hub.connections
        await service.harness.subscribe(connection, "posts/*", "posts/1")
        for number, title in enumerate(NASTY):
            service.harness.commit(insert(str(number), title))
            await asyncio.sleep(0.03)  # lets a heartbeat pass
        service.harness.commit(insert("last", "end"))
        messages = await receive(reader, lambda message: '"last"' in message.data)
        writer.close()

    connect, *events = messages
    assert connect == Message(connection.id, "PB_CONNECT", f'{{"clientId":"{connection.id}"}}')
    assert {message.id for message in events} == {connection.id}
    titles = [json.loads(m.data)["record"]["title"] for m in events if m.event == "posts/*"]
    assert titles == [*NASTY, "end"]
    assert [m.event for m in events].count("posts/1") == 1
    assert len(events) == len(NASTY) + 2


async def test_positions_and_gaps_arrive_as_messages_of_their_names() -> None:
    """Their ids are the positions to resume from, and their data is never empty."""
    async with served(heartbeat=0.02) as service:
        reader, writer = await service.raw(
            b"GET /api/realtime?lastEventId= HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        await read_head(reader)
        (connection,) = service.harness.hub.connections
        await service.harness.subscribe(connection, "posts/*", "PB_CURSOR", "PB_RESYNC")
        service.harness.commit(insert("a"))
        service.harness.commit(Truncate(POSTS))
        last = f"{connection.id}.{at(service.harness.commit(insert('last')), 0)}"
        messages = await receive(reader, lambda m: m.event == "PB_CURSOR" and m.id >= last)
        writer.close()

    by_name = {message.event: json.loads(message.data) for message in messages}
    assert by_name["PB_CONNECT"] == {"clientId": connection.id}
    assert by_name["PB_RESYNC"] == {"collections": ["posts"], "reason": "truncate"}
    assert set(by_name) == {"PB_CONNECT", "PB_CURSOR", "PB_RESYNC", "posts/*"}
    assert all(message.id.startswith(f"{connection.id}.") for message in messages)
    assert all(
        json.loads(message.data)["id"] == message.id
        for message in messages
        if message.event == "PB_CURSOR"
    )


async def test_a_line_separator_in_a_value_costs_dart_the_data() -> None:
    """U+2028 ends a line for Dart's expression. PocketBase (0.40) doesn't escape it either."""
    async with served() as service:
        reader, writer = await service.raw(b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n")
        await read_head(reader)
        (connection,) = service.harness.hub.connections
        await service.harness.subscribe(connection, "posts/*")
        service.harness.commit(insert("a", "one\u2028two"), insert("last"))
        messages = await receive(reader, lambda message: '"last"' in message.data)
        writer.close()

    assert messages[1] == Message(connection.id, "posts/*", "")
    assert len(messages) == 3


@pytest.mark.parametrize("pieces", [(b"data: :  x\n\n",), (b"da", b"ta:", b":x\r", b"\n\r\n")])
def test_the_parser_loses_leading_blanks_and_colons(pieces: tuple[bytes, ...]) -> None:
    """The parser of this test is as lenient as Dart's; the service never sends such a line."""
    parser = DartParser()

    assert [m for piece in pieces for m in parser.feed(piece)] == [Message(data="x")]
