"""Which columns a row version may have different from the live row, by its own transaction."""

from __future__ import annotations

from dataclasses import replace

from pgrealtime.changes import Change, Insert, Key, Update
from pgrealtime.hub.evaluation.toast import LaterWrites
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from tests.unit.hub.harness import COLLECTIONS, POSTS

ALL = COLLECTIONS["posts"]


def written_after(*changes: Change, ordinal: int, is_title_generated: bool = False) -> set[str]:
    """Return the columns written after the change at ``ordinal``, of the post "a"."""
    columns = tuple(
        replace(one, is_generated=is_title_generated and one.name == "title")
        for one in ALL.table.columns
    )
    collection = replace(ALL, table=replace(ALL.table, columns=columns))
    event = Event(collection, "update", "a", {}, Cursor(LSN(8), ordinal), Xid(3), changes)
    return set(LaterWrites().columns_written_later(event))


def update(record_id: str, **more: str) -> Update:
    return Update(POSTS, {"id": record_id, **more}, Key({"id": record_id}))


def test_what_later_changes_of_the_row_leave_alone_is_as_it_was() -> None:
    """A new row image without a column means that the change left the column as it was."""
    assert written_after(update("a"), ordinal=1) == set()
    assert written_after(update("a"), update("a"), ordinal=1) == {"id"}
    assert written_after(update("a"), update("b", title="x"), ordinal=1) == set()
    assert written_after(update("a", title="x"), update("a"), ordinal=1) == {"id"}
    assert written_after(update("a", title="x"), update("a"), ordinal=2) == set()


def test_what_a_later_change_brings_is_not_known_of_before() -> None:
    """The live row has the value of the later change."""
    created = Insert(POSTS, {"id": "a", "title": "x"})
    assert written_after(update("a"), update("a", title="x"), ordinal=1) == {"id", "title"}
    assert written_after(update("a"), created, ordinal=1) == {"id", "title"}


def test_a_generated_column_may_change_with_any_other() -> None:
    """No row image has generated columns."""
    twice = update("a"), update("a")
    assert written_after(*twice, ordinal=1, is_title_generated=True) == {"id", "title"}
    assert written_after(*twice, ordinal=2, is_title_generated=True) == set()
