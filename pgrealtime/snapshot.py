"""PostgreSQL's snapshots: which transactions a reader sees, and the read point made of one."""

from dataclasses import dataclass

from pgrealtime.lsn import LSN, Xid, parse_lsn

_XID_HALF_RANGE = 1 << 31
_XID_RANGE = 1 << 32


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``pg_current_snapshot()``: 64-bit transaction ids, as ``xmin:xmax:xip,...`` prints them."""

    xmin: int
    xmax: int
    xip: frozenset[int]

    def sees(self, xid: Xid) -> bool:
        """Whether the stream's 32-bit top-level transaction is visible in this snapshot.

        The id is extended by its signed 32-bit distance to xmin, so no epoch need be kept. It
        may lie at or beyond xmax: a commit can be decoded before any snapshot sees it.
        """
        distance = (xid - self.xmin) % _XID_RANGE
        whole = self.xmin + (distance if distance < _XID_HALF_RANGE else distance - _XID_RANGE)
        return whole < self.xmax and whole not in self.xip


def parse_snapshot(text: str) -> Snapshot:
    """Return the snapshot that ``pg_current_snapshot()::text`` printed."""
    xmin, xmax, xip = text.split(":")
    return Snapshot(
        int(xmin), int(xmax), frozenset(map(int, xip.split(","))) if xip else frozenset()
    )


@dataclass(frozen=True, slots=True)
class ReadPoint:
    """A snapshot and the WAL insert LSN read with it: what was visible when something was read.

    A topic that is subscribed at a read point must still receive what was not visible at it. What
    commits beyond ``insert_lsn`` was not.
    """

    snapshot: Snapshot
    insert_lsn: LSN

    def predates(self, xid: Xid, end_lsn: LSN) -> bool:
        """Whether the transaction was not visible yet, and so must be delivered."""
        return end_lsn > self.insert_lsn or not self.snapshot.sees(xid)


def parse_read_point(snapshot: str, insert_lsn: str) -> ReadPoint:
    """Return the read point that PostgreSQL printed."""
    return ReadPoint(parse_snapshot(snapshot), parse_lsn(insert_lsn))
