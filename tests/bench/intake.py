"""Changes per second from the slot to ``Change``, against pg_recvlogical on a copy of the slot.

    python -m tests.bench.intake postgresql://postgres@127.0.0.1:5432/postgres

WAL is made once per size of transaction, half of it inserts and half updates. Then, round after
round, each reader drains a copy of the slot that was made before: pg_recvlogical writes to
/dev/null, ours takes the batches and keeps nothing. They alternate, both times include the
connection, and the result is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeAlias

import psycopg
import uvloop
from psycopg import pq

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName, Transaction
from pgrealtime.config.model import ReplicationConfig
from pgrealtime.lsn import LSN
from pgrealtime.wal import server
from pgrealtime.wal import slot as slots
from pgrealtime.wal.publication import publication_sql
from pgrealtime.wal.slot import Plugin, Slot
from pgrealtime.wal.stream import WalStream, make_decoder

SIZES = (1, 10, 1000)
PLUGINS: tuple[Plugin, ...] = ("wal2json", "pgoutput")
TABLE = TableName("public", "intake")
SETTINGS = ReplicationConfig(publication="intake")

SCHEMA = """
DROP TABLE IF EXISTS intake;
CREATE TABLE intake (
  id bigint PRIMARY KEY, title text, body text, done bool, price numeric(10,2), owner uuid,
  created timestamptz, tags text[]
);
CREATE PROCEDURE pg_temp.write(changes int, size int) LANGUAGE plpgsql AS $$
BEGIN
  FOR i IN 1 .. changes / 2 / greatest(size / 2, 1) LOOP
    INSERT INTO intake
      SELECT i * 1000 + j, 'title of ' || j, 'some text that goes on for a little while ' || j,
             j % 2 = 0, j * 1.25, 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', now(), '{a,"b c"}'
      FROM generate_series(1, greatest(size / 2, 1)) j;
    IF size = 1 THEN COMMIT; END IF;
    UPDATE intake SET done = NOT done WHERE id BETWEEN i * 1000 AND i * 1000 + 999;
    COMMIT;
  END LOOP;
END $$;
"""

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One drain of a slot."""

    seconds: float
    cpu_seconds: float
    """Of the client."""


@contextmanager
def copied(admin: Connection, origin: str) -> Iterator[str]:
    """Copy the slot; drop the copy at the end."""
    name = f"{origin}_copy"
    admin.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", (origin, name))
    try:
        yield name
    finally:
        # Its walsender may not have detected yet that the client is gone.
        admin.execute(
            "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
            " WHERE slot_name = %s AND active_pid IS NOT NULL",
            (name,),
        )
        admin.execute("SELECT pg_drop_replication_slot(%s)", (name,))


def drain_by_pg_recvlogical(url: str, slot: Slot, options: dict[str, str], end: str) -> Run:
    """Let PostgreSQL's own client read up to the position."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(
        [
            *("pg_recvlogical", f"--dbname={url}", f"--slot={slot.name}", "--start"),
            *("--no-loop", "--file=/dev/null", "--fsync-interval=0", f"--endpos={end}"),
            *(f"--option={name}={value}" for name, value in options.items()),
        ],
        check=True,
    )
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds=seconds, cpu_seconds=cpu)


async def drain_by_us(url: str, slot: Slot, table: Table, changes: int) -> Run:
    """Read until so many changes have come."""
    cpu = time.process_time()
    started = time.perf_counter()
    seen = 0
    async with server.open_replication_connection(url) as connection:
        decoder, options = make_decoder(slot.plugin, [table], SETTINGS)
        facts, (system, reach) = (
            await server.read_server_facts(connection),
            await server.identify_system(connection),
        )
        await slots.start_replication(connection, slot, options)
        stream = WalStream(
            connection,
            slot,
            decoder,
            tables=[table],
            facts=facts,
            system=system,
            initial_wal_end=reach,
            max_pause_seconds=SETTINGS.max_pause,
            max_transaction_bytes=1 << 30,
        )
        stream.start_reading()
        async for batch in stream:
            seen += sum(len(one.changes) for one in batch if isinstance(one, Transaction))
            if seen >= changes:
                break
        stream.stop()
    return Run(seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - cpu)


async def read_table(url: str) -> Table:
    """The table as the catalogue has it."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        return (await read_catalog(connection, names=[TABLE])).tables[TABLE]


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--changes", type=int, default=100_000, help="per size of transaction")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with psycopg.connect(arguments.url, autocommit=True) as admin:
        print(_machine(admin))
        print("plugin    rows/tx  pg_recvlogical  pgrealtime  ratio (min-max)    client us/change")
        for size in SIZES:
            measure(admin, arguments.url, size, arguments.changes, arguments.rounds)
        admin.execute("DROP TABLE intake; DROP PUBLICATION intake")


