"""Turns row changes into events (creates, updates, deletes), and divides the stream into slices.

A slice is a run of events that are evaluated and delivered together. The dispatcher and each
connection that catches up read changelog entries from their cursor on and divide them here, each by
the changes of its own callers.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from msgspec import Struct

from pgrealtime.auth.principal import AccountKey
from pgrealtime.changelog.memory import Entry, Gap, Watermark
from pgrealtime.changes import (
    Action,
    Change,
    Delete,
    Insert,
    OversizedTransaction,
    Row,
    TableName,
    Transaction,
    Truncate,
    Update,
)
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.hub.events.links import LinkUpdates
from pgrealtime.lsn import END_ORDINAL, Cursor, Xid


class Event(Struct, gc=False):
    """One record's change, as clients receive it."""

    collection: Collection
    action: Action
    record_id: str
    row: Row
    """The image that rules are evaluated on and that is rendered: the new one for create and
    update, the old one for delete. The evaluator may complete it."""
    cursor: Cursor
    """Of the change; a changed key makes two events of one change."""
    xid: Xid
    transaction_changes: tuple[Change, ...] = ()
    """All changes of its transaction: rules of a delete see the tables as they were before."""
    is_departure: bool = False
    """Whether it is a delete for mirrors, of which they are told the id alone: the row went, or it
    is out of their sight."""
    is_relinked: bool = False
    """Whether it is an update by rows of a junction table alone. The WAL has nothing of the row but
    its key; the evaluator reads the rest."""
    is_superseded: bool = False
    """Whether the record was written again, or is gone, before its row could be read: what follows
    in the stream shows its links."""

    @property
    def missing_columns(self) -> frozenset[str]:
        """Columns that the row lacks: left out of the WAL, or no longer in the table."""
        # By name: the table may have been altered since the catalogue was read.
        return self.collection.column_names.difference(self.row)

    @property
    def is_unread(self) -> bool:
        """Whether its row could not be read: of a record whose links changed the WAL has no row."""
        return self.is_relinked and bool(self.missing_columns)

    @property
    def hides_email(self) -> bool:
        """Whether the record's e-mail address is hidden by default; of auth collections."""
        visibility = self.collection.fields_by_name.get("emailVisibility")
        column = visibility.column if visibility is not None else None
        return column is None or self.row.get(column.name) != "t"

    @property
    def account_key(self) -> AccountKey:
        """The account whose row this is, if the collection is an auth collection."""
        return self.collection.name, unpadded_id(self.collection, self.record_id)


class TruncatedCollections(Struct, frozen=True):
    """The collections of a truncated table, or that show what it held.

    The WAL doesn't say which rows these were, so it is a gap.
    """

    collections: tuple[Collection, ...]
    cursor: Cursor


def transaction_events(
    transaction: Transaction,
    collections: Collections,
    skipped_changes: int = 0,
    links: LinkUpdates | None = None,
) -> Iterator[Event | TruncatedCollections]:
    """Yield the events of a transaction in order, without those of the first changes.

    Changes of tables without a collection make no events, except those of junction tables among
    ``links``.
    """
    changes = transaction.changes
    link_tables = links.tables if links else ()
    for ordinal in range(skipped_changes + 1, len(changes) + 1):  # a slice of changes may be large
        change, cursor = changes[ordinal - 1], Cursor(transaction.end_lsn, ordinal)
        collection = collections.find_by_table(change.table)
        has_links = bool(link_tables) and change.table in link_tables
        if isinstance(change, Truncate):
            shown = links.collections_of(change.table) if links and has_links else []
            emptied = [*shown, *([collection] if collection else [])]
            if emptied:
                yield TruncatedCollections(tuple({c.name: c for c in emptied}.values()), cursor)
            continue
        if has_links:
            assert links is not None
            yield from _link_events(transaction, ordinal, links)
        if collection is None:
            continue
        key = collection.key.name
        match change:
            case Insert(new=row):
                yield _row_event(collection, "create", row, cursor, transaction)
            case Update(new=row, old=old):
                before = old.row.get(key)
                if before is not None and before != row.get(key):
                    # Ids don't change in PocketBase: to a client these are two records.
                    yield _row_event(collection, "delete", old.row, cursor, transaction)
                    yield _row_event(collection, "create", row, cursor, transaction)
                else:
                    yield _row_event(collection, "update", row, cursor, transaction)
            case Delete(old=old):
                yield _row_event(collection, "delete", old.row, cursor, transaction)


def _link_events(transaction: Transaction, ordinal: int, links: LinkUpdates) -> Iterator[Event]:
    """Yield the updates of the records that show the links which a junction's change alters."""
    cursor = Cursor(transaction.end_lsn, ordinal)
    for collection, key in links.records_of(transaction).get(ordinal, ()):
        row: Row = {collection.key.name: key}
        yield Event(
            collection,
            "update",
            key,
            row,
            cursor,
            transaction.xid,
            transaction.changes,
            is_relinked=True,
        )


def _row_event(
    collection: Collection, action: Action, row: Row, cursor: Cursor, transaction: Transaction
) -> Event:
    record_id = row.get(collection.key.name) or ""
    return Event(collection, action, record_id, row, cursor, transaction.xid, transaction.changes)


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
    tables: frozenset[TableName] = frozenset()
    """All that may lack changes, those without a collection too, unless ``collections`` is None."""

    def affects(self, collection_name: str) -> bool:
        """Whether changes of the collection may be missing."""
        return self.collections is None or collection_name in self.collections


