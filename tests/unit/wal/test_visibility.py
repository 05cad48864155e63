"""When a server could take a walsender for a synchronous standby."""

from __future__ import annotations

import pytest

from pgrealtime.wal.visible_lsn import could_be_taken_for_standby


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
    assert could_be_taken_for_standby(setting, "pgrealtime") is verdict
