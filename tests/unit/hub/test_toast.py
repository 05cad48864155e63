"""A value of a live row is the event's own only if no write after the event can have changed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pgrealtime.changelog.memory import Changelog, Entry, Gap
from pgrealtime.changelog.row_history import RowHistory, RowWrite, TableHistory, column_values
from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Key,
    OversizedTransaction,
    Transaction,
    Truncate,
    Update,
)
from pgrealtime.collections.model import Collection
from pgrealtime.expand import link_history
from pgrealtime.expand.link_history import TransactionLinkChanges
from pgrealtime.hub.evaluation import toast
from pgrealtime.hub.evaluation.toast import RowCompleter, columns_written
from pgrealtime.hub.events.event import Event, transaction_events
from pgrealtime.lsn import END_ORDINAL, LSN, Cursor, Xid
from pgrealtime.rule_queries.live_rows import LiveRow
from pgrealtime.snapshot import Snapshot
from tests.unit.hub.harness import COLLECTIONS, NOTES, POSTS

ALL = COLLECTIONS["posts"]
SEES_ALL = Snapshot(10**7, 10**7, frozenset())
OWN, NEXT, LAST, UNKNOWN = Xid(11), Xid(12), Xid(13), 99
SUB = 10**6
"""A subtransaction's id: rows have it as xmin, but no transaction of the stream has it."""


def update(record_id: str, *, was: str | None = None, **more: str) -> Update:
    """Return an update without the title, unless it is given."""
    return Update(POSTS, {"id": record_id, **more}, Key({"id": was or record_id}))


def insert(record_id: str) -> Insert:
    return Insert(POSTS, {"id": record_id, "title": "new"})


