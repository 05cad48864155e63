"""Parses durations and sizes of the configuration, and writes sizes."""

import re

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+)(B|KiB|MiB|GiB)?")
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_duration(value: object) -> float:
    """Return seconds for ``500ms``, ``25s``, ``5m``, ``1h``, ``5d``; 0 needs no unit.

    A float is seconds already: the result may be parsed again.

    Raises:
        ValueError: Anything else, a whole number without a unit included.
    """
    if isinstance(value, float) and 0.0 <= value < float("inf"):
        return value
    if value in (0, "0") and not isinstance(value, bool):
        return 0.0
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a duration; write it as 500ms, 25s, 5m, 1h or 5d")
    return float(match[1]) * _SECONDS[match[2]]


def parse_size(value: object) -> int:
    """Return bytes for ``64KiB``, ``16MiB``, ``1GiB`` or a plain number of bytes.

    Raises:
        ValueError: Anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a size; write it as 64KiB, 16MiB or 1GiB")
    return int(match[1]) * _BYTES[match[2] or "B"]


def format_size(size: int) -> str:
    """Return bytes as an operator reads them: ``1.5 GiB``, ``64.0 MiB``."""
    unit = "GiB" if size >= _BYTES["GiB"] else "MiB"
    return f"{size / _BYTES[unit]:,.1f} {unit}"
