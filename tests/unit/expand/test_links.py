"""SQL that reverts what a transaction did after a record's delete, and orders ids."""

from __future__ import annotations

import pytest

from pgrealtime.catalog.model import Column, Table, TableKind
from pgrealtime.changes import Change, Delete, Insert, Key, Row, TableName, Truncate, Update
from pgrealtime.collections.model import Collection
from pgrealtime.expand.batch import id_sort_key
from pgrealtime.expand.relation_sql import RelationQuery
from pgrealtime.expand.undo import ids_before_changes, ids_before_overlay, rows_before_overlay
from pgrealtime.rules.sql.row_images import Overlay
from tests.column_types import TEXTS, text_columns

COLUMNS = (*text_columns("id", "post"), Column(name="posts", attribute_number=3, type=TEXTS))
TABLE = Table(
    oid=1,
    name=TableName("public", "notes"),
    kind=TableKind.TABLE,
    columns=COLUMNS,
    primary_key=("id",),
)
NOTES = Collection(name="notes", id="n", type="base", table=TABLE, key=COLUMNS[0], fields=())


def overlay(before: list[Row], touched: list[Row]) -> Overlay:
    return Overlay(table=TABLE, old_images=before, changed_rows=touched)


def linking(match: Column, *, is_of_record: bool = True) -> RelationQuery:
    return RelationQuery(
        table=TABLE,
        match_column=match,
        result_column=COLUMNS[0],
        source=NOTES,
        is_collection_table=is_of_record,
        limit=10,
    )


@pytest.mark.parametrize(
    ("before", "touched", "ids", "expected"),
    [
        ([], [], {"a"}, {"a"}),
        # deleted since
        ([{"id": "b", "post": "1"}], [{"id": "b", "post": "1"}], {"a"}, {"a", "b"}),
        # inserted since
        ([], [{"id": "a", "post": "1"}], {"a"}, set()),
        # referenced another record before, and this one now
        ([{"id": "a", "post": "2"}], [{"id": "a", "post": "2"}], {"a"}, set()),
        # of another record
        ([{"id": "b", "post": "2"}], [{"id": "b", "post": "2"}], {"a"}, {"a"}),
    ],
    ids=["untouched", "deleted", "inserted", "moved", "another"],
)
def test_links_are_as_they_were(
    before: list[Row], touched: list[Row], ids: set[str], expected: set[str]
) -> None:
    assert ids_before_overlay(linking(COLUMNS[1]), overlay(before, touched), "1", ids) == expected


def test_an_array_leads_to_each_of_its_ids() -> None:
    row: Row = {"id": "b", "posts": "{1,2}"}
    found = [
        ids_before_overlay(linking(COLUMNS[2]), overlay([row], [row]), source, set())
        for source in "123"
    ]

    assert found == [{"b"}, {"b"}, set()]


def test_a_pair_that_was_touched_leaves_the_other_pairs_alone() -> None:
    """A junction table has many rows for one target; a collection has one per record."""
    elsewhere: Row = {"id": "a", "post": "2"}

    pairs = ids_before_overlay(
        linking(COLUMNS[1], is_of_record=False), overlay([], [elsewhere]), "1", {"a"}
    )

    assert pairs == {"a"}


def test_rows_are_as_they_were() -> None:
    old: Row = {"id": "a", "post": "1"}
    new: Row = {"id": "b", "post": "1"}

    assert rows_before_overlay(NOTES, overlay([old], [old, new])) == {"a": old, "b": None}


def test_numbers_come_in_their_order_and_before_texts() -> None:
    ids = ["b", "10", "9", "a", "-1", "007"]

    assert sorted(ids, key=id_sort_key) == ["007", "9", "10", "-1", "a", "b"]


def test_an_id_of_thousands_of_digits_is_an_id_like_others() -> None:
    """Whoever may write a relation without a foreign key would break the lists of all others."""
    long = "9" * 5000
    assert sorted(["a", long, "10"], key=id_sort_key) == ["10", long, "a"]


def link(post: str, to: str) -> Row:
    return {"post": post, "id": to}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], {"a", "b"}),
        ([Insert(TABLE.name, link("1", "a"))], {"b"}),
        ([Delete(TABLE.name, Key(link("1", "c")))], {"a", "b", "c"}),
        ([Insert(TABLE.name, link("2", "a"))], {"a", "b"}),
        ([Update(TABLE.name, link("1", "a"), Key(link("1", "c")))], {"b", "c"}),
        ([Update(TABLE.name, link("2", "c"), Key(link("1", "c")))], {"a", "b", "c"}),
        # deleted and inserted, inserted and deleted
        ([Delete(TABLE.name, Key(link("1", "a"))), Insert(TABLE.name, link("1", "a"))], {"a", "b"}),
        ([Insert(TABLE.name, link("1", "c")), Delete(TABLE.name, Key(link("1", "c")))], {"a", "b"}),
        # what it referenced is unknown
        ([Delete(TABLE.name, Key({"post": "1"}))], None),
        ([Truncate(TABLE.name)], None),
    ],
)
def test_links_that_came_later_are_taken_back(
    changes: list[Change], expected: set[str] | None
) -> None:
    """Whatever later changes did to them, in the order of the changes."""
    by_junction = linking(COLUMNS[1], is_of_record=False)
    assert ids_before_changes(by_junction, changes, "1", {"a", "b"}) == expected
