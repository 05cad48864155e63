"""What a transaction means to subscribers: changes become PocketBase's create, update, delete."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from pgrealtime.auth.principal import AccountKey
from pgrealtime.changes import (
    Action,
    Change,
    Delete,
    Insert,
    Row,
    Transaction,
    Truncate,
    Update,
)
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.lsn import Cursor, Xid


class Event(Struct, gc=False):
    """One record's change, not yet judged.

    Attributes:
        row: The image it is judged on and shown with: new for create and update, old for delete.
        cursor: Of the change that it belongs to; a changed key makes two events of one change.
        transaction_changes: All of its transaction: a delete is judged by what was there before
            them.
    """

    collection: Collection
    action: Action
    record_id: str
    row: Row
    cursor: Cursor
    xid: Xid
    transaction_changes: tuple[Change, ...] = ()

    @property
    def missing_columns(self) -> frozenset[str]:
        """Columns that the image lacks: left out of the WAL, or not the table's any more.

        By name: a table that was altered since the catalogue was read has others instead.
        """
        return self.collection.column_names.difference(self.row)

    @property
    def hides_email(self) -> bool:
        """Whether not everybody is shown the record's e-mail address; of auth collections."""
        visibility = self.collection.fields_by_name.get("emailVisibility")
        column = visibility.column if visibility is not None else None
        return column is None or self.row.get(column.name) != "t"


def account_of_event(event: Event) -> AccountKey:
    """Return the account whose row an event of an auth collection is about."""
    return event.collection.name, unpadded_id(event.collection, event.record_id)


class Truncation(Struct, frozen=True):
    """A collection whose table was truncated: no rows are told, so it is a gap."""

    collection: Collection
    cursor: Cursor


def transaction_events(
    transaction: Transaction, collections: Collections, skipped_changes: int = 0
) -> Iterator[Event | Truncation]:
    """Yield what the transaction did to collections, in order.

    Args:
        transaction: The whole.
        collections: What it is told of.
        skipped_changes: Changes that are left out at the beginning.
    """
    changes = transaction.changes
    for ordinal in range(skipped_changes + 1, len(changes) + 1):  # a copy of the rest may be long
        change = changes[ordinal - 1]
        collection = collections.find_by_table(change.table)
        if collection is None:
            continue
        cursor = Cursor(transaction.end_lsn, ordinal)
        key = collection.key.name
        match change:
            case Insert(new=row):
                yield _row_event(collection, "create", row, cursor, transaction)
            case Update(new=row, old=old):
                before = old.row.get(key)
                if before is not None and before != row.get(key):
                    # PocketBase has no changed ids: to a client the one went, the other came.
                    yield _row_event(collection, "delete", old.row, cursor, transaction)
                    yield _row_event(collection, "create", row, cursor, transaction)
                else:
                    yield _row_event(collection, "update", row, cursor, transaction)
            case Delete(old=old):
                yield _row_event(collection, "delete", old.row, cursor, transaction)
            case Truncate():
                yield Truncation(collection, cursor)


def _row_event(
    collection: Collection, action: Action, row: Row, cursor: Cursor, transaction: Transaction
) -> Event:
    record_id = row.get(collection.key.name) or ""
    return Event(collection, action, record_id, row, cursor, transaction.xid, transaction.changes)