def measure(admin: Connection, url: str, size: int, changes: int, rounds: int) -> None:
    """Make the WAL, let both readers drain it alternately, print a line per plugin."""
    admin.execute("DROP PUBLICATION IF EXISTS intake")
    admin.execute("DROP PROCEDURE IF EXISTS pg_temp.write")
    admin.execute(SCHEMA)
    table = asyncio.run(read_table(url))
    admin.execute(publication_sql("intake", [table], admin.info.server_version).encode())
    for plugin in PLUGINS:
        admin.execute(
            "SELECT pg_create_logical_replication_slot(%s, %s)", (_origin(plugin), plugin)
        )
    try:
        admin.execute("CALL pg_temp.write(%s, %s)", (changes, size))
        (end,) = admin.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or ("",)
        admin.execute("TRUNCATE intake")  # something beyond the end, so that it is passed
        for plugin in PLUGINS:
            pairs = [
                _round(admin, url, plugin, table=table, end=end, changes=changes)
                for _ in range(rounds)
            ]
            print(_line(plugin, size, changes, pairs))
    finally:
        for plugin in PLUGINS:
            admin.execute("SELECT pg_drop_replication_slot(%s)", (_origin(plugin),))


def _origin(plugin: Plugin) -> str:
    return f"intake_{plugin}"


def _round(
    admin: Connection, url: str, plugin: Plugin, *, table: Table, end: str, changes: int
) -> tuple[Run, Run]:
    _, options = make_decoder(plugin, [table], SETTINGS)
    with copied(admin, _origin(plugin)) as name:
        slot = Slot(name=name, plugin=plugin, start_lsn=LSN(0))
        theirs = drain_by_pg_recvlogical(url, slot, options, end)
    with (
        copied(admin, _origin(plugin)) as name,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        slot = Slot(name=name, plugin=plugin, start_lsn=LSN(0))
        ours = runner.run(drain_by_us(url, slot, table, changes))
    return theirs, ours


def _line(plugin: Plugin, size: int, changes: int, pairs: list[tuple[Run, Run]]) -> str:
    ratios = sorted(theirs.seconds / ours.seconds for theirs, ours in pairs)
    theirs, ours = (
        statistics.median(changes / run.seconds for run in runs)
        for runs in zip(*pairs, strict=True)
    )
    cpu = (
        statistics.median(run.cpu_seconds / changes * 1e6 for run in runs)
        for runs in zip(*pairs, strict=True)
    )
    return (
        f"{plugin:9} {size:7} {theirs:13,.0f}/s {ours:9,.0f}/s"
        f"  {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        f"   {' / '.join(f'{micros:.1f}' for micros in cpu)} (theirs / ours)"
    )


def _machine(admin: Connection) -> str:
    (server,) = admin.execute("SELECT version()").fetchone() or ("",)
    return (
        f"{server}\n{platform.platform()}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}, psycopg {version('psycopg')} ({pq.__impl__}, libpq"
        f" {pq.version()}), msgspec {version('msgspec')}, uvloop {version('uvloop')}"
    )


if __name__ == "__main__":
    main()
