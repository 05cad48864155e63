"""A question that times out again and again is left out for a while."""

from __future__ import annotations

from pgrealtime.rule_queries.slow_queries import CircuitBreakers


class Clock:
    """Seconds, advanced by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Kind:
    """Something that questions are about."""


def test_three_time_outs_are_borne_and_each_further_one_suspends_for_twice_as_long() -> None:
    clock = Clock()
    breakers, slow, other = CircuitBreakers[Kind](clock), Kind(), Kind()
    told = []
    for _ in range(13):
        assert not breakers.is_open(slow)
        told.append(breakers.record_timeout(slow, is_tolerated=True))
        assert breakers.is_open(slow) == bool(told[-1])
        clock.now += told[-1]

    assert told == [0, 0, 0, 5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert breakers.has_timed_out(slow)
    assert not breakers.has_timed_out(other)
    assert not breakers.is_open(other)


def test_without_patience_the_first_time_out_suspends() -> None:
    """Many that are slow together are as bad as one that is slow often."""
    breakers, slow = CircuitBreakers[Kind](Clock()), Kind()

    assert breakers.record_timeout(slow, is_tolerated=False) == 5
    assert breakers.record_timeout(slow, is_tolerated=True) == 10


def test_after_ten_good_minutes_a_question_begins_anew() -> None:
    clock = Clock()
    breakers, slow = CircuitBreakers[Kind](clock), Kind()
    breakers.record_timeout(slow, is_tolerated=False)
    clock.now += 5 + 600
    again = breakers.record_timeout(slow, is_tolerated=False)
    clock.now += 10 + 601

    assert again == 10
    assert breakers.record_timeout(slow, is_tolerated=True) == 0


def test_nothing_is_kept_of_what_nobody_asks_any_more() -> None:
    breakers, slow = CircuitBreakers[Kind](Clock()), Kind()
    breakers.record_timeout(slow, is_tolerated=True)
    del slow

    assert not breakers._timeouts
