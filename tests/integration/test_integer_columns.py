"""Filters on integer columns: an index serves them, and they mean what numbers and texts mean."""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.compiler import ListCompiler
from pgrealtime.rules.language.request import RuleRequest

ROWS = 2_000
LEAST, MOST = -(1 << 63), (1 << 63) - 1
EDGES = {"smallint": (-(1 << 15), (1 << 15) - 1), "int": (-(1 << 31), (1 << 31) - 1)}


class Things:
    """A table whose key, relation and number are of one integer type."""

    def __init__(self, pool: QueryPool, collections: Collections, edges: tuple[int, int]) -> None:
        self._pool = pool
        self._compiler = ListCompiler(collections)
        self._collections = collections
        self.numbers = (*range(1, ROWS + 1), *edges, None)

    async def run(self, filter_text: str, prefix: str = "") -> list[tuple[Any, ...]]:
        """Return what PostgreSQL answers to the statement of a list, or to a prefix with it."""
        owner = self._collections["owners"]
        caller = AuthRecord(collection_id=owner.id, collection_name=owner.name, id="42")
        bound = await self._compiler.bind(
            self._collections["things"], filter_text, RuleRequest(principal=caller)
        )
        limits = {"limit": 10 * ROWS, "offset": 0, "max_joined_rows": 1}
        async with self._pool.connection() as connection:
            statement = f"{prefix} {bound.sql.page}".encode()
            return await (
                await connection.execute(statement, {**bound.params, **limits})
            ).fetchall()

    async def indexes(self, filter_text: str) -> list[str]:
        """Return the conditions by which indexes serve a filter."""
        lines = [line for (line,) in await self.run(filter_text, "EXPLAIN")]
        return [line.strip() for line in lines if "Index Cond" in line]


@pytest.fixture(params=["smallint", "int", "bigint"])
async def things(database_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Things]:
    type_ = request.param
    edges = EDGES.get(type_, (LEAST, MOST))
    schema = f"""
    CREATE TABLE owners (id {type_} PRIMARY KEY);
    INSERT INTO owners SELECT generate_series(1, {ROWS});
    CREATE TABLE things (id {type_} PRIMARY KEY, owner {type_} REFERENCES owners, n {type_});
    INSERT INTO things SELECT i, i, i FROM generate_series(1, {ROWS}) i;
    INSERT INTO things VALUES (0, 1, {edges[0]}), (-1, 1, {edges[1]}), (-2, 1, NULL);
    CREATE INDEX ON things (owner);
    CREATE INDEX ON things (n);
    ANALYZE owners, things;
    """
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(schema.encode())
        configured = {
            "owners": {"table": "owners", "type": "auth", "list_rule": ""},
            "things": {"table": "things", "list_rule": ""},
        }
        collections = build_collections(
            {name: CollectionConfig.model_validate(one) for name, one in configured.items()},
            await read_catalog(connection, schemas=["public"]),
        )
    async with QueryPool(database_url) as pool:
        yield Things(pool, collections, edges)


@pytest.mark.parametrize(
    ("filter_text", "condition", "count"),
    [
        ("id = '42'", "(id = '42'::bigint)", 1),
        ("'42' ?= id", "(id = '42'::bigint)", 1),
        ("owner = '42'", "(owner = '42'::bigint)", 1),
        ("owner.id = '42'", "(owner = '42'::bigint)", 1),
        ("owner = @request.auth.id", "(owner = '42'::bigint)", 1),
        ("n = 42", "(n = '42'::bigint)", 1),
        ("n = '42'", "(n = '42'::bigint)", 1),
        ("n > 1998.5 && 2001 > n", "((n >= '1998'::bigint) AND (n <= '2001'::bigint))", 2),
    ],
)
async def test_index_finds_what_equals_a_value_or_lies_between_two(
    things: Things, filter_text: str, condition: str, count: int
) -> None:
    """As PocketBase's index on a text key does; a number column is not cast."""
    assert await things.indexes(filter_text) == [f"Index Cond: {condition}"]
    assert len(await things.run(filter_text)) == count


@pytest.mark.parametrize("column", ["id", "owner"])
@pytest.mark.parametrize("text", ["042", "42.0", " 42", "+42", "4e1", "x", "9" * 30, "-0", ""])
async def test_a_text_that_is_no_canonical_number_is_nobodys_id(
    things: Things, column: str, text: str
) -> None:
    """And no error of PostgreSQL: ids are texts, which differ."""
    assert await things.run(f"{column} = '{text}'") == []


ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
NUMBERS = [
    "5",
    "5.5",
    "-0.5",
    f"{LEAST}",
    f"{MOST}",
    "-9" + "0" * 25,
    "9" * 25,
    "32767",
    "65536.25",
]


@pytest.mark.parametrize("op", ORDERS)
@pytest.mark.parametrize("is_text", [False, True])
async def test_a_number_column_is_compared_exactly(
    things: Things, op: str, *, is_text: bool
) -> None:
    """Also with numbers between integers, and beyond the largest; NULL only differs."""
    for number in NUMBERS:
        literal = f"'{number}'" if is_text else number
        found = len(await things.run(f"n {op} {literal}"))
        mirrored = len(await things.run(f"{literal} {op} n"))
        values = [value for value in things.numbers if value is not None]
        nulls = int(op == "!=")
        wanted = Decimal(number)
        assert found == nulls + sum(ORDERS[op](Decimal(value), wanted) for value in values)
        assert mirrored == nulls + sum(ORDERS[op](wanted, Decimal(value)) for value in values)
