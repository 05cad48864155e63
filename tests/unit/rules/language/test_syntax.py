"""The parser of rules and filters, with the oddities of PocketBase's."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.errors import RuleError, RuleSyntaxError, RuleUnsupportedError
from pgrealtime.rules.language.syntax import (
    MAX_COMPARISONS,
    MAX_DEPTH,
    AndNode,
    CallNode,
    ComparisonNode,
    ExpressionNode,
    IdentifierNode,
    LiteralNode,
    Op,
    OperandNode,
    OrNode,
    parse_expression,
)


def _path(text: str) -> IdentifierNode:
    return IdentifierNode(text, 0, 0)


def _lit(value: str | float) -> LiteralNode:
    return LiteralNode(value, 0, 0)


def _is(name: str, value: str | float, op: Op = Op.EQ, *, is_any: bool = False) -> ComparisonNode:
    return ComparisonNode(_path(name), op, is_any, _lit(value), 0, 0)


A, B, C = _is("a", 1), _is("b", 2), _is("c", 3)


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("a=1", A),
        ("\t a\n=\n1 ", A),
        ("a=1 // c || b=2", A),
        ("// x\na=1//y", A),
        ("a ?!= -0.5", _is("a", -0.5, Op.NE, is_any=True)),
        ("a !~ 'x'", _is("a", "x", Op.NOT_LIKE)),
        ("a>=007", _is("a", 7.0, Op.GE)),
        ("a=-.5", _is("a", -0.5)),
        ("a=1||b=2&&c=3", OrNode((A, AndNode((B, C))))),
        ("a=1&&b=2||c=3", OrNode((AndNode((A, B)), C))),
        ("(a=1||b=2)&&c=3", AndNode((OrNode((A, B)), C))),
        ("a=1&&(b=2&&c=3)", AndNode((A, B, C))),
        ("a=1||(b=2||c=3)", OrNode((A, B, C))),
        ("((((a=1))))", A),
        ("a=1\0 and more", A),
    ],
)
def test_text_means(text: str, expression: ExpressionNode) -> None:
    """``&&`` binds tighter than ``||``; blanks, comments and redundant brackets have no effect."""
    assert parse_expression(text) == expression


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("x = (a=1)", A),
        ("x (a=1)", A),
        ("a=1 (b=2)", AndNode((A, B))),
        ("(a=1)(b=2)", AndNode((A, B))),
        ("a=1 || b=2 (c=3)", OrNode((A, B, C))),
    ],
)
def test_group_in_an_odd_position_drops_what_is_half_finished(
    text: str, expression: ExpressionNode
) -> None:
    """As in PocketBase: the last connective counts, and a comparison before it can be lost."""
    assert parse_expression(text) == expression


@pytest.mark.parametrize(
    ("quoted", "value"),
    [
        (r"'it\'s'", "it's"),
        (r'"it\'s"', "it's"),
        (r"'say \"hi\"'", 'say "hi"'),
        (r"'\n\r\t'", "\n\r\t"),
        (r"'\v\0\u0041\%\_'", r"\v\0\u0041\%\_"),
        (r"'\\\''", r"\'"),
        (r"'a\\'", "a\\"),
        (r"'\\n'", r"\n"),
        ("'two\nlines // no comment ('", "two\nlines // no comment ("),
    ],
)
@pytest.mark.parametrize("form", ["a = {}", "(((a = {})))", "f({}) = 1"])
def test_six_escapes_are_folded_in_both_quotes_everywhere(
    quoted: str, value: str, form: str
) -> None:
    """A backslash before any other character stays, and so does the character."""
    found = parse_expression(form.format(quoted))
    assert isinstance(found, ComparisonNode)
    operand: OperandNode = found.left.args[0] if isinstance(found.left, CallNode) else found.right
    assert operand == _lit(value)


@pytest.mark.parametrize("text", ["(a=1 // it's\n)", "(a=1 // )\n && b=2)", "(a=1 // (\n)"])
def test_comment_in_a_group_counts_for_its_brackets(text: str) -> None:
    """PocketBase's bracket counter doesn't skip comments; the same text ungrouped is accepted."""
    with pytest.raises(RuleSyntaxError):
        parse_expression(text)
    parse_expression(text.removeprefix("(").removesuffix(")"))


def test_comment_may_hide_a_bracket_from_the_group_around() -> None:
    """A quote in a comment opens a text for the counter, which the next one closes."""
    assert parse_expression("(a=1 // it's\n && (b=2) // it's\n)") == AndNode((A, B))


@pytest.mark.parametrize(
    "text",
    [
        *("", "  \n", "// c", "()", "(( ))", "a=1 && ()"),
        *("a", "a=", "=1", "a=1 &&", "a=1 b=2", "a=1 || || b=2", "a 1", "1 2"),
        *("a==1", "a<>1", "a=>1", "a!>1", "a!1", "a??=1", "a=1&b=2", "a=1|b=2", "a=1&&&b=2"),
        *("a=+1", "a=1.", "a=.1", "a=1e3", "a=0x1", "a=1_0", "a=--1", "a=1-2", "a=1.2.3"),
        *("a='x", "a='x\\'", "a=(b='x)", "(a=1", "a=1)", "((a=1)"),
        *("a.=1", "a:=1", "@=1", "_=1", "#=1", "é=1", ".a=1", "$a=1"),
        *("a\r=1", "a\u00a0=1", "a=1 /* c */", "a=1 / 2", "a=1;"),
        *("f (1)=1", "f(=1", "f(1 2)=1", "f(,1)=1", "f(1,,2)=1", "f(a=1)=1", "f((1))=1"),
        *("f(f(f(f(1))))=1", "a.(1)=1"),
        *("a=1 and b=2", "not a=1", "a in (1)", "!a=1"),
    ],
)
def test_what_is_not_the_language_is_refused_with_its_place(text: str) -> None:
    """The span is within the text, so that an operator sees the place."""
    with pytest.raises(RuleSyntaxError) as refused:
        parse_expression(text)
    assert 0 <= refused.value.start <= refused.value.end <= len(text)


def test_operands_remember_their_place() -> None:
    """Errors of later steps have a place in the text, too."""
    found = parse_expression("x=1 || (title ~ 'ab')")
    assert isinstance(found, OrNode)
    last = found.children[1]
    assert isinstance(last, ComparisonNode)
    places = [(part.start, part.end) for part in (last.left, last.right, last)]
    assert places == [(8, 13), (16, 20), (8, 20)]


def test_comparisons_are_limited() -> None:
    """PocketBase's limit: 200, however they are grouped."""
    parse_expression(" || ".join(["(a=1)"] * MAX_COMPARISONS))
    with pytest.raises(RuleSyntaxError):
        parse_expression(" || ".join(["(a=1)"] * (MAX_COMPARISONS + 1)))


