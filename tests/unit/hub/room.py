"""A hub with everything real but the sockets and the server: sinks in memory, given snapshots."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field

from psycopg import sql

from pgrealtime.auth.principal import Caller
from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.catalog.model import Column, ReplicaIdentity, Table, TableKind, Type, TypeKind
from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Row,
    RowShape,
    TableName,
    Transaction,
    Update,
    WholeRow,
)
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.config.model import CollectionLoginConfig, RealtimeConfig
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.hub import Hub, HubCallbacks
from pgrealtime.hub.state.settings import HubSettings
from pgrealtime.lsn import LSN, Xid
from pgrealtime.rule_queries.live_rows import LiveRow
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.session import ReadSession
from pgrealtime.rule_queries.slow_queries import TimeBudget
from pgrealtime.snapshot import Snapshot

TEXT = Type(oid=25, schema="pg_catalog", name="text", kind=TypeKind.BASE, category="S")
POSTS = TableName("public", "posts")
NOTES = TableName("public", "notes")
PEOPLE = TableName("public", "people")
LOGINS = {"people": CollectionLoginConfig(token_key="key")}
DEADLINE = 5.0


def _collection(name: TableName) -> Collection:
    columns = tuple(
        Column(name=n, attribute_number=i, type=TEXT) for i, n in enumerate(("id", "title"), 1)
    )
    table = Table(
        oid=1,
        name=name,
        kind=TableKind.TABLE,
        columns=columns,
        primary_key=("id",),
        replica_identity=ReplicaIdentity.FULL,
        replica_identity_columns=("id", "title"),
    )
    fields = tuple(Field(name=c.name, column=c, kind=FieldKind.TEXT, type=TEXT) for c in columns)
    return Collection(
        name=name.name,
        id=f"pbc_{name.name}",
        type="base",
        table=table,
        key=columns[0],
        fields=fields,
        list_rule="",
        view_rule="",
    )


def _people() -> Collection:
    """An auth collection whose addresses only their owners see."""
    columns = tuple(
        Column(name=n, attribute_number=i, type=TEXT)
        for i, n in enumerate(("id", "email", "key"), 1)
    )
    table = Table(
        oid=2,
        name=PEOPLE,
        kind=TableKind.TABLE,
        columns=columns,
        primary_key=("id",),
        replica_identity=ReplicaIdentity.FULL,
        replica_identity_columns=("id", "email", "key"),
    )
    fields = tuple(
        Field(
            name=c.name,
            column=c,
            kind=FieldKind.TEXT,
            type=TEXT,
            is_hidden=c.name == "key",
            is_secret=c.name == "key",
        )
        for c in columns
    )
    return Collection(
        name="people",
        id="pbc_people",
        type="auth",
        table=table,
        key=columns[0],
        fields=fields,
        list_rule="",
        view_rule="",
    )


COLLECTIONS = Collections((_collection(POSTS), _collection(NOTES), _people()))


class MemorySink:
    """A client that takes everything at once, or nothing while ``is_stuck``."""

    def __init__(self) -> None:
        self.data = b""
        self.writes = 0
        self.taken = 0
        self._added = 0
        self.is_stuck = False
        self.overhead = 0
        """Bytes that each write is longer than what was written."""
        self.state = "open"
        self._arrived = asyncio.Event()
        self._unstuck = asyncio.Event()

    def write(self, data: bytes) -> None:
        assert self.state == "open", "written to after its end"
        self.data += data
        self.writes += 1
        self._added += self.overhead
        if not self.is_stuck:
            self._take()
        self._arrived.set()

    def _take(self) -> None:
        self.taken, self._added = len(self.data), 0

    def forget(self) -> None:
        """Begin anew: what was taken is no message any more."""
        self.data = b""
        self._take()

    def buffered_bytes(self) -> int:
        return len(self.data) - self.taken + self._added

    async def drain(self) -> None:
        while self.buffered_bytes():
            self._unstuck.clear()
            await self._unstuck.wait()

    def close(self) -> None:
        self.state = "ended"
        self._arrived.set()

    def abort(self) -> None:
        self.state = "aborted"
        self._arrived.set()

    def unstick(self) -> None:
        self.is_stuck = False
        self._take()
        self._unstuck.set()

    def messages(self) -> list[str]:
        """Every message so far, heartbeats aside."""
        text = "\n".join(line for line in self.data.decode().split("\n") if line != ":")
        return [message + "\n\n" for message in text.split("\n\n") if message]

    def events(self) -> list[tuple[str, str, str]]:
        """Id line's value, event name and data of every message so far."""
        found = []
        for message in self.messages():
            lines = dict(line.split(":", 1) for line in message.strip().split("\n"))
            found.append((lines["id"], lines["event"], lines["data"]))
        return found

    def _holds(self, count: int) -> bool:
        """Whether there are so many events; of a long backlog few are parsed before the last."""
        return self.data.count(b"\n\n") >= count and len(self.events()) >= count

    async def wait_for(self, count: int) -> list[tuple[str, str, str]]:
        """The events, once there are so many."""
        async with asyncio.timeout(DEADLINE):
            while not self._holds(count):
                self._arrived.clear()
                await self._arrived.wait()
        return self.events()

    async def wait_for_bytes(self, data: bytes) -> None:
        async with asyncio.timeout(DEADLINE):
            while data not in self.data:
                self._arrived.clear()
                await self._arrived.wait()

    async def wait_until(self, state: str) -> None:
        async with asyncio.timeout(DEADLINE):
            while self.state != state:
                self._arrived.clear()
                await self._arrived.wait()


