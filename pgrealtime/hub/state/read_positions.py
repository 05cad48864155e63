"""Finds the position up to which a read saw every commit, so that lists join the stream.

A client that subscribes and then reads skips the events below that position: what it read has them.
"""

from __future__ import annotations

from pgrealtime.changelog.memory import Changelog
from pgrealtime.changelog.row_history import WaitForLSN
from pgrealtime.changes import OversizedTransaction, Transaction
from pgrealtime.hub.state.progress import DispatchProgress, ResumableEpochs
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Position, format_position
from pgrealtime.snapshot import ReadPoint, Snapshot

_MAX_CHANGES_AHEAD = 10_000
"""Changes after the head that are looked through; those beyond count as unseen."""


class ReadPositions:
    """Positions of reads in the stream."""

    def __init__(
        self,
        changelog: Changelog,
        progress: DispatchProgress,
        epochs: ResumableEpochs,
        visibility: VisibilityTracker,
        wait_for_changelog: WaitForLSN | None,
    ) -> None:
        self._changelog = changelog
        self._progress = progress
        self._epochs = epochs
        self._visibility = visibility
        self._wait_for_changelog = wait_for_changelog

    async def position_of(self, read_point: ReadPoint) -> str | None:
        """Return the position, as clients have it; None if another history has begun.

        It lies behind the longest run of commits, in the order of the stream, that the snapshot
        sees. Waits, a second at most, until the stream has brought what may be among them.
        """
        revision = self._progress.revision
        upto = read_point.insert_lsn
        if self._wait_for_changelog is None or not await self._wait_for_changelog(upto):
            # Later commits aren't known here, so they count as unseen: a client receives their
            # events although it has read them, as one without positions does.
            upto = min(upto, self._changelog.end_cursor.lsn)
        if self._progress.revision != revision:
            return None
        seen = self._seen_upto(read_point.snapshot, upto)
        return format_position(Position(self._epochs.epoch, Cursor(seen, END_ORDINAL)))

    def _seen_upto(self, snapshot: Snapshot, upto: LSN) -> LSN:
        first_unseen = self._visibility.first_unseen(snapshot, upto)
        entries = self._changelog.read(
            self._progress.head, Cursor(upto, END_ORDINAL), limit=_MAX_CHANGES_AHEAD
        )
        last_lsn = self._progress.head.lsn
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
