"""Lists the newest changes, as the changelog holds them anyway: nothing is recorded for it."""

from collections.abc import Iterator

from pgrealtime.changelog.memory import Changelog, Entry, Gap, Watermark
from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    OversizedTransaction,
    Transaction,
    Truncate,
    Update,
)
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.errors import LookError
from pgrealtime.fairness import YieldTimer
from pgrealtime.inspector.answers import ChangeRow, Changes
from pgrealtime.inspector.shown import cut
from pgrealtime.lsn import LSN, format_lsn

_ENTRIES_AT_ONCE = 200
_MAX_SCANNED_CHANGES = 50_000
"""In which a search looks at once; the next one goes on from there."""
_CHECKED_EVERY = 64


async def list_changes(
    changelog: Changelog, collections: Collections, *, search: str, before: LSN | None, limit: int
) -> Changes:
    """Return the newest changes that the search finds, yielding to the loop.

    The search is a part of ``collection/record`` or of the table's name.
    """
    timer = YieldTimer()
    rows: list[ChangeRow] = []
    wanted, scanned, last = search.casefold(), 0, before
    while entries := changelog.read_back(last, _ENTRIES_AT_ONCE):
        for entry in entries:
            last = entry.end_lsn
            for row in _rows(entry, collections):
                scanned += 1
                if not wanted or wanted in f"{row.collection}/{row.record} {row.table}".casefold():
                    rows.append(row)
                if len(rows) >= limit:
                    break
                if scanned % _CHECKED_EVERY == 0 and timer.is_due():
                    await timer.pause()
            if len(rows) >= limit or scanned >= _MAX_SCANNED_CHANGES:
                return Changes(rows=rows, is_complete=False, next_before=format_lsn(last))
        await timer.pause()
    return Changes(rows=rows, is_complete=True)


def find_transaction(changelog: Changelog, lsn: LSN) -> Transaction:
    """Return the transaction that ends at an LSN.

    Raises:
        LookError: The changelog doesn't hold it any more.
    """
    for entry in changelog.read_back(LSN(lsn + 1), 1):
        if entry.end_lsn == lsn and isinstance(entry, Transaction):
            return entry
    raise LookError(
        "the change is not held any more",
        detail="The changelog has passed it.",
        hint="Look at the list again; changelog.max_age and max_size say how much is held.",
    )


def change_row(transaction: Transaction, ordinal: int, collections: Collections) -> ChangeRow:
    """Return the row of a change.

    Raises:
        LookError: The transaction has no such change.
    """
    if not 0 < ordinal <= len(transaction.changes):
        raise LookError("the transaction has no such change")
    return _change_row(transaction, ordinal, collections)


def _rows(entry: Entry, collections: Collections) -> Iterator[ChangeRow]:
    match entry:
        case Transaction():
            for ordinal in range(len(entry.changes), 0, -1):
                yield _change_row(entry, ordinal, collections)
        case OversizedTransaction():
            at = entry.commit_time_us / 1e6 or None
            tables = cut(", ".join(sorted(map(str, entry.tables))))
            yield _gap_row(entry.end_lsn, at, tables, "too_large")
        case Gap():
            tables = cut(", ".join(sorted(map(str, entry.tables or ()))))
            yield _gap_row(entry.end_lsn, None, tables, entry.reason)
        case Watermark():
            return


def _gap_row(lsn: LSN, at: float | None, tables: str, reason: str) -> ChangeRow:
    return ChangeRow(
        lsn=format_lsn(lsn),
        ordinal=0,
        at=at,
        kind="gap",
        table=tables,
        collection="",
        record="",
        reason=reason,
    )


def _change_row(transaction: Transaction, ordinal: int, collections: Collections) -> ChangeRow:
    change = transaction.changes[ordinal - 1]
    collection = collections.find_by_table(change.table)
    kind, record = _kind_and_record(change, collection)
    return ChangeRow(
        lsn=format_lsn(transaction.end_lsn),
        ordinal=ordinal,
        at=transaction.commit_time_us / 1e6 or None,
        kind=kind,
        table=str(change.table),
        collection="" if collection is None else collection.name,
        record=cut(record),
    )


def _kind_and_record(change: Change, collection: Collection | None) -> tuple[str, str]:
    match change:
        case Insert(new=row):
            kind = "create"
        case Update(new=row):
            kind = "update"
        case Delete(old=old):
            kind, row = "delete", old.row
        case Truncate():
            return "truncate", ""
    if collection is None:
        return kind, ""
    return kind, unpadded_id(collection, row.get(collection.key.name) or "")
