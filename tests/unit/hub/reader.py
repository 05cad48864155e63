"""A client that keeps books: what it must hear, what it heard, and how gaps were told to it."""

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
from tests.unit.hub.world import Commit, Happening, Sink, World

Kind: TypeAlias = Literal["plain", "told", "position", "cursor"]
"""Plain; plain with PB_RESYNC; with ids (EventSource); with PB_CURSOR (the SDK)."""

ASKING = "?options=" + quote('{"query":{"filter":"geoDistance(id, 2, 3, 4) >= 0"}}')
"""Postgres must be asked, and admits everything."""
TOPICS = (
    *("posts/*", "posts", "posts/a", "posts/b", "notes/*", "notes/a", "nothing/*"),
    *(f"posts/*{ASKING}", f"posts/a{ASKING}"),
)
_EXTRA: dict[Kind, tuple[str, ...]] = {
    "plain": (),
    "told": ("PB_RESYNC",),
    "position": (),
    "cursor": ("PB_CURSOR", "PB_RESYNC"),
}


def is_about(topic: str, collection: str, record_id: str) -> bool:
    name, _, wanted = topic.partition("?")[0].partition("/")
    return name == collection and wanted in ("", "*", record_id)


@dataclass
class Stream:
    """One connection of the reader's."""

    connection: Connection
    sink: Sink
    resumed_at: str
    """The position it came with."""
    history: int
    read: int = 0
    """Bytes taken so far."""
    topics: frozenset[str] = frozenset()
    """By the last answer, unless ``is_sure`` is False."""
    is_sure: bool = True
    answered_at: int = 0
    """Bytes written when the last call was answered."""
    asked: set[str] = field(default_factory=set)
    """All that was ever asked for here."""
    before: dict[str, frozenset[Commit]] = field(default_factory=dict)
    """By topic that was new: what its reader could have read before the call."""
    last: tuple[int, Cursor, int] = (0, Cursor(LSN(0), 0), 0)
    last_position: str = ""
    heard: set[tuple[str, str]] = field(default_factory=set)


