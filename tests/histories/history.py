"""One random history: transactions, readers and faults in any order, then the audit."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import jwt
import psycopg
from psycopg import sql

from pgrealtime.auth.principal import Caller
from pgrealtime.feed import reader
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rule_queries.slow_queries import CircuitBreakers
from pgrealtime.service.build import RunningService, run_service
from tests.histories.audit import Audit, Findings, learn_cursors
from tests.histories.ledger import ROOT, Ledger, Person
from tests.histories.reader import Client, Kind, Message, Topic
from tests.histories.scene import (
    DOCS,
    FILTERS,
    LIKES,
    SECRET,
    Scene,
    configuration,
    random_scene,
    schema,
)
from tests.histories.writer import Connection, Writer

CALM_SECONDS = 30.0
"""For every client to receive everything after the last step."""
HISTORY_SECONDS = 120.0
"""For all of a history, on however slow a machine."""
_LOCK_SECONDS = 0.8
"""Longer than a statement of the program may take."""
_REACH_SECONDS = 4.0
"""For the stream to reach a position that a proof needs; shorter than the limit of an expand."""
KILL = (
    "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name LIKE 'pgrealtime%%'"
    " AND backend_type = %s"
)

KILL_ALL = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name LIKE 'pgrealtime%'"
)


@dataclass(eq=False)
class World:
    """A database with a running program, for several histories one after another."""

    scene: Scene
    url: str
    service: RunningService
    ledger: Ledger
    connections: tuple[Connection, Connection]
    reader_connection: psycopg.Connection
    histories: int = 0
    findings: Findings = field(default_factory=Findings)

    async def admit(self, person: Person) -> Caller:
        """Return the caller that a token of this user makes."""
        if not person:
            return Caller()
        claims = {"sub": person, "exp": time.time() + 3600}
        if person == ROOT:
            claims["role"] = "root"
        token = jwt.encode(claims, SECRET, algorithm="HS256")
        return await self.service.reloader._parts.authenticator.authenticate_subscriber(
            f"Bearer {token}"
        )

    @property
    def executor(self) -> QueryExecutor:
        """The executor of the program's queries."""
        return self.service.hub._executor

    def forget_slowness(self) -> None:
        """Reset what the program measured as slow: histories must not depend on earlier ones."""
        self.executor._rounds._breakers = CircuitBreakers(time.monotonic)
        self.executor._live_rows.unreadable_until.clear()

    def look(self) -> int:
        """Return the last commit that readers see."""
        row = self.reader_connection.execute("SELECT max(n) FROM ledger").fetchone()
        assert row is not None
        return int(row[0] or 0)

    def client(self, person: Person, kind: Kind, *topics: Topic) -> Client:
        """Return a client that isn't connected yet."""
        subscribed = (*topics, Topic(collection="fence"))
        return Client(
            self.service.hub,
            self.ledger,
            person=person,
            kind=kind,
            topics=tuple({topic.text: topic for topic in subscribed}.values()),
            admit=self.admit,
            look=self.look,
        )

    async def check_books(self, writer: Writer) -> None:
        """Compare the ledger's verdicts on what each user may see with PostgreSQL's."""
        at = self.ledger.at(self.ledger.begun)
        for docs in DOCS:
            for is_list in (True, False):
                rule = self.scene.rule(docs, is_list=is_list)
                statement = (
                    f"SELECT r.mark, p.id FROM {docs} r, (SELECT id, role FROM users"
                    " WHERE id = ANY(%s) UNION ALL SELECT '', '') p"
                    f" WHERE r.id = ANY(%s) AND ({rule.sql.format(likes=LIKES[docs])})"
                )
                cursor = await self.connections[0].execute(
                    statement.replace("'%secret%'", "'%%secret%%'")
                    .replace("'%open%'", "'%%open%%'")
                    .encode(),
                    [writer.users, writer.docs[docs]],
                )
                evaluated = set(await cursor.fetchall())
                callers = [
                    self.ledger.caller_at(one, self.ledger.begun) for one in ("", *writer.users)
                ]
                books = {
                    (row["mark"], caller.id)
                    for record_id in writer.docs[docs]
                    if (row := self.ledger.row(docs, record_id, self.ledger.begun)) is not None
                    for caller in callers
                    if rule.admits(docs, row, caller, at)
                }
                assert evaluated == books, (rule, evaluated ^ books)


