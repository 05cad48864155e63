"""Parses query strings and urlencoded bodies as Go's ``url.ParseQuery`` does."""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9a-fA-F]{2})")

_MAX_PAIRS: Final = 10_000
"""Go refuses more (``urlmaxqueryparams``)."""


@dataclass(frozen=True, slots=True)
class QueryString:
    """The valid pairs in order. Bytes, because escapes may result in any byte."""

    pairs: tuple[tuple[bytes, bytes], ...]
    is_well_formed: bool

    def first(self, name: bytes) -> bytes | None:
        """Return the first value of that name, None if there is none."""
        return next((value for known, value in self.pairs if known == name), None)


def has_bad_escape(text: bytes) -> bool:
    """Whether a percent sign isn't followed by two hexadecimal digits."""
    return _BAD_ESCAPE.search(text) is not None


def parse_query_string(text: bytes) -> QueryString:
    """Return the pairs, except those with a semicolon or an invalid escape."""
    if text.count(b"&") >= _MAX_PAIRS:
        return QueryString((), is_well_formed=False)
    pairs = [pair for pair in text.split(b"&") if pair]
    valid = [pair for pair in pairs if b";" not in pair and not has_bad_escape(pair)]
    split = (pair.partition(b"=") for pair in valid)
    unescaped = tuple((_unescape(name), _unescape(value)) for name, _, value in split)
    return QueryString(unescaped, is_well_formed=len(valid) == len(pairs))


def _unescape(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))
