"""Which of the commits that were handed out readers can see yet; barriers for those who join."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

import structlog

from pgrealtime.changelog.base import Entry
from pgrealtime.changes import OversizedTransaction, Transaction
from pgrealtime.errors import PgRealtimeError, SubscriptionError
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.snapshot import ReadPoint, Snapshot, parse_read_point

log = structlog.get_logger(__name__)

_READ_POINT_TIMEOUT_SECONDS = 10.0
_SNAPSHOT_RETRY_SECONDS = 0.005
_GAP_DELAY_SECONDS = 5.0
"""How long a gap is held back until readers see what caused it."""
_UNANSWERED_GAP_DELAY_SECONDS = 1.0
"""As much of that as is spent on a database that doesn't answer: then nobody reads it either."""
_FAILED_RETRY_SECONDS = 1.0
_WATCH_INTERVAL_SECONDS = 0.5


class VisibilityTracker:
    """The commits that were told and not yet seen to be visible.

    Args:
        run_query: Runs ``SNAPSHOT_QUERY`` and returns its row.
        progress: The dispatcher's; what was read before its revision changed is dropped.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        run_query: Callable[[], Awaitable[tuple[str, str, bool]]],
        progress: DispatchProgress,
        clock: Callable[[], float],
    ) -> None:
        self._snapshots = SnapshotSource(run_query)
        self._progress = progress
        self._clock = clock
        self._not_yet_visible: deque[tuple[LSN, Xid]] = deque()

    def record_delivered(self, entries: Iterable[Entry]) -> None:
        """Take note of what is about to be handed out: a barrier must know of all that was."""
        self._not_yet_visible.extend(
            (entry.end_lsn, entry.xid)
            for entry in entries
            if isinstance(entry, Transaction | OversizedTransaction)
        )

    def clear(self) -> None:
        """Forget everything: another history has begun."""
        self._not_yet_visible.clear()

    async def fetch_read_point(self, delivered_upto: Cursor) -> ReadPoint:
        """Return a barrier whose snapshot sees every transaction up to ``record_handed_out``.

        One that it didn't see would have to reach the new topic after later ones that the
        connection had already, and a resume from a later id would lose it.
        """
        deadline = self._clock() + _READ_POINT_TIMEOUT_SECONDS
        while True:
            edition = self._progress.revision
            try:
                barrier = await self._snapshots.fetch()
            except PgRealtimeError as error:
                raise SubscriptionError("no snapshot", code="stream_away") from error
            if self._progress.revision != edition:
                continue  # it may be another history's
            self._discard_visible(barrier.snapshot)
            if not any(end_lsn <= delivered_upto.lsn for end_lsn, _xid in self._not_yet_visible):
                return barrier
            if self._clock() > deadline:
                raise SubscriptionError("a commit stays invisible", code="stream_away")
            await asyncio.sleep(_SNAPSHOT_RETRY_SECONDS)

    async def wait_for_entries(self, entries: Sequence[Entry]) -> None:
        """Return once readers see all of them; at once if another history begins meanwhile."""
        xids = [
            entry.xid for entry in entries if isinstance(entry, Transaction | OversizedTransaction)
        ]
        edition = self._progress.revision
        while xids and self._progress.revision == edition:
            try:
                snapshot = (await self._snapshots.fetch()).snapshot
            except Exception as error:  # noqa: BLE001 (nothing may be handed out before)
                reason = error.message if isinstance(error, PgRealtimeError) else repr(type(error))
                log.warning("visibility.unknown", error=reason)
                await asyncio.sleep(_FAILED_RETRY_SECONDS)
                continue
            xids = [xid for xid in xids if not snapshot.sees(xid)]
            if xids:
                await asyncio.sleep(_SNAPSHOT_RETRY_SECONDS)

    async def wait_until_visible(self, xids: Iterable[Xid]) -> None:
        """Return once readers see the transactions, or after a while.

        Whoever is told of a gap loads anew at once: it has to find what the gap is about.
        """
        wanted = frozenset(xids)
        edition, began = self._progress.revision, self._clock()
        while (
            any(xid in wanted for _, xid in self._not_yet_visible)
            and self._progress.revision == edition
        ):
            try:
                self._discard_visible((await self._snapshots.fetch()).snapshot)
                patience = _GAP_DELAY_SECONDS
            except PgRealtimeError:
                patience = _UNANSWERED_GAP_DELAY_SECONDS
            if self._clock() - began > patience:
                return
            await asyncio.sleep(_SNAPSHOT_RETRY_SECONDS)

    async def watch(self) -> None:
        """Let go of what has become visible, for ever."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_SECONDS)
            if not self._not_yet_visible:
                continue
            try:
                self._discard_visible((await self._snapshots.fetch()).snapshot)
            except Exception as error:  # noqa: BLE001 (the next round asks again)
                if not isinstance(error, PgRealtimeError):
                    log.warning("visibility.unknown", error=repr(type(error)))

    def _discard_visible(self, snapshot: Snapshot) -> None:
        self._not_yet_visible = deque(
            (end_lsn, xid) for end_lsn, xid in self._not_yet_visible if not snapshot.sees(xid)
        )


def _retrieve_exception(task: asyncio.Task[ReadPoint]) -> None:
    """A failure that nobody waits for any more is no news."""
    if not task.cancelled():
        task.exception()


class SnapshotSource:
    """Takes snapshots; who asks while one is being taken shares the next.

    Args:
        run_query: Runs ``SNAPSHOT_QUERY`` and returns its row.
    """

    def __init__(self, run_query: Callable[[], Awaitable[tuple[str, str, bool]]]) -> None:
        self._run_query = run_query
        self._running: asyncio.Task[ReadPoint] | None = None
        self._next: asyncio.Task[ReadPoint] | None = None

    async def fetch(self) -> ReadPoint:
        """Return a barrier whose snapshot was taken entirely after this call.

        Raises:
            PgRealtimeError: The database didn't answer.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._fetch_after(self._running), name="snapshot")
            self._next.add_done_callback(_retrieve_exception)
        # Shielded: others may be waiting for the same one.
        return await asyncio.shield(self._next)

    async def _fetch_after(self, running: asyncio.Task[ReadPoint] | None) -> ReadPoint:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None
        snapshot, insert_lsn, _in_recovery = await self._run_query()
        return parse_read_point(snapshot, insert_lsn)
