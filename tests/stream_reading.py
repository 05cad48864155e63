"""Reads a real stream in tests: what is open, what it brought, up to a finish line of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeAlias

import psycopg
from psycopg import sql

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Table
from pgrealtime.changes import Change, OversizedTransaction, TableName, Transaction
from pgrealtime.config.model import ReplicationConfig
from pgrealtime.wal.assembler import RecordKeys
from pgrealtime.wal.publication import publication_sql
from pgrealtime.wal.stream import WalStream, open_stream

Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]
Plugin: TypeAlias = Literal["wal2json", "pgoutput"]

DEADLINE_SECONDS = 30.0
PLUGINS: tuple[Plugin, ...] = ("wal2json", "pgoutput")

FINISH = TableName("finish line", "crossed")
"""The last line of a workload: a transaction of its own that marks that all before has come."""


@asynccontextmanager
async def writer(url: str) -> AsyncIterator[Connection]:
    """Return a connection in autocommit, with the finish table created."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(
            'CREATE SCHEMA IF NOT EXISTS "finish line";'
            'CREATE TABLE IF NOT EXISTS "finish line".crossed (id bigserial PRIMARY KEY)'
        )
        yield connection


async def read_tables(connection: Connection, *schemas: str) -> list[Table]:
    """Return every table of the schemas that is no partition, and the finish table."""
    catalog = await read_catalog(connection, schemas=schemas or ("public",), names=[FINISH])
    return [table for table in catalog.tables.values() if table.partition_of is None]


@asynccontextmanager
async def reading(
    url: str,
    connection: Connection,
    plugin: Plugin,
    *schemas: str,
    max_size: int = 1 << 30,
    record_keys: RecordKeys | None = None,
    config: ReplicationConfig | None = None,
) -> AsyncIterator[WalStream]:
    """Open the stream of all tables of the schemas, with a publication where it needs one."""
    tables = await read_tables(connection, *schemas)
    if plugin == "pgoutput":
        version = connection.info.server_version
        await connection.execute("DROP PUBLICATION IF EXISTS pgrealtime")
        await connection.execute(publication_sql("pgrealtime", tables, version).encode())
    config = (config or ReplicationConfig()).model_copy(update={"plugin": plugin})
    async with open_stream(
        url, config, tables, max_transaction_bytes=max_size, record_keys=record_keys
    ) as stream:
        yield stream


async def finish(connection: Connection) -> None:
    """Write the last line."""
    await connection.execute(sql.SQL("INSERT INTO {} DEFAULT VALUES").format(_FINISH))


_FINISH = sql.Identifier(*FINISH)


async def read_to_finish(stream: WalStream) -> list[Transaction | OversizedTransaction]:
    """Return what came up to the finish line, without that; everything is confirmed."""
    read: list[Transaction | OversizedTransaction] = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for batch in stream:
            stream.feedback.confirm(batch[-1].end_lsn)
            read += batch
            match read[-1]:
                case Transaction(changes=(only,)) if only.table == FINISH:
                    return read[:-1]
                case _:
                    pass
    raise AssertionError


async def changes_of(connection: Connection, stream: WalStream) -> list[Change]:
    """Return the changes of all transactions so far, in order."""
    await finish(connection)
    read = await read_to_finish(stream)
    assert all(isinstance(one, Transaction) for one in read)
    return [change for one in read if isinstance(one, Transaction) for change in one.changes]


async def until_true(connection: Connection, query: str, *values: object) -> None:
    """Repeat a query until its answer is true; the server has no event to wait for."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await _is_true(connection, query, values):
            await asyncio.sleep(0.01)


async def _is_true(connection: Connection, query: str, values: Sequence[object]) -> bool:
    return await (await connection.execute(query.encode(), values)).fetchone() == (True,)
