"""Records of tables whose primary key has several columns: their ids, everywhere an id goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import psycopg
import pytest
from psycopg import sql

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import canonical_id
from pgrealtime.catalog.record_ids import id_expression, with_joined_id
from pgrealtime.changes import TableName, join_id
from pgrealtime.collections.build import build_collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.postgres.rows import rows_by_key_statement
from pgrealtime.reads.compiler import ListCompiler
from pgrealtime.rules.language.request import RuleRequest
from tests.e2e.listener import Caller, listener
from tests.e2e.service import Service, service
from tests.program import run_program
from tests.topics import topic

SCHEMA = """
CREATE TABLE orders (id int PRIMARY KEY, owner text NOT NULL);
CREATE TABLE items (
  order_id int REFERENCES orders, sku text, n int NOT NULL DEFAULT 1, note text,
  PRIMARY KEY (order_id, sku)
);
CREATE TABLE parts (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), item text);
INSERT INTO orders VALUES (1, 'ann'), (2, 'bob');
INSERT INTO items SELECT 1, 'old' || n, n FROM generate_series(1, 3) n;
ALTER TABLE items REPLICA IDENTITY FULL;
CREATE PUBLICATION pgrealtime FOR TABLE ONLY orders, items;
"""
COLLECTIONS: dict[str, dict[str, Any]] = {
    "orders": {"table": "orders", "list_rule": "", "view_rule": ""},
    "items": {
        "table": "items",
        "list_rule": 'order_id.owner = "ann"',
        "view_rule": 'order_id.owner = "ann" && sku != "hidden"',
    },
}


async def get(running: Service, path: str, **params: str) -> tuple[int, Any]:
    """Return status and body of a read."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{running.url}/api/collections/{path}", params=params) as response,
    ):
        return response.status, await response.json()


async def ids(running: Service, path: str, **params: str) -> list[str]:
    """Return the ids of a list."""
    status, body = await get(running, path, **params)
    assert status == 200, body
    return [item["id"] for item in body["items"]]


@pytest.mark.parametrize(("plugin", "workers"), [("wal2json", 1), ("pgoutput", 2)])
async def test_a_record_of_two_key_columns_has_the_same_id_in_events_topics_and_reads(
    database_url: str, tmp_path: Path, plugin: str, workers: int
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "replication": {"plugin": plugin},
        "server": {"workers": workers},
    }
    async with (
        service(
            database_url, tmp_path, collections=COLLECTIONS, sections=sections, schema=SCHEMA
        ) as running,
        listener(running.address, "items/*") as everything,
        listener(running.address, 'items/1~a!2b!3c"') as one,
    ):
        write = running.write
        await write.execute("""INSERT INTO items VALUES (1, 'a/b?c"'), (2, 'of bob'), (1, '~!')""")
        await write.execute("UPDATE items SET n = 5 WHERE n = 1 AND order_id = 1 AND sku ~ '^a'")
        await write.execute("UPDATE items SET sku = 'new' WHERE sku = '~!'")
        await write.execute("DELETE FROM items WHERE sku ~ '^a'")

        received = [(m.data["action"], m.data["record"]["id"]) for m in await everything.take(6)]
        assert received == [
            ("create", '1~a!2b!3c"'),
            ("create", "1~!1!0"),
            ("update", '1~a!2b!3c"'),
            ("delete", "1~!1!0"),
            ("create", "1~new"),
            ("delete", '1~a!2b!3c"'),
        ]
        of_one = [(m.event, m.data["action"]) for m in await one.take(3)]
        assert of_one == [('items/1~a!2b!3c"', a) for a in ("create", "update", "delete")]

        await write.execute("""INSERT INTO items VALUES (1, 'a/b?c"')""")
        (created,) = await everything.take(1)
        path = quote(created.data["record"]["id"], safe="")
        status, record = await get(running, f"items/records/{path}")
        assert (status, record) == (200, created.data["record"])
        assert record == {
            "collectionId": record["collectionId"],
            "collectionName": "items",
            "order_id": "1",
            "sku": 'a/b?c"',
            "n": 1,
            "note": None,
            "id": '1~a!2b!3c"',
        }
        assert await ids(running, "items/records", filter=f"id = '{record['id']}'") == [
            record["id"]
        ]
        for unknown in (
            "1~",
            "1",
            "x~a",
            "1~a~b",
            "01~new",
            "1~a!9",
            "99999999999999999999~x",
            "~",
        ):
            assert (await get(running, f"items/records/{quote(unknown, safe='')}"))[0] == 404
            assert await ids(running, "items/records", filter=f'id = "{unknown}"') == []
        assert await ids(running, "items/records") == [
            '1~a!2b!3c"', "1~new", "1~old1", "1~old2", "1~old3",
        ]  # fmt: skip
        assert await ids(running, "items/records", sort="-id", perPage="2", page="2") == [
            "1~old1", "1~new",
        ]  # fmt: skip
        status, order = await get(running, "orders/records/1", expand="items_via_order_id")
        assert sorted(item["id"] for item in order["expand"]["items_via_order_id"]) == sorted(
            await ids(running, "items/records")
        )