class Slice(Struct):
    """Events, then perhaps a gap: all of the stream from ``begin_cursor`` to ``end_cursor``."""

    events: list[Event]
    gap: GapNotice | None
    end_cursor: Cursor
    begin_cursor: Cursor
    transactions: list[Transaction]
    """Those with changes between the two cursors, of tables without events too."""
    account_events: list[Event] = []
    """Those of the events that may change callers. One that does change a caller of the reader is
    the first event of its slice if it is an update, and in the last change if it is a delete."""


class _SliceBuilder:
    """Fills slices with events, one after the other.

    An update of a caller's row begins a slice, which is evaluated with the new caller. A delete
    ends one: what follows is evaluated without the caller. An insert changes no caller, since
    no caller could log in with the row before.
    """

    def __init__(
        self, after: Cursor, max_events: int, changes_a_caller: Callable[[Event], bool]
    ) -> None:
        self._max_events = max_events
        self._changes_a_caller = changes_a_caller
        self._begin_cursor = after
        self._transactions: list[Transaction] = []
        self._begin()

    def _begin(self) -> None:
        self._events: list[Event] = []
        self._account_events: list[Event] = []
        self._is_full = False
        self._changed_account: AccountKey | None = None
        """The account that the first event changes. Until the slice is delivered the reader can't
        say whether another event changes that caller again, so it is taken to."""

    def begin_transaction(self, transaction: Transaction) -> None:
        """Note that changes of a transaction follow."""
        self._transactions.append(transaction)

    def add(self, event: Event) -> Slice | None:
        """Add an event; return the slice that ends before it, if any. No change is divided."""
        ended = None
        is_account = (
            event.collection.type == "auth"
            and event.action != "create"
            and not event.is_relinked  # callers have the columns of a row
        )
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
        slice_ = Slice(
            self._events,
            gap,
            end_cursor,
            self._begin_cursor,
            self._transactions,
            self._account_events,
        )
        self._begin_cursor = end_cursor
        # The rest of the last one is in the next slice.
        self._transactions = [
            one for one in self._transactions[-1:] if end_cursor < Cursor(one.end_lsn, END_ORDINAL)
        ]
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
    links: LinkUpdates,
) -> Iterator[Slice]:
    """Divide entries into slices that begin after the reader's cursor; at least one.

    A slice must be delivered before the next one is taken: ``changes_a_caller`` says whether an
    update or delete of an account's row changes a caller that the reader has by then. If a
    transaction does not fit, its rows don't have the shapes that the collections were built
    for and can't be evaluated or rendered: what is left of it is a gap.
    """
    if not entries:
        # Nothing is left of the commit at the cursor.
        yield Slice([], None, Cursor(after.lsn, END_ORDINAL), after, [])
        return
    builder = _SliceBuilder(after, max_events, changes_a_caller)
    end_cursor = after
    for entry in entries:
        end_cursor = Cursor(entry.end_lsn, END_ORDINAL)
        if isinstance(entry, Watermark):
            continue
        if not isinstance(entry, Transaction) or not fits(entry):
            gap = _gap_notice(entry, after, collections, links, end_cursor)
            yield builder.end(gap, end_cursor)
            continue
        builder.begin_transaction(entry)
        skipped = _read_changes(entry, after)
        for event in transaction_events(entry, collections, skipped, links):
            if isinstance(event, TruncatedCollections):
                names = frozenset(one.name for one in event.collections)
                tables = frozenset(one.table.name for one in event.collections)
                gap = GapNotice(names, "truncate", event.cursor, entry.xid, tables)
                yield builder.end(gap, event.cursor)
            elif ended := builder.add(event):
                yield ended
    if end_cursor > after:
        yield builder.end(None, end_cursor)


def slice_prefix(whole: Slice, event_count: int) -> Slice:
    """Return the beginning of a slice, without its gap unless it is the whole slice.

    It has ``event_count`` events, at least 1; more if a change would be divided.
    """
    events, count = whole.events, event_count
    while count < len(events) and events[count].cursor == events[count - 1].cursor:
        count += 1
    if count >= len(events):
        return whole
    end_cursor = events[count - 1].cursor
    account_events = [event for event in whole.account_events if event.cursor <= end_cursor]
    return Slice(
        events[:count],
        None,
        end_cursor,
        whole.begin_cursor,
        whole.transactions,
        account_events,
    )


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
    links: LinkUpdates,
    cursor: Cursor,
) -> GapNotice:
    if isinstance(entry, Transaction):
        unread = entry.changes[_read_changes(entry, after) :]
        tables = frozenset(change.table for change in unread)
        names = _collection_names(tables, collections, links)
        return GapNotice(names, "schema", cursor, entry.xid, tables)
    names = _collection_names(entry.tables, collections, links)
    if isinstance(entry, OversizedTransaction):
        return GapNotice(names, "too_large", cursor, entry.xid, entry.tables)
    return GapNotice(names, entry.reason, cursor, tables=entry.tables or frozenset())


def _collection_names(
    tables: frozenset[TableName] | None, collections: Collections, links: LinkUpdates
) -> frozenset[str] | None:
    if tables is None:
        return None
    served = (collections.find_by_table(table) for table in tables)
    names = {collection.name for collection in served if collection is not None}
    linked = (collection for table in tables for collection in links.collections_of(table))
    return frozenset(names.union(collection.name for collection in linked))
