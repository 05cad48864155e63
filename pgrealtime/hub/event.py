"""What a transaction means to subscribers: changes become PocketBase's create, update, delete."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from msgspec import Struct

from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Row,
    TableName,
    Transaction,
    Truncate,
    Update,
)
from pgrealtime.collections import Collection, Collections
from pgrealtime.lsn import Cursor, Xid

Action: TypeAlias = Literal["create", "update", "delete"]


class Event(Struct, gc=False):
    """One record's change, not yet judged.

    Attributes:
        row: The image it is judged on and shown with: new for create and update, old for delete.
        cursor: Of the change that it belongs to; a changed key makes two events of one change.
        changes: All of its transaction: a delete is judged by what was there before them.
    """

    collection: Collection
    action: Action
    record_id: str
    row: Row
    cursor: Cursor
    xid: Xid
    changes: tuple[Change, ...] = ()

    @property
    def missing(self) -> frozenset[str]:
        """Columns that the image lacks: left out of the WAL, or not the table's any more.

        By name: a table that was altered since the catalogue was read has others instead.
        """
        return self.collection.column_names.difference(self.row)

    @property
    def hides_email(self) -> bool:
        """Whether not everybody is shown the record's e-mail address; of auth collections."""
        visibility = self.collection.by_name.get("emailVisibility")
        column = visibility.column if visibility is not None else None
        return column is None or self.row.get(column.name) != "t"


class Emptied(Struct, frozen=True):
    """A collection whose table was truncated: no rows are told, so it is a gap."""

    collection: Collection
    cursor: Cursor


def events_of(
    transaction: Transaction, collections: Collections, after: int = 0
) -> Iterator[Event | Emptied]:
    """Yield what the transaction did to collections, in order.

    Args:
        transaction: The whole.
        collections: What it is told of.
        after: Changes that are left out at the beginning.
    """
    for ordinal, change in enumerate(transaction.changes[after:], start=after + 1):
        collection = collections.of_table(change.table)
        if collection is None:
            continue
        cursor = Cursor(transaction.end_lsn, ordinal)
        key = collection.key.name
        match change:
            case Insert(new=row):
                yield _event(collection, "create", row, cursor, transaction)
            case Update(new=row, old=old):
                before = old.row.get(key)
                if before is not None and before != row.get(key):
                    # PocketBase has no changed ids: to a client the one went, the other came.
                    yield _event(collection, "delete", old.row, cursor, transaction)
                    yield _event(collection, "create", row, cursor, transaction)
                else:
                    yield _event(collection, "update", row, cursor, transaction)
            case Delete(old=old):
                yield _event(collection, "delete", old.row, cursor, transaction)
            case Truncate():
                yield Emptied(collection, cursor)


def _event(
    collection: Collection, action: Action, row: Row, cursor: Cursor, of: Transaction
) -> Event:
    record_id = row.get(collection.key.name) or ""
    return Event(collection, action, record_id, row, cursor, of.xid, of.changes)


_NONE: frozenset[str] = frozenset()


def written_again(events: Sequence[Event]) -> list[frozenset[str]]:
    """Return, per event, the columns that its transaction writes in the same row afterwards.

    A generated column is in no image, and so counts as written by whatever writes the row.
    """
    found = [_NONE] * len(events)
    by_transaction: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for place, event in enumerate(events):
        by_transaction[id(event.changes)][event.cursor.ordinal] = place
    for places in by_transaction.values():
        some = [events[place] for place in places.values()]
        collections = {event.collection.table.name: event.collection for event in some}
        for ordinal, names in _written_after(some[0].changes, min(places), collections):
            if ordinal in places:
                found[places[ordinal]] = names
    return found


def _written_after(
    changes: Sequence[Change], first: int, collections: Mapping[TableName, Collection]
) -> Iterator[tuple[int, frozenset[str]]]:
    """Yield, from the last change back to the first one wanted, what comes after it in its row."""
    generated = {
        table: [column.name for column in collection.table.columns if column.is_generated]
        for table, collection in collections.items()
    }
    written: dict[tuple[TableName, str | None], frozenset[str]] = {}
    for ordinal in range(len(changes), first - 1, -1):
        match changes[ordinal - 1]:
            case Insert(table=table, new=new) | Update(table=table, new=new) if table in generated:
                row = table, new.get(collections[table].key.name)
                names = written.get(row, _NONE)
                yield ordinal, names
                written[row] = names.union(new, generated[table])
            case _:
                continue
