"""A snapshot in which rows are read and rules evaluated, for the related data of an event's row.

Related records, live rows and callers' own rows are read in one ``ReadSession``, so that all of
them are of one moment. ``QueryExecutor.read_session`` opens it.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from collections.abc import Collection as Sized
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Protocol

import psycopg

from pgrealtime.catalog.model import canonical_id
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, unpadded_id
from pgrealtime.fairness import YieldTimer
from pgrealtime.lsn import LSN, Xid
from pgrealtime.postgres.rows import TextRow, rows_by_key_statement
from pgrealtime.postgres.session import TIMEOUT_ERRORS
from pgrealtime.rule_queries.rounds import (
    BudgetedTransaction,
    PendingEvaluation,
    QuestionRounds,
    UnansweredQuestions,
)
from pgrealtime.snapshot import ReadPoint, Snapshot


class ReadSession:
    """One snapshot to read in; after an error a younger one."""

    def __init__(
        self,
        transaction: BudgetedTransaction,
        rounds: QuestionRounds,
        unanswered: UnansweredQuestions,
    ) -> None:
        self._transaction = transaction
        self._rounds = rounds
        self._unanswered = unanswered
        self._has_failed = False

    @property
    def snapshot(self) -> Snapshot:
        """Which transactions are seen."""
        return self._transaction.read_point.snapshot

    @property
    def insert_lsn(self) -> LSN:
        """Where the WAL ended when the snapshot was taken: all that it sees commits before."""
        return self._transaction.read_point.insert_lsn

    async def fetch_read_point(self) -> ReadPoint:
        """Return both; of a session without transactions to see, also before its first query."""
        return await self._transaction.fetch_read_point()

    @property
    def is_broken(self) -> bool:
        """Whether the connection can't be used any more."""
        return self._transaction.is_broken

    @property
    def has_failed(self) -> bool:
        """Whether a query failed, or took too long, that should have had an answer."""
        return self._has_failed

    async def fetch_texts(
        self, statement: str, params: Mapping[str, object]
    ) -> list[TextRow] | None:
        """Return a query's rows in the stream's text forms; None if it fails.

        A query that times out is run once more, unless one failed before in this session: a lock
        may be gone the second time. Raises ``psycopg.Error`` if the connection broke,
        ``TimeoutError`` if the session's seconds are over.
        """
        attempts = 1 if self._has_failed else 2
        return await self._fetch(
            partial(self._transaction.fetch_texts, statement, params), attempts
        )

    async def fetch_texts_once(
        self,
        statement: str,
        params: Mapping[str, object],
        *,
        is_last: bool = False,
        max_characters: int | None = None,
    ) -> list[TextRow] | None:
        """As ``fetch_texts``, but a query that times out is not run again.

        Nothing is asked after one that ``is_last``, which ends the session in the same round trip.

        With ``max_characters`` the rows are streamed; more raise ``RowsTooLargeError``, and the
        session has ended then.
        """
        transaction = self._transaction
        if max_characters is None:
            fetch = partial(transaction.fetch_texts, statement, params, is_last=is_last)
            return await self._fetch(fetch, 1)
        stream = partial(
            transaction.stream_texts, statement.encode(), params, max_characters=max_characters
        )
        return await self._fetch(stream, 1)

    async def _fetch(
        self, fetch: Callable[[], Awaitable[list[TextRow]]], attempts: int
    ) -> list[TextRow] | None:
        transaction = self._transaction
        for attempts_left in reversed(range(attempts)):
            began = time.perf_counter()
            try:
                rows = await fetch()
            except psycopg.Error as error:
                if transaction.is_broken:
                    raise
                if transaction.budget.is_limited and isinstance(error, TIMEOUT_ERRORS):
                    raise TimeoutError from error
                self._unanswered.log_error("", error)
                await transaction.recover()
                if isinstance(error, psycopg.errors.InsufficientPrivilege):
                    return None  # as the operator wants it, or reported at start
                if not attempts_left or not isinstance(error, TIMEOUT_ERRORS):
                    break
            else:
                transaction.budget.spend(time.perf_counter() - began)
                self._raise_if_spent()
                return rows
        self._has_failed = True
        return None

    async def answer_questions(self, evaluation: PendingEvaluation) -> None:
        """Answer an evaluation's questions, or deny them. Raises as ``fetch_texts``."""
        await self._rounds.answer(self._transaction, evaluation)
        self._raise_if_spent()

    def _raise_if_spent(self) -> None:
        if self._transaction.budget.is_spent():
            raise TimeoutError


class ReadSessionFactory(Protocol):
    """Opens read sessions: ``QueryExecutor``."""

    def read_session(
        self, xids: Sized[Xid], max_seconds: float | None = None
    ) -> AbstractAsyncContextManager[ReadSession]:
        """Open a snapshot that sees the transactions; see ``QueryExecutor.read_session``."""


async def fetch_rows_by_id(
    session: ReadSession,
    collection: Collection,
    ids: Iterable[str],
    *,
    max_characters: int | None = None,
) -> dict[str, Row] | None:
    """Return a collection's rows by id, in the stream's text forms; None if the query fails.

    An id that no row can have is left out, as is one of which there is no row. With
    ``max_characters`` the rows are streamed; see ``ReadSession.fetch_texts_once``.
    """
    key, table = collection.key, collection.table
    names = tuple([column.name for column in table.columns])
    statement = rows_by_key_statement(table.name, key, names)
    canonical = (canonical_id(record_id, key.type) for record_id in ids)
    params = {"ids": [text for text in canonical if text is not None]}
    texts = (
        await session.fetch_texts(statement, params)
        if max_characters is None
        else await session.fetch_texts_once(statement, params, max_characters=max_characters)
    )
    if texts is None:
        return None
    rows: dict[str, Row] = {}
    yield_timer = YieldTimer()
    for values in texts:
        row: Row = dict(zip(names, values, strict=True))
        rows[unpadded_id(collection, row[key.name] or "")] = row
        if yield_timer.is_due():
            await yield_timer.pause()
    return rows
