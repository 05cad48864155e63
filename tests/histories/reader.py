"""Clients in memory: what was written to each, what it read of that, and where it resumed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pgrealtime.auth.principal import Caller
from pgrealtime.errors import PgRealtimeError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.hub import Hub
from pgrealtime.lsn import Cursor, parse_position
from tests.histories.ledger import ROOT, Ledger, Person
from tests.histories.scene import Rule
from tests.topics import topic

Kind: TypeAlias = Literal["position", "cursor", "resync", "plain"]
"""With ids; with PB_CURSOR, as the SDK does; without ids but with PB_RESYNC; without any."""

_PAUSE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """A topic in its parts."""

    collection: str
    record_id: str = ""
    """Empty for all of the collection."""
    filter: Rule | None = None
    fields: tuple[str, ...] = ()
    """Empty for all fields."""
    expand: bool = False

    @property
    def text(self) -> str:
        """The topic as it is submitted."""
        query: dict[str, str] = {}
        if self.filter is not None:
            query["filter"] = self.filter.text
        if self.fields:
            query["fields"] = ",".join(self.fields)
        if self.expand:
            query["expand"] = "owner,team,liked_by"
        return topic(f"{self.collection}/{self.record_id or '*'}", **query)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message that a client was sent.

    Attributes:
        position: The position in its id; None if it has none.
        begun: The last commit sent before the message was written.
        at: The time of that, in monotonic seconds.
        visible: The last commit that readers saw then; of gaps only.
    """

    event: str
    data: Any
    id: str
    position: Cursor | None
    begun: int
    at: float
    visible: int = 0


@dataclass(eq=False)
class Stream:
    """One connection of a client.

    Attributes:
        messages: What was written to it.
        after: The last commit acknowledged before it subscribed.
        upto: The last one sent before its call was answered; None if it never was.
        taken: How many messages the client read before it left.
        goes_on: Whether it resumed from a position.
    """

    goes_on: bool
    messages: list[Message] = field(default_factory=list)
    after: int = 0
    upto: int | None = None
    taken: int | None = None
    is_ended: bool = False
    """Whether the program ended it."""
    ended_at: float = 0.0

    @property
    def received(self) -> list[Message]:
        """The messages that the client has read of it."""
        return self.messages[: self.taken]


class _Sink:
    """A sink that accepts everything at once, or nothing while it is stuck."""

    def __init__(self, client: Client, stream: Stream) -> None:
        self._client, self._stream = client, stream
        self.is_stuck = False
        self._waiting = 0
        self.messages_taken = 0
        self._freed = asyncio.Event()
        self.arrived = asyncio.Event()

    def write(self, data: bytes) -> None:
        assert not self._stream.is_ended, "written to after its end"
        self._client.take(self._stream, data)
        if self.is_stuck:
            self._waiting += len(data)
        else:
            self.messages_taken = len(self._stream.messages)
        self.arrived.set()

    def buffered_bytes(self) -> int:
        return self._waiting

    async def drain(self) -> None:
        while self._waiting:
            self._freed.clear()
            await self._freed.wait()

    def close(self) -> None:
        self._stream.is_ended = True
        self._stream.ended_at = time.monotonic()
        self.arrived.set()

    abort = close

    def free(self) -> None:
        self.is_stuck, self._waiting = False, 0
        self.messages_taken = len(self._stream.messages)
        self._freed.set()


