"""Stretches of the stream that are judged and handed out together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from msgspec import Struct

from pgrealtime.changelog.base import Entry, Gap, Mark
from pgrealtime.changes import Oversized, TableName, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.hub.events.event import Emptied, Event, events_of
from pgrealtime.hub.state.callers import Person, person_in
from pgrealtime.lsn import END, Cursor, Xid

SLICE = 250
"""Changes judged together, and messages handed to a subscription together: large enough to join
frames, small enough to share the loop and for a send buffer to overrun by."""

WIDE = 4000
"""Changes delivered together if nobody gets more than ``SLICE`` messages by it. Where each concerns
few of many connections that is what joins frames: a write to a socket costs 5 us, a message in it
0.5 us. Only a backlog brings so many, and whoever is in it waits longer than for this."""


class Announcement(Struct, frozen=True):
    """A gap as clients are told of it."""

    collections: frozenset[str] | None
    """Names; None is all."""
    reason: str
    at: Cursor
    xid: Xid | None = None
    """Of the transaction that caused it; None if that is over and visible for long."""

    def concerns(self, collection: str) -> bool:
        """Whether something of the collection of that name may be missing."""
        return self.collections is None or collection in self.collections


class Slice(Struct):
    """A stretch of the stream: events, then perhaps a gap; everything up to ``upto``."""

    events: list[Event]
    gap: Announcement | None
    upto: Cursor
    people: list[Event] = []
    """Those of the events that may change callers. One that does change a caller of the reader is
    the first of the slice if it is an update, and part of its last change if it is a delete."""


class _Cut:
    """A slice in the making.

    A row that comes changes no caller: nobody could be it before. One that changes begins a slice,
    for it is judged with its own news; one that goes ends it.
    """

    __slots__ = ("events", "limit", "people", "turned")

    def __init__(self, limit: int) -> None:
        self.events: list[Event] = []
        self.people: list[Event] = []
        self.limit = limit
        self.turned: Person | None = None
        """Whom the first event changes: before the slice is handed out nobody can say whether
        another event changes that caller again."""

    def may_turn(self, event: Event, turns: Callable[[Event], bool]) -> bool:
        return self.turned == person_in(event) or turns(event)

    def is_over_before(self, event: Event, *, is_full: bool) -> bool:
        """Whether the event, a turn or not, belongs to the next slice; no change is torn apart."""
        events = self.events
        is_apart = bool(events) and event.cursor != events[-1].cursor
        return is_apart and (is_full or event.action == "update")

    def note(self, event: Event, *, is_turn: bool) -> None:
        """Take note of an event about a person."""
        self.people.append(event)
        if is_turn and event.action == "delete":
            self.limit = 0  # what follows is judged without this caller
        elif is_turn:
            self.turned = person_in(event)

    def slice(self, gap: Announcement | None, upto: Cursor) -> Slice:
        return Slice(self.events, gap, upto, self.people)


def slices(
    entries: Sequence[Entry],
    after: Cursor,
    collections: Collections,
    turns: Callable[[Event], bool],
    limit: int = SLICE,
    *,
    fits: Callable[[Transaction], bool],
) -> Iterator[Slice]:
    """Cut entries into slices that begin after the cursor.

    Args:
        entries: In the order of the stream.
        after: What the reader has.
        collections: What is shown of them.
        turns: Whether an event about a person changes a caller of the reader. The slice
            before must have been handed out when the next one is asked for.
        limit: Of a slice's events, unless one change has more.
        fits: Whether a transaction's rows are what the collections are made for. If they aren't,
            they can't be judged or shown: what is left of the transaction is a gap.
    """
    if not entries:
        # All that the commit changed lies behind; to its very end there is nothing to read.
        yield Slice([], None, Cursor(after.lsn, END))
        return
    cut = _Cut(limit)
    upto = after
    for entry in entries:
        if isinstance(entry, Transaction) and fits(entry):
            behind = after.ordinal if after.lsn == entry.end_lsn else 0
            for event in events_of(entry, collections, behind):
                if isinstance(event, Emptied):
                    names = frozenset({event.collection.name})
                    gap = Announcement(names, "truncate", event.cursor, entry.xid)
                    yield cut.slice(gap, event.cursor)
                    cut = _Cut(limit)
                    continue
                is_person = event.collection.type == "auth" and event.action != "create"
                is_turn = is_person and cut.may_turn(event, turns)
                is_full = len(cut.events) >= cut.limit
                if (is_turn or is_full) and cut.is_over_before(event, is_full=is_full):
                    yield cut.slice(None, cut.events[-1].cursor)
                    cut = _Cut(limit)
                cut.events.append(event)
                if is_person:
                    cut.note(event, is_turn=is_turn)
            upto = Cursor(entry.end_lsn, END)
        elif isinstance(entry, Mark):
            upto = Cursor(entry.end_lsn, END)
        else:
            upto = Cursor(entry.end_lsn, END)
            yield cut.slice(_announcement(entry, after, collections, upto), upto)
            cut = _Cut(limit)
    if upto > after:
        yield cut.slice(None, upto)


def beginning(part: Slice, count: int) -> Slice:
    """Return a slice's beginning, which is all of it if it is short.

    Args:
        part: The slice.
        count: How many events; more if a change would be torn apart. At least 1.
    """
    events = part.events
    while count < len(events) and events[count].cursor == events[count - 1].cursor:
        count += 1
    if count >= len(events):
        return part
    upto = events[count - 1].cursor
    people = [event for event in part.people if event.cursor <= upto]
    return Slice(events[:count], None, upto, people)


def portions(events: Sequence[Event], judged: Sequence[Iterable[Hashable]]) -> Iterator[range]:
    """Cut a judged slice so that no group receives much more than ``SLICE`` messages at once.

    Args:
        events: Of the slice.
        judged: Per event the groups that hear of it.

    Yields:
        The events' places; at least once, and no change is torn apart.
    """
    first = 0
    if len(events) > SLICE:
        counts: dict[Hashable, int] = {}
        is_full = False
        for place, groups in enumerate(judged):
            if is_full and events[place].cursor != events[place - 1].cursor:
                yield range(first, place)
                first, is_full, counts = place, False, {}
            for group in groups:
                counts[group] = count = counts.get(group, 0) + 1
                is_full = is_full or count >= SLICE
    yield range(first, len(events))


def _announcement(
    entry: Transaction | Oversized | Gap, after: Cursor, collections: Collections, at: Cursor
) -> Announcement:
    if isinstance(entry, Transaction):
        behind = after.ordinal if after.lsn == entry.end_lsn else 0
        left = frozenset(change.table for change in entry.changes[behind:])
        return Announcement(_names(left, collections), "schema", at, entry.xid)
    names = _names(entry.tables, collections)
    if isinstance(entry, Oversized):
        return Announcement(names, "too_large", at, entry.xid)
    return Announcement(names, entry.reason, at)


def _names(tables: frozenset[TableName] | None, collections: Collections) -> frozenset[str] | None:
    if tables is None:
        return None
    found = (collections.of_table(table) for table in tables)
    return frozenset(collection.name for collection in found if collection is not None)
