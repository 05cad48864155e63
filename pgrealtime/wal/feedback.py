"""What to tell the server of our progress, and when: between the stream and its status updates.

A status update holds two positions. *Written* says what was received; *flushed* moves the slot, and
with it what the server may forget. A standing *flushed* would make us a synchronous standby where
``synchronous_standby_names`` matches, and one behind what was received would keep the server from
shutting down. So it is 0, which leaves the slot as it is, except in the one update that moves it.
"""

from __future__ import annotations

from pgrealtime.lsn import LSN
from pgrealtime.wal.wire import StandbyStatusUpdate

MOVE_SECONDS = 1.0
"""The slot is moved at most so often: each move is two messages, and a write on the server."""

ASK_SECONDS = 0.02
"""Between two status updates that somebody waits for the answers of."""

_NOWHERE = LSN(0)


class Feedback:
    """Positions of one connection to the server; they start anew with the next.

    Args:
        start: Where the stream begins.
        interval: Seconds between status updates. The server drops a reader that is silent for
            wal_sender_timeout; a third of it leaves room for a slow loop.
        now: Monotonic seconds, as everywhere here.
        is_log: Whether the slot is also what is read from after a restart: then it moves up to what
            was let go and no further, where another takes what is ``quiet`` for kept.
    """

    def __init__(self, start: LSN, *, interval: float, now: float, is_log: bool = False) -> None:
        self._is_log = is_log
        self._interval = interval
        self._received = start
        self._handed = self._kept = self._moved = start
        self._quiet: tuple[LSN, LSN] | None = None
        """A position with nothing of ours before it, apart from what ends at the second one."""
        self._next_status = now
        self._next_move = self._next_ask = now
        self._is_reply_requested = False
        self._bound: LSN | None = None

    def received(self, lsn: LSN) -> None:
        """Something up to there arrived on this connection."""
        self._received = max(self._received, lsn)

    def handed(self, end_lsn: LSN) -> None:
        """A transaction that has to be kept arrived whole."""
        self.received(end_lsn)
        self._handed = end_lsn

    def quiet(self, lsn: LSN) -> None:
        """All before that position that is ours has arrived, and no transaction is open."""
        self.received(lsn)
        self._quiet = lsn, self._handed

    def kept(self, end_lsn: LSN) -> None:
        """Transactions up to there are safe with us.

        Raises:
            ValueError: They didn't come on this connection. The server would believe it, and
                forget what it never sent.
        """
        if end_lsn > self._handed:
            raise ValueError(f"nothing was handed out beyond {self._handed}, got {end_lsn}")
        self._kept = max(self._kept, end_lsn)

    def let_go(self, lsn: LSN) -> None:
        """Nobody needs what ends up to there; as far as it came on this connection."""
        arrived = self._handed if self._quiet is None else max(self._handed, self._quiet[0])
        self._kept = max(self._kept, min(lsn, arrived))

    def quiet_after(self, end_lsn: LSN) -> LSN:
        """Return up to where nothing of ours follows the transaction that ends there."""
        if self._quiet is None or self._quiet[1] > end_lsn:
            return end_lsn
        return max(end_lsn, self._quiet[0])

    def reply_requested(self) -> None:
        """The server wants a status update at once."""
        self._is_reply_requested = True

    def ask(self, now: float) -> None:
        """Let the next status update ask for a keepalive, unless one did a moment ago."""
        if now >= self._next_ask:
            self._next_ask = now + ASK_SECONDS
            self._next_status = now

    def bound(self, lsn: LSN) -> None:
        """From now on the slot may move up to there and no further, until told anew."""
        self._bound = lsn

    @property
    def movable(self) -> LSN:
        """Up to where the server may forget."""
        position = self._kept
        if self._quiet is not None and not self._is_log:
            quiet, needed = self._quiet
            if self._kept >= needed:
                position = max(quiet, position)
        return position if self._bound is None else min(position, self._bound)

    def due(self, now: float) -> tuple[StandbyStatusUpdate, ...]:
        """Return the status updates to send, in this order, if any are due."""
        updates: list[StandbyStatusUpdate] = []
        if self.movable > self._moved and now >= self._next_move:
            updates.append(self._move(now))
        if updates or self._is_reply_requested or now >= self._next_status:
            # The timer's update asks for a keepalive: its position moves the slot of a quiet
            # database, and its coming shows that the server lives.
            asks = now >= self._next_status
            updates.append(StandbyStatusUpdate(self._received, _NOWHERE, reply_requested=asks))
            self._is_reply_requested = False
            if asks:
                self._next_status = now + self._interval
        return tuple(updates)

    def last(self) -> tuple[StandbyStatusUpdate, ...]:
        """Return what is left to say before the connection is closed."""
        if self.movable > self._moved:
            return (self._move(0.0),)
        return ()

    def _move(self, now: float) -> StandbyStatusUpdate:
        self._moved = self.movable
        self._next_move = now + MOVE_SECONDS
        # Not as written what was received: for this one moment we may pass for a synchronous
        # standby, and commits may be waiting for a write beyond.
        return StandbyStatusUpdate(self._moved, self._moved)
