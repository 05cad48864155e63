"""A pull parser of JSON, exactly as strict as PocketBase's: Go's ``encoding/json/v2``.

Used by ``protocol.topic`` and ``protocol.forms``. It returns one value at a time, so a caller
keeps what it read before an error (PocketBase keeps those options of a topic) and skips the rest
without building it.

``json.JSONDecoder`` can't replace it. Its hooks could refuse repeated names and ``NaN``, but it
returns nothing of a text with an error; it builds all of 32 MB of ``[[],[],...`` before a hook
could count the values; and it ends at Python's recursion limit, where Go accepts 10,000 levels.
"""

import re
from collections.abc import Iterator, Mapping
from math import isinf
from typing import Final

_WHITESPACE: Final = re.compile(rb"[ \t\n\r]*")
# RFC 8259, section 6: no leading zeros, and digits on both sides of the point. "*+" and "++" are
# possessive: of the broken "12." not even the "1" may match.
_NUMBER: Final = re.compile(
    rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++|(?!\.))(?:[eE][+-]?[0-9]++|(?![eE]))"
)
# Control characters must be escaped (RFC 8259, section 7).
_PLAIN_STRING: Final = re.compile(rb'"([^"\\\x00-\x1f]*+)"')
_STRING: Final = re.compile(rb'"((?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+)"')
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
_SHORT_ESCAPES: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS: Final = (b"null", b"true", b"false")

MAX_TOKENS: Final = 200_000
"""Limits the time that a body can take: a hundred times what the largest valid call needs."""

_MAX_DEPTH: Final = 10_000
"""Levels of nesting; as in Go's ``jsontext``."""


class JsonError(ValueError):
    """The text isn't JSON, or a value isn't of the kind that was to be read."""


class JsonRangeError(JsonError):
    """A number is too large for a double."""


