"""``read_catalog`` agrees with PostgreSQL's own catalogue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Column, ForeignKey, ReplicaIdentity, Table, TableKind, Type
from pgrealtime.changes import TableName


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[AsyncConnection[Any]]:
    async with await AsyncConnection.connect(database_url, autocommit=True) as opened:
        yield opened


async def table_of(connection: AsyncConnection[Any], name: str, ddl: str) -> Table:
    """Return the table of that name in schema public, after the statements have run."""
    await connection.execute(ddl.encode())
    catalog = await read_catalog(connection, schemas=["public"])
    return catalog.tables[TableName("public", name)]


def shape(data_type: Type) -> object:
    """Return a type without what differs from server to server."""
    parts: list[object] = [f"{data_type.schema}.{data_type.name}", data_type.kind.name]
    if data_type.element is not None:
        parts.append(shape(data_type.element))
    if data_type.domain_of is not None:
        parts.append(shape(data_type.domain_of))
    parts += [(name, shape(inner)) for name, inner in data_type.attributes]
    return tuple(parts)


async def test_a_plain_table_is_read_whole(connection: AsyncConnection[Any]) -> None:
    table = await table_of(
        connection,
        "posts",
        "CREATE TABLE posts (id bigint PRIMARY KEY, title varchar(40) NOT NULL)",
    )
    int8, varchar = table.columns[0].type, table.columns[1].type
    assert table == Table(
        oid=table.oid,
        name=TableName("public", "posts"),
        kind=TableKind.TABLE,
        columns=(
            Column(name="id", attribute_number=1, type=int8, not_null=True),
            Column(
                name="title",
                attribute_number=2,
                type=varchar,
                type_modifier=44,
                not_null=True,
                is_toastable=True,
            ),
        ),
        primary_key=("id",),
        unique_keys=(("id",),),
        index_prefixes=(("id",),),
        replica_identity_columns=("id",),
    )
    assert (int8.oid, int8.category, varchar.oid, varchar.category) == (20, "N", 1043, "S")
    assert (shape(int8), shape(varchar)) == (
        ("pg_catalog.int8", "BASE"),
        ("pg_catalog.varchar", "BASE"),
    )


async def test_types_are_read_with_what_they_are_made_of(connection: AsyncConnection[Any]) -> None:
    table = await table_of(
        connection,
        "t",
        """
        CREATE TYPE mood AS ENUM ('sad', 'ok');
        CREATE DOMAIN short AS text CHECK (length(value) < 9);
        CREATE DOMAIN shorter AS short;
        CREATE DOMAIN shorts AS short[];
        CREATE TYPE address AS (street shorter, moods mood[], at point);
        CREATE TABLE t (
          id int PRIMARY KEY, a mood, b mood[], c shorter, d shorts, e address, f address[],
          g int4range, h int4multirange, i point, j text[][]
        );
        """,
    )
    text = ("pg_catalog.text", "BASE")
    mood = ("public.mood", "ENUM")
    short = ("public.short", "DOMAIN", text)
    moods = ("public._mood", "ARRAY", mood)
    address = (
        "public.address",
        "COMPOSITE",
        ("street", ("public.shorter", "DOMAIN", short)),
        ("moods", moods),
        ("at", ("pg_catalog.point", "BASE")),
    )
    assert {column.name: shape(column.type) for column in table.columns[1:]} == {
        "a": mood,
        "b": moods,
        "c": ("public.shorter", "DOMAIN", short),
        "d": ("public.shorts", "DOMAIN", ("public._short", "ARRAY", short)),
        "e": address,
        "f": ("public._address", "ARRAY", address),
        "g": ("pg_catalog.int4range", "RANGE"),
        "h": ("pg_catalog.int4multirange", "MULTIRANGE"),
        "i": ("pg_catalog.point", "BASE"),
        "j": ("pg_catalog._text", "ARRAY", text),
    }
    c = table.find_column("c")
    assert c is not None
    assert c.type.base.name == "text"


async def test_names_are_exact_whatever_their_characters(connection: AsyncConnection[Any]) -> None:
    await connection.execute("""
        CREATE SCHEMA "My Schema";
        CREATE TYPE "My Schema"."Kind" AS ENUM ('a');
        CREATE TABLE "My Schema"."Odd ""Name.x" ("Id" int PRIMARY KEY, "été" "My Schema"."Kind");
        CREATE TABLE "My Schema"."odd" (id int PRIMARY KEY);
    """)
    odd = TableName("My Schema", 'Odd "Name.x')
    catalog = await read_catalog(connection, names=[odd, TableName("public", "nothing")])

    assert list(catalog.tables) == [odd]
    assert [column.name for column in catalog.tables[odd].columns] == ["Id", "été"]
    assert shape(catalog.tables[odd].columns[1].type) == ("My Schema.Kind", "ENUM")


async def test_columns_have_what_the_stream_and_comparisons_need(
    connection: AsyncConnection[Any],
) -> None:
    table = await table_of(
        connection,
        "t",
        """
        CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
        CREATE TABLE t (
          gone int, id int PRIMARY KEY, a text COLLATE loose, b text COLLATE "C",
          c int GENERATED ALWAYS AS (id + 1) STORED, d int GENERATED ALWAYS AS IDENTITY
        );
        ALTER TABLE t DROP COLUMN gone;
        """,
    )
    assert [
        (one.name, one.attribute_number, one.is_deterministic, one.is_generated)
        for one in table.columns
    ] == [
        ("id", 2, True, False),
        ("a", 3, False, False),
        ("b", 4, True, False),
        ("c", 5, True, True),
        ("d", 6, True, False),
    ]


async def test_keys_are_read_in_their_own_column_order(connection: AsyncConnection[Any]) -> None:
    table = await table_of(
        connection,
        "child",
        """
        CREATE TABLE parent (a int, b int, c int UNIQUE, PRIMARY KEY (b, a));
        CREATE TABLE child (
          x int, y int, z int, PRIMARY KEY (z, x),
          CONSTRAINT many FOREIGN KEY (y, x) REFERENCES parent (b, a),
          CONSTRAINT one FOREIGN KEY (z) REFERENCES parent (c),
          CONSTRAINT self FOREIGN KEY (z, x) REFERENCES child
        );
        """,
    )
    assert table.primary_key == ("z", "x")
    assert table.foreign_keys == (
        ForeignKey(
            name="many",
            column_names=("y", "x"),
            target=TableName("public", "parent"),
            target_column_names=("b", "a"),
        ),
        ForeignKey(
            name="one",
            column_names=("z",),
            target=TableName("public", "parent"),
            target_column_names=("c",),
        ),
        ForeignKey(
            name="self",
            column_names=("z", "x"),
            target=TableName("public", "child"),
            target_column_names=("z", "x"),
        ),
    )


async def test_only_indexes_that_mean_uniqueness_count_as_unique(
    connection: AsyncConnection[Any],
) -> None:
    """A partial, expression or deferrable index permits equal rows, for a moment or for good."""
    table = await table_of(
        connection,
        "t",
        """
        CREATE TABLE t (id int PRIMARY KEY, a int, b int, c text, d int UNIQUE DEFERRABLE);
        CREATE UNIQUE INDEX i1 ON t (a, b) INCLUDE (c);
        CREATE UNIQUE INDEX i2 ON t (b) WHERE a > 0;
        CREATE UNIQUE INDEX i3 ON t (b, lower(c));
        CREATE INDEX i4 ON t (c);
        """,
    )
    assert table.unique_keys == (("a", "b"), ("id",))
    assert sorted(table.index_prefixes) == [("a", "b"), ("b",), ("c",), ("d",), ("id",)]


async def test_an_index_that_failed_to_build_does_not_count(
    connection: AsyncConnection[Any],
) -> None:
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY, a int)")
    await connection.execute("INSERT INTO t VALUES (1, 1), (2, 1)")
    with pytest.raises(psycopg.errors.UniqueViolation):
        await connection.execute("CREATE UNIQUE INDEX CONCURRENTLY ON t (a)")
    table = await table_of(connection, "t", "SELECT")
    assert (table.unique_keys, table.index_prefixes) == ((("id",),), (("id",),))


@pytest.mark.parametrize(
    ("ddl", "identity", "columns"),
    [
        ("", ReplicaIdentity.DEFAULT, ("id", "no")),
        ("ALTER TABLE t REPLICA IDENTITY FULL", ReplicaIdentity.FULL, ("no", "id", "a")),
        ("ALTER TABLE t REPLICA IDENTITY NOTHING", ReplicaIdentity.NOTHING, ()),
        ("ALTER TABLE t REPLICA IDENTITY USING INDEX t_a_key", ReplicaIdentity.INDEX, ("a",)),
        ("ALTER TABLE t DROP CONSTRAINT t_pkey", ReplicaIdentity.DEFAULT, ()),
        (
            "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (id) DEFERRABLE",
            ReplicaIdentity.DEFAULT,
            (),
        ),
    ],
    ids=["default", "full", "nothing", "index", "no key", "deferrable key"],
)
async def test_the_replica_identity_is_what_the_wal_carries(
    connection: AsyncConnection[Any], ddl: str, identity: ReplicaIdentity, columns: Sequence[str]
) -> None:
    """The reference is the old image that test_decoding prints of a deleted row."""
    table = await table_of(
        connection,
        "t",
        f"CREATE TABLE t (no int, id int, a int NOT NULL UNIQUE, PRIMARY KEY (id, no));{ddl}",
    )
    assert (table.replica_identity, table.replica_identity_columns) == (identity, columns)
    assert await logged_columns(connection, "t") == sorted(columns)


async def logged_columns(connection: AsyncConnection[Any], table: str) -> list[str]:
    """Return the columns that the server logs of a deleted row.

    The table has the columns no, id, a.
    """
    await connection.execute(f"INSERT INTO {table} (no, id, a) VALUES (1, 2, 3)".encode())
    await connection.execute(
        "SELECT pg_create_logical_replication_slot('witness_' || pg_backend_pid(),"
        " 'test_decoding', temporary => true)"
    )
    await connection.execute(f"DELETE FROM {table}".encode())
    cursor = await connection.execute(
        "SELECT data FROM pg_logical_slot_get_changes('witness_' || pg_backend_pid(), NULL, NULL)"
        " WHERE data LIKE 'table %'"
    )
    row = await cursor.fetchone()
    assert row is not None
    return sorted(name for name in ("no", "id", "a") if f" {name}[integer]" in row[0])


async def test_a_partitioned_table_has_its_leaves_and_what_all_of_them_log(
    connection: AsyncConnection[Any],
) -> None:
    """Each partition has its own replica identity; ALTER TABLE on the root doesn't change it."""
    table = await table_of(
        connection,
        "events",
        """
        CREATE TABLE events (at int, no int, a int, PRIMARY KEY (at, no)) PARTITION BY RANGE (at);
        CREATE TABLE early PARTITION OF events FOR VALUES FROM (0) TO (10) PARTITION BY LIST (no);
        CREATE TABLE early_1 PARTITION OF early FOR VALUES IN (1);
        CREATE TABLE late PARTITION OF events FOR VALUES FROM (10) TO (20);
        ALTER TABLE events REPLICA IDENTITY FULL;
        """,
    )
    assert table.kind is TableKind.PARTITIONED
    assert table.leaves == (TableName("public", "late"), TableName("public", "early_1"))
    assert table.primary_key == ("at", "no")
    assert table.replica_identity is ReplicaIdentity.DEFAULT
    assert table.replica_identity_columns == ("at", "no")
    assert table.partition_of is None

    mixed = await table_of(connection, "events", "ALTER TABLE late REPLICA IDENTITY FULL")
    assert (mixed.replica_identity, mixed.replica_identity_columns) == (
        ReplicaIdentity.DEFAULT,
        ("at", "no"),
    )
    full = await table_of(connection, "events", "ALTER TABLE early_1 REPLICA IDENTITY FULL")
    assert (full.replica_identity, full.replica_identity_columns) == (
        ReplicaIdentity.FULL,
        ("at", "no", "a"),
    )
    without = await table_of(connection, "events", "ALTER TABLE late REPLICA IDENTITY NOTHING")
    assert (without.replica_identity, without.replica_identity_columns) == (
        ReplicaIdentity.NOTHING,
        (),
    )


