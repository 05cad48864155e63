"""Rule or filter text to syntax that remembers its place; first step of rules/.

The grammar is PocketBase's, odd corners included: see ``parse`` and ``_group_end``.
Nesting is kept on a stack of our own, so no text can exhaust Python's, and every step is linear
but for one that is budgeted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NoReturn, TypeAlias

from pgrealtime.errors import RuleSyntaxError, RuleUnsupportedError

MAX_COMPARISONS = 200
"""PocketBase's own limit for one rule or filter."""
MAX_CALL_DEPTH = 3
"""PocketBase's own limit for functions within functions."""
MAX_DEPTH = 100
"""Alternations of ``&&`` and ``||``, after brackets that change nothing are gone.

PocketBase has no limit; the SQL printer recurses, so there must be one.
"""
_MAX_RESCANS = 1000
"""Groups whose end must be looked for anew because comments hide brackets from one another."""


@dataclass(frozen=True, slots=True)
class Lit:
    """A text or a number; numbers are floats, but for whole ones that no float is."""

    value: str | float
    start: int = field(compare=False)
    end: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class Path:
    """An identifier as written: field path, ``@request...``, macro or keyword."""

    text: str
    start: int = field(compare=False)
    end: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class Call:
    """A function with its arguments."""

    name: str
    args: tuple[Operand, ...]
    start: int = field(compare=False)
    end: int = field(compare=False)


Operand: TypeAlias = Lit | Path | Call


class Op(Enum):
    """What a comparison asks, without the ``?`` that makes it ask for any."""

    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    LIKE = "~"
    NOT_LIKE = "!~"


