"""A raw HTTP/1.1 client: bytes are sent as given and returned uninterpreted.

A library would lower-case names, join headers, reconnect and decode; the recordings are about
exactly these things.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

HEAD_LIMIT = 256 * 1024
"""Bytes of a response head; the default of asyncio's reader is no smaller."""

BODILESS_STATUS = frozenset({204, 304})


class ProtocolError(Exception):
    """The server's answer is no valid HTTP/1.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Host and port of a server."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request; only ``Host``, ``Content-Length`` and ``Connection`` are added to it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    source_ip: str | None = None
    """Local address to send from."""

    def encode(self, host: str, *, close: bool) -> bytes:
        """Return the bytes on the wire.

        Args:
            host: Value of ``Host``.
            close: Whether to request that the server closes the connection after the answer.
        """
        given = {name.lower() for name in self.headers}
        lines = [f"{self.method} {self.path} HTTP/1.1"]
        if "host" not in given:
            lines.append(f"Host: {host}")
        lines.extend(f"{name}: {value}" for name, value in self.headers.items())
        chunked = "transfer-encoding" in given
        has_body = bool(self.body) or self.method in {"POST", "PUT", "PATCH"}
        if has_body and not chunked and "content-length" not in given:
            lines.append(f"Content-Length: {len(self.body)}")
        if close and "connection" not in given:
            lines.append("Connection: close")
        head = "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n"
        return head + (_one_chunk(self.body) if chunked else self.body)


def _one_chunk(body: bytes) -> bytes:
    chunk = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
    return chunk + b"0\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Status and headers of an answer."""

    status: int
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in order, repeated ones apart."""

    def header(self, name: str) -> str | None:
        """Return the values of the header joined with ``", "``, or None if it is absent."""
        values = [value for key, value in self.headers if key == name]
        return ", ".join(values) if values else None

    @property
    def is_chunked(self) -> bool:
        return (self.header("transfer-encoding") or "").lower() == "chunked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer, its body without the transfer coding."""

    head: Head
    body: bytes
    surplus: bytes = b""
    """What came after the end of the answer; a correct server sends nothing there."""


async def send(request: Request, to: Address, *, complete: bool = True) -> Answer:
    """Send one request on its own connection and return the answer.

    Args:
        request: What to send.
        to: The server.
        complete: False if the declared length is larger than the body: the server can't be asked
            to close after the answer, and whatever follows the answer isn't waited for.

    Raises:
        ProtocolError: The answer is malformed or was cut.
    """
    reader, writer = await _connect(request, to)
    try:
        writer.write(request.encode(f"{to.host}:{to.port}", close=complete))
        head = await read_head(reader)
        body = await _read_body(reader, head, request.method)
        surplus = await reader.read() if complete else b""
        return Answer(head=head, body=body, surplus=surplus)
    finally:
        writer.close()


async def send_and_hold(request: Request, to: Address, *, quiet_seconds: float) -> Answer:
    """Send a request whose answer is a head only, and check that the connection stays open.

    Raises:
        ProtocolError: Anything followed the head, or the server ended the connection.
    """
    reader, writer = await _connect(request, to)
    try:
        writer.write(request.encode(f"{to.host}:{to.port}", close=False))
        head = await read_head(reader)
        try:
            async with asyncio.timeout(quiet_seconds):
                more = await reader.read(1)
        except TimeoutError:
            return Answer(head=head, body=b"")
        raise ProtocolError("the connection was ended" if not more else f"{more!r} after the head")
    finally:
        writer.close()


