from __future__ import annotations

import pytest

from pgrealtime.errors import underline_span
from pgrealtime.rules.rule_set import syntax_problems
from tests.config_values import parse_config


@pytest.mark.parametrize(
    ("text", "span", "expected"),
    [
        ("a = b", (0, 1), "a = b\n^"),
        ("a = b", (4, 5), "a = b\n    ^"),
        ("a =", (3, 3), "a =\n   ^"),
        ("", (0, 0), "\n^"),
        ("a = 1\n  && bb = 2\n  && c = 3", (11, 13), "  && bb = 2\n     ^^"),
        ("a = 'x\ny'", (4, 9), "a = 'x\n    ^^"),
        ("t = '中文' && é = 1", (12, 13), "t = '中文' && é = 1\n              ^"),
        ("t ~ '中文'", (5, 7), "t ~ '中文'\n     ^^^^"),
        ("\ta = b", (1, 2), " a = b\n ^"),
    ],
    ids=["first", "last", "end", "empty", "line", "lines", "after wide", "wide", "tab"],
)
def test_carets_are_under_the_position(text: str, span: tuple[int, int], expected: str) -> None:
    """Also after ideographs, which take two cells of a terminal each."""
    indented = "\n".join(f"    {line}" for line in expected.split("\n"))
    assert underline_span(text, *span) == indented


def test_empty_and_null_rules_have_no_syntax() -> None:
    config = parse_config(
        {
            "collections": {
                "a": {"table": "a", "list_rule": "", "view_rule": None},
                "b": {"table": "b", "list_rule": "(", "view_rule": "a =", "manage_rule": ")"},
                "c": {"table": "c", "auth_rule": "a"},
            }
        }
    )
    assert [problem.path for problem in syntax_problems(config.collections)] == [
        "collections.b.list_rule",
        "collections.b.view_rule",
        "collections.b.manage_rule",
        "collections.c.auth_rule",
    ]
