"""Slow questions: how often they are borne, and how long they aren't put then."""

from __future__ import annotations

from pgrealtime.hub.suspension import Suspensions


class Kind:
    """Something that questions are about."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_three_time_outs_are_borne_and_each_further_one_suspends_for_twice_as_long() -> None:
    clock = Clock()
    suspensions, slow, other = Suspensions[Kind](clock), Kind(), Kind()
    told = []
    for _ in range(13):
        assert not suspensions.is_suspended(slow)
        told.append(suspensions.note_timeout(slow, is_borne=True))
        assert suspensions.is_suspended(slow) == bool(told[-1])
        clock.now += told[-1]

    assert told == [0, 0, 0, 5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert suspensions.is_known(slow)
    assert not suspensions.is_known(other)
    assert not suspensions.is_suspended(other)


def test_without_patience_the_first_time_out_suspends() -> None:
    """Many that are slow together are as bad as one that is slow often."""
    suspensions, slow = Suspensions[Kind](Clock()), Kind()

    assert suspensions.note_timeout(slow, is_borne=False) == 5
    assert suspensions.note_timeout(slow, is_borne=True) == 10


def test_after_ten_good_minutes_a_question_begins_anew() -> None:
    clock = Clock()
    suspensions, slow = Suspensions[Kind](clock), Kind()
    suspensions.note_timeout(slow, is_borne=False)
    clock.now += 5 + 600
    again = suspensions.note_timeout(slow, is_borne=False)
    clock.now += 10 + 601

    assert again == 10
    assert suspensions.note_timeout(slow, is_borne=True) == 0


def test_nothing_is_kept_of_what_nobody_asks_any_more() -> None:
    suspensions, slow = Suspensions[Kind](Clock()), Kind()
    suspensions.note_timeout(slow, is_borne=True)
    del slow

    assert not suspensions._slow
