"""The window that resume, slow connections and the subscribe barrier read from."""

from __future__ import annotations

import sys

import pytest

from pgrealtime.changelog.memory import Changelog, Gap
from pgrealtime.changes import Insert, TableName, Transaction
from pgrealtime.errors import ChangelogError
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid

TABLE = TableName("public", "posts")


def transaction(end_lsn: int, *, changes: int = 1, size: int = 10) -> Transaction:
    rows = tuple(Insert(TABLE, {"id": f"{end_lsn}.{n}"}) for n in range(changes))
    return Transaction(Xid(end_lsn), LSN(end_lsn), 0, rows, size)


def changelog(*end_lsns: int, max_size: int = 1000, max_age: float = 60.0) -> Changelog:
    made = Changelog(LSN(0), max_bytes=max_size, max_age_seconds=max_age)
    for end_lsn in end_lsns:
        made.append(transaction(end_lsn))
    return made


def read(log: Changelog, after: Cursor, *, limit: int = 1000) -> list[int]:
    return [entry.end_lsn for entry in log.read(after, log.end_cursor, limit)]


def test_what_was_appended_is_read_in_order() -> None:
    log = changelog(10, 20, 30)

    assert read(log, Cursor(LSN(0), END_ORDINAL)) == [10, 20, 30]
    assert log.end_cursor == Cursor(LSN(30), END_ORDINAL)


def test_reading_begins_after_the_cursor() -> None:
    assert read(changelog(10, 20, 30), Cursor(LSN(10), END_ORDINAL)) == [20, 30]
    assert read(changelog(10, 20, 30), Cursor(LSN(15), 1)) == [20, 30]
    assert read(changelog(10, 20, 30), Cursor(LSN(30), END_ORDINAL)) == []


def test_a_cursor_within_a_transaction_reads_that_one_again_for_its_rest() -> None:
    """A connection that broke in the middle of a large commit loses none of it."""
    log = Changelog(LSN(0), max_bytes=1000, max_age_seconds=60)
    log.append(transaction(10, changes=3))
    log.append(transaction(20))

    assert read(log, Cursor(LSN(10), 2)) == [10, 20]
    assert read(log, Cursor(LSN(10), 3)) == [20]


def test_reading_stops_at_the_given_end_and_about_the_limit() -> None:
    log = changelog(10, 20, 30, 40)

    assert [
        e.end_lsn for e in log.read(Cursor(LSN(0), END_ORDINAL), Cursor(LSN(30), END_ORDINAL), 1000)
    ] == [10, 20, 30]
    assert read(log, Cursor(LSN(0), END_ORDINAL), limit=2) == [10, 20]


def test_a_transaction_larger_than_the_limit_is_read_all_the_same() -> None:
    log = Changelog(LSN(0), max_bytes=1000, max_age_seconds=60)
    log.append(transaction(10, changes=500))

    assert read(log, Cursor(LSN(0), END_ORDINAL), limit=250) == [10]


def test_bytes_are_bounded_and_the_oldest_goes_first() -> None:
    log = changelog(10, 20, 30, max_size=25)

    assert log.size_bytes == 20
    assert log.floor == Cursor(LSN(10), END_ORDINAL)
    with pytest.raises(ChangelogError) as refused:
        log.read(Cursor(LSN(5), END_ORDINAL), log.end_cursor, 10)
    assert refused.value.error_code == "changelog_trimmed"
    assert read(log, log.floor) == [20, 30]


def test_age_is_bounded_but_nothing_undelivered_is_trimmed() -> None:
    log = Changelog(LSN(0), max_bytes=1000, max_age_seconds=60)
    for at, end_lsn in enumerate((10, 20, 30)):
        log.append(transaction(end_lsn), now=float(at))

    log.expire(now=61.5, upto=Cursor(LSN(10), END_ORDINAL))
    assert log.floor == Cursor(LSN(10), END_ORDINAL)
    log.expire(now=61.5, upto=log.end_cursor)
    assert read(log, log.floor) == [30]


def test_an_entry_out_of_order_is_refused() -> None:
    with pytest.raises(ChangelogError):
        changelog(20, 20)


def test_bytes_after_counts_what_a_reader_has_yet_to_read() -> None:
    log = changelog(10, 20, 30)

    assert log.bytes_after(Cursor(LSN(0), END_ORDINAL)) == 30
    assert log.bytes_after(Cursor(LSN(20), END_ORDINAL)) == 10
    assert log.bytes_after(log.end_cursor) == 0


def test_gaps_stand_in_order_between_transactions() -> None:
    log = changelog(10)
    log.append(Gap(LSN(15), "slot_lost"))
    log.append(transaction(20))

    assert read(log, Cursor(LSN(0), END_ORDINAL)) == [10, 15, 20]


def test_a_restart_forgets_everything_and_begins_at_a_lower_position() -> None:
    log = changelog(10, 20)
    log.restart(LSN(5))
    log.append(transaction(8))

    assert (log.floor, log.end_cursor) == (Cursor(LSN(5), END_ORDINAL), Cursor(LSN(8), END_ORDINAL))
    assert read(log, log.floor) == [8]
    assert log.size_bytes == 10


def test_trimming_ten_thousand_entries_keeps_every_answer_right() -> None:
    log = changelog(max_size=100)
    for end_lsn in range(1, 10_001):
        log.append(transaction(end_lsn))

    assert len(log) == 10
    assert read(log, log.floor) == list(range(9991, 10_001))


def test_what_its_reader_is_in_the_middle_of_is_kept_for_it() -> None:
    """It holds those rows anyway; without them it could not go on after a reload."""
    log = Changelog(LSN(0), max_bytes=100, max_age_seconds=60)
    log.append(transaction(10, size=60), 0.0)
    log.append(transaction(20, changes=3, size=60), 0.0, Cursor(LSN(10), END_ORDINAL))
    log.append(transaction(30, size=60), 0.0, Cursor(LSN(20), 2))
    log.expire(1000.0, Cursor(LSN(20), 2))

    assert read(log, Cursor(LSN(20), 2)) == [20, 30]
    log.expire(1000.0, Cursor(LSN(20), END_ORDINAL))
    assert log.floor == Cursor(LSN(20), END_ORDINAL)


def test_what_was_trimmed_is_no_longer_held() -> None:
    """The bound is on memory, not on what can be read."""
    log = Changelog(LSN(0), max_bytes=100, max_age_seconds=60)
    made = transaction(10, size=60)
    before = sys.getrefcount(made)
    log.append(made)
    log.append(transaction(20, size=60))
    log.append(transaction(30, size=60))

    assert log.floor.lsn == 20
    assert sys.getrefcount(made) == before
