"""What a changelog is: the seam between the relay that appends and the hub that reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from msgspec import Struct

from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.lsn import LSN, Cursor


class Gap(Struct, frozen=True):
    """A place in the stream where changes are missing."""

    end_lsn: LSN
    """Everything up to here may be missing; what follows is complete again."""
    reason: str
    """The word that clients are told: ``slot_lost``, ``oversized_message_bytes``, ``decoder``,
    ``schema``.
    """
    tables: frozenset[TableName] | None = None
    """What may have missed something; None is everything."""


class Watermark(Struct, frozen=True):
    """A place in the stream with nothing of ours before it since the entry before."""

    end_lsn: LSN


Entry: TypeAlias = Transaction | OversizedTransaction | Gap | Watermark


class Changelog(Protocol):
    """A window of recent entries in stream order, addressed by cursor."""

    @property
    def floor(self) -> Cursor:
        """The oldest cursor that ``read`` serves: what lies before was trimmed or never held."""
        ...

    @property
    def head(self) -> Cursor:
        """The cursor after the last entry."""
        ...

    def append(self, entry: Entry) -> None:
        """Keep the entry. Its end LSN must lie beyond the head's.

        Raises:
            ChangelogError: It doesn't.
        """
        ...

    def read(self, after: Cursor, upto: Cursor, limit: int) -> Sequence[Entry]:
        """Return entries in order with something after ``after``, none that ends beyond ``upto``.

        The first may be a transaction of which ``after`` lies in the middle. At least one entry
        is returned if there is one, then more until ``limit`` changes are reached.

        Raises:
            ChangelogError: ``after`` lies before the floor (code ``changelog_trimmed``).
        """
        ...

    def bytes_after(self, cursor: Cursor) -> int:
        """Bytes of the entries that end after the cursor."""
        ...
