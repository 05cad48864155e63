"""Turns the row changes of a transaction into events: creates, updates and deletes.

``slices`` makes events of the changelog's transactions; evaluation and delivery work on them.
"""

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

    @property
    def missing_columns(self) -> frozenset[str]:
        """Columns that the row lacks: left out of the WAL, or no longer in the table."""
        # By name: the table may have been altered since the catalogue was read.
        return self.collection.column_names.difference(self.row)

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


class TruncatedCollection(Struct, frozen=True):
    """A truncated table. The WAL doesn't say which rows it held, so it is a gap."""

    collection: Collection
    cursor: Cursor


def transaction_events(
    transaction: Transaction, collections: Collections, skipped_changes: int = 0
) -> Iterator[Event | TruncatedCollection]:
    """Yield the events of a transaction in order, without those of the first changes.

    Changes of tables without a collection make no events.
    """
    changes = transaction.changes
    for ordinal in range(skipped_changes + 1, len(changes) + 1):  # a slice of changes may be large
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
                    # Ids don't change in PocketBase: to a client these are two records.
                    yield _row_event(collection, "delete", old.row, cursor, transaction)
                    yield _row_event(collection, "create", row, cursor, transaction)
                else:
                    yield _row_event(collection, "update", row, cursor, transaction)
            case Delete(old=old):
                yield _row_event(collection, "delete", old.row, cursor, transaction)
            case Truncate():
                yield TruncatedCollection(collection, cursor)


def _row_event(
    collection: Collection, action: Action, row: Row, cursor: Cursor, transaction: Transaction
) -> Event:
    record_id = row.get(collection.key.name) or ""
    return Event(collection, action, record_id, row, cursor, transaction.xid, transaction.changes)
