"""What the owner of a log asks of PostgreSQL, apart from the stream."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psycopg

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName
from pgrealtime.config.model import Config
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.log.owner import SlotPosition
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.wal.server import fetch_row, open_ordinary_connection
from pgrealtime.wal.slot_status import end_walsender, list_own_slots

_PROBE_SECONDS = 5.0
_IDENTITY_QUERY = """
SELECT system_identifier::text, pg_catalog.current_database()::text
FROM pg_catalog.pg_control_system()
"""
_TIMELINE_QUERY = """
SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL
       ELSE substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) END
"""


class SlotDatabase:
    """What the owner asks of PostgreSQL; an ``OwnerDatabase``."""

    def __init__(self, config: Config, pool: QueryPool) -> None:
        self._url = config.database.url
        self._slot_name = config.replication.slot.name
        self._pool = pool
        self._probe: asyncio.Task[bool] | None = None

    async def slot_position(self) -> SlotPosition:
        """Return the slot's position, and the primary's timeline.

        Raises:
            PgRealtimeError: The database can't be reached, or is no primary.
        """
        with _reaching_database():
            async with await open_ordinary_connection(self._url) as connection:
                (timeline,) = await fetch_row(connection, _TIMELINE_QUERY)
                if timeline is None:
                    raise DatabaseUnreachableError("the server is a standby", code="standby")
                slots = await list_own_slots(connection, self._slot_name)
        found = [s.confirmed_flush_lsn for s in slots if s.name == self._slot_name]
        return SlotPosition(found[0] if found else None, int(timeline, 16))

    async def identity(self) -> tuple[str, str]:
        """Return the system's identifier and the database's name.

        Raises:
            PgRealtimeError: The database can't be reached.
        """
        with _reaching_database():
            async with await open_ordinary_connection(self._url) as connection:
                system_id, name = await fetch_row(connection, _IDENTITY_QUERY)
        return system_id, name

    async def timeline(self) -> int:
        """Return the timeline of the primary that the pool reaches; 0 if it reaches none."""
        try:
            async with self._pool.connection(_PROBE_SECONDS) as connection:
                cursor = await connection.execute(_TIMELINE_QUERY.encode())
                row = await cursor.fetchone()
        except psycopg.Error:
            return 0
        return 0 if row is None or row[0] is None else int(row[0], 16)

    async def end_walsender(self) -> None:
        """End the walsender that still reads the slot, if there is one, and wait for its end."""
        with _reaching_database():
            async with await open_ordinary_connection(self._url) as connection:
                await end_walsender(connection, self._slot_name)

    async def is_answering(self, seconds: float) -> bool:
        """Return whether a query is answered within so many seconds."""
        # Not cancelled and waited for: ending a query behind a network that drops packets takes
        # the driver seconds.
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._run_probe())
        await asyncio.wait([self._probe], timeout=seconds)
        return self._probe.done() and self._probe.result()

    async def _run_probe(self) -> bool:
        try:
            async with self._pool.connection(_PROBE_SECONDS) as connection:
                await connection.execute(b"SELECT 1")
        except psycopg.Error:
            return False
        return True

    async def read_tables(self, names: frozenset[TableName]) -> Mapping[TableName, Table]:
        """Return those of the tables that are there.

        Raises:
            DatabaseUnreachableError: Code ``catalog``: PostgreSQL doesn't answer.
        """
        if not names:
            return {}
        try:
            async with self._pool.connection() as connection:
                return (await read_catalog(connection, names=names)).tables
        except psycopg.Error as error:
            raise DatabaseUnreachableError(
                "the catalogue can't be read", detail=message_without_values(error), code="catalog"
            ) from error


@contextmanager
def _reaching_database() -> Iterator[None]:
    """Translate the driver's errors: whatever it is, a later attempt may succeed."""
    try:
        yield
    except psycopg.Error as error:
        raise DatabaseUnreachableError(
            "the database can't be asked", detail=message_without_values(error)
        ) from error
