"""Parses the text of a rule or filter into a syntax tree with positions. The first step of a rule.

The grammar is that of PocketBase's parser (github.com/ganigeorgiev/fexpr), its oddities included:
see ``parse_expression`` and ``_group_end``. Filters come from clients: groups nest on a stack of
the parser's own, so no text can exhaust Python's, and every step is linear in the text's length but
one, which is bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NoReturn, TypeAlias

from pgrealtime.errors import RuleSyntaxError, RuleUnsupportedError
from pgrealtime.rules.language.sqlite_values import double_or_exact_integer

MAX_COMPARISONS = 200
"""PocketBase's limit for one rule or filter."""
MAX_CALL_DEPTH = 3
"""PocketBase's limit for functions within functions."""
MAX_DEPTH = 100
"""Alternations of ``&&`` and ``||``, after brackets without effect are removed.

PocketBase has no limit; the SQL printer recurses, so there must be one.
"""
_MAX_BRACKET_RESCANS = 1000
"""Groups whose end must be searched anew because comments hide brackets from one another."""


@dataclass(frozen=True, slots=True)
class LiteralNode:
    """A text or a number; numbers are floats, except whole ones that no float is."""

    value: str | float
    start: int = field(compare=False)
    end: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class IdentifierNode:
    """An identifier as written: field path, ``@request...``, macro or keyword."""

    text: str
    start: int = field(compare=False)
    end: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class CallNode:
    """A function with its arguments."""

    name: str
    args: tuple[OperandNode, ...]
    start: int = field(compare=False)
    end: int = field(compare=False)


OperandNode: TypeAlias = LiteralNode | IdentifierNode | CallNode


class Op(Enum):
    """A comparison operator, without the ``?`` that makes it match any value."""

    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    LIKE = "~"
    NOT_LIKE = "!~"


@dataclass(frozen=True, slots=True)
class ComparisonNode:
    """Two operands compared; ``is_any`` is the leading ``?``."""

    left: OperandNode
    op: Op
    is_any: bool
    right: OperandNode
    start: int = field(compare=False)
    end: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class AndNode:
    """True if every child is; at least two children, none of them an AndNode."""

    children: tuple[ExpressionNode, ...]


@dataclass(frozen=True, slots=True)
class OrNode:
    """True if some child is; at least two children, none of them an OrNode."""

    children: tuple[ExpressionNode, ...]


ExpressionNode: TypeAlias = ComparisonNode | AndNode | OrNode


def parse_expression(text: str) -> ExpressionNode:
    """Return the syntax tree of the text.

    ``&&`` binds stronger than ``||``. A group is accepted in any position, as in PocketBase: an
    unfinished comparison before it is dropped, and without a connective it takes the last one, or
    AND.

    Raises:
        RuleSyntaxError: The text is not of the language, an empty one included.
        RuleUnsupportedError: It nests deeper than MAX_DEPTH.
    """
    if match := _SURROGATE.search(text):
        # PostgreSQL has no such text. YAML can contain one, a topic can't.
        raise RuleSyntaxError("half a character", start=match.start(), end=match.end())
    return _Parser(text).parse()


def comparison_nodes(expression: ExpressionNode) -> Iterator[ComparisonNode]:
    """Yield every comparison of the expression, from left to right."""
    match expression:
        case ComparisonNode():
            yield expression
        case AndNode(parts) | OrNode(parts):
            for part in parts:
                yield from comparison_nodes(part)


_BLANK = re.compile(r"(?:[ \t\n]+|//[^\n]*)*")
_NUMBER = re.compile(r"-?[0-9]*(?:\.[0-9]*)?")
_VALID_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?|-\.[0-9]+")
_IDENTIFIER = re.compile(r"[A-Za-z@_#][A-Za-z0-9_.:]*")
_TEXT = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_ESCAPE = re.compile(r"""\\([\\'"nrt])""")
_SURROGATE = re.compile("[\ud800-\udfff]")
_OPERATOR_SIGN = re.compile(r"[=!><~?]+")
_CONNECTIVE = re.compile(r"[&|]+")
_BRACKET = re.compile(r"""[()'"]""")
_ESCAPED_CHARACTERS = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "r": "\r", "t": "\t"}
_OPERATORS = {op.value: op for op in Op}
_CONNECTIVES = frozenset({"&&", "||"})


class _Expected(Enum):
    LEFT = "an identifier, text, number, function or group"
    OPERATOR = "a comparison"
    RIGHT = "an identifier, text, number or function"
    CONNECTIVE = '"&&" or "||"'


