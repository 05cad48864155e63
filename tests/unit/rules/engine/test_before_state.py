"""Related tables before a transaction. Integration tests compare them with a server's."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.changes import Change, Delete, Insert, Row, TableName, Truncate, Update, WholeRow
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.rules.engine.before_state import BeforeState, BeforeStates
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query
from tests.engine_driving import query_before
from tests.unit.rules.schema import COLLECTIONS, USERS, collection
from tests.unit.rules.schema import POSTS as POSTS_COLLECTION

POSTS, NOTES = TableName("public", "posts"), TableName("public", "notes")


class CountingChange:
    """Counts how often its table is read."""

    looks = 0

    @property
    def table(self) -> TableName:
        self.looks += 1
        return POSTS


def test_a_transaction_is_read_on_first_use_and_once() -> None:
    """Most deletes are decided by their row alone, and a transaction may have very many."""
    change = CountingChange()
    changes = (cast("Change", change),)
    states = BeforeStates({})
    for _ in range(3):
        assert states.state_before(changes).overlays([]) == ()
    assert change.looks == 0
    for _ in range(3):
        assert states.state_before(changes).overlays([NOTES]) == ()
    assert change.looks == 1


PEOPLE = USERS.table.name
EMPTY: Row = {column.name: None for column in USERS.table.columns}


def ann(record_id: str, name: str = "Ann") -> Row:
    return {**EMPTY, "id": record_id, "name": name}


def insert(row: Row) -> Insert:
    return Insert(PEOPLE, row)


def update(old: Row, new: Row) -> Update:
    return Update(PEOPLE, new, WholeRow(old))


def delete(row: Row) -> Delete:
    return Delete(PEOPLE, WholeRow(row))


@pytest.mark.parametrize(
    ("changes", "before", "touched"),
    [
        ([insert(ann("1"))], [], {"1"}),
        ([delete(ann("1"))], [ann("1")], {"1"}),
        ([update(ann("1", "a"), ann("1", "b"))], [ann("1", "a")], {"1"}),
        # A row whose key changed had the first key, and must not be found by the second.
        ([update(ann("1"), ann("2"))], [ann("1")], {"1", "2"}),
        ([update(ann("1"), ann("2")), update(ann("2"), ann("3"))], [ann("1")], {"1", "2", "3"}),
        ([update(ann("1"), ann("2")), insert(ann("1", "new"))], [ann("1")], {"1", "2"}),
        # For a row that is changed twice the first image counts.
        (
            [update(ann("1", "a"), ann("1", "b")), update(ann("1", "b"), ann("1", "c"))],
            [ann("1", "a")],
            {"1"},
        ),
        ([update(ann("1", "a"), ann("1", "b")), delete(ann("1", "b"))], [ann("1", "a")], {"1"}),
        # Rows that the transaction inserted did not exist before, whatever happened to them later.
        ([insert(ann("1")), delete(ann("1"))], [], {"1"}),
        ([insert(ann("1", "a")), update(ann("1", "a"), ann("1", "b"))], [], {"1"}),
        ([insert(ann("1")), update(ann("1"), ann("2")), delete(ann("2"))], [], {"1", "2"}),
        # A key that was freed belongs to another row from then on.
        ([delete(ann("1", "a")), insert(ann("1", "b"))], [ann("1", "a")], {"1"}),
        (
            [delete(ann("1", "a")), insert(ann("1", "b")), delete(ann("1", "b"))],
            [ann("1", "a")],
            {"1"},
        ),
        (
            [
                update(ann("1", "a"), ann("x", "a")),
                update(ann("2", "b"), ann("1", "b")),
                update(ann("x", "a"), ann("2", "a")),
            ],
            [ann("1", "a"), ann("2", "b")],
            {"1", "2", "x"},
        ),
        # It has no rows of other tables.
        ([Insert(POSTS, ann("1")), insert(ann("2"))], [], {"2"}),
    ],
)
def test_a_table_is_as_it_was_before_the_transaction(
    changes: list[Change], before: list[Row], touched: set[str]
) -> None:
    """The first image of each row that was there, and no row that wasn't."""
    (overlay,) = BeforeState(changes, reachable_tables(COLLECTIONS)).overlays([PEOPLE])

    assert overlay.table == USERS.table
    assert list(overlay.old_images) == before
    assert {row["id"] for row in overlay.changed_rows} == touched


def test_a_row_is_identified_by_its_whole_key() -> None:
    one = collection("pairs")
    table = replace(one.table, primary_key=("a", "b"))
    rows: list[Row] = [{"a": "1", "b": "1"}, {"a": "1", "b": "2"}, {"a": None, "b": "1"}]
    state = BeforeState([Delete(table.name, WholeRow(row)) for row in rows], {table.name: table})
    (overlay,) = state.overlays([table.name])
    assert list(overlay.old_images) == rows


def _question(changes: list[Change]) -> object:
    """Return the query about a deleted post whose rule reads its author's row."""
    request = RuleRequest(
        principal=AuthRecord(collection_id="x", collection_name="users", id="ann")
    )
    query = reference_query(COLLECTIONS, POSTS_COLLECTION, "author.name = 'Ann'", request)
    assert isinstance(query, ReferenceQuery)
    tables = frozenset().union(*(part.tables for part in query.sql_predicates))
    overlays = BeforeState(changes, reachable_tables(COLLECTIONS)).overlays(tables)
    row: Row = {"id": "p", "author": "1"}
    return query_before(query, [row], datetime.now(UTC), overlays)


def test_what_was_truncated_is_not_known_and_not_taken_for_empty() -> None:
    """Any row may have existed, so nothing can be decided by its absence."""
    assert _question([delete(ann("1"))]) is not None
    assert _question([Truncate(PEOPLE)]) is None
    assert _question([insert(ann("1")), Truncate(PEOPLE)]) is None
    assert _question([Truncate(PEOPLE), insert(ann("1"))]) is None
    assert _question([Truncate(POSTS)]) is not None


def test_an_old_row_without_the_columns_that_are_read_decides_nothing() -> None:
    assert _question([delete({"id": "1", "name": "Ann"})]) is not None
    assert _question([delete({"id": "1"})]) is None


def test_a_large_transaction_is_looked_through_once_for_all_of_its_batches() -> None:
    """Otherwise a DELETE of many rows would take time quadratic in their number."""
    change = CountingChange()
    changes = (cast("Change", change),)
    states = BeforeStates({})
    for _ in range(100):
        states.begin_batch()
        states.state_before(changes).overlays([NOTES])
        states.begin_batch()  # of another reader of the changelog, at another position
    assert change.looks == 1


def test_a_transaction_that_no_batch_needs_any_more_is_let_go_of() -> None:
    """The changelog may have trimmed it long ago."""
    change = CountingChange()
    changes = (cast("Change", change),)
    states = BeforeStates({})
    states.state_before(changes)
    held = sys.getrefcount(changes)
    for _ in range(20):
        states.begin_batch()
    assert sys.getrefcount(changes) == held - 1
