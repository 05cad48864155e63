"""Answers to guesses are delayed as PocketBase delays them (records, section 13)."""

from __future__ import annotations

from pgrealtime.reads.throttle import GuessThrottle


def test_the_fourth_guess_within_three_seconds_and_later_ones_are_delayed() -> None:
    throttle = GuessThrottle()

    delays = [throttle.delay_seconds("1.2.3.4", "posts", now) for now in (0, 1, 2, 2.5, 2.9)]

    assert delays[:3] == [0, 0, 0]
    assert all(0 <= delay < 0.5 for delay in delays[3:])
    assert any(delays[3:])


def test_other_addresses_other_collections_and_a_later_window_count_anew() -> None:
    throttle = GuessThrottle()
    for _ in range(4):
        throttle.delay_seconds("1.2.3.4", "posts", 0)

    assert throttle.delay_seconds("1.2.3.5", "posts", 0) == 0
    assert throttle.delay_seconds("1.2.3.4", "users", 0) == 0
    assert throttle.delay_seconds("1.2.3.4", "posts", 3.1) == 0