@dataclass(slots=True)
class _OpenGroup:
    """The inside of a pair of brackets: its comparisons so far and what may follow."""

    start: int
    end: int
    expected: _Expected = _Expected.LEFT
    is_or: bool = False
    left: OperandNode | None = None
    operator: str = ""
    alternatives: list[list[_Subtree]] = field(default_factory=list)

    def add(self, node: _Subtree) -> None:
        if self.is_or or not self.alternatives:
            self.alternatives.append([])
        self.alternatives[-1].append(node)
        self.expected = _Expected.CONNECTIVE


@dataclass(frozen=True, slots=True)
class _Subtree:
    expression: ExpressionNode
    depth: int


_Token: TypeAlias = OperandNode | str | _OpenGroup
"""An operand, a comparison operator or connective as written, or a group."""


class _Parser:
    """Parses one text. ``_position`` is behind the last token that was read."""

    def __init__(self, text: str) -> None:
        # PocketBase's scanner takes NUL for the end of the text.
        self._text = text.partition("\0")[0]
        self._position = 0
        self._closing_brackets: dict[int, int] = {}
        self._rescan_count = 0
        self._comparison_count = 0

    def parse(self) -> ExpressionNode:
        groups = [_OpenGroup(0, len(self._text))]
        while True:
            group = groups[-1]
            begin, token = self._next_token(group.end)
            if isinstance(token, _OpenGroup):
                groups.append(token)
                self._position = token.start
            elif token is not None:
                self._accept_token(group, token, begin)
            else:
                tree = self._close_group(groups.pop())
                if not groups:
                    return tree.expression
                self._position = group.end + 1
                groups[-1].add(tree)

    def _accept_token(self, group: _OpenGroup, token: _Token, begin: int) -> None:
        match group.expected, token:
            case _Expected.LEFT, LiteralNode() | IdentifierNode() | CallNode():
                group.left, group.expected = token, _Expected.OPERATOR
            case _Expected.OPERATOR, str() if token not in _CONNECTIVES:
                group.operator, group.expected = token, _Expected.RIGHT
            case _Expected.RIGHT, LiteralNode() | IdentifierNode() | CallNode():
                group.add(_Subtree(self._make_comparison(group, token), 0))
            case _Expected.CONNECTIVE, "&&" | "||" as connective:
                group.is_or, group.expected = connective == "||", _Expected.LEFT
            case _:
                self._fail(f"expected {group.expected.value}", begin, self._position)

    def _make_comparison(self, group: _OpenGroup, right: OperandNode) -> ComparisonNode:
        left = group.left
        assert left is not None
        self._comparison_count += 1
        if self._comparison_count > MAX_COMPARISONS:
            message = f"more than {MAX_COMPARISONS} comparisons in one expression"
            self._fail(message, left.start, right.end)
        is_any = group.operator.startswith("?")
        op = _OPERATORS[group.operator[is_any:]]
        return ComparisonNode(left, op, is_any, right, left.start, right.end)

    def _close_group(self, group: _OpenGroup) -> _Subtree:
        if group.expected is not _Expected.CONNECTIVE:
            is_empty = not group.alternatives and group.left is None
            message = "empty expression" if is_empty else "incomplete expression"
            self._fail(message, group.start, group.end)
        tree = _combine(OrNode, [_combine(AndNode, nodes) for nodes in group.alternatives])
        if tree.depth > MAX_DEPTH:
            message = f'"&&" and "||" alternate deeper than {MAX_DEPTH} levels'
            raise RuleUnsupportedError(message, start=group.start, end=group.end)
        return tree

    def _next_token(self, limit: int) -> tuple[int, _Token | None]:
        """Return where the next token begins, and the token; None at the limit."""
        self._match(_BLANK, limit)
        begin = self._position
        if begin >= limit:
            return begin, None
        char = self._text[begin]
        if char == "(":
            return begin, _OpenGroup(begin + 1, self._group_end(begin, limit))
        operand = self._parse_operand(limit, MAX_CALL_DEPTH)
        if operand is not None:
            return begin, operand
        if sign := self._match(_OPERATOR_SIGN, limit):
            if sign.removeprefix("?") not in _OPERATORS:
                self._fail(f'invalid comparison "{sign}"', begin, self._position)
            return begin, sign
        if join := self._match(_CONNECTIVE, limit):
            if join not in _CONNECTIVES:
                self._fail(f'invalid join "{join}"', begin, self._position)
            return begin, join
        if char == "/":
            self._fail('a comment begins with "//"', begin)
        return self._fail(f"unexpected character {char!r}", begin)

    def _parse_operand(self, limit: int, depth: int) -> OperandNode | None:
        begin = self._position
        char = self._text[begin]
        if char in "'\"":
            return self._parse_text(limit)
        if char == "-" or "0" <= char <= "9":
            number = self._match(_NUMBER, limit)
            if not _VALID_NUMBER.fullmatch(number):
                self._fail(f'invalid number "{number}"', begin, self._position)
            double = float(number)
            # A number too large for a double is 0 to PocketBase.
            value = 0.0 if math.isinf(double) else double_or_exact_integer(number, double)
            return LiteralNode(value, begin, self._position)
        name = self._match(_IDENTIFIER, limit)
        if not name:
            return None
        is_call = self._position < limit and self._text[self._position] == "("
        if name[-1] in ".:" or name in {"@", "_", "#"}:
            kind = "function name" if is_call else "identifier"
            self._fail(f'invalid {kind} "{name}"', begin, self._position)
        if is_call:
            return self._parse_call(name, begin, limit, depth)
        return IdentifierNode(name, begin, self._position)

    def _parse_text(self, limit: int) -> LiteralNode:
        begin = self._position
        quoted = self._match(_TEXT, limit)
        if not quoted:
            self._fail("unterminated text", begin, limit)
        value = _ESCAPE.sub(lambda match: _ESCAPED_CHARACTERS[match[1]], quoted[1:-1])
        return LiteralNode(value, begin, self._position)

    def _parse_call(self, name: str, begin: int, limit: int, depth: int) -> CallNode:
        """Return a call whose arguments begin here; a comma may follow the last one."""
        if depth <= 0:
            self._fail(f"functions nest deeper than {MAX_CALL_DEPTH}", begin, self._position)
        self._position += 1
        args: list[OperandNode] = []
        wants_comma = False
        while True:
            self._match(_BLANK, limit)
            if self._position >= limit:
                self._fail(f'function "{name}" is not closed', begin, limit)
            char = self._text[self._position]
            if char == ")":
                self._position += 1
                return CallNode(name, tuple(args), begin, self._position)
            if (char == ",") is not wants_comma:
                what = "expected" if wants_comma else "unexpected"
                self._fail(f'{what} comma in function "{name}"', self._position)
            if wants_comma:
                self._position += 1
            elif operand := self._parse_operand(limit, depth - 1):
                args.append(operand)
            else:
                self._fail(f'unexpected character in function "{name}"', self._position)
            wants_comma = not wants_comma

    def _match(self, pattern: re.Pattern[str], limit: int) -> str:
        match = pattern.match(self._text, self._position, limit)
        if match is None:
            return ""
        self._position = match.end()
        return match[0]

    def _group_end(self, begin: int, limit: int) -> int:
        """Return the position of the bracket that closes the one at ``begin``.

        PocketBase counts brackets and skips texts, but not comments: a quote or a bracket within a
        comment within a group counts. One count finds the ends of all brackets that it sees; only a
        bracket that an outer count took for part of a text needs a count of its own. Without the
        bound on those a text could take time by the square of its length.
        """
        if begin not in self._closing_brackets:
            self._rescan_count += 1
            if self._rescan_count > _MAX_BRACKET_RESCANS:
                message = "too many groups with quotes in their comments"
                raise RuleUnsupportedError(message, start=begin, end=begin + 1)
            self._count_brackets(begin, limit)
        return self._closing_brackets[begin]

    def _count_brackets(self, begin: int, limit: int) -> None:
        opened: list[int] = []
        position = begin
        while bracket := _BRACKET.search(self._text, position, limit):
            position = bracket.end()
            if bracket[0] == "(":
                opened.append(bracket.start())
            elif bracket[0] == ")":
                self._closing_brackets[opened.pop()] = bracket.start()
                if not opened:
                    return
            else:
                text = _TEXT.match(self._text, bracket.start(), limit)
                if text is None:
                    self._fail("unterminated text", bracket.start(), limit)
                position = text.end()
        self._fail("a bracket is not closed", opened[-1], limit)

    def _fail(self, message: str, start: int, end: int | None = None) -> NoReturn:
        """Refuse the text from ``start`` to ``end``, or the one character there."""
        raise RuleSyntaxError(message, start=start, end=start + 1 if end is None else end)


def _combine(kind: type[AndNode | OrNode], nodes: list[_Subtree]) -> _Subtree:
    """Return one node of the kind; children of that kind are replaced by their own children."""
    if len(nodes) == 1:
        return nodes[0]
    children: list[ExpressionNode] = []
    depth = 0
    for node in nodes:
        if isinstance(node.expression, kind):
            children += node.expression.children
            depth = max(depth, node.depth)
        else:
            children.append(node.expression)
            depth = max(depth, node.depth + 1)
    return _Subtree(kind(tuple(children)), depth)
