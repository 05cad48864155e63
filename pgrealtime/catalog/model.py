"""Tables, columns, keys and types as frozen values, as ``introspect`` reads them; ids of a key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pgrealtime.changes import TableName, join_id, split_id


class ReplicaIdentity(Enum):
    """What an UPDATE or DELETE logs of the old row (``pg_class.relreplident``)."""

    DEFAULT = "d"
    NOTHING = "n"
    FULL = "f"
    INDEX = "i"


class TypeKind(Enum):
    """``pg_type.typtype``, and ``ARRAY`` for types of ``typcategory`` A."""

    BASE = "b"
    COMPOSITE = "c"
    DOMAIN = "d"
    ENUM = "e"
    PSEUDO = "p"
    RANGE = "r"
    MULTIRANGE = "m"
    ARRAY = "A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Type:
    """A data type; ``base`` is the type below its domains."""

    oid: int
    schema: str
    name: str
    kind: TypeKind
    category: str
    """``pg_type.typcategory``: S string, N numeric, B boolean, D date/time, ..."""
    element: Type | None = None
    """Of an array: the type of its elements."""
    domain_of: Type | None = None
    """Of a domain: the type it constrains."""
    attributes: tuple[tuple[str, Type], ...] = ()
    """Of a composite: names and types of its attributes, in order."""
    delimiter: str = ","
    """``pg_type.typdelim``: what stands between the elements of an array of it."""
    extension: str = ""
    """The extension that the type came with, such as ``postgis``."""
    id_parts: tuple[Type, ...] = ()
    """Of a record id made of several columns (``catalog.record_ids``): their types, in order."""

    @property
    def base(self) -> Type:
        """The type below all domains; itself if it is none."""
        return self if self.domain_of is None else self.domain_of.base


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column, as the table defines it."""

    name: str
    attribute_number: int
    """``attnum``, 1-based; dropped columns leave holes."""
    type: Type
    type_modifier: int = -1
    not_null: bool = False
    is_generated: bool = False
    is_toastable: bool = False
    """Whether long values are TOASTed. An update that doesn't change such a value doesn't log it,
    unless the whole old row is logged."""
    is_deterministic: bool = True
    """False under a nondeterministic collation, where equal texts need not be the same bytes."""
    id_sources: tuple[str, ...] = ()
    """Of a record id that no column holds: the columns that it is computed of."""
    is_digest: bool = False
    """Whether that id is a digest of them, and not their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignKey:
    """A foreign key: ``column_names`` here point to ``target_column_names`` there, pairwise."""

    name: str
    column_names: tuple[str, ...]
    target: TableName
    target_column_names: tuple[str, ...]
    is_validated: bool = True
    """Whether every row has a target, also one that was there before the foreign key."""


class TableKind(Enum):
    """``pg_class.relkind``."""

    TABLE = "r"
    PARTITIONED = "p"
    VIEW = "v"
    MATERIALIZED_VIEW = "m"
    FOREIGN = "f"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table, view or foreign table."""

    oid: int
    name: TableName
    kind: TableKind
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()
    unique_keys: tuple[tuple[str, ...], ...] = ()
    """Column sets of valid, full, non-deferrable unique indexes without expressions."""
    index_prefixes: tuple[tuple[str, ...], ...] = ()
    """Leading plain columns of every valid full index, unique ones included."""
    replica_identity: ReplicaIdentity = ReplicaIdentity.DEFAULT
    """Of a partitioned table: what all its leaves log at least; each has its own."""
    replica_identity_columns: tuple[str, ...] = ()
    """The columns that DEFAULT or INDEX log; every column with FULL; none with NOTHING."""
    is_unlogged: bool = False
    leaves: tuple[TableName, ...] = ()
    """Of a partitioned table: the partitions that hold rows, under whose names they stream."""
    partition_of: TableName | None = None
    """Of a partition: the root of the tree it is in."""
    partition_columns: tuple[str, ...] = ()
    """Of a partitioned table: the columns of its partition key, and of those of its partitions."""

    def is_unique_but_for_partitions(self, name: str) -> bool:
        """Whether a column is unique together with the partition key alone.

        Every unique constraint of a partitioned table has to include that (PostgreSQL docs, "Table
        Partitioning"), so that none can say that the column is unique by itself.
        """
        return bool(self.partition_columns) and any(
            name in key and {*key} - {name} <= {*self.partition_columns} for key in self.unique_keys
        )

    @property
    def has_digest_id(self) -> bool:
        """Whether its rows have no key, and the digest of a row is its id."""
        return self.id_column is not None and self.id_column.is_digest

    @property
    def id_column(self) -> Column | None:
        """The computed record id, if it has one; see ``catalog.record_ids``."""
        last = self.columns[-1] if self.columns else None
        return last if last is not None and last.id_sources else None

    def find_column(self, name: str) -> Column | None:
        """The column of that name, or None."""
        return next((column for column in self.columns if column.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """The tables that were read, with their server's version and encoding."""

    tables: Mapping[TableName, Table]
    server_version: int
    """As ``server_version_num``: 170002."""
    server_encoding: str = "UTF8"
    schemas: tuple[str, ...] = ("public",)


_INTEGER_BITS: Final = {"int2": 16, "int4": 32, "int8": 64}
_ANY_TEXT: Final = frozenset({"text", "varchar", "bpchar", "name"})
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def canonical_id(text: str, key: Type) -> str | None:
    """Return the id as the key's type prints it, or None if no row can have it.

    To PostgreSQL "12" for a uuid column is an error; here it is an id that no row has. So is "007"
    for an integer, whose text is "7".
    """
    if key.id_parts:
        return _canonical_joined_id(text, key.id_parts)
    base = key.base
    if bits := _INTEGER_BITS.get(base.name):
        is_number = _INTEGER.fullmatch(text) is not None
        return text if is_number and -(1 << bits - 1) <= int(text) < 1 << bits - 1 else None
    if base.name == "uuid":
        return text.lower() if _UUID.fullmatch(text) else None
    # Postgres has no U+0000 in texts.
    return None if "\x00" in text else text


def _canonical_joined_id(text: str, parts: tuple[Type, ...]) -> str | None:
    values = split_id(text)
    if values is None or len(values) != len(parts):
        return None
    canonical = [canonical_id(*pair) for pair in zip(values, parts, strict=True)]
    known = [value for value in canonical if value is not None]
    return join_id(known) if len(known) == len(parts) else None


def native_key_type(type_: Type) -> str | None:
    """Return the built-in type to compare ids of this type in, so that the key's index serves.

    A domain counts as its base type. None if ids are compared as texts: citext, enums.
    """
    name = type_.base.name
    if type_.base.schema != "pg_catalog":
        return None
    return name if name in _INTEGER_BITS or name in _ANY_TEXT or name == "uuid" else None