class JsonReader:
    """Reads the values of one UTF-8 text, in which a byte order mark is an error.

    Each method consumes a whole value unless stated otherwise.
    """

    def __init__(self, text: bytes, *, max_tokens: int = MAX_TOKENS) -> None:
        self._text = text
        self._max_tokens = max_tokens
        self._offset = 0
        self._is_colon_due = False
        self._depth = 0
        self._token_count = 0

    @property
    def tokens_left(self) -> int:
        """How many more tokens are allowed."""
        return self._max_tokens - self._token_count

    def peek(self) -> bytes:
        """Return the first byte of the next value, empty at the end; consume none of it."""
        # Only here, because Go reports a missing colon with the value: the name was read before.
        if self._is_colon_due:
            self._is_colon_due = False
            self._expect(b":")
        space = _WHITESPACE.match(self._text, self._offset)
        assert space is not None  # it matches the empty text too
        self._offset = space.end()
        return self._text[self._offset : self._offset + 1]

    def consume_null(self) -> bool:
        """Return whether the value is null; consume it only then."""
        if self.peek() != b"n":
            return False
        self._read_literal()
        return True

    def read_string(self) -> str:
        """Read a string.

        Raises:
            JsonError: Another value, a lone surrogate, or not UTF-8.
        """
        self._count_token()
        if self.peek() != b'"':
            raise JsonError("not a string")
        if plain := _PLAIN_STRING.match(self._text, self._offset):
            self._offset = plain.end()
            return _decode_utf8(plain[1])
        escaped = _STRING.match(self._text, self._offset)
        if escaped is None:
            raise JsonError("broken string")
        self._offset = escaped.end()
        return _unescape(_decode_utf8(escaped[1]))

    def read_number(self) -> float:
        """Read a number as a double.

        Raises:
            JsonError: Another value; JsonRangeError if it is too large.
        """
        # Python rounds a too large number to infinity, where Go returns an error.
        value = float(self._read_number_text())
        if isinf(value):
            raise JsonRangeError("number out of range")
        return value

    def read_boolean(self) -> bool:
        """Read true or false."""
        if self.peek() not in (b"t", b"f"):
            raise JsonError("not a boolean")
        return self._read_literal() == b"true"

    def members(self) -> Iterator[str]:
        """Yield the names of an object's members; the caller must read each value in between.

        A missing colon is an error of reading the value.

        Raises:
            JsonError: Not an object, invalid, or a repeated name.
        """
        self._open_bracket(b"{")
        seen: set[str] = set()
        while self._advance_to_next(b"}", first=not seen):
            name = self.read_string()
            # Compared after unescaping: "a" and "\u0061" are the same name, which
            # ``encoding/json/v2`` refuses.
            if name in seen:
                raise JsonError("repeated name")
            seen.add(name)
            self._is_colon_due = True
            yield name
        self._close_bracket()

    def elements(self) -> Iterator[None]:
        """Iterate over an array; the caller must read one value at each step.

        Raises:
            JsonError: Not an array, or invalid.
        """
        self._open_bracket(b"[")
        first = True
        while self._advance_to_next(b"]", first=first):
            first = False
            yield
        self._close_bracket()

    def bind_members(
        self, is_list_by_name: Mapping[str, bool], *, folds_case: bool
    ) -> dict[str, list[str]] | None:
        """Return the strings of an object's members with these names; None for null.

        A member is a string, or an array of strings if it is a list; null in it is empty.

        Raises:
            JsonError: Not an object, invalid, a repeated member or one of another kind.
        """
        if self.consume_null():
            return None
        normalize = _fold_name if folds_case else str
        known = {normalize(name): name for name in is_list_by_name}
        values: dict[str, list[str]] = {}
        for text in self.members():
            name = known.get(normalize(text))
            if name is None:
                self.skip()
            elif name in values:
                raise JsonError("repeated member")
            elif not is_list_by_name[name]:
                values[name] = [self._read_string_or_empty()]
            elif self.consume_null():
                values[name] = []
            else:
                values[name] = [self._read_string_or_empty() for _ in self.elements()]
        return values

    def skip(self) -> None:
        """Consume a value of any kind and depth, checking its syntax without building it."""
        # A stack of its own, not recursion: Go accepts 10,000 levels, Python's limit is a thousand.
        open_: list[Iterator[object]] = []
        while True:
            match self.peek():
                case b"{":
                    open_.append(self.members())
                case b"[":
                    open_.append(self.elements())
                case b'"':
                    self.read_string()
                case b"t" | b"f" | b"n":
                    self._read_literal()
                case _:
                    self._read_number_text()
            # A generator consumes the closing bracket when it ends.
            while open_ and next(open_[-1], _EXHAUSTED) is _EXHAUSTED:
                open_.pop()
            if not open_:
                return

    def read_raw(self) -> bytes:
        """Read a value of any kind as its JSON text."""
        self.peek()
        begin = self._offset
        self.skip()
        return self._text[begin : self._offset]

    def expect_end(self) -> None:
        """Check that only white space is left."""
        if self.peek():
            raise JsonError("something follows the value")

    def _read_string_or_empty(self) -> str:
        return "" if self.consume_null() else self.read_string()

    def _read_number_text(self) -> bytes:
        self._count_token()
        self.peek()
        number = _NUMBER.match(self._text, self._offset)
        if number is None:
            raise JsonError("not a number")
        self._offset = number.end()
        return number[0]

    def _read_literal(self) -> bytes:
        self._count_token()
        for word in _LITERALS:
            if self._text.startswith(word, self._offset):
                self._offset += len(word)
                return word
        raise JsonError("unknown word")

    def _open_bracket(self, bracket: bytes) -> None:
        self._count_token()
        self._expect(bracket)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise JsonError("nested too deeply")

    def _close_bracket(self) -> None:
        self._offset += 1
        self._depth -= 1

    def _advance_to_next(self, bracket: bytes, *, first: bool) -> bool:
        """Consume the comma before the next element; False if the bracket is next."""
        if self.peek() == bracket:
            return False
        if not first:
            self._expect(b",")
        return True

    def _expect(self, mark: bytes) -> None:
        if self.peek() != mark:
            raise JsonError("unexpected character")
        self._offset += 1

    def _count_token(self) -> None:
        self._token_count += 1
        if self._token_count > self._max_tokens:
            raise JsonError("too many values")


_EXHAUSTED: Final = object()


def _fold_name(name: str) -> str:
    """Return a member's name in the form in which ``encoding/json/v2`` compares without case."""
    # Hyphens and underscores are ignored. Of the letters that fold to ASCII only the long s occurs
    # in the names that are bound here.
    return name.replace("-", "").replace("_", "").replace("\u017f", "s").lower()


def _decode_utf8(text: bytes) -> str:
    try:
        # Strict: a surrogate or an overlong form in the bytes is an error, as in Go's ``json/v2``.
        return text.decode()
    except UnicodeDecodeError as error:
        raise JsonError("not UTF-8") from error


def _unescape(text: str) -> str:
    # A character beyond U+FFFF is escaped as two surrogates, which UTF-16 joins. They can only come
    # from escapes, since strict UTF-8 has none.
    units = _ESCAPE.sub(_unescape_one, text).encode("utf-16-le", errors="surrogatepass")
    try:
        return units.decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise JsonError("lone surrogate") from error


def _unescape_one(escape: re.Match[str]) -> str:
    digits, short = escape.groups()
    return chr(int(digits, 16)) if digits else _SHORT_ESCAPES.get(short, short)