async def test_partitions_know_their_root(connection: AsyncConnection[Any]) -> None:
    leaf = await table_of(
        connection,
        "c",
        """
        CREATE TABLE a (id int PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE b PARTITION OF a FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (id);
        CREATE TABLE c PARTITION OF b FOR VALUES FROM (0) TO (5);
        """,
    )
    assert leaf.partition_of == TableName("public", "a")


async def test_a_foreign_key_of_or_to_a_partitioned_table_is_one(
    connection: AsyncConnection[Any],
) -> None:
    """PostgreSQL keeps an additional constraint per partition."""
    ddl = """
        CREATE TABLE a (id int PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE a1 PARTITION OF a FOR VALUES FROM (0) TO (10);
        CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a) PARTITION BY RANGE (id);
        CREATE TABLE b1 PARTITION OF b FOR VALUES FROM (0) TO (10);
    """
    table = await table_of(connection, "b", ddl)
    assert [(key.column_names, key.target.name) for key in table.foreign_keys] == [(("a",), "a")]


@pytest.mark.parametrize(
    ("ddl", "kind", "is_unlogged"),
    [
        ("CREATE TABLE t (id int)", TableKind.TABLE, False),
        ("CREATE UNLOGGED TABLE t (id int)", TableKind.TABLE, True),
        ("CREATE VIEW t AS SELECT 1 AS id", TableKind.VIEW, False),
        ("CREATE MATERIALIZED VIEW t AS SELECT 1 AS id", TableKind.MATERIALIZED_VIEW, False),
        (
            """CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;
               CREATE FOREIGN TABLE t (id int) SERVER s""",
            TableKind.FOREIGN,
            False,
        ),
    ],
    ids=["table", "unlogged", "view", "materialized view", "foreign"],
)
async def test_tables_that_never_stream_are_distinguished(
    connection: AsyncConnection[Any], ddl: str, kind: TableKind, *, is_unlogged: bool
) -> None:
    table = await table_of(connection, "t", ddl)
    assert (table.kind, table.is_unlogged) == (kind, is_unlogged)


