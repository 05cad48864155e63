"""Changes tell apart what a subscriber must never see mixed up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    digest_id,
    join_id,
    split_id,
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


@given(st.lists(st.text("ab!~/?01%é "), min_size=1, max_size=3), st.text("ab!~/?0123"))
def test_an_id_of_several_values_is_that_of_no_others(values: list[str], text: str) -> None:
    """Nor does it hold what ends a topic or a path."""
    joined = join_id(values)

    assert split_id(joined) == values
    assert not {"/", "?"} & {*joined}
    assert (found := split_id(text)) is None or join_id(found) == text


def test_a_digest_tells_rows_apart_and_knows_no_nulls() -> None:
    """Columns added later, NULL in all rows so far, change no id."""
    row: Row = {"a": "1", "b": "2=1:3", "c": None}
    others: list[Row] = [{"a": "1"}, {"a": None, "b": "1"}, {"a": "12", "b": "=1:3"}]

    assert digest_id(row, ["a", "b"]) == digest_id(row, ["a", "b", "c"])
    assert len({digest_id(one, sorted(one)) for one in (row, *others)}) == 4
    assert digest_id(row, ["a", "d"]) is None
