"""Binds members of request bodies, in JSON or as a form, as PocketBase does.

Between the bytes of ``api.body_reader`` and the calls of ``api.subscribe_body`` and
``api.login_body``. Forms are parsed as by Go's ``net/http``, ``mime`` and ``mime/multipart``. Which
bodies are valid is part of PocketBase's behaviour: lines may end with LF alone, a body may end
within a part's headers, two equal parameters are valid, a numbered one is ignored. The available
parsers (aiohttp's, ``multipart``, ``email``) decide these differently, so the rules are written out
here; the conformance tests compare with PocketBase.
"""

import quopri
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from urllib.parse import unquote_to_bytes

from pgrealtime.protocol.json_reader import MAX_TOKENS, JsonReader
from pgrealtime.protocol.query_string import QueryString, parse_query_string

_FormPair: TypeAlias = tuple[bytes, bytes]

_FORM_CONTENT_TYPES: Final = ("multipart/form-data", "application/x-www-form-urlencoded")

# The token of RFC 2045, section 5.1, as in Go's mime.isTokenChar.
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`{|}~0-9A-Za-z]+")
_QUOTED: Final = re.compile(r'"((?:[^"\\\r\n]|\\.)*)"')
# A backslash before a token character is literal in Go: old browsers sent whole Windows paths
# (mime.consumeValue).
_QUOTED_PAIR: Final = re.compile(r'\\([()<>@,;:\\"/\[\]?=])')
_BAD_QUOTING: Final = re.compile(rb"=\r(?!\n)")
_PARAMETER: Final = re.compile(r"\s*;\s*")
_EQUALS: Final = re.compile(r"\s*=\s*")
_HEADER_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z ]+")
_HEADER_TEXT: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")

_MAX_PARTS: Final = 1000
"""Of one multipart body (Go's ``multipartmaxparts``)."""
_MAX_HEADERS: Final = 10_000
"""Of one part (Go's ``multipartmaxheaders``)."""
_MAX_PARAMETERS: Final = 1000
"""Of one header. Go accepts any number; four are known, and a body could have millions."""
_MAX_LINE_BYTES: Final = 4096
"""Of a line outside the parts: the size of Go's buffer."""
_MAX_FORM_BYTES: Final = 10 << 20
"""Of an urlencoded body; Go's ``ParseForm`` refuses more."""


class FormError(ValueError):
    """The body isn't a valid form of its content type, or the content type is invalid."""


def bind_body(
    content_type: str, body: bytes, query: bytes, is_list_by_name: Mapping[str, bool]
) -> dict[str, list[str]] | None:
    """Return the values of members by name; None for a content type that isn't known.

    Of a member that is no list the first value counts. The pairs of the URL's query string belong
    to a form. Its bytes that aren't UTF-8 become U+FFFD, as in every client that reads them back.

    Raises:
        FormError: The form can't be read.
        JsonError: Likewise a JSON body, or a form's ``@jsonPayload``.
    """
    if content_type.startswith("application/json"):
        # Only the first value is read; what follows it is ignored, as PocketBase does.
        return JsonReader(body).bind_members(is_list_by_name, folds_case=True) or {}
    if not content_type.startswith(_FORM_CONTENT_TYPES):
        return None
    known = {name.encode(): name for name in is_list_by_name}
    values: dict[str, list[str]] = {}
    # All payloads share one token limit: a form may have thousands.
    tokens_left = MAX_TOKENS
    payloads: list[bytes] = []
    for key, value in parse_form(content_type, body, query):
        if key == b"@jsonPayload":
            payloads.append(value)
        elif name := known.get(key):
            values.setdefault(name, []).append(value.decode(errors="replace"))
    # After all keys: a payload's members replace them, and its null resets them.
    for payload in payloads:
        reader = JsonReader(payload, max_tokens=tokens_left)
        members = reader.bind_members(is_list_by_name, folds_case=False)
        values = {} if members is None else values | members
        reader.expect_end()
        tokens_left = reader.tokens_left
    return values


def parse_form(content_type: str, body: bytes, query: bytes) -> list[_FormPair]:
    """Return the pairs of form and URL in PocketBase's order; the query string is still escaped."""
    media_type, parameters = _parse_media_type(content_type)
    url_pairs = _well_formed_pairs(parse_query_string(query))
    # PocketBase chooses by prefix and case of the header as sent, Go then by the parsed type.
    if content_type.startswith("multipart/form-data"):
        boundary = parameters.get("boundary")
        if media_type != "multipart/form-data" or boundary is None:
            raise FormError("not multipart/form-data, or no boundary")
        return [*url_pairs, *_parse_multipart(body, boundary.encode(errors="surrogateescape"))]
    if media_type != "application/x-www-form-urlencoded":
        return url_pairs
    if len(body) > _MAX_FORM_BYTES:
        raise FormError("form too large")
    # ``http.Request.ParseForm`` puts an urlencoded body before the URL's pairs, a multipart one
    # after them.
    return [*_well_formed_pairs(parse_query_string(body)), *url_pairs]


def _well_formed_pairs(query: QueryString) -> list[_FormPair]:
    if not query.is_well_formed:
        raise FormError("broken pair in an urlencoded form")
    return list(query.pairs)


def _parse_media_type(text: str) -> tuple[str, Mapping[str, str]]:
    """Return a content type or disposition, and its parameters by lower case name.

    Raises an error where Go's ``mime.ParseMediaType`` returns one.
    """
    base, _, _ = text.partition(";")
    name = base.strip().lower()
    if not all(_TOKEN.fullmatch(word) for word in name.split("/", 1)):
        raise FormError("not a media type")
    parameters: dict[str, str] = {}
    end = len(text.rstrip().removesuffix(";").rstrip())
    offset = len(base)
    for _ in range(_MAX_PARAMETERS):
        if offset >= end:
            return name, _resolve_extended_parameters(parameters)
        key, value, offset = _next_parameter(text, offset)
        if parameters.setdefault(key, value) != value:
            raise FormError("repeated parameter")
    raise FormError("too many parameters")


def _next_parameter(text: str, offset: int) -> tuple[str, str, int]:
    """Return name and value of the parameter after the semicolon, and the offset after them."""
    # Matched at an offset, without cutting the text: a part's header may be as long as a body.
    start = _PARAMETER.match(text, offset)
    key = _TOKEN.match(text, start.end()) if start else None
    if key is None:
        raise FormError("broken parameter")
    equals = _EQUALS.match(text, key.end())
    if equals is None:
        raise FormError("parameter without a value")
    if quoted := _QUOTED.match(text, equals.end()):
        value = _QUOTED_PAIR.sub(r"\1", quoted[1])
        return key[0].lower(), value, quoted.end()
    plain = _TOKEN.match(text, equals.end())
    if plain is None:
        raise FormError("broken value of a parameter")
    return key[0].lower(), plain[0], plain.end()


def _resolve_extended_parameters(parameters: Mapping[str, str]) -> dict[str, str]:
    """Resolve ``name*=utf-8''...`` (RFC 2231); numbered parts of a parameter are dropped."""
    plain = {key: value for key, value in parameters.items() if "*" not in key}
    for key, value in parameters.items():
        charset, *more = value.split("'", 2)
        if key.endswith("*") and len(more) == 2 and charset.lower() in ("utf-8", "us-ascii"):  # noqa: PLR2004 (charset, language, text)
            plain[key[:-1]] = unquote_to_bytes(more[1]).decode(errors="replace")
    return plain


@dataclass(slots=True)
class _MultipartBody:
    body: bytes
    delimiter: bytes
    offset: int = 0
    newline: bytes = b"\r\n"
    parts_read: int = 0
    pairs: list[_FormPair] = field(default_factory=list)

    def next_line(self) -> bytes:
        """Return the next line with its line end; empty at the end of the body."""
        end = self.body.find(b"\n", self.offset)
        line = self.body[self.offset : end + 1] if end >= 0 else self.body[self.offset :]
        self.offset += len(line)
        return line

    def is_delimiter(self, line: bytes) -> bool:
        """Whether a part follows this line. The first one determines the line ends."""
        rest = line[len(self.delimiter) :].lstrip(b" \t")
        if not line.startswith(self.delimiter):
            return False
        if self.parts_read == 0 and rest == b"\n":
            self.newline = b"\n"
        # All delimiters must end as the first does: with CRLF, or LF alone as some clients send.
        return rest == self.newline

    def is_closing_delimiter(self, line: bytes) -> bool:
        """Whether the form ends with this line."""
        last = self.delimiter + b"--"
        # What follows is ignored, an epilogue (RFC 2046, section 5.1.1).
        return line.startswith(last) and line[len(last) :].lstrip(b" \t") in (b"", self.newline)


def _parse_multipart(body: bytes, boundary: bytes) -> list[_FormPair]:
    """Return names and values of the parts that aren't files."""
    if not boundary:
        raise FormError("empty boundary")
    lines = _MultipartBody(body, b"--" + boundary)
    after_part = False
    while True:
        line = lines.next_line()
        # Before the line's own checks: the last line may lack its line end.
        if lines.is_closing_delimiter(line):
            return lines.pairs
        if not line.endswith(b"\n") or len(line) > _MAX_LINE_BYTES:
            raise FormError("no delimiter where one must be")
        if lines.is_delimiter(line):
            if not _read_part(lines):
                return lines.pairs
            after_part = False
        # Before the first part anything may stand, a preamble. Between two parts one empty line is
        # all: the line end that belongs to the delimiter, which ``_read_content`` leaves.
        elif after_part or (lines.parts_read and line != lines.newline):
            raise FormError("something between two parts")
        elif lines.parts_read:
            after_part = True


def _read_part(multipart: _MultipartBody) -> bool:
    """Read one part; return False if the body ends within its headers."""
    multipart.parts_read += 1
    if multipart.parts_read > _MAX_PARTS:
        raise FormError("too many parts")
    headers = _read_headers(multipart)
    if headers is None:
        return False  # for Go the end of the form
    # Read even if it is dropped: the next part follows it.
    value = _read_content(multipart)
    disposition, parameters = _parse_disposition(headers.get(b"content-disposition", b""))
    name = parameters.get("name", "")
    # Go keeps files apart from values, and drops parts without a name.
    if disposition != "form-data" or not name or parameters.get("filename"):
        return True
    # The only encoding that Go's multipart reader decodes.
    if headers.get(b"content-transfer-encoding", b"").lower() == b"quoted-printable":
        if _BAD_QUOTING.search(value):
            raise FormError("broken quoted-printable")
        value = quopri.decodestring(value)
    multipart.pairs.append((name.encode(errors="surrogateescape"), value))
    return True


def _parse_disposition(header: bytes) -> tuple[str, Mapping[str, str]]:
    try:
        return _parse_media_type(header.decode(errors="surrogateescape"))
    except FormError:
        return "", {}


def _read_headers(multipart: _MultipartBody) -> dict[bytes, bytes] | None:
    """Return the first header of each lower case name; None if the body ends within them."""
    headers: dict[bytes, list[bytes]] = {}
    name = b""
    left = _MAX_HEADERS
    while True:
        line = multipart.next_line()
        text = line.removesuffix(b"\r\n").removesuffix(b"\n")
        if not text:
            return {key: b" ".join(pieces) for key, pieces in headers.items()} if line else None
        if not _HEADER_TEXT.fullmatch(text):
            raise FormError("control character in a header of a part")
        # A folded line belongs to the header before (RFC 5322, section 2.2.3).
        if text[:1] in (b" ", b"\t") and name:
            headers[name].append(text.strip(b" \t"))
            continue
        key, colon, value = text.partition(b":")
        if not colon or not _HEADER_NAME.fullmatch(key):
            raise FormError("broken header of a part")
        left -= 1
        if left < 0:
            raise FormError("too many headers")
        name = key.lower()
        # Go's Header.Get returns the first of several.
        headers.setdefault(name, [value.strip(b" \t")])


def _read_content(multipart: _MultipartBody) -> bytes:
    """Return the content up to the next delimiter, which is not consumed."""
    # An empty part, whose delimiter some clients write without a line end before it (Go's
    # peekBufferIsEmptyPart).
    if _is_delimiter_at(multipart.body, multipart.offset, multipart.delimiter):
        return b""
    mark = multipart.newline + multipart.delimiter
    start = multipart.offset
    # ``find`` once over the body: linear, whatever looks like a delimiter in it.
    while (end := multipart.body.find(mark, multipart.offset)) >= 0:
        if _is_delimiter_at(multipart.body, end, mark):
            multipart.offset = end
            return multipart.body[start:end]
        multipart.offset = end + len(mark)
    raise FormError("broken off in a part")


def _is_delimiter_at(body: bytes, offset: int, delimiter: bytes) -> bool:
    """Whether the delimiter is at the offset and not the beginning of a longer word."""
    after = offset + len(delimiter)
    if body[offset:after] != delimiter:
        return False
    return body[after : after + 1] in (b"", b" ", b"\t", b"\r", b"\n") or (
        body[after : after + 2] == b"--"
    )
