"""Changes tell apart what a subscriber must never see mixed up."""

from __future__ import annotations

import pytest

from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Key,
    Row,
    TableName,
    Transaction,
    Truncate,
    Update,
    WholeRow,
)
from pgrealtime.lsn import LSN, Xid

POSTS = TableName("public", "posts")
ROW: Row = {"id": "1", "title": None}


def test_a_table_name_prints_its_schema() -> None:
    assert str(POSTS) == "public.posts"


def test_the_same_name_in_another_schema_is_another_table() -> None:
    assert TableName("private", POSTS.name) != POSTS


def test_a_key_is_not_the_whole_row_even_if_it_holds_as_much() -> None:
    """A rule evaluated on a key alone would take unknown columns for known ones."""
    assert Delete(POSTS, Key(ROW)) != Delete(POSTS, WholeRow(ROW))


def test_absent_and_null_are_different_rows() -> None:
    assert Insert(POSTS, {"id": "1"}) != Insert(POSTS, ROW)


def test_equal_changes_are_equal_values() -> None:
    """Tests compare whole transactions."""
    changes: list[tuple[Change, ...]] = [
        (Insert(POSTS, dict(ROW)), Update(POSTS, dict(ROW), Key({"id": "1"})), Truncate(POSTS))
        for _ in range(2)
    ]
    one, other = (
        Transaction(xid=Xid(7), end_lsn=LSN(32), commit_time_us=0, changes=c, size_bytes=10)
        for c in changes
    )
    assert one == other


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Insert(POSTS, ROW), "new"),
        (Update(POSTS, ROW, Key(ROW)), "old"),
        (Delete(POSTS, Key(ROW)), "table"),
        (Truncate(POSTS), "table"),
        (Key(ROW), "row"),
    ],
)
def test_a_change_stays_what_it_is(value: Change | Key, name: str) -> None:
    """The changelog hands the same object to every connection."""
    with pytest.raises(AttributeError, match="immutable"):
        setattr(value, name, None)
