"""Every error is printed in PostgreSQL's form and has a stable code."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from pgrealtime import errors
from pgrealtime.errors import (
    ConfigError,
    ConfigProblem,
    DatabaseUnreachableError,
    PgRealtimeError,
    RuleError,
    RuleNameError,
    RuleSyntaxError,
    SlotBusyError,
    SlotLostError,
    SubscriptionError,
    WalError,
)


def _all_classes(root: type[PgRealtimeError] = PgRealtimeError) -> Iterator[type[PgRealtimeError]]:
    yield root
    for child in root.__subclasses__():
        yield from _all_classes(child)


def test_a_fault_prints_as_postgres_prints_one() -> None:
    fault = SlotLostError(
        'replication slot "pgrealtime" was invalidated by the server',
        detail="It fell 10.4 GB behind.",
        hint="A new slot was made.",
    )
    assert str(fault) == (
        'slot_lost: replication slot "pgrealtime" was invalidated by the server\n'
        "DETAIL: It fell 10.4 GB behind.\n"
        "HINT: A new slot was made."
    )


@pytest.mark.parametrize(
    ("detail", "hint", "text"),
    [
        ("", "", "slot_busy: in use"),
        ("By pid 7.", "", "slot_busy: in use\nDETAIL: By pid 7."),
        ("", "Wait.", "slot_busy: in use\nHINT: Wait."),
    ],
)
def test_what_is_not_known_is_not_printed(detail: str, hint: str, text: str) -> None:
    assert str(SlotBusyError("in use", detail=detail, hint=hint)) == text


def test_one_class_can_stand_for_several_codes() -> None:
    """Subscribe calls are refused for several reasons, which clients tell apart by the code."""
    assert SubscriptionError("no").error_code == "subscription_refused"
    assert SubscriptionError("no", code="client_unknown").error_code == "client_unknown"
    assert str(SubscriptionError("no", code="client_unknown")) == "client_unknown: no"
    assert SubscriptionError.code == "subscription_refused"


def test_every_class_has_a_code_of_its_own() -> None:
    """A code in a log names one kind of fault."""
    codes = [(c.code, c.__name__) for c in _all_classes() if c.__module__ == errors.__name__]
    assert len({code for code, _ in codes}) == len(codes)
    assert [(c, name) for c, name in codes if not re.fullmatch(r"[a-z]+(_[a-z]+)*", c)] == []


def test_only_what_mends_itself_is_retried() -> None:
    """Waiting for anything else would hide a fault that someone has to mend."""
    retryable = {
        c.__name__ for c in _all_classes() if c.retryable and c.__module__ == "pgrealtime.errors"
    }
    assert retryable == {
        "DatabaseUnreachableError",
        "LogAwayError",
        "SlotBusyError",
        "SlotLostError",
        "StreamInterruptedError",
        "UnexpectedMessageError",
        "WorkerGoneError",
    }
    assert issubclass(SlotBusyError, WalError)
    assert not issubclass(DatabaseUnreachableError, WalError)


def test_a_configuration_is_faulted_for_everything_at_once() -> None:
    """Mending one typo per start is what operators hate."""
    fault = ConfigError(
        (
            ConfigProblem(
                "collections.posts.list_rul", "unknown key", 'perhaps "list_rule"', line=12
            ),
            ConfigProblem("database.url", "is empty"),
        ),
        source_name="pgrealtime.yaml",
    )
    assert str(fault) == (
        "config_invalid: pgrealtime.yaml has 2 problems\n"
        "DETAIL: pgrealtime.yaml:12: collections.posts.list_rul: unknown key"
        ' (perhaps "list_rule")\n'
        "pgrealtime.yaml: database.url: is empty"
    )
    assert [problem.line for problem in fault.problems] == [12, None]


def test_one_problem_is_one_problem() -> None:
    assert ConfigError((ConfigProblem("a", "b"),)).message == "configuration has 1 problem"


def test_a_rule_fault_knows_its_place_in_the_text() -> None:
    rule = "publishd = true"
    fault = RuleNameError("unknown field", start=0, end=8, hint='Perhaps you meant "published".')
    assert rule[fault.start : fault.end] == "publishd"
    assert str(fault) == 'rule_name: unknown field\nHINT: Perhaps you meant "published".'
    assert isinstance(fault, RuleError)
    assert not isinstance(fault, RuleSyntaxError)
