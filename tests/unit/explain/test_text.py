"""Parts of ``explain``'s output that no database can be made to cause."""

from __future__ import annotations

import pytest

from pgrealtime.explain.text import (
    ConditionVerdict,
    EvaluatedFragment,
    deciding_fragments,
    describe_fragments,
    disagreement_lines,
    escape_unprintable,
    format_value,
)

YES, NO, UNKNOWN = ConditionVerdict(True), ConditionVerdict(False), ConditionVerdict(None)


def leaf(text: str, truth: ConditionVerdict) -> EvaluatedFragment:
    return EvaluatedFragment(display_text=text, verdict=truth)


def test_a_disagreement_is_said_loudly() -> None:
    lines = list(disagreement_lines(plain=True, engine=False, parts=True))

    assert "please report" in lines[0]
    assert lines[1:4] == [
        "  reference query: delivered",
        "  engine: not delivered",
        "  parts: delivered",
    ]


def test_of_what_must_all_be_true_the_first_that_is_not_decided() -> None:
    parts = leaf("a", YES), leaf("b", UNKNOWN), leaf("c", NO)

    assert deciding_fragments(EvaluatedFragment(display_text="", verdict=NO, fragments=parts)) == [
        parts[1]
    ]


def test_of_alternatives_all_decided_together() -> None:
    inner = EvaluatedFragment(display_text="", verdict=NO, fragments=(leaf("b", NO), leaf("c", NO)))
    parts = leaf("a", NO), inner

    decided = deciding_fragments(
        EvaluatedFragment(display_text="", verdict=NO, is_conjunction=False, fragments=parts)
    )
    assert describe_fragments(decided) == "none of: a; b"


def test_only_the_first_of_many_are_named() -> None:
    assert describe_fragments([leaf(name, NO) for name in "abcde"]) == "none of: a; b; c; 2 more"
    assert describe_fragments([leaf("a", NO)]) == "a"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (5.0, "5"),
        (5, "5"),
        ('a"b', r'"a\"b"'),
        ("x" * 100, f'"{"x" * 80}"...'),
    ],
)
def test_values_look_like_those_of_a_rule(value: str | float | None, text: str) -> None:
    assert format_value(value) == text


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert escape_unprintable("a\x1b[2Jé\u202e\ud800\n") == r"a\x1b[2Jé\u202e\ud800\n"
