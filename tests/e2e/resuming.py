"""A plain EventSource in this process: reconnects with its last id, subscribes, keeps all ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from tests.conformance.http_client import Address, EventStream, ProtocolError, Request
from tests.e2e.listener import Caller, Listener, parse

PAUSE_SECONDS = 0.05


class ResumingClient:
    """One client; ``numbers`` and ``ids`` are those of the events, in the order of arrival."""

    def __init__(self, address: Address, topic: str, last_id: str = "") -> None:
        self._address = address
        self._topic = topic
        self._last_id = last_id
        self.numbers: list[int] = []
        self.ids: list[str] = []
        self.gaps: list[str] = []
        self.tags: list[str] = []
        """Of the processes that held its connections."""
        self.is_subscribed = asyncio.Event()
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Connect again whenever the connection ends, for ever."""
        while True:
            with suppress(OSError, ProtocolError, asyncio.IncompleteReadError, ValueError):
                await self._listen()
            self.is_subscribed.clear()
            await asyncio.sleep(PAUSE_SECONDS)  # as an EventSource waits

    async def _listen(self) -> None:
        headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
        request = Request(method="GET", path="/api/realtime?lastEventId=", headers=headers)
        stream = await EventStream.open(request, self._address, "resuming")
        try:
            while messages := await stream.take(1, 60):
                message = parse(messages[0])
                self._last_id = message.id or self._last_id
                if message.event == "PB_CONNECT":
                    await self._subscribe(stream, message.data["clientId"])
                elif message.event == "PB_RESYNC":
                    self.gaps.append(message.data["reason"])
                elif message.event == self._topic:
                    self.numbers.append(message.data["record"]["n"])
                    self.ids.append(message.id.rpartition(".")[2])
                self._news.set()
        finally:
            await stream.close()

    async def _subscribe(self, stream: EventStream, client_id: str) -> None:
        self.tags.append(client_id[:6])
        listener = Listener(stream, self._address, Caller())
        listener.client_id = client_id
        if await listener.subscribe(self._topic) != 204:
            raise ValueError("refused")
        self.is_subscribed.set()

    async def wait_for(self, last: int, seconds: float) -> None:
        """Return when the number has arrived."""
        async with asyncio.timeout(seconds):
            while last not in self.numbers[-1:]:
                self._news.clear()
                await self._news.wait()

    def check(self, last: int) -> None:
        """Check that every number came, once and in order, and that no gap was told."""
        assert not self.gaps
        assert self.numbers == list(range(1, last + 1))
        assert self.ids == sorted(set(self.ids))


@asynccontextmanager
async def resuming(
    address: Address, topic: str, count: int
) -> AsyncIterator[Sequence[ResumingClient]]:
    """Run so many clients, which are subscribed."""
    clients = [ResumingClient(address, topic) for _ in range(count)]
    async with AsyncExitStack() as stack:
        tasks = [asyncio.create_task(client.run()) for client in clients]

        async def end() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        stack.push_async_callback(end)
        async with asyncio.timeout(20):
            for client in clients:
                await client.is_subscribed.wait()
        yield clients
