"""One end of the socket pair between the main process and a worker: questions and answers.

Frames go over a socket pair of their own, so that a worker that has enough to do with them still
answers.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import structlog

from pgrealtime.errors import PgRealtimeError, WorkerGoneError
from pgrealtime.observe.redact import raise_location
from pgrealtime.workers.messages import (
    Done,
    Envelope,
    Failed,
    Message,
    decode_envelope,
    encode_envelope,
)

log = structlog.get_logger(__name__)

LENGTH_BYTES = 4
"""Of the length before each message: unsigned, big endian."""

_M = TypeVar("_M")


class MessageSplitter:
    """Cuts received bytes into what was sent with a length before it."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take received bytes; return what is complete."""
        self._buffer += data
        complete: list[bytes] = []
        start = 0
        while len(self._buffer) >= start + LENGTH_BYTES:
            begin = start + LENGTH_BYTES
            end = begin + int.from_bytes(self._buffer[start:begin])
            if end > len(self._buffer):
                break
            complete.append(bytes(memoryview(self._buffer)[begin:end]))
            start = end
        if start:
            del self._buffer[:start]
        return complete


class Link(asyncio.Protocol):
    """Asks the other process, answers it, and tells it what needs no answer.

    ``answer`` returns the answer to a message; None if it needs none. Its ``PgRealtimeError`` goes
    back as such.
    """

    def __init__(self, answer: Callable[[Message], Awaitable[Message | None]]) -> None:
        self._answer = answer
        self._transport: asyncio.WriteTransport | None = None
        self._splitter = MessageSplitter()
        self._asked = 0
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = asyncio.Event()

    # -- asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Take messages."""
        for message in self._splitter.feed(data):
            self._receive(decode_envelope(message))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the protocol's)
        """The other process has ended: nothing that was asked will be answered."""
        self._transport = None
        self.closed.set()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_gone_error())
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()

    # -- ours

    def tell(self, message: Message) -> None:
        """Send a message that isn't answered; nothing happens if the other process has ended."""
        self._send(Envelope(message))

    async def ask(self, message: Message, answer_type: type[_M]) -> _M:
        """Send a message and return its answer.

        Raises:
            WorkerGoneError: The other process has ended.
            PgRealtimeError: The other process's error, without its class.
        """
        if self._transport is None:
            raise _gone_error()
        self._asked += 1
        number, waiting = self._asked, asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            self._send(Envelope(message, question=number))
            answer = await waiting
        finally:
            self._waiting.pop(number, None)
        if isinstance(answer, Failed):
            raise answer.as_error()
        assert isinstance(answer, answer_type)
        return answer

    def close(self) -> None:
        """Close the socket once what was told is sent."""
        if self._transport is not None:
            self._transport.close()

    def _send(self, envelope: Envelope) -> None:
        if self._transport is not None:
            data = encode_envelope(envelope)
            self._transport.writelines((len(data).to_bytes(LENGTH_BYTES), data))

    def _receive(self, envelope: Envelope) -> None:
        if envelope.answers:
            waiting = self._waiting.get(envelope.answers)
            if waiting is not None and not waiting.done():
                waiting.set_result(envelope.message)
            return
        task = asyncio.create_task(self._answer_to(envelope))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_to(self, envelope: Envelope) -> None:
        try:
            answer = await self._answer(envelope.message) or Done()
        except PgRealtimeError as error:
            answer = Failed.of(error)
        except Exception as error:  # noqa: BLE001 (a defect: the other process must not wait)
            name, at = type(error).__name__, raise_location(error)
            log.error("worker.message_failed", error=name, at=at)  # noqa: TRY400 (at says where)
            answer = Failed(PgRealtimeError.code, "a message can't be answered", detail=name)
        if envelope.question:
            self._send(Envelope(answer, answers=envelope.question))


def _gone_error() -> WorkerGoneError:
    return WorkerGoneError("the other process has ended")
