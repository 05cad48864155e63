"""How many guesses a minute has."""

from __future__ import annotations

from pgrealtime.auth.attempts import Attempts

ANN = ("10.0.0.1", "ann")


def tries(attempts: Attempts, who: tuple[str, str], now: float, count: int = 20) -> int:
    return sum(attempts.admit(who, now) for _ in range(count))


def test_a_minute_has_so_many_attempts_and_no_more() -> None:
    attempts = Attempts(10)

    assert tries(attempts, ANN, 100.0) == 10
    assert tries(attempts, ANN, 105.9) == 0
    assert tries(attempts, ANN, 106.0) == 1
    assert tries(attempts, ANN, 1000.0) == 10


def test_a_refused_attempt_does_not_prolong_the_wait() -> None:
    attempts = Attempts(1)
    assert attempts.admit(ANN, 0.0)
    for second in range(1, 60):
        assert not attempts.admit(ANN, float(second))

    assert attempts.admit(ANN, 60.0)


def test_others_are_counted_apart() -> None:
    """One who guesses can't lock out the owner at another address, nor the neighbours."""
    attempts = Attempts(3)
    assert tries(attempts, ANN, 0.0) == 3

    assert tries(attempts, ("10.0.0.2", "ann"), 0.0) == 3
    assert tries(attempts, ("10.0.0.1", "bob"), 0.0) == 3


def test_whoever_knew_the_password_starts_anew() -> None:
    attempts = Attempts(3)
    tries(attempts, ANN, 0.0)

    attempts.forget(ANN)

    assert tries(attempts, ANN, 0.0) == 3


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    attempts = Attempts(1)
    for n in range(20_001):
        attempts.admit(("10.0.0.1", str(n)), float(n) / 1e6)

    assert len(attempts._used) == 20_000
    assert attempts.admit(("10.0.0.1", "0"), 0.1)
    assert not attempts.admit(("10.0.0.1", "20000"), 0.1)
