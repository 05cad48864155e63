"""A table of one row in a real database, and the record that it makes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

import psycopg
from psycopg import sql

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collection
from pgrealtime.config.model import CollectionConfig
from pgrealtime.records.encode import View, compile_encoder

PINNED = (
    "-c DateStyle=ISO -c TimeZone=UTC -c IntervalStyle=postgres"
    " -c extra_float_digits=1 -c bytea_output=hex"
)
"""The settings of the replication connection, where rows come from."""


class Table:
    """A table ``t`` with the key ``id`` and some columns, and its records."""

    def __init__(self, url: str, columns: str, setup: str = "", **config: Any) -> None:
        self._connection = psycopg.connect(url, autocommit=True, options=PINNED)
        self.execute(setup)
        self.execute(f"CREATE TABLE t (id int PRIMARY KEY, {columns})")
        self.collection = asyncio.run(_collection(url, config))

    def execute(self, statement: str, parameters: Sequence[Any] | None = None) -> list[Any]:
        cursor = self._connection.execute(sql.SQL(statement), parameters)
        return cursor.fetchall() if cursor.description else []

    def insert(self, values: str, parameters: Sequence[Any] | None = None) -> None:
        """Make ``values`` the only row."""
        self.execute("DELETE FROM t")
        self.execute(f"INSERT INTO t VALUES (1, {values})", parameters)

    def row(self) -> Row:
        """Return the only row, as the output functions write it."""
        result = self._connection.pgconn.exec_(b"SELECT * FROM t")
        names = [result.fname(number) for number in range(result.nfields)]
        values = [result.get_value(0, number) for number in range(result.nfields)]
        return {
            name.decode(): None if value is None else value.decode()
            for name, value in zip(names, values, strict=True)
            if name is not None
        }

    def record(self, nulls: Literal["null", "zero"] = "null") -> bytes:
        """Return the only row's record."""
        return compile_encoder(self.collection, nulls=nulls, view=View())(self.row())

    def member(self) -> str:
        """Return the JSON of the member ``v`` alone, byte for byte."""
        return self.shown(self.row())

    def shown(self, row: Row) -> str:
        """Return the JSON of the member ``v`` of any row."""
        text = compile_encoder(self.collection, nulls="null", view=View(fields="v"))(row).decode()
        assert text.startswith('{"v":')
        return text.removeprefix('{"v":').removesuffix("}")

    def close(self) -> None:
        self._connection.close()


async def _collection(url: str, config: dict[str, Any]) -> Collection:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        catalog = await read_catalog(connection, schemas=["public"])
    return build_collections({"t": CollectionConfig(table="public.t", **config)}, catalog)["t"]
