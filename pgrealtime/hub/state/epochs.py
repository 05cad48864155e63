"""Which submitted positions the changelog goes on from."""

from __future__ import annotations

from pgrealtime.hub.connections.connection import Connection
from pgrealtime.lsn import LSN, Cursor, Position, parse_position

_POSITION_LIMIT = 128
"""Bytes of a submitted position that are looked at; anything longer is not ours."""
_START = Cursor(LSN(0), 0)
_NEVER = Cursor(LSN(1 << 64), 0)


class History:
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
        self._since = {epoch: _START}
        """Tables that come back were not streamed in between."""
        self._used = {epoch}

    def begin(self, epoch: str) -> None:
        """Another history: positions of before mean nothing any more."""
        self.epoch = epoch
        self._since = {epoch: _START}
        self._used = {epoch}

    def go_on(self, epoch: str, head: Cursor) -> None:
        """Another stream goes on from there: nothing was missed or repeated."""
        if epoch == self.epoch:
            return  # the same tables with other columns
        since = head if epoch in self._used else _START
        self._since = {self.epoch: self._since[self.epoch], epoch: since}
        self._used.add(epoch)
        self.epoch = epoch

    def place(self, connection: Connection, head: Cursor, floor: Cursor) -> None:
        """Put a connection where the position that it came with says.

        Args:
            connection: Fresh, at the head.
            head: Of the hub.
            floor: What the changelog reaches back to.
        """
        last_event_id, position = connection.asked
        asked = _position_of(last_event_id)
        if asked is None and position is None:
            return
        connection.is_resumable = True
        given = last_event_id if asked is not None else position
        if not given:
            connection.position = connection.position_text(head)
            return
        asked = asked or _position_of(position)
        is_ours = asked is not None and asked.cursor >= self._since.get(asked.epoch, _NEVER)
        if asked is None or not is_ours or not self._can_resume:
            connection.gap = "unknown"
        elif asked.cursor < floor:
            connection.gap = "expired"
        else:
            connection.cursor = asked.cursor
            connection.resumes = True
        # Until something was delivered the id stays the old position, also after a gap: who
        # breaks off now asks again and is told again.
        text = given.rpartition(".")[2][:_POSITION_LIMIT]
        connection.position = text.encode() if asked else connection.position_text(head)


def _position_of(text: str | None) -> Position | None:
    """Return the position in an id of ours, with or without the client id before it."""
    if not text or len(text) > _POSITION_LIMIT:
        return None
    return parse_position(text.rpartition(".")[2])
