"""The limit of login attempts per minute."""

from __future__ import annotations

from pgrealtime.auth.login import RateLimiter

ANN = ("10.0.0.1", "ann")


def tries(attempts: RateLimiter, key: tuple[str, str], now: float, count: int = 20) -> int:
    return sum(attempts.try_acquire(key, now) for _ in range(count))


def test_a_minute_has_so_many_attempts_and_no_more() -> None:
    attempts = RateLimiter(10)

    assert tries(attempts, ANN, 100.0) == 10
    assert tries(attempts, ANN, 105.9) == 0
    assert tries(attempts, ANN, 106.0) == 1
    assert tries(attempts, ANN, 1000.0) == 10


def test_a_refused_attempt_does_not_prolong_the_wait() -> None:
    attempts = RateLimiter(1)
    assert attempts.try_acquire(ANN, 0.0)
    for second in range(1, 60):
        assert not attempts.try_acquire(ANN, float(second))

    assert attempts.try_acquire(ANN, 60.0)


def test_others_are_counted_apart() -> None:
    """An attacker locks out neither the owner at another address nor other accounts."""
    attempts = RateLimiter(3)
    assert tries(attempts, ANN, 0.0) == 3

    assert tries(attempts, ("10.0.0.2", "ann"), 0.0) == 3
    assert tries(attempts, ("10.0.0.1", "bob"), 0.0) == 3


def test_a_correct_password_resets_the_count() -> None:
    attempts = RateLimiter(3)
    tries(attempts, ANN, 0.0)

    attempts.reset(ANN)

    assert tries(attempts, ANN, 0.0) == 3


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    attempts = RateLimiter(1)
    for n in range(20_001):
        attempts.try_acquire(("10.0.0.1", str(n)), float(n) / 1e6)

    assert len(attempts._used) == 20_000
    assert attempts.try_acquire(("10.0.0.1", "0"), 0.1)
    assert not attempts.try_acquire(("10.0.0.1", "20000"), 0.1)
