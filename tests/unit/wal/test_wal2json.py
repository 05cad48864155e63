"""Lines as wal2json 2.6 on PostgreSQL 17 writes them, and the messages decoded from them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pgrealtime.catalog.model import ReplicaIdentity
from pgrealtime.changes import Delete, Insert, Key, OldImage, RowShape, TableName, Update, WholeRow
from pgrealtime.errors import UnexpectedMessageError
from pgrealtime.lsn import Xid, parse_lsn
from pgrealtime.wal.message import Begin, Commit, Message, RowChange, TruncateMessage
from pgrealtime.wal.wal2json import Wal2JsonDecoder, start_replication_options
from tests.unit.wal.tables import table

T = TableName("public", "t")
FULL = ReplicaIdentity.FULL

HEAD = '"xid":744,"timestamp":"2026-11-24 12:37:04.08778+00","lsn":"0/1945F30"'

ID = ("id", "23", '"1"')
"""A column in a line: name, oid of its type, value as JSON."""


def line(action: str, table: str = "t", **parts: list[tuple[str, str, str]]) -> str:
    """Return a line about a table of schema public; ``parts`` are its columns and identity."""
    lists = "".join(f',"{name}":[{_printed(columns)}]' for name, columns in parts.items())
    return (
        f'{{"action":"{action}",{HEAD},"schema":"public","table":"{table}"{lists}'
        ',"pk":[{"name":"id","typeoid":23}]}'
    )


def _printed(columns: list[tuple[str, str, str]]) -> str:
    return ",".join(
        f'{{"name":"{name}","typeoid":{oid},"value":{value}}}' for name, oid, value in columns
    )


def decode(
    text: str, *, columns: str = "id a b", identity: ReplicaIdentity = ReplicaIdentity.DEFAULT
) -> Message | None:
    """Return the message decoded from a line, without the shape of its row."""
    message = Wal2JsonDecoder([table("t", columns, identity=identity)]).decode(text.encode())
    return replace(message, shape=None) if isinstance(message, RowChange) else message


def test_begin_has_the_transaction_id() -> None:
    """Its other members aren't used."""
    assert decode(f'{{"action":"B",{HEAD},"nextlsn":"0/1945F60"}}') == Begin(Xid(744))


@pytest.mark.parametrize(
    ("printed", "microseconds"),
    [
        ("2026-11-24 12:37:04.08778+00", 1_795_523_824_087_780),
        ("2026-11-24 12:37:04+00", 1_795_523_824_000_000),
        ("1969-12-31 23:59:59.999999+00", -1),
    ],
)
def test_commit_has_its_end_and_time(printed: str, microseconds: int) -> None:
    """The commit time is in microseconds since 1970, also before that."""
    text = f'{{"action":"C","xid":7,"timestamp":"{printed}","nextlsn":"16/B374D848"}}'

    assert decode(text) == Commit(parse_lsn("16/B374D848"), microseconds)


@pytest.mark.parametrize(
    ("oid", "value", "text"),
    [
        ("23", '"1"', "1"),
        ("23", "null", None),
        ("16", "true", "t"),
        ("16", "false", "f"),
        ("16", "null", None),
        ("17", '"00ff"', r"\x00ff"),
        ("17", '""', r"\x"),
        ("17", "null", None),
        ("25", '"true"', "true"),
        ("25", r'"q\"\\\n\u0001é"', 'q"\\\n\x01é'),
        ("1700", '"12345678901234567890.10"', "12345678901234567890.10"),
        ("701", '"NaN"', "NaN"),
        ("16388", r'"\\xdead"', r"\xdead"),
        ("16389", '"t"', "t"),
        ("1000", '"{t,f}"', "{t,f}"),
    ],
)
def test_values_become_postgres_text(oid: str, value: str, text: str | None) -> None:
    """Domains over boolean and bytea (here 16388 and 16389) are printed as any other type."""
    payload = line("I", columns=[("id", oid, value)])

    assert decode(payload, columns="id") == RowChange(Insert(T, {"id": text}), None)


def test_column_that_the_catalogue_lacks_is_read() -> None:
    """The table was altered after the catalogue was read; the row has all that was written."""
    text = line("I", columns=[ID, ("new", "16", "true")])

    assert decode(text, columns="id") == RowChange(Insert(T, {"id": "1", "new": "t"}), None)


WHOLE = [ID, ("a", "25", "null"), ("b", "25", '"y"')]


@pytest.mark.parametrize(
    ("identity", "old", "image"),
    [
        pytest.param(ReplicaIdentity.DEFAULT, [ID], Key({"id": "1"}), id="default"),
        pytest.param(FULL, WHOLE, WholeRow({"id": "1", "a": None, "b": "y"}), id="full"),
        pytest.param(
            ReplicaIdentity.DEFAULT,
            WHOLE,
            WholeRow({"id": "1", "a": None, "b": "y"}),
            id="full since the catalogue was read",
        ),
        pytest.param(FULL, [ID], Key({"id": "1"}), id="full until the catalogue was read"),
    ],
)
def test_old_image_is_what_was_logged(
    identity: ReplicaIdentity, old: list[tuple[str, str, str]], image: OldImage
) -> None:
    """The line decides, where the replica identity changed after the catalogue was read."""
    new = [("id", "23", '"2"'), ("a", "25", '"x"'), ("b", "25", '"y"')]
    update = line("U", columns=new, identity=old)
    delete = line("D", identity=old)

    assert decode(update, identity=identity) == RowChange(
        Update(T, {"id": "2", "a": "x", "b": "y"}, image), None
    )
    assert decode(delete, identity=identity) == RowChange(Delete(T, image), None)


