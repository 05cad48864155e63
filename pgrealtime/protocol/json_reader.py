"""A pull reader of JSON, exactly as strict as PocketBase's: Go's ``encoding/json/v2``.

The standard library's decoder is too kind (repeated names, lone surrogates, ``NaN``), keeps
nothing of a text that breaks off, and builds whatever it is sent. This one hands out one token at
a time, so its caller keeps what it read before a fault and skips what it has no use for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isinf
from typing import Final

_SPACE: Final = re.compile(rb"[ \t\n\r]*")
_NUMBER: Final = re.compile(
    rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++|(?!\.))(?:[eE][+-]?[0-9]++|(?![eE]))"
)
_PLAIN: Final = re.compile(rb'"([^"\\\x00-\x1f]*+)"')
_STRING: Final = re.compile(rb'"((?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+)"')
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
_PAIR: Final = re.compile("([\ud800-\udbff])([\udc00-\udfff])")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_SHORT: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS: Final = (b"null", b"true", b"false")

MOST_TOKENS: Final = 200_000
"""What a text may hold, so that a small upload can't buy a long computation: a hundred times
what the largest acceptable subscribe call needs."""

_DEEPEST: Final = 10_000
"""Levels of nesting; as in Go's ``jsontext``."""


class JsonError(ValueError):
    """The text isn't JSON, or isn't of the shape its reader asked for."""


class JsonRangeError(JsonError):
    """A number so large that no double reaches it."""


class JsonReader:
    """The tokens of one text. Every method consumes one whole value unless it says otherwise.

    Args:
        text: UTF-8; a byte order mark is a fault.
        most_tokens: More of them than this are a fault too.
    """

    def __init__(self, text: bytes, *, most_tokens: int = MOST_TOKENS) -> None:
        self._text = text
        self._most_tokens = most_tokens
        self._at = 0
        self._colon_is_due = False
        self._depth = 0
        self._tokens = 0

    @property
    def tokens_left(self) -> int:
        """How many more of them are no fault."""
        return self._most_tokens - self._tokens

    def peek(self) -> bytes:
        """Return the first byte of the next value; empty at the end."""
        if self._colon_is_due:
            self._colon_is_due = False
            self._punctuation(b":")
        space = _SPACE.match(self._text, self._at)
        assert space is not None  # it matches the empty text too
        self._at = space.end()
        return self._text[self._at : self._at + 1]

    def null(self) -> bool:
        """Whether the value is null; consumes it only then."""
        if self.peek() != b"n":
            return False
        self._literal()
        return True

    def string(self) -> str:
        """Return a string.

        Raises:
            JsonError: Anything else, also a lone surrogate or a text that isn't UTF-8.
        """
        self._count()
        if self.peek() != b'"':
            raise JsonError("not a string")
        if plain := _PLAIN.match(self._text, self._at):
            self._at = plain.end()
            return _decoded(plain[1])
        escaped = _STRING.match(self._text, self._at)
        if escaped is None:
            raise JsonError("broken string")
        self._at = escaped.end()
        return _unescaped(_decoded(escaped[1]))

    def number(self) -> float:
        """Return a number, as a double.

        Raises:
            JsonError: Anything else; JsonRangeError if it is a number but no double.
        """
        value = float(self._digits())
        if isinf(value):
            raise JsonRangeError("number out of range")
        return value

    def boolean(self) -> bool:
        """Return true or false."""
        if self.peek() not in (b"t", b"f"):
            raise JsonError("not a boolean")
        return self._literal() == b"true"

    def members(self) -> Iterator[str]:
        """Yield the names of an object's members; its caller takes each value in between.

        Raises:
            JsonError: Not an object, broken, or a name that came before.

        A colon that isn't there shows when the value is asked for, not before.
        """
        self._open(b"{")
        seen: set[str] = set()
        while self._another(b"}", first=not seen):
            name = self.string()
            if name in seen:
                raise JsonError("repeated name")
            seen.add(name)
            self._colon_is_due = True
            yield name
        self._close()

    def elements(self) -> Iterator[None]:
        """Step through an array; its caller takes one value at each step.

        Raises:
            JsonError: Not an array, or broken.
        """
        self._open(b"[")
        first = True
        while self._another(b"]", first=first):
            first = False
            yield
        self._close()

    def skip(self) -> None:
        """Consume a value of any kind, however deep, checking it as if it were wanted."""
        open_: list[Iterator[object]] = []
        while True:
            match self.peek():
                case b"{":
                    open_.append(self.members())
                case b"[":
                    open_.append(self.elements())
                case b'"':
                    self.string()
                case b"t" | b"f" | b"n":
                    self._literal()
                case _:
                    self._digits()
            while open_ and next(open_[-1], _END) is _END:
                open_.pop()
            if not open_:
                return

    def end(self) -> None:
        """Make sure that nothing but white space is left."""
        if self.peek():
            raise JsonError("something follows the value")

    def _digits(self) -> bytes:
        self._count()
        self.peek()
        number = _NUMBER.match(self._text, self._at)
        if number is None:
            raise JsonError("not a number")
        self._at = number.end()
        return number[0]

    def _literal(self) -> bytes:
        self._count()
        for word in _LITERALS:
            if self._text.startswith(word, self._at):
                self._at += len(word)
                return word
        raise JsonError("unknown word")

    def _open(self, bracket: bytes) -> None:
        self._count()
        self._punctuation(bracket)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise JsonError("nested too deeply")

    def _close(self) -> None:
        self._at += 1
        self._depth -= 1

    def _another(self, bracket: bytes, *, first: bool) -> bool:
        """Step over the comma before the next member; whether there is one before the bracket."""
        found = self.peek()
        if found == bracket:
            return False
        if not first:
            self._punctuation(b",")
        return True

    def _punctuation(self, mark: bytes) -> None:
        if self.peek() != mark:
            raise JsonError("unexpected character")
        self._at += 1

    def _count(self) -> None:
        self._tokens += 1
        if self._tokens > self._most_tokens:
            raise JsonError("too many values")


_END: Final = object()


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise JsonError("not UTF-8") from error


def _unescaped(text: str) -> str:
    whole = _PAIR.sub(_joined, _ESCAPE.sub(_character, text))
    if _SURROGATE.search(whole):
        raise JsonError("lone surrogate")
    return whole


def _character(escape: re.Match[str]) -> str:
    digits, short = escape.groups()
    return chr(int(digits, 16)) if digits else _SHORT.get(short, short)


def _joined(pair: re.Match[str]) -> str:
    high, low = (ord(half) for half in pair.groups())
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))
