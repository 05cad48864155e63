"""The window of recent transactions as bytes, from which other processes are fed. Pure.

It keeps what a ``Changelog`` of the same bounds keeps, in a sixth of the memory, and the frames
that say which era the entries belong to. Each frame has a number, counted from the first one ever;
a reader of the window remembers the number of the frame that it needs next.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from pgrealtime.changelog.memory import Entry, Gap
from pgrealtime.changes import Transaction
from pgrealtime.errors import ChangelogError
from pgrealtime.feed.frames import AwayFrame, EntriesFrame, EraFrame
from pgrealtime.feed.wire import encode_entries, encode_frame
from pgrealtime.history import Era
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, format_lsn

_MAX_FRAME_BYTES = 1024 * 1024
"""Bytes of memory that the entries of a frame take where they are read; one transaction may take
more. A process that reads a frame does nothing else meanwhile."""
_COMPACT_AT = 4096
"""Removed frames at the front of the list from which on they are deleted."""


class _StoredFrame(NamedTuple):
    data: bytes
    end_cursor: Cursor
    """Of its last entry; of an era's, the cursor after the frame before."""
    total_bytes: int
    """Of all entries ever appended, up to and including this frame's, as ``size_bytes`` counts."""
    appended_at: float
    begins: Era | None
    """The era that it begins, if any."""
    is_stream_up: bool
    """Whether a stream is read after it."""


