"""What tests do without a program that they need."""

import os
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip for lack of a program that ``tests/run.sh`` installs or starts; in CI fail instead."""
    if os.environ.get("CI") == "true" or os.environ.get("PGREALTIME_REQUIRE_SERVER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
