"""A bus over NATS: each process listens on a subject named after its tag.

A subject that nobody listens to is answered by NATS itself, at once, so a process that has gone is
known without asking others. What travels is sealed as on every bus. ``service.build`` opens it.
"""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from pgrealtime.bus.base import Answerer
from pgrealtime.bus.seal import (
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
from pgrealtime.config.model import LogConfig
from pgrealtime.errors import BusError, HolderGoneError, HolderSilentError
from pgrealtime.log.connection import LogNames, connect
from pgrealtime.log.tasks import end_tasks

log = structlog.get_logger(__name__)

SILENCE_SECONDS: Final = 15.0
"""How long an answer is waited for: the barrier of a subscribe call may take 10."""
GONE_SECONDS: Final = 3.0
"""A process that hasn't said for so long that it is there has ended, or lost NATS."""
_HERE_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 0.2
_HEADER_BYTES: Final = 512
"""Room that a part leaves of the server's ``max_payload``."""
_MAX_SERVED_BYTES: Final = 64 * 1024 * 1024
"""Requests of others that are being answered; further ones are ignored."""
_NO_RESPONDERS: Final = "503"


@dataclass(eq=False, slots=True)
class _Call:
    """A request whose answer is waited for."""

    tag: str
    answer: asyncio.Future[bytes]
    seen_at: float
    """When that process was there, in monotonic seconds."""

    def fail(self, error: Exception) -> None:
        """End the wait with an error, unless it has ended."""
        if not self.answer.done():
            self.answer.set_exception(error)


class NatsBus:
    """A process on the bus, within ``running``.

    Args:
        config: Section ``log``, which names the servers.
        name: Of the cluster.
        secret: Of the cluster.
        tag: Of this process.
        silence_seconds: How long an answer is waited for.
        gone_seconds: How long a process that was called may not be heard.
    """

    def __init__(
        self,
        config: LogConfig,
        *,
        name: str,
        secret: str,
        tag: str,
        silence_seconds: float = SILENCE_SECONDS,
        gone_seconds: float = GONE_SECONDS,
    ) -> None:
        self.tag = tag
        self._ignored: Counter[str] = Counter()
        self._config = config
        self._names = LogNames(name=name)
        self._key = derive_key(secret, name)
        self._silence_seconds = silence_seconds
        self._gone_seconds = gone_seconds
        self._opener = Opener(self._key, tag, lambda message_id: message_id in self._calls)
        self._calls: dict[bytes, _Call] = {}
        """By the id of the request."""
        self._client: Client | None = None
        self._inbox = ""
        self._settled_at = float("-inf")
        """From then on silence means that a process has gone: after a restart of NATS each of them
        comes back at its own time."""
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
        self._calls[message_id] = _Call(tag, answer, time.monotonic())
        try:
            await self._send(Kind.REQUEST, message_id, tag, request)
            return await answer
        finally:
            del self._calls[message_id]

    async def _send(self, kind: Kind, message_id: bytes, recipient: str, data: bytes) -> None:
        client = self._client
        if client is None or not client.is_connected:
            raise HolderSilentError("the bus is not connected to NATS")
        envelope = Envelope(kind=kind, message_id=message_id, sender=self.tag, recipient=recipient)
        parts = seal(
            self._key,
            envelope,
            data,
            now_ms=_now_ms(),
            part_bytes=int(client.max_payload) - _HEADER_BYTES,
        )
        # NATS answers there if nobody listens.
        reply = f"{self._inbox}.{message_id.hex()}" if kind is Kind.REQUEST else ""
        try:
            for part in parts:
                await client.publish(self._names.subject("call", recipient), part, reply=reply)
        except NatsError as error:
            raise HolderSilentError(f"the bus can't send: {type(error).__name__}") from error

    # -- the connection

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run for the duration of the block. Until NATS answers, calls find the bus silent.

        Raises:
            LogError: The credentials can't be read.
        """
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run(), name="bus")
            try:
                yield
            finally:
                await end_tasks([task])

    async def _run(self) -> None:
        async with connect(
            self._config,
            self._names,
            client_name=f"pgrealtime bus {self.tag}",
            on_disconnected=self._on_disconnected,
            on_reconnected=self._on_reconnected,
        ) as client:
            self._inbox = client.new_inbox()
            await client.subscribe(f"{self._inbox}.*", cb=self._on_nobody)
            await client.subscribe(self._names.subject("call", self.tag), cb=self._on_part)
            await client.subscribe(self._names.subject("here"), cb=self._on_here)
            self._on_reconnected()
            self._client = client
            try:
                await self._say_here(client)
            finally:
                self._client = None
                for task in self._served:
                    task.cancel()

    def _on_disconnected(self) -> None:
        self._opener.clear()
        for call in self._calls.values():
            # Whether it, or its answer, got through isn't known.
            call.fail(HolderSilentError("the bus lost its connection to NATS"))

    def _on_reconnected(self) -> None:
        self._settled_at = time.monotonic() + self._gone_seconds

    async def _say_here(self, client: Client) -> None:
        """Say once a second that this process is there, and end calls to those that aren't."""
        while True:
            if client.is_connected:
                with suppress(NatsError):
                    await client.publish(self._names.subject("here"), self.tag.encode())
            await asyncio.sleep(_HERE_SECONDS)
            now = time.monotonic()
            for call in self._calls.values():
                if now - call.seen_at >= self._gone_seconds:
                    call.fail(HolderGoneError(call.tag))

    # -- what comes

    async def _on_here(self, message: Msg) -> None:
        now = time.monotonic()
        for call in self._calls.values():
            if call.tag.encode() == message.data:
                call.seen_at = now

    async def _on_nobody(self, message: Msg) -> None:
        if (message.headers or {}).get("Status") != _NO_RESPONDERS:
            return
        with suppress(ValueError):
            message_id = bytes.fromhex(message.subject.rpartition(".")[2])
            if (call := self._calls.get(message_id)) is not None:
                call.fail(HolderGoneError(call.tag))

    async def _on_part(self, message: Msg) -> None:
        try:
            opened = self._opener.open(message.data, now_ms=_now_ms())
        except BusError as error:
            self._ignore(error.error_code)
            return
        if opened is None:
            return
        if opened.envelope.kind is Kind.REQUEST:
            task = asyncio.create_task(self._serve(opened))
            self._served.add(task)
            task.add_done_callback(self._served.discard)
        elif not (call := self._calls[opened.envelope.message_id]).answer.done():
            # An answer is short.
            try:
                call.answer.set_result(unpack(opened.content))
            except BusError as error:
                self._ignore(error.error_code)

    def _ignore(self, code: str) -> None:
        self._ignored[code] += 1
        if self._ignored[code] == 1:
            hint = "Somebody else writes to the bus, or a replica has another cluster.secret."
            log.warning("bus.message_ignored", code=code, hint=hint)

    async def _serve(self, opened: Opened) -> None:
        content, answer = opened.content, self._answer
        try:
            if is_compressed(content):
                data = await asyncio.to_thread(unpack, content)
            else:
                data = unpack(content)
        except BusError as error:
            self._ignore(error.error_code)
            return
        if answer is None or self._served_bytes + len(data) > _MAX_SERVED_BYTES:
            self._ignore("call_refused")
            return
        self._served_bytes += len(data)
        try:
            answered = await answer(data)
        finally:
            self._served_bytes -= len(data)
        envelope = opened.envelope
        with suppress(HolderSilentError):  # the caller waits no more once its own connection broke
            await self._send(Kind.ANSWER, envelope.message_id, envelope.sender, answered)


def _now_ms() -> int:
    # The clocks of all replicas must agree within seal.FRESH_MS: NATS has none to share.
    return round(time.time() * 1000)
