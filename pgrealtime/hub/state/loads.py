"""Reads the lists that are sent to mirrors with ``load: true``; called by ``hub.state.resyncs``.

Subscriptions to which the same rows are shown in the same bytes share a query: those that ask
before it begins, and later those whose connections have received nothing that its snapshot lacks.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from pgrealtime.auth.principal import Caller, account_of
from pgrealtime.changes import Change, Insert, Update
from pgrealtime.collections.model import Collection
from pgrealtime.config.model import MirrorsConfig
from pgrealtime.errors import DatabaseUnreachableError, ReadError
from pgrealtime.fairness import FairPermits
from pgrealtime.hub.connections.connection import Connection, Subscription
from pgrealtime.hub.state.callers import CallerTracker
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor
from pgrealtime.protocol.frame import event_tail
from pgrealtime.records.fields import parse_fields
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.snapshot import ReadPoint

_MAX_AGE_SECONDS = 1.0
"""A list is shared for so long after it was read, by connections that it covers."""
_MAX_BYTES = 16 * 1024 * 1024
"""Of the lists that are kept for that."""
_TAIL_BYTES = 128
"""About what a message has beside its record and its topic."""


class ReadRecords(Protocol):
    """What ``ListReader`` returns."""

    @property
    def records(self) -> Sequence[bytes]:
        """The JSON of each."""

    @property
    def read_point(self) -> ReadPoint:
        """Which commits their snapshot saw."""

    @property
    def delay_seconds(self) -> float:
        """How long it is to be held back."""


class ListReader(Protocol):
    """Reads lists: ``reads.reader.RecordReader``."""

    async def read_set(
        self,
        collection: Collection,
        record_id: str | None,
        caller: Caller,
        request: RuleRequest,
        *,
        max_rows: int,
        max_bytes: int,
        network: str = "",
    ) -> ReadRecords:
        """Return what a topic's caller may see; see there."""


class LoadedList(NamedTuple):
    """A list as messages for one topic, without their ids."""

    tails: Sequence[bytes]
    size_bytes: int
    """Approximate, with the ids."""
    read_point: ReadPoint | None
    """Which commits it has; None if no row can ever be in it."""


_NOTHING = LoadedList((), 0, None)


@dataclass(eq=False, slots=True)
class _Load:
    """A list that is being read, or was."""

    task: asyncio.Task[LoadedList | None]
    covers: Cursor | None = None
    """All that was delivered up to here is in it; None until it begins."""
    size_bytes: int = 0
    ended_at: float | None = None


