"""A column of a live row is an event's own only if nothing wrote it since the event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pgrealtime.changelog.base import Entry, Gap
from pgrealtime.changelog.memory import MemoryChangelog
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
from tests.unit.hub.room import COLLECTIONS, NOTES, POSTS

ALL = COLLECTIONS["posts"]
SEES_ALL = Snapshot(10**7, 10**7, frozenset())
OWN, NEXT, LAST, UNKNOWN = Xid(11), Xid(12), Xid(13), 99
SUB = 10**6
"""A subtransaction's id, which no change has."""


def update(record_id: str, *, was: str | None = None, **more: str) -> Update:
    """An update without the title, unless it is given."""
    return Update(POSTS, {"id": record_id, **more}, Key({"id": was or record_id}))


def insert(record_id: str) -> Insert:
    return Insert(POSTS, {"id": record_id, "title": "new"})


@dataclass
class Table:
    """A changelog, and the row as a table holds it."""

    live: LiveRow
    changelog: MemoryChangelog = field(
        default_factory=lambda: MemoryChangelog(LSN(100), max_bytes=10**6, max_age_seconds=300)
    )
    to_come: list[Entry] = field(default_factory=list)
    asked: list[LSN] = field(default_factory=list)
    _end: int = 100

    async def fetch_live_rows(
        self, _events: Sequence[Event]
    ) -> tuple[dict[tuple[str, str], LiveRow], frozenset[str]]:
        return {("posts", "a"): self.live}, frozenset()

    async def reach(self, lsn: LSN) -> bool:
        self.asked.append(lsn)
        for entry in self.to_come:
            self.changelog.append(entry)
        return self.changelog.end_cursor.lsn >= lsn

    def entry(self, xid: int, *changes: Change) -> Transaction:
        self._end += 100
        return Transaction(Xid(xid), LSN(self._end), 0, changes, 100)

    async def title(self, event: Event) -> str | None:
        """What the event's row has as title once it was completed; None for nothing."""
        toast = RowCompleter(self.fetch_live_rows, RowHistory(self.changelog, self.reach))
        await toast.complete([event])
        return event.row.get("title")


def table(xid: int, *, reach: int = 200, snapshot: Snapshot = SEES_ALL) -> Table:
    return Table(LiveRow(xid, {"title": "live"}, snapshot, LSN(reach)))


def first_event(entry: Transaction, collection: Collection = ALL) -> Event:
    made = next(iter(transaction_events(entry, COLLECTIONS)))
    assert isinstance(made, Event)
    made.collection = collection
    return made


async def title_after(
    *later: Change, live: int, own: Sequence[Change] = (), generated: bool = False
) -> str | None:
    """The title of an update, followed by another transaction with some changes."""
    world = table(live)
    columns = tuple(
        replace(one, is_generated=generated and one.name == "title") for one in ALL.table.columns
    )
    collection = replace(ALL, table=replace(ALL.table, columns=columns))
    entry = world.entry(OWN, update("a"), *own)
    world.changelog.append(entry)
    if later:
        world.changelog.append(world.entry(NEXT, *later))
    return await world.title(first_event(entry, collection))


async def test_the_row_of_the_same_transaction_has_what_no_later_change_brought() -> None:
    assert await title_after(live=OWN) == "live"
    assert await title_after(live=OWN, own=[update("a")]) == "live"
    assert await title_after(live=OWN, own=[update("a", title="x")]) is None
    assert await title_after(live=OWN, own=[update("a")], generated=True) is None


@pytest.mark.parametrize("live", [NEXT, UNKNOWN], ids=["its id", "a subtransaction's"])
async def test_later_transactions_count_as_well(live: int) -> None:
    """The row that they wrote proves nothing by itself."""
    assert await title_after(update("a"), live=live) == "live"
    assert await title_after(update("b", title="x"), update("a"), live=live) == "live"
    assert await title_after(update("a", title="x"), live=live) is None
    assert await title_after(update("a"), live=live, generated=True) is None
    assert await title_after(Delete(POSTS, Key({"id": "a"})), insert("a"), live=live) is None
    assert await title_after(Truncate(POSTS), update("a"), live=live) is None
    assert await title_after(Truncate(NOTES), update("a"), live=live) == "live"
    assert await title_after(update("a", was="b"), live=live) is None
    assert await title_after(update("b", was="a"), update("a", was="c"), live=live) is None
    assert await title_after(update("a"), live=live, own=[update("a", title="x")]) is None


async def test_a_commit_that_is_yet_to_come_is_waited_for() -> None:
    """Who wrote the row isn't known before."""
    for change, expected in [(update("a"), "live"), (update("a", title="x"), None)]:
        world = table(NEXT, reach=250)
        entry = world.entry(OWN, update("a"))
        world.changelog.append(entry)
        world.to_come.append(world.entry(NEXT, change))

        assert await world.title(first_event(entry)) == expected
        assert world.asked == [250]


async def test_what_does_not_come_in_time_proves_nothing() -> None:
    world = table(UNKNOWN, reach=250)
    entry = world.entry(OWN, update("a"))
    world.changelog.append(entry)

    assert await world.title(first_event(entry)) is None


