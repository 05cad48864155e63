"""Related ids and rows as they were before changes, from the changes' row images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pgrealtime.catalog.model import Table
from pgrealtime.changes import Change, Delete, Insert, Row, Update
from pgrealtime.collections.model import Collection, unpadded_id
from pgrealtime.expand.relation_sql import RelationQuery
from pgrealtime.rules.sql.row_images import Overlay


def ids_before_overlay(
    query: RelationQuery, overlay: Overlay, source_id: str, target_ids: Iterable[str]
) -> set[str] | None:
    """Return the ids that a record led to before the changes of an overlay of the table.

    Returns:
        None if that isn't known, as an old image doesn't say whose link it was.
    """
    if not overlay.has_columns((query.match_column.name, query.result_column.name)):
        return None
    found = set(target_ids)
    for row in overlay.changed_rows:
        # A record has one row, wherever it points now; a junction table has one per pair.
        if query.is_collection_table or source_id in query.source_ids(row):
            found.discard(row.get(query.result_column.name) or "")
    for row in overlay.old_images:
        target = row.get(query.result_column.name)
        if target and source_id in query.source_ids(row):
            found.add(target)
    return found


def ids_before_changes(
    query: RelationQuery, changes: Sequence[Change], source_id: str, target_ids: Iterable[str]
) -> set[str] | None:
    """Return the ids that a record led to by a junction table before some changes of its rows.

    Args:
        query: By a junction table, in which no pair comes twice.
        changes: In order.
        source_id: The record's id.
        target_ids: Where it leads after them.

    Returns:
        None if that isn't known.
    """
    found = set(target_ids)
    match, result = query.match_column.name, query.result_column.name
    for change in reversed(changes):
        came, went = _images_after_and_before(change)
        if any(not (match in row and result in row) for row in (*came, *went)):
            return None
        found.difference_update(
            row[result] or "" for row in came if source_id in query.source_ids(row)
        )
        found.update(
            row[result] or "" for row in went if row[result] and source_id in query.source_ids(row)
        )
    return found


def _images_after_and_before(change: Change) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the row that is there after a change and the one before it, if any."""
    match change:
        case Insert(new=new):
            return (new,), ()
        case Update(new=new, old=old):
            return (new,), (old.row,)
        case Delete(old=old):
            return (), (old.row,)
        case _:
            return ({},), ()


def rows_before_overlay(collection: Collection, overlay: Overlay) -> dict[str, Row | None]:
    """Return the rows that changes touched, by id, as they were before; None if they weren't.

    Of some only the key may be known (``is_known``).
    """
    key = collection.key.name
    found: dict[str, Row | None] = {}
    for row in overlay.changed_rows:
        found[unpadded_id(collection, row.get(key) or "")] = None
    for row in filter(None, overlay.old_images):
        found[unpadded_id(collection, row.get(key) or "")] = row
    return found


def is_whole_row(table: Table, row: Row) -> bool:
    """Whether an image is a row of the table, and not its key alone.

    A generated column, which pgoutput leaves out of every image, is not missed.
    """
    return all(one.name in row or one.is_generated for one in table.columns)
