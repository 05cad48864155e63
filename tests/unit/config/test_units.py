"""Durations and sizes, and what isn't one."""

from __future__ import annotations

import pytest

from pgrealtime.config.units import format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("1.5s", 1.5),
        ("25s", 25.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("5d", 432_000.0),
        ("0s", 0.0),
        ("0", 0.0),
        (0, 0.0),
        (0.25, 0.25),
    ],
)
def test_durations_become_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *("", "25", "s", "5 m", "-5s", "+5s", "1h30m", "5M", "1e3s", ".5s", "5.s", "5s\n"),
        *(25, -1, -0.5, float("nan"), float("inf"), True, False, None, ["5s"]),
    ],
    ids=repr,
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    """``timeout: 25`` could mean seconds, minutes or milliseconds."""
    with pytest.raises(ValueError, match="not a duration; write it as 500ms"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("64KiB", 65_536),
        ("16MiB", 16_777_216),
        ("4GiB", 4_294_967_296),
        (1_048_576, 1_048_576),
        (0, 0),
    ],
)
def test_sizes_become_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value",
    ["", "KiB", "1.5MiB", "16 MiB", "16MB", "16mib", "-1", "1TiB", -1, 1.0, True, False, None],
    ids=repr,
)
def test_what_is_no_size_is_refused(value: object) -> None:
    """``16MB`` is refused too: it is 4.6 % less than most authors of it mean."""
    with pytest.raises(ValueError, match="not a size; write it as 64KiB"):
        parse_size(value)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 MiB"), (96 << 20, "96.0 MiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5,120.0 GiB")],
)
def test_sizes_are_written_in_units(size: int, text: str) -> None:
    assert format_size(size) == text