@dataclass(frozen=True, slots=True)
class Cmp:
    """Two operands compared; ``is_any`` is the leading ``?``."""

    left: Operand
    op: Op
    is_any: bool
    right: Operand
    start: int = field(compare=False)
    end: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class And:
    """True if every part is; at least two parts, none of them an And."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """True if some part is; at least two parts, none of them an Or."""

    parts: tuple[Expression, ...]


Expression: TypeAlias = Cmp | And | Or


def parse(text: str) -> Expression:
    """Return what the text says.

    ``&&`` binds stronger than ``||``. A group is accepted in any position, as in PocketBase: a
    half-finished comparison before it is dropped, and without a join it takes the last one seen,
    or AND.

    Raises:
        RuleSyntaxError: The text is not of the language, an empty one included.
        RuleUnsupportedError: It nests deeper than this program goes.
    """
    if found := _SURROGATE.search(text):
        # No text that Postgres could be asked with; YAML can write one, a topic can't.
        raise RuleSyntaxError("half a character", start=found.start(), end=found.end())
    return _Parser(text).run()


def comparisons(expression: Expression) -> Iterator[Cmp]:
    """Every comparison of the expression, from left to right."""
    match expression:
        case Cmp():
            yield expression
        case And(parts) | Or(parts):
            for part in parts:
                yield from comparisons(part)


_BLANK = re.compile(r"(?:[ \t\n]+|//[^\n]*)*")
_NUMBER = re.compile(r"-?[0-9]*(?:\.[0-9]*)?")
_GOOD_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?|-\.[0-9]+")
_IDENTIFIER = re.compile(r"[A-Za-z@_#][A-Za-z0-9_.:]*")
_TEXT = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_ESCAPE = re.compile(r"""\\([\\'"nrt])""")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SIGN = re.compile(r"[=!><~?]+")
_JOIN = re.compile(r"[&|]+")
_BRACKET = re.compile(r"""[()'"]""")
_ESCAPED = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "r": "\r", "t": "\t"}
_OPERATORS = {op.value: op for op in Op}


class _Sign(str):
    """A comparison sign, as written."""

    __slots__ = ()


class _Join(str):
    """``&&`` or ``||``."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Group:
    """The inside of a pair of brackets."""

    start: int
    end: int


_Token: TypeAlias = Operand | _Sign | _Join | _Group


class _Step(Enum):
    LEFT = auto()
    SIGN = auto()
    RIGHT = auto()
    JOIN = auto()


@dataclass(slots=True)
class _Level:
    """A group being read: what it has so far and what may follow."""

    start: int
    end: int
    step: _Step = _Step.LEFT
    is_or: bool = False
    left: Operand | None = None
    sign: str = ""
    alternatives: list[list[_Node]] = field(default_factory=list)

    def add(self, node: _Node) -> None:
        if self.is_or or not self.alternatives:
            self.alternatives.append([])
        self.alternatives[-1].append(node)
        self.step = _Step.JOIN


@dataclass(frozen=True, slots=True)
class _Node:
    expression: Expression
    depth: int


class _Parser:
    """Reads one text; the whole state of it."""

    def __init__(self, text: str) -> None:
        # PocketBase's scanner takes NUL for the end.
        self._text = text.partition("\0")[0]
        self._at = 0
        self._closing: dict[int, int] = {}
        self._rescans = 0
        self._comparisons = 0

    def run(self) -> Expression:
        levels = [_Level(0, len(self._text))]
        while True:
            level = levels[-1]
            begin, token = self._next(level.end)
            if isinstance(token, _Group):
                levels.append(_Level(token.start, token.end))
                self._at = token.start
            elif token is not None:
                self._feed(level, token, begin)
            else:
                node = self._finish(levels.pop())
                if not levels:
                    return node.expression
                self._at = level.end + 1
                levels[-1].add(node)

    def _feed(self, level: _Level, token: _Token, begin: int) -> None:
        """Take one token that isn't a group."""
        match level.step, token:
            case _Step.LEFT, Lit() | Path() | Call():
                level.left, level.step = token, _Step.SIGN
            case _Step.SIGN, _Sign():
                level.sign, level.step = token, _Step.RIGHT
            case _Step.RIGHT, Lit() | Path() | Call():
                level.add(_Node(self._compare(level, token), 0))
            case _Step.JOIN, _Join():
                level.is_or, level.step = token == "||", _Step.LEFT  # noqa: S105 (a token of the text)
            case _:
                self._fail(f"expected {_EXPECTED[level.step]}", begin, self._at)

    def _compare(self, level: _Level, right: Operand) -> Cmp:
        assert level.left is not None
        self._comparisons += 1
        if self._comparisons > MAX_COMPARISONS:
            self._fail(
                f"more than {MAX_COMPARISONS} comparisons in one expression",
                level.left.start,
                right.end,
            )
        is_any = level.sign.startswith("?")
        op = _OPERATORS[level.sign[is_any:]]
        return Cmp(level.left, op, is_any, right, level.left.start, right.end)

    def _finish(self, level: _Level) -> _Node:
        """Join what the level has, now that its end is reached."""
        if level.step is not _Step.JOIN:
            is_empty = not level.alternatives and level.left is None
            message = "empty expression" if is_empty else "incomplete expression"
            self._fail(message, level.start, level.end)
        node = _join(Or, [_join(And, alternative) for alternative in level.alternatives])
        if node.depth > MAX_DEPTH:
            raise RuleUnsupportedError(
                f'"&&" and "||" alternate deeper than {MAX_DEPTH} levels',
                start=level.start,
                end=level.end,
            )
        return node

    def _next(self, limit: int) -> tuple[int, _Token | None]:
        """Where the next token begins, and it; None at the limit. Leaves ``_at`` behind it."""
        self._skip_blanks(limit)
        begin = self._at
        if begin >= limit:
            return begin, None
        char = self._text[begin]
        if char == "(":
            return begin, _Group(begin + 1, self._group_end(begin, limit))
        operand = self._operand(limit, MAX_CALL_DEPTH)
        if operand is not None:
            return begin, operand
        if sign := self._take(_SIGN, limit):
            if sign.removeprefix("?") not in _OPERATORS:
                self._fail(f'invalid comparison "{sign}"', begin, self._at)
            return begin, _Sign(sign)
        if join := self._take(_JOIN, limit):
            if join not in {"&&", "||"}:
                self._fail(f'invalid join "{join}"', begin, self._at)
            return begin, _Join(join)
        if char == "/":
            self._fail('a comment begins with "//"', begin, begin + 1)
        return self._fail(f"unexpected character {char!r}", begin, begin + 1)

    def _operand(self, limit: int, depth: int) -> Operand | None:
        """Take the operand that begins here, if one does."""
        begin = self._at
        char = self._text[begin]
        if char in "'\"":
            return self._quoted(limit)
        if char == "-" or "0" <= char <= "9":
            number = self._take(_NUMBER, limit)
            if not _GOOD_NUMBER.fullmatch(number):
                self._fail(f'invalid number "{number}"', begin, self._at)
            double = float(number)
            # A number too large for a double is 0 to PocketBase.
            value = 0.0 if math.isinf(double) else double_or_whole(number, double)
            return Lit(value, begin, self._at)
        name = self._take(_IDENTIFIER, limit)
        if not name:
            return None
        is_call = self._at < limit and self._text[self._at] == "("
        if name[-1] in ".:" or name in {"@", "_", "#"}:
            kind = "function name" if is_call else "identifier"
            self._fail(f'invalid {kind} "{name}"', begin, self._at)
        return self._call(name, begin, limit, depth) if is_call else Path(name, begin, self._at)

    def _quoted(self, limit: int) -> Lit:
        begin = self._at
        quoted = self._take(_TEXT, limit)
        if not quoted:
            self._fail("unterminated text", begin, limit)
        value = _ESCAPE.sub(lambda found: _ESCAPED[found[1]], quoted[1:-1])
        return Lit(value, begin, self._at)

    def _call(self, name: str, begin: int, limit: int, depth: int) -> Call:
        """Take the arguments; a comma may follow the last one."""
        if depth <= 0:
            self._fail(f"functions nest deeper than {MAX_CALL_DEPTH}", begin, self._at)
        self._at += 1
        args: list[Operand] = []
        wants_comma = False
        while True:
            self._skip_blanks(limit)
            if self._at >= limit:
                self._fail(f'function "{name}" is not closed', begin, limit)
            char = self._text[self._at]
            if char == ")":
                self._at += 1
                return Call(name, tuple(args), begin, self._at)
            if (char == ",") is not wants_comma:
                what = "expected" if wants_comma else "unexpected"
                self._fail(f'{what} comma in function "{name}"', self._at, self._at + 1)
            if wants_comma:
                self._at += 1
            else:
                args.append(self._argument(name, limit, depth))
            wants_comma = not wants_comma

    def _argument(self, name: str, limit: int, depth: int) -> Operand:
        operand = self._operand(limit, depth - 1)
        if operand is None:
            self._fail(f'unexpected character in function "{name}"', self._at, self._at + 1)
        return operand

    def _skip_blanks(self, limit: int) -> None:
        self._take(_BLANK, limit)

    def _take(self, pattern: re.Pattern[str], limit: int) -> str:
        found = pattern.match(self._text, self._at, limit)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]

    def _group_end(self, begin: int, limit: int) -> int:
        """Where the bracket that closes the one at ``begin`` stands.

        PocketBase counts brackets and steps over texts, but knows no comments here: a quote or a
        bracket within a comment within a group counts. One count finds the ends of all brackets
        that it sees; only one that an outer count took for part of a text needs a count of its own.
        """
        if begin not in self._closing:
            self._rescans += 1
            if self._rescans > _MAX_RESCANS:
                raise RuleUnsupportedError(
                    "too many groups with quotes in their comments", start=begin, end=begin + 1
                )
            self._count_brackets(begin, limit)
        return self._closing[begin]

    def _count_brackets(self, begin: int, limit: int) -> None:
        opened: list[int] = []
        at = begin
        while found := _BRACKET.search(self._text, at, limit):
            at = found.end()
            if found[0] == "(":
                opened.append(found.start())
            elif found[0] == ")":
                self._closing[opened.pop()] = found.start()
                if not opened:
                    return
            else:
                text = _TEXT.match(self._text, found.start(), limit)
                if text is None:
                    self._fail("unterminated text", found.start(), limit)
                at = text.end()
        self._fail("a bracket is not closed", opened[-1], limit)

    def _fail(self, message: str, start: int, end: int) -> NoReturn:
        raise RuleSyntaxError(message, start=start, end=end)


