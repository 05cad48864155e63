"""Bodies in JSON or as a form, and the members that PocketBase binds from them.

Between the bytes of ``api.body_reader`` and the calls of ``api.subscribe_body`` and
``api.login_body``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from pgrealtime.protocol.forms import FormPair, parse_form
from pgrealtime.protocol.json_reader import MAX_TOKENS, JsonReader

_FORM_CONTENT_TYPES: Final = ("multipart/form-data", "application/x-www-form-urlencoded")


def open_body(content_type: str, body: bytes, query: bytes) -> JsonReader | list[FormPair] | None:
    """Return a reader of a JSON body, or the pairs of a form; None for another content type.

    The pairs of the URL's query string belong to a form.

    Raises:
        FormError: The form can't be read.
    """
    if content_type.startswith("application/json"):
        return JsonReader(body)
    if content_type.startswith(_FORM_CONTENT_TYPES):
        return parse_form(content_type, body, query)
    return None


def json_payloads(pairs: Iterable[FormPair]) -> Iterator[JsonReader]:
    """Yield a reader for the single value of each ``@jsonPayload`` of a form.

    All of them share one token limit: a form may have thousands.
    """
    left = MAX_TOKENS
    for name, value in pairs:
        if name == b"@jsonPayload":
            reader = JsonReader(value, max_tokens=left)
            yield reader
            reader.expect_end()
            left = reader.tokens_left


def fold_name(name: str) -> str:
    """Return a member's name in the form in which ``encoding/json/v2`` compares without case."""
    # Hyphens and underscores are ignored. Of the letters that fold to ASCII only the long s occurs
    # in the names that are bound here.
    return name.replace("-", "").replace("_", "").replace("\u017f", "s").lower()


def read_string_or_empty(reader: JsonReader) -> str:
    """Return a string, empty for null."""
    return "" if reader.consume_null() else reader.read_string()
