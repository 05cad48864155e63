"""What all parts of the hub read: its settings, how far the dispatcher is, by which generation.

``service`` makes the settings from the configuration. ``ResumableEpochs`` says which positions of
clients the changelog can continue.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pgrealtime.changelog.memory import Changelog
from pgrealtime.config.model import (
    CollectionLoginConfig,
    HiddenFieldsMode,
    MirrorsConfig,
    RealtimeConfig,
)
from pgrealtime.hub.connections.connection import Resumption
from pgrealtime.hub.connections.output import encode_position
from pgrealtime.hub.state.generation import Generation
from pgrealtime.lsn import LSN, Cursor, Position, parse_position

_MAX_POSITION_LENGTH = 128
"""Bytes of a submitted position that are read; a longer one is not ours."""
_START = Cursor(LSN(0), 0)
_UNREACHABLE_CURSOR = Cursor(LSN(1 << 64), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """Settings of the hub; a reload replaces ``logins`` and ``allows_guests`` only."""

    limits: RealtimeConfig = field(default_factory=RealtimeConfig)
    mirrors: MirrorsConfig = field(default_factory=MirrorsConfig)
    logins: Mapping[str, CollectionLoginConfig] = field(default_factory=dict)
    """By collection name, the columns that make a caller of a row."""
    allows_guests: bool = True
    """Whether a connection keeps its topics when its caller becomes a guest."""
    nulls: Literal["null", "zero"] = "null"
    hidden_fields: HiddenFieldsMode = "strict"
    tag: str = ""
    """The first characters of every client id: they say which process made it."""
    epoch: str = "000000"
    """Of positions before the stream has started."""
    can_resume: bool = True
    """Whether submitted positions are accepted."""
    max_concurrent_catch_ups: int = 16
    """Connections that are served from the changelog at the same time, and half as many isolated
    ones. The rest of the query pool is for the dispatcher."""


class DispatchProgress:
    """The dispatcher's head, the generation in force and the revision."""

    def __init__(self, head: Cursor, generation: Generation) -> None:
        self.head = head
        """Everything up to here was delivered to the LIVE connections."""
        self.evaluation_target = head
        """Everything up to here was evaluated for them, or is being evaluated."""
        self.generation = generation
        self.mirrors_since = head
        """Since when the rules are the ones in force: mirrors don't resume from before."""
        self.revision = 0
        """Increases with each new generation or history. Code that awaits compares it with the one
        read before, and discards results of an older one."""
        self.is_evaluating = False
        """Whether a slice is being evaluated. The groups of a connection that becomes LIVE
        during that time are not among those evaluated."""
        self._deferred: deque[Callable[[], None]] = deque()

    def begin_slice(self, end_cursor: Cursor) -> None:
        """Begin the evaluation of a slice."""
        self.evaluation_target, self.is_evaluating = end_cursor, True

    def restart(self, head: Cursor) -> None:
        """Move the head elsewhere; a slice being evaluated does not lead to it and is dropped."""
        self.head = self.evaluation_target = head

    def replace_generation(self, generation: Generation) -> None:
        """Evaluate by another generation from now on; no slice may be in progress."""
        if list(generation.collections.values()) != list(self.generation.collections.values()):
            self.mirrors_since = self.head
        self.generation = generation
        self.revision += 1

    def begin_history(self, head: Cursor) -> None:
        """Begin another history at a head."""
        self.revision += 1
        self.mirrors_since = head
        self.restart(head)

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Run the callback at once, or after the slice being evaluated."""
        if self.is_evaluating:
            self._deferred.append(callback)
        else:
            callback()

    def end_evaluation(self) -> None:
        """Run the callbacks deferred until no slice is being evaluated."""
        self.is_evaluating = False
        while self._deferred:
            callback = self._deferred.popleft()
            callback()


class ResumableEpochs:
    """The stream's epoch, and the one before it if the stream continued from that."""

    def __init__(self, epoch: str, changelog: Changelog, *, can_resume: bool) -> None:
        self.epoch = epoch
        self._changelog = changelog
        self._can_resume = can_resume
        self._resumable_from = {epoch: _START}
        """An epoch names a set of streamed tables. If the set changes and changes back, what was
        committed in between is missing, so the epoch is resumable from its return only."""
        self._past_epochs = {epoch}

    def start_epoch(self, epoch: str) -> None:
        """Begin another history: positions of earlier epochs are void."""
        self.epoch = epoch
        self._resumable_from = {epoch: _START}
        self._past_epochs = {epoch}

    def continue_epoch(self, epoch: str) -> None:
        """Continue from the changelog's end under another epoch: nothing was missed or repeated."""
        if epoch == self.epoch:
            return  # the same tables with other columns
        # Not the hub's head: another process that has the same stream may be further on, and have
        # given out positions of the epoch's first time that lie behind it.
        since = self._changelog.end_cursor if epoch in self._past_epochs else _START
        self._resumable_from = {self.epoch: self._resumable_from[self.epoch], epoch: since}
        self._past_epochs.add(epoch)
        self.epoch = epoch

    def resolve(self, submitted: tuple[str | None, str | None], head: Cursor) -> Resumption | None:
        """Return where a connection begins by the positions that it submitted; None without any.

        ``submitted`` are ``Last-Event-ID`` and ``lastEventId``. The header counts if it has a
        position: an EventSource may send one of another server. An empty ``lastEventId`` asks for
        positions from now on.
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
        return Resumption(parsed.cursor, sent, is_resuming=True, awaits_resync=parsed.awaits_resync)


def _parse_submitted_position(text: str | None) -> Position | None:
    """Return the position in an id of ours, with or without the client id before it."""
    if not text or len(text) > _MAX_POSITION_LENGTH:
        return None
    return parse_position(text.rpartition(".")[2])