@asynccontextmanager
async def open_world(scene: Scene, url: str) -> AsyncIterator[World]:
    """Make the tables in an empty database and start the program."""
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                await psycopg.AsyncConnection.connect(url, autocommit=True)
            )
            for _ in range(2)
        ]
        reader_connection = stack.enter_context(psycopg.connect(url, autocommit=True))
        # On a busy machine the stream takes longer than events may wait for it.
        stack.enter_context(patch.object(reader, "_LSN_WAIT_SECONDS", _REACH_SECONDS))
        await first.execute(schema(scene).encode())
        slot = f"h_{url.rpartition('/')[2]}"
        service = await stack.enter_async_context(run_service(configuration(scene, url, slot)))
        yield World(scene, url, service, Ledger(scene), (first, second), reader_connection)
    if scene.is_durable:
        await drop_slot(url, slot)


async def drop_slot(url: str, slot: str) -> None:
    """Drop the slot, which outlives the program."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        for _ in range(50):
            try:
                await connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
            except psycopg.errors.ObjectInUse:
                await asyncio.sleep(0.1)
            else:
                return


Move: TypeAlias = Callable[[], Awaitable[None]]


class History:
    """One history: fresh rows, users and readers in a world.

    Args:
        world: Database and program.
        seed: Decides everything except durations.
        faults: Probability that a step is a fault.
        skip: Steps to leave out; the others stay the same.
    """

    def __init__(
        self, world: World, seed: str, *, faults: float = 0.0, skip: Container[int] = ()
    ) -> None:
        self.world, self.seed = world, seed
        self._skip = skip
        self.rng = random.Random(seed)
        world.histories += 1
        self._faults = faults
        prefix = f"h{world.histories}"
        self.first = world.ledger.begun + 1
        self.writer = Writer(world.ledger, world.connections, self.rng, prefix)
        self.clients: list[Client] = []
        self._witnesses: list[Client] = []
        self._alters = 0
        self._under_way: set[asyncio.Task[None]] = set()
        self._start = world.service.hub._changelog.end_cursor
        self._decoder_failures = self._count_decoder_failures()
        world.forget_slowness()
        self._unasked = world.executor.unanswered_counts.copy()

    async def run(self) -> Findings:
        """Run all steps, and return what is wrong."""
        rng = self.rng
        async with asyncio.timeout(HISTORY_SECONDS), self.audited() as findings:
            self.clients = [self._random_client() for _ in range(rng.choice([4, 5, 6]))]
            for number in range(rng.choice([15, 25, 40])):
                rng.seed(f"{self.seed}/{number}")
                if number in self._skip:
                    continue
                await self._step()
                for client in (*self._witnesses, *self.clients):
                    client.mind_end()
        return findings

    @asynccontextmanager
    async def audited(self) -> AsyncIterator[Findings]:
        """Write the first rows; at the end wait until all is delivered, and audit it."""
        world, findings = self.world, Findings()
        topics = [Topic(collection=name) for name in ("users", "teams", "members", *DOCS)]
        witness = world.client(ROOT, "position", *topics)
        self._witnesses = [witness]
        try:
            await witness.wait_served()
            await self.writer.prepare()
            yield findings
            await self._calm_down([witness, *self.clients])
        finally:
            for client in (witness, *self.clients):
                await client.close()
            for task in self._under_way:
                task.cancel()
        if failures := self._count_decoder_failures() - self._decoder_failures:
            # After an ALTER PostgreSQL's decoder may fail each time at one place of the WAL that a
            # durable slot is sent again ("could not open toast relation", "pfree called with
            # invalid pointer"). The stream skips that position and what follows it.
            world.ledger.happens("decoder")
            findings.counts["failures of the server's decoder"] += failures
        for (_, why), count in (world.executor.unanswered_counts - self._unasked).items():
            findings.counts[f"questions: {why}"] += count
        changelog = world.service.hub._changelog
        learn_cursors(
            world.ledger,
            changelog.read(max(self._start, changelog.floor), changelog.end_cursor, 1 << 30),
        )
        for client in (witness, *self.clients):
            Audit(world.ledger, client, self.first, findings).run()
        findings.counts["histories"] += 1
        findings.counts["commits"] += self.writer.commits
        findings.counts["streams"] += sum(len(client.streams) for client in self.clients)
        world.ledger.happenings.clear()

    def _random_client(self) -> Client:
        rng = self.rng
        person = rng.choice(["", *self.writer.users, *self.writer.users, ROOT])
        kind: Kind = rng.choice(["position", "position", "cursor", "cursor", "resync", "plain"])
        topics = [self._random_topic() for _ in range(rng.choice([1, 2, 3]))]
        return self.world.client(person, kind, *topics)

    def _random_topic(self) -> Topic:
        rng = self.rng
        collection = rng.choice([*DOCS, *DOCS, *DOCS, "users", "teams"])
        if collection not in DOCS:
            return Topic(collection=collection)
        ids = self.writer.docs[collection]
        return Topic(
            collection=collection,
            record_id=rng.choice(ids) if rng.random() < 0.35 else "",
            filter=rng.choice(list(FILTERS.values())) if rng.random() < 0.25 else None,
            fields=rng.choice([("id", "mark", "gen", "expand"), ("id", "mark", "body", "liked_by")])
            if rng.random() < 0.2
            else (),
            expand=rng.random() < 0.35,
        )

    def _count_decoder_failures(self) -> int:
        return self.world.service.reloader._parts.feed.status.breaks["decoder_failed"]

    # --- steps

    async def _step(self) -> None:
        rng = self.rng
        if rng.random() < self._faults:
            await self._fault()
            return
        client = rng.choice(self.clients)
        moves: list[tuple[float, Move]] = [
            (6, self.writer.write),
            (3, self._write_quickly),
            (2, self._write_slowly),
            (4, self._connect(client)),
            (1, self._break(client)),
            (1, self._stall(client)),
            (1, self._go_on(client)),
            (2, self._wait),
            (0.3, lambda: self.world.check_books(self.writer)),
        ]
        ((_, move),) = rng.choices(moves, [weight for weight, _ in moves])
        await move()

    async def _write_quickly(self) -> None:
        await self.writer.write(self.rng.choice([2, 3, 5]))

    async def _write_slowly(self) -> None:
        if self.writer.is_open or self.world.service.hub.is_stream_up:
            await self.writer.write_slowly()

    def _connect(self, client: Client) -> Move:
        async def connect() -> None:
            client.connect()
            if self.rng.random() < 0.5:
                await client.wait_served()

        return connect

    def _break(self, client: Client) -> Move:
        async def break_off() -> None:
            await client.break_off(lambda count: self.rng.randint(0, min(count, 8)))
            if self.rng.random() < 0.5:
                client.connect()

        return break_off

    def _stall(self, client: Client) -> Move:
        async def stall() -> None:
            client.stall()

        return stall

    def _go_on(self, client: Client) -> Move:
        async def go_on() -> None:
            client.go_on()

        return go_on

    async def _wait(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0, 0.001, 0.005, 0.02]))

    # --- faults

    async def _fault(self) -> None:
        faults: list[tuple[float, Move]] = [
            (3, self.kill_queries),
            (1, self.kill_walsender),
            (2, self.lock),
            (2, self._alter_something),
        ]
        ((_, fault),) = self.rng.choices(faults, [weight for weight, _ in faults])
        self.world.findings.counts[f"fault:{fault.__name__}"] += 1
        await fault()

    async def kill_queries(self) -> None:
        """End the connections that the program queries with."""
        self.world.ledger.happens("queries")
        await self.world.connections[0].execute(KILL.encode(), ["client backend"])

    async def kill_walsender(self) -> None:
        """End the replication connection."""
        if self.world.scene.is_durable or not self._under_way:
            await self.writer.finish()  # making a slot waits for it
            self.world.ledger.happens("walsender")
            await self.world.connections[0].execute(KILL.encode(), ["walsender"])

    async def kill_everything(self) -> None:
        """End all of the program's connections, without waiting until they are gone."""
        self.world.ledger.happens("walsender")
        self.world.ledger.happens("queries")
        await self.world.connections[0].execute(KILL_ALL)

    async def lock(self, docs: str = "") -> None:
        """Lock a table for longer than a query may take, while others are written."""
        docs = docs or self.rng.choice([*DOCS, "teams", "teams", "members", *LIKES.values()])
        if self.writer.is_open or docs in self.writer.locked:
            return
        happening = self.world.ledger.happens("lock", docs)
        self.writer.locked.add(docs)
        locker = await psycopg.AsyncConnection.connect(self.world.url)
        await locker.execute(sql.SQL("LOCK TABLE {}").format(sql.Identifier(docs)))

        async def release() -> None:
            try:
                await asyncio.sleep(_LOCK_SECONDS)
            finally:
                await locker.close()
                self.writer.locked.discard(docs)
            await asyncio.sleep(0.6)
            happening.upto = self.world.ledger.begun

        self._spawn(release())

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _alter_something(self) -> None:
        docs = self.rng.choice(DOCS)
        if self.writer.is_open or docs in self.writer.locked:
            return
        if self.world.scene.is_durable:
            # A slot that is read again from before an ALTER can crash PostgreSQL 17's walsender
            # (signal 11), and so the server with all its clients.
            return
        self._alters += 1
        name = f"x{self.world.histories}_{self._alters}"
        match self.rng.randrange(3):
            case 0:
                statement = f"ALTER TABLE {docs} ADD {name} text DEFAULT '{name}'"
            case 1:
                statement = f"ALTER TABLE {docs} ADD {name} int; ALTER TABLE {docs} DROP {name}"
            case _:
                type_ = self.rng.choice(["int", "bigint", "numeric"])
                statement = f"ALTER TABLE {docs} ALTER n TYPE {type_}"
        await self.alter(docs, statement)

    async def alter(self, docs: str, statement: str) -> None:
        """Change a table."""
        self.world.ledger.happens("alter", docs)
        await self.writer.run(statement)

    # --- the end

    async def _calm_down(self, clients: list[Client]) -> None:
        await self.writer.finish()
        while self._under_way:
            await asyncio.wait(self._under_way)
        for client in clients:
            client.go_on()
        try:
            async with asyncio.timeout(CALM_SECONDS):
                await self._everybody_served(clients)
        except TimeoutError:
            mute = [str(client) for client in clients if not client.is_served]
            raise AssertionError(f"not served, or mute: {mute}") from None

    async def _everybody_served(self, clients: list[Client]) -> None:
        for turn in range(20):
            for client in clients:
                await client.wait_served()
            name = f"{self.writer.prefix}f{turn}"
            before = [len(client.streams[-1].messages) for client in clients]
            await self.writer.fence(name)
            is_fence = partial(_is_of, "fence/*", name)
            received = [
                await client.wait_received(is_fence, since)
                for client, since in zip(clients, before, strict=True)
            ]
            if all(received):
                return


def _is_of(event: str, record_id: str, message: Message) -> bool:
    return message.event == event and message.data["record"]["id"] == record_id


def scene_of(seed: str) -> Scene:
    """Return the scene of a world's seed."""
    return random_scene(random.Random(seed))