TYPES = {
    "smallint": "7",
    "bigint": "-9223372036854775808",
    "uuid": "00000000-0000-0000-0000-0000000000ab",
    "text": "a~b!c/d?e ",
    "varchar(9)": "",
    "char(4)": "x",
    "boolean": "true",
    "date": "2024-02-29",
    "timestamptz": "2024-01-01 10:00+02",
    "numeric": "1.50",
    "inet": "10.0.0.0/8",
    "citext": "Ab",
    "bytea": "\\x00ff",
    "float8": "0.1",
    "mood": "so/so",
    "some_text": "%",
}


async def test_the_stream_and_postgresql_write_the_same_id_of_any_types(database_url: str) -> None:
    """The id in an event, computed of the texts that the decoder sends, finds the row."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("CREATE EXTENSION citext")
        await connection.execute("CREATE TYPE mood AS ENUM ('so/so')")
        await connection.execute("CREATE DOMAIN some_text AS text")
        for number, (type_, value) in enumerate(TYPES.items()):
            name = f"with % {number}"
            await connection.execute(
                sql.SQL("CREATE TABLE {} (a int, {} {}, PRIMARY KEY (a, {}))").format(
                    sql.Identifier(name),
                    sql.Identifier("%s"),
                    sql.SQL(type_),
                    sql.Identifier("%s"),
                )
            )
            await connection.execute(
                sql.SQL("INSERT INTO {} VALUES (1, {})").format(sql.Identifier(name), value)
            )
        await connection.execute("SET timezone = 'UTC'")
        catalog = await read_catalog(connection, schemas=["public"])
        for number, type_ in enumerate(TYPES):
            table = catalog.tables[TableName("public", f"with % {number}")]
            key = with_joined_id(table, table.primary_key).id_column
            assert key is not None
            query = sql.SQL("SELECT a, pg_catalog.concat(t.{}), {} FROM {} t").format(
                sql.Identifier("%s"),
                sql.SQL(id_expression(key, "t").replace("%%", "%")),
                sql.Identifier(*table.name),
            )
            (row,) = await (await connection.execute(query)).fetchall()
            a, streamed, by_sql = row
            if type_ == "char(4)":
                streamed = streamed.rstrip()
            assert by_sql == join_id([str(a), streamed]), type_
            assert canonical_id(by_sql, key.type) == by_sql, type_


async def test_mirrors_resume_and_explain_know_the_record(
    database_url: str, tmp_path: Path
) -> None:
    """The id is all that a mirror is told of a row that leaves."""
    own = {"items": {"table": "items", "list_rule": "n > 1", "view_rule": "n > 1"}}
    async with service(database_url, tmp_path, collections=own, schema=SCHEMA) as running:
        mirrored = topic("items/*", mode="mirror")
        async with listener(running.address, mirrored, "PB_CURSOR") as first:
            await running.write.execute("UPDATE items SET n = 7 WHERE sku = 'old1'")
            await running.write.execute("UPDATE items SET n = 0 WHERE sku = 'old2'")
            told: list[Any] = []
            while len(told) < 3:
                told += [m for m in await first.take(1) if m.event == mirrored]
            assert [(m.data["action"], m.data["record"].get("id")) for m in told] == [
                ("resync", ""),
                ("create", "1~old1"),
                ("delete", "1~old2"),
            ]
        await running.write.execute("DELETE FROM items WHERE sku = 'old3'")
        back = Caller(headers={"Last-Event-ID": told[-1].id})
        async with listener(running.address, "items/1~old3", "items/*", caller=back) as again:
            missed = [(m.event, m.data["record"]["id"]) for m in await again.take(2)]
            assert missed == [("items/1~old3", "1~old3"), ("items/*", "1~old3")]

        config = str(tmp_path / "pgrealtime.yaml")
        for options in (["items/*", "--record", "1~old1"], ["items/1~old1", "--list"]):
            explained = run_program("explain", "-c", config, *options, "--guest")
            assert explained.code == 0, explained
        unknown = run_program("explain", "-c", config, "items/*", "--record", "1~x", "--guest")
        assert 'no row whose record id is "1~x" now' in unknown.out + unknown.err


async def test_the_key_s_index_finds_a_record_by_its_id(database_url: str) -> None:
    """Whether a view, a filter, or the rows of related records ask for it."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(
            "CREATE TABLE cells (x int, tag text, y uuid DEFAULT gen_random_uuid(), note text,"
            " PRIMARY KEY (x, tag, y))"
        )
        await connection.execute(
            "INSERT INTO cells SELECT n / 100, n % 100 FROM generate_series(1, 9999) n"
        )
        await connection.execute("ANALYZE cells")
        configured = {"cells": CollectionConfig.model_validate({"table": "cells"})}
        collections = build_collections(
            configured, await read_catalog(connection, schemas=["public"])
        )
        cells = collections["cells"]
        record_id = "7~7~00000000-0000-0000-0000-000000000000"
        bound = await ListCompiler(collections).bind(
            cells, "", RuleRequest(), filter_text=f'id = "{record_id}"', sort_text=""
        )
        paged = {"limit": 30, "offset": 0, "max_joined_rows": 1000}
        related = rows_by_key_statement(cells.table.name, cells.key, ("x", cells.key.name))
        for statement, params in (
            (bound.sql.page, {**bound.params, **paged}),
            (bound.sql.count, bound.params),
            (bound.sql.row, {**bound.params, "id": record_id}),
            (related, {"ids": [record_id, "8~8~00000000-0000-0000-0000-000000000000"]}),
        ):
            explained = await connection.execute(f"EXPLAIN {statement}".encode(), params)
            plan = "\n".join([line for (line,) in await explained.fetchall()])
            assert "cells_pkey" in plan, plan
            assert plan.count("(x = ") == plan.count("(y = ") == 1, plan


@pytest.mark.parametrize("collation", ["caseless", '"C"'])
async def test_a_part_may_have_any_collation(
    database_url: str, tmp_path: Path, collation: str
) -> None:
    """PostgreSQL searches no text under one that isn't deterministic."""
    schema = f"""
    CREATE COLLATION caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    CREATE TABLE words (word text COLLATE caseless, tongue text COLLATE {collation},
                        PRIMARY KEY (word, tongue));
    INSERT INTO words VALUES ('a~b', 'en');
    """
    open_ = {"list_rule": "", "view_rule": ""}
    collections = {"words": {"table": "words", **open_}}
    async with (
        service(database_url, tmp_path, collections=collections, schema=schema) as running,
        listener(running.address, "words/*") as words,
    ):
        await running.write.execute("INSERT INTO words VALUES ('A~b', 'de')")
        (created,) = await words.take(1)
        status, listed = await get(running, "words/records", sort="id")
        found, one = await get(running, f"words/records/{created.data['record']['id']}")

    assert (status, found) == (200, 200)
    assert [record["id"] for record in listed["items"]] == ["A!1b~de", "a!1b~en"]
    assert created.data["record"] == one
