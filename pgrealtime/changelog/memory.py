"""The changelog in the process's memory: a window bounded by bytes and by age."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from pgrealtime.changelog.base import Entry, Gap
from pgrealtime.changes import Transaction
from pgrealtime.errors import ChangelogError
from pgrealtime.lsn import END, LSN, Cursor, format_lsn

_COMPACT_AT = 4096
"""Trimmed places at the front of the list before they are given back."""


class _Kept(NamedTuple):
    end_lsn: LSN
    entry: Entry
    total: int
    """Bytes appended up to and including this entry, ever."""
    appended_at: float


_EVERYTHING = Cursor(LSN((1 << 64) - 1), END)
_GONE = _Kept(LSN(0), Gap(LSN(0), ""), 0, 0.0)


class MemoryChangelog:
    """Implements ``changelog.base.Changelog``.

    Args:
        start: Where the stream begins: floor and head of the empty changelog.
        max_size: Bytes held at most, about, the newest entry aside.
        max_age: Seconds that an entry is held at most; ``expire`` applies it.
    """

    def __init__(self, start: LSN, *, max_size: int, max_age: float) -> None:
        self._max_size = max_size
        self._max_age = max_age
        self._kept: list[_Kept] = []
        self._first = 0
        self._total = 0
        self._trimmed_total = 0
        self._floor = self._head = Cursor(start, END)

    @property
    def floor(self) -> Cursor:
        """The oldest cursor that ``read`` serves."""
        return self._floor

    @property
    def head(self) -> Cursor:
        """The cursor after the last entry."""
        return self._head

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._total - self._trimmed_total

    def __len__(self) -> int:
        return len(self._kept) - self._first

    def append(self, entry: Entry, now: float = 0.0, upto: Cursor = _EVERYTHING) -> None:
        """Keep the entry; trim the oldest where the bound on bytes asks for it.

        Args:
            entry: The next one.
            now: Monotonic seconds.
            upto: What ends after this is not trimmed: whoever reads it holds it anyway.
        """
        if entry.end_lsn <= self._head.lsn and self._kept:
            raise ChangelogError(
                "an entry must end after the one before",
                detail=f"{format_lsn(entry.end_lsn)} is not after {format_lsn(self._head.lsn)}.",
            )
        self._total += entry.size if isinstance(entry, Transaction) else 0
        self._kept.append(_Kept(entry.end_lsn, entry, self._total, now))
        self._head = Cursor(entry.end_lsn, END)
        while self.size > self._max_size and len(self) > 1 and self._ends_within(upto):
            self._trim()

    def restart(self, start: LSN) -> None:
        """Empty it: another history begins at ``start``, whose positions may be used again."""
        self._kept, self._first = [], 0
        self._trimmed_total = self._total
        self._floor = self._head = Cursor(start, END)

    def expire(self, now: float, upto: Cursor) -> None:
        """Trim what is older than ``max_age``, but nothing that ends after ``upto``."""
        while len(self):
            is_young = now - self._kept[self._first].appended_at < self._max_age
            if is_young or not self._ends_within(upto):
                return
            self._trim()

    def _ends_within(self, upto: Cursor) -> bool:
        """Whether the oldest entry lies before the cursor to its very end."""
        return Cursor(self._kept[self._first].end_lsn, END) <= upto

    def _trim(self) -> None:
        gone = self._kept[self._first]
        self._floor = Cursor(gone.end_lsn, END)
        self._trimmed_total = gone.total
        self._kept[self._first] = _GONE  # its place stays for a while, its rows must not
        self._first += 1
        if self._first >= _COMPACT_AT and self._first * 2 >= len(self._kept):
            del self._kept[: self._first]
            self._first = 0

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
        for place in range(self._place_after(after), len(self._kept)):
            kept = self._kept[place]
            if kept.end_lsn > upto.lsn or count >= limit:
                break
            entries.append(kept.entry)
            count += len(kept.entry.changes) if isinstance(kept.entry, Transaction) else 1
        return entries

    def bytes_after(self, cursor: Cursor) -> int:
        """Bytes of the entries that end after the cursor."""
        place = self._place_after(Cursor(cursor.lsn, END))
        if place == self._first:
            return self.size
        return self._total - self._kept[place - 1].total

    def _place_after(self, cursor: Cursor) -> int:
        place = bisect_right(self._kept, cursor.lsn, lo=self._first, key=lambda kept: kept.end_lsn)
        if cursor.ordinal != END and place > self._first:
            before = self._kept[place - 1]
            if before.end_lsn == cursor.lsn and _reaches(before.entry) > cursor.ordinal:
                return place - 1
        return place


def _reaches(entry: Entry) -> int:
    return len(entry.changes) if isinstance(entry, Transaction) else 1
