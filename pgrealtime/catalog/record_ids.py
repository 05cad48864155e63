"""Ids of records that no column holds: of a primary key of several columns, of a table without any.

Such a table gets one more column, computed from others. The stream's rows have it
(``wal.assembler``), and so have the rows that statements read: ``id_expression`` is its SQL.
``changes.join_id`` and ``changes.digest_id`` compute the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from pgrealtime.catalog.model import Column, Table, Type, TypeKind, native_key_type
from pgrealtime.changes import (
    DIGEST,
    DIGEST_CHARACTERS,
    ID_ESCAPES,
    RECORD_ID_COLUMN,
    quote_identifier,
    quote_table_name,
)

_TEXT: Final = Type(oid=25, schema="pg_catalog", name="text", kind=TypeKind.BASE, category="S")
_PLAIN_TYPES: Final = frozenset({"int2", "int4", "int8", "uuid"})
"""Types whose texts need no escapes."""
_MAX_ARGUMENTS = 50
"""Texts joined by one call; PostgreSQL has at most 100."""


def with_joined_id(table: Table, names: Sequence[str]) -> Table:
    """Return the table with an id made of the values of columns, none of which may be NULL."""
    sources = [column for name in names if (column := table.find_column(name)) is not None]
    type_ = replace(_TEXT, id_parts=tuple(column.type for column in sources))
    return _with_id_column(table, tuple(names), type_, is_digest=False)


def with_digest_id(table: Table, names: Sequence[str]) -> Table:
    """Return the table with an id that is a digest of the values of columns."""
    return _with_id_column(table, tuple(sorted(names)), _TEXT, is_digest=True)


def _with_id_column(table: Table, names: tuple[str, ...], type_: Type, *, is_digest: bool) -> Table:
    column = Column(
        name=RECORD_ID_COLUMN,
        attribute_number=0,
        type=type_,
        not_null=True,
        id_sources=names,
        is_digest=is_digest,
    )
    is_unique = any({*key} == {*names} for key in table.unique_keys)
    is_logged = {*names} <= {*table.replica_identity_columns}
    return replace(
        table,
        columns=(*table.columns, column),
        unique_keys=(*table.unique_keys, *([(column.name,)] if is_unique else [])),
        replica_identity_columns=(
            *table.replica_identity_columns,
            *([column.name] if is_logged else []),
        ),
    )


def with_record_key(table: Table, names: Sequence[str]) -> Table:
    """Return the table with the computed id of ``record_key``, if that is one."""
    if len(names) <= 1 or table.id_column is not None:
        return table
    if names[0] == DIGEST:
        return with_digest_id(table, names[1:])
    return with_joined_id(table, names)


def record_key(key: Column) -> tuple[str, ...]:
    """Return the columns that name a record, for ``wal.assembler``."""
    if not key.id_sources:
        return (key.name,)
    return (DIGEST, *key.id_sources) if key.is_digest else key.id_sources


# -- SQL. Names and literals are escaped for statements that psycopg runs with parameters.


def id_expression(key: Column, alias: str) -> str:
    """Return the SQL of a computed id."""
    if key.is_digest:
        texts = [_digested(_qualified(alias, name), name) for name in key.id_sources]
        return (
            "pg_catalog.left(pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to("
            f"{_concatenated(texts)}, 'UTF8')), 'hex'), {DIGEST_CHARACTERS})"
        )
    pairs = zip(key.id_sources, key.type.id_parts, strict=True)
    parts = [_escaped(_qualified(alias, name), type_) for name, type_ in pairs]
    return f"pg_catalog.concat_ws('~', {', '.join(parts)})"


def table_with_id(table: Table) -> str:
    """Return a SELECT of a table's columns and its computed id, in brackets."""
    assert table.id_column is not None
    expression = id_expression(table.id_column, "t")
    name = quote_table_name(table.name).replace("%", "%%")
    column = f"{expression} AS {quote_identifier(RECORD_ID_COLUMN)}"
    return f"(SELECT t.*, {column} FROM {name} t)"  # noqa: S608 (names are quoted)


def part_conditions(key: Column, alias: str, id_sql: str) -> Iterator[str]:
    """Yield conditions that an index of the primary key serves; ``id_sql`` is a canonical id.

    They don't decide: the computed id does.
    """
    for number, (name, type_) in enumerate(zip(key.id_sources, key.type.id_parts, strict=False), 1):
        native = native_key_type(type_)
        if native is None or native == "bpchar":
            continue
        value = f"pg_catalog.split_part({id_sql}, '~', {number})"
        if native not in _PLAIN_TYPES:
            for character, escape in reversed(ID_ESCAPES):
                value = f"pg_catalog.replace({value}, '{escape}', '{character}')"
        column = _qualified(alias, name)
        yield f"{column} OPERATOR(pg_catalog.=) {value}::pg_catalog.{native}"


def _qualified(alias: str, name: str) -> str:
    return f"{alias}.{quote_identifier(name).replace('%', '%%')}"


def _escaped(column: str, type_: Type) -> str:
    """Return a value's text, as its type's output function has it, with escapes."""
    if type_.base.name in _PLAIN_TYPES:
        return column
    # Not a cast, which has other texts for some types, as "true" for "t". Padding is no part of an
    # id; the stream tells it from a domain's, which is kept.
    is_padded = type_.name == "bpchar"
    text = f"{column}::pg_catalog.text" if is_padded else f"pg_catalog.concat({column})"
    # Its own may not allow to search in it, and those of two parts may differ.
    text = f'({text} COLLATE pg_catalog."C")'
    for character, escape in ID_ESCAPES:
        text = f"pg_catalog.replace({text}, '{character}', '{escape}')"
    return text


def _digested(column: str, name: str) -> str:
    literal = "'" + name.replace("'", "''").replace("%", "%%") + "='"
    text = f'(pg_catalog.concat({column}) COLLATE pg_catalog."C")'
    shown = f"pg_catalog.concat({literal}, pg_catalog.length({text}), ':', {text})"
    # "IS NULL" is true of a composite value whose attributes are NULL.
    return f"CASE pg_catalog.num_nulls({column}) WHEN 0 THEN {shown} ELSE '' END"


def _concatenated(texts: Sequence[str]) -> str:
    calls = [
        f"pg_catalog.concat({', '.join(texts[first : first + _MAX_ARGUMENTS])})"
        for first in range(0, len(texts), _MAX_ARGUMENTS)
    ]
    return calls[0] if len(calls) == 1 else _concatenated(calls)
