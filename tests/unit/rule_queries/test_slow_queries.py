"""A query that times out repeatedly is suspended for a while."""

from __future__ import annotations

from pgrealtime.rule_queries.slow_queries import CircuitBreakers
from tests.clock import Clock


class Kind:
    """A subject of queries."""


def test_three_time_outs_are_borne_and_each_further_one_suspends_for_twice_as_long() -> None:
    clock = Clock()
    breakers, slow, other = CircuitBreakers[Kind](clock), Kind(), Kind()
    suspended_seconds = []
    for _ in range(13):
        assert not breakers.is_open(slow)
        suspended_seconds.append(breakers.record_timeout(slow, is_tolerated=True))
        assert breakers.is_open(slow) == bool(suspended_seconds[-1])
        clock.now += suspended_seconds[-1]

    assert suspended_seconds == [0, 0, 0, 5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert breakers.has_timed_out(slow)
    assert not breakers.has_timed_out(other)
    assert not breakers.is_open(other)


def test_without_patience_the_first_time_out_suspends() -> None:
    """Many slow queries together are as bad as one that is slow often."""
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


def test_time_outs_of_removed_queries_are_forgotten() -> None:
    breakers, slow = CircuitBreakers[Kind](Clock()), Kind()
    breakers.record_timeout(slow, is_tolerated=True)
    del slow

    assert not breakers._timeouts
