"""Stretches of the stream that are judged and handed out together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from msgspec import Struct

from pgrealtime.auth.principal import AccountKey
from pgrealtime.changelog.base import Entry, Gap, Watermark
from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.hub.events.event import Event, Truncation, account_of_event, transaction_events
from pgrealtime.lsn import END_ORDINAL, Cursor, Xid

SLICE_CHANGES = 250
"""Changes judged together, and messages handed to a subscription together: large enough to join
frames, small enough to share the loop and for a send buffer to overrun by."""

LIVE_SLICE_CHANGES = 4000
"""Changes delivered together if nobody gets more than ``SLICE_CHANGES`` messages by it. Where each
concerns few of many connections that is what joins frames: a write to a socket costs 5 us, a
message in it
0.5 us. Only a backlog brings so many, and whoever is in it waits longer than for this."""


class GapNotice(Struct, frozen=True):
    """A gap as clients are told of it."""

    collections: frozenset[str] | None
    """Names; None is all."""
    reason: str
    cursor: Cursor
    xid: Xid | None = None
    """Of the transaction that caused it; None if that is over and visible for long."""

    def affects(self, collection_name: str) -> bool:
        """Whether something of the collection of that name may be missing."""
        return self.collections is None or collection_name in self.collections


class Slice(Struct):
    """A stretch of the stream: events, then perhaps a gap; everything up to ``upto``."""

    events: list[Event]
    gap: GapNotice | None
    end_cursor: Cursor
    account_events: list[Event] = []
    """Those of the events that may change callers. One that does change a caller of the reader is
    the first of the slice if it is an update, and part of its last change if it is a delete."""


class _SliceBuilder:
    """A slice in the making.

    A row that comes changes no caller: nobody could be it before. One that changes begins a slice,
    for it is judged with its own news; one that goes ends it.
    """

    __slots__ = ("account_events", "changed_account", "events", "max_events")

    def __init__(self, max_events: int) -> None:
        self.events: list[Event] = []
        self.account_events: list[Event] = []
        self.max_events = max_events
        self.changed_account: AccountKey | None = None
        """Whom the first event changes: before the slice is handed out nobody can say whether
        another event changes that caller again."""

    def may_change_caller(self, event: Event, changes_a_caller: Callable[[Event], bool]) -> bool:
        return self.changed_account == account_of_event(event) or changes_a_caller(event)

    def must_end_before(self, event: Event, *, is_full: bool) -> bool:
        """Whether the event, a turn or not, belongs to the next slice; no change is torn apart."""
        events = self.events
        is_apart = bool(events) and event.cursor != events[-1].cursor
        return is_apart and (is_full or event.action == "update")

    def add_account_event(self, event: Event, *, is_caller_change: bool) -> None:
        """Take note of an event about a person."""
        self.account_events.append(event)
        if is_caller_change and event.action == "delete":
            self.max_events = 0  # what follows is judged without this caller
        elif is_caller_change:
            self.changed_account = account_of_event(event)

    def build(self, gap: GapNotice | None, end_cursor: Cursor) -> Slice:
        return Slice(self.events, gap, end_cursor, self.account_events)


def split_into_slices(
    entries: Sequence[Entry],
    after: Cursor,
    collections: Collections,
    changes_a_caller: Callable[[Event], bool],
    max_events: int = SLICE_CHANGES,
    *,
    fits: Callable[[Transaction], bool],
) -> Iterator[Slice]:
    """Cut entries into slices that begin after the cursor.

    Args:
        entries: In the order of the stream.
        after: What the reader has.
        collections: What is shown of them.
        changes_a_caller: Whether an event about a person changes a caller of the reader. The slice
            before must have been handed out when the next one is asked for.
        max_events: Of a slice's events, unless one change has more.
        fits: Whether a transaction's rows are what the collections are made for. If they aren't,
            they can't be judged or shown: what is left of the transaction is a gap.
    """
    if not entries:
        # All that the commit changed lies behind; to its very end there is nothing to read.
        yield Slice([], None, Cursor(after.lsn, END_ORDINAL))
        return
    cut = _SliceBuilder(max_events)
    upto = after
    for entry in entries:
        if isinstance(entry, Transaction) and fits(entry):
            behind = after.ordinal if after.lsn == entry.end_lsn else 0
            for event in transaction_events(entry, collections, behind):
                if isinstance(event, Truncation):
                    names = frozenset({event.collection.name})
                    gap = GapNotice(names, "truncate", event.cursor, entry.xid)
                    yield cut.build(gap, event.cursor)
                    cut = _SliceBuilder(max_events)
                    continue
                is_person = event.collection.type == "auth" and event.action != "create"
                is_turn = is_person and cut.may_change_caller(event, changes_a_caller)
                is_full = len(cut.events) >= cut.max_events
                if (is_turn or is_full) and cut.must_end_before(event, is_full=is_full):
                    yield cut.build(None, cut.events[-1].cursor)
                    cut = _SliceBuilder(max_events)
                cut.events.append(event)
                if is_person:
                    cut.add_account_event(event, is_caller_change=is_turn)
            upto = Cursor(entry.end_lsn, END_ORDINAL)
        elif isinstance(entry, Watermark):
            upto = Cursor(entry.end_lsn, END_ORDINAL)
        else:
            upto = Cursor(entry.end_lsn, END_ORDINAL)
            yield cut.build(_gap_notice(entry, after, collections, upto), upto)
            cut = _SliceBuilder(max_events)
    if upto > after:
        yield cut.build(None, upto)


def slice_prefix(whole: Slice, event_count: int) -> Slice:
    """Return a slice's beginning, which is all of it if it is short.

    Args:
        whole: The slice.
        event_count: How many events; more if a change would be torn apart. At least 1.
    """
    events = whole.events
    while (
        event_count < len(events) and events[event_count].cursor == events[event_count - 1].cursor
    ):
        event_count += 1
    if event_count >= len(events):
        return whole
    upto = events[event_count - 1].cursor
    people = [event for event in whole.account_events if event.cursor <= upto]
    return Slice(events[:event_count], None, upto, people)


def delivery_ranges(events: Sequence[Event], hits: Sequence[Iterable[Hashable]]) -> Iterator[range]:
    """Cut a judged slice: no group receives much more than ``SLICE_CHANGES`` messages at once.

    Args:
        events: Of the slice.
        hits: Per event the groups that hear of it.

    Yields:
        The events' places; at least once, and no change is torn apart.
    """
    first = 0
    if len(events) > SLICE_CHANGES:
        counts: dict[Hashable, int] = {}
        is_full = False
        for place, groups in enumerate(hits):
            if is_full and events[place].cursor != events[place - 1].cursor:
                yield range(first, place)
                first, is_full, counts = place, False, {}
            for group in groups:
                counts[group] = count = counts.get(group, 0) + 1
                is_full = is_full or count >= SLICE_CHANGES
    yield range(first, len(events))


def _gap_notice(
    entry: Transaction | OversizedTransaction | Gap,
    after: Cursor,
    collections: Collections,
    cursor: Cursor,
) -> GapNotice:
    if isinstance(entry, Transaction):
        behind = after.ordinal if after.lsn == entry.end_lsn else 0
        left = frozenset(change.table for change in entry.changes[behind:])
        return GapNotice(_collection_names(left, collections), "schema", cursor, entry.xid)
    names = _collection_names(entry.tables, collections)
    if isinstance(entry, OversizedTransaction):
        return GapNotice(names, "too_large", cursor, entry.xid)
    return GapNotice(names, entry.reason, cursor)


def _collection_names(
    tables: frozenset[TableName] | None, collections: Collections
) -> frozenset[str] | None:
    if tables is None:
        return None
    found = (collections.find_by_table(table) for table in tables)
    return frozenset(collection.name for collection in found if collection is not None)
