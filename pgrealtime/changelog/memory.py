"""The changelog in the process's memory: a window bounded by bytes and by age."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from pgrealtime.changelog.base import Entry, Gap
from pgrealtime.changes import Transaction
from pgrealtime.errors import ChangelogError
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, format_lsn

_COMPACT_AT = 4096
"""Trimmed places at the front of the list before they are given back."""


class _StoredEntry(NamedTuple):
    end_lsn: LSN
    entry: Entry
    total_bytes: int
    """Bytes appended up to and including this entry, ever."""
    appended_at: float


_MAX_CURSOR = Cursor(LSN((1 << 64) - 1), END_ORDINAL)
_TRIMMED = _StoredEntry(LSN(0), Gap(LSN(0), ""), 0, 0.0)


class MemoryChangelog:
    """Implements ``changelog.base.Changelog``.

    Args:
        start: Where the stream begins: floor and head of the empty changelog.
        max_bytes: Bytes held at most, about, the newest entry aside.
        max_age_seconds: Seconds that an entry is held at most; ``expire`` applies it.
    """

    def __init__(self, start: LSN, *, max_bytes: int, max_age_seconds: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_seconds = max_age_seconds
        self._entries: list[_StoredEntry] = []
        self._first_index = 0
        self._total_bytes = 0
        self._trimmed_bytes = 0
        self._floor = self._head = Cursor(start, END_ORDINAL)

    @property
    def floor(self) -> Cursor:
        """The oldest cursor that ``read`` serves."""
        return self._floor

    @property
    def head(self) -> Cursor:
        """The cursor after the last entry."""
        return self._head

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return self._total_bytes - self._trimmed_bytes

    def __len__(self) -> int:
        return len(self._entries) - self._first_index

    def append(self, entry: Entry, now: float = 0.0, upto: Cursor = _MAX_CURSOR) -> None:
        """Keep the entry; trim the oldest where the bound on bytes asks for it.

        Args:
            entry: The next one.
            now: Monotonic seconds.
            upto: What ends after this is not trimmed: whoever reads it holds it anyway.
        """
        if entry.end_lsn <= self._head.lsn and self._entries:
            raise ChangelogError(
                "an entry must end after the one before",
                detail=f"{format_lsn(entry.end_lsn)} is not after {format_lsn(self._head.lsn)}.",
            )
        self._total_bytes += entry.size_bytes if isinstance(entry, Transaction) else 0
        self._entries.append(_StoredEntry(entry.end_lsn, entry, self._total_bytes, now))
        self._head = Cursor(entry.end_lsn, END_ORDINAL)
        while self.size_bytes > self._max_bytes and len(self) > 1 and self._oldest_ends_by(upto):
            self._trim()

    def restart(self, start: LSN) -> None:
        """Empty it: another history begins at ``start``, whose positions may be used again."""
        self._entries, self._first_index = [], 0
        self._trimmed_bytes = self._total_bytes
        self._floor = self._head = Cursor(start, END_ORDINAL)

    def expire(self, now: float, upto: Cursor) -> None:
        """Trim what is older than ``max_age``, but nothing that ends after ``upto``."""
        while len(self):
            is_young = now - self._entries[self._first_index].appended_at < self._max_age_seconds
            if is_young or not self._oldest_ends_by(upto):
                return
            self._trim()

    def _oldest_ends_by(self, upto: Cursor) -> bool:
        """Whether the oldest entry lies before the cursor to its very end."""
        return Cursor(self._entries[self._first_index].end_lsn, END_ORDINAL) <= upto

    def _trim(self) -> None:
        gone = self._entries[self._first_index]
        self._floor = Cursor(gone.end_lsn, END_ORDINAL)
        self._trimmed_bytes = gone.total_bytes
        self._entries[self._first_index] = (
            _TRIMMED  # its place stays for a while, its rows must not
        )
        self._first_index += 1
        if self._first_index >= _COMPACT_AT and self._first_index * 2 >= len(self._entries):
            del self._entries[: self._first_index]
            self._first_index = 0

    def read(self, after: Cursor, upto: Cursor, limit: int) -> Sequence[Entry]:
        """Return the entries in (after, upto], about ``limit`` changes of them."""
        if after < self._floor:
            raise ChangelogError(
                "the position lies before the changelog",
                detail=f"It reaches back to {format_lsn(self._floor.lsn)}.",
                code="changelog_trimmed",
            )
        entries: list[Entry] = []
        count = 0
        for place in range(self._index_after(after), len(self._entries)):
            kept = self._entries[place]
            if kept.end_lsn > upto.lsn or count >= limit:
                break
            entries.append(kept.entry)
            count += len(kept.entry.changes) if isinstance(kept.entry, Transaction) else 1
        return entries

    def bytes_after(self, cursor: Cursor) -> int:
        """Bytes of the entries that end after the cursor."""
        place = self._index_after(Cursor(cursor.lsn, END_ORDINAL))
        if place == self._first_index:
            return self.size_bytes
        return self._total_bytes - self._entries[place - 1].total_bytes

    def _index_after(self, cursor: Cursor) -> int:
        place = bisect_right(
            self._entries, cursor.lsn, lo=self._first_index, key=lambda kept: kept.end_lsn
        )
        if cursor.ordinal != END_ORDINAL and place > self._first_index:
            before = self._entries[place - 1]
            if before.end_lsn == cursor.lsn and _change_count(before.entry) > cursor.ordinal:
                return place - 1
        return place


def _change_count(entry: Entry) -> int:
    return len(entry.changes) if isinstance(entry, Transaction) else 1
