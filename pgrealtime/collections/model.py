"""Collections, fields and relations as rules and records see them."""

import zlib
from collections.abc import Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Self

from pgrealtime.catalog.model import Column, Table, TableKind, Type
from pgrealtime.changes import TableName


class FieldKind(Enum):
    """PocketBase's type of a field; decides how values are compared and shown."""

    TEXT = "text"
    """Also uuid, enum, citext, char(n), interval, ranges, inet, time, xml: shown as text."""
    NUMBER = "number"
    BOOL = "bool"
    DATE = "date"
    JSON = "json"
    GEO_POINT = "geoPoint"
    RELATION = "relation"
    """The id, or with ``is_multiple`` the ids, of records of another collection."""
    FILE = "file"
    BYTES = "bytes"
    """bytea: shown as base64, not usable in rules."""
    COMPOSITE = "composite"
    """Shown as an object, not usable in rules."""
    GEOMETRY = "geometry"
    """PostGIS' geometry and geography: shown as GeoJSON, usable in rules as geoPoint only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Junction:
    """A table of pairs that makes a many-to-many relation."""

    table: Table
    source_column: str
    """Its column that names the record of this collection."""
    target_column: str
    """Its column that names the related record."""
    updates: bool = True
    """Whether a change of its pairs is an update of the record that shows their ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """The target of a relation field."""

    collection_name: str
    """Name of the collection pointed to."""
    junction: Junction | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of a collection."""

    name: str
    column: Column | None
    """None if the field lives in a junction table."""
    kind: FieldKind
    type: Type
    """Of the column, or of a junction's target column."""
    is_multiple: bool = False
    """An array column, or a relation through a junction table."""
    is_select: bool = False
    """Whether it is PocketBase's select: one of a list of values, or several without repetition.

    Otherwise an array is shown as it is. ``:length`` and ``:each`` apply to both.
    """
    is_hidden: bool = False
    """Shown to superusers only; not usable in client filters; rules may read it."""
    is_secret: bool = False
    """In no record, not even a superuser's: password hash, token key."""
    relation: Relation | None = None

    @property
    def is_stored_as_json(self) -> bool:
        """Whether the column is json or jsonb, not a point or a geometry."""
        return self.type.base.name in {"json", "jsonb"}


@dataclass(frozen=True, slots=True)
class OrderColumn:
    """One column of a collection's default order."""

    column: Column
    is_descending: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """A table with the name, fields and rules under which clients see it."""

    name: str
    id: str
    type: str
    """``base`` or ``auth``."""
    table: Table
    key: Column
    """The column shown as ``id``."""
    fields: tuple[Field, ...]
    """The id included, in the table's column order, junction relations last."""
    list_rule: str | None = None
    view_rule: str | None = None
    manage_rule: str | None = None
    auth_rule: str | None = ""
    order: tuple[OrderColumn, ...] = ()
    """The default order of lists, which is total: it ends with the key or is unique before."""
    mirrors: Literal["on_request", "always", "off"] = "on_request"
    """Which topics are mirrors: those that ask, all, or none."""
    is_streamed: bool = True
    """Whether its changes are delivered; otherwise it can be read only."""
    fields_by_name: Mapping[str, Field] = field(default_factory=dict, repr=False, compare=False)
    column_names: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """Names of all columns of the table."""
    generated_columns: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @property
    def is_view(self) -> bool:
        """Whether it shows a view, as PocketBase's view collections do."""
        return self.table.kind in {TableKind.VIEW, TableKind.MATERIALIZED_VIEW}

    @property
    def has_unique_key(self) -> bool:
        """Whether the table guarantees that no two rows have the same id; a view does not."""
        return (self.key.name,) in self.table.unique_keys

    @property
    def sends_creates_only(self) -> bool:
        """Whether its updates and deletes are not in the WAL: it has no key of any kind."""
        return self.key.is_digest and self.key.name not in self.table.replica_identity_columns

    @property
    def id_lookup_column(self) -> tuple[TableName, str]:
        """The table and its key column: how changes of a record are found in the changelog."""
        return self.table.name, self.key.name

    def __post_init__(self) -> None:
        generated = frozenset(c.name for c in self.table.columns if c.is_generated)
        object.__setattr__(self, "generated_columns", generated)
        object.__setattr__(self, "fields_by_name", {f.name: f for f in self.fields})
        object.__setattr__(self, "column_names", frozenset(c.name for c in self.table.columns))

    def is_mirrored(self, *, asks: bool) -> bool:
        """Whether a topic is a mirror, which asks to be one or doesn't."""
        return self.mirrors == "always" or (asks and self.mirrors == "on_request")

    def column_of(self, field_name: str) -> Column | None:
        """Return the column of the field; None if there is no such field or it has none."""
        field = self.fields_by_name.get(field_name)
        return None if field is None else field.column


class Collections(Mapping[str, Collection]):
    """All collections, by name, id and table.

    ``claim_names`` are those under which rules read claims of tokens: ``@request.auth.NAME``. With
    ``is_strict`` no filter or sort finds out an e-mail address that isn't shown, or a value of a
    row that isn't listed (``records.hidden``).
    """

    def __init__(
        self,
        collections: tuple[Collection, ...],
        *,
        server_encoding: str = "UTF8",
        claim_names: frozenset[str] = frozenset(),
        is_strict: bool = False,
    ) -> None:
        self.server_encoding = server_encoding
        self.claim_names = claim_names
        self.is_strict = is_strict
        self._by_name = {c.name: c for c in collections}
        self._by_id = {c.id: c for c in collections}
        self._by_table = {c.table.name: c for c in collections}
        self._by_folded_name = {c.name.casefold(): c for c in collections}

    def __getitem__(self, name: str) -> Collection:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def values(self) -> ValuesView[Collection]:
        """Return the collections, without a look-up by name for each."""
        return self._by_name.values()

    def find(self, name_or_id: str) -> Collection | None:
        """Return the collection of that name or id, case sensitive as in topics."""
        return self._by_name.get(name_or_id) or self._by_id.get(name_or_id)

    def find_ignoring_case(self, name_or_id: str) -> Collection | None:
        """Return the collection of that id, or of a name whose case doesn't matter.

        So paths of requests and ``expand`` name collections.
        """
        return self.find(name_or_id) or self._by_folded_name.get(name_or_id.casefold())

    def find_streamed(self, name_or_id: str) -> Collection | None:
        """Return the collection of a topic: like ``find``, but none that can be read only."""
        collection = self.find(name_or_id)
        return collection if collection is not None and collection.is_streamed else None

    def replace_all(self, collections: tuple[Collection, ...]) -> Self:
        """Return other collections with the same settings."""
        return type(self)(
            collections,
            server_encoding=self.server_encoding,
            claim_names=self.claim_names,
            is_strict=self.is_strict,
        )

    def find_by_table(self, table: TableName) -> Collection | None:
        """Return the collection of the table."""
        return self._by_table.get(table)


def derive_collection_id(kind: str, name: str) -> str:
    """Return the id that PocketBase derives: ``pbc_`` and the CRC-32 of type and name."""
    return f"pbc_{zlib.crc32(f'{kind}{name}'.encode())}"


def unpadded_id(collection: Collection, key: str) -> str:
    """The id as callers carry it, from the key's text in a row.

    Padding is no part of a char(n): casts and comparisons drop it.
    """
    return key.rstrip(" ") if collection.key.type.base.name == "bpchar" else key
