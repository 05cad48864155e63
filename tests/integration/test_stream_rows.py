"""Rows in the stream are the rows that PostgreSQL holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from psycopg import sql
from psycopg.pq import TransactionStatus

from pgrealtime.changes import (
    Change,
    Delete,
    Insert,
    Key,
    OldImage,
    Row,
    TableName,
    Truncate,
    Update,
    WholeRow,
)
from tests.stream_reading import PLUGINS, Connection, Plugin, changes_of, reading, writer
from tests.workloads import BIG, SCHEMA, WORKLOADS, statements

T = TableName("public", "t")
PINNED = (
    "SET DateStyle = ISO; SET TimeZone = UTC; SET IntervalStyle = postgres;"
    "SET extra_float_digits = 1; SET bytea_output = hex"
)
KEYS: Mapping[str, tuple[str, ...]] = {
    "types": ("id",),
    "by_default": ("id",),
    "by_whole_row": ("id",),
    "parts": ("id", "place"),
    "parent": ("id",),
    "child": ("id",),
    "generated": ("id",),
    "wide_key": ("k",),
    "other_table": ("id",),
}
NOT_STREAMED = ("doubled", "late")
"""Columns left out of the comparison: generated ones are absent with pgoutput before PostgreSQL 18,
and of a column that ALTER TABLE adds no row is sent."""

both = pytest.mark.parametrize("plugin", PLUGINS)


def _key(row: Row, names: Sequence[str]) -> tuple[str | None, ...]:
    return tuple(row[name] for name in names)


def _replay(changes: list[Change], table: str) -> dict[tuple[str | None, ...], Row]:
    """Return the table's rows by key, built from the changes alone."""
    names = KEYS[table]
    rows: dict[tuple[str | None, ...], Row] = {}
    for change in changes:
        if change.table != TableName("public", table):
            continue
        match change:
            case Insert(new=new):
                assert _key(new, names) not in rows
                rows[_key(new, names)] = _given(new)
            case Update(new=new, old=old):
                known = rows.pop(_key(old.row, names))
                _check_old(known, old)
                rows[_key(new, names)] = known | _given(new)
            case Delete(old=old):
                _check_old(rows.pop(_key(old.row, names)), old)
            case Truncate():
                rows.clear()
    return rows


def _given(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in NOT_STREAMED}


def _check_old(known: Row, old: OldImage) -> None:
    match old:
        case WholeRow(row):
            assert _given(row) == known
        case Key(row):
            assert row.items() <= known.items()


async def _rows(connection: Connection, table: str) -> dict[tuple[str | None, ...], Row]:
    """Return the table's rows by key, in PostgreSQL's own text form."""
    columns = await (
        await connection.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
            " AND NOT attisdropped AND attname <> ALL (%s) ORDER BY attnum",
            (table, list(NOT_STREAMED)),
        )
    ).fetchall()
    names = [name for (name,) in columns]
    found = await (
        await connection.execute(
            sql.SQL("SELECT {} FROM {}").format(_texts(names), sql.Identifier(table))
        )
    ).fetchall()
    rows: list[Row] = [dict(zip(names, values, strict=True)) for values in found]
    return {_key(row, KEYS[table]): row for row in rows}


def _texts(names: Sequence[str]) -> sql.Composed:
    """Return the columns by their types' output functions, as decoders print them.

    A cast may differ.
    """
    text = sql.SQL("CASE num_nulls({0}) WHEN 0 THEN format('%s', {0}) END")
    return sql.SQL(", ").join(text.format(sql.Identifier(name)) for name in names)


@both
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
async def test_replaying_the_changes_gives_the_tables(
    database_url: str, plugin: Plugin, workload: str
) -> None:
    """Every row and value in PostgreSQL's own text; each old image is the row as it was."""
    async with writer(database_url) as connection:
        await connection.execute(PINNED)
        for statement in statements(SCHEMA):
            await connection.execute(statement.encode())
        async with reading(database_url, connection, plugin) as stream:
            received: list[Change] = []
            for statement in statements(workload):
                # A leaf's truncate is decoded as its root's, which can't be replayed.
                if "TRUNCATE parts_" in statement:
                    continue
                await connection.execute(statement.encode())
                if connection.info.transaction_status is TransactionStatus.IDLE:
                    received += await changes_of(connection, stream)
                    # Often, because the scripts leave little behind.
                    for table in KEYS:
                        assert _replay(received, table) == await _rows(connection, table)


