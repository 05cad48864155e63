"""A process that sends the same requests again and again, the same for every server.

It is the child of ``reads.Requests``, which sends commands as lines of JSON to its standard input.
One thread and one epoll for some connections that are kept open; an answer is read to its end and
not parsed, so that both servers share their core with as little as possible.
"""

from __future__ import annotations

import gc
import json
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

_BUFFER = 1024 * 1024
_HEAD_END = b"\r\n\r\n"
_CHUNKS_END = b"0\r\n\r\n"


class Caller:
    """A connection, and the answer that it waits for."""

    __slots__ = ("_chunked_tail", "_head", "_missing", "began", "socket", "steps")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.steps: list[bytes] = []
        """The requests of an operation that are left, the next one last."""
        self.began = 0
        self._head = b""
        self._missing: int | None = None
        self._chunked_tail = b""

    def start(self, operation: Sequence[bytes]) -> None:
        """Begin an operation: requests, each sent once the one before is answered."""
        self.steps = list(reversed(operation))
        self.began = time.perf_counter_ns()
        self.send_next()

    def send_next(self) -> None:
        """Send the next request."""
        self._head, self._missing, self._chunked_tail = b"", None, b""
        self.socket.sendall(self.steps.pop())

    def is_answered_by(self, piece: memoryview) -> bool:
        """Take a piece of the answer; return whether it was the last."""
        if self._missing is None and not self._chunked_tail:
            self._head += piece
            head, found, body = self._head.partition(_HEAD_END)
            if not found:
                return False
            if head.startswith(b"HTTP/1.1 204"):
                return True
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(f"the answer was {bytes(self._head[:2000])!r}")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            if length:
                self._missing = int(length) - len(body)
                return self._missing == 0
            self._chunked_tail = (b"\0" * 5 + body)[-5:]
        elif self._missing is not None:
            self._missing -= len(piece)
            return self._missing == 0
        else:
            self._chunked_tail = (self._chunked_tail + piece[-5:])[-5:]
        return self._chunked_tail == _CHUNKS_END


def run(
    port: int, operations: Sequence[Sequence[str]], callers: int, seconds: float, most: int
) -> dict[str, Any]:
    """Repeat the operations in turn; return the milliseconds that each took, and all seconds.

    Args:
        port: Of 127.0.0.1.
        operations: Requests as they are sent; those of one operation follow each other.
        callers: Connections, each with one request under way.
        seconds: When to begin no more operations; those under way are waited for.
        most: How many operations to begin at most.
    """
    encoded = [[step.encode() for step in operation] for operation in operations]
    epoll = select.epoll()
    opened = {caller.socket.fileno(): caller for caller in (Caller(port) for _ in range(callers))}
    milliseconds: list[float] = []
    begun, began = 0, time.perf_counter()
    busy = 0
    for number, caller in opened.items():
        epoll.register(number, select.EPOLLIN)
        caller.start(encoded[begun % len(encoded)])
        begun += 1
        busy += 1
    buffer = bytearray(_BUFFER)
    view = memoryview(buffer)
    while busy:
        for number, _ in epoll.poll():
            caller = opened[number]
            size = caller.socket.recv_into(buffer)
            if not size:
                raise ConnectionError("the server closed a connection")
            if not caller.is_answered_by(view[:size]):
                continue
            if caller.steps:
                caller.send_next()
                continue
            milliseconds.append((time.perf_counter_ns() - caller.began) / 1e6)
            if begun < most and time.perf_counter() - began < seconds:
                caller.start(encoded[begun % len(encoded)])
                begun += 1
            else:
                busy -= 1
    taken = time.perf_counter() - began
    for caller in opened.values():
        caller.socket.close()
    return {"milliseconds": milliseconds, "seconds": taken}


def main() -> None:
    """Serve the parent until it closes our standard input."""
    gc.disable()
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(run(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
