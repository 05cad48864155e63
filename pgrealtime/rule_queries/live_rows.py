"""Reads rows as they are now, to complete images from which the WAL left out columns."""

from __future__ import annotations

from pgrealtime.changes import Row
from pgrealtime.lsn import LSN
from pgrealtime.snapshot import Snapshot


class LiveRow:
    """What a table holds now for a key, to fill in what the WAL left out.

    Attributes:
        xid: 32-bit id of the (sub)transaction that wrote this version.
        row: The columns that were asked for.
        snapshot: What it was read in.
        insert_lsn: Where the WAL ended then: all that the snapshot sees commits before.
    """

    __slots__ = ("insert_lsn", "row", "snapshot", "xid")

    def __init__(self, xid: int, row: Row, snapshot: Snapshot, insert_lsn: LSN) -> None:
        self.xid = xid
        self.row = row
        self.snapshot = snapshot
        self.insert_lsn = insert_lsn
