"""Puts the hub's questions to Postgres: rules, live rows, snapshots. Read only, bounded in time."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import psycopg
import structlog
from psycopg import sql
from psycopg.rows import scalar_row, tuple_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from pgrealtime.changes import Row
from pgrealtime.collections import Collection
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.hub.event import Event
from pgrealtime.hub.match import Group, Question
from pgrealtime.hub.snapshot import SNAPSHOT_QUERY
from pgrealtime.rules.reference import Reference

log = structlog.get_logger(__name__)

_LIVE_ROWS = sql.SQL(
    "SELECT xmin::text, {key}, {columns} FROM {table} WHERE {key} = ANY(%(keys)s::text[]::{type}[])"
)

_STANDBYS = "SELECT pg_catalog.current_setting('synchronous_standby_names')"


def _nobody() -> None:
    pass


class LiveRow:
    """What a table holds now for a key, to fill in what the WAL left out.

    Attributes:
        xid: 32-bit id of the (sub)transaction that wrote this version.
    """

    __slots__ = ("row", "xid")

    def __init__(self, xid: int, row: Row) -> None:
        self.xid = xid
        self.row = row


class Probe:
    """Asks through a pool whose connections are pinned as ``run`` says.

    Args:
        pool: Where to ask.
        on_doubt: Told when Postgres refuses a query as if the schema were another.
    """

    def __init__(
        self, pool: AsyncConnectionPool, *, on_doubt: Callable[[], None] = _nobody
    ) -> None:
        self._pool = pool
        self._on_doubt = on_doubt

    async def snapshot(self) -> tuple[str, str, bool]:
        """Return the row of ``SNAPSHOT_QUERY``.

        Raises:
            DatabaseUnreachableError: There was no answer.
        """
        try:
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=tuple_row)
                await cursor.execute(SNAPSHOT_QUERY)
                row = await cursor.fetchone()
        except (psycopg.Error, PoolTimeout) as error:
            raise DatabaseUnreachableError(
                "the database gave no snapshot", detail=str(error)
            ) from error
        if row is None:  # pragma: no cover (a SELECT without FROM has one row)
            raise DatabaseUnreachableError("the database gave no snapshot")
        return row

    async def has_synchronous_standbys(self) -> bool:
        """Whether commits may wait for a standby, and so be decoded long before they are visible.

        A database that doesn't answer now has the answer of before: that they may.
        """
        try:
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_STANDBYS)
                return await cursor.fetchone() != ("",)
        except (psycopg.Error, PoolTimeout):
            return True

    async def ask(
        self, questions: Sequence[Question], events: Sequence[Event]
    ) -> list[tuple[Group, list[int]]]:
        """Return, per question, the group and the places in ``events`` that its rule admits.

        Whatever can't be decided is denied and logged; it never keeps another from its answer.
        """
        answers = await asyncio.gather(*(self._ask(question, events) for question in questions))
        return [
            (question.group, places) for question, places in zip(questions, answers, strict=True)
        ]

    async def _ask(self, question: Question, events: Sequence[Event]) -> list[int]:
        predicate = question.group.predicate
        if not isinstance(predicate, Reference):
            return list(question.places)
        try:
            return await self._admitted(predicate, question.places, events)
        except (psycopg.Error, PoolTimeout) as error:
            _report(question.group, error)
            self._doubt(error)
            if len(question.places) == 1 or isinstance(error, psycopg.errors.QueryCanceled):
                return []
        admitted: list[int] = []
        for place in question.places:
            try:
                admitted += await self._admitted(predicate, (place,), events)
            except (psycopg.Error, PoolTimeout):
                continue  # reported above: one row of the batch, this one, is what fails
        return admitted

    async def _admitted(
        self, predicate: Reference, places: Sequence[int], events: Sequence[Event]
    ) -> list[int]:
        asked = predicate.question([events[place].row for place in places], datetime.now(UTC))
        async with self._pool.connection() as connection:
            cursor = connection.cursor(row_factory=scalar_row)
            await cursor.execute(asked.sql.encode(), asked.params)
            return [places[index] for index in await cursor.fetchall()]

    async def live_rows(self, events: Sequence[Event]) -> dict[tuple[str, str], LiveRow]:
        """Return what the tables hold now for the events' records, by collection name and id.

        A record that is gone, or a database that doesn't answer, leaves its key out.
        """
        wanted: defaultdict[str, dict[str, Collection]] = defaultdict(dict)
        for event in events:
            wanted[event.collection.name][event.record_id] = event.collection
        found: dict[tuple[str, str], LiveRow] = {}
        for name, ids in wanted.items():
            collection = next(iter(ids.values()))
            try:
                rows = await self._live_rows(collection, list(ids))
            except (psycopg.Error, PoolTimeout) as error:
                log.warning("live_row.failed", table=str(collection.table.name), error=str(error))
                self._doubt(error)
                continue
            found.update({(name, record_id): row for record_id, row in rows.items()})
        return found

    def _doubt(self, error: Exception) -> None:
        if isinstance(error, (psycopg.ProgrammingError, psycopg.NotSupportedError)):
            self._on_doubt()

    async def _live_rows(self, collection: Collection, ids: list[str]) -> dict[str, LiveRow]:
        columns = [column.name for column in collection.table.columns]
        key_type = collection.key.type.base
        query = _LIVE_ROWS.format(
            key=sql.Identifier(collection.key.name),
            columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
            table=sql.Identifier(*collection.table.name),
            type=sql.Identifier(key_type.schema, key_type.name),
        )
        async with self._pool.connection() as connection:
            cursor = await connection.execute(query, {"keys": ids})
            result = cursor.pgresult
            if result is None:  # pragma: no cover (an executed query has a result)
                return {}
            rows: dict[str, LiveRow] = {}
            for place in range(result.ntuples):
                # Raw text: the same form as in the stream, whatever the column's type.
                xid, key, *values = (
                    None if value is None else value.decode()
                    for value in (result.get_value(place, n) for n in range(result.nfields))
                )
                rows[key or ""] = LiveRow(int(xid or 0), dict(zip(columns, values, strict=True)))
            return rows


def _report(group: Group, error: Exception) -> None:
    log.error(
        "rule.error",
        collection=group.collection.name,
        topic_kind="collection" if group.place[1] is None else "record",
        error=str(error).splitlines()[0],
    )
