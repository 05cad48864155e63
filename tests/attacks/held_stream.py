"""A database, and a hub whose stream advances only as a test permits.

The database is ahead of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from pgrealtime.auth.account import AccountLoader, UserCollection
from pgrealtime.auth.authenticator import caller_of_account
from pgrealtime.auth.principal import Caller
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changelog.memory import Changelog, Entry
from pgrealtime.changes import Delete, Insert, Transaction, Update
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.hub import Hub
from pgrealtime.hub.state.progress import HubSettings
from pgrealtime.lsn import LSN, Xid, parse_lsn
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rules.rule_set import caller_columns_read_by_rules
from tests.unit.hub.harness import DEADLINE, MemorySink


@dataclass
class World:
    """A database, and a hub whose stream advances only as a test permits."""

    connection: psycopg.AsyncConnection[Any]
    accounts: AccountLoader
    collections: Collections
    hub: Hub
    changelog: Changelog
    sinks: dict[str, MemorySink] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)
    """The topics that each connection subscribes to."""

    async def user(self, record_id: str) -> Caller:
        """Return a caller of the collection "users", made of the current row."""
        asked = caller_columns_read_by_rules(self.collections).get("users", ())
        users = UserCollection(collection=self.collections["users"], rule_columns=asked)
        account = await self.accounts.load(users, record_id)
        assert account is not None
        return caller_of_account(account, None)

    async def listen(
        self, name: str, topic: str, caller: Caller, position: str | None = None
    ) -> None:
        """Connect and subscribe under a name; with a position, resume from there."""
        sink = self.sinks[name] = MemorySink()
        self.topics[name] = topic
        connection = self.hub.open_connection(
            sink, address="", last_event_id=None, position=position
        )
        await self.hub.subscribe(connection.id, [topic], caller, "")

    async def write(self, statement: str, *changes: Insert | Update | Delete) -> Transaction:
        """Commit; return the transaction as the stream would bring it."""
        async with self.connection.transaction():
            xid = await self._one("SELECT pg_catalog.pg_current_xact_id()::text")
            await self.connection.execute(sql.SQL(statement))
        end = await self._one("SELECT pg_catalog.pg_current_wal_insert_lsn()::text")
        return Transaction(
            xid=Xid(int(xid)),
            end_lsn=parse_lsn(end),
            commit_time_us=0,
            changes=changes,
            size_bytes=100,
        )

    async def _one(self, query: LiteralString) -> str:
        row = await (await self.connection.execute(query)).fetchone()
        assert row is not None
        return str(row[0])

    async def stream(self, *entries: Entry) -> None:
        """Append the entries; wait until they are delivered, also to connections that catch up."""
        for one in entries:
            self.changelog.append(one)
        self.hub.wake()
        async with asyncio.timeout(DEADLINE):
            while self.hub.head < self.changelog.end_cursor:
                self.hub.progressed.clear()
                await self.hub.progressed.wait()
            while any(map(self._is_behind, self.hub.connections)):
                await asyncio.sleep(0.001)

    def _is_behind(self, connection: Connection) -> bool:
        sink = connection.writer
        is_stuck = isinstance(sink, MemorySink) and sink.is_stuck
        return connection.is_catching_up() and connection.cursor < self.hub.head and not is_stuck

    def data(self, name: str) -> list[str]:
        """Return what the connection was sent, without PB_CONNECT."""
        return [data for _, event, data in self.sinks[name].events() if event != "PB_CONNECT"]


@asynccontextmanager
async def world_of(
    url: str, schema: str, configured: Mapping[str, CollectionConfig], **hub: Any
) -> AsyncIterator[World]:
    """Make the tables and a hub over them; ``hub`` are its settings."""
    async with (
        await psycopg.AsyncConnection.connect(url, autocommit=True) as connection,
        QueryPool(url, max_size=3, statement_timeout=30.0) as pool,
    ):
        await connection.execute(sql.SQL(schema))
        collections = build_collections(
            configured, await read_catalog(connection, schemas=["public"])
        )
        changelog = Changelog(LSN(100), max_bytes=1_000_000, max_age_seconds=300.0)
        made = Hub(changelog, QueryExecutor(pool), collections, HubSettings(**hub))
        made.stream_started("abcdef")
        running = asyncio.create_task(made.run())
        try:
            yield World(connection, AccountLoader(pool), collections, made, changelog)
        finally:
            for one in list(made.connections):
                made.remove_connection(one)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
