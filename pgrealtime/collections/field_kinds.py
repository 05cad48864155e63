"""The kind of field of each column type, and the field names with a fixed meaning."""

from collections.abc import Mapping
from typing import Final

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.collections.model import FieldKind

_KIND_BY_TYPE: Final = {
    **dict.fromkeys(("int2", "int4", "int8", "numeric", "float4", "float8"), FieldKind.NUMBER),
    "bool": FieldKind.BOOL,
    **dict.fromkeys(("date", "timestamp", "timestamptz"), FieldKind.DATE),
    **dict.fromkeys(("json", "jsonb"), FieldKind.JSON),
    "point": FieldKind.GEO_POINT,
    "bytea": FieldKind.BYTES,
}
"""Of types in pg_catalog; the values of every other type are shown as text."""

CONFIGURABLE_KINDS: Final[Mapping[FieldKind, Mapping[str, FieldKind]]] = {
    FieldKind.TEXT: {
        **dict.fromkeys(("text", "editor", "email", "url", "select"), FieldKind.TEXT),
        "file": FieldKind.FILE,
    },
    FieldKind.NUMBER: {"number": FieldKind.NUMBER, "text": FieldKind.TEXT},
    FieldKind.BOOL: {"bool": FieldKind.BOOL},
    FieldKind.DATE: {"date": FieldKind.DATE, "autodate": FieldKind.DATE},
    FieldKind.JSON: {"json": FieldKind.JSON, "geoPoint": FieldKind.GEO_POINT},
    FieldKind.GEO_POINT: {"geoPoint": FieldKind.GEO_POINT},
    FieldKind.GEOMETRY: {"geoPoint": FieldKind.GEO_POINT},
}
"""Kind by column type -> the words that ``fields.types`` accepts -> the kind they give."""

RESERVED_MEMBERS: Final = {"collectionId", "collectionName", "expand"}
"""Members of every record that are no fields."""

SECRET_FIELDS: Final = {
    *("password", "passwordHash", "password_hash", "password_digest"),
    *("hashed_password", "encrypted_password", "tokenKey", "token_key"),
}
"""Fields of auth collections that no record shows: PocketBase's two, and what others call them."""

AUTH_FIELD_KINDS: Final = {
    "email": FieldKind.TEXT,
    "emailVisibility": FieldKind.BOOL,
    "verified": FieldKind.BOOL,
}
"""Fields of auth collections that the server itself reads."""


def field_kind_of(data_type: Type) -> tuple[FieldKind, bool]:
    """Return the kind that a column's type gives, and whether the column holds several values."""
    base = data_type.base
    if base.kind is TypeKind.ARRAY and base.element is not None:
        return field_kind_of(base.element)[0], True
    if base.kind is TypeKind.COMPOSITE:
        return FieldKind.COMPOSITE, False
    if base.schema == "pg_catalog":
        return _KIND_BY_TYPE.get(base.name, FieldKind.TEXT), False
    if base.extension == "postgis" and base.name in {"geometry", "geography"}:
        return FieldKind.GEOMETRY, False
    return FieldKind.TEXT, False
