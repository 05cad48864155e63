"""Adds up the suites' JUnit reports: the last line of ``tests/run.sh``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET


class Total(NamedTuple):
    """Tests by how they ended; an error in a fixture counts as a failure of its test."""

    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def add_up(reports: Iterable[Path]) -> Total:
    """Return the sums over the reports that pytest wrote with ``--junitxml``."""
    suites = [suite for report in reports for suite in ET.parse(report).iter("testsuite")]

    def count(*kinds: str) -> int:
        return sum(int(suite.attrib[kind]) for suite in suites for kind in kinds)

    failed, skipped = count("failures", "errors"), count("skipped")
    return Total(count("tests") - failed - skipped, failed, skipped)


if __name__ == "__main__":
    total = add_up(map(Path, sys.argv[1:]))
    sys.stdout.write(f"{total}\n")
    sys.exit(total.failed > 0 or total.passed == 0)
