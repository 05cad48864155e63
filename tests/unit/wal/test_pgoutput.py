"""Messages as "Logical Replication Message Formats" documents them, and what they decode to."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from pgrealtime.changes import Delete, Insert, Key, RowShape, TableName, Update, WholeRow
from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import LSN, Xid
from pgrealtime.wal.message import Begin, Commit, RowChange, TruncateMessage
from pgrealtime.wal.pgoutput import PgoutputDecoder, start_replication_options
from tests.unit.wal.tables import table

T = TableName("public", "t")
OID = 1000
UNCHANGED = object()


def relation(
    name: str = "t", *columns: str, key: tuple[str, ...] = ("id",), oid: int = OID
) -> bytes:
    """Return a Relation message; columns are id, a, b if none are given."""
    names = columns or ("id", "a", "b")
    described = b"".join(
        struct.pack("!B", column in key) + column.encode() + b"\0" + struct.pack("!Ii", 25, -1)
        for column in names
    )
    head = struct.pack("!cI", b"R", oid) + b"public\0" + name.encode() + b"\0d"
    return head + struct.pack("!H", len(names)) + described


def row(*values: object) -> bytes:
    """Return TupleData."""
    return struct.pack("!H", len(values)) + b"".join(map(_value, values))


def _value(value: object) -> bytes:
    match value:
        case None:
            return b"n"
        case str(text):
            return b"t" + struct.pack("!I", len(text.encode())) + text.encode()
        case _:
            return b"u"


def change(kind: bytes, *parts: bytes, oid: int = OID) -> bytes:
    """Return a message about a row."""
    return kind + struct.pack("!I", oid) + b"".join(parts)


def decoder(*first: bytes) -> PgoutputDecoder:
    """Return a decoder that has read the messages, by default the description of the table."""
    made = PgoutputDecoder([table("t", "id a b", oid=OID)])
    for message in first or (relation(),):
        assert made.decode(message) is None
    return made


def decode_change(made: PgoutputDecoder, message: bytes) -> Insert | Update | Delete:
    """Return the change in a message about a table without partitions."""
    match made.decode(message):
        case RowChange(change=found, leaf=None):
            return found
        case other:
            pytest.fail(str(other))


def test_begin_has_the_transaction_id() -> None:
    """LSN and time are taken from the Commit message."""
    assert decoder().decode(struct.pack("!cQqI", b"B", 32, 0, 744)) == Begin(Xid(744))


def test_commit_has_its_end_and_time() -> None:
    """PostgreSQL's clock starts in 2000; the commit time is in microseconds since 1970."""
    message = struct.pack("!cBQQq", b"C", 0, 16, 32, 5)

    assert decoder().decode(message) == Commit(LSN(32), 946_684_800_000_005)


def test_insert_has_texts_and_nulls() -> None:
    """Values are PostgreSQL's text, decoded from UTF-8."""
    message = change(b"I", b"N", row("1", None, "é\0x"[:1]))

    assert decode_change(decoder(), message) == Insert(T, {"id": "1", "a": None, "b": "é"})


@pytest.mark.parametrize(
    ("old", "image"),
    [
        pytest.param((), Key({"id": "2"}), id="key not sent because unchanged"),
        pytest.param((b"K", row("1", None, None)), Key({"id": "1"}), id="key changed"),
        pytest.param(
            (b"O", row("1", None, "z")), WholeRow({"id": "1", "a": None, "b": "z"}), id="full"
        ),
    ],
)
def test_update_has_the_old_identity(old: tuple[bytes, ...], image: Key | WholeRow) -> None:
    """An unchanged key isn't sent; it is taken from the new row."""
    message = change(b"U", *old, b"N", row("2", "x", "y"))

    assert decode_change(decoder(), message) == Update(T, {"id": "2", "a": "x", "b": "y"}, image)


@pytest.mark.parametrize(
    ("old", "image"),
    [
        ((b"K", row("1", None, None)), Key({"id": "1"})),
        ((b"O", row("1", None, "z")), WholeRow({"id": "1", "a": None, "b": "z"})),
    ],
)
def test_delete_has_the_old_identity(old: tuple[bytes, ...], image: Key | WholeRow) -> None:
    """The key, or the whole row with REPLICA IDENTITY FULL."""
    assert decode_change(decoder(), change(b"D", *old)) == Delete(T, image)


def test_unchanged_toast_is_absent_and_not_null() -> None:
    """The message marks the value as unchanged."""
    message = change(b"U", b"N", row("1", UNCHANGED, None))

    assert decode_change(decoder(), message) == Update(T, {"id": "1", "b": None}, Key({"id": "1"}))


def test_unchanged_toast_is_filled_from_a_whole_old_row_in_its_place() -> None:
    """With REPLICA IDENTITY FULL the old row has the value."""
    message = change(b"U", b"O", row("1", "big", "old"), b"N", row("1", UNCHANGED, "new"))

    match decoder().decode(message):
        case RowChange(change=Update(new=new)):
            assert list(new.items()) == [("id", "1"), ("a", "big"), ("b", "new")]
        case other:
            pytest.fail(str(other))


def test_renamed_table_goes_on_under_the_name_we_know() -> None:
    """The publication follows a renamed table, as do rules until the catalogue is read again."""
    made = decoder(relation(), relation("renamed"))

    message = change(b"I", b"N", row("1", None, None))
    assert decode_change(made, message) == Insert(T, {"id": "1", "a": None, "b": None})


