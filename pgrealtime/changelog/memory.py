"""The changelog, bounded by bytes and by age: ``feed`` appends transactions, the hub reads them."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from msgspec import Struct

from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.errors import ChangelogError
from pgrealtime.history import Era
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, format_lsn


class Gap(Struct, frozen=True):
    """Changes that are missing in the stream."""

    end_lsn: LSN
    """Changes up to here may be missing; what follows is complete."""
    reason: str
    """Sent to clients: ``slot_lost``, ``too_large``, ``decoder``, ``schema`` or ``expired``."""
    tables: frozenset[TableName] | None = None


class Watermark(Struct, frozen=True):
    """An LSN up to which the stream has no more changes since the previous entry."""

    end_lsn: LSN


Entry: TypeAlias = Transaction | OversizedTransaction | Gap | Watermark

_COMPACT_AT = 4096
"""Trimmed elements at the front of the list from which on they are deleted."""


class _StoredEntry(NamedTuple):
    end_lsn: LSN
    entry: Entry
    total_bytes: int
    """Of all entries ever appended, up to and including this one."""
    appended_at: float


_MAX_CURSOR = Cursor(LSN((1 << 64) - 1), END_ORDINAL)
_TRIMMED = _StoredEntry(LSN(0), Gap(LSN(0), ""), 0, 0.0)


class Changelog:
    """A window of recent entries in stream order, addressed by cursors.

    ``start`` is floor and end of the empty changelog. ``max_bytes`` bounds all entries but the
    newest, approximately; ``expire`` applies ``max_age_seconds``.

    Attributes:
        floor: The oldest cursor that ``read`` accepts.
        end_cursor: The cursor after the last entry.
        era: What the newest entries belong to; None before the first stream.
    """

    def __init__(self, start: LSN, *, max_bytes: int, max_age_seconds: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._entries: list[_StoredEntry] = []
        self._first_index = 0
        self._total_bytes = 0
        self._trimmed_bytes = 0
        self.floor = self.end_cursor = Cursor(start, END_ORDINAL)
        self.era: Era | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return self._total_bytes - self._trimmed_bytes

    def __len__(self) -> int:
        return len(self._entries) - self._first_index

    def append(self, entry: Entry, now: float = 0.0, upto: Cursor = _MAX_CURSOR) -> None:
        """Append the entry; trim the oldest ones above ``max_bytes``.

        Entries that end after ``upto`` aren't trimmed: the hub has yet to read them.

        Raises:
            ChangelogError: Its end LSN isn't after the head's.
        """
        end_lsn, head_lsn = entry.end_lsn, self.end_cursor.lsn
        if end_lsn <= head_lsn and self._entries:
            raise ChangelogError(
                "an entry must end after the one before",
                detail=f"{format_lsn(end_lsn)} is not after {format_lsn(head_lsn)}.",
            )
        self._total_bytes += entry.size_bytes if isinstance(entry, Transaction) else 0
        self._entries.append(_StoredEntry(end_lsn, entry, self._total_bytes, now))
        self.end_cursor = Cursor(end_lsn, END_ORDINAL)
        while self.size_bytes > self._max_bytes and len(self) > 1 and self._oldest_ends_by(upto):
            self._trim()

    def begin_era(self, era: Era) -> None:
        """All entries from now on belong to an era."""
        self.era = era

    def restart(self, start: LSN) -> None:
        """Remove all entries; the stream begins anew at ``start``, which may be a lower LSN."""
        self._entries, self._first_index = [], 0
        self._trimmed_bytes = self._total_bytes
        self.floor = self.end_cursor = Cursor(start, END_ORDINAL)

    def expire(self, now: float, upto: Cursor) -> None:
        """Trim entries older than ``max_age_seconds`` that end by ``upto``."""
        while len(self):
            is_young = now - self._entries[self._first_index].appended_at < self._max_age_seconds
            if is_young or not self._oldest_ends_by(upto):
                return
            self._trim()

    def _oldest_ends_by(self, upto: Cursor) -> bool:
        return Cursor(self._entries[self._first_index].end_lsn, END_ORDINAL) <= upto

    def _trim(self) -> None:
        oldest = self._entries[self._first_index]
        self.floor = Cursor(oldest.end_lsn, END_ORDINAL)
        self._trimmed_bytes = oldest.total_bytes
        # Deleting at the front of a list moves the rest, so elements are deleted many at a time;
        # the rows are freed at once.
        self._entries[self._first_index] = _TRIMMED
        self._first_index += 1
        if self._first_index >= _COMPACT_AT and self._first_index * 2 >= len(self._entries):
            del self._entries[: self._first_index]
            self._first_index = 0

    def read(self, after: Cursor, upto: Cursor, limit: int) -> Sequence[Entry]:
        """Return the entries in order that have a change after ``after`` and end by ``upto``.

        ``after`` may be inside the first one, a transaction. Returns at least one entry if there
        is one, then more until they have ``limit`` changes.

        Raises:
            ChangelogError: ``after`` is before the floor (code ``changelog_trimmed``).
        """
        if after < self.floor:
            raise ChangelogError(
                "the position lies before the changelog",
                detail=f"It reaches back to {format_lsn(self.floor.lsn)}.",
                code="changelog_trimmed",
            )
        entries: list[Entry] = []
        count = 0
        for index in range(self._index_after(after), len(self._entries)):
            stored = self._entries[index]
            if stored.end_lsn > upto.lsn or count >= limit:
                break
            entries.append(stored.entry)
            count += _change_count(stored.entry)
        return entries

    def read_back(self, before: LSN | None, limit: int) -> Sequence[Entry]:
        """Return the newest entries that end before an LSN, newest first; None is the end."""
        entries, first = self._entries, self._first_index
        stop = len(entries)
        if before is not None:
            stop = bisect_left(entries, before, lo=first, key=lambda stored: stored.end_lsn)
        return [stored.entry for stored in reversed(entries[max(first, stop - limit) : stop])]

    def bytes_after(self, cursor: Cursor) -> int:
        """Return the bytes of the entries that end after the cursor."""
        index = self._index_after(Cursor(cursor.lsn, END_ORDINAL))
        if index == self._first_index:
            return self.size_bytes
        return self._total_bytes - self._entries[index - 1].total_bytes

    def _index_after(self, cursor: Cursor) -> int:
        """Return the index of the first entry with a change after the cursor."""
        entries, first, lsn = self._entries, self._first_index, cursor.lsn
        index = len(entries)
        # The newest entry or what follows it is asked for by far the most often.
        if index > first and entries[-1].end_lsn > lsn:
            index -= 1
            if index > first and entries[index - 1].end_lsn > lsn:
                index = bisect_right(entries, lsn, lo=first, key=lambda stored: stored.end_lsn)
        if cursor.ordinal != END_ORDINAL and index > self._first_index:
            before = self._entries[index - 1]
            if before.end_lsn == cursor.lsn and _change_count(before.entry) > cursor.ordinal:
                return index - 1
        return index


def _change_count(entry: Entry) -> int:
    return len(entry.changes) if isinstance(entry, Transaction) else 1
