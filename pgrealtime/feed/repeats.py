"""Distinguishes a server's histories by the transactions that are sent again. Pure."""

from typing import NamedTuple

from pgrealtime.changes import OversizedTransaction, Transaction
from pgrealtime.errors import StreamInterruptedError
from pgrealtime.lsn import LSN, Xid


class _TransactionIdentity(NamedTuple):
    """Identifies a transaction: after a restore another one may have its LSN, and its xid."""

    end_lsn: LSN
    xid: Xid
    commit_time_us: int


class RepeatCheck:
    """Compares the transactions that a stream sends again with those already in the changelog."""

    def __init__(self) -> None:
        self._last: _TransactionIdentity | None = None
        """The last appended transaction of the tables streamed now."""
        self._expected: _TransactionIdentity | None = None
        """What the stream must send again before anything new, until it has."""
        self._has_failed = False

    @property
    def is_pending(self) -> bool:
        """Whether the stream has yet to repeat the last transaction."""
        return self._expected is not None

    def begin_stream(self) -> bool:
        """Expect nothing of a new stream; return whether the last stream failed the check."""
        has_failed, self._has_failed, self._expected = self._has_failed, False, None
        return has_failed

    def expect_from(self, start_lsn: LSN) -> None:
        """Expect the last transaction again, if the stream begins before its end."""
        if self._last is not None and start_lsn < self._last.end_lsn:
            self._expected = self._last

    def forget(self) -> None:
        """Expect no repeat of what was appended so far: of another history, or other tables."""
        self._last = None

    def remember(self, entry: Transaction | OversizedTransaction) -> None:
        """Remember a transaction that was appended."""
        self._last = _identity_of(entry)

    def verify(self, entry: Transaction | OversizedTransaction, *, is_new: bool) -> None:
        """Check a transaction before it is appended or, if it isn't new, dropped.

        Raises:
            StreamInterruptedError: The server has another history; the next stream begins it.
        """
        if is_new and self._expected is None:
            return
        if self._last is None or entry.end_lsn < self._last.end_lsn:
            return
        # A server that was restored from a copy of its files has the same system identifier and
        # timeline, and writes other commits at LSNs that the changelog already has. A durable slot
        # sends the last appended transaction again when it is reopened; a different one, or none,
        # proves such a restore.
        if _identity_of(entry) != self._last:
            self._fail()
        self._expected = None

    def verify_reached(self, wal_end: LSN) -> None:
        """Check that the repeat has come once the stream has read beyond it.

        Raises:
            StreamInterruptedError: The server has another history; the next stream begins it.
        """
        if self._expected is not None and wal_end >= self._expected.end_lsn:
            self._fail()

    def _fail(self) -> None:
        self._has_failed = True
        raise StreamInterruptedError(
            "the server has another history",
            detail="It lacks a transaction that was read from it, as after a restore.",
        )


def _identity_of(entry: Transaction | OversizedTransaction) -> _TransactionIdentity:
    return _TransactionIdentity(entry.end_lsn, entry.xid, entry.commit_time_us)
