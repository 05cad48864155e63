"""Finds the position up to which a read saw every commit, so that lists join the stream.

A client that subscribes and then reads skips the events below that position: what it read has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pgrealtime.changelog.memory import Changelog
from pgrealtime.changelog.row_history import WaitForLSN
from pgrealtime.changes import OversizedTransaction, Transaction
from pgrealtime.hub.state.progress import DispatchProgress, ResumableEpochs
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Position, Xid, format_position
from pgrealtime.snapshot import ReadPoint, Snapshot

_MAX_CHANGES_AHEAD = 10_000
"""Changes after the head of a read's beginning that are looked through; those beyond count as
unseen."""


class ReadPositions:
    """Positions of reads in the stream."""

    def __init__(
        self,
        changelog: Changelog,
        progress: DispatchProgress,
        epochs: ResumableEpochs,
        registry: ConnectionRegistry,
        visibility: VisibilityTracker,
        *,
        wait_for_changelog: WaitForLSN | None,
    ) -> None:
        self._changelog = changelog
        self._progress = progress
        self._epochs = epochs
        self._registry = registry
        self._visibility = visibility
        self._wait_for_changelog = wait_for_changelog

    def begin_read(self) -> BegunRead:
        """Note what is delivered, before a read takes its snapshot."""
        unseen = self._visibility.not_yet_visible
        return BegunRead(self, self._progress.head, unseen, self._progress.revision)

    async def position_of(self, read: BegunRead, read_point: ReadPoint) -> str | None:
        """Return the position, as clients have it; None if that can't be told.

        It lies behind the longest run of commits, in the order of the stream, that the snapshot
        sees. Waits, a second at most, until the stream has brought what may be among them.
        """
        if not self._registry.is_stream_up:
            return None
        upto = read_point.insert_lsn
        if self._wait_for_changelog is None or not await self._wait_for_changelog(upto):
            # Later commits aren't known here, so they count as unseen: a client receives their
            # events although it has read them, as one without positions does.
            upto = min(upto, self._changelog.end_cursor.lsn)
        if self._progress.revision != read.revision:
            return None  # another history has begun
        seen = self._seen_upto(read, read_point.snapshot, upto)
        return format_position(Position(self._epochs.epoch, Cursor(seen, END_ORDINAL)))

    def _seen_upto(self, read: BegunRead, snapshot: Snapshot, upto: LSN) -> LSN:
        first_unseen = min(
            (
                end_lsn
                for end_lsn, xid in read.not_yet_visible
                if end_lsn <= upto and not snapshot.sees(xid)
            ),
            default=None,
        )
        last_lsn = read.head.lsn
        if read.head < self._changelog.floor:
            # What was removed during the read is as unknown as what is yet to come.
            return last_lsn if first_unseen is None else LSN(first_unseen - 1)
        entries = self._changelog.read(
            read.head, Cursor(upto, END_ORDINAL), limit=_MAX_CHANGES_AHEAD
        )
        for entry in entries:
            last_lsn = entry.end_lsn
            if isinstance(entry, Transaction | OversizedTransaction) and not snapshot.sees(
                entry.xid
            ):
                first_unseen = min(entry.end_lsn, upto if first_unseen is None else first_unseen)
                break
        if first_unseen is not None:
            # Commits end at different LSNs, so none ends between this one and the one before.
            return LSN(first_unseen - 1)
        is_complete = self._changelog.end_cursor.lsn <= last_lsn or last_lsn >= upto
        return upto if is_complete else last_lsn


@dataclass(frozen=True, slots=True)
class BegunRead:
    """A read whose snapshot is yet to be taken.

    What was delivered is noted before: by the time that the read is answered, younger snapshots may
    have seen what its own doesn't see.
    """

    _positions: ReadPositions
    head: Cursor
    not_yet_visible: tuple[tuple[LSN, Xid], ...]
    """The delivered transactions that no snapshot was known to see: to look for in the read's. It
    sees all others up to the head."""
    revision: int

    async def position_of(self, read_point: ReadPoint) -> str | None:
        """Return up to where the read's snapshot saw every commit; None if that can't be told."""
        return await self._positions.position_of(self, read_point)