TYPES = {
    "bool": "true",
    "bytea": r"'\x00ff'",
    "numeric": "12345678901234567890.123450",
    "float8": "0.1::float8 + 0.2::float8",
    "float4": "'Infinity'",
    "int8": "9223372036854775807",
    "money": "1.20",
    "text": r"E'q\"\\\n\t\u0001\u2028é😀'",
    "char(5)": "'ab'",
    '"char"': "'q'",
    "name": "'n'",
    "date": "'0044-03-15 BC'",
    "timetz": "'12:00+02'",
    "timestamp": "'infinity'",
    "timestamptz": "'2020-06-01 00:00:00.123456+14'",
    "interval": "'1 year -3 days 04:05:06.7'",
    "uuid": "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
    "json": """'{"a":  [1, 2.50]}'""",
    "jsonb": """'{"b": 1.00, "a": "\\u00e9"}'""",
    "xml": "'<a/>'",
    "inet": "'10.0.0.1/8'",
    "macaddr": "'08:00:2b:01:02:03'",
    "bit(3)": "'101'",
    "varbit": "''",
    "point": "'(1.5,-2)'",
    "oid": "4000000000",
    "int4range": "'[1,5]'",
    "tsvector": "'a fat cat'",
    "pg_lsn": "'16/B374D848'",
    "int[]": "'{{1,2},{3,NULL}}'",
    "text[]": """'{"a b",NULL,"NULL","x\\"y"}'""",
    "bool[]": "'{t,f}'",
    "bytea[]": r"""ARRAY['\xde'::bytea, '\x']""",
    "pair": "'(1,\"a,b\")'",
    "mood": """'it''s "ok"'""",
    "truth": "true",
    "octets": r"'\xdead'",
}


@both
async def test_each_type_comes_in_postgres_text(database_url: str, plugin: Plugin) -> None:
    """Under pinned settings, whatever the role's own are."""
    columns = {f"c{number}": name for number, name in enumerate(TYPES)}
    async with writer(database_url) as connection:
        await connection.execute(
            "CREATE TYPE mood AS ENUM ('it''s \"ok\"'); CREATE TYPE pair AS (x int, y text);"
            "CREATE DOMAIN truth AS boolean; CREATE DOMAIN octets AS bytea;"
            "CREATE TABLE t (id int PRIMARY KEY, "
            + ", ".join(f"{name} {kind}" for name, kind in columns.items())
            + ")"
        )
        name = connection.info.dbname
        for setting in (
            "DateStyle = German",
            "TimeZone = 'Asia/Kolkata'",
            "IntervalStyle = iso_8601",
            "extra_float_digits = -3",
            "bytea_output = escape",
            "client_encoding = LATIN1",
            "search_path = public",
        ):
            await connection.execute(f'ALTER DATABASE "{name}" SET {setting}'.encode())
        async with reading(database_url, connection, plugin) as stream:
            values = ", ".join(TYPES.values())
            await connection.execute(f"INSERT INTO t VALUES (1, {values})".encode())
            await connection.execute("INSERT INTO t (id) VALUES (2)")
            changes = await changes_of(connection, stream)
        await connection.execute(PINNED)
        expected = await (
            await connection.execute(
                sql.SQL("SELECT {} FROM t WHERE id = 1").format(_texts(["id", *columns]))
            )
        ).fetchone()
        assert expected is not None
        nulls: Row = dict.fromkeys(columns)
        assert changes == [
            Insert(T, dict(zip(("id", *columns), expected, strict=True))),
            Insert(T, {"id": "2", **nulls}),
        ]


@both
async def test_unchanged_toast_is_absent_unless_the_old_row_is_whole(
    database_url: str, plugin: Plugin
) -> None:
    async with writer(database_url) as connection:
        await connection.execute(
            "CREATE TABLE t (id int PRIMARY KEY, big text, n int);"
            "CREATE TABLE whole (LIKE t INCLUDING ALL); ALTER TABLE whole REPLICA IDENTITY FULL;"
            f"INSERT INTO t VALUES (1, {BIG}, 1); INSERT INTO whole SELECT * FROM t"
        )
        (big,) = await (await connection.execute("SELECT big FROM t")).fetchone() or ("",)
        async with reading(database_url, connection, plugin) as stream:
            await connection.execute("UPDATE t SET n = 2; UPDATE whole SET n = 2")
            kept = {"id": "1", "big": big, "n": "1"}
            assert await changes_of(connection, stream) == [
                Update(T, {"id": "1", "n": "2"}, Key({"id": "1"})),
                Update(TableName("public", "whole"), kept | {"n": "2"}, WholeRow(kept)),
            ]