def test_nesting_is_limited_only_where_it_means_something() -> None:
    """A hundred thousand redundant brackets don't count as depth; alternation does."""
    assert parse_expression("(" * 100_000 + "a=1" + ")" * 100_000) == A
    with pytest.raises(RuleUnsupportedError):
        parse_expression(_alternating(MAX_DEPTH + 1))
    parse_expression(_alternating(MAX_DEPTH))


def _alternating(depth: int) -> str:
    text = "a=1"
    for level in range(depth):
        text = f"({text}) {'&&' if level % 2 else '||'} b=2"
    return text


@pytest.mark.parametrize(
    "text",
    [
        "(" * 200_000,
        "a.b:" * 50_000,
        "'\\" * 100_000,
        "(a=1 //'\n&& " * 20_000,
        "( // '\n" * 20_000 + "a=1" + "// '\n)" * 20_000,
        "f(" * 100_000,
        "a=1 //" * 50_000,
        "=" * 100_000,
        "1" * 200_000 + "=1",
        "a=1 && " * 50_000,
    ],
    ids=range(10),
)
def test_time_is_bounded_whatever_the_text(text: str) -> None:
    """A long text is refused or parsed in time linear in its length."""
    before = time.perf_counter()
    with contextlib.suppress(RuleError):
        parse_expression(text)
    assert time.perf_counter() - before < 10


_TOKENS = st.sampled_from(
    [
        *("a", "b.c", "@request.auth.id", "f(", "(", ")", "'", '"', "'x'", "1", "-", "."),
        *("=", "!", "~", "?", ">", "&&", "||", "&", "//", "\n", " ", "\\", ",", "\0", "é"),
    ]
)


@given(st.one_of(st.text(), st.lists(_TOKENS, max_size=40).map("".join)))
def test_any_text_is_parsed_or_refused_with_a_place(text: str) -> None:
    """Only a RuleError is raised, and its span is within the text."""
    try:
        parse_expression(text)
    except RuleError as error:
        assert 0 <= error.start <= error.end <= len(text)  # noqa: PT017 (most texts are refused)


def test_half_a_character_is_refused_with_its_position() -> None:
    """UTF-8 has no such text, so PostgreSQL couldn't take it; YAML can contain one."""
    with pytest.raises(RuleSyntaxError, match="half a character") as found:
        parse_expression("title = 'a' || title = 'b\ud800'")

    assert (found.value.start, found.value.end) == (25, 26)
