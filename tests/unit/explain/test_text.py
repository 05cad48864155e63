"""What ``explain`` tells, where no database can be made to say it."""

from __future__ import annotations

import pytest

from pgrealtime.explain.text import (
    Truth,
    Weighed,
    decided_by,
    disagreement,
    named,
    printable,
    shown,
)

YES, NO, UNKNOWN = Truth(True), Truth(False), Truth(None)


def leaf(text: str, truth: Truth) -> Weighed:
    return Weighed(text=text, truth=truth)


def test_a_disagreement_is_said_loudly() -> None:
    lines = list(disagreement(plain=True, engine=False, parts=True))

    assert "please report" in lines[0]
    assert lines[1:4] == [
        "  plain query: delivered",
        "  engine: not delivered",
        "  parts: delivered",
    ]


def test_of_what_must_all_be_true_the_first_that_is_not_decided() -> None:
    parts = leaf("a", YES), leaf("b", UNKNOWN), leaf("c", NO)

    assert decided_by(Weighed(text="", truth=NO, parts=parts)) == [parts[1]]


def test_of_alternatives_all_decided_together() -> None:
    inner = Weighed(text="", truth=NO, parts=(leaf("b", NO), leaf("c", NO)))
    parts = leaf("a", NO), inner

    decided = decided_by(Weighed(text="", truth=NO, is_all=False, parts=parts))
    assert named(decided) == "none of: a; b"


def test_only_the_first_of_many_are_named() -> None:
    assert named([leaf(name, NO) for name in "abcde"]) == "none of: a; b; c; 2 more"
    assert named([leaf("a", NO)]) == "a"


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
    assert shown(value) == text


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert printable("a\x1b[2Jé\u202e\ud800\n") == r"a\x1b[2Jé\u202e\ud800\n"
