"""wal2json and pgoutput decode the same transactions from the same workload."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
import pytest

from pgrealtime.changes import (
    Delete,
    Insert,
    Key,
    OldImage,
    OversizedTransaction,
    Row,
    TableName,
    Transaction,
    Truncate,
    Update,
    WholeRow,
)
from pgrealtime.wal.assembler import RecordKeys
from tests.stream_reading import finish, read_to_finish, reading, writer
from tests.workloads import SCHEMA, WORKLOADS, statements

IMPOSED: Mapping[TableName, tuple[str, ...]] = {
    # Before PostgreSQL 18 pgoutput leaves out generated columns; wal2json has the stored ones.
    TableName("public", "generated"): ("doubled",)
}
"""Columns in which the server makes the decoders differ."""

RECORD_KEYS: RecordKeys = {TableName("public", "parts"): ("id",)}


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
async def test_both_decoders_return_the_same_transactions(database_url: str, workload: str) -> None:
    """The decoder that a server permits makes no difference to subscribers."""
    async with writer(database_url) as connection:
        for statement in statements(SCHEMA):
            await connection.execute(statement.encode())
        async with (
            reading(database_url, connection, "wal2json", record_keys=RECORD_KEYS) as one,
            reading(database_url, connection, "pgoutput", record_keys=RECORD_KEYS) as other,
        ):
            for statement in statements(workload):
                await connection.execute(statement.encode())
            await finish(connection)
            wal2json, pgoutput = await asyncio.gather(read_to_finish(one), read_to_finish(other))
    assert len(wal2json) > 3
    assert [_comparable(one) for one in wal2json] == [_comparable(one) for one in pgoutput]
    assert [_rows_in_order(one) for one in wal2json] == [_rows_in_order(one) for one in pgoutput]
    for named, described in zip(wal2json, pgoutput, strict=True):
        assert _types(named) <= _types(described)


def _comparable(one: Transaction | OversizedTransaction) -> Transaction:
    assert isinstance(one, Transaction)
    changes = tuple(map(_shared, one.changes))
    return msgspec.structs.replace(one, size_bytes=0, changes=changes, row_shapes=())


def _types(one: Transaction | OversizedTransaction) -> set[tuple[object, ...]]:
    """Return the columns' types; wal2json names only the columns that it has values of."""
    assert isinstance(one, Transaction)
    return {
        (shape.table, shape.leaf, name, oid)
        for shape in one.row_shapes
        for name, oid in shape.columns
        if name not in IMPOSED.get(shape.table, ())
    }


def _shared(change: Insert | Update | Delete | Truncate) -> Insert | Update | Delete | Truncate:
    """Return the change without what the server makes different."""
    imposed = IMPOSED.get(change.table, ())
    match change:
        case Insert(table, new):
            return Insert(table, _without(new, imposed))
        case Update(table, new, old):
            return Update(table, _without(new, imposed), _old_without(old, imposed))
        case Delete(table, old):
            return Delete(table, _old_without(old, imposed))
        case Truncate():
            return change


def _without(row: Row, columns: tuple[str, ...]) -> Row:
    return {name: value for name, value in row.items() if name not in columns}


def _old_without(old: OldImage, columns: tuple[str, ...]) -> OldImage:
    match old:
        case Key(row):
            return Key(_without(row, columns))
        case WholeRow(row):
            return WholeRow(_without(row, columns))


def _rows_in_order(one: Transaction | OversizedTransaction) -> list[list[str]]:
    """Return column names in order, which the equality of dicts ignores."""
    return [
        [*row]
        for change in _comparable(one).changes
        for row in (
            *((change.new,) if isinstance(change, Insert | Update) else ()),
            *((change.old.row,) if isinstance(change, Update | Delete) else ()),
        )
    ]
