"""A simulated database for a hub, whose commits are decoded and become visible in any order."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.changelog.memory import Changelog, Gap
from pgrealtime.changes import (
    Change,
    Insert,
    OversizedTransaction,
    Row,
    Transaction,
    Truncate,
    Update,
    WholeRow,
)
from pgrealtime.config.model import RealtimeConfig
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.hub.hub import Hub
from pgrealtime.hub.state.progress import HubSettings
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.rule_queries.live_rows import IncompleteRow, LiveRow
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.slow_queries import TimeBudget
from pgrealtime.rules.engine.batch_query import PairQuestion
from pgrealtime.snapshot import ReadPoint, parse_snapshot
from tests.unit.hub.harness import (
    COLLECTIONS,
    LOGINS,
    NOTES,
    POSTS,
    FakeDatabase,
    MemorySink,
    delete,
    insert,
)

WINDOW = 4000
"""Bytes that the changelog may have; a change counts 100."""


@dataclass(eq=False)
class Commit:
    """A transaction of the simulated database."""

    number: int
    history: int
    xid: int
    changes: tuple[Change, ...]
    is_oversized: bool = False
    end_lsn: int = 0
    """0 until it commits."""
    is_visible: bool = False

    @property
    def emptied(self) -> frozenset[str]:
        """Collections that lose more rows, or get more, than events say: only a gap covers that."""
        every = self.changes if self.is_oversized else ()
        truncates = [c for c in self.changes if isinstance(c, Truncate)]
        return frozenset(change.table.name for change in (*every, *truncates))


@dataclass(frozen=True)
class ExpectedEvent:
    """An event that subscribers of its record receive, and its place in the order of events."""

    commit: Commit
    order_key: tuple[int, Cursor, int]
    """History, cursor, and index among the change's events."""
    collection: str
    record_id: str


class Sink(MemorySink):
    """Records which commits were visible whenever a gap was notified."""

    def __init__(self, world: Simulation) -> None:
        super().__init__()
        self._simulation = world
        self.seen_at: dict[int, frozenset[Commit]] = {}
        """By the offset at which PB_RESYNC was written, the commits visible then."""

    def write(self, data: bytes) -> None:
        if b"\nevent:PB_RESYNC\n" in data:
            self.seen_at[len(self.data)] = self._simulation.visible
        super().write(data)


