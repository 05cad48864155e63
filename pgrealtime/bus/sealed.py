"""What buses have in common that others can listen to: calls, their answers, and the seal.

``bus.postgres`` and ``bus.nats`` say how the parts of a message travel, and who is there.
"""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import structlog

from pgrealtime.bus.base import Answerer
from pgrealtime.bus.seal import (
    LARGE_BYTES,
    MESSAGE_ID_BYTES,
    Envelope,
    Kind,
    Opened,
    Opener,
    derive_key,
    is_compressed,
    seal,
    unpack,
)
from pgrealtime.errors import BusError, HolderGoneError, HolderSilentError

log = structlog.get_logger(__name__)

SILENCE_SECONDS: Final = 15.0
"""How long an answer is waited for: the barrier of a subscribe call may take 10."""
GONE_SECONDS: Final = 3.0
"""A process that was not seen for so long has ended, or lost the bus."""
_RETRY_SECONDS: Final = 0.2
_STRANGER_HINT: Final = "Somebody else writes to the bus, or a replica has another cluster.secret."
_OVERLOADED_HINT: Final = "Other processes pass on more calls than this one can carry out."
_MAX_SERVED_BYTES: Final = 64 * 1024 * 1024
"""Requests of others that are being answered; further ones are refused."""


@dataclass(eq=False, slots=True)
class PendingCall:
    """A request whose answer is waited for."""

    tag: str
    """Of the process that shall answer."""
    answer: asyncio.Future[bytes]
    seen_at: float
    """When that process was there, in monotonic seconds."""

    def succeed(self, answer: bytes) -> None:
        """End the wait with an answer, unless it has ended."""
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        """End the wait with an error, unless it has ended."""
        if not self.answer.done():
            self.answer.set_exception(error)


