"""Parses a topic and its options as PocketBase does. Called for each topic of a subscribe call.

The part before the first ``?`` is compared as it is, without percent decoding, trimming or
normalizing slashes. The rest is parsed as by Go's ``net/url`` and ``encoding/json/v2``, which
decide which options PocketBase sees.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from msgspec import Struct

from pgrealtime.protocol.json_reader import JsonError, JsonRangeError, JsonReader
from pgrealtime.protocol.query_string import has_bad_escape, parse_query_string

_LINE_BREAK: Final = re.compile(r"[\r\n]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_WORD: Final = re.compile(r"[A-Za-z0-9]+")
_CASE_BOUNDARY: Final = re.compile(r"(?<=[^A-Z])(?=[A-Z])")
_WILDCARD: Final = "*"

_MAX_TOKENS: Final = 500
"""Of one topic's options. A call may have a thousand topics; at 2 us a token the 2500 that fit into
each would take five seconds."""


_NO_OPTIONS: Final[Mapping[str, str]] = MappingProxyType({})


# Without a garbage collection of its own: there are ten for each of many thousand connections, and
# none refers to anything but texts.
class Topic(Struct, frozen=True, kw_only=True, gc=False):
    """A parsed topic; whether the collection exists is not checked here.

    A text that can match nothing has the empty collection, a name that none has: one without a
    name before the slash, and one with a line break, which would break the framing of SSE.
    """

    text: str
    """As submitted; the event name of its messages."""
    collection_name_or_id: str
    """Name or id, exact and case sensitive."""
    record_id: str | None
    """None for the whole collection (``COLL/*``, ``COLL``). May hold slashes, never a ``?``."""
    query: Mapping[str, str] = _NO_OPTIONS
    """``@request.query``, with ``filter``, ``expand`` and ``fields``."""
    headers: Mapping[str, str] = _NO_OPTIONS
    """``@request.headers``, names in snake case."""

    @property
    def asks_for_mirror(self) -> bool:
        """Whether its client keeps a list by it: is told of rows that enter and leave."""
        return self.query.get("mode") == "mirror"

    @property
    def asks_for_load(self) -> bool:
        """Whether that list is to be loaded for it, instead of by it."""
        return self.asks_for_mirror and self.query.get("load") == "true"


def parse_topic(text: str) -> Topic:
    """Parse a topic; never raises: an invalid one matches nothing."""
    if _LINE_BREAK.search(text):
        return Topic(text=text, collection_name_or_id="", record_id=None)
    path, has_query, _ = text.partition("?")
    collection, slash, record_id = path.partition("/")
    options = _options_text(text) if has_query else b""
    query, headers = _read_options(options) if options else (_NO_OPTIONS, _NO_OPTIONS)
    return Topic(
        text=text,
        collection_name_or_id=collection,
        record_id=record_id if slash and record_id != _WILDCARD else None,
        query=query,
        headers=headers,
    )


def _options_text(text: str) -> bytes:
    """Return the decoded value of the first parameter ``options``; empty if there is none.

    A text that Go doesn't accept as a URL has no parameters: one with control characters, or with
    invalid percent escapes before the query or after the ``#``.
    """
    url, _, fragment = text.partition("#")
    path, _, query = url.partition("?")
    if not query or _CONTROL.search(url):
        return b""
    if has_bad_escape(_encoded(path)) or has_bad_escape(_encoded(fragment)):
        return b""
    return parse_query_string(_encoded(query)).first(b"options") or b""


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _read_options(text: bytes) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return query and headers; of an invalid text, what precedes the error."""
    query: dict[str, str] = {}
    headers: dict[str, str] = {}
    reader = JsonReader(text, max_tokens=_MAX_TOKENS)
    try:
        for name in reader.members():
            if name == "query":
                _read_strings(reader, query)
            elif name == "headers":
                _read_strings(reader, headers)
            else:
                reader.skip()
    except JsonError:
        pass  # as in PocketBase: the subscription is valid, with the options read so far
    return query, {snake_case(name): value for name, value in headers.items()}


def _read_strings(reader: JsonReader, into: dict[str, str]) -> None:
    """Read an object's members into ``into``, which has them also if an error follows."""
    if reader.consume_null():
        return
    for name in reader.members():
        into[name] = ""
        try:
            into[name] = _read_as_string(reader)
        except JsonRangeError:
            into[name] = "0"
            raise


def _read_as_string(reader: JsonReader) -> str:
    match reader.peek():
        case b'"':
            return reader.read_string()
        case b"t" | b"f":
            return "true" if reader.read_boolean() else "false"
        case b"{" | b"[" | b"n":
            reader.skip()
            return ""
        case _:
            return _plain_decimal(reader.read_number())


def _plain_decimal(number: float) -> str:
    """Return the shortest digits that parse to this double, without exponent."""
    digits = format(Decimal(repr(number)), "f")
    return digits.removesuffix(".0")


def snake_case(name: str) -> str:
    """Return a header's name in rules: ``X-Token`` and ``xToken`` are ``x_token``."""
    return "_".join(_CASE_BOUNDARY.sub("_", word) for word in _WORD.findall(name)).lower()