class Database(FakeDatabase):
    """Answers after a delay, with the state at some moment between call and return."""

    def __init__(self, world: Simulation) -> None:
        super().__init__()
        self._simulation = world

    async def fetch_read_point(self) -> ReadPoint:
        await self._simulation.random_delay()
        if self._simulation.rng.random() < self._simulation.failing:
            raise DatabaseUnreachableError("no answer")
        read_point = self._simulation.read_point()
        await self._simulation.random_delay()
        return read_point

    async def answer_questions(
        self, evaluation: PendingEvaluation, budget: TimeBudget | None = None
    ) -> frozenset[str]:
        while questions := evaluation.questions():
            for question in questions:
                await self._simulation.random_delay()
                if budget is not None:
                    budget.spend(self._simulation.rng.choice([0.0, 0.0, self._simulation.slowness]))
                    question.is_postponed = budget.is_spent()
                assert isinstance(question, PairQuestion)
                if not question.is_postponed:
                    question.accept([(index,) for index in range(len(question.pairs))])
            evaluation.resume()
            if budget is not None and budget.is_spent():
                break
        return frozenset()

    async def verify_assumptions(self, _assumptions: CatalogAssumptions) -> bool:
        return True

    async def fetch_live_rows(
        self, _images: Sequence[IncompleteRow]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        await self._simulation.random_delay()
        return {}, frozenset()


@dataclass
class Simulation:
    """A database, a minimal replication reader, and a hub.

    What a test does with it is chosen by ``rng`` alone, so that a seed repeats a run.
    """

    rng: random.Random
    is_gated: bool = False
    """Whether commits may be decoded long before they are visible, as with a synchronous standby;
    the hub then waits for their visibility."""
    commits: list[Commit] = field(default_factory=list)
    expected_events: dict[str, ExpectedEvent] = field(default_factory=dict)
    """By tag: the text in the row by which the event is recognized."""
    failing: float = 0.0
    """The share of snapshot queries that fail."""
    slowness: float = 0.0
    """Seconds that a third of the filter questions take."""
    history: int = 0
    wal_end: int = 100

    def __post_init__(self) -> None:
        # The last two overflow 32 bits, in which the stream has transaction ids.
        self.next_xid = self.rng.choice([1000, (1 << 32) - 5, (5 << 32) - 9])
        self._undecoded: deque[Commit] = deque()
        self.changelog = Changelog(LSN(100), max_bytes=WINDOW, max_age_seconds=1.0)
        self.hub = Hub(
            self.changelog,
            Database(self),
            COLLECTIONS,
            HubSettings(
                limits=RealtimeConfig.model_validate(
                    {
                        "send_buffer": self.rng.choice([300, 2000, 100_000]),
                        "heartbeat": self.rng.choice([0.3, 25.0]),
                        "idle_timeout": 500.0,
                    }
                ),
                logins=LOGINS,
            ),
            clock=asyncio.get_running_loop().time,
        )
        self.hub.set_waits_for_visibility(waits=self.is_gated)
        self.hub.stream_started(self._epoch())

    def _epoch(self) -> str:
        return f"{self.history:06x}"

    async def random_delay(self) -> None:
        """Yield to other tasks for a random time, perhaps none."""
        match self.rng.randrange(6):
            case 0 | 1:
                return
            case 2 | 3:
                await asyncio.sleep(0)
            case 4:
                for _ in range(self.rng.randrange(10)):
                    await asyncio.sleep(0)
            case _:
                await asyncio.sleep(self.rng.choice([0.001, 0.02, 0.5]))

    # --- Writing transactions

    @property
    def visible(self) -> frozenset[Commit]:
        return frozenset(commit for commit in self.commits if commit.is_visible)

    def running(self) -> list[Commit]:
        return [c for c in self.commits if c.history == self.history and not c.end_lsn]

    def _invisible(self) -> list[Commit]:
        return [c for c in self.commits if c.history == self.history and not c.is_visible]

    def read_point(self) -> ReadPoint:
        """Return the read point of this moment, as PostgreSQL computes it."""
        in_progress = sorted(commit.xid for commit in self._invisible())
        done = [c.xid for c in self.commits if c.history == self.history and c.is_visible]
        xmax = max([*done, self._first_xid - 1]) + 1
        xip = [xid for xid in in_progress if xid < xmax]
        text = f"{min([*xip, xmax])}:{xmax}:{','.join(map(str, xip))}"
        return ReadPoint(parse_snapshot(text), LSN(self.wal_end))

    def begin(self) -> None:
        if self.next_xid % (1 << 32) < 3:
            self.next_xid += 3
        if not any(c.history == self.history for c in self.commits):
            self._first_xid = self.next_xid
        number = self._number()
        size = self.rng.choice([1, 1, 1, 2, 3, 8])
        changes = tuple(self._change(f"c{number}.{n}") for n in range(size))
        commit = Commit(number, self.history, self.next_xid, changes)
        commit.is_oversized = self.rng.random() < 0.03
        self.commits.append(commit)
        self.next_xid += self.rng.choice([1, 1, 2])

    _first_xid = 3
    _numbers = 0

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _change(self, tag: str) -> Change:
        table = self.rng.choice([POSTS, POSTS, NOTES])
        record_id = self.rng.choice(["a", "b", tag])
        match self.rng.randrange(12):
            case 0:
                return Insert(table, {"id": tag})  # its title has to be read from the table
            case 1:
                new: Row = {"id": f"{record_id}!", "title": f"{tag}+"}
                return Update(table, new, WholeRow({"id": record_id, "title": tag}))
            case 2:
                return delete(record_id, tag) if table is POSTS else insert(record_id, tag, table)
            case 3 if self.rng.random() < 0.3:
                return Truncate(table)
            case _:
                return insert(record_id, tag, table)

    def commit(self, commit: Commit) -> None:
        self.wal_end += self.rng.choice([10, 50])
        commit.end_lsn = self.wal_end
        self._undecoded.append(commit)
        # Without a synchronous standby it becomes visible far sooner than a query takes.
        commit.is_visible = commit.is_visible or (not self.is_gated and bool(commit.emptied))

    def reveal(self) -> None:
        """Make one of the committed transactions visible, in any order."""
        if hidden := [c for c in self._invisible() if c.end_lsn]:
            self.rng.choice(hidden).is_visible = True

    # --- Reading the replication stream

    def decode(self) -> bool:
        """Append the next commit unless the changelog is full; return whether it was appended."""
        if not self.hub.is_stream_up or not self._undecoded:
            return False
        commit = self._undecoded[0]
        size = 0 if commit.is_oversized else 100 * len(commit.changes)
        waiting = self.changelog.bytes_after(self.hub.head)
        if waiting and waiting + size > WINDOW:
            return False
        if self.changelog.size_bytes + size > WINDOW:
            self._make_delivered_visible()
        self._undecoded.popleft()
        xid, end_lsn = Xid(commit.xid % (1 << 32)), LSN(commit.end_lsn)
        if commit.is_oversized:
            tables = frozenset(change.table for change in commit.changes)
            self.changelog.append(OversizedTransaction(xid, end_lsn, 0, tables), 0.0, self.hub.head)
        else:
            entry = Transaction(xid, end_lsn, 0, commit.changes, size)
            self.changelog.append(entry, 0.0, self.hub.head)
            self._expect_events(commit)
        self.hub.wake()
        return True

    def _expect_events(self, commit: Commit) -> None:
        for ordinal, change in enumerate(commit.changes, start=1):
            match change:
                case Insert(new=row):
                    rows = [row]
                case Update(new=row, old=old):
                    rows = [old.row, row]
                case Truncate():
                    rows = []
                case _:
                    rows = [change.old.row]
            for event_index, row in enumerate(rows):
                record_id = row["id"] or ""
                order_key = (self.history, Cursor(LSN(commit.end_lsn), ordinal), event_index)
                tag = row.get("title") or record_id
                self.expected_events[tag] = ExpectedEvent(
                    commit, order_key, change.table.name, record_id
                )

    def _make_delivered_visible(self) -> None:
        """Make delivered commits visible, unless they wait for a standby.

        Entries leave the changelog long after their commit, so by then they are visible.
        """
        for commit in self._invisible():
            if not self.is_gated and 0 < commit.end_lsn <= self.hub.head.lsn:
                commit.is_visible = True

    def expire(self) -> None:
        self._make_delivered_visible()
        self.changelog.expire(1e9, self.hub.head)

    def lose_stream(self) -> None:
        self.hub.stream_lost()

    def regain_stream(self) -> None:
        """Start the stream with another slot: creating it waits for every open transaction."""
        if self.hub.is_stream_up:
            return
        for commit in self._invisible():
            if not commit.end_lsn:
                self.commit(commit)
            commit.is_visible = True
        self._undecoded.clear()
        self.wal_end += 10
        self.changelog.append(Gap(LSN(self.wal_end), "slot_lost"))
        self.hub.stream_started(self._epoch())
        self.hub.wake()

    async def fail_over(self) -> None:
        """Continue with another primary: its WAL ends elsewhere, and unseen commits are lost."""
        self.hub.stream_lost()
        lost = self._invisible()
        self.commits = [commit for commit in self.commits if commit not in lost]
        # What else the lost history had isn't known: of these changes there will be no event.
        unknown = (insert("?", "?"), insert("?", "?", NOTES))
        other = Commit(self._number(), self.history, 0, unknown, end_lsn=1, is_visible=True)
        self.commits.append(other)
        self._undecoded.clear()
        self.history += 1
        self.next_xid -= self.rng.randrange(5)
        self._first_xid = self.next_xid
        self.wal_end += self.rng.choice([-120, -30, 500])
        self.wal_end = max(self.wal_end, 100)
        await self.random_delay()
        self.changelog.restart(LSN(self.wal_end))
        self.hub.stream_started(self._epoch())
        self.hub.wake()

    async def reload(self) -> None:
        """Make the same collections the next generation, as other objects."""
        await self.hub.replace_generation(COLLECTIONS, lambda caller: caller, logins=LOGINS)