def test_unchanged_toast_is_absent_and_not_null() -> None:
    """wal2json leaves the column out."""
    text = line("U", columns=[ID, ("a", "25", "null")], identity=[ID])

    assert decode(text) == RowChange(Update(T, {"id": "1", "a": None}, Key({"id": "1"})), None)


@pytest.mark.parametrize("added", [[], ["c"]], ids=["catalogued", "with a column that is new"])
def test_unchanged_toast_is_filled_from_a_whole_old_row_in_its_place(added: list[str]) -> None:
    """With REPLICA IDENTITY FULL the old row has the value."""
    more = [(name, "25", '"more"') for name in added]
    text = line(
        "U",
        columns=[ID, ("b", "25", '"new"'), *more],
        identity=[ID, ("a", "25", '"big"'), ("b", "25", '"old"'), *more],
    )
    whole = {"id": "1", "a": "big", "b": "new"} | dict.fromkeys(added, "more")

    match decode(text, identity=FULL):
        case RowChange(change=Update(new=row, old=WholeRow())):
            assert list(row.items()) == list(whole.items())
        case other:
            pytest.fail(str(other))


def test_leaf_goes_by_its_root_in_the_roots_column_order() -> None:
    """A partition may have the columns of its root in another order."""
    parts = table("parts", "id a b", leaves=("parts_1",))
    text = line("I", "parts_1", columns=[("b", "25", '"2"'), ("new", "25", '"3"'), ID])

    match Wal2JsonDecoder([parts]).decode(text.encode()):
        case RowChange(change=Insert(table=name, new=row), leaf=leaf):
            assert (name, leaf) == (parts.name, parts.leaves[0])
            assert list(row.items()) == [("id", "1"), ("b", "2"), ("new", "3")]
        case other:
            pytest.fail(str(other))


def test_truncate_names_the_table() -> None:
    """wal2json has a line for each table."""
    assert decode(line("T")) == TruncateMessage((T,))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            '{"action":"M","xid":null,"lsn":"0/1","transactional":false,"prefix":"x"}',
            id="logical message",
        ),
        pytest.param(line("I", "other", columns=[]), id="insert elsewhere"),
        pytest.param(line("U", "other", columns=[], identity=[]), id="update elsewhere"),
        pytest.param(line("D", "other", identity=[]), id="delete elsewhere"),
        pytest.param(line("T", "other"), id="truncate elsewhere"),
    ],
)
def test_lines_about_other_tables_are_ignored(text: str) -> None:
    """Logical messages, and tables that weren't asked for."""
    assert decode(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"action":"X"}',
        '{"action":"B"}',
        '{"action":"C","nextlsn":"0/X","timestamp":"2026-11-24 12:37:04+00"}',
        '{"action":"C","nextlsn":"0/1","timestamp":"soon"}',
        '{"action":"C","nextlsn":"0/1","timestamp":"2026-11-24 12:37:04"}',
        line("I", columns=[("secret", "25", "1")]),
    ],
)
def test_unreadable_line_is_refused_without_being_quoted(text: str) -> None:
    """An error's text may be logged; a row must not be."""
    with pytest.raises(UnexpectedMessageError) as caught:
        decode(text)

    assert "secret" not in str(caught.value)


def test_names_are_escaped_for_add_tables() -> None:
    """Otherwise a dot, comma or asterisk selects other tables, as an integration test shows."""
    odd = table("We.ird, \"T'\\*", "id")

    assert start_replication_options([odd])["add-tables"] == "public.We\\.ird\\,\\ \\\"T\\'\\\\\\*"


def test_partitioned_table_is_added_by_its_leaves() -> None:
    """The WAL has changes of leaves only."""
    parts = table("parts", "id", leaves=("parts_2", "parts_1"))

    assert start_replication_options([parts, table("a", "id")])["add-tables"] == (
        "public.a,public.parts_1,public.parts_2"
    )


def test_no_tables_add_none() -> None:
    """wal2json takes an empty list as no table, and a missing option as all tables."""
    assert start_replication_options([])["add-tables"] == ""
    assert Wal2JsonDecoder([]).decode(b'{"action":"B","xid":1}') == Begin(Xid(1))


def shapes(*lines: str, columns: str = "id a b") -> list[RowShape | None]:
    """Return the shapes of the rows in the lines."""
    decoder = Wal2JsonDecoder([table("t", columns)])
    messages = [decoder.decode(text.encode()) for text in lines]
    return [one.shape for one in messages if isinstance(one, RowChange)]


def test_rows_alike_have_one_shape_and_others_another() -> None:
    """Names and types count, also where another table has a column of the same name."""
    alike, retyped = line("I", columns=WHOLE), [*WHOLE[:2], ("b", "3802", '"{}"')]
    found = shapes(alike, line("I", columns=retyped), alike, line("D", identity=[ID]))
    renamed = shapes(line("I", columns=WHOLE), line("I", columns=[*WHOLE[:2], ("c", "25", '""')]))

    assert found[0] is found[2]
    assert [one and one.columns for one in found] == [
        (("id", 23), ("a", 25), ("b", 25)),
        (("id", 23), ("a", 25), ("b", 3802)),
        (("id", 23), ("a", 25), ("b", 25)),
        (("id", 23),),
    ]
    assert [one and one.columns[2] for one in renamed] == [("b", 25), ("c", 25)]


def test_a_value_that_only_the_old_row_has_counts_with_its_type() -> None:
    """A long value that the update left unchanged, logged by REPLICA IDENTITY FULL."""
    (found,) = shapes(line("U", columns=[ID, WHOLE[1]], identity=WHOLE))

    assert found is not None
    assert found.columns == (("id", 23), ("a", 25), ("b", 25))