class EncodedWindow:
    """A window whose entries are encoded once for all of its readers; a ``Window``.

    ``start`` is floor and end of the empty window. ``max_bytes`` counts as a ``Changelog`` does, by
    the memory of decoded entries; a frame is removed when those after it have more than that.

    Attributes:
        floor: The end of what was removed.
        end_cursor: The cursor after the last entry.
        era: What the newest entries belong to; None before the first stream.
    """

    def __init__(self, start: LSN, *, max_bytes: int, max_age_seconds: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._frames: list[_StoredFrame | None] = []
        self._first_index = 0
        self._removed_before = 0
        """Frames that were deleted from the list: the number of its first element."""
        self._pending: list[Entry] = []
        """Entries that belong to the next frame."""
        self._pending_since = 0.0
        self._pending_start_bytes = 0
        self._total_bytes = 0
        self._trimmed_bytes = 0
        self._restart_number = 0
        """The number of the frame with which the history began that is in force."""
        self._is_restarting = False
        self._floor_era: Era | None = None
        """The era in force at the floor; None before the history's first frame."""
        self._floor_is_stream_up = False
        self.floor = self.end_cursor = Cursor(start, END_ORDINAL)
        self.encoded_upto = self.end_cursor
        """The end of the last frame; what follows is pending."""
        self.era: Era | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes that the entries take where they are decoded."""
        return self._total_bytes - self._trimmed_bytes

    # -- for the intake

    def begin_era(self, era: Era) -> None:
        """All entries from now on belong to an era; ``add_era`` tells the readers."""
        self.era = era

    def append(self, entry: Entry, now: float, upto: Cursor) -> None:
        """Append an entry to the next frame; remove the oldest frames above ``max_bytes``.

        Frames that end after ``upto`` aren't removed.

        Raises:
            ChangelogError: Its end LSN isn't after the head's.
        """
        head_lsn = self.end_cursor.lsn
        if entry.end_lsn <= head_lsn and (self._pending or self.floor != self.end_cursor):
            raise ChangelogError(
                "an entry must end after the one before",
                detail=f"{format_lsn(entry.end_lsn)} is not after {format_lsn(head_lsn)}.",
            )
        if not self._pending:
            self._pending_since, self._pending_start_bytes = now, self._total_bytes
        self._pending.append(entry)
        self._total_bytes += entry.size_bytes if isinstance(entry, Transaction) else 0
        self.end_cursor = Cursor(entry.end_lsn, END_ORDINAL)
        if self._total_bytes - self._pending_start_bytes >= _MAX_FRAME_BYTES:
            self.flush()
        while (oldest := self._oldest()) is not None:
            left = self._total_bytes - oldest.total_bytes
            if left <= self._max_bytes or oldest.end_cursor > upto:
                return
            self._trim(oldest)

    def restart(self, start: LSN) -> None:
        """Remove all frames: another history begins at ``start``, which may be a lower LSN."""
        self._removed_before = self._restart_number = self.end_number
        self._frames, self._first_index, self._pending = [], 0, []
        self._trimmed_bytes = self._total_bytes
        self._floor_era, self._is_restarting = None, True
        self.floor = self.end_cursor = self.encoded_upto = Cursor(start, END_ORDINAL)

    def expire(self, now: float, upto: Cursor) -> None:
        """Remove the frames that end by ``upto`` and are older than ``max_age_seconds``."""
        while (oldest := self._oldest()) is not None:
            if now - oldest.appended_at < self._max_age_seconds or oldest.end_cursor > upto:
                return
            self._trim(oldest)

    def bytes_after(self, cursor: Cursor) -> int:
        """Return the bytes of the frames, and of what is pending, that end after the cursor."""
        if cursor >= self.end_cursor:
            return 0
        if cursor >= self.encoded_upto:
            return self._total_bytes - self._pending_start_bytes
        index = bisect_right(self._frames, cursor, lo=self._first_index, key=_end_of)
        before = self._frames[index - 1] if index > self._first_index else None
        return self._total_bytes - (self._trimmed_bytes if before is None else before.total_bytes)

    # -- frames

    def flush(self) -> None:
        """Encode the pending entries as a frame."""
        if self._pending:
            data, self._pending = encode_entries(self._pending), []
            self.encoded_upto = self.end_cursor
            self._add(data, self._pending_since, begins=None, is_stream_up=self._is_stream_up())

    def add_era(self, now: float, *, is_continuation: bool = False) -> None:
        """Add a frame that begins the era, or says that another stream is being read in it."""
        assert self.era is not None
        self.flush()
        start, is_restart = self.end_cursor.lsn, self._is_restarting
        frame = EraFrame(self.era, start, is_restart, is_continuation)
        self._is_restarting = False
        self._add(encode_frame(frame), now, begins=self.era, is_stream_up=True)

    def add_away(self, now: float) -> None:
        """Add a frame that says that no stream is being read."""
        self.flush()
        if self.era is not None:  # else nobody was told of a stream
            self._add(encode_frame(AwayFrame()), now, begins=None, is_stream_up=False)

    def _add(self, data: bytes, now: float, *, begins: Era | None, is_stream_up: bool) -> None:
        self._frames.append(
            _StoredFrame(data, self.end_cursor, self._total_bytes, now, begins, is_stream_up)
        )

    def _is_stream_up(self) -> bool:
        last = self._frames[-1] if len(self._frames) > self._first_index else None
        return self._floor_is_stream_up if last is None else last.is_stream_up

    def _oldest(self) -> _StoredFrame | None:
        return self._frames[self._first_index] if self._first_index < len(self._frames) else None

    def _trim(self, oldest: _StoredFrame) -> None:
        self.floor, self._trimmed_bytes = oldest.end_cursor, oldest.total_bytes
        self._floor_era = oldest.begins or self._floor_era
        self._floor_is_stream_up = oldest.is_stream_up
        self._frames[self._first_index] = None
        self._first_index += 1
        if self._first_index >= _COMPACT_AT and self._first_index * 2 >= len(self._frames):
            del self._frames[: self._first_index]
            self._removed_before += self._first_index
            self._first_index = 0

    # -- for readers

    @property
    def first_number(self) -> int:
        """The number of the oldest frame that is kept."""
        return self._removed_before + self._first_index

    @property
    def end_number(self) -> int:
        """The number of the next frame."""
        return self._removed_before + len(self._frames)

    def frame(self, number: int) -> bytes:
        """Return the frame of a number that is kept."""
        assert number >= self.first_number
        stored = self._frames[number - self._removed_before]
        assert stored is not None
        return stored.data

    def end_before(self, number: int) -> Cursor:
        """Return the end of what a reader has that needs this frame next; the floor at least."""
        index = number - self._removed_before - 1
        stored = self._frames[index] if index >= self._first_index else None
        return self.floor if stored is None else stored.end_cursor

    def opening_frames(self, expected: int | None) -> Sequence[bytes]:
        """Return what a reader must read before the oldest frame.

        Args:
            expected: The number of the frame that it needed next, which was removed; None if it has
                read nothing.
        """
        era, floor = self._floor_era, self.floor.lsn
        if era is None:
            return ()  # the oldest frame begins the history
        opening: list[EraFrame | EntriesFrame | AwayFrame]
        if expected is None or expected <= self._restart_number:
            opening = [EraFrame(era, floor, is_restart=expected is not None)]
        else:
            # Of the eras in between it needs the last one only: what belongs to the others is lost.
            opening = [
                EntriesFrame((Gap(floor, "expired"),)),
                EraFrame(era, floor, is_continuation=True),
                EraFrame(era, floor),
            ]
        if not self._floor_is_stream_up:
            opening.append(AwayFrame())
        return [encode_frame(frame) for frame in opening]


def _end_of(stored: _StoredFrame | None) -> Cursor:
    assert stored is not None
    return stored.end_cursor