async def _connect(
    request: Request, to: Address
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    local = None if request.source_ip is None else (request.source_ip, 0)
    return await asyncio.open_connection(to.host, to.port, limit=HEAD_LIMIT, local_addr=local)


async def read_head(reader: asyncio.StreamReader) -> Head:
    """Return the next response head.

    Raises:
        ProtocolError: It is malformed or the connection ended.
    """
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        raise ProtocolError(f"connection ended within the head: {error.partial!r}") from error
    first, *rest = raw[:-4].decode("latin-1").split("\r\n")
    version, _, status = first.partition(" ")
    if version != "HTTP/1.1" or not status[:3].isdigit():
        raise ProtocolError(f"not a status line: {first!r}")
    fields = [line.partition(":") for line in rest]
    headers = tuple((name.strip().lower(), value.strip()) for name, _, value in fields)
    return Head(status=int(status[:3]), headers=headers)


async def _read_body(reader: asyncio.StreamReader, head: Head, method: str) -> bytes:
    if method == "HEAD" or head.status in BODILESS_STATUS:
        return b""
    try:
        if head.is_chunked:
            chunks: list[bytes] = []
            while chunk := await read_chunk(reader):
                chunks.append(chunk)
            return b"".join(chunks)
        length = head.header("content-length")
        return await reader.read() if length is None else await reader.readexactly(int(length))
    except asyncio.IncompleteReadError as error:
        raise ProtocolError("connection ended within the body") from error


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """Return the data of the next chunk, empty for the last one.

    Raises:
        ProtocolError: Not the chunked coding of RFC 9112, section 7.1.
        asyncio.IncompleteReadError: The connection ended before the last chunk.
    """
    line = await reader.readuntil(b"\r\n")
    try:
        size = int(line[:-2].split(b";")[0], 16)
    except ValueError as error:
        raise ProtocolError(f"not a chunk size: {line!r}") from error
    data = await reader.readexactly(size + 2)
    if data[-2:] != b"\r\n":
        raise ProtocolError("a chunk doesn't end with CR LF")
    return data[:-2]


class End(Enum):
    """How a stream ended."""

    ORDERLY = "end of chunked body"
    CUT = "connection lost within the body"


class MessageSplitter:
    """Splits the body of an event stream into messages, each with its closing blank line."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """Bytes of a message that isn't complete yet."""
        return self._rest

    def feed(self, data: bytes) -> list[bytes]:
        """Process bytes of the body; return the messages that they complete.

        A line ``:`` before a message is pgrealtime's keep-alive and left out. Inside a message it
        would be an error, so it stays there and makes the comparison fail.
        """
        self._rest += data
        messages: list[bytes] = []
        while True:
            while self._rest.startswith(b":\n"):
                self._rest = self._rest[2:]
            end = self._rest.find(b"\n\n")
            if end < 0:
                return messages
            messages.append(self._rest[: end + 2])
            self._rest = self._rest[end + 2 :]


class EventStream:
    """One open connection; a task of its own reads it, so that nothing waits in the kernel."""

    def __init__(
        self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str
    ) -> None:
        self.head = head
        self._reader = reader
        self._writer = writer
        self._splitter = MessageSplitter()
        self._messages: deque[bytes] = deque()
        self._end: End | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read(), name=f"event stream {name}")

    @classmethod
    async def open(cls, request: Request, to: Address, name: str) -> EventStream:
        """Send the request and return once the head has come."""
        reader, writer = await _connect(request, to)
        writer.write(request.encode(f"{to.host}:{to.port}", close=False))
        return cls(await read_head(reader), reader, writer, name)

    @property
    def end(self) -> End | None:
        """How the stream ended, or None while it is open."""
        return self._end

    @property
    def waiting(self) -> tuple[bytes, ...]:
        """Messages that have arrived and were not taken yet."""
        return tuple(self._messages)

    @property
    def rest(self) -> bytes:
        """Bytes of a message that isn't complete yet."""
        return self._splitter.rest

    async def wait_messages(self, count: int, seconds: float) -> tuple[bytes, ...]:
        """Return the first ``count`` messages without taking them.

        Fewer if time or the stream ends.
        """
        await self._wait(lambda: len(self._messages) >= count, seconds)
        return self.waiting[:count]

    async def take(self, count: int, seconds: float) -> tuple[bytes, ...]:
        """Return the next ``count`` messages; fewer if time or the stream ends."""
        messages = await self.wait_messages(count, seconds)
        for _ in messages:
            self._messages.popleft()
        return messages

    async def wait_end(self, seconds: float) -> End | None:
        """Return how the stream ended, or None if it is still open after ``seconds``."""
        await self._wait(lambda: False, seconds)
        return self._end

    async def wait_noise(self, seconds: float) -> bool:
        """Return whether a byte of a message or the end arrived within ``seconds``."""
        await self._wait(lambda: bool(self._messages or self.rest), seconds)
        return bool(self._messages or self.rest or self._end)

    async def close(self) -> None:
        """Close the socket, as a client does."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def _wait(self, is_enough: Callable[[], bool], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not is_enough() and self._end is None:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass

    async def _read(self) -> None:
        try:
            while chunk := await read_chunk(self._reader):
                self._messages.extend(self._splitter.feed(chunk))
                self._news.set()
            self._end = End.ORDERLY
        except (ProtocolError, asyncio.IncompleteReadError, ConnectionError):
            self._end = End.CUT
        finally:
            self._news.set()