class SealedBus(ABC):
    """A process on a bus.

    Args:
        name: Of the cluster; others of this name on the same bus need the same secret.
        secret: Of the cluster.
        tag: Of this process.
        silence_seconds: How long an answer is waited for.
        gone_seconds: How long a process that was called may be missing.
    """

    def __init__(
        self, *, name: str, secret: str, tag: str, silence_seconds: float, gone_seconds: float
    ) -> None:
        self.tag = tag
        self._ignored: Counter[str] = Counter()
        self._key = derive_key(secret, name)
        self._silence_seconds = silence_seconds
        self._gone_seconds = gone_seconds
        self._opener = Opener(self._key, tag, lambda message_id: message_id in self._calls)
        self._calls: dict[bytes, PendingCall] = {}
        """By the id of the request."""
        self._settled_at = float("-inf")
        """From then on a process that is missing has gone: after a restart of what carries the bus
        each of them comes back at its own time."""
        self._answer: Answerer | None = None
        self._served: set[asyncio.Task[None]] = set()
        self._served_bytes = 0

    @property
    def ignored(self) -> Mapping[str, int]:
        """Numbers of messages that were ignored, by the error's code."""
        return self._ignored

    def serve(self, answer: Answerer) -> None:
        """Answer requests of the other processes from now on."""
        self._answer = answer

    async def call(self, tag: str, request: bytes) -> bytes:
        """Have another process answer a request; see ``Bus.call``."""
        try:
            async with asyncio.timeout(self._silence_seconds):
                while True:
                    try:
                        return await self._ask(tag, request)
                    except HolderGoneError:
                        if time.monotonic() >= self._settled_at:
                            raise
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError:
            reason = f"the holder gave no answer in {self._silence_seconds:g} s"
            raise HolderSilentError(reason) from None

    async def _ask(self, tag: str, request: bytes) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        message_id = secrets.token_bytes(MESSAGE_ID_BYTES)
        self._calls[message_id] = PendingCall(tag, answer, time.monotonic())
        try:
            await self._send(Kind.REQUEST, message_id, tag, request)
            return await answer
        finally:
            del self._calls[message_id]

    async def _send(self, kind: Kind, message_id: bytes, recipient: str, data: bytes) -> None:
        envelope = Envelope(kind=kind, message_id=message_id, sender=self.tag, recipient=recipient)
        now_ms, part_bytes = self._now_ms(), self._part_bytes()
        if len(data) < LARGE_BYTES:
            parts = seal(self._key, envelope, data, now_ms=now_ms, part_bytes=part_bytes)
        else:
            parts = await asyncio.to_thread(
                seal, self._key, envelope, data, now_ms=now_ms, part_bytes=part_bytes
            )
        await self._transmit(envelope, parts)

    @abstractmethod
    def _now_ms(self) -> int:
        """Return the time, by a clock that all processes share."""

    @abstractmethod
    def _part_bytes(self) -> int:
        """Return how large a part may be.

        Raises:
            HolderSilentError: The bus is not connected.
        """

    @abstractmethod
    async def _transmit(self, envelope: Envelope, parts: Sequence[bytes]) -> None:
        """Send the parts of a message.

        Raises:
            HolderSilentError: The bus is not connected.
        """

    def _fail_calls(self, reason: str) -> None:
        """End all calls: whether they, or their answers, got through isn't known."""
        self._opener.clear()
        for call in self._calls.values():
            call.fail(HolderSilentError(reason))

    def _fail_unseen_calls(self) -> None:
        """End the calls to processes that were not seen for too long."""
        now = time.monotonic()
        for call in self._calls.values():
            if now - call.seen_at >= self._gone_seconds:
                call.fail(HolderGoneError(call.tag))

    def _receive(self, part: bytes) -> str:
        """Take a part that came; return the code if it is ignored, else nothing."""
        try:
            opened = self._opener.open(part, now_ms=self._now_ms())
        except BusError as error:
            self._ignore(error.error_code)
            return error.error_code
        if opened is None:
            return ""
        if opened.envelope.kind is Kind.REQUEST:
            task = asyncio.create_task(self._serve(opened))
            self._served.add(task)
            task.add_done_callback(self._served.discard)
            return ""
        return self._end_call(self._calls[opened.envelope.message_id], opened)

    def _end_call(self, call: PendingCall, opened: Opened) -> str:
        if opened.envelope.kind is Kind.REFUSAL:
            call.fail(HolderSilentError("the holder refuses to answer more calls"))
            return ""
        try:
            call.succeed(unpack(opened.content))  # which is short
        except BusError as error:
            self._ignore(error.error_code)
            call.fail(error)
            return error.error_code
        return ""

    def _ignore(self, code: str) -> None:
        self._ignored[code] += 1
        if self._ignored[code] == 1:
            hint = _OVERLOADED_HINT if code == "call_refused" else _STRANGER_HINT
            log.warning("bus.message_ignored", code=code, hint=hint)

    async def _serve(self, opened: Opened) -> None:
        kind, answer = Kind.REFUSAL, b""
        try:
            answer = await self._answer_to(opened.content)
            kind = Kind.ANSWER
        except BusError as error:
            self._ignore(error.error_code)
        envelope = opened.envelope
        with suppress(HolderSilentError):  # the caller waits no more once its own connection broke
            await self._send(kind, envelope.message_id, envelope.sender, answer)

    async def _answer_to(self, content: bytes) -> bytes:
        """Return the answer to a request.

        Raises:
            BusError: It can't be unpacked, or too much is being answered (``call_refused``).
        """
        with self._serving(len(content)):
            if is_compressed(content):
                data = await asyncio.to_thread(unpack, content)
            else:
                data = unpack(content)
        with self._serving(len(data)):
            if self._answer is None:
                raise BusError("this process doesn't answer calls yet", code="call_refused")
            return await self._answer(data)

    @contextmanager
    def _serving(self, size: int) -> Iterator[None]:
        """Count the bytes of a request for the duration of the block."""
        if self._served_bytes + size > _MAX_SERVED_BYTES:
            raise BusError("too many calls are being answered", code="call_refused")
        self._served_bytes += size
        try:
            yield
        finally:
            self._served_bytes -= size

    def _cancel_served(self) -> None:
        for task in self._served:
            task.cancel()
