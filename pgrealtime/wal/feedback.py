"""What to tell the server of our progress, and when: between the stream and its status updates.

A status update holds two positions. *Written* says what was received; *flushed* moves the slot, and
with it what the server may forget. A standing *flushed* would make us a synchronous standby where
``synchronous_standby_names`` matches, and one behind what was received would keep the server from
shutting down. So it is 0, which leaves the slot as it is, except in the one update that moves it.
"""

from __future__ import annotations

from pgrealtime.lsn import LSN
from pgrealtime.wal.wire import StandbyStatusUpdate

CONFIRM_SECONDS = 1.0
"""The slot is moved at most so often: each move is two messages, and a write on the server."""

KEEPALIVE_REQUEST_SECONDS = 0.02
"""Between two status updates that somebody waits for the answers of."""

_INVALID_LSN = LSN(0)


class Feedback:
    """Positions of one connection to the server; they start anew with the next.

    Args:
        start: Where the stream begins.
        interval: Seconds between status updates. The server drops a reader that is silent for
            wal_sender_timeout; a third of it leaves room for a slow loop.
        now: Monotonic seconds, as everywhere here.
        is_durable: Whether the slot is also what is read from after a restart: then it moves up to
            what was let go and no further, where another takes what is ``quiet`` for kept.
    """

    def __init__(
        self, start: LSN, *, interval: float, now: float, is_durable: bool = False
    ) -> None:
        self._is_durable = is_durable
        self._interval = interval
        self._received = start
        self._handed_out = self._confirmed = self._sent_flush = start
        self._quiet_until: tuple[LSN, LSN] | None = None
        """A position with nothing of ours before it, apart from what ends at the second one."""
        self._next_status_at = now
        self._next_confirm_at = self._next_request_at = now
        self._is_reply_requested = False
        self._confirm_limit: LSN | None = None

    def record_received(self, lsn: LSN) -> None:
        """Something up to there arrived on this connection."""
        self._received = max(self._received, lsn)

    def record_handed_out(self, end_lsn: LSN) -> None:
        """A transaction that has to be kept arrived whole."""
        self.record_received(end_lsn)
        self._handed_out = end_lsn

    def record_quiet(self, lsn: LSN) -> None:
        """All before that position that is ours has arrived, and no transaction is open."""
        self.record_received(lsn)
        self._quiet_until = lsn, self._handed_out

    def confirm(self, end_lsn: LSN) -> None:
        """Transactions up to there are safe with us.

        Raises:
            ValueError: They didn't come on this connection. The server would believe it, and
                forget what it never sent.
        """
        if end_lsn > self._handed_out:
            raise ValueError(f"nothing was handed out beyond {self._handed_out}, got {end_lsn}")
        self._confirmed = max(self._confirmed, end_lsn)

    def release(self, lsn: LSN) -> None:
        """Nobody needs what ends up to there; as far as it came on this connection."""
        arrived = (
            self._handed_out
            if self._quiet_until is None
            else max(self._handed_out, self._quiet_until[0])
        )
        self._confirmed = max(self._confirmed, min(lsn, arrived))

    def empty_until(self, end_lsn: LSN) -> LSN:
        """Return up to where nothing of ours follows the transaction that ends there."""
        if self._quiet_until is None or self._quiet_until[1] > end_lsn:
            return end_lsn
        return max(end_lsn, self._quiet_until[0])

    def record_reply_request(self) -> None:
        """The server wants a status update at once."""
        self._is_reply_requested = True

    def request_keepalive(self, now: float) -> None:
        """Let the next status update ask for a keepalive, unless one did a moment ago."""
        if now >= self._next_request_at:
            self._next_request_at = now + KEEPALIVE_REQUEST_SECONDS
            self._next_status_at = now

    def limit_confirmation(self, lsn: LSN) -> None:
        """From now on the slot may move up to there and no further, until told anew."""
        self._confirm_limit = lsn

    @property
    def confirmable_lsn(self) -> LSN:
        """Up to where the server may forget."""
        position = self._confirmed
        if self._quiet_until is not None and not self._is_durable:
            quiet, needed = self._quiet_until
            if self._confirmed >= needed:
                position = max(quiet, position)
        return position if self._confirm_limit is None else min(position, self._confirm_limit)

    def due(self, now: float) -> tuple[StandbyStatusUpdate, ...]:
        """Return the status updates to send, in this order, if any are due."""
        updates: list[StandbyStatusUpdate] = []
        if self.confirmable_lsn > self._sent_flush and now >= self._next_confirm_at:
            updates.append(self._confirm_update(now))
        if updates or self._is_reply_requested or now >= self._next_status_at:
            # The timer's update asks for a keepalive: its position moves the slot of a quiet
            # database, and its coming shows that the server lives.
            asks = now >= self._next_status_at
            updates.append(StandbyStatusUpdate(self._received, _INVALID_LSN, reply_requested=asks))
            self._is_reply_requested = False
            if asks:
                self._next_status_at = now + self._interval
        return tuple(updates)

    def final_updates(self) -> tuple[StandbyStatusUpdate, ...]:
        """Return what is left to say before the connection is closed."""
        if self.confirmable_lsn > self._sent_flush:
            return (self._confirm_update(0.0),)
        return ()

    def _confirm_update(self, now: float) -> StandbyStatusUpdate:
        self._sent_flush = self.confirmable_lsn
        self._next_confirm_at = now + CONFIRM_SECONDS
        # Not as written what was received: for this one moment we may pass for a synchronous
        # standby, and commits may be waiting for a write beyond.
        return StandbyStatusUpdate(self._sent_flush, self._sent_flush)
