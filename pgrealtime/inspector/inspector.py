"""Answers what an operator asks of this process, by name of the view. Nothing runs in between.

One look at a time, in steps of two milliseconds: the loop is the events'. ``service`` and
``workers`` put the answers of several processes together (``answers.merge``).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from pgrealtime.changelog.memory import Changelog
from pgrealtime.changes import Transaction
from pgrealtime.collections.model import Collections, unpadded_id
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigProblem, LookError
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.hub import Hub
from pgrealtime.inspector.answers import (
    MAX_ROWS,
    NotHere,
    States,
    View,
)
from pgrealtime.inspector.changes import find_transaction, list_changes
from pgrealtime.inspector.collections import collection_sql, list_collections
from pgrealtime.inspector.connections import find_connection, list_connections
from pgrealtime.inspector.explaining import (
    Subject,
    explain_for_anybody,
    explain_for_connection,
    record_subject,
)
from pgrealtime.inspector.receivers import event_of, find_receivers
from pgrealtime.inspector.topics import list_topics
from pgrealtime.lsn import LSN, parse_lsn
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rules.engine.compiler import RuleCompiler

_SECONDS = 10.0
"""Of one look, with the wait for the one before it."""
_DEFAULT_ROWS = 100
_MAX_TEXT = 500
"""Characters of a search."""
_NEWEST_ENTRIES = 50
"""In which the last change is looked for: keepalives are entries too."""

Query = Mapping[str, str]


@dataclass(eq=False)
class Inspector:
    """What can be seen of one process."""

    hub: Hub
    changelog: Changelog
    executor: QueryExecutor
    pool: QueryPool
    config: Callable[[], Config]
    """The configuration in force."""
    problems: Callable[[], tuple[ConfigProblem, ...]]
    """What is wrong with its collections."""
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def look(self, view: str, query: Query) -> View:
        """Return the answer of a view.

        Raises:
            LookError: There is no such view, or what it asks for isn't there.
        """
        views: Mapping[str, Callable[[Query], Awaitable[View]]] = {
            "states": self._states,
            "connections": self._connections,
            "topics": self._topics,
            "changes": self._changes,
            "receivers": self._receivers,
            "collections": self._collections,
            "sql": self._sql,
            "explain": self._explain,
        }
        if view not in views:
            raise LookError("there is no such view")
        try:
            async with asyncio.timeout(_SECONDS), self._lock:
                return await views[view](query)
        except TimeoutError as error:
            raise LookError("the answer takes too long") from error

    @property
    def _collections_in_force(self) -> Collections:
        return self.hub.progress.generation.collections

    async def _states(self, _query: Query) -> View:
        timer = YieldTimer()
        states: Counter[str] = Counter()
        for connection in list(self.hub.connections):
            states[connection.state.value] += 1
            if timer.is_due():
                await timer.pause()
        newest = self.changelog.read_back(None, _NEWEST_ENTRIES)
        times = (one.commit_time_us for one in newest if isinstance(one, Transaction))
        last = next(times, 0)
        return States(by_state=states, last_change_at=last / 1e6 or None)

    async def _connections(self, query: Query) -> View:
        return await list_connections(
            self.hub,
            self.changelog,
            search=_text(query, "search"),
            state=_text(query, "state"),
            limit=row_limit(query),
        )

    async def _topics(self, query: Query) -> View:
        return await list_topics(self.hub, limit=row_limit(query))

    async def _changes(self, query: Query) -> View:
        before = _text(query, "before")
        return await list_changes(
            self.changelog,
            self._collections_in_force,
            search=_text(query, "search"),
            before=_lsn(before) if before else None,
            limit=row_limit(query),
        )

    async def _receivers(self, query: Query) -> View:
        transaction, ordinal = self._change(query)
        return await find_receivers(
            self.hub, self.executor, transaction, ordinal, limit=row_limit(query)
        )

    def _change(self, query: Query) -> tuple[Transaction, int]:
        transaction = find_transaction(self.changelog, _lsn(_text(query, "lsn")))
        ordinal = _number(query, "ordinal", default=0)
        if not 1 <= ordinal <= len(transaction.changes):
            raise LookError('the transaction has no change of that "ordinal"')
        return transaction, ordinal

    async def _explain(self, query: Query) -> View:
        collections = self._collections_in_force
        if query.get("lsn"):
            transaction, ordinal = self._change(query)
            event = event_of(self.hub, transaction, ordinal)[-1]
            subject = Subject(
                collection=event.collection,
                record_id=unpadded_id(event.collection, event.record_id),
                image=event.row,
                transaction=transaction,
                cursor=event.cursor,
            )
        else:
            subject = record_subject(collections, _text(query, "record"))
        if caller := _text(query, "caller"):
            topic = _text(query, "topic")
            return await explain_for_anybody(
                self.hub, self.pool, self.config(), subject, caller=caller, topic=topic
            )
        ref = _text(query, "connection")
        connection = find_connection(self.hub.connections, ref)
        if connection is None:
            return NotHere()
        return await explain_for_connection(self.hub, self.pool, connection, subject)

    async def _collections(self, _query: Query) -> View:
        return list_collections(
            self._collections_in_force, self.problems(), self.hub.subscription_counts
        )

    async def _sql(self, query: Query) -> View:
        collections = self._collections_in_force
        name = _text(query, "collection")
        return await collection_sql(collections, RuleCompiler(collections), name)


def row_limit(query: Query) -> int:
    """Return how many rows are asked for."""
    return max(1, min(_number(query, "limit", default=_DEFAULT_ROWS), MAX_ROWS))


def _text(query: Query, name: str) -> str:
    text = query.get(name, "")
    if len(text) > _MAX_TEXT:
        raise LookError(f'"{name}" is too long', hint=f"Give {_MAX_TEXT} characters at most.")
    return text


def _number(query: Query, name: str, *, default: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):  # noqa: PLR2004
        raise LookError(f'"{name}" isn\'t a number')
    return int(text)


def _lsn(text: str) -> LSN:
    try:
        return parse_lsn(text)
    except ValueError as error:
        raise LookError("an LSN looks like 16/B374D848") from error