@both
async def test_update_of_an_untouched_key_has_the_key_as_old_image(
    database_url: str, plugin: Plugin
) -> None:
    async with writer(database_url) as connection:
        await connection.execute(
            "CREATE TABLE t (id int PRIMARY KEY, n int);"
            "CREATE TABLE by_index (a int, b text NOT NULL);"
            "CREATE UNIQUE INDEX by_index_b ON by_index (b);"
            "ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_b;"
            "INSERT INTO t VALUES (1, 1); INSERT INTO by_index VALUES (1, 'x')"
        )
        async with reading(database_url, connection, plugin) as stream:
            await connection.execute("UPDATE t SET n = 2; UPDATE by_index SET a = 2")
            await connection.execute("UPDATE t SET id = 3; UPDATE by_index SET b = 'y'")
            by_index = TableName("public", "by_index")
            assert await changes_of(connection, stream) == [
                Update(T, {"id": "1", "n": "2"}, Key({"id": "1"})),
                Update(by_index, {"a": "2", "b": "x"}, Key({"b": "x"})),
                Update(T, {"id": "3", "n": "2"}, Key({"id": "1"})),
                Update(by_index, {"a": "2", "b": "y"}, Key({"b": "x"})),
            ]


@both
async def test_move_between_partitions_is_one_update(database_url: str, plugin: Plugin) -> None:
    """The record stays: a client's page doesn't lose it for a moment."""
    parts = TableName("public", "parts")
    async with writer(database_url) as connection:
        await connection.execute(
            "CREATE TABLE parts (id int, place int, PRIMARY KEY (id, place))"
            " PARTITION BY LIST (place);"
            "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);"
            "CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2)"
        )
        async with reading(
            database_url, connection, plugin, record_keys={parts: ("id",)}
        ) as stream:
            await connection.execute("INSERT INTO parts VALUES (1, 1), (2, 1)")
            await connection.execute("UPDATE parts SET place = 2")
            await connection.execute("UPDATE parts SET id = 3, place = 1 WHERE id = 2")
            assert await changes_of(connection, stream) == [
                Insert(parts, {"id": "1", "place": "1"}),
                Insert(parts, {"id": "2", "place": "1"}),
                Update(parts, {"id": "1", "place": "2"}, Key({"id": "1", "place": "1"})),
                Update(parts, {"id": "2", "place": "2"}, Key({"id": "2", "place": "1"})),
                Delete(parts, Key({"id": "2", "place": "2"})),
                Insert(parts, {"id": "3", "place": "1"}),
            ]


@both
async def test_truncate_names_each_table_once(database_url: str, plugin: Plugin) -> None:
    async with writer(database_url) as connection:
        await connection.execute(
            "CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY HASH (id);"
            "CREATE TABLE parts_0 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
            "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
            "CREATE TABLE t (id int PRIMARY KEY)"
        )
        async with reading(database_url, connection, plugin) as stream:
            await connection.execute("TRUNCATE t, parts")
            assert await changes_of(connection, stream) == [
                Truncate(T),
                Truncate(TableName("public", "parts")),
            ]


@both
async def test_odd_names_select_their_own_table_only(database_url: str, plugin: Plugin) -> None:
    """A dot, comma or asterisk in a name must neither select other tables nor omit this one."""
    odd = TableName("Sch.ema, \"*\\'", "We.ird, \"T'\\*\t%\u00e9")
    identifier = sql.Identifier(*odd)
    async with writer(database_url) as connection:
        await connection.execute(
            sql.SQL(
                "CREATE SCHEMA {}; CREATE TABLE {} ({} int PRIMARY KEY, {} text);"
                "CREATE SCHEMA sch; CREATE TABLE sch.ema (id int PRIMARY KEY)"
            ).format(
                sql.Identifier(odd.schema),
                identifier,
                sql.Identifier('K "k"'),
                sql.Identifier("\\,.{}"),
            )
        )
        async with reading(database_url, connection, plugin, odd.schema) as stream:
            await connection.execute("INSERT INTO sch.ema VALUES (1)")
            await connection.execute(sql.SQL("INSERT INTO {} VALUES (1, 'x')").format(identifier))
            assert await changes_of(connection, stream) == [
                Insert(odd, {'K "k"': "1", "\\,.{}": "x"})
            ]
