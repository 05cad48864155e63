"""Time to encode a record, against msgspec encoding a dict of the same values as a lower bound.

python -m tests.bench.records
"""

from __future__ import annotations

import platform
import timeit
from collections.abc import Callable

import msgspec

from pgrealtime.catalog.model import Column, Table, TableKind
from pgrealtime.changes import Row, TableName
from pgrealtime.collections.model import Collection, Field, FieldKind
from pgrealtime.records.encode import View, compile_encoder
from tests.column_types import base_type

COLUMNS = {
    "id": (FieldKind.TEXT, "uuid", "0195b7a0-0000-7000-8000-000000000001"),
    "title": (FieldKind.TEXT, "text", "Hello world"),
    "body": (FieldKind.TEXT, "text", "Some longer text, a sentence or two. " * 3),
    "views": (FieldKind.NUMBER, "int4", "12"),
    "score": (FieldKind.NUMBER, "float8", "12.5"),
    "active": (FieldKind.BOOL, "bool", "t"),
    "created": (FieldKind.DATE, "timestamptz", "2024-02-03 04:05:06.789012+00"),
    "author": (FieldKind.RELATION, "text", "memberann000001"),
}
CALLS = 200_000


def posts() -> Collection:
    fields = []
    for number, (name, (kind, type_name, _)) in enumerate(COLUMNS.items(), start=1):
        data_type = base_type(type_name, oid=number)
        column = Column(name=name, attribute_number=number, type=data_type)
        fields.append(Field(name=name, column=column, kind=kind, type=data_type))
    key = fields[0].column
    assert key is not None
    table = Table(oid=1, name=TableName("public", "posts"), kind=TableKind.TABLE, columns=(key,))
    return Collection(
        name="posts", id="pbc_1", type="base", table=table, key=key, fields=tuple(fields)
    )


def microseconds(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=7)) / CALLS * 1e6


def main() -> None:
    row: Row = {name: text for name, (_, _, text) in COLUMNS.items()}
    encode = compile_encoder(posts(), nulls="null", view=View())
    values = msgspec.json.decode(encode(row))
    write = msgspec.json.Encoder().encode
    ours, theirs = microseconds(lambda: encode(row)), microseconds(lambda: write(values))
    print(f"Python {platform.python_version()}, msgspec {msgspec.__version__}")
    print(f"record of {len(row)} columns {ours:.2f} us")
    print(f"msgspec, the same values {theirs:.2f} us, ratio {ours / theirs:.1f}")


if __name__ == "__main__":
    main()