async def test_the_changelog_is_asked_only_where_the_row_is_not_the_transactions_own() -> None:
    world = table(OWN, reach=10**9)
    entry = world.entry(OWN, update("a"))
    world.changelog.append(entry)

    assert await world.title(first_event(entry)) == "live"
    assert world.asked == []


async def test_what_the_snapshot_does_not_see_has_not_happened_to_the_row() -> None:
    world = table(UNKNOWN, snapshot=Snapshot(int(LAST), 1000, frozenset({int(LAST)})))
    entry = world.entry(OWN, update("a"))
    world.changelog.append(entry)
    world.changelog.append(world.entry(LAST, update("a", title="x")))

    assert await world.title(first_event(entry)) == "live"


@pytest.mark.parametrize(
    "missing",
    [
        Gap(LSN(300), "slot_lost"),
        Gap(LSN(300), "schema", frozenset({POSTS})),
        OversizedTransaction(NEXT, LSN(300), 0, frozenset({POSTS})),
    ],
)
async def test_changes_that_are_missing_may_have_written_anything(missing: Entry) -> None:
    world = table(LAST)
    entry = world.entry(OWN, update("a"))
    world.changelog.append(entry)
    world.changelog.append(missing)
    world.changelog.append(Transaction(LAST, LSN(400), 0, (update("a"),), 100))

    assert await world.title(first_event(entry)) is None


async def test_what_was_trimmed_proves_nothing() -> None:
    world = table(NEXT)
    entry = world.entry(OWN, update("a"))
    for one in (entry, world.entry(LAST), world.entry(NEXT, update("a"))):
        world.changelog.append(one)
    world.changelog.expire(10**9, Cursor(LSN(300), END_ORDINAL))

    assert await world.title(first_event(entry)) is None


@pytest.mark.parametrize("live", [SUB, 1999], ids=["a subtransaction's", "the last one's"])
async def test_a_row_that_is_written_again_and_again_costs_a_reader_behind_it_little(
    monkeypatch: pytest.MonkeyPatch, live: int
) -> None:
    """Each later write is looked at once, and not once for each event."""
    looked = 0

    def counted(*given: Any) -> frozenset[str]:
        nonlocal looked
        looked += 1
        return columns_written(*given)

    monkeypatch.setattr(toast, "columns_written", counted)
    world = table(live)
    updates = [world.entry(n, update("a", other="x")) for n in range(2000)]
    for entry in updates:
        world.changelog.append(entry)
    events = [first_event(entry) for entry in updates[:250]]
    await RowCompleter(world.fetch_live_rows, RowHistory(world.changelog, world.reach)).complete(
        events
    )

    assert {event.row["title"] for event in events} == {"live"}
    assert looked < 2000


async def test_a_write_ends_what_is_known_of_the_events_before_it_and_of_no_others() -> None:
    world = table(LAST)
    entries = [
        world.entry(OWN, update("a"), update("b")),
        world.entry(21, update("a", title="x")),
        world.entry(22, update("a")),
        world.entry(LAST, update("a")),
    ]
    for entry in entries:
        world.changelog.append(entry)
    events = [first_event(entry) for entry in (entries[0], *entries[2:])]
    await RowCompleter(world.fetch_live_rows, RowHistory(world.changelog, world.reach)).complete(
        events
    )

    assert [event.row.get("title") for event in events] == [None, "live", "live"]


async def test_a_history_grows_both_ways_and_looks_at_each_change_once() -> None:
    changelog = MemoryChangelog(LSN(0), max_bytes=10**6, max_age_seconds=300)
    history = TableHistory(changelog, POSTS, "id")
    looked = 0

    def read(after: Cursor, upto: Cursor, limit: int) -> Sequence[Entry]:
        nonlocal looked
        found = MemoryChangelog.read(changelog, after, upto, limit)
        looked += len(found)
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
    assert looked == 7
    changelog.expire(10**9, Cursor(LSN(60), END_ORDINAL))
    history.trim()
    assert (lsns("a", 60), lsns("b", 60)) == ([80, 90], [70, 90])
    # Whoever asks for what is gone by now is told that something may have been written there.
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
    """An application writes a record first, and then in the same transaction where it leads."""
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
    """They take turns, slice by slice, and others wait for them."""
    looked = 0

    def counted(change: Change, column: str) -> Sequence[str]:
        nonlocal looked
        looked += 1
        return column_values(change, column)

    monkeypatch.setattr(link_history, "column_values", counted)
    large = [
        Transaction(Xid(n), LSN(n), 0, tuple(update(f"r{place}") for place in range(100)), 10)
        for n in (1, 2)
    ]
    slices = [list(transaction_events(one, COLLECTIONS)) for one in large]
    sequels = TransactionLinkChanges()
    for pair in zip(*slices, strict=True):
        for event in pair:
            assert isinstance(event, Event)
            assert sequels.after_next_version(event, NOTES, "id") == ()

    assert looked == 200
