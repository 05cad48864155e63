"""Reads members of a JSON object or of a form's ``@jsonPayload`` as PocketBase binds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pgrealtime.protocol.json_reader import MAX_TOKENS, JsonReader


def json_payloads(pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[JsonReader]:
    """Yield a reader for the one value of each ``@jsonPayload`` of a form.

    Together they hold no more than one text may: a form has room for thousands.
    """
    left = MAX_TOKENS
    for name, value in pairs:
        if name == b"@jsonPayload":
            reader = JsonReader(value, max_tokens=left)
            yield reader
            reader.expect_end()
            left = reader.tokens_left


def fold_name(name: str) -> str:
    """Return a member's name as ``encoding/json/v2`` compares it without case.

    Hyphens and underscores don't count either; of the letters that fold to ASCII only the long s
    could occur in our two names.
    """
    return name.replace("-", "").replace("_", "").replace("\u017f", "s").lower()


def read_string_or_empty(reader: JsonReader) -> str:
    """Return a string, empty for null."""
    return "" if reader.consume_null() else reader.read_string()