def double_or_whole(text: str, double: float) -> float:
    """Return the double that PocketBase makes of a number, or the number if no double is it.

    A rule that names somebody's id must not mean the neighbour's.
    """
    digits = text.lstrip("+-0")
    if len(digits) <= _DIGITS_OF_DOUBLES or not digits.isdigit():
        return double
    whole = int(digits)
    return double if int(abs(double)) == whole else -whole if text.startswith("-") else whole


_DIGITS_OF_DOUBLES = 15
"""All whole numbers of so many digits are doubles."""


_EXPECTED = {
    _Step.LEFT: "an identifier, text, number, function or group",
    _Step.SIGN: "a comparison",
    _Step.RIGHT: "an identifier, text, number or function",
    _Step.JOIN: '"&&" or "||"',
}


def _join(kind: type[And | Or], nodes: list[_Node]) -> _Node:
    """One node for many: those of the same kind are taken apart, a single one stays itself."""
    if len(nodes) == 1:
        return nodes[0]
    parts: list[Expression] = []
    depth = 0
    for node in nodes:
        same = isinstance(node.expression, kind)
        parts += node.expression.parts if isinstance(node.expression, kind) else [node.expression]
        depth = max(depth, node.depth if same else node.depth + 1)
    return _Node(kind(tuple(parts)), depth)
