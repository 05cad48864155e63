"""One end of the socket pair between the main process and a worker: questions and answers.

Frames go over a socket pair of their own, so that a worker that has enough to do with them still
answers.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

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

Answering: TypeAlias = Coroutine[Any, Any, Message | None] | asyncio.Future[Message] | None
"""What answers a message: itself, what another process answers, or nothing."""


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

    ``answer`` returns what answers a message. A ``PgRealtimeError`` goes back as such.
    """

    def __init__(self, answer: Callable[[Message], Answering]) -> None:
        self._answer = answer
        self._transport: asyncio.WriteTransport | None = None
        self._splitter = MessageSplitter()
        self._unsent: list[bytes] = []
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
        self.give_up()
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
        answer = await self.ask_soon(message)
        if isinstance(answer, Failed):
            raise answer.as_error()
        assert isinstance(answer, answer_type)
        return answer

    def ask_soon(self, message: Message) -> asyncio.Future[Message]:
        """Send a message; return a future of its answer, which may be a ``Failed``.

        Raises:
            WorkerGoneError: The other process has ended. Or the future has it.
        """
        if self._transport is None:
            raise _gone_error()
        self._asked += 1
        waiting: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[self._asked] = waiting
        self._send(Envelope(message, question=self._asked))
        return waiting

    def give_up(self) -> None:
        """Wait for no answer to what was asked: ``WorkerGoneError``."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_gone_error())
                waiting.exception()  # whoever asked may have given up before
        self._waiting.clear()

    def close(self) -> None:
        """Close the socket once what was told is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _send(self, envelope: Envelope) -> None:
        if self._transport is not None:
            data = encode_envelope(envelope)
            if not self._unsent:
                # Many calls are passed on at once: one write for all of them.
                asyncio.get_running_loop().call_soon(self._flush)
            self._unsent += (len(data).to_bytes(LENGTH_BYTES), data)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None and unsent:
            self._transport.write(b"".join(unsent))

    def _receive(self, envelope: Envelope) -> None:
        if envelope.answers:
            waiting = self._waiting.pop(envelope.answers, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(envelope.message)
            return
        question = envelope.question
        try:
            answering = self._answer(envelope.message)
        except Exception as error:  # noqa: BLE001 (sent back)
            self._send_answer(question, _failure(error))
            return
        if answering is None:
            self._send_answer(question, Done())
        elif isinstance(answering, asyncio.Future):
            answering.add_done_callback(partial(self._pass_back, question))
        else:
            task = asyncio.create_task(self._answer_with(question, answering))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer_with(
        self, question: int, answering: Coroutine[Any, Any, Message | None]
    ) -> None:
        try:
            answer = await answering or Done()
        except Exception as error:  # noqa: BLE001 (sent back)
            answer = _failure(error)
        self._send_answer(question, answer)

    def _pass_back(self, question: int, answered: asyncio.Future[Message]) -> None:
        if not answered.cancelled():
            error = answered.exception()
            self._send_answer(question, answered.result() if error is None else _failure(error))

    def _send_answer(self, question: int, answer: Message) -> None:
        if question:
            self._send(Envelope(answer, answers=question))


def _failure(error: BaseException) -> Failed:
    if isinstance(error, PgRealtimeError):
        return Failed.of(error)
    # A defect; the other process must not wait for ever.
    name = type(error).__name__
    log.error("worker.message_failed", error=name, at=raise_location(error))
    return Failed(PgRealtimeError.code, "a message can't be answered", detail=name)


def _gone_error() -> WorkerGoneError:
    return WorkerGoneError("the other process has ended")
