"""Tracks which delivered transactions are not visible to readers yet.

A commit is in the WAL, and may be delivered, a moment before a new snapshot sees it; with
synchronous standbys that moment is a network round trip. Called by the dispatcher, by catching up
and by subscribe calls.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

import structlog

from pgrealtime.changelog.memory import Entry
from pgrealtime.changes import OversizedTransaction, Transaction
from pgrealtime.errors import PgRealtimeError, SubscriptionError
from pgrealtime.fairness import wait_while_growing
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.snapshot import ReadPoint, Snapshot

log = structlog.get_logger(__name__)

_READ_POINT_TIMEOUT_SECONDS = 10.0
_SNAPSHOT_RETRY_SECONDS = 0.005
_GAP_DELAY_SECONDS = 5.0
"""How long a gap is held back until its cause is visible."""
_UNANSWERED_GAP_DELAY_SECONDS = 1.0
"""The same while the database doesn't answer: then clients can't read from it either."""
_FAILED_RETRY_SECONDS = 1.0
_WATCH_INTERVAL_SECONDS = 0.5

FetchReadPoint: TypeAlias = Callable[[], Awaitable[ReadPoint]]
"""Returns a read point whose snapshot is taken after the call."""


class VisibilityTracker:
    """The delivered transactions that were not seen to be visible yet."""

    def __init__(
        self, fetch: FetchReadPoint, progress: DispatchProgress, clock: Callable[[], float]
    ) -> None:
        self._snapshots = SnapshotSource(fetch)
        self._progress = progress
        self._clock = clock
        self._not_yet_visible: deque[tuple[LSN, Xid]] = deque()
        """In stream order, which is not the order of becoming visible. Some may be in it twice."""

    def record_delivered(self, entries: Iterable[Entry]) -> None:
        """Note transactions before they are delivered."""
        self._not_yet_visible.extend(
            (entry.end_lsn, entry.xid)
            for entry in entries
            if isinstance(entry, Transaction | OversizedTransaction)
        )

    def clear(self) -> None:
        """Forget all."""
        self._not_yet_visible.clear()

    @property
    def not_yet_visible(self) -> tuple[tuple[LSN, Xid], ...]:
        """The delivered transactions that no snapshot was known to see."""
        return tuple(self._not_yet_visible)

    async def fetch_read_point(self, delivered_upto: Cursor) -> ReadPoint:
        """Return a read point whose snapshot sees every transaction delivered up to a cursor.

        Raises ``SubscriptionError`` if the database doesn't answer, or not in time.
        """
        # A transaction that the snapshot doesn't see has to be delivered for the new topic. If it
        # was before the cursor, it would come after later ones, and resuming from a later id would
        # lose it.
        deadline = self._clock() + _READ_POINT_TIMEOUT_SECONDS
        while True:
            revision = self._progress.revision
            try:
                read_point = await self._snapshots.fetch()
            except PgRealtimeError as error:
                raise SubscriptionError("no snapshot", code="stream_away") from error
            if self._progress.revision != revision:
                continue  # it may be another history's, whose transaction ids mean others
            # Only after the comparison: the transactions noted meanwhile are the new history's.
            self._discard_visible(read_point.snapshot)
            if not any(end_lsn <= delivered_upto.lsn for end_lsn, _xid in self._not_yet_visible):
                return read_point
            # A commit may stay invisible for as long as a synchronous standby is away.
            if self._clock() > deadline:
                raise SubscriptionError("a commit stays invisible", code="stream_away")
            await asyncio.sleep(_SNAPSHOT_RETRY_SECONDS)

    async def wait_for_entries(self, entries: Sequence[Entry]) -> None:
        """Return once all transactions among the entries are visible, or the revision changes."""
        xids = [
            entry.xid for entry in entries if isinstance(entry, Transaction | OversizedTransaction)
        ]
        # Without a bound: a client that loads a record when it receives the event must find it.
        revision = self._progress.revision
        while xids and self._progress.revision == revision:
            try:
                snapshot = (await self._snapshots.fetch()).snapshot
            except Exception as error:  # noqa: BLE001 (no event may be delivered before)
                reason = error.message if isinstance(error, PgRealtimeError) else repr(type(error))
                log.warning("visibility.unknown", error=reason)
                await asyncio.sleep(_FAILED_RETRY_SECONDS)
                continue
            xids = [xid for xid in xids if not snapshot.sees(xid)]
            if xids:
                await asyncio.sleep(_SNAPSHOT_RETRY_SECONDS)

    async def wait_until_visible(self, xids: Iterable[Xid]) -> None:
        """Return once the transactions are visible, or after a few seconds.

        Called before a gap is sent: the client reloads at once and must find what the gap is about.
        """
        wanted = frozenset(xids)
        # With a bound, as all connections wait for it. What is not in the deque was seen to be
        # visible, or belongs to another history.
        revision, began = self._progress.revision, self._clock()
        while (
            any(xid in wanted for _, xid in self._not_yet_visible)
            and self._progress.revision == revision
        ):
            try:
                self._discard_visible((await self._snapshots.fetch()).snapshot)
                timeout = _GAP_DELAY_SECONDS
            except PgRealtimeError:
                timeout = _UNANSWERED_GAP_DELAY_SECONDS
            if self._clock() - began > timeout:
                return
            await asyncio.sleep(_SNAPSHOT_RETRY_SECONDS)

    def unseen_upto(self, delivered: Cursor) -> list[Xid]:
        """Return the transactions delivered up to a cursor that weren't seen to be visible yet."""
        return [xid for end_lsn, xid in self._not_yet_visible if end_lsn <= delivered.lsn]

    async def wait_for_delivered(self) -> None:
        """Return once all that was delivered before this call is visible, or after a few seconds.

        Called before records are read: a client that loads a list when it receives an event drops
        what it has received, so the list must have it.
        """
        # Not what is held back until it is visible.
        upto = self._progress.evaluation_target.lsn
        await self.wait_until_visible(
            [xid for end_lsn, xid in self._not_yet_visible if end_lsn <= upto]
        )

    async def watch(self) -> None:
        """Forget transactions that have become visible, for ever."""
        while True:
            # One query for all that has become visible meanwhile.
            await asyncio.sleep(_WATCH_INTERVAL_SECONDS)
            if not self._not_yet_visible:
                continue
            try:
                self._discard_visible((await self._snapshots.fetch()).snapshot)
            except Exception as error:  # noqa: BLE001 (the next round asks again)
                if not isinstance(error, PgRealtimeError):
                    log.warning("visibility.unknown", error=repr(type(error)))

    def _discard_visible(self, snapshot: Snapshot) -> None:
        if not self._not_yet_visible:
            return
        self._not_yet_visible = deque(
            (end_lsn, xid) for end_lsn, xid in self._not_yet_visible if not snapshot.sees(xid)
        )


class SnapshotSource:
    """Fetches snapshots; callers that come while one is being fetched share the next."""

    def __init__(self, fetch: FetchReadPoint) -> None:
        self._fetch = fetch
        self._running: asyncio.Task[ReadPoint] | None = None
        self._next: asyncio.Task[ReadPoint] | None = None
        self._waiting_count = 0
        """How many wait for the next."""

    async def fetch(self) -> ReadPoint:
        """Return a read point whose snapshot was taken entirely after this call."""
        if self._next is None:
            self._next = asyncio.create_task(self._fetch_after(self._running), name="snapshot")
            # asyncio would log an error that nobody retrieves: all who asked may be cancelled.
            self._next.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._waiting_count += 1
        # Not the running one: its snapshot may have been taken before this call. Shielded, as other
        # callers may await the same.
        return await asyncio.shield(self._next)

    async def _fetch_after(self, running: asyncio.Task[ReadPoint] | None) -> ReadPoint:
        if running is not None:
            await asyncio.wait([running])  # returns also if that one failed
        await wait_while_growing(lambda: self._waiting_count)
        # Before the query: calls from here on must get a later snapshot.
        self._running, self._next, self._waiting_count = self._next, None, 0
        return await self._fetch()
