"""Which submitted positions the changelog goes on from."""

from __future__ import annotations

from pgrealtime.hub.connections.connection import Connection
from pgrealtime.lsn import LSN, Cursor, Position, parse_position

_MAX_POSITION_LENGTH = 128
"""Bytes of a submitted position that are looked at; anything longer is not ours."""
_START = Cursor(LSN(0), 0)
_UNREACHABLE_CURSOR = Cursor(LSN(1 << 64), 0)


class ResumableEpochs:
    """The stream's epochs: the one of now and the one before, if the stream went on from it.

    Args:
        epoch: Of the stream's positions.
        can_resume: Whether any position is taken.

    Attributes:
        epoch: That of now.
    """

    def __init__(self, epoch: str, *, can_resume: bool) -> None:
        self.epoch = epoch
        self._can_resume = can_resume
        self._resumable_from = {epoch: _START}
        """Tables that come back were not streamed in between."""
        self._past_epochs = {epoch}

    def start_epoch(self, epoch: str) -> None:
        """Another history: positions of before mean nothing any more."""
        self.epoch = epoch
        self._resumable_from = {epoch: _START}
        self._past_epochs = {epoch}

    def continue_epoch(self, epoch: str, head: Cursor) -> None:
        """Another stream goes on from there: nothing was missed or repeated."""
        if epoch == self.epoch:
            return  # the same tables with other columns
        since = head if epoch in self._past_epochs else _START
        self._resumable_from = {self.epoch: self._resumable_from[self.epoch], epoch: since}
        self._past_epochs.add(epoch)
        self.epoch = epoch

    def apply_submitted_position(self, connection: Connection, head: Cursor, floor: Cursor) -> None:
        """Put a connection where the position that it came with says.

        Args:
            connection: Fresh, at the head.
            head: Of the hub.
            floor: What the changelog reaches back to.
        """
        last_event_id, position = connection.submitted_positions
        asked = _parse_submitted_position(last_event_id)
        if asked is None and position is None:
            return
        connection.is_resumable = True
        given = last_event_id if asked is not None else position
        if not given:
            connection.position = connection.encode_position(head)
            return
        asked = asked or _parse_submitted_position(position)
        is_ours = asked is not None and asked.cursor >= self._resumable_from.get(
            asked.epoch, _UNREACHABLE_CURSOR
        )
        if asked is None or not is_ours or not self._can_resume:
            connection.pending_gap_reason = "unknown"
        elif asked.cursor < floor:
            connection.pending_gap_reason = "expired"
        else:
            connection.cursor = asked.cursor
            connection.is_resuming = True
        # Until something was delivered the id stays the old position, also after a gap: who
        # breaks off now asks again and is told again.
        text = given.rpartition(".")[2][:_MAX_POSITION_LENGTH]
        connection.position = text.encode() if asked else connection.encode_position(head)


def _parse_submitted_position(text: str | None) -> Position | None:
    """Return the position in an id of ours, with or without the client id before it."""
    if not text or len(text) > _MAX_POSITION_LENGTH:
        return None
    return parse_position(text.rpartition(".")[2])