class Reader:
    """Comes back for ever; says what is wrong by ``AssertionError``."""

    def __init__(self, world: World, kind: Kind, name: str) -> None:
        self.world, self.kind, self.name = world, kind, name
        self.wanted: tuple[str, ...] = ()
        self.stream: Stream | None = None
        self.call: asyncio.Task[None] | None = None
        self._forget()

    def _forget(self) -> None:
        """Begin anew, as after a reload of the page."""
        self.position = ""
        self.since: dict[str, frozenset[Commit]] = {}
        """By topic what was visible when its call was answered: the rest must be heard."""
        self.heard: dict[str, set[str]] = {}
        self.told: list[tuple[frozenset[str], frozenset[Commit]]] = []
        """Collections (none: all) and what a reader could see when that gap was told."""

    # --- what it does

    def choose_topics(self) -> None:
        rng = self.world.rng
        self.wanted = tuple(rng.sample(TOPICS, rng.randrange(1, 5)))

    def connect(self) -> None:
        if not self._comes_back():
            self._forget()
        position = self.position
        sink = Sink(self.world)
        connection = self.world.hub.open_connection(
            sink,
            address="here",
            last_event_id=None,
            position=position if position or self.kind == "position" else None,
        )
        self.stream = Stream(connection, sink, position, self.world.history)

    def _comes_back(self) -> bool:
        # New topics hear from the position on, and without a standby a commit before it may be
        # invisible for an instant: too short for anybody to come back in, but not here.
        is_safe = self.world.is_gated or bool(self.since)
        return self.kind in ("position", "cursor") and bool(self.position) and is_safe

    def submit(self) -> None:
        """Call with the topics wanted, at the side."""
        if self.call is None or self.call.done():
            stream = self.stream
            if stream and stream.resumed_at and not stream.topics and not self.world.is_gated:
                self.wanted = tuple(self.since) or self.wanted  # as in _comes_back
            self.call = asyncio.create_task(self._submit())

    async def _submit(self) -> None:
        stream, topics = self.stream, self.wanted
        assert stream is not None
        for topic in set(self.since) - set(topics):
            del self.since[topic]
        for topic in topics:
            if topic not in stream.asked and not stream.resumed_at:
                stream.before[topic] = self.world.visible
        stream.asked.update(topics)
        stream.is_sure = False
        await self.world.moment()
        try:
            await self.world.hub.subscribe(
                stream.connection.id, [*topics, *_EXTRA[self.kind]], Caller(), "here"
            )
        except SubscriptionError:
            return
        stream.topics, stream.is_sure = frozenset(topics), True
        stream.answered_at = len(stream.sink.data)
        for topic in topics:
            if topic not in self.since:
                self.since[topic] = self.world.visible
                self.heard.setdefault(topic, set())

    def is_served(self) -> bool:
        """Whether its topics are those it wants, by the last answer."""
        stream = self.stream
        return stream is not None and stream.is_sure and stream.topics == set(self.wanted)

    async def leave(self) -> None:
        """The network breaks at any byte that wasn't read yet."""
        stream, rng = self.stream, self.world.rng
        if stream is None:
            return
        await self._drop_call()
        self._take(rng.randint(stream.read, max(stream.read, stream.sink.taken)))
        self.world.hub.remove_connection(stream.connection)
        self.stream = None

    async def _drop_call(self) -> None:
        if self.call is not None:
            self.call.cancel()
            await asyncio.gather(self.call, return_exceptions=True)
            self.call = None

    async def take(self) -> None:
        """Read what has come; notice an end."""
        if self.stream is None:
            return
        self._take(self.stream.sink.taken)
        if self.stream.sink.state == "ended":
            self._take(len(self.stream.sink.data))
        if self.stream.sink.state != "open":
            await self._drop_call()
            self.stream = None

    # --- what it checks on the way

    def _take(self, upto: int) -> None:
        stream = self.stream
        assert stream is not None
        while (end := stream.sink.data.find(b"\n\n", stream.read, upto)) >= 0:
            begin, stream.read = stream.read, end + 2
            lines = stream.sink.data[begin:end].decode().split("\n")
            fields = dict(line.split(":", 1) for line in lines if line != ":")
            begin += 2 * lines.count(":")
            self._hear(stream, begin, fields["id"], fields["event"], fields["data"])

    def _hear(self, stream: Stream, begin: int, id_: str, event: str, text: str) -> None:
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
                self.told.append((collections, stream.sink.seen_at[begin]))
            case _:
                record = data["record"]
                tag = record.get("title") or record["id"]
                self._check(stream, begin, event, self.world.happenings[tag], tag)
                self.heard.setdefault(event, set()).add(tag)
        if self.kind == "position":
            self.position = position

    def _check_position(self, stream: Stream, position: str) -> None:
        if position[:6] == stream.last_position[:6]:
            assert position >= stream.last_position, f"{self.name}: a position went back"
        stream.last_position = position

    def _check(self, stream: Stream, begin: int, topic: str, what: Happening, tag: str) -> None:
        about = f"{self.name}: {topic} heard {tag} at {what.place}"
        assert is_about(topic, what.collection, what.record_id), f"{about}, of others"
        if stream.is_sure and begin >= stream.answered_at:
            assert topic in stream.topics, f"{about}, which was given up"
        assert what.place >= stream.last, f"{about}, after {stream.last}"
        stream.last = what.place
        assert (topic, tag) not in stream.heard, f"{about}, twice"
        stream.heard.add((topic, tag))
        if self.world.history == stream.history:  # else the snapshot may be of another database
            assert what.commit not in stream.before.get(topic, ()), f"{about}, visible before"
        came_with = parse_position(stream.resumed_at)
        if came_with is not None and came_with.epoch == f"{what.place[0]:06x}":
            assert what.place[1] > came_with.cursor, f"{about}, again"
        if self.world.is_gated and what.commit in self.world.commits:  # no failover has lost it
            assert what.commit.is_visible, f"{about}, before anybody can see it"

    # --- what it checks in the end

    def missing(self) -> Sequence[str]:
        """What it should have heard and was neither told nor warned of."""
        return [
            f"{self.name}: {topic} missed {tag} ({commit.end_lsn}, history {commit.history})"
            for commit in self.world.commits
            for topic, seen in self.since.items()
            if commit not in seen
            for tag in self._tags(commit, topic)
            if tag not in self.heard[topic] and not self._was_told(commit, topic)
        ]

    def _tags(self, commit: Commit, topic: str) -> Sequence[str]:
        """What the topic must hear of a commit, by what is written in the rows.

        Something that can't be heard stands for rows of which no event tells.
        """
        name = topic.partition("/")[0]
        lost = ["(emptied)"] if name in commit.emptied else []
        told = [
            tag
            for tag, what in self.world.happenings.items()
            if what.commit is commit and is_about(topic, what.collection, what.record_id)
        ]
        if told or commit.is_oversized or not commit.end_lsn:
            return [*told, *lost]
        never = any(change.table.name == name for change in commit.changes)
        is_known = any(what.commit is commit for what in self.world.happenings.values())
        return [*lost, "(never decoded)"] if never and not is_known else lost

    def _was_told(self, commit: Commit, topic: str) -> bool:
        name = topic.partition("/")[0]
        return any(
            commit in seen and (not collections or name in collections)
            for collections, seen in self.told
        )
