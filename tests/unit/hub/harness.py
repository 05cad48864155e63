"""A hub for tests without sockets and without a server: clients in memory and a fake database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from pgrealtime.auth.principal import Caller
from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.catalog.model import ReplicaIdentity, Table, TableKind
from pgrealtime.changelog.memory import Changelog
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
from pgrealtime.config.model import CollectionLoginConfig, MirrorsConfig, RealtimeConfig
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.expand.plan import ExpandPlan, ExpandViewer
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.hub import Hub
from pgrealtime.hub.state.loads import ListReader
from pgrealtime.hub.state.progress import HubSettings
from pgrealtime.lsn import LSN, Xid
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rule_queries.live_rows import IncompleteRow, LiveRow
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.session import ReadSession
from pgrealtime.rule_queries.slow_queries import TimeBudget
from pgrealtime.snapshot import ReadPoint, Snapshot, parse_read_point
from tests.column_types import TEXT, text_columns

POSTS = TableName("public", "posts")
NOTES = TableName("public", "notes")
PEOPLE = TableName("public", "people")
LOGINS = {"people": CollectionLoginConfig(token_key="key")}
DEADLINE = 5.0


def _collection(
    name: TableName, *column_names: str, oid: int = 1, kind: str = "base"
) -> Collection:
    columns = text_columns(*column_names)
    table = Table(
        oid=oid,
        name=name,
        kind=TableKind.TABLE,
        columns=columns,
        primary_key=("id",),
        replica_identity=ReplicaIdentity.FULL,
        replica_identity_columns=column_names,
    )
    fields = [Field(name=c.name, column=c, kind=FieldKind.TEXT, type=TEXT) for c in columns]
    return Collection(
        name=name.name,
        id=f"pbc_{name.name}",
        type=kind,
        table=table,
        key=columns[0],
        fields=tuple(
            replace(one, is_hidden=True, is_secret=True) if one.name == "key" else one
            for one in fields
        ),
        list_rule="",
        view_rule="",
    )


COLLECTIONS = Collections(
    (
        _collection(POSTS, "id", "title"),
        _collection(NOTES, "id", "title"),
        # An auth collection, whose e-mail addresses are shown only to their owners.
        _collection(PEOPLE, "id", "email", "key", oid=2, kind="auth"),
    )
)


class MemorySink:
    """A client in memory: it takes bytes as they are written, or none while ``is_stuck``."""

    def __init__(self) -> None:
        self.data = b""
        self.writes = 0
        self.taken = 0
        """Bytes of ``data`` that the client has taken."""
        self._added = 0
        self.is_stuck = False
        self.overhead = 0
        """Bytes that the transport adds to each write, as the head of a chunk."""
        self.state = "open"
        self._arrived = asyncio.Event()
        self._unstuck = asyncio.Event()

    def write(self, data: bytes) -> None:
        assert self.state == "open", "written after the end of the connection"
        self.data += data
        self.writes += 1
        self._added += self.overhead
        if not self.is_stuck:
            self._take()
        self._arrived.set()

    def _take(self) -> None:
        self.taken, self._added = len(self.data), 0

    def forget(self) -> None:
        """Discard what was received."""
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
        """Return every message so far, without heartbeats."""
        text = "\n".join(line for line in self.data.decode().split("\n") if line != ":")
        return [message + "\n\n" for message in text.split("\n\n") if message]

    def events(self) -> list[tuple[str, str, str]]:
        """Return id, event name and data of every message so far."""
        found = []
        for message in self.messages():
            lines = dict(line.split(":", 1) for line in message.strip().split("\n"))
            found.append((lines["id"], lines["event"], lines["data"]))
        return found

    def _holds(self, count: int) -> bool:
        """Whether at least ``count`` messages were received.

        Blank lines are counted first, so that a long backlog is parsed only when it is nearly
        complete.
        """
        return self.data.count(b"\n\n") >= count and len(self.events()) >= count

    async def wait_for(self, count: int) -> list[tuple[str, str, str]]:
        """Return all messages, once there are ``count`` of them."""
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


class EmptyReadSession(ReadSession):
    """A read session on empty tables."""

    snapshot = Snapshot(1, 1, frozenset())
    insert_lsn = LSN(0)
    has_failed = False

    def __init__(self) -> None:
        pass

    async def fetch_texts(
        self, _statement: str, _params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]]:
        return []

    async def answer_questions(self, evaluation: PendingEvaluation) -> None:
        assert not evaluation.questions(), "no rule of these tests needs the database"


class FakeDatabase(QueryExecutor):
    """A database with a given snapshot. Rules of these tests need no query."""

    def __init__(self) -> None:
        self.snapshot_text = "1000000:1000000:"
        self.insert_lsn = "0/0"
        self._snapshot_queries = asyncio.Semaphore(0)
        self.gate: asyncio.Event | None = None
        """If given, snapshot queries wait for it."""
        self.is_unreachable = False
        """Whether every query fails because the database can't be reached."""
        self.confirms_assumptions = True
        """Whether the catalogue confirms what is assumed of tables."""
        self.undecided: frozenset[str] = frozenset()
        """Collections whose questions get no answer."""
        self.fault: Exception | None = None
        """Raised by every evaluation."""
        self.rows_gate: asyncio.Event | None = None
        """If given, reading live rows waits for it. Evaluation reads the live row where the WAL
        left columns out, so a test can stop it there."""
        self.is_at_rows_gate = asyncio.Event()
        """Set when a read of live rows waits at ``rows_gate``."""

    async def fetch_read_point(self) -> ReadPoint:
        self._snapshot_queries.release()
        if self.gate is not None:
            await self.gate.wait()
        if self.is_unreachable:
            raise DatabaseUnreachableError("no answer")
        return parse_read_point(self.snapshot_text, self.insert_lsn)

    async def wait_for_snapshot_queries(self, times: int) -> None:
        """Return after ``times`` further snapshot queries."""
        while self._snapshot_queries.locked() is False:
            await self._snapshot_queries.acquire()
        async with asyncio.timeout(DEADLINE):
            for _ in range(times):
                await self._snapshot_queries.acquire()

    async def answer_questions(
        self, evaluation: PendingEvaluation, _budget: TimeBudget | None = None
    ) -> frozenset[str]:
        assert not evaluation.questions(), "no rule of these tests needs the database"
        if self.fault is not None:
            raise self.fault
        return self.undecided

    @asynccontextmanager
    async def read_session(
        self, _xids: Sized[Xid], _seconds: float | None = None
    ) -> AsyncIterator[ReadSession]:
        yield EmptyReadSession()

    async def verify_assumptions(self, _assumptions: CatalogAssumptions) -> bool:
        if self.is_unreachable:
            raise DatabaseUnreachableError("no answer")
        return self.confirms_assumptions

    async def fetch_live_rows(
        self, _images: Sequence[IncompleteRow]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        if self.rows_gate is not None:
            self.is_at_rows_gate.set()
            await self.rows_gate.wait()
        return {}, frozenset()


@dataclass
class HubHarness:
    """A running hub, with the changelog and the database that a test controls."""

    hub: Hub
    changelog: Changelog
    database: FakeDatabase
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
        """Append a transaction and wake the hub, as the replication reader does."""
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

    async def until_delivered(self) -> None:
        """Wait until the head is the changelog's: everything was delivered to LIVE connections."""
        async with asyncio.timeout(DEADLINE):
            while self.hub.head < self.changelog.end_cursor:
                self.hub.progressed.clear()
                await self.hub.progressed.wait()

    async def until_caught_up(self) -> None:
        """Wait until no connection reads on from the changelog by itself."""
        async with asyncio.timeout(DEADLINE):
            while self.hub._catch_up._tasks:
                await asyncio.sleep(0)


def viewer_of(plan: ExpandPlan, own: tuple[str, str] | None = None) -> ExpandViewer:
    return ExpandViewer(
        plan=plan, sees_hidden=False, own_record=own, view_predicates={}, manage_predicates={}
    )


def insert(record_id: str, title: str = "t", table: TableName = POSTS) -> Insert:
    return Insert(table, {"id": record_id, "title": title})


def update(record_id: str, title: str, *, was: str | None = None) -> Update:
    old: Row = {"id": was or record_id, "title": "old"}
    return Update(POSTS, {"id": record_id, "title": title}, WholeRow(old))


def delete(record_id: str, title: str = "t") -> Delete:
    return Delete(POSTS, WholeRow({"id": record_id, "title": title}))


@asynccontextmanager
async def open_harness(
    *,
    is_up: bool = True,
    max_size: int = 1_000_000,
    max_age: float = 300.0,
    database: FakeDatabase | None = None,
    clock: Callable[[], float] = time.monotonic,
    read_schema: Callable[[], Awaitable[bool]] | None = None,
    tag: str = "",
    collections: Collections = COLLECTIONS,
    mirrors: MirrorsConfig | None = None,
    list_reader: ListReader | None = None,
    **limits: object,
) -> AsyncIterator[HubHarness]:
    """Run a hub. ``limits`` are keys of ``RealtimeConfig``, in seconds and bytes."""
    changelog = Changelog(LSN(100), max_bytes=max_size, max_age_seconds=max_age)
    database = database or FakeDatabase()
    hub = Hub(
        changelog,
        database,
        collections,
        HubSettings(
            mirrors=mirrors or MirrorsConfig(),
            limits=RealtimeConfig.model_validate(limits),
            logins=LOGINS,
            tag=tag,
            can_resume=max_age > 0,
        ),
        refresh_schema=read_schema,
        list_reader=list_reader,
        clock=clock,
    )
    if is_up:
        hub.stream_started("abcdef")
    tasks = [asyncio.create_task(hub.run()), asyncio.create_task(hub.run_timers())]
    try:
        yield HubHarness(hub, changelog, database)
    finally:
        for task in tasks:
            task.cancel()
        for connection in list(hub.connections):
            hub.remove_connection(connection)
        await asyncio.gather(*tasks, return_exceptions=True)


def at(transaction: Transaction, ordinal: int) -> str:
    """Return the position after a change, as message ids have it."""
    return f"abcdef-{transaction.end_lsn:016x}-{ordinal:08x}"
