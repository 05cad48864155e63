"""Which of the commits that were handed out readers can see yet; barriers for those who join."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

import structlog

from pgrealtime.changelog.base import Entry
from pgrealtime.changes import Oversized, Transaction
from pgrealtime.errors import PgRealtimeError, SubscriptionError
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.snapshot import Barrier, Snapshot, barrier_of

log = structlog.get_logger(__name__)

_BARRIER_SECONDS = 10.0
_BARRIER_RETRY_SECONDS = 0.005
_SEEN_SECONDS = 5.0
"""How long a gap is held back until readers see what caused it."""
_UNANSWERED_SECONDS = 1.0
"""As much of that as is spent on a database that doesn't answer: then nobody reads it either."""
_AGAIN_SECONDS = 1.0
_FORGET_SECONDS = 0.5


class Visibility:
    """The commits that were told and not yet seen to be visible.

    Args:
        fetch: Runs ``SNAPSHOT_QUERY`` and returns its row.
        edition: Counts the histories: what was read before it changed counts no more.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[tuple[str, str, bool]]],
        edition: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._snapshots = Snapshots(fetch)
        self._edition = edition
        self._clock = clock
        self._unseen: deque[tuple[LSN, Xid]] = deque()

    def told(self, entries: Iterable[Entry]) -> None:
        """Take note of what is about to be handed out: a barrier must know of all that was."""
        self._unseen.extend(
            (entry.end_lsn, entry.xid)
            for entry in entries
            if isinstance(entry, Transaction | Oversized)
        )

    def clear(self) -> None:
        """Forget everything: another history has begun."""
        self._unseen.clear()

    async def barrier(self, handed: Cursor) -> Barrier:
        """Return a barrier whose snapshot sees every transaction up to ``handed``.

        One that it didn't see would have to reach the new topic after later ones that the
        connection had already, and a resume from a later id would lose it.
        """
        deadline = self._clock() + _BARRIER_SECONDS
        while True:
            edition = self._edition()
            try:
                barrier = await self._snapshots.take()
            except PgRealtimeError as error:
                raise SubscriptionError("no snapshot", code="stream_away") from error
            if self._edition() != edition:
                continue  # it may be another history's
            self._note(barrier.snapshot)
            if not any(end_lsn <= handed.lsn for end_lsn, _xid in self._unseen):
                return barrier
            if self._clock() > deadline:
                raise SubscriptionError("a commit stays invisible", code="stream_away")
            await asyncio.sleep(_BARRIER_RETRY_SECONDS)

    async def wait_for(self, entries: Sequence[Entry]) -> None:
        """Return once readers see all of them; at once if another history begins meanwhile."""
        xids = [entry.xid for entry in entries if isinstance(entry, Transaction | Oversized)]
        edition = self._edition()
        while xids and self._edition() == edition:
            try:
                snapshot = (await self._snapshots.take()).snapshot
            except Exception as error:  # noqa: BLE001 (nothing may be handed out before)
                reason = error.message if isinstance(error, PgRealtimeError) else repr(type(error))
                log.warning("visibility.unknown", error=reason)
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            xids = [xid for xid in xids if not snapshot.sees(xid)]
            if xids:
                await asyncio.sleep(_BARRIER_RETRY_SECONDS)

    async def seen(self, xids: Iterable[Xid]) -> None:
        """Return once readers see the transactions, or after a while.

        Whoever is told of a gap loads anew at once: it has to find what the gap is about.
        """
        wanted = frozenset(xids)
        edition, began = self._edition(), self._clock()
        while any(xid in wanted for _, xid in self._unseen) and self._edition() == edition:
            try:
                self._note((await self._snapshots.take()).snapshot)
                patience = _SEEN_SECONDS
            except PgRealtimeError:
                patience = _UNANSWERED_SECONDS
            if self._clock() - began > patience:
                return
            await asyncio.sleep(_BARRIER_RETRY_SECONDS)

    async def watch(self) -> None:
        """Let go of what has become visible, for ever."""
        while True:
            await asyncio.sleep(_FORGET_SECONDS)
            if not self._unseen:
                continue
            try:
                self._note((await self._snapshots.take()).snapshot)
            except Exception as error:  # noqa: BLE001 (the next round asks again)
                if not isinstance(error, PgRealtimeError):
                    log.warning("visibility.unknown", error=repr(type(error)))

    def _note(self, snapshot: Snapshot) -> None:
        self._unseen = deque(
            (end_lsn, xid) for end_lsn, xid in self._unseen if not snapshot.sees(xid)
        )


def _look_at(task: asyncio.Task[Barrier]) -> None:
    """A failure that nobody waits for any more is no news."""
    if not task.cancelled():
        task.exception()


class Snapshots:
    """Takes snapshots; who asks while one is being taken shares the next.

    Args:
        fetch: Runs ``SNAPSHOT_QUERY`` and returns its row.
    """

    def __init__(self, fetch: Callable[[], Awaitable[tuple[str, str, bool]]]) -> None:
        self._fetch = fetch
        self._running: asyncio.Task[Barrier] | None = None
        self._next: asyncio.Task[Barrier] | None = None

    async def take(self) -> Barrier:
        """Return a barrier whose snapshot was taken entirely after this call.

        Raises:
            PgRealtimeError: The database didn't answer.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._take_after(self._running), name="snapshot")
            self._next.add_done_callback(_look_at)
        # Shielded: others may be waiting for the same one.
        return await asyncio.shield(self._next)

    async def _take_after(self, running: asyncio.Task[Barrier] | None) -> Barrier:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None
        snapshot, insert_lsn, _in_recovery = await self._fetch()
        return barrier_of(snapshot, insert_lsn)
