"""The assembler returns whole transactions, within a bound of memory."""

from __future__ import annotations

import pytest

from pgrealtime.changes import (
    Delete,
    Insert,
    Key,
    OversizedTransaction,
    Row,
    RowShape,
    TableName,
    Transaction,
    Truncate,
    Update,
)
from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN, Xid
from pgrealtime.wal.assembler import TransactionAssembler
from pgrealtime.wal.message import Begin, Commit, Message, RowChange, TruncateMessage

POSTS = TableName("public", "posts")
TAGS = TableName("public", "tags")
PARTS = TableName("public", "parts")
NORTH = TableName("public", "parts_north")
SOUTH = TableName("public", "parts_south")

BEGIN = Begin(Xid(7))
COMMIT = Commit(LSN(32), 1234)
INSERT = Insert(POSTS, {"id": "1"})


def assembler(max_size: int = 1000) -> TransactionAssembler:
    return TransactionAssembler(max_bytes=max_size, record_keys={PARTS: ("id",)})


def whole(*changes: Insert | Update | Delete | Truncate, size: int) -> Transaction:
    """Return the transaction that all tests assemble."""
    return Transaction(Xid(7), LSN(32), 1234, changes, size)


def feed(*messages: Message) -> Transaction | OversizedTransaction | None:
    """Feed a begin, the messages and a commit of one byte each; return the transaction."""
    target = assembler()
    assert [target.feed(message, 1) for message in (BEGIN, *messages)] == [None] * (
        len(messages) + 1
    )
    return target.feed(COMMIT, 1)


def test_transaction_is_returned_on_commit_and_not_before() -> None:
    """A subscriber never sees half a transaction."""
    target = assembler()

    assert target.feed(BEGIN, 3) is None
    assert target.is_in_transaction
    assert target.feed(RowChange(INSERT, None), 10) is None
    assert target.feed(COMMIT, 4) == whole(INSERT, size=17)
    assert not target.is_in_transaction


def test_transaction_without_changes_is_dropped() -> None:
    """wal2json reports every transaction of the database."""
    assert feed() is None


def test_nothing_of_one_transaction_is_in_the_next() -> None:
    """A commit clears the assembler."""
    target = assembler()
    for message in (BEGIN, RowChange(INSERT, None), COMMIT, BEGIN):
        target.feed(message, 1)

    assert target.feed(COMMIT, 1) is None


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param((COMMIT,), id="commit without begin"),
        pytest.param((RowChange(INSERT, None),), id="change without begin"),
        pytest.param((TruncateMessage((POSTS,)),), id="truncate without begin"),
        pytest.param((BEGIN, BEGIN), id="begin twice"),
        pytest.param((BEGIN, COMMIT, COMMIT), id="commit twice"),
    ],
)
def test_impossible_order_is_refused(messages: tuple[Message, ...]) -> None:
    """Such a stream can't be trusted."""
    target = assembler()

    for message in messages[:-1]:
        target.feed(message, 1)
    with pytest.raises(UnexpectedMessageError):
        target.feed(messages[-1], 1)


def test_transaction_beyond_the_bound_leaves_only_its_tables() -> None:
    """Its changes are released at once."""
    target = assembler(max_size=25)
    target.feed(BEGIN, 1)
    target.feed(RowChange(INSERT, None), 20)
    target.feed(TruncateMessage((TAGS,)), 20)
    assert target._changes == []
    target.feed(RowChange(Insert(PARTS, {"id": "1"}), NORTH), 20)

    assert target.feed(COMMIT, 1) == OversizedTransaction(
        Xid(7), LSN(32), 1234, frozenset({POSTS, TAGS, PARTS})
    )


def test_memory_of_a_change_in_addition_to_its_payload_counts_for_the_bound() -> None:
    """A row of short values takes many times its payload in memory."""
    target = assembler(max_size=1000)
    target.feed(BEGIN, 1)
    for _ in range(4):
        target.feed(RowChange(INSERT, None, overhead_bytes=200), 10)
    assert len(target._changes) == 4
    target.feed(RowChange(INSERT, None, overhead_bytes=200), 10)

    assert target.feed(COMMIT, 1) == OversizedTransaction(Xid(7), LSN(32), 1234, frozenset({POSTS}))


def test_a_transaction_s_size_is_what_its_changes_take() -> None:
    """The changelog is bounded by it."""
    target = assembler()
    target.feed(BEGIN, 1)
    target.feed(RowChange(INSERT, None, overhead_bytes=200), 10)
    assert target.feed(COMMIT, 1) == whole(INSERT, size=212)


def test_transaction_after_an_oversized_one_is_whole_again() -> None:
    """The bound is of each transaction."""
    target = assembler(max_size=25)
    for message in (BEGIN, RowChange(INSERT, None), RowChange(INSERT, None), COMMIT):
        target.feed(message, 20)
    target.feed(BEGIN, 1)
    target.feed(RowChange(INSERT, None), 1)

    assert target.feed(COMMIT, 1) == whole(INSERT, size=3)


