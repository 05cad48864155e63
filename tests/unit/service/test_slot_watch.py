"""When an operator is warned of the WAL that a slot retains."""

from __future__ import annotations

from typing import Any, cast

from structlog.testing import capture_logs

from pgrealtime.errors import PgRealtimeError
from pgrealtime.lsn import LSN
from pgrealtime.service.slot_watch import SlotWatch
from pgrealtime.wal.slot_status import SlotStatus


class Ending:
    """Stands for a stream: records how it was ended."""

    def __init__(self) -> None:
        self.errors: list[PgRealtimeError] = []

    def end(self, error: PgRealtimeError) -> None:
        self.errors.append(error)


def slot(retained: int, wal_status: str = "reserved") -> SlotStatus:
    return SlotStatus(
        *(LSN(1), "standing", "wal2json", "app", False, 1, wal_status, retained, 0, False, "")
    )


def events(limit: int, server_limit: int, *statuses: SlotStatus) -> tuple[list[str], Ending]:
    """Return what is logged for each status in turn, and how the stream was ended."""
    stream = Ending()
    watch = SlotWatch(cast("Any", stream), cast("Any", None), limit)
    logged = []
    for status in statuses:
        with capture_logs() as found:
            watch.check(status, server_limit)
        logged.append(" ".join(str(entry["event"]).partition(".")[2] for entry in found))
    return logged, stream


def test_the_warning_is_repeated_only_after_the_slot_was_well_below_the_limit() -> None:
    """A slot that stays about half of it isn't worth a line every few seconds."""
    sizes = (40, 50, 49, 60, 30, 50, 24, 49, 50)
    logged, stream = events(100, -1, *map(slot, sizes))
    warned = "retained_wal_high"
    assert logged == ["", warned, "", "", "", "", "", "", warned]
    assert stream.errors == []


def test_the_lower_of_both_limits_counts() -> None:
    assert events(100, 60, slot(30))[0] == ["retained_wal_high"]
    assert events(100, 1000, slot(30))[0] == [""]
    assert events(0, 60, slot(30))[0] == ["retained_wal_high"]
    assert events(0, -1, slot(1 << 50))[0] == [""]


def test_only_our_own_limit_ends_the_stream() -> None:
    """The server's own is enforced by the server."""
    logged, stream = events(100, 60, slot(100), slot(101))
    assert logged == ["retained_wal_high", "given_up"]
    (error,) = stream.errors
    assert (error.error_code, error.retryable) == ("slot_lost", True)


def test_a_lost_slot_ends_the_stream_at_once() -> None:
    """Its walsender may yet be held up by what it has to send."""
    logged, stream = events(0, -1, slot(0, "lost"))
    assert (logged, len(stream.errors)) == (["given_up"], 1)


def test_wal_about_to_be_removed_is_told_each_time_it_comes_to_that() -> None:
    states = ("reserved", "unreserved", "unreserved", "extended", "unreserved")
    logged, _ = events(0, -1, *(slot(0, state) for state in states))
    assert logged == ["", "wal_unreserved", "", "", "wal_unreserved"]
