"""Query strings and form bodies, taken apart as Go's ``url.ParseQuery`` does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9a-fA-F]{2})")
_ESCAPE: Final = re.compile(rb"%([0-9a-fA-F]{2})")

_MAX_PAIRS: Final = 10_000
"""Go refuses more (``urlmaxqueryparams``)."""


@dataclass(frozen=True, slots=True)
class QueryString:
    """The pairs that could be read, in order, and whether that was all of them.

    Names and values are bytes, since an escape can make anything of them.
    """

    pairs: tuple[tuple[bytes, bytes], ...]
    is_well_formed: bool

    def first(self, name: bytes) -> bytes | None:
        """Return the first value of that name, None if there is none."""
        return next((value for known, value in self.pairs if known == name), None)


def has_bad_escape(text: bytes) -> bool:
    """Whether a percent sign isn't followed by two hexadecimal digits."""
    return _BAD_ESCAPE.search(text) is not None


def parse_query_string(text: bytes) -> QueryString:
    """Return the pairs; one with a semicolon or a broken escape is left out and noted."""
    if text.count(b"&") >= _MAX_PAIRS:
        return QueryString((), is_well_formed=False)
    written = [pair for pair in text.split(b"&") if pair]
    readable = [pair for pair in written if b";" not in pair and not has_bad_escape(pair)]
    return QueryString(
        tuple(_split(pair) for pair in readable), is_well_formed=len(readable) == len(written)
    )


def _split(pair: bytes) -> tuple[bytes, bytes]:
    name, _, value = pair.partition(b"=")
    return _unescape(name), _unescape(value)


def _unescape(text: bytes) -> bytes:
    return _ESCAPE.sub(lambda escape: bytes.fromhex(escape[1].decode()), text.replace(b"+", b" "))