async def test_the_catalogue_has_the_server_s_version_and_encoding(
    connection: AsyncConnection[Any],
) -> None:
    catalog = await read_catalog(connection, schemas=["public"])
    cursor = await connection.execute(
        "SELECT current_setting('server_version_num')::int, current_setting('server_encoding')"
    )
    assert (catalog.server_version, catalog.server_encoding) == await cursor.fetchone()
    assert (dict(catalog.tables), catalog.schemas) == ({}, ("public",))


async def test_a_schema_before_pg_catalog_shadows_nothing(connection: AsyncConnection[Any]) -> None:
    """A role's search_path may hold another user's table pg_class."""
    await connection.execute("CREATE SCHEMA evil; CREATE TABLE evil.pg_class (oid oid)")
    await connection.execute("SET search_path = evil, pg_catalog")
    catalog = await read_catalog(connection, schemas=["evil"])

    assert list(catalog.tables) == [TableName("evil", "pg_class")]
    cursor = await connection.execute("SHOW search_path")
    assert await cursor.fetchone() == ("evil, pg_catalog",)


async def test_reading_twice_gives_the_same_values(connection: AsyncConnection[Any]) -> None:
    """Catalogues compare unequal only if the schema changed."""
    ddl = "CREATE TABLE t (id int PRIMARY KEY, a text[], b int REFERENCES t); CREATE INDEX ON t (b)"
    first = await table_of(connection, "t", ddl)
    assert await table_of(connection, "t", "SELECT") == first
    changed = await table_of(connection, "t", "ALTER TABLE t REPLICA IDENTITY FULL")
    assert changed == replace(
        first, replica_identity=ReplicaIdentity.FULL, replica_identity_columns=("id", "a", "b")
    )
