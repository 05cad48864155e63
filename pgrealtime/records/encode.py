"""Makes a record, the JSON that a subscriber receives, of a row. Called by the hub per change.

An encoder is compiled once per collection and view; the caller keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from pgrealtime.changes import Row
from pgrealtime.collections import Collection, Field
from pgrealtime.records.values import Converter, converter, ids, quote, zero

Nulls = Literal["null", "zero"]

_NONE_RELATED: Mapping[str, Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a group of subscribers sees of a record. Subscribers with equal views share bytes."""

    sees_hidden: bool = False
    """Superusers do."""
    sees_email: bool = False
    """Superusers, the record itself, and whom the manage rule admits."""
    fields: str | None = None
    """The option of that name, as the client gave it."""


class RecordEncoder(Protocol):
    """Makes records of rows."""

    def __call__(
        self,
        row: Row,
        related: Mapping[str, Sequence[str]] = _NONE_RELATED,
        expand: bytes | None = None,
    ) -> bytes:
        """Return the record as one line of JSON, members sorted by name.

        Args:
            row: The whole row. A column that isn't in it is a member that isn't in the record:
                whoever has a row with unknown columns looks them up before.
            related: Ids by field name, for relations through a junction table, which no row
                holds. A field without an entry is left out, as an absent column is.
            expand: The JSON object of that member, None for a record without one.
        """


class _Member(NamedTuple):
    """One member of the object: where its value is in the row, and how it is written."""

    column: str
    absent: bytes
    """Written if the row has no such column: nothing, or a constant member."""
    null: bytes
    head: bytes
    convert: Converter


def encoder(collection: Collection, *, nulls: Nulls, view: View) -> RecordEncoder:
    """Return the function that makes the records of the collection for that view.

    Args:
        collection: Whose rows will come.
        nulls: What SQL NULL is shown as: null, or PocketBase's zero value of the field.
        view: Who looks.
    """
    fields = [
        field
        for field in collection.fields
        if not field.is_secret and (view.sees_hidden or not field.is_hidden)
    ]
    members = _members(collection, fields, nulls)
    if collection.type != "auth" or view.sees_email or "email" not in members:
        return _writer(members)
    with_email = _writer(members)
    without_email = _writer({name: m for name, m in members.items() if name != "email"})
    visibility = collection.by_name.get("emailVisibility")
    if visibility is None or visibility.column is None:
        return without_email
    column = visibility.column.name

    def record(
        row: Row,
        related: Mapping[str, Sequence[str]] = _NONE_RELATED,
        expand: bytes | None = None,
    ) -> bytes:
        write = with_email if row.get(column) == "t" else without_email
        return write(row, related, expand)

    return record


def _members(collection: Collection, fields: Sequence[Field], nulls: Nulls) -> dict[str, _Member]:
    members = {field.name: _of_field(field, nulls) for field in fields}
    members["collectionId"] = _constant("collectionId", quote(collection.id))
    members["collectionName"] = _constant("collectionName", quote(collection.name))
    members["expand"] = _given("expand")
    return members


def _of_field(field: Field, nulls: Nulls) -> _Member:
    if field.column is None:
        return _given(field.name)
    head = quote(field.name) + b":"
    null = head + (zero(field) if nulls == "zero" else b"null")
    # The id is a string whatever the key's type.
    convert = quote if field.name == "id" else converter(field)
    return _Member(field.column.name, b"", null, head, convert)


def _given(name: str) -> _Member:
    head = quote(name) + b":"
    return _Member(_key(name), b"", head + b"null", head, str.encode)


def _key(name: str) -> str:
    """Return under which name ``_writer`` puts JSON that isn't from the row beside its columns."""
    return f"\0{name}"


def _constant(name: str, value: bytes) -> _Member:
    part = quote(name) + b":" + value
    return _Member("\0", part, b"", b"", str.encode)


def _writer(by_name: Mapping[str, _Member]) -> RecordEncoder:
    members = [by_name[name] for name in sorted(by_name, key=str.encode)]

    def record(
        row: Row,
        related: Mapping[str, Sequence[str]] = _NONE_RELATED,
        expand: bytes | None = None,
    ) -> bytes:
        if related or expand is not None:
            row = row | {_key(name): ids(values).decode() for name, values in related.items()}
            if expand is not None:
                row[_key("expand")] = expand.decode()
        parts = []
        get = row.get
        for column, absent, null, head, convert in members:
            value = get(column, absent)
            if isinstance(value, str):
                parts.append(head + convert(value))
            elif value is None:
                parts.append(null)
            elif value:
                parts.append(value)
        return b"{%b}" % b",".join(parts)

    return record
