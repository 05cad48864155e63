"""What a comparison means, before either translation renders it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pgrealtime.rules.language.comparison import (
    ComparisonKind,
    ComparisonPlan,
    Conversion,
    Pattern,
    plan_comparison,
)
from pgrealtime.rules.language.parameters import parameter_class, parameter_value
from pgrealtime.rules.language.predicate import comparisons, condition_parameters
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import resolve_rule
from tests.unit.rules.schema import COLLECTIONS, POSTS, USERS

NOW = datetime(2024, 1, 2, tzinfo=UTC)
REQUEST = RuleRequest(query={"q": "a", "empty": ""})


def _plan(rule: str) -> ComparisonPlan:
    where = resolve_rule(rule, COLLECTIONS, POSTS, USERS).where
    classes = {
        parameter: parameter_class(parameter_value(parameter, REQUEST, NOW))
        for parameter in condition_parameters(where)
    }
    return plan_comparison(comparisons(where)[0], classes)


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ("title = 'a'", ComparisonKind.EQUAL),
        ("title != 'a'", ComparisonKind.NOT_DISTINCT),
        ("title = ''", ComparisonKind.BLANK),
        ("'' = title", ComparisonKind.BLANK),
        ("null = @request.query.empty", ComparisonKind.CONSTANT),
        ("title = author.name", ComparisonKind.COALESCED),
        ("data.a = title", ComparisonKind.NOT_DISTINCT),
        ("data.a = @request.query.q:isset", ComparisonKind.TRUTH),
        ("title = @request.query.q:isset", ComparisonKind.EQUAL),
        ("title != @request.query.q:isset", ComparisonKind.TRUTH),
        ("title > 'a'", ComparisonKind.ORDER),
        ("title ~ 'a'", ComparisonKind.LIKE),
        (r"title ~ 'a%\\'", ComparisonKind.LIKE_NOTHING),
    ],
)
def test_equality_has_the_first_meaning_that_applies(rule: str, kind: ComparisonKind) -> None:
    """JSON is NULL-safe, a nonempty constant is compared plainly, an empty one tests for blank."""
    assert _plan(rule).shared.kind is kind


@pytest.mark.parametrize(
    ("rule", "conversions"),
    [
        ("views = '5'", (Conversion.NONE, Conversion.NUMBER)),
        ("title = 5", (Conversion.NONE, Conversion.TEXT)),
        ("5 = title", (Conversion.TEXT, Conversion.NONE)),
        ("views = title", (Conversion.NONE, Conversion.NUMBER)),
        ("title = author.name", (Conversion.NONE, Conversion.NONE)),
        ("title:lower = 5", (Conversion.NONE, Conversion.NONE)),
    ],
)
def test_affinity_converts_one_side(rule: str, conversions: tuple[Conversion, Conversion]) -> None:
    """Numeric affinity before text, text before none; COALESCE has no affinity."""
    plan = _plan(rule).shared
    if plan.kind is ComparisonKind.COALESCED:
        conversions = (Conversion.NONE, Conversion.NONE)
    assert (plan.left.conversion, plan.right.conversion) == conversions


@pytest.mark.parametrize(
    ("rule", "is_searched"),
    [
        ("title = 'a'", None),
        ("reviewers.name ?= 'a'", None),
        ("reviewers.name = 'a'", (True, False)),
        ("'a' = reviewers.name", (False, True)),
        ("reviewers.name = reviewers.id", (True, True)),
    ],
)
def test_match_all_searches_a_counterexample(
    rule: str, is_searched: tuple[bool, bool] | None
) -> None:
    """Only of paths to many values, and not for a comparison with ``?``."""
    searched = _plan(rule).searched
    found = None if searched is None else (searched.left.is_searched, searched.right.is_searched)
    assert found == is_searched


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        ("title ~ 'a'", Pattern.BOUND),
        ("title ~ @request.query.missing", Pattern.NULL),
        ("title ~ author.name", Pattern.WRAPPED),
        ("title ~ strftime('%Y', pub_date)", Pattern.TEXT),
        ("title ~ strftime('%Y', 'now')", Pattern.NULL),
        ("title ~ geoDistance(1, 2, 3, 4)", Pattern.NULL),
    ],
)
def test_constants_are_made_patterns(rule: str, pattern: Pattern) -> None:
    """A function's constants too, which makes most functions of constants NULL."""
    assert _plan(rule).shared.pattern is pattern


def test_json_constant_is_spelled_as_jsonb_has_it() -> None:
    """Both translations compare the text of a container, whose order of keys is jsonb's."""
    plan = _plan("data = @request.query.q").shared

    assert (plan.left.is_json_text, plan.right.is_json_text) == (False, True)
