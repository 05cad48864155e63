"""Resolves the positions that clients submit: the epochs that the changelog can continue."""

from __future__ import annotations

from pgrealtime.changelog.base import Changelog
from pgrealtime.hub.connections.connection import Resumption
from pgrealtime.hub.connections.output import encode_position
from pgrealtime.lsn import LSN, Cursor, Position, parse_position

_MAX_POSITION_LENGTH = 128
"""Bytes of a submitted position that are read; a longer one is not ours."""
_START = Cursor(LSN(0), 0)
_UNREACHABLE_CURSOR = Cursor(LSN(1 << 64), 0)


class ResumableEpochs:
    """The stream's epoch, and the one before it if the stream continued from that.

    The changelog's floor bounds the positions that can be resumed.
    """

    def __init__(self, epoch: str, changelog: Changelog, *, can_resume: bool) -> None:
        self.epoch = epoch
        self._changelog = changelog
        self._can_resume = can_resume
        self._resumable_from = {epoch: _START}
        """A table that returns to the stream was not streamed in between, so an epoch that returns
        is resumable from where it returned."""
        self._past_epochs = {epoch}

    def start_epoch(self, epoch: str) -> None:
        """Begin another history: positions of earlier epochs are void."""
        self.epoch = epoch
        self._resumable_from = {epoch: _START}
        self._past_epochs = {epoch}

    def continue_epoch(self, epoch: str, head: Cursor) -> None:
        """Continue from the head under another epoch: nothing was missed or repeated."""
        if epoch == self.epoch:
            return  # the same tables with other columns
        since = head if epoch in self._past_epochs else _START
        self._resumable_from = {self.epoch: self._resumable_from[self.epoch], epoch: since}
        self._past_epochs.add(epoch)
        self.epoch = epoch

    def resolve(self, submitted: tuple[str | None, str | None], head: Cursor) -> Resumption | None:
        """Return where a connection begins by the positions that it submitted; None without any.

        Of ``Last-Event-ID`` and ``lastEventId`` the first is another server's if it holds no
        position; an empty second one asks for positions from now on.
        """
        last_event_id, position = submitted
        parsed = _parse_submitted_position(last_event_id)
        if parsed is None and position is None:
            return None
        id_text = last_event_id if parsed is not None else position
        if not id_text:
            return Resumption(head, encode_position(self.epoch, head))
        parsed = parsed or _parse_submitted_position(position)
        # Until something was delivered the id stays the submitted position, also after a gap: a
        # client that breaks off now submits it again and is notified again.
        text = id_text.rpartition(".")[2][:_MAX_POSITION_LENGTH]
        sent = text.encode() if parsed else encode_position(self.epoch, head)
        is_ours = parsed is not None and parsed.cursor >= self._resumable_from.get(
            parsed.epoch, _UNREACHABLE_CURSOR
        )
        if parsed is None or not is_ours or not self._can_resume:
            return Resumption(head, sent, gap_reason="unknown")
        if parsed.cursor < self._changelog.floor:
            return Resumption(head, sent, gap_reason="expired")
        return Resumption(parsed.cursor, sent, is_resuming=True)


def _parse_submitted_position(text: str | None) -> Position | None:
    """Return the position in an id of ours, with or without the client id before it."""
    if not text or len(text) > _MAX_POSITION_LENGTH:
        return None
    return parse_position(text.rpartition(".")[2])