class NoRows(ReadSession):
    """What a read session finds in empty tables."""

    snapshot = Snapshot(1, 1, frozenset())
    insert_lsn = LSN(0)
    has_failed = False

    def __init__(self) -> None:
        pass

    async def fetch_texts(
        self, _statement: sql.Composed, _params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]]:
        return []

    async def answer_questions(self, evaluation: PendingEvaluation) -> None:
        assert not evaluation.questions(), "nothing to ask"


class GivenDatabase:
    """Answers snapshots as told; rules of these tests never need it."""

    def __init__(self) -> None:
        self.snapshot_text = "1000000:1000000:"
        self.insert_lsn = "0/0"
        self._asked = asyncio.Semaphore(0)
        self.gate: asyncio.Event | None = None
        self.is_away = False
        self.is_borne_out = True
        """Whether the catalogue says of tables what is believed of them."""
        self.undecided: frozenset[str] = frozenset()
        """Collections about which nobody can be asked."""
        self.fault: Exception | None = None
        """What judging raises."""
        self.rows_gate: asyncio.Event | None = None
        """What a row that the WAL left columns out of waits for; so a test holds up judging."""
        self.is_holding = asyncio.Event()

    async def fetch_snapshot(self) -> tuple[str, str, bool]:
        self._asked.release()
        if self.gate is not None:
            await self.gate.wait()
        if self.is_away:
            raise DatabaseUnreachableError("nobody answers")
        return self.snapshot_text, self.insert_lsn, False

    async def asked_again(self, times: int) -> None:
        """Return when a snapshot was asked for so many times more."""
        while self._asked.locked() is False:
            await self._asked.acquire()
        async with asyncio.timeout(DEADLINE):
            for _ in range(times):
                await self._asked.acquire()

    async def answer_questions(
        self, evaluation: PendingEvaluation, _budget: TimeBudget | None = None
    ) -> frozenset[str]:
        assert not evaluation.questions(), "nothing to ask"
        if self.fault is not None:
            raise self.fault
        return self.undecided

    def read_session(
        self, _xids: Sized[Xid], _seconds: float | None = None
    ) -> AbstractAsyncContextManager[ReadSession]:
        return nullcontext(NoRows())

    async def verify_assumptions(self, _belief: CatalogAssumptions) -> bool:
        if self.is_away:
            raise DatabaseUnreachableError("nobody answers")
        return self.is_borne_out

    async def fetch_live_rows(
        self, _events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        if self.rows_gate is not None:
            self.is_holding.set()
            await self.rows_gate.wait()
        return {}, frozenset()


@dataclass
class Room:
    hub: Hub
    changelog: MemoryChangelog
    database: GivenDatabase
    _end: int = 100
    sinks: list[MemorySink] = field(default_factory=list)

    def connect(
        self,
        *,
        last_event_id: str | None = None,
        position: str | None = None,
        address: str = "127.0.0.1",
    ) -> tuple[Connection, MemorySink]:
        sink = MemorySink()
        self.sinks.append(sink)
        connection = self.hub.open_connection(
            sink, address=address, last_event_id=last_event_id, position=position
        )
        return connection, sink

    async def subscribe(
        self, connection: Connection, *topics: str, caller: Caller | None = None
    ) -> None:
        await self.hub.subscribe(connection.id, topics, caller or Caller(), connection.address)

    def commit(
        self,
        *changes: Change,
        xid: int | None = None,
        size: int = 100,
        shapes: tuple[RowShape, ...] = (),
    ) -> Transaction:
        """Append a transaction and let the hub know, as the relay would."""
        self._end += 100
        made = Transaction(
            xid=Xid(self._end if xid is None else xid),
            end_lsn=LSN(self._end),
            commit_time_us=0,
            changes=changes,
            size_bytes=size,
            row_shapes=shapes,
        )
        self.changelog.append(made)
        self.hub.wake()
        return made

    async def settled(self) -> None:
        """Wait until the hub has delivered all there is."""
        async with asyncio.timeout(DEADLINE):
            while self.hub.head < self.changelog.end_cursor:
                self.hub.progressed.clear()
                await self.hub.progressed.wait()


def insert(record_id: str, title: str = "t", table: TableName = POSTS) -> Insert:
    return Insert(table, {"id": record_id, "title": title})


def update(record_id: str, title: str, *, was: str | None = None) -> Update:
    old: Row = {"id": was or record_id, "title": "old"}
    return Update(POSTS, {"id": record_id, "title": title}, WholeRow(old))


def delete(record_id: str, title: str = "t") -> Delete:
    return Delete(POSTS, WholeRow({"id": record_id, "title": title}))


@asynccontextmanager
async def open_room(
    *,
    is_up: bool = True,
    max_size: int = 1_000_000,
    max_age: float = 300.0,
    database: GivenDatabase | None = None,
    clock: Callable[[], float] = time.monotonic,
    read_schema: Callable[[], Awaitable[bool]] | None = None,
    **limits: object,
) -> AsyncIterator[Room]:
    """A hub whose tasks run; ``limits`` are RealtimeConfig's, in seconds and bytes."""
    changelog = MemoryChangelog(LSN(100), max_bytes=max_size, max_age_seconds=max_age)
    database = database or GivenDatabase()
    hub = Hub(
        changelog,
        database,
        COLLECTIONS,
        HubSettings(
            limits=RealtimeConfig.model_validate(limits), logins=LOGINS, can_resume=max_age > 0
        ),
        callbacks=HubCallbacks(refresh_schema=read_schema),
        clock=clock,
    )
    if is_up:
        hub.stream_started("abcdef")
    tasks = [asyncio.create_task(hub.run()), asyncio.create_task(hub.run_timers())]
    try:
        yield Room(hub, changelog, database)
    finally:
        for task in tasks:
            task.cancel()
        for connection in list(hub.connections):
            hub.remove_connection(connection)
        await asyncio.gather(*tasks, return_exceptions=True)


def at(transaction: Transaction, ordinal: int) -> str:
    """The position after a change, as ids carry it."""
    return f"abcdef-{transaction.end_lsn:016x}-{ordinal:08x}"