class Client:
    """A subscriber that reconnects whenever it has to.

    Args:
        hub: The hub that it connects to.
        ledger: Knows which commits were sent and acknowledged.
        admit: Makes the caller of a user.
        look: Returns the last commit that readers see, at once.
    """

    def __init__(
        self,
        hub: Hub,
        ledger: Ledger,
        *,
        person: Person,
        kind: Kind,
        topics: tuple[Topic, ...],
        admit: Callable[[Person], Awaitable[Caller]],
        look: Callable[[], int],
    ) -> None:
        self.ledger, self.person, self.kind, self.topics = ledger, person, kind, topics
        self.streams: list[Stream] = []
        self.by_text = {topic.text: topic for topic in topics}
        self._hub, self._admit, self._look = hub, admit, look
        self._connection: Connection | None = None
        self._sink: _Sink | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_id = ""

    def __str__(self) -> str:
        topics = " ".join(topic.text for topic in self.topics)
        return f"{self.kind} {self.person or 'guest'} of {topics}"

    @property
    def resumes(self) -> bool:
        """Whether it keeps positions."""
        return self.kind in ("position", "cursor")

    def take(self, stream: Stream, data: bytes) -> None:
        """Record what is written to it."""
        for text in data.decode().split("\n\n"):
            lines = dict(line.split(":", 1) for line in text.split("\n") if ":" in line[1:])
            if "event" not in lines:
                continue
            event = lines["event"]
            position = parse_position(lines["id"].rpartition(".")[2])
            message = Message(
                event=event,
                data=json.loads(lines["data"]),
                id=lines["id"],
                position=None if position is None else position.cursor,
                begun=self.ledger.begun,
                at=time.monotonic(),
                visible=self._look() if event == "PB_RESYNC" else 0,
            )
            stream.messages.append(message)

    # --- what it does

    def connect(self) -> None:
        """Open a connection and subscribe, unless that is done or being done."""
        if self._task is None or self._task.done():
            if self._task is not None:
                self._task.result()
            if not self.is_served:
                self._task = asyncio.create_task(self._connect())

    @property
    def is_served(self) -> bool:
        """Whether it has a connection whose subscriptions are in force."""
        return (
            self._connection is not None
            and bool(self.streams)
            and self.streams[-1].upto is not None
            and not self.streams[-1].is_ended
        )

    async def wait_served(self) -> None:
        """Return once it is served."""
        while not self.is_served:
            self.connect()
            assert self._task is not None
            await self._task

    async def _connect(self) -> None:
        with suppress(PgRealtimeError):
            await self._open()
            return
        self._leave(None)
        await asyncio.sleep(_PAUSE)

    async def _open(self) -> None:
        self._leave(None)  # ended by the program: the client has all that it read of it
        goes_on = self.resumes and bool(self._last_id)
        stream = Stream(goes_on)
        sink = self._sink = _Sink(self, stream)
        header = self._last_id if goes_on and self.kind == "position" else None
        is_first_of_sdk = self.kind == "cursor" and not goes_on
        query = self._last_id if self.resumes and not header and not is_first_of_sdk else None
        connection = self._connection = self._hub.open_connection(
            sink, address="127.0.0.1", last_event_id=header, position=query
        )
        self.streams.append(stream)
        async with asyncio.timeout(20):
            while not stream.messages and not stream.is_ended:
                sink.arrived.clear()
                await sink.arrived.wait()
        stream.after = self.ledger.done
        caller = await self._admit(self.person)
        own = {"cursor": ("PB_CURSOR", "PB_RESYNC"), "resync": ("PB_RESYNC",)}.get(self.kind, ())
        texts = [topic.text for topic in self.topics]
        await self._hub.subscribe(connection.id, [*texts, *own], caller, "127.0.0.1")
        stream.upto = self.ledger.begun

    def stall(self) -> None:
        """Stop reading for now."""
        if self._sink is not None:
            self._sink.is_stuck = True

    def go_on(self) -> None:
        """Read what waits."""
        if self._sink is not None:
            self._sink.free()

    async def break_off(self, choose: Callable[[int], int]) -> None:
        """Lose the connection, with some of what was sent still on its way.

        Args:
            choose: Given the number of messages that may be lost, returns how many are.
        """
        if self._task is not None and not self._task.done():
            return
        if self._connection is None or not self.is_served or self._sink is None:
            return
        taken = self._sink.messages_taken
        if taken == 0:
            return  # it must have PB_CONNECT to subscribe
        self._leave(taken - choose(taken - 1))

    def _leave(self, taken: int | None) -> None:
        if self._connection is not None:
            if self._connection.close_reason and not self.streams[-1].is_ended:
                # The program was about to end it, after the minimum time of a connection.
                self.streams[-1].is_ended, self.streams[-1].ended_at = True, time.monotonic()
            self._hub.remove_connection(self._connection)
            self._connection = None
        if not self.streams:
            return
        stream = self.streams[-1]
        if taken is None and self._sink is not None:
            taken = self._sink.messages_taken
        if stream.taken is None:
            stream.taken = taken
            for message in stream.received:
                if message.position is not None:
                    self._last_id = message.id
                elif self.resumes and message.event != "PB_CONNECT":
                    raise AssertionError(f"no position: {message}")

    async def wait_received(self, is_it: Callable[[Message], bool], since: int) -> bool:
        """Wait for a message on the current connection.

        Args:
            is_it: Selects the message.
            since: The number of messages when it was caused.

        Returns:
            Whether it came before the end, and before a gap that may cover it.
        """
        stream, sink = self.streams[-1], self._sink
        assert sink is not None
        while True:
            sink.arrived.clear()
            for message in stream.messages[since:]:
                if is_it(message):
                    return True
                if message.event == "PB_RESYNC" and not message.data["collections"]:
                    return False
            since = len(stream.messages)
            if stream.is_ended:
                self._leave(None)
                return False
            await sink.arrived.wait()

    async def close(self) -> None:
        """Disconnect for good."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._leave(None)

    def mind_end(self) -> None:
        """Reconnect if the program ended the connection."""
        if self.streams and self.streams[-1].is_ended and (self._task is None or self._task.done()):
            self._leave(None)
            self.connect()


__all__ = ["ROOT", "Client", "Kind", "Message", "Stream", "Topic"]
