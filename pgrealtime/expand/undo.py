"""Computes related ids and rows as they were before changes, from the changes' row images.

``batch`` reads the present ids and rows and undoes here what was changed since the state that it
wants: a transaction's changes as ``Overlay``, or later changes of links one by one. Pure.
"""

from collections.abc import Iterable, Sequence

from pgrealtime.catalog.model import Table
from pgrealtime.changes import Change, Delete, Insert, Row, Update
from pgrealtime.collections.model import Collection, unpadded_id
from pgrealtime.expand.relation_sql import RelationQuery
from pgrealtime.rules.sql.row_images import Overlay


def ids_before_overlay(
    query: RelationQuery, overlay: Overlay, source_id: str, target_ids: Iterable[str]
) -> set[str] | None:
    """Return the ids that a record led to before an overlay's changes of the table.

    None if they aren't known, because an old image lacks a column.
    """
    if not overlay.has_columns((query.match_column.name, query.result_column.name)):
        return None
    ids = set(target_ids)
    for row in overlay.changed_rows:
        # A record has one row, wherever it points now; a junction table has one per pair.
        if query.is_collection_table or source_id in query.source_ids(row):
            ids.discard(row.get(query.result_column.name) or "")
    for row in overlay.old_images:
        target = row.get(query.result_column.name)
        if target and source_id in query.source_ids(row):
            ids.add(target)
    return ids


def ids_before_changes(
    query: RelationQuery, changes: Sequence[Change], source_id: str, target_ids: Iterable[str]
) -> set[str] | None:
    """Return the ids that a record led to before some changes of a junction table's rows.

    ``target_ids`` are those after the changes; no pair comes twice in the table. None if they
    aren't known, because a row image lacks a column.
    """
    ids = set(target_ids)
    match, result = query.match_column.name, query.result_column.name
    for change in reversed(changes):
        after, before = _images_after_and_before(change)
        if any(not (match in row and result in row) for row in (*after, *before)):
            return None
        ids -= {row[result] or "" for row in after if source_id in query.source_ids(row)}
        ids |= {row[result] or "" for row in before if source_id in query.source_ids(row)} - {""}
    return ids


def _images_after_and_before(change: Change) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the row images after and before a change, none or one of each."""
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
    """Return the rows that an overlay changed, by id, as they were before; None if not yet there.

    An image may have the key alone: see ``is_whole_row``.
    """
    key = collection.key.name
    rows: dict[str, Row | None] = {}
    for row in overlay.changed_rows:
        rows[unpadded_id(collection, row.get(key) or "")] = None
    for row in filter(None, overlay.old_images):
        rows[unpadded_id(collection, row.get(key) or "")] = row
    return rows


def is_whole_row(table: Table, row: Row) -> bool:
    """Whether an image is a row of the table, and not its key alone.

    Generated columns don't count: pgoutput leaves them out of every image.
    """
    return all(column.name in row or column.is_generated for column in table.columns)
