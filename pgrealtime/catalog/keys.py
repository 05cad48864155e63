"""Converts ids, which are texts for clients, to values of a key's type. Used by queries by id."""

import re
from typing import Final

from pgrealtime.catalog.model import Type

_INTEGER_BITS: Final = {"int2": 16, "int4": 32, "int8": 64}
_ANY_TEXT: Final = frozenset({"text", "varchar", "bpchar", "name"})
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def canonical_id(text: str, key: Type) -> str | None:
    """Return the id as the key's type prints it, or None if no row can have it.

    To PostgreSQL "12" for a uuid column is an error; here it is an id that no row has. So is "007"
    for an integer, whose text is "7".
    """
    base = key.base
    if bits := _INTEGER_BITS.get(base.name):
        is_number = _INTEGER.fullmatch(text) is not None
        return text if is_number and -(1 << bits - 1) <= int(text) < 1 << bits - 1 else None
    if base.name == "uuid":
        return text.lower() if _UUID.fullmatch(text) else None
    # Postgres has no U+0000 in texts.
    return None if "\x00" in text else text


def native_key_type(type_: Type) -> str | None:
    """Return the built-in type to compare ids of this type in, so that the key's index serves.

    A domain counts as its base type. None if ids are compared as texts: citext, enums.
    """
    name = type_.base.name
    if type_.base.schema != "pg_catalog":
        return None
    return name if name in _INTEGER_BITS or name in _ANY_TEXT or name == "uuid" else None
