"""What the reader puts out when its window is in other processes, and how it is applied there.

A sequence of frames is a changelog on its way: eras, the entries that belong to them, and the news
that no stream is being read. In one process there are no frames, the reader calls the intake.
"""

from typing import TypeAlias

from msgspec import Struct

from pgrealtime.changelog.memory import Entry
from pgrealtime.feed.intake import Intake
from pgrealtime.history import Era
from pgrealtime.lsn import LSN


class EraFrame(Struct, frozen=True):
    """A stream is being read, or is continued by another one."""

    era: Era
    start_lsn: LSN
    """All that follows in the era ends after this, and nothing before it is missing."""
    is_restart: bool = False
    """Whether another history begins: what came before is void."""
    is_continuation: bool = False
    """Whether the era's stream continues exactly where the last one ended."""


class EntriesFrame(Struct, frozen=True):
    """Entries, in stream order."""

    entries: tuple[Entry, ...]


class AwayFrame(Struct, frozen=True):
    """No stream is being read."""


Frame: TypeAlias = EraFrame | EntriesFrame | AwayFrame


class FrameIntake:
    """Applies frames to an intake; the first one must be an era's."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def apply(self, frame: Frame) -> None:
        """Apply a frame; wait while the intake's window is full.

        Entries that end at or before the last one are repeated ones, and skipped.
        """
        match frame:
            case EraFrame():
                self._apply_era(frame)
            case EntriesFrame():
                for entry in frame.entries:
                    if entry.end_lsn > self._intake.end_lsn:
                        await self._intake.append(entry)
                self._intake.wake()
            case AwayFrame():
                self._intake.lose_stream()

    def _apply_era(self, frame: EraFrame) -> None:
        # Where this process begins, what was before the era is as void as after a restart.
        if frame.is_restart or self._intake.era is None:
            self._intake.restart(frame.start_lsn)
        elif frame.is_continuation:
            self._intake.continue_era(frame.era)
            return
        self._intake.start_era(frame.era)
