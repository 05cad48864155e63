"""Decides which status updates the stream sends, and when. Pure; time is an argument.

A status update has two positions. *Written* is what was received; *flushed* advances the slot's
confirmed flush LSN, up to which the server may remove WAL. A *flushed* in every update would make
this process a synchronous standby where ``synchronous_standby_names`` matches, and while it is
behind *written* the server could not shut down. So it is 0, which leaves the slot unchanged, except
in the single update that advances it.
"""

from pgrealtime.lsn import LSN
from pgrealtime.wal.wire import StandbyStatusUpdate

CONFIRM_SECONDS = 1.0
"""Between two updates that advance the slot: each is two messages, and a write on the server."""

KEEPALIVE_REQUEST_SECONDS = 0.02
"""Between two updates that request a keepalive on behalf of a caller."""

_INVALID_LSN = LSN(0)
"""PostgreSQL's InvalidXLogRecPtr."""


class Feedback:
    """The positions of one replication connection, and when the next updates are due.

    Times are monotonic seconds. The server ends a connection that is silent for wal_sender_timeout;
    an ``interval`` of a third leaves time for a slow loop. A durable slot, which outlives the
    process, is advanced over released transactions only; a temporary one also over WAL without
    changes of ours.
    """

    def __init__(
        self, start: LSN, *, interval: float, now: float, is_durable: bool = False
    ) -> None:
        self._is_durable = is_durable
        self._interval = interval
        self._received = start
        self._transaction_end = self._confirmed = self._sent_flush = start
        self._quiet_until: tuple[LSN, LSN] | None = None
        """A position before which everything was received, and the end of the last transaction
        received by then, which must be confirmed before the slot may be advanced to it."""
        self._next_status_at = now
        self._next_confirm_at = self._next_request_at = now
        self._is_reply_requested = False
        self._confirm_limit: LSN | None = None

    def record_received(self, lsn: LSN) -> None:
        """Record that the stream was received up to there."""
        self._received = max(self._received, lsn)

    def record_transaction(self, end_lsn: LSN) -> None:
        """Record that a transaction, which the consumer must confirm, was received."""
        self.record_received(end_lsn)
        self._transaction_end = end_lsn

    def record_quiet(self, lsn: LSN) -> None:
        """Record that no transaction is open and nothing of ours before there is outstanding."""
        self.record_received(lsn)
        self._quiet_until = lsn, self._transaction_end

    def confirm(self, end_lsn: LSN) -> None:
        """Record that the consumer keeps the transactions up to there.

        Raises:
            ValueError: They were not received on this connection. The server would remove WAL
                that it never sent.
        """
        if end_lsn > self._transaction_end:
            raise ValueError(f"nothing was received beyond {self._transaction_end}, got {end_lsn}")
        self._confirmed = max(self._confirmed, end_lsn)

    def release(self, lsn: LSN) -> None:
        """Record that nothing up to there is needed any more, as far as it was received."""
        quiet_lsn = self._transaction_end if self._quiet_until is None else self._quiet_until[0]
        self._confirmed = max(self._confirmed, min(lsn, max(self._transaction_end, quiet_lsn)))

    def empty_until(self, end_lsn: LSN) -> LSN:
        """Return up to where nothing of ours follows the transaction that ends at ``end_lsn``."""
        if self._quiet_until is None or self._quiet_until[1] > end_lsn:
            return end_lsn
        return max(end_lsn, self._quiet_until[0])

    def record_reply_request(self) -> None:
        """Record that the server requested a status update."""
        self._is_reply_requested = True

    def request_keepalive(self, now: float) -> None:
        """Make an update due that requests a keepalive, unless one was a moment ago."""
        if now >= self._next_request_at:
            self._next_request_at = now + KEEPALIVE_REQUEST_SECONDS
            self._next_status_at = now

    def limit_confirmation(self, lsn: LSN) -> None:
        """Advance the slot no further than there until the next call."""
        self._confirm_limit = lsn

    @property
    def confirmable_lsn(self) -> LSN:
        """The LSN to which the slot may be advanced now."""
        position = self._confirmed
        if self._quiet_until is not None and not self._is_durable:
            quiet_lsn, needed = self._quiet_until
            if self._confirmed >= needed:
                position = max(quiet_lsn, position)
        return position if self._confirm_limit is None else min(position, self._confirm_limit)

    def due(self, now: float) -> tuple[StandbyStatusUpdate, ...]:
        """Return the status updates to send, in this order, if any are due."""
        updates: list[StandbyStatusUpdate] = []
        if self.confirmable_lsn > self._sent_flush and now >= self._next_confirm_at:
            # Before the other update, whose *flushed* of 0 takes this process out of the standbys
            # again.
            updates.append(self._confirm_update(now))
        if updates or self._is_reply_requested or now >= self._next_status_at:
            # The periodic update requests a keepalive: its position advances the slot of an idle
            # database, and its arrival shows that the server is alive.
            asks = now >= self._next_status_at
            updates.append(StandbyStatusUpdate(self._received, _INVALID_LSN, reply_requested=asks))
            self._is_reply_requested = False
            if asks:
                self._next_status_at = now + self._interval
        return tuple(updates)

    def final_updates(self) -> tuple[StandbyStatusUpdate, ...]:
        """Return the updates to send before the connection is closed."""
        if self.confirmable_lsn > self._sent_flush:
            return (self._confirm_update(0.0),)
        return ()

    def _confirm_update(self, now: float) -> StandbyStatusUpdate:
        self._sent_flush = self.confirmable_lsn
        self._next_confirm_at = now + CONFIRM_SECONDS
        # *Written* is not what was received: with this update the server may take this process
        # for a synchronous standby, and commits beyond may be waiting for *written*.
        return StandbyStatusUpdate(self._sent_flush, self._sent_flush)
