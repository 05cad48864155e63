"""Reads rows as they are now, to complete row images from which the WAL left out columns.

``hub.evaluation.toast`` decides which of the columns read are what they were at the event.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import psycopg
import structlog
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.lsn import LSN, Xid
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.postgres.rows import rows_by_key_statement
from pgrealtime.postgres.session import (
    TIMEOUT_ERRORS,
    DatabaseOutage,
    ReadTransaction,
    is_connection_error,
    visibility_retry_delays,
)
from pgrealtime.rule_queries.rounds import UnansweredQuestions
from pgrealtime.snapshot import Snapshot

log = structlog.get_logger(__name__)

_EXISTING_COLUMNS_QUERY = """
SELECT attname FROM pg_catalog.pg_attribute
WHERE attrelid = pg_catalog.to_regclass(%s) AND attnum > 0 AND NOT attisdropped
"""
_XMIN = "t.xmin::pg_catalog.text"
_UNREADABLE_SECONDS = 5.0
"""A table whose rows could not be read in time isn't read again before that."""


class IncompleteRow(Protocol):
    """A row image that lacks columns: an event of the hub."""

    collection: Collection
    record_id: str
    xid: Xid

    @property
    def missing_columns(self) -> frozenset[str]:
        """Names of the columns that it lacks."""


class LiveRow(NamedTuple):
    """What a table holds now for a key."""

    writer_xid: int
    """32-bit id of the (sub)transaction that wrote this version."""
    row: Row
    snapshot: Snapshot
    insert_lsn: LSN
    """Where the WAL ended then: all that the snapshot sees commits before."""


@dataclass(eq=False)
class LiveRowReader:
    """Reads live rows, in snapshots that see the transactions that wrote the images."""

    pool: QueryPool
    outage: DatabaseOutage
    unanswered: UnansweredQuestions
    unreadable_until: dict[str, float] = field(default_factory=dict)
    """By collection, until when its rows aren't read: a statement timed out twice."""

    async def fetch(
        self, images: Sequence[IncompleteRow]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        """Return what the tables hold now of the columns that row images lack.

        The rows are by collection name and record id; a record that is gone leaves its key out, and
        a column that was dropped itself. With them, the collections whose rows couldn't be read.
        """
        by_collection: defaultdict[str, list[IncompleteRow]] = defaultdict(list)
        for image in images:
            by_collection[image.collection.name].append(image)
        live_rows: dict[tuple[str, str], LiveRow] = {}
        unread: set[str] = set()
        for name, images_of_one in by_collection.items():
            try:
                rows = await self._fetch_with_retries(images_of_one)
            except (psycopg.Error, PoolTimeout, TimeoutError) as error:
                log.warning("live_row.failed", collection=name, error=message_without_values(error))
                self.unanswered.counts[name, "rows_unread"] += 1
                unread.add(name)
            else:
                live_rows.update({(name, record_id): row for record_id, row in rows.items()})
        return live_rows, frozenset(unread)

    async def _fetch_with_retries(self, images: Sequence[IncompleteRow]) -> dict[str, LiveRow]:
        """Read rows of one collection; retry where another attempt may succeed."""
        collection = images[0].collection
        if time.monotonic() < self.unreadable_until.get(collection.name, 0.0):
            raise TimeoutError("the table couldn't be read in time a moment ago")
        missing = frozenset[str]().union(*(image.missing_columns for image in images))
        columns = [column.name for column in collection.table.columns if column.name in missing]
        is_repeated = False
        for retry_delay in self.outage.retry_delays():
            try:
                rows = await self._fetch(images, columns)
            except psycopg.errors.UndefinedColumn as error:
                self.unanswered.check_schema_mismatch(error)
                if is_repeated:
                    raise
                existing = await self._fetch_existing_columns(collection)
                columns = [name for name in columns if name in existing]
                is_repeated = True
            except TIMEOUT_ERRORS:
                if is_repeated:
                    self.unreadable_until[collection.name] = time.monotonic() + _UNREADABLE_SECONDS
                    raise
                is_repeated = True
            except psycopg.Error as error:
                self.unanswered.check_schema_mismatch(error)
                if retry_delay is None or not is_connection_error(error):
                    raise
                await asyncio.sleep(retry_delay)
            else:
                self.outage.record_answer()
                return rows
        raise TimeoutError("the table changes all the time")  # pragma: no cover

    async def _fetch_existing_columns(self, collection: Collection) -> frozenset[str]:
        name = sql.Identifier(*collection.table.name).as_string()
        async with self.pool.connection() as connection:
            cursor = await connection.execute(_EXISTING_COLUMNS_QUERY, (name,))
            return frozenset([column async for (column,) in cursor])

    async def _fetch(
        self, images: Sequence[IncompleteRow], columns: Sequence[str]
    ) -> dict[str, LiveRow]:
        collection = images[0].collection
        names = (collection.key.name, *columns)
        statement = rows_by_key_statement(
            collection.table.name, collection.key, names, _XMIN, compares_own_type=True
        )
        ids = list({image.record_id: None for image in images})
        xids = {image.xid for image in images}
        for retry_delay in visibility_retry_delays():
            # A connection for each attempt: a standby that lags keeps commits invisible for
            # seconds, and logins and snapshots share the few connections of the pool.
            async with self.pool.session() as connection:
                transaction = ReadTransaction(self.pool, connection, xids)
                if await transaction.try_begin():
                    texts = await transaction.fetch_texts(statement, {"ids": ids})
                    await transaction.finish()
                    break
            await asyncio.sleep(retry_delay)
        else:
            raise TimeoutError("a commit stays invisible")
        rows: dict[str, LiveRow] = {}
        point = transaction.read_point
        for key, *values, xmin in texts:
            row: Row = dict(zip(columns, values, strict=True))
            rows[key or ""] = LiveRow(int(xmin or 0), row, point.snapshot, point.insert_lsn)
        return rows
