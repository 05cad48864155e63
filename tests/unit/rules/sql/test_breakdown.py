"""Splitting a rule into its comparisons keeps its meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pgrealtime.errors import RuleError
from pgrealtime.rules.language.syntax import parse_expression
from pgrealtime.rules.sql.breakdown import Clause, ClauseGroup, split_rule

_TESTS = Path(__file__).parents[3]


def recorded() -> list[str]:
    """Every rule and filter that was recorded from PocketBase."""
    cases = [
        case
        for folder in ("rules-corpus", "more-rules")
        for case in json.loads((_TESTS / folder / "cases.json").read_text(encoding="utf-8"))
    ]
    texts = [case["rule"] for case in cases] + [case["query"].get("filter") for case in cases]
    return [text for text in dict.fromkeys(texts) if text]


def test_what_was_taken_apart_reads_back_as_it_was() -> None:
    compared = 0
    for text in recorded():
        try:
            meant = parse_expression(text)
        except RuleError:
            continue
        piece = split_rule(text)
        compared += 1
        assert parse_expression(piece.text(" ")) == meant
        assert parse_expression(piece.text("")) == meant
        assert len(piece.text("")) <= len(text)
    assert compared > 1500


def test_parts_are_in_the_order_of_the_text() -> None:
    a, b, c = (
        Clause("a", "=", "1"),
        Clause("b", "?!=", "'x'"),
        Clause("c", "~", "strftime('%Y',b)"),
    )

    assert split_rule("a = 1 // one\n && (b ?!= 'x' || c ~ strftime( '%Y', b ))") == ClauseGroup(
        True, (a, ClauseGroup(False, (b, c)))
    )
    assert split_rule("(b?!='x' && a=1) || c~strftime('%Y',b)") == ClauseGroup(
        False, (ClauseGroup(True, (b, a)), c)
    )


def test_brackets_are_where_they_are_needed() -> None:
    piece = split_rule("a = 1 && (b = 2 || c = 3 && d = 4)")

    assert piece.text(" ") == "a = 1 && (b = 2 || (c = 3 && d = 4))"
    assert piece.text("") == "a=1&&(b=2||c=3&&d=4)"


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(RuleError):
        split_rule("a =")
