"""The interface of a changelog: ``feed`` appends transactions, the hub reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from msgspec import Struct

from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.lsn import LSN, Cursor


class Gap(Struct, frozen=True):
    """Changes that are missing in the stream."""

    end_lsn: LSN
    """Changes up to here may be missing; what follows is complete."""
    reason: str
    """Sent to clients: ``slot_lost``, ``too_large``, ``decoder`` or ``schema``."""
    tables: frozenset[TableName] | None = None


class Watermark(Struct, frozen=True):
    """An LSN up to which the stream has no more changes since the previous entry."""

    end_lsn: LSN


Entry: TypeAlias = Transaction | OversizedTransaction | Gap | Watermark


class Changelog(Protocol):
    """A window of recent entries in stream order, addressed by cursors."""

    @property
    def floor(self) -> Cursor:
        """The oldest cursor that ``read`` accepts."""
        ...

    @property
    def end_cursor(self) -> Cursor:
        """The cursor after the last entry."""
        ...

    def append(self, entry: Entry) -> None:
        """Append the entry.

        Raises:
            ChangelogError: Its end LSN isn't after the head's.
        """
        ...

    def read(self, after: Cursor, upto: Cursor, limit: int) -> Sequence[Entry]:
        """Return the entries in order that have a change after ``after`` and end by ``upto``.

        ``after`` may be inside the first one, a transaction. Returns at least one entry if there
        is one, then more until they have ``limit`` changes.

        Raises:
            ChangelogError: ``after`` is before the floor (code ``changelog_trimmed``).
        """
        ...

    def bytes_after(self, cursor: Cursor) -> int:
        """Return the bytes of the entries that end after the cursor."""
        ...
