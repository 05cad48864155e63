"""What all workers together want of the stream, and the gaps that they ask for."""

import asyncio
from collections.abc import Awaitable, Callable, Collection

from pgrealtime.catalog.model import Catalog
from pgrealtime.catalog.record_ids import with_record_key
from pgrealtime.changes import TableName
from pgrealtime.errors import SetupError
from pgrealtime.feed.base import Feed, WantedTables
from pgrealtime.wal.assembler import RecordKeys

_GAP_SECONDS = 2.0
"""How long a gap waits for the other workers to ask for it, too."""

ReadTables = Callable[[Collection[TableName]], Awaitable[Catalog]]
"""Reads the catalogue of some tables."""


class SharedTables:
    """Has the stream carry what any worker wants; ``wanted`` is what it carries at the start."""

    def __init__(self, feed: Feed, read_tables: ReadTables, wanted: WantedTables) -> None:
        self._feed = feed
        self._read_tables = read_tables
        self._streamed = wanted
        self._wanted: dict[object, frozenset[TableName]] = {}
        self._lock = asyncio.Lock()

    async def want(
        self, worker: object, tables: Collection[TableName], record_keys: RecordKeys
    ) -> bool:
        """Stream at least these tables; return whether the stream was switched for it.

        The tables are streamed as they are in the schema now.

        Raises:
            PgRealtimeError: They can't be streamed; the stream is as it was.
        """
        async with self._lock:
            others = [names for key, names in self._wanted.items() if key != worker]
            union = frozenset(tables).union(*others)
            catalog = await self._read_tables(union)
            if missing := [str(name) for name in tables if name not in catalog.tables]:
                raise SetupError(f'table "{missing[0]}" doesn\'t exist any more', code="catalog")
            keys = {**self._streamed.record_keys, **record_keys}
            # A table that another worker wants may be gone: it will find out, too.
            found = {
                name: with_record_key(table, keys.get(name, ()))
                for name, table in catalog.tables.items()
                if name in union
            }
            wanted = WantedTables(
                tables=found,
                record_keys={name: columns for name, columns in keys.items() if name in found},
            )
            is_other = wanted != self._streamed
            if is_other:
                await self._feed.want(wanted)
                self._streamed = wanted
            self._wanted[worker] = frozenset(tables)
            return is_other

    def forget(self, worker: object) -> None:
        """The worker has ended. What it wanted is streamed until another one wants something."""
        self._wanted.pop(worker, None)


class GapRequests:
    """Appends a gap once, although every worker asks for it when it has seen its cause."""

    def __init__(self, feed: Feed, count_workers: Callable[[], int]) -> None:
        self._feed = feed
        self._count_workers = count_workers
        self._asked: dict[tuple[str, frozenset[TableName]], set[object]] = {}

    def ask(self, worker: object, reason: str, tables: frozenset[TableName]) -> None:
        """Append the gap when all workers have asked, or after a while.

        Not before: a worker that isn't so far would drop a gap of a table that it doesn't know yet.
        """
        asked = self._asked.setdefault((reason, tables), set())
        if not asked:
            asyncio.get_running_loop().call_later(_GAP_SECONDS, self._append, reason, tables)
        asked.add(worker)
        if len(asked) >= self._count_workers():
            self._append(reason, tables)

    def _append(self, reason: str, tables: frozenset[TableName]) -> None:
        if self._asked.pop((reason, tables), None):
            self._feed.append_gap(reason, tables)