@dataclass
class Table:
    """A changelog, and the live row that a query finds."""

    live: LiveRow
    changelog: Changelog = field(
        default_factory=lambda: Changelog(LSN(100), max_bytes=10**6, max_age_seconds=300)
    )
    later_entries: list[Entry] = field(default_factory=list)
    waited_for: list[LSN] = field(default_factory=list)
    _end: int = 100

    async def fetch_live_rows(
        self, _events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        return {("posts", "a"): self.live}, frozenset()

    async def wait_for_lsn(self, lsn: LSN) -> bool:
        self.waited_for.append(lsn)
        for entry in self.later_entries:
            self.changelog.append(entry)
        return self.changelog.end_cursor.lsn >= lsn

    def entry(self, xid: int, *changes: Change) -> Transaction:
        self._end += 100
        return Transaction(Xid(xid), LSN(self._end), 0, changes, 100)

    async def title(self, event: Event) -> str | None:
        """Return the title of the event's row after completion; None if it has none."""
        completer = RowCompleter(
            self.fetch_live_rows, RowHistory(self.changelog, self.wait_for_lsn)
        )
        await completer.complete([event])
        return event.row.get("title")


def table(xid: int, *, insert_lsn: int = 200, snapshot: Snapshot = SEES_ALL) -> Table:
    return Table(LiveRow(xid, {"title": "live"}, snapshot, LSN(insert_lsn)))


def first_event(entry: Transaction, collection: Collection = ALL) -> Event:
    made = next(iter(transaction_events(entry, COLLECTIONS)))
    assert isinstance(made, Event)
    made.collection = collection
    return made


async def completed_title(
    *later: Change, live: int, own: Sequence[Change] = (), generated: bool = False
) -> str | None:
    """Return the title completed for an update that is followed by other changes.

    Args:
        later: Changes of another, later transaction.
        live: The transaction id in ``xmin`` of the live row.
        own: Changes after the update in its own transaction.
        generated: Whether the title is a generated column.
    """
    data = table(live)
    columns = tuple(
        replace(one, is_generated=generated and one.name == "title") for one in ALL.table.columns
    )
    collection = replace(ALL, table=replace(ALL.table, columns=columns))
    entry = data.entry(OWN, update("a"), *own)
    data.changelog.append(entry)
    if later:
        data.changelog.append(data.entry(NEXT, *later))
    return await data.title(first_event(entry, collection))


async def test_the_row_of_the_same_transaction_has_what_no_later_change_brought() -> None:
    """If the event's transaction wrote the live row, only its own later changes count."""
    assert await completed_title(live=OWN) == "live"
    assert await completed_title(live=OWN, own=[update("a")]) == "live"
    assert await completed_title(live=OWN, own=[update("a", title="x")]) is None
    assert await completed_title(live=OWN, own=[update("a")], generated=True) is None


@pytest.mark.parametrize("live", [NEXT, UNKNOWN], ids=["its id", "a subtransaction's"])
async def test_later_transactions_count_as_well(live: int) -> None:
    """If another transaction wrote the live row, every write since the event counts."""
    assert await completed_title(update("a"), live=live) == "live"
    assert await completed_title(update("b", title="x"), update("a"), live=live) == "live"
    assert await completed_title(update("a", title="x"), live=live) is None
    assert await completed_title(update("a"), live=live, generated=True) is None
    assert await completed_title(Delete(POSTS, Key({"id": "a"})), insert("a"), live=live) is None
    assert await completed_title(Truncate(POSTS), update("a"), live=live) is None
    assert await completed_title(Truncate(NOTES), update("a"), live=live) == "live"
    assert await completed_title(update("a", was="b"), live=live) is None
    assert await completed_title(update("b", was="a"), update("a", was="c"), live=live) is None
    assert await completed_title(update("a"), live=live, own=[update("a", title="x")]) is None


async def test_a_commit_that_is_yet_to_come_is_waited_for() -> None:
    """The transaction that wrote the live row may not be in the changelog yet."""
    for change, expected in [(update("a"), "live"), (update("a", title="x"), None)]:
        data = table(NEXT, insert_lsn=250)
        entry = data.entry(OWN, update("a"))
        data.changelog.append(entry)
        data.later_entries.append(data.entry(NEXT, change))

        assert await data.title(first_event(entry)) == expected
        assert data.waited_for == [250]


async def test_a_live_row_is_not_used_if_the_changelog_does_not_reach_it_in_time() -> None:
    """If the changelog doesn't reach the snapshot in time, the live row isn't used."""
    data = table(UNKNOWN, insert_lsn=250)
    entry = data.entry(OWN, update("a"))
    data.changelog.append(entry)

    assert await data.title(first_event(entry)) is None


async def test_the_changelog_is_read_only_if_another_transaction_wrote_the_row() -> None:
    """A live row that the event's own transaction wrote has no later writes."""
    data = table(OWN, insert_lsn=10**9)
    entry = data.entry(OWN, update("a"))
    data.changelog.append(entry)

    assert await data.title(first_event(entry)) == "live"
    assert data.waited_for == []


async def test_writes_that_the_snapshot_does_not_see_do_not_count() -> None:
    """A write that the snapshot doesn't see isn't in the live row."""
    data = table(UNKNOWN, snapshot=Snapshot(int(LAST), 1000, frozenset({int(LAST)})))
    entry = data.entry(OWN, update("a"))
    data.changelog.append(entry)
    data.changelog.append(data.entry(LAST, update("a", title="x")))

    assert await data.title(first_event(entry)) == "live"


@pytest.mark.parametrize(
    "missing",
    [
        Gap(LSN(300), "slot_lost"),
        Gap(LSN(300), "schema", frozenset({POSTS})),
        OversizedTransaction(NEXT, LSN(300), 0, frozenset({POSTS})),
    ],
)
async def test_changes_that_are_missing_may_have_written_anything(missing: Entry) -> None:
    """After a gap or an oversized transaction of the table, the live row isn't used."""
    data = table(LAST)
    entry = data.entry(OWN, update("a"))
    data.changelog.append(entry)
    data.changelog.append(missing)
    data.changelog.append(Transaction(LAST, LSN(400), 0, (update("a"),), 100))

    assert await data.title(first_event(entry)) is None


async def test_a_live_row_is_not_used_if_later_changes_were_trimmed() -> None:
    """Entries that the changelog has discarded may have written the row."""
    data = table(NEXT)
    entry = data.entry(OWN, update("a"))
    for one in (entry, data.entry(LAST), data.entry(NEXT, update("a"))):
        data.changelog.append(one)
    data.changelog.expire(10**9, Cursor(LSN(300), END_ORDINAL))

    assert await data.title(first_event(entry)) is None


@pytest.mark.parametrize("live", [SUB, 1999], ids=["a subtransaction's", "the last one's"])
async def test_completing_events_of_a_row_written_many_times_takes_linear_time(
    monkeypatch: pytest.MonkeyPatch, live: int
) -> None:
    """Each later write is examined once, not once for each event."""
    examined = 0

    def counted(*given: Any) -> frozenset[str]:
        nonlocal examined
        examined += 1
        return columns_written(*given)

    monkeypatch.setattr(toast, "columns_written", counted)
    data = table(live)
    updates = [data.entry(n, update("a", other="x")) for n in range(2000)]
    for entry in updates:
        data.changelog.append(entry)
    events = [first_event(entry) for entry in updates[:250]]
    await RowCompleter(
        data.fetch_live_rows, RowHistory(data.changelog, data.wait_for_lsn)
    ).complete(events)

    assert {event.row["title"] for event in events} == {"live"}
    assert examined < 2000


async def test_a_write_ends_what_is_known_of_the_events_before_it_and_of_no_others() -> None:
    """Events after the last write of a column are completed; events before it aren't."""
    data = table(LAST)
    entries = [
        data.entry(OWN, update("a"), update("b")),
        data.entry(21, update("a", title="x")),
        data.entry(22, update("a")),
        data.entry(LAST, update("a")),
    ]
    for entry in entries:
        data.changelog.append(entry)
    events = [first_event(entry) for entry in (entries[0], *entries[2:])]
    await RowCompleter(
        data.fetch_live_rows, RowHistory(data.changelog, data.wait_for_lsn)
    ).complete(events)

    assert [event.row.get("title") for event in events] == [None, "live", "live"]


async def test_a_history_grows_both_ways_and_looks_at_each_change_once() -> None:
    """``extend`` indexes entries before and after those that it has, each only once."""
    changelog = Changelog(LSN(0), max_bytes=10**6, max_age_seconds=300)
    history = TableHistory(changelog, POSTS, "id")
    examined = 0

    def read(after: Cursor, upto: Cursor, limit: int) -> Sequence[Entry]:
        nonlocal examined
        found = Changelog.read(changelog, after, upto, limit)
        examined += len(found)
        return found

    changelog.read = read  # type: ignore[method-assign]  # counts
    for n in range(1, 9):
        changelog.append(Transaction(Xid(n), LSN(n * 10), 0, (update("ab"[n % 2]),), 100))

    def lsns(value: str, after: int) -> list[int]:
        return [int(write.end_lsn) for write in history.writes(value, LSN(after))]

    assert await history.extend(LSN(50))
    assert (lsns("a", 50), lsns("b", 50)) == ([60, 80], [70])
    changelog.append(Transaction(Xid(9), LSN(90), 0, (Truncate(POSTS),), 100))
    assert await history.extend(LSN(20))
    assert (lsns("a", 20), lsns("b", 60)) == ([40, 60, 80, 90], [70, 90])
    assert examined == 7
    changelog.expire(10**9, Cursor(LSN(60), END_ORDINAL))
    history.trim()
    assert (lsns("a", 60), lsns("b", 60)) == ([80, 90], [70, 90])
    # In the discarded range, one write of an unknown row represents what may have been there.
    assert history.writes("a", LSN(50))[0] == RowWrite(LSN(60), None, None)
    assert (lsns("a", 50), lsns("b", 50)) == ([60, 80, 90], [60, 70, 90])
    assert not await history.extend(LSN(50))
    assert await history.extend(LSN(60))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([], []),
        (["link"], []),
        (["update", "link"], ["link"]),
        (["link", "update", "other", "link", "update", "link"], ["link", "link"]),
        (["update", "unknown"], None),
        (["unknown", "update"], []),
        (["truncate"], []),
        (["link", "truncate"], []),
        (["truncate", "link"], None),
        (["truncate", "link", "update", "link"], None),
        (["update", "truncate", "link"], ["link"]),
        (["truncate", "other"], []),
        (["nameless", "link"], None),
        (["truncate", "unknown"], None),
    ],
)
def test_links_belong_to_the_version_of_the_row_before_them(
    after: list[str], expected: list[str] | None
) -> None:
    """Applications write a record first and its links after it, in the same transaction."""
    made: dict[str, Change] = {
        "update": update("a", title="x"),
        "link": Insert(NOTES, {"id": "n", "title": "a"}),
        "other": Insert(NOTES, {"id": "n", "title": "b"}),
        "unknown": Delete(NOTES, Key({"id": "n"})),
        "truncate": Truncate(POSTS),
        "nameless": Delete(POSTS, Key({"title": "w"})),
    }
    changes = (update("a", title="w"), *(made[name] for name in after))
    entry = Transaction(OWN, LSN(200), 0, changes, 100)
    found = TransactionLinkChanges().after_next_version(first_event(entry), NOTES, "title")

    assert (None if found is None else list(found)) == (
        None if expected is None else [made[name] for name in expected]
    )


def test_readers_at_two_large_transactions_index_each_of_them_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slices of several connections alternate, so more than one transaction must stay indexed."""
    examined = 0

    def counted(change: Change, column: str) -> Sequence[str]:
        nonlocal examined
        examined += 1
        return column_values(change, column)

    monkeypatch.setattr(link_history, "column_values", counted)
    large = [
        Transaction(Xid(n), LSN(n), 0, tuple(update(f"r{index}") for index in range(100)), 10)
        for n in (1, 2)
    ]
    slices = [list(transaction_events(one, COLLECTIONS)) for one in large]
    link_changes = TransactionLinkChanges()
    for pair in zip(*slices, strict=True):
        for event in pair:
            assert isinstance(event, Event)
            assert link_changes.after_next_version(event, NOTES, "id") == ()

    assert examined == 200
