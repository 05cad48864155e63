"""Parses PostgreSQL's text output of arrays and composite values.

Source: PostgreSQL docs, "Array Input and Output Syntax", "Composite Type Input and Output Syntax".
The text comes from the server, so its syntax isn't checked.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeAlias

Element: TypeAlias = "str | list[Element] | None"
"""The text form of an element, the elements of a further dimension, or NULL."""

_QUOTED = r'"([^"\\]*(?:\\.[^"\\]*)*)"'
_ATTRIBUTE = re.compile(r',(?:"([^"\\]*(?:(?:\\.|"")[^"\\]*)*)"|([^,]*))', re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED_OR_DOUBLED = re.compile(r'\\(.)|"(")', re.DOTALL)


def parse_array(text: str, delimiter: str = ",") -> list[Element]:
    """Return the elements; of several dimensions, lists of lists. Lower bounds are ignored.

    ``delimiter`` is ``pg_type.typdelim``: a comma except for ``box`` (``;``) and types of
    extensions, such as PostGIS' (``:``).
    """
    if text.startswith("["):
        text = text[text.index("=") + 1 :]
    if not text.startswith("{"):
        return [*text.split()]  # int2vector, oidvector
    if '"' not in text and "{" not in text[1:]:
        items = text[1:-1].split(delimiter) if len(text) > len("{}") else []
        return [None if item == "NULL" else item for item in items]
    return _parse_nested(text, _token_pattern(delimiter))


@cache
def _token_pattern(delimiter: str) -> re.Pattern[str]:
    return re.compile(rf'([{{}}])|{_QUOTED}|([^{{}}"{re.escape(delimiter)}]+)', re.DOTALL)


def _parse_nested(text: str, token: re.Pattern[str]) -> list[Element]:
    top: list[Element] = []
    open_lists = [top]
    for brace, quoted, plain in token.findall(text):
        if brace == "{":
            inner: list[Element] = []
            open_lists[-1].append(inner)
            open_lists.append(inner)
        elif brace:
            open_lists.pop()
        elif plain:
            open_lists[-1].append(None if plain == "NULL" else plain)
        else:
            open_lists[-1].append(_ESCAPED.sub(r"\1", quoted) if "\\" in quoted else quoted)
    whole = top[0]
    assert isinstance(whole, list)
    return whole


def flatten_array(items: Iterable[Element]) -> Iterator[str | None]:
    """Yield the elements in order, those of further dimensions in place of their lists."""
    for item in items:
        if isinstance(item, list):
            yield from flatten_array(item)
        else:
            yield item


def parse_composite(text: str) -> list[str | None]:
    """Return the attributes of a composite value such as ``(1,"a b",)``, in order."""
    return [_decode_attribute(match) for match in _ATTRIBUTE.finditer("," + text[1:-1])]


def _decode_attribute(match: re.Match[str]) -> str | None:
    quoted, plain = match.groups()
    if quoted is None:
        return plain or None
    return _ESCAPED_OR_DOUBLED.sub(lambda pair: pair[1] or pair[2], quoted)
