"""What the Dart SDK makes of our bytes; it has a line parser of its own (protocol, 10.2)."""

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
from tests.unit.hub.room import DEADLINE, POSTS, at, insert

_LINE = re.compile(
    r"([A-Za-z0-9_]+)"
    r"[:\t\n\v\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]+"
    r"([^\n\r\u2028\u2029]*)"
)
"""A word, blanks and colons in any number, the rest; with the classes of Dart's expressions."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One message as the SDK delivers it."""

    id: str = ""
    event: str = "message"
    data: str = ""


class DartParser:
    """Takes bytes as they come; any empty line delivers, whatever came before it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._text = ""
        self._fields: dict[str, str] = {}

    def feed(self, data: bytes) -> Iterator[Heard]:
        self._text += self._decoder.decode(data)
        while found := re.search(r"\r\n|\n|\r(?!$)", self._text):
            line, self._text = self._text[: found.start()], self._text[found.end() :]
            if not line:
                yield Heard(**self._fields)
                self._fields = {}
            elif match := _LINE.fullmatch(line):
                name, value = match.groups()
                if name in ("id", "event", "data"):
                    self._fields[name] = value


async def heard(reader: asyncio.StreamReader, is_enough: Callable[[Heard], bool]) -> list[Heard]:
    """Feed the body in pieces of any size, up to a message that is enough."""
    parser, messages = DartParser(), list[Heard]()
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
    """Between heartbeats, whatever is in the values: no message empty, split or without data."""
    async with served(heartbeat=0.02) as service:
        reader, writer = await service.raw(b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n")
        await read_head(reader)
        (connection,) = service.room.hub.connections
        await service.room.subscribe(connection, "posts/*", "posts/1")
        for number, title in enumerate(NASTY):
            service.room.commit(insert(str(number), title))
            await asyncio.sleep(0.03)  # lets a heartbeat pass
        service.room.commit(insert("last", "end"))
        messages = await heard(reader, lambda message: '"last"' in message.data)
        writer.close()

    connect, *events = messages
    assert connect == Heard(connection.id, "PB_CONNECT", f'{{"clientId":"{connection.id}"}}')
    assert {message.id for message in events} == {connection.id}
    titles = [json.loads(m.data)["record"]["title"] for m in events if m.event == "posts/*"]
    assert titles == [*NASTY, "end"]
    assert [m.event for m in events].count("posts/1") == 1
    assert len(events) == len(NASTY) + 2


async def test_positions_and_gaps_arrive_as_messages_of_their_names() -> None:
    """A resumable connection: the id is what a returning client brings, its data is never empty."""
    async with served(heartbeat=0.02) as service:
        reader, writer = await service.raw(
            b"GET /api/realtime?lastEventId= HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        await read_head(reader)
        (connection,) = service.room.hub.connections
        await service.room.subscribe(connection, "posts/*", "PB_CURSOR", "PB_RESYNC")
        service.room.commit(insert("a"))
        service.room.commit(Truncate(POSTS))
        last = f"{connection.id}.{at(service.room.commit(insert('last')), 0)}"
        messages = await heard(reader, lambda m: m.event == "PB_CURSOR" and m.id >= last)
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
    """U+2028 ends what its expression takes for a line. PocketBase (0.40) escapes it no more."""
    async with served() as service:
        reader, writer = await service.raw(b"GET /api/realtime HTTP/1.1\r\nHost: x\r\n\r\n")
        await read_head(reader)
        (connection,) = service.room.hub.connections
        await service.room.subscribe(connection, "posts/*")
        service.room.commit(insert("a", "one\u2028two"), insert("last"))
        messages = await heard(reader, lambda message: '"last"' in message.data)
        writer.close()

    assert messages[1] == Heard(connection.id, "posts/*", "")
    assert len(messages) == 3


@pytest.mark.parametrize("pieces", [(b"data: :  x\n\n",), (b"da", b"ta:", b":x\r", b"\n\r\n")])
def test_the_parser_loses_leading_blanks_and_colons(pieces: tuple[bytes, ...]) -> None:
    """That this one is as lenient as Dart's; ours never send such a line."""
    parser = DartParser()

    assert [m for piece in pieces for m in parser.feed(piece)] == [Heard(data="x")]
