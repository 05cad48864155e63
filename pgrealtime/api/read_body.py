"""The body of a read, which rules see as ``@request.body``. No SDK sends one."""

from collections.abc import Mapping
from typing import Final

from pgrealtime.api.error_responses import (
    BAD_REQUEST,
    UNSUPPORTED_CONTENT_TYPE,
    RequestRefusedError,
)
from pgrealtime.protocol.forms import FormError, parse_form
from pgrealtime.protocol.json_reader import JsonError, JsonReader

BodyMembers = Mapping[str, str | float | None]
"""By name: texts, numbers, booleans as numbers, containers as JSON."""

_IGNORED_CONTENT_TYPES: Final = (
    "application/x-www-form-urlencoded",
    "application/xml",
    "text/xml",
)
"""Go reads no urlencoded body of a GET request, and PocketBase binds nothing of XML."""


def parse_read_body(content_type: str, body: bytes, query: bytes) -> BodyMembers:  # noqa: ARG001 (as all parsers of bodies)
    """Parse a body.

    Raises:
        RequestRefusedError: It can't be read.
    """
    if content_type.startswith(_IGNORED_CONTENT_TYPES):
        return {}
    try:
        if content_type.startswith("application/json"):
            return _read_members(JsonReader(body))
        if content_type.startswith("multipart/form-data"):
            return _read_form(content_type, body)
    except (JsonError, FormError) as error:
        raise RequestRefusedError(BAD_REQUEST) from error
    raise RequestRefusedError(UNSUPPORTED_CONTENT_TYPE)


def _read_form(content_type: str, body: bytes) -> BodyMembers:
    members: dict[str, str | float | None] = {}
    for name, value in parse_form(content_type, body, b""):
        members.setdefault(name.decode(errors="replace"), value.decode(errors="replace"))
    return members


def _read_members(reader: JsonReader) -> BodyMembers:
    if reader.consume_null():
        return {}
    return {name: _read_value(reader) for name in reader.members()}


def _read_value(reader: JsonReader) -> str | float | None:
    match reader.peek():
        case b'"':
            return reader.read_string()
        case b"t" | b"f":
            return int(reader.read_boolean())
        case b"n":
            reader.consume_null()
            return None
        case b"{" | b"[":
            return reader.read_raw().decode()
        case _:
            return reader.read_number()
