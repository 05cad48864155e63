"""A process that holds many event streams open and counts messages, the same for every server.

It is the child of ``listeners.Listeners``, which sends commands as lines of JSON to its standard
input. One thread, one epoll, one receive and one count of blank lines per readable socket: cheap
enough not to affect the measurement. Nothing is parsed once the streams are open.
"""

from __future__ import annotations

import gc
import json
import re
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

_BUFFER = 256 * 1024
_AT_ONCE = 64
"""Streams being opened, or calls under way, at a time."""
_CALLERS = 8
_LINE_FEED = 10
_CLIENT_ID = re.compile(rb'"clientId":"([^"]+)"')


class Stream:
    """One open stream.

    Attributes:
        seen: Messages so far.
        is_amid: Whether the last byte was a line feed, so that a blank line may be split.
    """

    __slots__ = ("client_id", "is_amid", "seen", "socket")

    def __init__(self, opened: socket.socket, client_id: str) -> None:
        self.socket = opened
        self.client_id = client_id
        self.seen = 0
        self.is_amid = False


class Listening:
    """The streams, and the messages counted since ``aim``."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._streams: dict[int, Stream] = {}
        self._buffer = bytearray(_BUFFER)
        self._total = 0
        self._goal = 0
        self._lost = 0
        self._reached_at = 0
        self._arrivals: list[tuple[int, int, int]] | None = None

    # --- commands of the parent ---------------------------------------------------------

    def open(
        self, port: int, topics: Sequence[Sequence[str]], tokens: Sequence[str]
    ) -> dict[str, float]:
        """Open a stream per list of topics and subscribe it; tokens belong to them in turn."""
        began = time.perf_counter()
        opened = _opened(port, len(topics))
        connected = time.perf_counter()
        calls = [
            subscribe_call(port, stream.client_id, names, token)
            for stream, names, token in zip(opened, topics, cycle(tokens or [""]), strict=False)
        ]
        _send_all(port, calls)
        subscribed = time.perf_counter()
        self._watch(opened)
        return {"connect_seconds": connected - began, "subscribe_seconds": subscribed - connected}

    def connect(self, port: int, count: int) -> dict[str, list[str]]:
        """Open streams without subscribing them; return their client ids."""
        opened = _opened(port, count)
        self._watch(opened)
        return {"client_ids": [stream.client_id for stream in opened]}

    def _watch(self, opened: Sequence[Stream]) -> None:
        for stream in opened:
            stream.socket.setblocking(False)
            self._streams[stream.socket.fileno()] = stream
            self._epoll.register(stream.socket, select.EPOLLIN)

    def aim(self, messages: int, *, notes: bool) -> dict[str, int]:
        """Reset the counter, and expect so many messages.

        ``notes`` keeps when each of them came.
        """
        self._total, self._goal, self._reached_at = 0, messages, 0
        self._arrivals = [] if notes else None
        for stream in self._streams.values():
            stream.seen = 0
        return {}

    def expect(self, messages: int) -> dict[str, int]:
        """Set the target to so many, counted since ``aim``."""
        self._goal = messages
        if self._total >= messages:
            self._reached_at = time.monotonic_ns()
        return {}

    def wait(self, seconds: float) -> dict[str, int]:
        """Return once the target is reached, or the time is over."""
        deadline = time.monotonic() + seconds
        while self._total < self._goal and time.monotonic() < deadline:
            self.receive(0.1)
        return {"messages": self._total, "at": self._reached_at, "lost": self._lost}

    def latencies(self, sent: Sequence[int], quantiles: Sequence[float]) -> dict[str, list[float]]:
        """Return quantiles of the milliseconds from ``sent`` (monotonic ns) to each arrival.

        The n-th message of a stream is the n-th that was sent: for rules that admit all.
        """
        waits: list[int] = []
        for now, start, count in self._arrivals or ():
            waits += [now - sent[place] for place in range(start, start + count)]
        waits.sort()
        last = len(waits) - 1
        return {"milliseconds": [waits[round(q * last)] / 1e6 for q in quantiles] if waits else []}

    def close(self) -> dict[str, int]:
        """Close all streams."""
        for stream in self._streams.values():
            stream.socket.close()
        self._streams.clear()
        return {}

    # --- receiving ------------------------------------------------------------------------

    def receive(self, seconds: float) -> None:
        """Take what the readable sockets hold, one buffer each."""
        buffer, streams, arrivals = self._buffer, self._streams, self._arrivals
        for number, _ in self._epoll.poll(seconds):
            stream = streams[number]
            size = stream.socket.recv_into(buffer)
            if not size:
                self._lose(stream)
                continue
            found = buffer.count(b"\n\n", 0, size)
            if stream.is_amid and buffer[0] == _LINE_FEED:
                found += 1
            stream.is_amid = buffer[size - 1] == _LINE_FEED
            if arrivals is not None:
                arrivals.append((time.monotonic_ns(), stream.seen, found))
            stream.seen += found
            self._total += found
        if not self._reached_at and self._total >= self._goal:
            self._reached_at = time.monotonic_ns()

    def _lose(self, stream: Stream) -> None:
        self._lost += 1
        self._epoll.unregister(stream.socket)
        del self._streams[stream.socket.fileno()]
        stream.socket.close()


def _opened(port: int, count: int) -> list[Stream]:
    return [
        stream
        for first in range(0, count, _AT_ONCE)
        for stream in _opened_at_once(port, min(_AT_ONCE, count - first))
    ]


def _opened_at_once(port: int, count: int) -> Iterator[Stream]:
    request = b"GET /api/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(count)]
    for connected in sockets:
        connected.sendall(request)
    for connected in sockets:
        text = b""
        while not text.endswith((b"\n\n", b"\n\n\r\n")) or b"PB_CONNECT" not in text:
            piece = connected.recv(4096)
            if not piece:
                raise ConnectionError(f"the stream ended after {text!r}")
            text += piece
        found = _CLIENT_ID.search(text)
        assert found is not None, text
        yield Stream(connected, found[1].decode())


def subscribe_call(port: int, client_id: str, topics: Sequence[str], token: str) -> bytes:
    """Return the request that subscribes a stream to topics."""
    body = json.dumps({"clientId": client_id, "subscriptions": topics})
    authorization = f"Authorization: {token}\r\n" if token else ""
    head = (
        f"POST /api/realtime HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{authorization}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


def _send_all(port: int, requests: Sequence[bytes]) -> None:
    """Send requests over a few connections, each waiting for its answer."""
    callers = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(_CALLERS)]
    for first in range(0, len(requests), _CALLERS):
        busy = list(zip(callers, requests[first : first + _CALLERS], strict=False))
        for caller, request in busy:
            caller.sendall(request)
        for caller, _ in busy:
            answer = b""
            while b"\r\n\r\n" not in answer:
                piece = caller.recv(4096)
                answer += piece or b"(end)\r\n\r\n"
            if not answer.startswith(b"HTTP/1.1 204"):
                raise ConnectionError(f"a subscribe call was answered {answer!r}")
    for caller in callers:
        caller.close()


def main() -> None:
    """Serve the parent until it closes our standard input."""
    gc.disable()
    listening = Listening()
    commands: dict[str, Any] = {
        "open": listening.open,
        "connect": listening.connect,
        "aim": listening.aim,
        "expect": listening.expect,
        "wait": listening.wait,
        "latencies": listening.latencies,
        "close": listening.close,
    }
    parent = select.poll()
    parent.register(sys.stdin.buffer, select.POLLIN)
    while True:
        while not parent.poll(0):
            listening.receive(0.005)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        name, arguments = json.loads(line)
        sys.stdout.write(json.dumps(commands[name](**arguments)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
