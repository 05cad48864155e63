"""The catalogue confirms what is assumed of a table exactly as long as its definition matches."""

from __future__ import annotations

import psycopg
import pytest

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import NEVER_DESCRIBED, RowShape, TableName, Transaction
from pgrealtime.collections.build import build_collections
from pgrealtime.hub.events.row_shapes import TableDefinitions
from pgrealtime.lsn import LSN, Xid
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.rule_queries.executor import QueryExecutor
from tests.config_values import parse_config

SCHEMA = """
CREATE TYPE "In ner" AS (a text, "b c" int);
CREATE TYPE outside AS (x "In ner"[], y text);
CREATE DOMAIN outdoors AS outside;
CREATE TABLE t (id int PRIMARY KEY, place outdoors[]) PARTITION BY RANGE (id);
CREATE TABLE part (id int NOT NULL PRIMARY KEY, place outdoors[]) PARTITION BY RANGE (id);
ALTER TABLE t ATTACH PARTITION part FOR VALUES FROM (0) TO (100);
CREATE TABLE "Leaf 1" PARTITION OF part FOR VALUES FROM (0) TO (50);
CREATE TABLE leaf_2 PARTITION OF part FOR VALUES FROM (50) TO (100);
CREATE TABLE other (id int PRIMARY KEY, place outdoors[]) PARTITION BY RANGE (id);
CREATE TYPE elsewhere AS (a text);
"""
LEAF = TableName("public", "Leaf 1")


@pytest.mark.parametrize(
    ("statements", "is_so"),
    [
        pytest.param("ALTER TABLE t ADD COLUMN n int", True, id="a column"),
        pytest.param("ALTER TYPE elsewhere ADD ATTRIBUTE b int", True, id="another type"),
        pytest.param("ALTER TABLE part DETACH PARTITION leaf_2", True, id="another partition"),
        pytest.param('ALTER TABLE part DETACH PARTITION "Leaf 1"', False, id="detached"),
        pytest.param("ALTER TABLE t DETACH PARTITION part", False, id="detached above"),
        pytest.param(
            'ALTER TABLE part DETACH PARTITION "Leaf 1";'
            'ALTER TABLE other ATTACH PARTITION "Leaf 1" FOR VALUES FROM (0) TO (50)',
            False,
            id="attached elsewhere",
        ),
        pytest.param(
            'DROP TABLE "Leaf 1"; CREATE TABLE "Leaf 1" (id int PRIMARY KEY)', False, id="replaced"
        ),
        pytest.param('ALTER TYPE "In ner" ADD ATTRIBUTE d int', False, id="attribute added"),
        pytest.param('ALTER TYPE "In ner" RENAME ATTRIBUTE a TO z', False, id="renamed"),
        pytest.param("ALTER TYPE outside DROP ATTRIBUTE y", False, id="dropped"),
    ],
)
async def test_changes_that_no_decoder_reports_are_seen_in_the_catalogue(
    database_url: str, statements: str, *, is_so: bool
) -> None:
    config = parse_config(
        {
            "version": 1,
            "database": {"url": database_url},
            "collections": {"t": {"table": "t", "list_rule": ""}},
        }
    )
    names = [TableName("public", "t")]
    shape = RowShape(names[0], LEAF, (), NEVER_DESCRIBED)
    row = Transaction(Xid(3), LSN(8), 0, (), 0, (shape,))
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin,
        QueryPool(database_url) as pool,
    ):
        await admin.execute(SCHEMA.encode())
        before = build_collections(config.collections, await read_catalog(admin, names=names))
        assumptions = TableDefinitions(before).assumptions_for([row])
        assert assumptions is not None
        assert await QueryExecutor(pool).verify_assumptions(assumptions)
        await admin.execute(statements.encode())

        assert await QueryExecutor(pool).verify_assumptions(assumptions) is is_so
        after = build_collections(config.collections, await read_catalog(admin, names=names))
        again = TableDefinitions(after).assumptions_for([row])
        assert (again == assumptions) is is_so
        assert again is None or await QueryExecutor(pool).verify_assumptions(again)
