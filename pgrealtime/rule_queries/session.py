"""A snapshot in which rows are read and rules asked."""

from __future__ import annotations

from collections.abc import Collection as Sized
from collections.abc import (
    Iterable,
    Mapping,
)
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from psycopg import sql

from pgrealtime.catalog.keys import canonical_id, native_key_type
from pgrealtime.catalog.naming import identifier
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, unpadded_id
from pgrealtime.fairness import YieldTimer
from pgrealtime.lsn import LSN, Xid
from pgrealtime.rules.engine.batch_query import Question
from pgrealtime.snapshot import Snapshot


class ReadSession(Protocol):
    """One snapshot to read in."""

    @property
    def snapshot(self) -> Snapshot:
        """Which transactions are seen."""
        ...

    @property
    def insert_lsn(self) -> LSN:
        """Where the WAL ended when the snapshot was there."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether a query had no answer, or not in time, though it should have had one."""
        ...

    async def fetch_texts(
        self, statement: sql.Composed, params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]] | None:
        """Return the rows in the stream's text forms; None if the query fails."""
        ...

    async def answer_questions(self, evaluation: PendingEvaluation) -> None:
        """Put what is to be known, until nothing is left."""
        ...


class ReadSessionFactory(Protocol):
    """What this needs of ``hub.probe``."""

    def read_session(
        self, xids: frozenset[Xid], max_seconds: float | None = None
    ) -> AbstractAsyncContextManager[ReadSession]:
        """Open a snapshot that sees the transactions.

        Args:
            xids: The transactions.
            max_seconds: That all questions may take together; None is no bound.

        Raises:
            psycopg.Error: There is none to be had.
            PoolTimeout: Likewise.
            TimeoutError: Likewise.
        """
        ...


async def fetch_rows_by_id(
    session: ReadSession, collection: Collection, ids: Iterable[str]
) -> dict[str, Row] | None:
    """Return a collection's rows by id, in the stream's text forms; None if the query fails.

    Args:
        session: The snapshot to read in.
        collection: Whose rows.
        ids: Of them; what no key can be is left out, as are ids of which there is no row.
    """
    names = [column.name for column in collection.table.columns]
    key = collection.key
    usable = [one for one in (canonical_id(one, key.type) for one in ids) if one is not None]
    found = await session.fetch_texts(rows_by_id_statement(collection), {"ids": usable})
    if found is None:
        return None
    rows: dict[str, Row] = {}
    turn = YieldTimer()
    for values in found:
        row: Row = dict(zip(names, values, strict=True))
        rows[unpadded_id(collection, row[key.name] or "")] = row
        if turn.is_due():
            await turn.pause()
    return rows


class PendingEvaluation(Protocol):
    """An ``Evaluation`` of the rule engine: questions to answer, in rounds."""

    @property
    def xids(self) -> Sized[Xid]:
        """The transactions that must be visible to whoever answers."""
        ...

    def questions(self) -> list[Question]:
        """Return what must be asked now; nothing if all is known."""
        ...

    def resume(self) -> None:
        """Go on when the inquiries have been put."""
        ...


def rows_by_id_statement(collection: Collection) -> sql.Composed:
    """Return the query for rows by id, in the table's column order."""
    native = native_key_type(collection.key.type)
    key = identifier(collection.key.name)
    return sql.SQL(
        "SELECT {columns} FROM {table} WHERE {key} OPERATOR(pg_catalog.=) ANY (%(ids)s::{type}[])"
    ).format(
        columns=sql.SQL(", ").join(identifier(one.name) for one in collection.table.columns),
        table=identifier(*collection.table.name),
        key=key if native else sql.SQL("{}::pg_catalog.text").format(key),
        type=identifier("pg_catalog", native or "text"),
    )
