"""A client that checks what it receives: every event once and in order, and every gap notified."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from urllib.parse import quote

from pgrealtime.auth.principal import Caller
from pgrealtime.errors import SubscriptionError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.lsn import LSN, Cursor, parse_position
from tests.unit.hub.simulation import Commit, ExpectedEvent, Simulation, Sink

Kind: TypeAlias = Literal["plain", "resync", "position", "cursor"]
"""How it resumes and is notified of gaps: not at all; by PB_RESYNC alone; by the positions in ids
of messages, as an EventSource; by PB_CURSOR and PB_RESYNC, as the JS SDK."""

REMOTE_FILTER = "?options=" + quote('{"query":{"filter":"geoDistance(id, 2, 3, 4) >= 0"}}')
"""The options of a topic whose filter only PostgreSQL can evaluate. It admits every row."""
TOPICS = (
    *("posts/*", "posts", "posts/a", "posts/b", "notes/*", "notes/a", "nothing/*"),
    *(f"posts/*{REMOTE_FILTER}", f"posts/a{REMOTE_FILTER}"),
)
_EXTRA: dict[Kind, tuple[str, ...]] = {
    "plain": (),
    "resync": ("PB_RESYNC",),
    "position": (),
    "cursor": ("PB_CURSOR", "PB_RESYNC"),
}


def is_about(topic: str, collection: str, record_id: str) -> bool:
    """Whether events of a record belong to a topic."""
    name, _, wanted = topic.partition("?")[0].partition("/")
    return name == collection and wanted in ("", "*", record_id)


@dataclass
class Stream:
    """One connection of a reader, with what it has received."""

    connection: Connection
    sink: Sink
    resumed_at: str
    """The position that it was opened with; empty for none."""
    history: int
    read: int = 0
    """Bytes parsed so far."""
    topics: frozenset[str] = frozenset()
    """By the last answered call; not known while ``is_sure`` is False."""
    is_sure: bool = True
    """Whether no call is waiting for its answer, nor was cancelled since the last answer."""
    answered_at: int = 0
    """Bytes written when the last call was answered."""
    submitted: set[str] = field(default_factory=set)
    """Every topic submitted on this connection."""
    before: dict[str, frozenset[Commit]] = field(default_factory=dict)
    """By topic, the commits visible before the first call with it: no events of them may follow."""
    last_order_key: tuple[int, Cursor, int] = (0, Cursor(LSN(0), 0), 0)
    """Order key of the last event."""
    last_position: str = ""
    received: set[tuple[str, str]] = field(default_factory=set)
    """Topic and tag of each event."""


class Reader:
    """A client that connects again whenever its connection ends.

    It raises ``AssertionError`` for an event that it must not receive. ``missing`` returns the
    events that it should have received.
    """

    def __init__(self, simulation: Simulation, kind: Kind, name: str) -> None:
        self.simulation, self.kind, self.name = simulation, kind, name
        self.wanted: tuple[str, ...] = ()
        self.stream: Stream | None = None
        self.call: asyncio.Task[None] | None = None
        self._reset()

    def _reset(self) -> None:
        """Drop the position and what was received, as a reload of the page does."""
        self.position = ""
        self.since: dict[str, frozenset[Commit]] = {}
        """By topic, the commits visible when its call was answered: it must receive all others."""
        self.received: dict[str, set[str]] = {}
        """By topic, the tags of its events."""
        self.notified_gaps: list[tuple[frozenset[str], frozenset[Commit]]] = []
        """The notified gaps: collections (none: all), and the commits visible at that moment."""

    # --- Actions

    def choose_topics(self) -> None:
        rng = self.simulation.rng
        self.wanted = tuple(rng.sample(TOPICS, rng.randrange(1, 5)))

    def connect(self) -> None:
        if not self._can_resume():
            self._reset()
        position = self.position
        sink = Sink(self.simulation)
        connection = self.simulation.hub.open_connection(
            sink,
            address="here",
            last_event_id=None,
            position=position if position or self.kind == "position" else None,
        )
        self.stream = Stream(connection, sink, position, self.simulation.history)

    def _can_resume(self) -> bool:
        # New topics receive events from the position on. Without a synchronous standby, a commit
        # before it is invisible for an instant only; the simulation draws that instant out, so
        # that a client could resume within it.
        is_safe = self.simulation.is_gated or bool(self.since)
        return self.kind in ("position", "cursor") and bool(self.position) and is_safe

    def submit(self) -> None:
        """Start a call with the wanted topics, in a task of its own."""
        if self.call is None or self.call.done():
            stream = self.stream
            if stream and stream.resumed_at and not stream.topics and not self.simulation.is_gated:
                self.wanted = tuple(self.since) or self.wanted  # as in _can_resume
            self.call = asyncio.create_task(self._submit())

    async def _submit(self) -> None:
        stream, topics = self.stream, self.wanted
        assert stream is not None
        for topic in set(self.since) - set(topics):
            del self.since[topic]
        for topic in topics:
            if topic not in stream.submitted and not stream.resumed_at:
                stream.before[topic] = self.simulation.visible
        stream.submitted.update(topics)
        stream.is_sure = False
        await self.simulation.random_delay()
        try:
            await self.simulation.hub.subscribe(
                stream.connection.id, [*topics, *_EXTRA[self.kind]], Caller(), "here"
            )
        except SubscriptionError:
            return
        stream.topics, stream.is_sure = frozenset(topics), True
        stream.answered_at = len(stream.sink.data)
        for topic in topics:
            if topic not in self.since:
                self.since[topic] = self.simulation.visible
                self.received.setdefault(topic, set())

    def is_served(self) -> bool:
        """Whether the last answered call had the topics that it wants now."""
        stream = self.stream
        return stream is not None and stream.is_sure and stream.topics == set(self.wanted)

    async def leave(self) -> None:
        """Close the connection after any number of the bytes that weren't parsed yet."""
        stream, rng = self.stream, self.simulation.rng
        if stream is None:
            return
        await self._drop_call()
        self._parse(rng.randint(stream.read, max(stream.read, stream.sink.taken)))
        self.simulation.hub.remove_connection(stream.connection)
        self.stream = None

    async def _drop_call(self) -> None:
        if self.call is not None:
            self.call.cancel()
            await asyncio.gather(self.call, return_exceptions=True)
            self.call = None

    async def take(self) -> None:
        """Parse the bytes received; drop the connection if the server ended it."""
        if self.stream is None:
            return
        self._parse(self.stream.sink.taken)
        if self.stream.sink.state == "ended":
            self._parse(len(self.stream.sink.data))
        if self.stream.sink.state != "open":
            await self._drop_call()
            self.stream = None

    # --- Checks of each message

    def _parse(self, upto: int) -> None:
        stream = self.stream
        assert stream is not None
        while (end := stream.sink.data.find(b"\n\n", stream.read, upto)) >= 0:
            begin, stream.read = stream.read, end + 2
            lines = stream.sink.data[begin:end].decode().split("\n")
            fields = dict(line.split(":", 1) for line in lines if line != ":")
            begin += 2 * lines.count(":")
            self._receive(stream, begin, fields["id"], fields["event"], fields["data"])

    def _receive(self, stream: Stream, begin: int, id_: str, event: str, text: str) -> None:
        data = json.loads(text)
        position = id_.partition(".")[2]
        if position:
            self._check_position(stream, position)
        match event:
            case "PB_CONNECT":
                pass
            case "PB_CURSOR":
                if self.kind == "cursor":
                    self.position = data["id"].partition(".")[2]
            case "PB_RESYNC":
                collections = frozenset(data["collections"])
                self.notified_gaps.append((collections, stream.sink.seen_at[begin]))
            case _:
                record = data["record"]
                tag = record.get("title") or record["id"]
                self._check(stream, begin, event, self.simulation.expected_events[tag], tag)
                self.received.setdefault(event, set()).add(tag)
        if self.kind == "position":
            self.position = position

    def _check_position(self, stream: Stream, position: str) -> None:
        if position[:6] == stream.last_position[:6]:
            assert position >= stream.last_position, f"{self.name}: a position went back"
        stream.last_position = position

    def _check(
        self, stream: Stream, begin: int, topic: str, expected: ExpectedEvent, tag: str
    ) -> None:
        about = f"{self.name}: {topic} received {tag} at {expected.order_key}"
        assert is_about(topic, expected.collection, expected.record_id), (
            f"{about}, of another topic"
        )
        if stream.is_sure and begin >= stream.answered_at:
            assert topic in stream.topics, f"{about}, unsubscribed before"
        assert expected.order_key >= stream.last_order_key, (
            f"{about}, after {stream.last_order_key}"
        )
        stream.last_order_key = expected.order_key
        assert (topic, tag) not in stream.received, f"{about}, twice"
        stream.received.add((topic, tag))
        # After a failover the snapshot may be of the lost history.
        if self.simulation.history == stream.history:
            assert expected.commit not in stream.before.get(topic, ()), f"{about}, visible before"
        resumed_at_position = parse_position(stream.resumed_at)
        if (
            resumed_at_position is not None
            and resumed_at_position.epoch == f"{expected.order_key[0]:06x}"
        ):
            assert expected.order_key[1] > resumed_at_position.cursor, f"{about}, again"
        # A commit that a failover has lost isn't in the list any more.
        if self.simulation.is_gated and expected.commit in self.simulation.commits:
            assert expected.commit.is_visible, f"{about}, before it is visible"

    # --- Checks at the end

    def missing(self) -> Sequence[str]:
        """Return the events that were neither received nor covered by a notified gap."""
        return [
            f"{self.name}: {topic} missed {tag} ({commit.end_lsn}, history {commit.history})"
            for commit in self.simulation.commits
            for topic, seen in self.since.items()
            if commit not in seen
            for tag in self._tags(commit, topic)
            if tag not in self.received[topic] and not self._was_notified(commit, topic)
        ]

    def _tags(self, commit: Commit, topic: str) -> Sequence[str]:
        """Return the tags that the topic must receive of a commit.

        A tag that no event has represents rows of which no event is made (truncated, oversized,
        never decoded): only a gap can cover it.
        """
        name = topic.partition("/")[0]
        lost = ["(emptied)"] if name in commit.emptied else []
        of_events = [
            tag
            for tag, expected in self.simulation.expected_events.items()
            if expected.commit is commit
            and is_about(topic, expected.collection, expected.record_id)
        ]
        if of_events or commit.is_oversized or not commit.end_lsn:
            return [*of_events, *lost]
        never = any(change.table.name == name for change in commit.changes)
        is_known = any(
            expected.commit is commit for expected in self.simulation.expected_events.values()
        )
        return [*lost, "(never decoded)"] if never and not is_known else lost

    def _was_notified(self, commit: Commit, topic: str) -> bool:
        name = topic.partition("/")[0]
        return any(
            commit in seen and (not collections or name in collections)
            for collections, seen in self.notified_gaps
        )