class MirrorLoads:
    """Reads lists; the clock is monotonic. Without a reader every client loads its list itself."""

    def __init__(
        self,
        progress: DispatchProgress,
        visibility: VisibilityTracker,
        callers: CallerTracker,
        reader: ListReader | None,
        limits: MirrorsConfig,
        *,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._progress = progress
        self._visibility = visibility
        self._callers = callers
        self._reader = reader
        self._limits = limits
        self._max_bytes = max_bytes
        self._clock = clock
        self._permits = FairPermits(limits.loads)
        self._loads: OrderedDict[Hashable, _Load] = OrderedDict()

    async def load(self, subscription: Subscription) -> LoadedList | None:
        """Return the list of a mirror whose connection catches up; None if its client has to load.

        It has all that the connection was delivered. Raises ``DatabaseUnreachableError`` if
        PostgreSQL doesn't answer, or a delivered commit stays invisible.
        """
        if subscription.group is None:
            return _NOTHING
        if self._reader is None:
            return None
        self._forget_old()
        key = self._key(subscription)
        load = self._loads.get(key)
        cursor = subscription.connection.cursor
        if load is None or (load.covers is not None and load.covers < cursor):
            load = self._loads[key] = self._start(key, subscription, self._reader)
        # Shielded: others may await the same.
        loaded = await asyncio.shield(load.task)
        if loaded is None or loaded.read_point is None:
            return loaded
        is_another = await self._may_caller_be_another(subscription.connection, loaded.read_point)
        return None if is_another else loaded

    async def _may_caller_be_another(self, connection: Connection, read_point: ReadPoint) -> bool:
        """Whether a write between the connection's cursor and a snapshot may change its caller.

        Rows of the snapshot are for who the caller was at the cursor, and may have been written
        after it was banned. The list that its client loads by itself is for who it is then.
        """
        generation, cursor, caller = self._progress.generation, connection.cursor, connection.caller
        account = account_of(caller)
        collection = generation.collections.get(account[0]) if account is not None else None
        if account is None or collection is None or not collection.is_streamed:
            return False
        before = cursor.lsn if cursor.ordinal == END_ORDINAL else LSN(cursor.lsn - 1)
        if not await generation.row_history.wait_for_lsn(read_point.insert_lsn):
            return True
        history = await generation.row_history.table_history(*collection.id_lookup_column, before)
        if history is None:
            return True
        if collection.key.type.base.name == "bpchar":
            return history.has_writes(before)  # rows hold the id padded, the account without
        writes = history.writes(account[1], before)
        return any(self._changes_caller(caller, collection, write.change) for write in writes)

    def _changes_caller(
        self, caller: Caller, collection: Collection, change: Change | None
    ) -> bool:
        match change:
            case Insert(new=row) | Update(new=row):
                after = self._callers.caller_from_row(caller, collection, row, change)
                return after != caller
            case _:
                return True

    def _key(self, subscription: Subscription) -> Hashable:
        """Return what decides rows and bytes; equal keys mean equal lists in one snapshot."""
        group, caller = subscription.group, subscription.connection.caller
        assert group is not None
        # A list reads the caller's row as it is now, and not as it was at the connection's cursor.
        is_callers_own = (
            group.specialization.reads_caller
            or subscription.own_record_id
            or subscription.expand_viewer is not None
            or subscription.bound_manage_rule is not None
        )
        account = account_of(caller) if is_callers_own else None
        return self._progress.revision, group, subscription.render_key, account

    def _start(self, key: Hashable, subscription: Subscription, reader: ListReader) -> _Load:
        connection, group = subscription.connection, subscription.group
        assert group is not None
        # As they are now: the first to ask may have gone by the time that the list is read.
        read = partial(
            self._read, subscription, group.specialization.collection, connection.caller, reader
        )

        async def run() -> LoadedList | None:
            try:
                async with self._permits.acquire(connection.network):
                    load.covers = self._progress.evaluation_target
                    loaded, delay_seconds = await read(load.covers)
                await asyncio.sleep(delay_seconds)
            except BaseException:
                if self._loads.get(key) is load:
                    del self._loads[key]
                raise
            load.ended_at, load.size_bytes = self._clock(), loaded.size_bytes if loaded else 0
            self._forget_old()
            return loaded

        load = _Load(asyncio.create_task(run(), name="mirror load"))
        # asyncio would log an error that nobody retrieves: all who wait may be cancelled.
        load.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return load

    async def _read(
        self,
        subscription: Subscription,
        collection: Collection,
        caller: Caller,
        reader: ListReader,
        covers: Cursor,
    ) -> tuple[LoadedList | None, float]:
        """Return the list, and how long it is to be held back."""
        topic, network = subscription.topic, subscription.connection.network
        await self._visibility.wait_for_delivered()
        unseen = self._visibility.unseen_upto(covers)
        query = topic.query
        if (fields := query.get("fields")) and parse_fields(fields):
            query = {**query, "fields": f"{fields},id"}  # as its events have it
        request = RuleRequest(principal=caller.principal, query=query, headers=topic.headers)
        try:
            found = await reader.read_set(
                collection,
                topic.record_id,
                caller,
                request,
                max_rows=self._limits.rows,
                max_bytes=self._max_bytes,
                network=network,
            )
        except ReadError:
            return None, 0.0  # the client learns why when it loads the list itself
        if not all(map(found.read_point.snapshot.sees, unseen)):
            raise DatabaseUnreachableError("a commit stays invisible")
        topic_bytes = subscription.topic_bytes
        tails = [event_tail(topic_bytes, record, "create") for record in found.records]
        size = sum(map(len, tails)) + _TAIL_BYTES * len(tails)
        is_small = size <= self._max_bytes
        loaded = LoadedList(tails, size, found.read_point) if is_small else None
        return loaded, found.delay_seconds

    def _forget_old(self) -> None:
        now = self._clock()
        ended = [(key, load) for key, load in self._loads.items() if load.ended_at is not None]
        total = sum(load.size_bytes for _, load in ended)
        for key, load in ended:  # the oldest first
            assert load.ended_at is not None
            if now - load.ended_at > _MAX_AGE_SECONDS or total > _MAX_BYTES:
                del self._loads[key]
                total -= load.size_bytes
