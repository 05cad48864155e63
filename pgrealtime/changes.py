r"""Row changes and transactions, the same for both decoders.

Made by ``wal``, kept by ``changelog``, read by ``hub``. Values are PostgreSQL's text output under
the settings pinned on the replication connection (``wal.server``): booleans ``t`` and ``f``, bytea
``\x...``, dates ISO in UTC. None is SQL NULL. A column that the WAL didn't carry (an unchanged
TOASTed value, a generated column) is *absent* from the row, which is not the same as NULL.

No value can be part of a reference cycle. ``gc=False`` keeps them from the garbage collector, which
would otherwise traverse the whole changelog at each full collection.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct

from pgrealtime.lsn import LSN, Xid

Row: TypeAlias = dict[str, str | None]
"""Column name to text form, in the table's column order."""


class TableName(NamedTuple):
    """Schema and name, exact, unquoted."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


def quote_identifier(name: str) -> str:
    """Return the name as SQL text, always in double quotes."""
    return '"' + name.replace('"', '""') + '"'


def quote_table_name(name: TableName) -> str:
    """Return schema and table as SQL text, each in double quotes."""
    return f"{quote_identifier(name.schema)}.{quote_identifier(name.name)}"


class Key(Struct, frozen=True, gc=False):
    """The replica identity columns of the old row: all that DEFAULT or INDEX log of it."""

    row: Row


class WholeRow(Struct, frozen=True, gc=False):
    """The old row with every column, as REPLICA IDENTITY FULL logs it."""

    row: Row


OldImage: TypeAlias = Key | WholeRow


class Insert(Struct, frozen=True, gc=False):
    """A row was inserted."""

    table: TableName
    new: Row


class Update(Struct, frozen=True, gc=False):
    """A row was updated.

    A ``Key`` holds the identity columns before the update, also if they are unchanged. Unchanged
    TOASTed values that a ``WholeRow`` has are copied to ``new``; a column absent there is unknown.
    """

    table: TableName
    new: Row
    old: OldImage


class Delete(Struct, frozen=True, gc=False):
    """A row was deleted."""

    table: TableName
    old: OldImage


class Truncate(Struct, frozen=True, gc=False):
    """A table was truncated; the WAL doesn't have its rows."""

    table: TableName


Change: TypeAlias = Insert | Update | Delete | Truncate


NEVER_DESCRIBED = -1
"""``RowShape.description_count`` of a decoder that sends no table descriptions, as wal2json."""


class RowShape(Struct, frozen=True, gc=False, cache_hash=True):
    """Columns and types of a row when it was written.

    Equal shapes of one stream are the same object.
    """

    table: TableName
    """Name of the root table, as changes have it."""
    leaf: TableName | None
    """The partition that has or had the row; None if the table isn't partitioned."""
    columns: tuple[tuple[str, int], ...]
    """Names and type oids, without columns of which the WAL has no value."""
    description_count: int = 0
    """How often the stream repeated the partition's description, which it does after a DETACH,
    among others; ``NEVER_DESCRIBED`` where it has no descriptions."""


class Transaction(Struct, frozen=True, gc=False):
    """The changes of one committed transaction to the streamed tables, in order.

    The ordinal of a change is its 1-based index in ``changes``.
    """

    xid: Xid
    end_lsn: LSN
    """End of the commit record: strictly increasing along the stream."""
    commit_time_us: int
    """Microseconds since the Unix epoch by the server's clock; 0 if unknown."""
    changes: tuple[Change, ...]
    size_bytes: int
    """Approximate bytes of memory; the changelog's bound counts them."""
    row_shapes: tuple[RowShape, ...] = ()


class OversizedTransaction(Struct, frozen=True, gc=False):
    """A transaction that exceeded the size limit and was dropped: a gap for its tables."""

    xid: Xid
    end_lsn: LSN
    commit_time_us: int
    tables: frozenset[TableName]


Action: TypeAlias = Literal["create", "update", "delete"]


# -- ids of records that no column holds

RECORD_ID_COLUMN = "record id"
"""The name under which rows have them. A table with a column of that name can't have any."""
DIGEST = "*"
"""The first of the columns by which a record is named, if its id is a digest of the others."""

_ESCAPES = {"!": "!0", "~": "!1", "/": "!2", "?": "!3"}
ID_ESCAPES = tuple(_ESCAPES.items())
"""What is replaced in a value, in this order, before the values are joined with "~"."""
_TO_BE_ESCAPED = re.compile(r"[!~/?]")
_ESCAPED = re.compile(r"!(.?)", re.DOTALL)


def join_id(values: Sequence[str]) -> str:
    """Return the id of a record whose key has several values: ``7~a!1b`` of "7" and "a~b".

    No two keys have the same id. "~" and "!" stand in URLs as they are, and "/" and "?", by which
    topics and paths end, are in no id.
    """
    return "~".join([_TO_BE_ESCAPED.sub(lambda m: _ESCAPES[m[0]], value) for value in values])


def split_id(text: str) -> list[str] | None:
    """Return the values of which ``join_id`` made an id; None if it made none such."""
    if "/" in text or "?" in text:
        return None
    values: list[str] = []
    for part in text.split("~"):
        if any(code not in _UNESCAPES for code in _ESCAPED.findall(part)):
            return None
        values.append(_ESCAPED.sub(lambda m: _UNESCAPES[m[1]], part))
    return values


_UNESCAPES = {escape[1]: character for character, escape in _ESCAPES.items()}


def digest_id(row: Row, names: Iterable[str]) -> str | None:
    """Return the id of a row without a key: 32 hexadecimal digits of its values' SHA-256.

    NULLs are left out, so that a column added later changes no id. Rows that are equal in all
    columns have the same. None if the row lacks a column.
    """
    digest = sha256()
    for name in names:
        if name not in row:
            return None
        if (value := row[name]) is not None:
            digest.update(f"{name}={len(value)}:{value}".encode())
    return digest.hexdigest()[:DIGEST_CHARACTERS]


DIGEST_CHARACTERS = 32
