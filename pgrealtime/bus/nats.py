"""A bus over NATS: each process listens on a subject named after its tag.

A subject that nobody listens to is answered by NATS itself, at once, so a process that has gone is
known without asking others. What travels is sealed as on every bus. ``service.build`` opens it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from pgrealtime.bus.seal import Envelope, Kind
from pgrealtime.bus.sealed import GONE_SECONDS, SILENCE_SECONDS, SealedBus
from pgrealtime.config.model import LogConfig
from pgrealtime.errors import HolderGoneError, HolderSilentError
from pgrealtime.log.connection import LogNames, connect
from pgrealtime.log.tasks import end_tasks

log = structlog.get_logger(__name__)

_HERE_SECONDS: Final = 1.0
_HEADER_BYTES: Final = 512
"""Room that a part leaves of the server's ``max_payload``."""
_NO_RESPONDERS: Final = "503"


class NatsBus(SealedBus):
    """A process on the bus, within ``running``.

    Args:
        config: Section ``log``, which names the servers.
        name: As for ``SealedBus``, like all others.
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
        super().__init__(
            name=name,
            secret=secret,
            tag=tag,
            silence_seconds=silence_seconds,
            gone_seconds=gone_seconds,
        )
        self._config = config
        self._names = LogNames(name=name)
        self._client: Client | None = None
        self._inbox = ""

    def _now_ms(self) -> int:
        # The clocks of all replicas must agree within seal.FRESH_MS: NATS has none to share.
        return round(time.time() * 1000)

    def _part_bytes(self) -> int:
        return int(self._connected().max_payload) - _HEADER_BYTES

    def _connected(self) -> Client:
        client = self._client
        if client is None or not client.is_connected:
            raise HolderSilentError("the bus is not connected to NATS")
        return client

    async def _transmit(self, envelope: Envelope, parts: Sequence[bytes]) -> None:
        client, subject = self._connected(), self._names.subject("call", envelope.recipient)
        # NATS answers there if nobody listens.
        is_request = envelope.kind is Kind.REQUEST
        reply = f"{self._inbox}.{envelope.message_id.hex()}" if is_request else ""
        try:
            for part in parts:
                await client.publish(subject, part, reply=reply)
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
                self._cancel_served()

    def _on_disconnected(self) -> None:
        self._fail_calls("the bus lost its connection to NATS")

    def _on_reconnected(self) -> None:
        self._settled_at = time.monotonic() + self._gone_seconds

    async def _say_here(self, client: Client) -> None:
        """Say once a second that this process is there, and end calls to those that aren't."""
        while True:
            if client.is_connected:
                with suppress(NatsError):
                    await client.publish(self._names.subject("here"), self.tag.encode())
            await asyncio.sleep(_HERE_SECONDS)
            self._fail_unseen_calls()

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
        self._receive(message.data)