def test_one_statement_truncates_a_partitioned_table_once() -> None:
    """wal2json has a line for each leaf, pgoutput one message for all."""
    assert feed(
        TruncateMessage((PARTS,)),
        TruncateMessage((PARTS,)),
        TruncateMessage((TAGS,)),
        TruncateMessage((PARTS,)),
    ) == whole(Truncate(PARTS), Truncate(TAGS), size=6)


def test_separate_truncates_are_separate_changes() -> None:
    """Two TRUNCATEs with another change between them are two changes."""
    assert feed(
        TruncateMessage((POSTS,)), RowChange(INSERT, None), TruncateMessage((POSTS, TAGS))
    ) == whole(Truncate(POSTS), INSERT, Truncate(POSTS), Truncate(TAGS), size=5)


def deleted(row: Row, leaf: TableName) -> RowChange:
    """Return the delete of a row in a leaf."""
    return RowChange(Delete(PARTS, Key(row)), leaf)


def inserted(row: Row, leaf: TableName) -> RowChange:
    """Return the insert of a row in a leaf."""
    return RowChange(Insert(PARTS, row), leaf)


OLD: Row = {"id": "1", "place": "n"}
NEW: Row = {"id": "1", "place": "s"}
MOVE = Update(PARTS, NEW, Key(OLD))


def test_move_between_partitions_is_an_update() -> None:
    """PostgreSQL logs it as a delete in one leaf and an insert in another."""
    assert feed(deleted(OLD, NORTH), inserted(NEW, SOUTH)) == whole(MOVE, size=4)


def test_moves_of_many_rows_are_distinguished() -> None:
    """Delete and insert are matched by the row's key."""
    other: Row = {"id": "2", "place": "n"}
    other_new: Row = {"id": "2", "place": "s"}

    assert feed(
        deleted(OLD, NORTH), deleted(other, NORTH), inserted(NEW, SOUTH), inserted(other_new, SOUTH)
    ) == whole(MOVE, Update(PARTS, other_new, Key(other)), size=6)


def test_what_a_trigger_writes_amid_a_move_stays() -> None:
    """The change between delete and insert comes after the update."""
    assert feed(deleted(OLD, NORTH), RowChange(INSERT, None), inserted(NEW, SOUTH)) == whole(
        MOVE, INSERT, size=5
    )


def test_row_may_move_there_and_back() -> None:
    """Two updates, in order."""
    assert feed(
        deleted(OLD, NORTH), inserted(NEW, SOUTH), deleted(NEW, SOUTH), inserted(OLD, NORTH)
    ) == whole(MOVE, Update(PARTS, OLD, Key(NEW)), size=6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(deleted(OLD, NORTH), inserted(OLD, NORTH), id="same leaf"),
        pytest.param(deleted(OLD, NORTH), inserted(NEW | {"id": "2"}, SOUTH), id="another record"),
        pytest.param(deleted({"place": "n"}, NORTH), inserted(NEW, SOUTH), id="key not logged"),
        pytest.param(deleted(OLD | {"id": None}, NORTH), inserted(NEW, SOUTH), id="key is null"),
        pytest.param(inserted(OLD, NORTH), deleted(OLD, NORTH), id="insert first"),
    ],
)
def test_delete_and_insert_that_are_no_move_stay_two(first: RowChange, second: RowChange) -> None:
    """Only another leaf of the same table, and the same key, make a move."""
    assert feed(first, second) == whole(first.change, second.change, size=4)


def test_row_that_left_one_partition_comes_to_another_in_a_later_transaction() -> None:
    """Changes of separate commits are never joined."""
    target = assembler()
    for message in (BEGIN, deleted(OLD, NORTH)):
        target.feed(message, 1)
    first = target.feed(COMMIT, 1)
    for message in (BEGIN, inserted(NEW, SOUTH)):
        target.feed(message, 1)

    assert first == whole(Delete(PARTS, Key(OLD)), size=3)
    assert target.feed(COMMIT, 1) == whole(Insert(PARTS, NEW), size=3)


def test_row_deleted_after_another_use_of_its_key_has_not_moved() -> None:
    """Only the next change of the key can complete a move."""
    inserted_again = inserted(OLD, NORTH)

    assert feed(deleted(OLD, NORTH), inserted_again, inserted(NEW, SOUTH)) == whole(
        Delete(PARTS, Key(OLD)), inserted_again.change, Insert(PARTS, NEW), size=5
    )


def test_a_transaction_has_each_shape_of_its_rows_once() -> None:
    """And none of an earlier transaction."""
    first, second = (RowShape(POSTS, None, (("id", oid),)) for oid in (23, 25))
    target = assembler()

    def shapes(*of_rows: RowShape) -> tuple[RowShape, ...]:
        target.feed(BEGIN, 1)
        for shape in of_rows:
            target.feed(RowChange(INSERT, None, 0, shape), 1)
        done = target.feed(COMMIT, 1)
        assert isinstance(done, Transaction)
        return done.row_shapes

    assert shapes(first, first, second, first) == (first, second)
    assert shapes(second) == (second,)
