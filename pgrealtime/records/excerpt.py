"""The shortened text of an HTML fragment, as ``fields=body:excerpt(200,true)`` shows it.

Used by ``records.fields``. PocketBase parses the HTML as a browser does (Go's ``html.Parse``) and
walks the tree. Here tags are processed in order with a stack of open elements, which gives the same
text for what editors produce; only text directly in a table, which a browser moves before it, stays
in its place. The sets of tags were found by testing each element of HTML with PocketBase 0.40.6.

Tokens are matched here and not by ``html.parser`` because the text must be the same to the byte.
``html.parser`` differs from Go's tokenizer and between patch releases of Python: in 3.11.7 it reads
tags in ``title``, ``textarea`` and ``xmp``, ends ``<!-- a --!> b`` at no ``--!>``, and turns a tag
that the end of the text cuts off into text.
"""

import re
from collections import Counter
from functools import lru_cache
from html import unescape
from typing import Final


def _tags(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


_HIDDEN: Final = _tags(
    "applet button dialog form head iframe object option picture script select style svg",
    "template textarea",
)

_INLINE: Final = _tags(
    "a abbr acronym b bdo big br cite code em embed i image img input label q small span strike",
    "strong sub sup time",
)
"""Elements whose text isn't separated by blanks."""

_VOID: Final = _tags(
    "area base basefont bgsound br col embed frame hr image img input keygen link meta param",
    "source track wbr",
)
_IN_HEAD: Final = _tags(
    "base basefont bgsound link meta noframes noscript script style template title"
)
"""Elements that belong to the head until content of the body begins."""

_STRUCTURE: Final = _tags("html head body frameset frame")
_IN_TABLE: Final = _tags("caption col colgroup tbody td tfoot th thead tr")
"""Elements that are ignored outside a table."""

_RAW: Final = _tags("iframe noembed noframes noscript plaintext script style xmp")
_ESCAPABLE_RAW: Final = _tags("textarea title")
"""As ``_RAW``, whose content has no tags, but with character references."""

_FOREIGN: Final = _tags("svg math")
_FOREIGN_BREAKOUT: Final = _tags(
    "b big blockquote body br center code dd div dl dt em embed h1 h2 h3 h4 h5 h6 head hr i img",
    "li listing menu meta nobr ol p pre ruby s small span strike strong sub sup table tt u ul var",
)
"""HTML elements that end an enclosing ``svg`` or ``math``."""

_TOKEN = re.compile(
    r"""<!--(?:-?>|.*?(?:--!?>|\Z))          # comment
      | <[!?][^>]*(?:>|\Z)                   # doctype, CDATA, processing instruction
      | </[^a-zA-Z>][^>]*(?:>|\Z) | </>      # what is treated as a comment
      | <(?P<end>/?)(?P<name>[a-zA-Z][^\s/>]*)
        (?:[\s/]+|=[^\s/>=]*|[^\s/>=]+(?:\s*=\s*(?:"[^"]*(?:"|\Z)|'[^']*(?:'|\Z)|[^\s>"'][^\s>]*)?)?)*
        (?P<closed>>?)
      | (?P<text>[^<]+|<)
    """,
    re.DOTALL | re.VERBOSE,
)
_BLANKS = re.compile(r"[\t\n\f\r ]+")

_CACHED_LENGTHS = range(512, 64 * 1024)
"""Lengths of texts whose excerpts are cached: several views and topics may show the same one."""


def excerpt(html: str, max_characters: int, *, with_ellipsis: bool) -> str:
    """Return the beginning of the HTML's text without tags, blocks separated by blanks.

    ``max_characters`` doesn't count the ellipsis that is appended if the text was cut.
    """
    if len(html) in _CACHED_LENGTHS:
        return _cached_excerpt(html, max_characters, with_ellipsis)
    return _excerpt(html, max_characters, with_ellipsis)


def _excerpt(html: str, max_characters: int, with_ellipsis: bool) -> str:  # noqa: FBT001 (cached)
    reader = _TextExtractor(max_characters)
    reader.extract(html)
    text = "".join(reader.text_runs).strip()
    if len(text) <= max_characters:
        return text
    return text[:max_characters].strip() + ("..." if with_ellipsis else "")


_cached_excerpt = lru_cache(maxsize=32)(_excerpt)


class _TextExtractor:
    """Collects the text of a document, token by token."""

    def __init__(self, max_characters: int) -> None:
        self.text_runs: list[str] = []
        self._characters_left = max_characters
        """Below 0 the text is longer than the excerpt. Blanks between blocks don't count."""
        self._bytes_left = max_characters + 1
        """Below 0 PocketBase ignores the content of further elements."""
        self._ends_with_blank = True
        self._open_elements: list[tuple[str, bool]] = []
        """Names, and whether the element's text is left out."""
        self._open_counts: Counter[str] = Counter()
        """Of names in ``_open_elements``, which may be deep."""
        self._hidden_depth = 0
        self._is_in_head = True

    def extract(self, html: str) -> None:
        offset = 0
        while offset < len(html) and self._characters_left >= 0:
            token = _TOKEN.match(html, offset)
            assert token is not None
            offset = token.end()
            if token["text"] is not None:
                self._add_text(unescape(token["text"]))
            elif not token["closed"]:
                continue  # a comment, or a tag that the end cuts off
            elif token["end"]:
                self._end_element(token["name"].lower())
            else:
                offset = self._start_element(token["name"].lower(), html, offset)

    def _is_in_foreign(self) -> bool:
        return any(self._open_counts[name] for name in _FOREIGN)

    def _start_element(self, name: str, html: str, offset: int) -> int:
        """Open the element; return the offset to continue at, after its content if that is raw."""
        is_foreign = self._is_in_foreign()
        if is_foreign and name in _FOREIGN_BREAKOUT:
            self._leave_foreign()
            is_foreign = False
        if name in _STRUCTURE or (name in _IN_TABLE and not self._open_counts["table"]):
            self._is_in_head = self._is_in_head and name != "body"
            return offset
        self._is_in_head = self._is_in_head and name in _IN_HEAD
        self._separate_block(name)
        if name in _VOID:
            self._separate_block(name)
            return offset
        is_unseen = name in _HIDDEN or self._bytes_left < 0
        self._open_elements.append((name, is_unseen))
        self._open_counts[name] += 1
        self._hidden_depth += is_unseen
        if is_foreign or (name not in _RAW and name not in _ESCAPABLE_RAW):
            return offset
        end = _end_of_raw(name, html, offset)
        content = html[offset:end]
        self._add_text(unescape(content) if name in _ESCAPABLE_RAW else content)
        return end

    def _end_element(self, name: str) -> None:
        if name == "p":
            self._leave_foreign()
        if not self._open_counts[name]:
            if name == "p":  # an end tag without a start is an empty paragraph
                self._separate_block(name)
            return
        while self._close_element() != name:
            pass

    def _leave_foreign(self) -> None:
        while self._is_in_foreign():
            self._close_element()

    def _close_element(self) -> str:
        name, is_unseen = self._open_elements.pop()
        self._open_counts[name] -= 1
        self._hidden_depth -= is_unseen
        self._separate_block(name)
        return name

    def _separate_block(self, name: str) -> None:
        if name not in _INLINE and name not in _HIDDEN and not self._ends_with_blank:
            self._append(" ")

    def _add_text(self, text: str) -> None:
        text = _BLANKS.sub(" ", text)
        if text != " " and not (self._is_in_head and self._open_elements):
            self._is_in_head = False
        if self._ends_with_blank:
            text = text.removeprefix(" ")
        self._append(text)

    def _append(self, text: str) -> None:
        if text and not self._hidden_depth and not self._is_in_head:
            self.text_runs.append(text)
            self._bytes_left -= len(text.encode())
            self._characters_left -= len(text.strip())
            self._ends_with_blank = text[-1] == " "


def _end_of_raw(name: str, html: str, offset: int) -> int:
    if name == "plaintext":
        return len(html)
    end = re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE).search(html, offset)
    return end.start() if end else len(html)