def test_altered_table_is_read_as_it_was_described_last() -> None:
    """After ALTER TABLE the stream describes the table again."""
    made = decoder(relation(), relation("t", "id", "new"))

    new = decode_change(made, change(b"I", b"N", row("1", "2")))
    assert new == Insert(T, {"id": "1", "new": "2"})


def test_leaf_goes_by_its_root_in_the_roots_column_order() -> None:
    """A partition may have the columns of its root in another order."""
    parts = table("parts", "id a b", leaves=("parts_1",))
    made = PgoutputDecoder([parts])
    made.decode(relation("parts_1", "b", "a", "id", oid=7))

    match made.decode(change(b"D", b"O", row("3", "2", "1"), oid=7)):
        case RowChange(change=Delete(table=name, old=WholeRow(old)), leaf=leaf):
            assert (name, leaf) == (parts.name, parts.leaves[0])
            assert list(old.items()) == [("id", "1"), ("a", "2"), ("b", "3")]
        case other:
            pytest.fail(str(other))


def test_truncate_names_the_tables_that_are_ours() -> None:
    """Other tables of the publication are left out."""
    made = decoder(relation(), relation("other", oid=8))

    assert made.decode(struct.pack("!cIBII", b"T", 2, 0, OID, 8)) == TruncateMessage((T,))
    assert made.decode(struct.pack("!cIBI", b"T", 1, 0, 8)) is None


@pytest.mark.parametrize("message", [b"Yxxxx", b"Oxxxx", b"Mxxxx"])
def test_types_origins_and_logical_messages_are_nothing(message: bytes) -> None:
    """They change no row."""
    assert decoder().decode(message) is None


@pytest.mark.parametrize("kind", [b"I", b"U", b"D"])
def test_changes_of_other_tables_are_nothing(kind: bytes) -> None:
    """A publication may have more tables than the configuration."""
    made = decoder(relation(), relation("other", oid=8))

    assert made.decode(change(kind, b"N", row("1", "2", "3"), oid=8)) is None


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"?", id="unknown kind"),
        pytest.param(b"B\0", id="cut short"),
        pytest.param(change(b"I", b"N", row("secret")), id="too few columns"),
        pytest.param(change(b"I", b"N", b"\0\3b"), id="binary value"),
        pytest.param(change(b"I", b"N", b"\0\3t\0\0\0\1\xff"), id="not UTF-8"),
        pytest.param(change(b"D", b"X", row("secret", None, None)), id="unknown old image"),
    ],
)
def test_unreadable_message_is_refused_without_being_quoted(message: bytes) -> None:
    """An error's text may be logged; a row must not be."""
    with pytest.raises(UnexpectedMessageError) as caught:
        decoder().decode(message)

    assert "secret" not in str(caught.value)


def test_publication_is_named_as_an_identifier_in_the_option() -> None:
    """The server parses the option as a list of quoted identifiers."""
    assert start_replication_options('My "pub"') == {
        "proto_version": "1",
        "publication_names": '"My ""pub"""',
    }


@pytest.mark.parametrize("columns", [3, 8, 40])
@pytest.mark.parametrize("is_full", [False, True])
def test_changes_are_counted_with_the_memory_that_they_take(columns: int, *, is_full: bool) -> None:
    """The changelog is bounded by it; the payload may be a sixth of that."""
    names = ("id", *(f"c{n}" for n in range(1, columns)))
    made = PgoutputDecoder([table("t", " ".join(names), oid=OID)])
    made.decode(relation("t", *names))
    messages = [
        change(
            b"U",
            *((b"O", row(*(f"{k} was {n}" for k in range(columns)))) if is_full else ()),
            *(b"N", row(*(f"{k} is now {n}" for k in range(columns)))),
        )
        for n in range(500)
    ]
    tracemalloc.start()
    try:
        kept = [made.decode(message) for message in messages]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    overheads = [one.overhead_bytes for one in kept if isinstance(one, RowChange)]
    assert 0.7 < (sum(map(len, messages)) + sum(overheads)) / taken < 1.4


def test_a_row_has_the_shape_that_its_table_was_described_with_last() -> None:
    """Only the partition that is described again may have been detached meanwhile."""
    message = change(b"I", b"N", row("1", "x"), oid=OID + 1)
    made = PgoutputDecoder([table("t", "id a", oid=OID, leaves=("t_1",))])

    def shape() -> RowShape | None:
        made.decode(relation("t_1", "id", "a", oid=OID + 1))
        (first, second) = (made.decode(message), made.decode(message))
        assert isinstance(first, RowChange)
        assert isinstance(second, RowChange)
        assert first.shape is second.shape
        return first.shape

    types, leaf = (("id", 25), ("a", 25)), TableName("public", "t_1")
    assert shape() == RowShape(T, leaf, types)
    assert shape() == RowShape(T, leaf, types, description_count=1)
    made.decode(relation("t", "id", "a"))
    made.decode(relation("t", "id", "b"))
    deleted = made.decode(change(b"D", b"K", row("1", None)))
    assert isinstance(deleted, RowChange)
    assert deleted.shape == RowShape(T, None, (("id", 25), ("b", 25)))
