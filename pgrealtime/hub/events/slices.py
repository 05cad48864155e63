"""Divides the stream into slices: runs of events that are evaluated and delivered together.

The dispatcher and each connection that catches up read changelog entries from their cursor on and
divide them here, each by the changes of its own callers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from msgspec import Struct

from pgrealtime.auth.principal import AccountKey
from pgrealtime.changelog.base import Entry, Gap, Watermark
from pgrealtime.changes import OversizedTransaction, TableName, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.hub.events.event import Event, TruncatedCollection, transaction_events
from pgrealtime.lsn import END_ORDINAL, Cursor, Xid

SLICE_CHANGES = 250
"""Changes evaluated together, and messages delivered to a subscription together: enough to join
writes, few enough to share the event loop and to exceed a send buffer by."""

LIVE_SLICE_CHANGES = 4000
"""Changes delivered together if no group receives more than ``SLICE_CHANGES`` messages of them.
Where each of many connections receives little, this is what joins their writes: a write to a socket
costs 5 us, one more message in it 0.5 us. Only a backlog has so many changes, and waits for longer
than a slice takes."""


class GapNotice(Struct, frozen=True):
    """A gap that clients are notified of."""

    collections: frozenset[str] | None
    """Names; None is all."""
    reason: str
    cursor: Cursor
    xid: Xid | None = None
    """Of the transaction that caused it; None if that is known to be visible."""

    def affects(self, collection_name: str) -> bool:
        """Whether changes of the collection may be missing."""
        return self.collections is None or collection_name in self.collections


class Slice(Struct):
    """Events, then perhaps a gap: all of the stream up to ``end_cursor``."""

    events: list[Event]
    gap: GapNotice | None
    end_cursor: Cursor
    account_events: list[Event] = []
    """Those of the events that may change callers. One that does change a caller of the reader is
    the first event of its slice if it is an update, and in the last change if it is a delete."""


class _SliceBuilder:
    """Fills slices with events, one after the other.

    An update of a caller's row begins a slice, which is evaluated with the new caller. A delete
    ends one: what follows is evaluated without the caller. An insert changes no caller, since
    no caller could log in with the row before.
    """

    __slots__ = (
        "_account_events",
        "_changed_account",
        "_changes_a_caller",
        "_events",
        "_is_full",
        "_max_events",
    )

    def __init__(self, max_events: int, changes_a_caller: Callable[[Event], bool]) -> None:
        self._max_events = max_events
        self._changes_a_caller = changes_a_caller
        self._begin()

    def _begin(self) -> None:
        self._events: list[Event] = []
        self._account_events: list[Event] = []
        self._is_full = False
        self._changed_account: AccountKey | None = None
        """The account that the first event changes. Until the slice is delivered the reader can't
        say whether another event changes that caller again, so it is taken to."""

    def add(self, event: Event) -> Slice | None:
        """Add an event; return the slice that ends before it, if one does.

        No change is divided: a changed key makes two events of it.
        """
        ended = None
        is_account = event.collection.type == "auth" and event.action != "create"
        is_caller_change = is_account and (
            self._changed_account == event.account_key or self._changes_a_caller(event)
        )
        if self._is_full or is_caller_change:
            is_next_change = bool(self._events) and event.cursor != self._events[-1].cursor
            if is_next_change and (self._is_full or event.action == "update"):
                ended = self.end(None, self._events[-1].cursor)
        self._events.append(event)
        self._is_full = self._is_full or len(self._events) >= self._max_events
        if is_account:
            self._account_events.append(event)
        if is_caller_change and event.action == "delete":
            self._is_full = True
        elif is_caller_change:
            self._changed_account = event.account_key
        return ended

    def end(self, gap: GapNotice | None, end_cursor: Cursor) -> Slice:
        """Return the slice that ends here, and begin the next one."""
        slice_ = Slice(self._events, gap, end_cursor, self._account_events)
        self._begin()
        return slice_


def split_into_slices(
    entries: Sequence[Entry],
    after: Cursor,
    collections: Collections,
    changes_a_caller: Callable[[Event], bool],
    max_events: int = SLICE_CHANGES,
    *,
    fits: Callable[[Transaction], bool],
) -> Iterator[Slice]:
    """Divide entries into slices that begin after the reader's cursor; at least one.

    A slice must be delivered before the next one is taken: ``changes_a_caller`` says whether an
    update or delete of an account's row changes a caller that the reader has by then. If a
    transaction does not fit, its rows don't have the shapes that the collections were built
    for and can't be evaluated or rendered: what is left of it is a gap.
    """
    if not entries:
        # Nothing is left of the commit at the cursor.
        yield Slice([], None, Cursor(after.lsn, END_ORDINAL))
        return
    builder = _SliceBuilder(max_events, changes_a_caller)
    end_cursor = after
    for entry in entries:
        end_cursor = Cursor(entry.end_lsn, END_ORDINAL)
        if isinstance(entry, Watermark):
            continue
        if not isinstance(entry, Transaction) or not fits(entry):
            yield builder.end(_gap_notice(entry, after, collections, end_cursor), end_cursor)
            continue
        for event in transaction_events(entry, collections, _read_changes(entry, after)):
            if isinstance(event, TruncatedCollection):
                names = frozenset({event.collection.name})
                gap = GapNotice(names, "truncate", event.cursor, entry.xid)
                yield builder.end(gap, event.cursor)
            elif ended := builder.add(event):
                yield ended
    if end_cursor > after:
        yield builder.end(None, end_cursor)


def slice_prefix(whole: Slice, event_count: int) -> Slice:
    """Return the beginning of a slice, without its gap unless it is the whole slice.

    It has ``event_count`` events, at least 1; more if a change would be divided.
    """
    events = whole.events
    while (
        event_count < len(events) and events[event_count].cursor == events[event_count - 1].cursor
    ):
        event_count += 1
    if event_count >= len(events):
        return whole
    end_cursor = events[event_count - 1].cursor
    account_events = [event for event in whole.account_events if event.cursor <= end_cursor]
    return Slice(events[:event_count], None, end_cursor, account_events)


def delivery_ranges(events: Sequence[Event], hits: Sequence[Iterable[Hashable]]) -> Iterator[range]:
    """Divide an evaluated slice so that no group receives many more than ``SLICE_CHANGES`` at once.

    Yields indexes of events, at least one range; no change is divided.
    """
    first = 0
    if len(events) > SLICE_CHANGES:
        counts: dict[Hashable, int] = {}
        is_full = False
        for index, groups in enumerate(hits):
            if is_full and events[index].cursor != events[index - 1].cursor:
                yield range(first, index)
                first, is_full, counts = index, False, {}
            for group in groups:
                counts[group] = count = counts.get(group, 0) + 1
                is_full = is_full or count >= SLICE_CHANGES
    yield range(first, len(events))


def _read_changes(transaction: Transaction, after: Cursor) -> int:
    """Return how many of the transaction's changes a reader at the cursor has read."""
    return after.ordinal if after.lsn == transaction.end_lsn else 0


def _gap_notice(
    entry: Transaction | OversizedTransaction | Gap,
    after: Cursor,
    collections: Collections,
    cursor: Cursor,
) -> GapNotice:
    if isinstance(entry, Transaction):
        unread = entry.changes[_read_changes(entry, after) :]
        tables = frozenset(change.table for change in unread)
        return GapNotice(_collection_names(tables, collections), "schema", cursor, entry.xid)
    names = _collection_names(entry.tables, collections)
    if isinstance(entry, OversizedTransaction):
        return GapNotice(names, "too_large", cursor, entry.xid)
    return GapNotice(names, entry.reason, cursor)


def _collection_names(
    tables: frozenset[TableName] | None, collections: Collections
) -> frozenset[str] | None:
    if tables is None:
        return None
    served = (collections.find_by_table(table) for table in tables)
    return frozenset(collection.name for collection in served if collection is not None)
