"""Whether a server could treat a walsender as a synchronous standby."""

from __future__ import annotations

import pytest

from pgrealtime.wal.visible_lsn import may_match_standby_names


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [
        ("", False),
        ("*", True),
        ("FIRST 1 (a, *)", True),
        ("a, b", False),
        ("ANY 2 (a, PGRealtime)", True),
        ('"pgrealtime"', True),
    ],
)
def test_setting_is_matched_generously(setting: str, verdict: object) -> None:
    """In doubt it could: waiting for visibility is only slower."""
    assert may_match_standby_names(setting, "pgrealtime") is verdict
